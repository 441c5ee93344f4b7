"""What users of `ctxseg convert` meet: binary networks, 21 classes, long lists of names, odd targets and input."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from conversion_helpers import write_photo
from torchvision.models import segmentation
from transformers import AutoModelForSemanticSegmentation, pipeline

from hf_ctxseg.cli import main
from hf_ctxseg.converting import convert
from hf_ctxseg.label_sets import VOC_CLASSES


def save_peer(path, classes, **arguments):
    torch.manual_seed(0)
    make = segmentation.deeplabv3_mobilenet_v3_large
    peer = make(weights=None, weights_backbone=None, num_classes=classes, **arguments).eval()
    torch.save(peer.state_dict(), path)
    return peer


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return write_photo(tmp_path_factory.mktemp("photo") / "photo.png")


def test_a_network_of_one_logit_becomes_one_of_two_classes(tmp_path, photo):
    peer = save_peer(tmp_path / "one.pth", 1)
    torch.nn.init.zeros_(peer.classifier[4].bias)
    torch.save(peer.state_dict(), tmp_path / "one.pth")
    done = convert(tmp_path / "one.pth", tmp_path / "out", verify=photo)
    assert done.comparison.agreement == 1 and done.comparison.difference <= 1e-4
    assert any("one logit" in note for note in done.conversion.notes)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    x = torch.randn(1, 3, 65, 70)
    with torch.no_grad():
        logits, expected = model(x).logits, peer(x)["out"]
    probability = torch.nn.functional.interpolate(logits, (65, 70), mode="bilinear").softmax(1)[:, 1]
    torch.testing.assert_close(probability, expected.sigmoid()[:, 0], rtol=1e-3, atol=1e-4)
    found = pipeline("image-segmentation", model=str(tmp_path / "out"))(str(photo))
    assert {part["label"] for part in found} <= {"background", "foreground"}


def test_21_classes_are_taken_to_be_those_of_voc_and_a_lost_head_is_noted(tmp_path):
    save_peer(tmp_path / "coco.pth", 21, aux_loss=True)
    done = convert(tmp_path / "coco.pth", tmp_path / "out")
    assert tuple(done.conversion.config.id2label.values()) == VOC_CLASSES
    assert done.conversion.config.palette[15] == [192, 128, 128]  # person
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PASCAL VOC 2012" in card and "auxiliary classifier" in card


def test_names_may_be_many_and_long_and_files_are_for_all(tmp_path):
    save_peer(tmp_path / "many.pth", 30)
    names = ",".join(f"a class with a long name {number}" for number in range(30))
    mask = os.umask(0o022)
    try:
        assert main(["convert", str(tmp_path / "many.pth"), str(tmp_path / "out"), "--classes", names]) == 0
        assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back.pth"), "--to", "torchvision"]) == 0
    finally:
        os.umask(mask)
    written = [*(tmp_path / "out").iterdir(), tmp_path / "back.pth"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o644}


def test_the_output_may_be_a_link_but_not_the_present_folder(tmp_path, capsys, monkeypatch):
    save_peer(tmp_path / "a.pth", 3)
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "link")]) == 0
    assert (tmp_path / "place" / "config.json").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["convert", str(tmp_path / "a.pth"), "."]) == 2
    assert "the folder that you are in" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"encoder_name": 5}, {"encoder_name": "resnet18", "decoder_atrous_rates": 12}])
def test_settings_of_another_kind_are_refused(settings, tmp_path, capsys):
    folder = tmp_path / "smp"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {"segmentation_head.0.weight": torch.zeros(3, 4, 1, 1), "decoder.aspp.project.0.weight": torch.ones(4)}
    torch.save(tensors, folder / "pytorch_model.bin")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("ctxseg convert: error: ") and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_scalars_where_tensors_belong_are_refused(tmp_path, capsys):
    torch.save({"classifier.0.project.0.weight": torch.tensor(1.0)}, tmp_path / "scalar.pth")
    assert main(["convert", str(tmp_path / "scalar.pth"), str(tmp_path / "out")]) == 2
    assert "is not what it looks like" in capsys.readouterr().err


def test_another_library_s_model_has_no_way_back(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["convert", str(tmp_path), str(tmp_path / "back.pth"), "--to", "smp"]) == 2
    assert "segformer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values", [np.full((3, 9, 9), np.nan, np.float32), np.zeros((0, 0), np.int64), np.full((9, 9), 255)]
)
def test_nothing_can_be_compared_with_what_is_no_result(values, tmp_path, photo, capsys):
    save_peer(tmp_path / "a.pth", 3)
    np.save(tmp_path / "logits.npy", values)
    options = ["--verify", str(photo), "--logits", str(tmp_path / "logits.npy")]
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "out"), *options]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
