"""Rows I1 to I3, I5, I6, I9 and I10 of the reliability sheet: the masks of any picture of any size."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_matrix import VARIANTS, Cell
from PIL import Image
from torch import nn
from transformers import pipeline

from hf_ctxseg import MODELS, CtxSegImageProcessor, open_image
from hf_ctxseg.cli import main
from hf_ctxseg.inference import Predictor, load_run
from hf_ctxseg.registry import head_name

HEADS = [pytest.param(classes, id=head_name(classes[0])) for classes in MODELS]
CELLS = [Cell(head, variant, "test_resnet", 8, "none") for head, variants in VARIANTS.items() for variant in variants]


@pytest.fixture(scope="module")
def routes(run_folder):
    """The three ways to a mask; each takes what it is given and returns an array (H, W)."""
    model, processor = load_run(run_folder)
    predictor = Predictor(model, processor)
    segment = pipeline("image-segmentation", model=model, image_processor=processor)

    def by_processor(image, size):
        inputs = processor(image, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        (mask,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        return mask.numpy()

    def by_pipeline(image, size):
        mask = np.full(size, -1)
        for part in segment(image):
            mask[np.asarray(part["mask"]) > 0] = model.config.label2id[part["label"]]
        return mask

    return {"predict": lambda image, size: predictor(image).mask, "processor": by_processor, "pipeline": by_pipeline}


def grey(picture):
    return np.asarray(picture)[..., 1]


def rgb(plane):
    return np.repeat(plane[..., None], 3, axis=2)


def alpha(picture):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (picture.height, picture.width), np.uint8))


def transparent(picture, transparency):
    image = picture.quantize(120)
    image.info["transparency"] = transparency
    return image


def inks(picture):
    planes = 255 - np.asarray(picture)
    return Image.merge("CMYK", [*Image.fromarray(planes).split(), Image.new("L", picture.size)])


# The picture to store, its format, and the pixels that anyone sees in it.
STORED = {
    "L": lambda p: (Image.fromarray(grey(p)), "PNG", rgb(grey(p))),
    "LA": lambda p: (Image.merge("LA", [Image.fromarray(grey(p)), alpha(p)]), "PNG", rgb(grey(p))),
    "RGBA": lambda p: (Image.merge("RGBA", [*p.split(), alpha(p)]), "PNG", np.asarray(p)),
    "P": lambda p: (p.quantize(120), "PNG", np.asarray(p.quantize(120).convert("RGB"))),
    "P, a colour transparent": lambda p: (transparent(p, 3), "PNG", np.asarray(p.quantize(120).convert("RGB"))),
    "1": lambda p: (Image.fromarray(grey(p) > 127), "PNG", rgb((grey(p) > 127).astype(np.uint8) * 255)),
    "CMYK": lambda p: (inks(p), "TIFF", np.asarray(p)),
    "animated GIF": lambda p: (p.quantize(120), "GIF", np.asarray(p.quantize(120).convert("RGB"))),
    "animated PNG": lambda p: (p, "PNG", np.asarray(p)),
    "animated WebP": lambda p: (p, "WEBP", np.asarray(p)),
    "TIFF of several pages": lambda p: (p, "TIFF", np.asarray(p)),
}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the pipeline leaves files of frames open
@pytest.mark.parametrize("name", STORED)
def test_i1_masks_of_all_routes_are_those_of_the_rgb_twin(name, routes, picture, tmp_path):
    image, form, pixels = STORED[name](picture)
    arguments = {"lossless": True} if form == "WEBP" else {}
    if "of several" in name or "animated" in name:
        arguments |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]}
    path = tmp_path / f"picture.{form.lower()}"
    image.save(path, form, **arguments)
    expected = routes["predict"](pixels, (45, 61))
    assert len(np.unique(expected)) > 1
    for route, mask_of in routes.items():
        assert np.array_equal(mask_of(str(path), (45, 61)), expected), route
        with Image.open(path) as opened:
            assert np.array_equal(mask_of(opened, (45, 61)), expected), route


@pytest.mark.filterwarnings("ignore:Palette images with Transparency expressed in bytes")  # of the pipeline itself
def test_i1_palettes_with_an_alpha_for_each_colour(routes, picture):
    image = transparent(picture, bytes(range(120)))
    expected = routes["predict"](image.convert("RGBA").convert("RGB"), (45, 61))
    for route, mask_of in routes.items():
        assert np.array_equal(mask_of(image, (45, 61)), expected), route


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "F, 0 to 1", "F, 0 to 255", "I"])
def test_i2_masks_of_16_bit_and_floating_point_pictures(mode, routes, picture, tmp_path):
    wide = grey(picture).astype(np.uint16) * 257
    image = {
        "I;16": lambda: Image.fromarray(wide),
        "I;16B": lambda: Image.frombytes("I;16B", picture.size, wide.astype(">u2").tobytes()),
        "F, 0 to 1": lambda: Image.fromarray(grey(picture).astype(np.float32) / 255),
        "F, 0 to 255": lambda: Image.fromarray(grey(picture).astype(np.float32)),
        "I": lambda: Image.fromarray(wide.astype(np.int32)),
    }[mode]()
    path = tmp_path / "picture.tif"
    image.save(path)
    expected = routes["predict"](rgb(grey(picture)), (45, 61))
    assert len(np.unique(expected)) > 1
    for route in ("predict", "processor"):
        for source in (path, image):
            assert np.array_equal(routes[route](source, (45, 61)), expected), route
    assert np.array_equal(routes["pipeline"](open_image(path), (45, 61)), expected)  # which clips a file by itself


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_i3_masks_match_the_upright_picture_on_all_routes(form, orientation, routes, picture, tmp_path):
    stored = np.asarray(picture)
    turn = {  # by the EXIF standard: where the stored first row and first column are seen
        2: lambda: stored[:, ::-1],  # top, right
        3: lambda: stored[::-1, ::-1],  # bottom, right
        4: lambda: stored[::-1],  # bottom, left
        5: lambda: stored.swapaxes(0, 1),  # left, top
        6: lambda: stored.swapaxes(0, 1)[:, ::-1],  # right, top
        7: lambda: stored.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
        8: lambda: stored.swapaxes(0, 1)[::-1],  # left, bottom
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    picture.save(path, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    if form == "JPEG":  # lossy
        with Image.open(path) as opened:
            stored = np.asarray(opened)
    upright = turn[orientation]()
    expected = routes["predict"](np.ascontiguousarray(upright), upright.shape[:2])
    assert expected.shape == upright.shape[:2]
    for route, mask_of in routes.items():
        assert np.array_equal(mask_of(str(path), upright.shape[:2]), expected), route


def test_i4_a_damaged_picture_does_not_stop_the_others(run_folder, picture, tmp_path, capsys):
    for name in ("a.png", "b.png", "c.png"):
        picture.save(tmp_path / name)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:-900])
    (tmp_path / "d.jpg").write_bytes(b"")
    out = tmp_path / "out"
    assert main(["predict", str(run_folder), *map(str, sorted(tmp_path.glob("*.*g"))), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "b.png cannot be read: " in said and "d.jpg cannot be read: the file is empty" in said
    assert sorted(path.name for path in out.glob("*_mask.png")) == ["a_mask.png", "c_mask.png"]


def check_mask(predictor, height, width):
    pixels = np.random.default_rng(height * 71 + width).integers(0, 256, (height, width, 3), np.uint8)
    inputs = predictor.processor(pixels, return_tensors="pt")
    with torch.inference_mode():
        outputs = predictor.model(**inputs)
    assert torch.isfinite(outputs.logits).all()
    (expected,) = predictor.processor.post_process_semantic_segmentation(outputs, [(height, width)])
    mask = predictor(pixels).mask
    assert mask.shape == (height, width)
    assert np.array_equal(mask, expected.numpy())
    assert mask.min() >= 0 and mask.max() < predictor.model.config.num_labels


@pytest.fixture(scope="module")
def small(tiny, live):
    """A small model of a head, made once; its atrous rates are the default ones."""
    made = {}

    def build(classes):
        if classes not in made:
            torch.manual_seed(0)
            made[classes] = live(classes[2](tiny(classes[0], backbone="test_resnet", output_stride=8)))
        return made[classes]

    return build


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("classes", HEADS)
def test_i5_the_smallest_and_thinnest_pictures_have_finite_masks(classes, size, small):
    check_mask(Predictor(small(classes)), *size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2, 3)])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_i5_in_every_form_of_every_head(cell, size):
    check_mask(Predictor(cell.build().eval()), *size)


EDGES = st.integers(1, 70)


@pytest.mark.parametrize("classes", HEADS)
def test_i6_masks_have_the_picture_s_size(classes, small):
    predictor = Predictor(small(classes))

    @settings(max_examples=15, deadline=None, database=None, derandomize=True)
    @given(EDGES, EDGES)
    def check(height, width):
        check_mask(predictor, height, width)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_i6_in_every_form_of_every_head(cell):
    predictor = Predictor(cell.build().eval())

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(EDGES, EDGES)
    def check(height, width):
        check_mask(predictor, height, width)

    check()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("classes", HEADS)
def test_i6_nothing_is_shifted(classes, align_corners, tiny, live):
    # A network of mirrored kernels sees no difference between left and right: what it gives for a mirrored picture
    # is mirrored, exactly where the strides' grid is, in widths of a whole number of strides and one pixel.
    torch.manual_seed(0)
    config = tiny(classes[0], output_stride=8, align_corners=align_corners)
    model = live(classes[2](config))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = (module.weight + module.weight.flip(-1)).data / 2
    predictor = Predictor(model)

    @settings(max_examples=8, deadline=None, database=None, derandomize=True)
    @given(EDGES, st.integers(0, 8).map(lambda strides: 8 * strides + 1))
    def check(height, width):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        values = predictor.processor(pixels, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            logits, mirrored = model(values).logits, model(values.flip(-1)).logits
        torch.testing.assert_close(mirrored.flip(-1), logits, atol=1e-4, rtol=1e-4)
        differing = predictor(pixels[:, ::-1]).mask[:, ::-1] != predictor(pixels).mask
        assert differing.mean() < 0.002  # ties but for rounding

    check()


def mixed(picture):
    """Pictures of other modes and sizes, and the size of each."""
    return [
        (picture, (45, 61)),
        (picture.crop((0, 0, 33, 20)).convert("L"), (20, 33)),
        (np.asarray(picture)[:7, :40] / 255, (7, 40)),
        (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, :45, :61], (45, 61)),
        (picture.rotate(90, expand=True).convert("RGBA"), (61, 45)),
    ]


def test_i9_a_mixed_batch_is_processed_as_one_by_one(picture):
    images = [image for image, _ in mixed(picture)]
    for processor in (
        CtxSegImageProcessor(),
        CtxSegImageProcessor(do_resize=True, size={"height": 40, "width": 56}),
        CtxSegImageProcessor(do_resize=True, size={"max_height": 50, "max_width": 50}),
    ):
        for image, together in zip(images, processor(images)["pixel_values"], strict=True):
            assert torch.equal(processor(image)["pixel_values"][0], together)


@pytest.mark.parametrize("classes", HEADS)
def test_i9_masks_of_a_mixed_batch_are_those_of_its_pictures(classes, small, picture):
    model = small(classes)
    images, sizes = zip(*mixed(picture), strict=True)
    processor = CtxSegImageProcessor(do_resize=True, size={"height": 41, "width": 57})

    def masks(pictures, target_sizes):
        with torch.inference_mode():
            outputs = model(**processor(pictures, return_tensors="pt"))
        return processor.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)

    together = masks(list(images), list(sizes))
    for image, size, mask in zip(images, sizes, together, strict=True):
        assert mask.shape == size
        (alone,) = masks(image, [size])
        assert (alone != mask).float().mean() < 0.002  # sums of another order may break a tie otherwise


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("classes", HEADS)
def test_i10_values_that_are_no_numbers_leave_the_running_statistics_alone(classes, bad, tiny):
    torch.manual_seed(0)
    model = classes[2](tiny(classes[0], backbone="test_resnet")).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pixels = torch.randn(2, 3, 33, 35)
    pixels[1, 2, 5, 7] = bad
    for network, kind in ((model, torch.float32), (model.model, torch.float32), (model.bfloat16(), torch.bfloat16)):
        with pytest.raises(ValueError, match=r"pixel_values holds NaN or infinite values: look at the pictures"):
            network(pixels.to(kind))
    model.float()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model(torch.full((2, 3, 33, 35), 1e4))  # large values are none of these
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.eval()(pixels)  # no state to spoil


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.zeros(1, 9, 9, 3), torch.zeros(3, 9, 9)]
)
def test_i11_a_model_says_what_tensor_it_expects(pixels, small):
    with pytest.raises(
        ValueError, match=r"must be floating point of shape \(batch, 3, height, width\): pass pictures"
    ):
        small(MODELS[0])(pixels)


def test_i11_encoded_pictures_give_the_same_mask(routes, picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    expected = routes["predict"](picture, (45, 61))
    for source in (stream.getvalue(), stream, {"bytes": stream.getvalue(), "path": None}):
        for route in ("predict", "processor"):
            assert np.array_equal(routes[route](source, (45, 61)), expected)
