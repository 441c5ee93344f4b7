"""`ctxseg convert`: what is recognised and asked for, what the folder holds, what is refused, and the way back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_helpers import small_mmseg_config, write_photo
from huggingface_hub import ModelCard
from peer_helpers import difference, make_peer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import segmentation
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

from hf_ctxseg import (
    CtxSegImageProcessor,
    DeepLabV3Config,
    DeepLabV3ForSemanticSegmentation,
    DeepLabV3PlusConfig,
    DeepLabV3PlusForSemanticSegmentation,
)
from hf_ctxseg.cli import main
from hf_ctxseg.conversion_back import mmseg_model, smp_arguments, to_mmseg, to_smp
from hf_ctxseg.converting import convert, convert_back

NAMES = ["sky", "road", "car", "tree", "sign"]
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def peer():
    make = segmentation.deeplabv3_mobilenet_v3_large
    images = torch.randn(2, 3, 48, 65, generator=torch.Generator().manual_seed(0))
    return make_peer(lambda: make(weights=None, weights_backbone=None, num_classes=5), images)


@pytest.fixture(scope="module")
def checkpoint(peer, tmp_path_factory):
    path = tmp_path_factory.mktemp("peer") / "epoch_3.pth"
    wrapped = {f"module.{key}": value for key, value in peer.state_dict().items()}
    torch.save({"epoch": 3, "model": wrapped, "args": {"lr": 0.1}}, path)
    return path


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return write_photo(tmp_path_factory.mktemp("photo") / "photo.png")


@pytest.fixture(scope="module")
def converted(checkpoint, photo, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "models" / "a"
    options = ["--classes", ",".join(NAMES), "--license", "bsd-3-clause", "--verify", str(photo)]
    assert main(["convert", str(checkpoint), str(output), *options]) == 0
    return output


def refused(capsys, tmp_path, *argv):
    """The message with which a conversion is refused; nothing may be left of it."""
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "out"
    assert main(["convert", *map(str, argv), str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("ctxseg convert: error: ") and "Traceback" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before
    return printed.err


def test_the_folder_opens_everywhere_and_computes_the_same(peer, converted, photo):
    model = AutoModelForSemanticSegmentation.from_pretrained(converted).eval()
    processor = AutoImageProcessor.from_pretrained(converted)
    pixels = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = peer(pixels)["out"]
        found = F.interpolate(model(pixels).logits, pixels.shape[-2:], mode="bilinear")
    assert difference(found, expected) <= 1e-4
    assert list(model.config.id2label.values()) == NAMES
    segments = pipeline("image-segmentation", model=str(converted))(str(photo))
    assert {segment["label"] for segment in segments} <= set(NAMES) and segments
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_the_card_says_where_the_weights_come_from(converted, checkpoint):
    text = (converted / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == "bsd-3-clause" and card.data.library_name == "transformers"
    assert "epoch\\_3.pth" in text and "| format | torchvision |" in text
    facts = json.loads((converted / "metrics.json").read_text())["conversion"]
    digest = subprocess.run(["sha256sum", checkpoint], capture_output=True, text=True, check=True).stdout.split()[0]
    assert facts["sha256"] == digest and digest in text
    assert "Not evaluated: " in text and "Trained on" not in text and "mean IoU" not in text
    assert "output\\_stride 16, atrous\\_rates" in text  # what was assumed
    assert "with torchvision " in text and "arg-max equal on 100.0000 % of the pixels" in text
    assert str(checkpoint.parent) not in text


def test_a_conversion_leaves_nothing_but_the_folder(converted):
    assert [path.name for path in converted.parent.iterdir()] == ["a"]
    files = {"README.md", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in converted.iterdir()} == files
    assert os.stat(converted).st_mode & 0o500 == 0o500


@pytest.mark.slow
def test_safetensors_are_taken_and_a_script_does_the_same(peer, tmp_path, converted):
    source = tmp_path / "weights.safetensors"
    save_file(peer.state_dict(), source)
    script = Path(__file__).parents[1] / "scripts" / "convert_checkpoint.py"
    done = subprocess.run(
        [sys.executable, script, source, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert "The checkpoint does not name its classes" in done.stdout
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in load_file(converted / "model.safetensors").items())


def saved(config, live, folder):
    torch.manual_seed(0)
    plus = isinstance(config, DeepLabV3PlusConfig)
    model = live((DeepLabV3PlusForSemanticSegmentation if plus else DeepLabV3ForSemanticSegmentation)(config))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def smp_model(live, tmp_path_factory):
    config = DeepLabV3Config(
        backbone="resnet18",
        dilate_first_block=True,
        output_stride=8,
        variant="torchvision",
        atrous_rates=[1, 2, 3],
        absolute_rates=True,
        hidden_size=16,
        num_labels=3,
        align_corners=True,
    )
    folder = tmp_path_factory.mktemp("smp") / "ours"
    return saved(config, live, folder), folder


def same(folder, model):
    opened = AutoModelForSemanticSegmentation.from_pretrained(folder)
    expected = model.state_dict()
    assert opened.config.effective_rates == model.config.effective_rates
    return all(torch.equal(value, expected[key]) for key, value in opened.state_dict().items())


def test_a_folder_of_smp_tells_all_and_a_state_dict_is_asked_about(smp_model, tmp_path, capsys):
    model, _ = smp_model
    tensors = to_smp(model.config, model.state_dict())
    folder = tmp_path / "saved"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {**smp_arguments(model.config), "_model_class": "DeepLabV3", "encoder_weights": None}
    (folder / "config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "a")
    assert same(tmp_path / "a", model)

    path = tmp_path / "best.pth"
    torch.save(tensors, path)
    assert "give --encoder_name" in refused(capsys, tmp_path, path)
    assert "has 3 dilated branches" in refused(
        capsys, tmp_path, path, "--encoder_name", "resnet18", "--atrous_rates", "6", "--"
    )
    convert(path, tmp_path / "b", encoder_name="resnet18", atrous_rates=[1, 2, 3])
    assert same(tmp_path / "b", model)


@pytest.fixture(scope="module")
def mmseg_model_of_ours(live, tmp_path_factory):
    return saved(small_mmseg_config(num_labels=3), live, tmp_path_factory.mktemp("mmseg") / "ours")


def mmseg_text(model, extra):
    return f"norm = {{'type': 'BN'}}\nmodel = {mmseg_model(model.config, model.state_dict())!r}\n{extra}"


STATISTICS = "mean=[1.0, 2.0, 3.0], std=[51.0, 102.0, 255.0]"


@pytest.mark.parametrize(
    ("extra", "meta", "bgr"),
    [
        (f"data_preprocessor = dict(bgr_to_rgb=True, {STATISTICS})", "1.x", False),
        (f"data_preprocessor = dict({STATISTICS})", "1.x", True),
        (f"img_norm_cfg = dict(to_rgb=True, {STATISTICS})", "0.x", False),
        (f"img_norm_cfg = dict(to_rgb=False, {STATISTICS})", "0.x", True),
    ],
)
def test_mmseg_checkpoints_carry_config_classes_and_statistics(mmseg_model_of_ours, tmp_path, extra, meta, bgr):
    model = mmseg_model_of_ours
    text = mmseg_text(model, extra)
    classes, palette = ("a", "b", "c"), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    forms = {
        "1.x": {"cfg": text, "dataset_meta": {"classes": classes, "palette": palette}},
        "0.x": {"config": text, "CLASSES": classes, "PALETTE": palette},
    }
    content = {"meta": forms[meta], "state_dict": to_mmseg(model.config, model.state_dict()), "message_hub": {}}
    torch.save(content, tmp_path / "iter_40000.pth")
    convert(tmp_path / "iter_40000.pth", tmp_path / "out")
    opened = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(opened.config.id2label.values()) == list(classes) and opened.config.palette == palette
    picture = np.random.default_rng(0).integers(0, 256, (33, 41, 3), np.uint8)
    given = picture[..., ::-1] if bgr else picture  # what the network was trained on
    pixels = (given.astype(np.float32) - [1, 2, 3]) / [51, 102, 255]
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).logits
        found = opened(processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]).logits
    assert difference(found, expected) <= 1e-4
    assert ("first convolution" in (tmp_path / "out" / "README.md").read_text()) == bgr


def test_mmseg_configs_come_from_a_file_where_the_checkpoint_lacks_them(mmseg_model_of_ours, tmp_path, capsys):
    model = mmseg_model_of_ours
    path = tmp_path / "plain.pth"
    torch.save(to_mmseg(model.config, model.state_dict()), path)
    assert "give mmsegmentation's full config with --peer_config" in refused(capsys, tmp_path, path)
    (tmp_path / "cfg.py").write_text(mmseg_text(model, ""))
    convert(path, tmp_path / "out", peer_config=tmp_path / "cfg.py")
    assert same(tmp_path / "out", model)
    assert "those of ImageNet" in (tmp_path / "out" / "README.md").read_text()


def test_refusals_name_what_is_wrong(capsys, tmp_path, checkpoint):
    other = tmp_path / "vit.pth"
    torch.save(nn.Linear(2, 3).state_dict(), other)
    assert "no segmentation network that is known here: it has 2 tensors (weight, bias" in refused(
        capsys, tmp_path, other
    )
    assert "There is no file or folder" in refused(capsys, tmp_path, tmp_path / "nowhere.pth")
    (tmp_path / "folder").mkdir()
    assert "is a folder without config.json" in refused(capsys, tmp_path, tmp_path / "folder")
    assert "did you mean 'torchvision'" in refused(capsys, tmp_path, checkpoint, "--from", "torchvison")
    assert "--encoder_name means nothing" in refused(capsys, tmp_path, checkpoint, "--encoder_name", "resnet18")
    assert "2 class names were given" in refused(capsys, tmp_path, checkpoint, "--classes", "a,b")
    assert "--logits belongs to a picture" in refused(capsys, tmp_path, checkpoint, "--logits", "x.npy")
    (tmp_path / "model.tflite").write_bytes(b"\x18\0\0\0TFL3")
    assert "model.tflite" in refused(capsys, tmp_path, tmp_path / "model.tflite")
    (tmp_path / "model.pth").write_bytes(b"<html>")
    assert "no whole PyTorch checkpoint" in refused(capsys, tmp_path, tmp_path / "model.pth")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "no whole safetensors file" in refused(capsys, tmp_path, tmp_path / "model.safetensors")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, checkpoint, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert "is not empty, and nothing in it is overwritten" in refused(capsys, tmp_path, checkpoint)


def test_a_failure_while_writing_leaves_nothing(tmp_path, checkpoint, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CtxSegImageProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        convert(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


def test_c7_pickles_are_for_convert_only(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    model = DeepLabV3ForSemanticSegmentation(tiny()).eval()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            auto_class.from_pretrained(folder)
    convert(folder, tmp_path / "converted")
    opened = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "converted")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in opened.state_dict().items())

    torch.save({"state_dict": model.state_dict(), "x": Evil()}, folder / "pytorch_model.bin")
    assert "Nothing of it was run" in refused(capsys, tmp_path, folder)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert not Path("evil_was_here").exists()


def test_c8_missing_surplus_and_broken_tensors_are_refused_on_convert(peer, tmp_path, capsys):
    whole = peer.state_dict()
    key = "backbone.2.block.0.0.weight"
    for spoilt, message in (
        ({name: value for name, value in whole.items() if name != key}, "lacks 1 tensors"),
        ({**whole, "backbone.99.weight": torch.ones(1)}, "has no place for 1 tensors (backbone.99.weight)"),
        ({**whole, key: whole[key][:-1]}, "has other shapes"),
        ({**whole, key: torch.full_like(whole[key], float("nan"))}, f"NaN or infinite values in 1 tensors ({key})"),
        ({**whole, key: torch.full_like(whole[key], float("inf"))}, "NaN or infinite values"),
    ):
        torch.save(spoilt, tmp_path / "spoilt.pth")
        assert message in refused(capsys, tmp_path, tmp_path / "spoilt.pth")


@pytest.mark.slow
def test_verification_with_stored_logits(converted, checkpoint, peer, photo, tmp_path, capsys):
    processor = AutoImageProcessor.from_pretrained(converted)
    pixels = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = peer(pixels)["out"].numpy()
    np.save(tmp_path / "logits.npy", logits.transpose(0, 2, 3, 1))  # as TensorFlow orders them
    spread = logits.max() - logits.min()
    comparison = convert(checkpoint, tmp_path / "a", verify=photo, logits=tmp_path / "logits.npy").comparison
    assert comparison.difference < 1e-5 and comparison.agreement == 1 and comparison.size == (65, 70)
    logits[0, 2, :13] += 2 * spread
    np.save(tmp_path / "logits.npy", logits[0])
    comparison = convert(checkpoint, tmp_path / "b", verify=photo, logits=tmp_path / "logits.npy").comparison
    assert comparison.difference > 0.4 and comparison.agreement == pytest.approx(1 - 13 / 65, abs=0.1)
    Image.fromarray(logits[0].argmax(0).astype(np.uint8)).save(tmp_path / "classes.png")
    comparison = convert(checkpoint, tmp_path / "c", verify=photo, logits=tmp_path / "classes.png").comparison
    assert comparison.difference is None and comparison.agreement < 1
    np.save(tmp_path / "logits.npy", logits[0, :3])
    message = refused(capsys, tmp_path, checkpoint, "--verify", photo, "--logits", tmp_path / "logits.npy")
    assert "holds an array of shape (1, 3, 65, 70)" in message
    np.save(tmp_path / "logits.npy", np.array([{}]), allow_pickle=True)
    assert "no readable .npy file" in refused(
        capsys, tmp_path, checkpoint, "--verify", photo, "--logits", tmp_path / "logits.npy"
    )


def test_what_is_not_installed_is_said(smp_model, tmp_path, photo, monkeypatch):
    _, folder = smp_model
    convert_back(folder, tmp_path / "w.pth", "smp")
    monkeypatch.setattr("hf_ctxseg.convert_verify.find_spec", lambda name: None)
    options = {"encoder_name": "resnet18", "atrous_rates": [1, 2, 3]}
    comparison = convert(tmp_path / "w.pth", tmp_path / "out", verify=photo, **options).comparison
    assert "segmentation_models_pytorch is not installed" in str(comparison) and comparison.agreement is None
    assert "not compared" in (tmp_path / "out" / "README.md").read_text()


def test_back_to_torchvision(converted, peer, tmp_path, capsys):
    assert main(["convert", str(converted), str(tmp_path / "back.pth"), "--to", "torchvision"]) == 0
    lines = capsys.readouterr().out
    assert "deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5" in lines
    found = torch.load(tmp_path / "back.pth", weights_only=True)
    expected = peer.state_dict()
    assert sorted(found) == sorted(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    assert main(["convert", str(converted), str(tmp_path / "back.safetensors"), "--to", "torchvision"]) == 0
    assert sorted(load_file(tmp_path / "back.safetensors")) == sorted(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "back.safetensors"]


def test_the_way_back_is_refused_where_there_is_none(converted, tmp_path, capsys):
    assert main(["convert", str(converted), str(tmp_path / "w.pth"), "--to", "mmseg"]) == 2
    assert "mmsegmentation has no equal" in capsys.readouterr().err
    (tmp_path / "there.pth").write_text("mine")
    for output, message in ((tmp_path / "there.pth", "must be a new file"), (tmp_path / "dir", "must be a new file")):
        assert main(["convert", str(converted), str(output), "--to", "torchvision"]) == 2
        assert message in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "w.pth"), "--to", "torchvision"]) == 2
    assert "holds no config.json and model.safetensors" in capsys.readouterr().err
    assert (tmp_path / "there.pth").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_real_tflite_model_by_the_command_line(tmp_path, capsys):
    file = SHARED / "checkpoints" / "deeplabv3_257_mv_gpu.tflite"
    if not file.is_file():
        pytest.skip("the shared checkpoint is not here")
    photos = SHARED / "images" / "voc"
    argv = ["convert", str(file), str(tmp_path / "out"), "--verify", str(photos / "vainf_1.png")]
    assert main([*argv, "--logits", str(photos / "vainf_1_expected_257.png")]) == 0
    assert "at 257×257: arg-max equal on 100.0000 % of the pixels" in capsys.readouterr().out
