import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from model_matrix import FIRST, HEADS, VARIANTS, Cell
from PIL import Image
from timm.layers.padding import pad_same as timm_pad_same
from torch.nn import functional as F

import hf_ctxseg
from hf_ctxseg import exporting
from hf_ctxseg.cli import main
from hf_ctxseg.inference import Predictor
from hf_ctxseg.same_padding import pad_same

MATRIX = [Cell(head, form, "test_resnet", 16, "align") for head in HEADS for form in VARIANTS.get(head, FIRST)]
MATRIX += [Cell(head, FIRST[head], "resnet18", 8, "blocks") for head in HEADS]


@pytest.fixture(scope="module")
def run_folder(tiny, live, tmp_path_factory):
    """A network that is traced quickly: one atrous convolution for a head."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    classes = {"id2label": {0: "ground", 1: "disc", 2: "box"}, "palette": [[10, 20, 30], [200, 0, 0], [0, 200, 0]]}
    config = tiny(hf_ctxseg.DeepLabV2Config, atrous_rates=[2], use_auxiliary_head=False, **classes)
    live(hf_ctxseg.DeepLabV2ForSemanticSegmentation(config)).save_pretrained(folder)
    hf_ctxseg.CtxSegImageProcessor.for_backbone(config.backbone).save_pretrained(folder)
    return folder


def test_onnx_of_one_size_gives_the_masks_of_predict_and_says_what_it_is(run_folder, picture, tmp_path):
    file = tmp_path / "new" / "model.onnx"
    given = {"height": picture.height, "width": picture.width}
    exported = hf_ctxseg.export(run_folder, file, mask=True, uint8=True, **given)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (mask,) = session.run(None, {"pictures": np.asarray(picture)[None]})
    assert mask.dtype == np.uint8
    expected = hf_ctxseg.predict(run_folder, picture).mask
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(mask[0], expected)
    told = session.get_modelmeta().custom_metadata_map
    assert told == exported.metadata
    assert json.loads(told["classes"]) == ["ground", "disc", "box"]
    assert json.loads(told["palette"]) == [[10, 20, 30], [200, 0, 0], [0, 200, 0]]
    assert told["input"].startswith("pictures: uint8 (1, 45, 61, 3)")
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert b"site-packages" not in file.read_bytes() and b"hf_ctxseg/" not in file.read_bytes()


def test_command_writes_pt2_for_any_size_and_overwrites_nothing(run_folder, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    assert main(["export", str(run_folder), str(file)]) == 0
    assert capsys.readouterr().out.count("largest difference") == 3
    content = file.read_bytes()
    assert b"site-packages" not in content and b"hf_ctxseg/" not in content
    found = {exporting.METADATA_FILE: ""}
    program = torch.export.load(file, extra_files=found).module()
    predictor = Predictor(run_folder)
    told = json.loads(found[exporting.METADATA_FILE])
    pixels = torch.randint(0, 256, (1, 3, 77, 140), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (torch.tensor(json.loads(told[name])).view(3, 1, 1) for name in ("mean", "std"))
    normal = predictor.processor(images=pixels.byte()[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(
            program((pixels - mean) / std), predictor.model(normal).logits, rtol=1e-4, atol=1e-4
        )
    assert main(["export", str(run_folder), str(file)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert file.read_bytes() == content


def test_a_file_that_differs_is_removed(run_folder, tmp_path, monkeypatch, capsys):
    right = exporting._run_pt2
    monkeypatch.setattr(exporting, "_run_pt2", lambda path: lambda given: right(path)(given) * 1.001)
    arguments = ["export", str(run_folder), str(tmp_path / "model.pt2"), "--height", "33", "--width", "40"]
    assert main(arguments) == 1
    assert "gives other results than the model for 1 × 3 × 33 × 40" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_takes_one_size_is_refused_before_it_is_traced(tiny, tmp_path, monkeypatch):
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1), "window_size": 4}
    fields = {"backbone": "swin_tiny_patch4_window7_224", "backbone_kwargs": small, "output_stride": 32}
    model = hf_ctxseg.DeepLabV2ForSemanticSegmentation(tiny(hf_ctxseg.DeepLabV2Config, **fields)).eval()
    monkeypatch.setattr(exporting, "_trace", None)
    with pytest.raises(exporting.ExportError, match="give height and width"):
        hf_ctxseg.export(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("model.txt", [], "must end in .onnx"),
        ("model.pt2", ["--opset", "20"], "concerns ONNX alone"),
        ("model.onnx", ["--opset", "9"], "must be 18 or more"),
        ("model.onnx", ["--height", "20"], "give both"),
        ("model.onnx", ["--height", "0", "--width", "4"], "give both"),
    ],
)
def test_usage(name, flags, told, run_folder, tmp_path, capsys):
    assert main(["export", str(run_folder), str(tmp_path / name), *flags]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run_folder), str(tmp_path / "model.onnx")]) == 2
    assert "pip install 'hf-ctxseg[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("rate", [1, 2])
def test_same_padding_gives_the_windows_of_timm(kernel, stride, rate):
    weight = torch.randn(4, 3, kernel, kernel)
    pair = [kernel] * 2, [stride] * 2, [rate] * 2
    for height, width in [(9, 16), (10, 15), (11, 14), (12, 13)]:
        x = torch.randn(1, 3, height, width)
        found, expected = (
            F.conv2d(pad(x, *pair), weight, stride=stride, dilation=rate) for pad in (pad_same, timm_pad_same)
        )
        torch.testing.assert_close(found, expected)
        found, expected = (
            F.max_pool2d(pad(x, *pair, value=-float("inf")), kernel, stride, dilation=rate)
            for pad in (pad_same, timm_pad_same)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("cell", MATRIX, ids=str)
def test_every_head_exports_to_onnx_masks_and_pt2(cell, tmp_path):
    model = cell.build().eval()
    exported = hf_ctxseg.export(model, tmp_path / "model.onnx", mask=True, uint8=True)
    assert len(exported.checks) == 3
    assert len(hf_ctxseg.export(model, tmp_path / "model.pt2").checks) == 3


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "mobilenetv2_100"])
def test_full_size_networks_export(backbone, tmp_path, tiny, live):
    model = live(
        hf_ctxseg.DeepLabV3PlusForSemanticSegmentation(tiny(hf_ctxseg.DeepLabV3PlusConfig, backbone=backbone))
    )
    hf_ctxseg.export(model, tmp_path / "model.onnx")
    hf_ctxseg.export(model, tmp_path / "model.pt2")


@pytest.mark.slow
def test_pt2_runs_without_the_package(run_folder, tmp_path):
    hf_ctxseg.export(run_folder, tmp_path / "model.pt2", mask=True, uint8=True)
    program = """
import sys
sys.modules["hf_ctxseg"] = sys.modules["transformers"] = sys.modules["timm"] = None
import numpy, torch
run = torch.export.load("model.pt2").module()
numpy.save("mask.npy", run(torch.from_numpy(numpy.load("pictures.npy"))).numpy())
"""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 70, 53, 3), np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    for mask, picture in zip(np.load(tmp_path / "mask.npy"), pictures, strict=True):
        assert (mask == hf_ctxseg.predict(run_folder, Image.fromarray(picture)).mask).mean() > 0.999
