import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from training_helpers import random_run
from transformers import AutoModelForSemanticSegmentation, IntervalStrategy

from hf_ctxseg import run_folder
from hf_ctxseg.checkpoints import publish
from hf_ctxseg.run_folder import (
    check_run,
    is_finished,
    prepare_run,
    save_model,
    write_arguments,
    write_class_table,
    write_json,
)


def _checkpoint(run, step):
    """A checkpoint that is complete."""
    partial = run / f"checkpoint-{step}.partial"
    partial.mkdir(parents=True)
    save_file({"weight": torch.zeros(100)}, partial / "model.safetensors")
    publish(partial, run / f"checkpoint-{step}")


def test_new_run_is_made_with_its_parents(tmp_path):
    run = tmp_path / "runs" / "a"
    assert prepare_run(run, resume=False) is None
    assert run.is_dir() and not list(run.iterdir())
    assert prepare_run(run, resume=True) is None


@pytest.mark.parametrize("held", ["args.yaml", "checkpoint-3"])
def test_folder_that_holds_a_run_is_refused_and_left_as_it_is(tmp_path, held):
    if held.startswith("checkpoint"):
        _checkpoint(tmp_path, 3)
    else:
        (tmp_path / held).write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"already holds a run \({held}\).*--resume, or choose another folder"):
        prepare_run(tmp_path, resume=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_with_other_files_is_taken(tmp_path):
    (tmp_path / "contact_sheet.png").write_text("of a dry run")
    check_run(tmp_path, resume=False)
    assert prepare_run(tmp_path, resume=False) is None


def test_finished_run_is_neither_resumed_nor_overwritten(tmp_path):
    run = random_run(tmp_path / "run")
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a finished run: use it, or train into another folder"):
        prepare_run(run, resume=True)
    with pytest.raises(ValueError, match=r"already holds a run \(config.json\): choose another folder"):
        prepare_run(run, resume=False)
    assert (run / "config.json").read_text() == before


def test_resumed_run_does_not_look_finished(tmp_path):
    (tmp_path / "args.yaml").write_text("{}")
    (tmp_path / "config.json").write_text("{}")  # without weights: cut off between the two
    prepare_run(tmp_path, resume=True)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["taken", "taken/run"])
def test_file_in_the_place_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match=r"is a file, but must be a folder|cannot be written \(Not a directory\)"):
        prepare_run(tmp_path / name, resume=False)


def test_model_is_complete_only_when_its_config_is_there(tmp_path, monkeypatch):
    model = AutoModelForSemanticSegmentation.from_pretrained(random_run(tmp_path / "made"))
    run = tmp_path / "run"
    run.mkdir()
    order = []

    def replace(source, target):
        order.append(target.name)
        if target.name == "config.json":
            raise OSError("disk full")
        source.rename(target)

    monkeypatch.setattr(run_folder.os, "replace", replace)
    processor = run_folder.CtxSegImageProcessor()
    with pytest.raises(OSError, match="disk full"):
        save_model(run, model, processor)
    assert set(order) == {"manifest.json", "model.safetensors", "preprocessor_config.json", "config.json"}
    assert not is_finished(run)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForSemanticSegmentation.from_pretrained(run)
    monkeypatch.undo()
    save_model(run, model, processor)  # what a torn attempt left is no obstacle
    assert is_finished(run)
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(path, text, **options):
        with path.open("w") as stream:
            stream.write(text[:3])
        raise OSError("No space left on device")

    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"b": 2})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": 1}


def test_json_has_null_for_what_is_no_number(tmp_path):
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (-math.inf, "é")}})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {"a": None, "b": [None, 1.5], "c": {"d": [None, "é"]}}
    assert "é" in text and text.endswith("}\n")


def test_arguments_are_plain_yaml(tmp_path):
    given = {"data": Path("a/b"), "eval_strategy": IntervalStrategy.NO, "scale": (0.5, 2.0), "labels": ["straße"]}
    write_arguments(tmp_path, given)
    text = (tmp_path / "args.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {
        "data": "a/b",
        "eval_strategy": "no",
        "scale": [0.5, 2.0],
        "labels": ["straße"],
    }
    assert "straße" in text


def test_class_table_leaves_absent_classes_empty(tmp_path):
    scores = {"per_category_iou": [0.25, math.nan], "per_category_accuracy": [1.0, math.nan]}
    write_class_table(tmp_path / "a.csv", ["sky, blue", "car"], scores, [7, 0])
    lines = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    assert list(csv.DictReader(lines)) == [
        {"class": "sky, blue", "iou": "0.250000", "accuracy": "1.000000", "training_pixels": "7"},
        {"class": "car", "iou": "", "accuracy": "", "training_pixels": "0"},
    ]
