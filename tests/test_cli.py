import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Terminal, exit_code
from PIL import Image
from training_helpers import NAMES, flags, make_data, random_run

from hf_ctxseg import predict, training
from hf_ctxseg.cli import main
from hf_ctxseg.cli_parser import VERBS


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clean") / "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("random") / "run")


@pytest.fixture
def data(clean, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(clean, tmp_path / "data"))


def _refused(capsys, out, *argv):
    """The message with which a training is refused; nothing may look trained."""
    assert exit_code("train", *argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1 and printed.err.startswith("ctxseg train: error: ")
    assert "Traceback" not in printed.err and len(printed.err.splitlines()) <= 14
    assert "step 1/" not in printed.out
    if out.is_dir():
        assert not {path.name for path in out.iterdir()} - {"contact_sheet.png", "args.yaml"}
    return printed.err


def _spoil(folder, name, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(folder / "train" / "labels" / name)


def _unpaired_mask(data):
    (data / "train" / "images" / "003.png").unlink()


def _unpaired_image(data):
    (data / "train" / "labels" / "003.png").rename(data / "train" / "labels" / "3.png")


def _value_outside(data):
    _spoil(data, "003.png", np.full((40, 48), 7))


def _value_outside_in_validation(data):
    shutil.copy(data / "train" / "labels" / "000.png", data / "val" / "labels" / "000.png")
    Image.fromarray(np.full((40, 48), 9, np.uint8)).save(data / "val" / "labels" / "000.png")


def _other_size(data):
    _spoil(data, "003.png", np.zeros((40, 47)))


def _colours(data):
    _spoil(data, "003.png", np.arange(40 * 48 * 3).reshape(40, 48, 3) % 251)


def _cut_image(data):
    path = data / "train" / "images" / "003.png"
    path.write_bytes(path.read_bytes()[:300])


def _text_for_an_image(data):
    (data / "train" / "images" / "003.png").write_text("no picture")


def _empty_mask(data):
    (data / "train" / "labels" / "003.png").write_bytes(b"")


def _no_class_names(data):
    (data / "labels.txt").unlink()


@pytest.mark.parametrize(
    ("spoil", "found", "cure"),
    [
        (_unpaired_mask, "003.png", "same name but for the suffix"),
        (_unpaired_image, "003.png", "3.png"),
        (_value_outside, "train/labels/003.png holds 7 (1920 pixels), but the classes are 0-2", "--ignore_index 7"),
        (_value_outside_in_validation, "val/labels/000.png holds 9 (1920 pixels)", "--labels"),
        (_other_size, "train/labels/003.png is 47x40 pixels, but train/images/003.png is 48x40", "must have"),
        (_colours, "003.png is an RGB picture", "convert the colours to indices"),
        (_cut_image, "train/images/003.png", "truncated"),
        (_text_for_an_image, "train/images/003.png", ""),
        (_empty_mask, "train/labels/003.png", ""),
        (_no_class_names, "does not say what its classes are called", "--labels"),
    ],
)
def test_bad_data_is_refused_before_training(data, tmp_path, capsys, spoil, found, cure):
    spoil(data)
    message = _refused(capsys, tmp_path / "run", *flags(data=data, output_dir=tmp_path / "run"))
    assert found in message and cure in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": "../nowhere/at_all"}, ("There is no folder ../nowhere/at_all", "give the path of a data set")),
        ({"head": "deeplab3"}, ("There is no head 'deeplab3'", "did you mean 'deeplabv3'")),
        ({"backbone": "resnet5"}, ("no backbone 'resnet5'", "did you mean resnet50")),
        ({"backbone": "densenet121"}, ("'densenet121' cannot reach output_stride 16", "it reaches 32", "resnet50")),
        ({"backbone_weights": "nowhere.safetensors"}, ("There is no weights file nowhere.safetensors",)),
        ({"backbone_weights": __file__}, ("test_cli.py is not a plain state dict",)),
        ({"config_overrides": "hiden_size=8"}, ("no field 'hiden_size'", "did you mean hidden_size")),
        ({"config_overrides": "hidden_size=0"}, ("hidden_size is 0, but must be",)),
        ({"config_overrides": "hidden_size"}, ("config_overrides holds 'hidden_size'", "name=value")),
        ({"config_overrides": "hidden_size=[1"}, ("hidden_size=[1", "not readable")),
        (
            {"model_name_or_path": "./nowhere", "backbone": None, "backbone_weights": None},
            ("There is no folder ./nowhere", "check the path"),
        ),
        ({"model_name_or_path": "./nowhere"}, ("backbone is given beside model_name_or_path", "leave it out")),
        ({"max_steps": "many"}, ("max_steps", "'many'", "ctxseg train --help")),
        ({"max_step": 3}, ("no flag 'max_step'", "did you mean 'max_steps'")),
        ({"crop_size": 0}, ("crop_size is [0], but must be",)),
        ({"labels": "a,b"}, ("holds 2", "the classes are 0-1")),
        ({"labels": "a,b,a"}, ("'a'", "more than once")),
        ({"labels": "nowhere.txt"}, ("There is no file nowhere.txt",)),
        ({"ignore_index": 1}, ("ignore_index is 1, which is also class 'disc'",)),
        ({"eval_split": "vall"}, ("no split 'vall'", "did you mean 'val'")),
        ({"config": "nowhere.yaml"}, ("no arguments file nowhere.yaml",)),
    ],
)
def test_bad_argument_is_refused_before_training(clean, tmp_path, capsys, arguments, words):
    message = _refused(capsys, tmp_path / "run", *flags(**{"data": clean, "output_dir": tmp_path / "run"} | arguments))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_unknown_key_of_an_argument_file_is_refused(clean, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"data: {clean}\nbackbon: resnet50\n")
    message = _refused(capsys, tmp_path / "run", "--config", tmp_path / "a.yaml", "--output_dir", tmp_path / "run")
    assert "a.yaml: There is no key 'backbon': did you mean 'backbone'?" in message


@pytest.mark.parametrize(("missing", "flag"), [("output_dir", "--output_dir"), ("data", "--data")])
def test_missing_argument_is_asked_for(clean, tmp_path, capsys, missing, flag):
    arguments = {"data": clean, "output_dir": tmp_path / "run"} | {missing: None}
    message = _refused(capsys, tmp_path / "run", *flags(**arguments))
    assert f"{missing} is missing" in message and flag in message


@pytest.mark.parametrize("place", ["taken", "taken/run"])
def test_output_folder_that_cannot_be_is_refused(clean, tmp_path, capsys, place):
    (tmp_path / "taken").write_text("a file")
    message = _refused(capsys, tmp_path / "taken", *flags(data=clean, output_dir=tmp_path / place))
    assert "taken" in message and "choose another" in message
    assert (tmp_path / "taken").read_text() == "a file"


def test_finished_run_is_refused_before_the_labels_are_read(clean, run, capsys):
    before = sorted(path.name for path in run.iterdir())
    assert exit_code("train", *flags(data=clean, output_dir=run)) == 2
    printed = capsys.readouterr()
    assert "already holds a run (config.json): choose another folder" in printed.err and printed.out == ""
    assert sorted(path.name for path in run.iterdir()) == before


def test_scan_shows_its_progress_on_a_terminal(clean, tmp_path, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert main(["train", *flags(data=clean, output_dir=tmp_path / "run", dry_run=True)]) == 0
    assert "checking train" in shown.getvalue() and "/8 " in shown.getvalue()


@pytest.mark.slow
def test_message_is_all_that_a_user_sees(data, tmp_path):
    _value_outside(data)
    done = subprocess.run(
        [sys.executable, "-m", "hf_ctxseg.cli", "train", *flags(data=data, output_dir=tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "ctxseg train: error: train: 1 of 8 labels or images cannot be used:",
        "  train/labels/003.png holds 7 (1920 pixels), but the classes are 0-2 and ignore_index is 255; "
        "add names with --labels, or pass --ignore_index 7",
    ]


def test_debug_shows_the_trace(tmp_path):
    with pytest.raises(ValueError, match="output_dir is missing"):
        main(["--debug", "train", "--data", str(tmp_path)])


def test_interrupt_is_130(clean, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_data", interrupted)
    assert main(["train", *flags(data=clean, output_dir=tmp_path / "run")]) == 130
    printed = capsys.readouterr().err
    assert "interrupted" in printed and "--resume" in printed and "Traceback" not in printed


def test_unknown_verb_names_the_nearest(capsys):
    assert exit_code("tran", "--data", "x") == 2
    printed = capsys.readouterr()
    assert "no verb 'tran': did you mean 'train'?" in printed.err and printed.out == ""


def test_no_verb_lists_them(capsys):
    assert exit_code() == 2
    printed = capsys.readouterr().err
    assert all(f"  {verb} " in printed for verb in VERBS)
    assert exit_code("--help") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_first(verb, capsys):
    assert exit_code(verb, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(f"ctxseg {verb} " in line for line in lines[:2])
    assert verb == "train" or f"{VERBS[verb]}."[1:] in "\n".join(lines)  # names such as ONNX as they are written
    assert max(map(len, lines)) < 260


def test_whole_help_lists_the_arguments_of_trainer(capsys):
    assert exit_code("train", "--help-all") == 0
    printed = capsys.readouterr().out
    assert "--warmup_steps" in printed and "--head_learning_rate_factor" in printed


@pytest.mark.parametrize("verb", ["eval", "predict", "push"])
def test_verb_without_arguments_is_refused(verb, capsys):
    assert exit_code(verb) == 2
    printed = capsys.readouterr().err
    assert "required" in printed and f"ctxseg {verb} " in printed and len(printed.splitlines()) < 8


def test_scores_are_printed_as_asked_for(clean, run, tmp_path, capsys):
    found = {}
    for report in ("json", "csv", "table"):
        assert exit_code("eval", run, "--data", clean, "--output_dir", tmp_path, "--report", report) == 0
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == f"Metrics, confusion matrix and a preview grid are in {tmp_path}."
        found[report] = printed.out
    scores = json.loads(found["json"])
    assert scores["num_images"] == 3 and list(scores["per_category_iou"]) == list(NAMES)
    rows = list(csv.DictReader(found["csv"].splitlines()))
    assert {row["class"]: float(row["iou"]) for row in rows} == scores["per_category_iou"]
    lines = [line.split() for line in found["table"].splitlines()]
    assert [line[0] for line in lines[:6]] == ["class", *NAMES, "mean", "pixel"]
    assert float(lines[4][1]) == pytest.approx(scores["mean_iou"], abs=1e-4)
    assert {row["class"]: float(row["boundary_iou"]) for row in rows} == scores["per_category_boundary_iou"]


def test_wrong_model_or_split_is_refused(clean, run, tmp_path, capsys):
    assert exit_code("eval", tmp_path, "--data", clean) == 2
    assert "holds no finished model" in capsys.readouterr().err
    assert exit_code("eval", run, "--data", clean, "--split", "vall") == 2
    assert "did you mean 'val'" in capsys.readouterr().err
    assert exit_code("eval", run, "--data", clean, "--batch_size", "two") == 2
    assert "batch_size" in capsys.readouterr().err


def test_predict_goes_on_past_a_bad_file(clean, run, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    shutil.copytree(clean / "val" / "images", pictures)
    (pictures / "001.png").write_text("no picture")
    assert exit_code("predict", run, pictures, "--out", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "001.png" in printed.err and "1 of 3 pictures could not be segmented." in printed.err
    assert "Traceback" not in printed.err
    overlays = [tmp_path / "out" / f"{name}_overlay.png" for name in ("000", "002")]
    assert printed.out.split() == [str(path) for path in overlays]
    with Image.open(tmp_path / "out" / "002_mask.png") as mask:
        assert mask.size == (37, 51)
    assert exit_code("predict", run, pictures / "000.png", "--out", tmp_path / "other") == 0


def test_eval_and_predict_look_as_they_are_told(clean, run, tmp_path, capsys):
    views = ["--window", 32, "--overlap", 0.25, "--blend", "constant", "--scales", 0.75, 1, "--flip"]
    assert exit_code("eval", run, "--data", clean, "--output_dir", tmp_path / "eval", "--report", "json", *views) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    expected = {"window": 32, "overlap": 0.25, "blend": "constant", "scales": [0.75, 1.0], "flip": True}
    assert {name: settings[name] for name in expected} == expected
    picture = clean / "val" / "images" / "000.png"
    assert exit_code("predict", run, picture, "--out", tmp_path / "out", *views) == 0
    with Image.open(tmp_path / "out" / "000_mask.png") as mask:
        found = predict(run, picture, **{**expected, "scales": (0.75, 1)})
        assert np.array_equal(np.asarray(mask), found.mask)
    capsys.readouterr()
    assert exit_code("predict", run, picture, "--out", tmp_path / "out", "--overlap", 1) == 2
    assert "overlap is 1.0, but must be a share" in capsys.readouterr().err


def test_predict_without_picture_or_model_is_refused(clean, run, tmp_path, capsys):
    assert exit_code("predict", run, tmp_path / "nowhere.jpg", "--out", tmp_path / "out") == 2
    assert "There is no picture or folder" in capsys.readouterr().err
    assert exit_code("predict", tmp_path, clean / "val" / "images", "--out", tmp_path / "out") == 2
    assert "holds no finished model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_preset_can_be_trained(clean, tmp_path, capsys):
    arguments = flags(data=clean, output_dir=tmp_path / "run", backbone=None, preset="deeplabv3-mobilenetv2")
    assert exit_code("train", *arguments, "--dry_run") == 0
    capsys.readouterr()
    refused = _refused(capsys, tmp_path / "run", *arguments, "--head", "deeplabv3")
    assert "head is given beside preset" in refused
