import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import random_run, trained

from hf_ctxseg.cli import main
from hf_ctxseg.doctor import examine


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())[1]


@pytest.fixture
def run(line, tmp_path):
    """A trained run to damage."""
    return shutil.copytree(line, tmp_path / "run")


def _failures(run):
    return {item.subject: item.text for item in examine(run) if item.verdict == "fail"}


def _rewrite_weights(run, change):
    tensors = load_file(run / "model.safetensors")
    change(tensors)
    save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})


def _rewrite_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_whole_run_is_well_and_untouched(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["doctor", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", "manifest.json"],
        ["ok", "config.json"],
        ["ok", "weights"],
        ["ok", "processor"],
        ["ok", "metrics.json"],
        ["ok", "checkpoint-6"],
    ]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["doctor", str(run / "checkpoint-6")]) == 0


def test_saved_model_without_scores_is_well(tmp_path, capsys):
    assert main(["doctor", str(random_run(tmp_path / "model"))]) == 0
    assert "note  metrics.json" in capsys.readouterr().out


def test_c8_values_that_are_not_finite_are_found(run, capsys):
    def poison(tensors):
        tensors["classifier.bias"][1] = torch.nan
        tensors["auxiliary_head.conv.norm.running_var"][0] = torch.inf

    _rewrite_weights(run, poison)
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    found = said.partition("NaN or infinite: ")[2].splitlines()[0]
    assert set(found.split(", ")) == {"classifier.bias", "auxiliary_head.conv.norm.running_var"}
    assert "model.safetensors is not what was saved" in said


def test_c8_missing_surplus_and_reshaped_tensors_are_found(run):
    def change(tensors):
        tensors["classifier.extra"] = torch.zeros(1)
        del tensors["classifier.bias"]
        tensors["classifier.weight"] = tensors["classifier.weight"][:2].clone()

    _rewrite_weights(run, change)
    text = _failures(run)["weights"]
    assert "missing: classifier.bias" in text and "not the model's: classifier.extra" in text
    assert "of another shape: classifier.weight (2, 16, 1, 1) instead of (3, 16, 1, 1)" in text


@pytest.mark.parametrize("keep", [0, 1000])
def test_c6_cut_weights_are_found(run, keep):
    path = run / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    failures = _failures(run)
    assert f"model.safetensors has {keep} bytes instead of {size}" in failures["manifest.json"]
    assert failures["weights"]


def test_missing_weights_are_found(run):
    (run / "model.safetensors").unlink()
    failures = _failures(run)
    assert (
        "model.safetensors is missing" in failures["manifest.json"] and "no model.safetensors" in failures["weights"]
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hiden_size": 3}, "did you mean hidden_size"),
        ({"output_stride": 12}, "12"),
        ({"backbone": "no_net"}, "no_net"),
    ],
)
def test_config_that_builds_no_model_is_found(run, values, words):
    _rewrite_json(run / "config.json", **values)
    assert words in _failures(run)["config.json"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_mean": [0.5]}, "image_mean has 1 values for 3 channels"),
        ({"image_std": [0.5, 0.0, 0.5]}, "must be above 0"),
        ({"align_corners": True}, "align_corners is True, but False in the config"),
    ],
)
def test_processor_that_disagrees_is_found(run, values, words):
    _rewrite_json(run / "preprocessor_config.json", **values)
    assert words in _failures(run)["processor"]


def test_scores_that_disagree_are_found(run):
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["model"]["backbone"] = "resnet18"
    metrics["evaluation"]["mean_iou"] += 0.01
    metrics["evaluation"]["per_category_iou"]["disk"] = metrics["evaluation"]["per_category_iou"].pop("disc")
    path.write_text(json.dumps(metrics))
    text = _failures(run)["metrics.json"]
    assert "backbone is 'resnet18', but 'test_resnet' in the model" in text
    assert "mean_iou is" in text and "the classes scored are not the model's" in text


def test_damaged_checkpoint_and_remains_are_told(run, capsys):
    path = run / "checkpoint-6" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (run / "checkpoint-7.partial").mkdir()
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert "fail  checkpoint-6" in said and "optimizer.pt is not what was saved" in said
    assert "note  checkpoint-7.partial" in said


def test_unfinished_run_is_told_how_to_go_on(run, capsys):
    (run / "config.json").unlink()
    assert main(["doctor", str(run)]) == 0
    assert "--resume continues" in capsys.readouterr().out
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    assert main(["doctor", str(run)]) == 1
    assert "no complete checkpoint: --resume starts anew" in capsys.readouterr().out


def test_folder_of_something_else_is_refused(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "holds neither a config.json nor checkpoints" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "There is no folder" in capsys.readouterr().err
