"""Attention maps: the row of the matrix, its place in the picture, mistakes, the drawn picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import hf_ctxseg
from hf_ctxseg import CtxSegImageProcessor, DeepLabV3Config, DeepLabV3ForSemanticSegmentation, NonLocalConfig
from hf_ctxseg import NonLocalForSemanticSegmentation as NonLocal
from hf_ctxseg.attention import attention_picture
from hf_ctxseg.cli import main
from hf_ctxseg.inference import Predictor
from hf_ctxseg.nonlocal_block import NonLocalBlock
from hf_ctxseg.prediction_files import FileOptions, predict_files


@pytest.fixture(scope="module")
def build(tiny, live):
    def model(model_class=NonLocal, config_class=NonLocalConfig, **fields):
        torch.manual_seed(0)
        built = live(model_class(tiny(config_class, **fields)))
        for module in built.modules():
            if isinstance(module, NonLocalBlock):
                for parameter in module.parameters():
                    parameter.data.normal_(std=0.7)
        return built

    return model


@pytest.fixture(scope="module")
def folder(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("nonlocal")
    build().save_pretrained(path)
    CtxSegImageProcessor.for_backbone("test_efficientnet").save_pretrained(path)
    return path


def all_pairs(model, block, picture):
    """The whole matrix (N, N) of an embedded gaussian block, from its input in an ordinary prediction."""
    kept = []
    hook = block.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(CtxSegImageProcessor.for_backbone("test_efficientnet")(images=picture, return_tensors="pt").pixel_values)
        hook.remove()
        (x,) = kept
        theta, phi = block.theta(x).flatten(2)[0], block.phi(x).flatten(2)[0]
        return (theta.T @ phi / len(theta) ** 0.5).softmax(-1), x.shape[2:]


@pytest.mark.parametrize("align_corners", [False, True])
def test_map_is_the_row_of_the_query_upsampled(build, picture, align_corners):
    model = build(align_corners=align_corners)
    weights, (rows, columns) = all_pairs(model, model.model.decode_head.nonlocal_block, picture)
    assert (rows, columns) == (6, 8)
    # Stride 8 in a picture of 61 x 45: the corners, and a pixel in the middle of the cell (4, 2).
    for query, (row, column) in {(0, 0): (0, 0), (60, 44): (5, 7), (34, 18): (2, 4), (60, 0): (0, 7)}.items():
        heat = hf_ctxseg.attention_map(model, picture, query)
        assert heat.shape == (45, 61) and heat.dtype == np.float32
        expected = F.interpolate(
            weights[row * columns + column].reshape(1, 1, rows, columns),
            (45, 61),
            mode="bilinear",
            align_corners=align_corners,
        )
        np.testing.assert_allclose(heat, expected[0, 0].numpy(), rtol=1e-4, atol=1e-6)


def test_the_last_block_is_shown_and_the_model_left_as_it_was(build, picture):
    one = build(backbone="resnet18", backbone_nonlocal_stages=[16]).train()
    before = {key: value.clone() for key, value in one.state_dict().items()}
    heat = hf_ctxseg.attention_map(one, picture, (30, 20))
    assert one.training
    assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
    blocks = [module for module in one.modules() if isinstance(module, NonLocalBlock)]
    assert len(blocks) == 2 and not any(block._forward_pre_hooks for block in blocks)
    weights, (rows, columns) = all_pairs(one.eval(), one.model.decode_head.nonlocal_block, picture)
    cell = int(20.5 * rows / 45) * columns + int(30.5 * columns / 61)
    assert heat.max() <= weights[cell].max() + 1e-6 and heat.min() >= weights[cell].min() - 1e-6


@pytest.mark.parametrize(
    "fields", [{"nonlocal_mode": "embedded_gaussian"}, {"backbone": "resnet18", "backbone_nonlocal_stages": [16]}]
)
def test_blocks_after_the_aspp_and_in_the_backbone(build, picture, fields):
    model = build(DeepLabV3ForSemanticSegmentation, DeepLabV3Config, **fields)
    heat = hf_ctxseg.attention_map(model, picture, (30, 20))
    assert heat.shape == (45, 61) and heat.min() >= 0 and heat.std() > 0


def test_dot_products_keep_their_sign(build, picture):
    heat = hf_ctxseg.attention_map(build(nonlocal_mode="dot_product"), picture, (30, 20))
    assert heat.min() < 0


def test_pooled_keys_stand_where_they_were_pooled(build):
    # 5 x 7 positions make 2 x 3 keys; the last row and column were left out by the pooling.
    model = build(sub_sample=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    block = model.model.decode_head.nonlocal_block
    kept = []
    hook = block.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    heat = hf_ctxseg.attention_map(model, picture, (20, 12))
    hook.remove()
    with torch.no_grad():
        keys = block.weights_of(kept[0], torch.tensor([1 * 7 + 2]))[0, 0]
    assert keys.shape == (2, 3)
    grid = np.zeros((1, 1, 5, 7), np.float32)
    for row in range(4):
        for column in range(6):
            grid[0, 0, row, column] = keys[row // 2, column // 2]
    expected = F.interpolate(torch.from_numpy(grid), (40, 56), mode="bilinear")[0, 0]
    np.testing.assert_allclose(heat, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_small_pictures_have_a_map(build):
    model = build(sub_sample=True)
    for size in ((1, 1), (3, 40), (20, 1)):
        heat = hf_ctxseg.attention_map(model, Image.new("RGB", size), (size[0] - 1, size[1] - 1))
        assert heat.shape == size[::-1] and np.isfinite(heat).all()


def test_models_and_pictures_in_every_form(folder, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    heats = [
        hf_ctxseg.attention_map(folder, form, (3, 4))
        for form in (picture, tmp_path / "a.png", str(tmp_path / "a.png"))
    ]
    heats.append(Predictor(str(folder)).attention(np.asarray(picture), (3, 4)))
    assert all(np.array_equal(heat, heats[0]) for heat in heats)


@pytest.mark.parametrize("query", [(61, 0), (0, 45), (-1, 0), (0, -1)])
def test_a_pixel_outside_is_refused(build, picture, query):
    with pytest.raises(
        ValueError, match="outside the picture of 61 x 45 pixels: give X from 0 to 60 and Y from 0 to 44"
    ):
        hf_ctxseg.attention_map(build(), picture, query)


def test_a_model_without_block_is_refused(run_folder, picture, tmp_path):
    with pytest.raises(ValueError, match="DeepLabV3ForSemanticSegmentation has no non-local block"):
        hf_ctxseg.attention_map(run_folder, picture, (0, 0))
    picture.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no non-local block"):
        predict_files(Predictor(run_folder), [tmp_path / "a.png"], tmp_path / "out", FileOptions(query=(0, 0)))
    assert not (tmp_path / "out").exists()


def test_picture_shows_heat_query_and_scale():
    heat = np.zeros((100, 300), np.float32)
    heat[40:, 200:] = 0.02
    drawn = np.asarray(attention_picture(Image.new("RGB", (300, 100), (90, 90, 90)), heat, (50, 50))).astype(int)
    assert drawn.shape[1] == 300 and drawn.shape[0] > 130
    top = int(np.flatnonzero((drawn < 250).all(axis=(1, 2)))[0])  # below the title
    shown = drawn[top : top + 100]
    assert shown[80, 280].sum() > 2 * shown[10, 280].sum()  # hot is bright
    assert (shown[45:56, 45:56].reshape(-1, 3) == 255).all(axis=1).any()  # the white ring
    assert (shown[80:, 100:200] == shown[80, 100]).all()
    bar = drawn[top + 100 :]
    coloured = np.flatnonzero((bar[:, 8:-8] < 250).any(axis=2).all(axis=1))
    brightness = bar[coloured[0], 8:-8].sum(axis=1)
    assert brightness[-1] > brightness[len(brightness) // 2] > brightness[0]


def test_picture_of_signed_weights_has_two_hues_about_zero():
    heat = np.zeros((100, 300), np.float32)
    heat[:, :100], heat[:, 200:] = -0.01, 0.01
    drawn = np.asarray(attention_picture(Image.new("RGB", (300, 100), (90, 90, 90)), heat, (150, 50))).astype(int)
    row = drawn[int(np.flatnonzero((drawn < 250).all(axis=(1, 2)))[0]) + 20]
    assert row[20, 2] > row[20, 0] + 20  # blue
    assert np.ptp(row[120]) < 20
    assert row[280, 0] > row[280, 2] + 20  # red


@pytest.mark.parametrize("size", [(1, 1), (20, 300), (300, 4)])
def test_pictures_of_any_shape_are_drawn(size):
    for heat in (np.zeros(size[::-1], np.float32), np.linspace(-1, 1, size[0] * size[1]).reshape(size[::-1])):
        drawn = attention_picture(Image.new("RGB", size), heat, (0, 0))
        assert drawn.mode == "RGB" and drawn.width >= size[0]


def test_command_writes_the_attention_picture(folder, picture, tmp_path, capsys):
    picture.save(tmp_path / "photo.png")
    out = tmp_path / "out"
    arguments = ["predict", str(folder), str(tmp_path / "photo.png"), "--out", str(out)]
    assert main([*arguments, "--attention", "12,30"]) == 0
    assert {path.name for path in out.iterdir()} == {"photo_mask.png", "photo_overlay.png", "photo_attention.png"}
    heat = hf_ctxseg.attention_map(folder, picture, (12, 30))
    expected = attention_picture(picture, heat, (12, 30))
    with Image.open(out / "photo_attention.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(expected))
    assert main([*arguments, "--attention", "61,30"]) == 1
    assert "give X from 0 to 60" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["12", "12,", "a,b", "1,2,3"])
def test_command_refuses_what_is_no_pixel(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", "model", "photo.png", "--out", "out", "--attention", text])
    assert stop.value.code == 2
    assert f"{text!r} is no pixel: give its column and row, for example 120,80" in capsys.readouterr().err
