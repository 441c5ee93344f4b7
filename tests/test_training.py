import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F
from training_helpers import LINE, NAMES, as_arguments, flags, make_data, same_weights, trained
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

import hf_ctxseg
from hf_ctxseg.cli import main
from hf_ctxseg.trainer import SegmentationTrainer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Data folder, run folder and printed lines of one whole training."""
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def small(tmp_path):
    return make_data(tmp_path / "data")


def _metrics(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def test_run_folder_is_whole(line):
    _, run, printed = line
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "args.yaml"):
        assert (run / name).stat().st_size > 0, name
    pictures = sorted(path.relative_to(run).as_posix() for path in run.rglob("*.png"))
    assert pictures == [
        "confusion.png",
        "contact_sheet.png",
        "curves.png",
        "per_class.png",
        "previews/step-000003.png",
        "previews/step-000006.png",
    ]
    for name in pictures:
        with Image.open(run / name) as picture:
            picture.load()
            assert min(picture.size) > 50 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert [line.split(",")[0] for line in (run / "per_class.csv").read_text().splitlines()] == ["class", *NAMES]
    assert [line.split(",")[0] for line in (run / "confusion.csv").read_text().splitlines()][1:] == list(NAMES)
    assert not (run / "model.partial").exists()
    assert f"ctxseg predict {run}" in printed


def test_console_says_what_is_done(line):
    _, _, printed = line
    lines = printed.splitlines()
    assert lines[0].startswith("8 images of 48x40 pixels")
    assert any(line.startswith("8 pictures to train on, 3 to score; 6 steps of 2 crops on cpu") for line in lines)
    losses = [line for line in lines if line.startswith("step ") and "  loss " in line and "s/step" in line]
    assert [line.split()[1] for line in losses] == [f"{step}/6" for step in range(1, 7)]
    assert [line.split()[1] for line in lines if "evaluation: mIoU" in line] == ["3/6", "6/6"]


def test_run_opens_through_the_auto_classes_and_the_pipeline(line):
    data, run, _ = line
    model = AutoModelForSemanticSegmentation.from_pretrained(run)
    assert type(model) is hf_ctxseg.DeepLabV3ForSemanticSegmentation
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.output_stride == 8
    base = AutoModel.from_pretrained(run)
    picture = data / "val" / "images" / "002.png"
    inputs = AutoImageProcessor.from_pretrained(run)(images=str(picture), return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    found = pipeline("image-segmentation", model=str(run))(str(picture))
    assert {item["label"] for item in found} <= set(NAMES)
    assert all(item["mask"].size == (37, 51) for item in found)


def test_scores_equal_a_plain_recomputation(line):
    data, run, _ = line
    model = AutoModelForSemanticSegmentation.from_pretrained(run)
    settings = json.loads((run / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    truth, guess = [], []
    loss = 0.0
    for path in sorted((data / "val" / "images").iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        label = torch.from_numpy(np.array(Image.open(data / "val" / "labels" / path.name))).long()
        with torch.inference_mode():
            logits = model(((pixels - mean) / std)[None]).logits
        logits = F.interpolate(logits, size=label.shape, mode="bilinear", align_corners=False)
        loss += F.cross_entropy(logits, label[None], ignore_index=255, reduction="sum").item()
        truth.append(label[label != 255].numpy())
        guess.append(logits.argmax(1)[0][label != 255].numpy())
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    assert len(np.unique(guess)) > 1  # else any averaging would do
    matrix = confusion_matrix(truth, guess, labels=range(3))
    hits = np.diag(matrix)
    iou = hits / (matrix.sum(0) + matrix.sum(1) - hits)
    found = _metrics(run)["evaluation"]
    assert found["num_images"] == 3
    assert list(found["per_category_iou"].values()) == pytest.approx(iou.tolist(), abs=1e-9)
    assert list(found["per_category_accuracy"].values()) == pytest.approx((hits / matrix.sum(1)).tolist(), abs=1e-9)
    assert found["mean_iou"] == pytest.approx(iou.mean(), abs=1e-9)
    assert found["overall_accuracy"] == pytest.approx(hits.sum() / matrix.sum(), abs=1e-9)
    assert found["loss"] == pytest.approx(loss / len(truth), rel=1e-4)


def test_n5_argument_file_repeats_the_run_bit_for_bit(line, tmp_path, capsys):
    _, run, _ = line
    other = tmp_path / "other"  # --resume with nothing there starts
    assert main(["train", "--config", str(run / "args.yaml"), "--output_dir", str(other), "--resume"]) == 0
    assert "Continuing" not in capsys.readouterr().out
    assert same_weights(run, other)
    kept = {"data": str(line[0]), "use_cpu": True, "max_steps": 6, "crop_size": [33]}
    first, second = (yaml.safe_load((folder / "args.yaml").read_text()) for folder in (run, other))
    assert first | {"output_dir": str(other)} == second
    assert first.items() >= {**kept, "output_dir": str(run)}.items()


def test_flags_override_the_argument_file(line, tmp_path, capsys):
    arguments = ["--config", str(line[1] / "args.yaml"), "--output_dir", str(tmp_path / "o"), "--max_steps", "4"]
    assert main(["train", *arguments, "--output_stride", "16", "--dry_run"]) == 0
    assert "output stride 16" in (printed := capsys.readouterr().out) and "4 steps of 2 crops" in printed


def test_python_twin_equals_the_command(line, tmp_path):
    data, run, _ = line
    result = hf_ctxseg.train(**as_arguments(data=data, output_dir=tmp_path / "twin", **LINE))
    assert same_weights(run, result.output_dir)
    assert not result.model.training
    first, second = _metrics(run), json.loads(json.dumps(result.metrics))
    assert second == _metrics(tmp_path / "twin")
    for metrics in (first, second):
        del metrics["evaluation"]["seconds"]
    assert first["evaluation"] == second["evaluation"] and first["data"] == second["data"]


def _tables(data):
    tables = {}
    for split in ("train", "val"):
        names = sorted(path.name for path in (data / split / "images").iterdir())
        columns = {
            column: [str(data / split / folder / name) for name in names]
            for column, folder in (("image", "images"), ("label", "labels"))
        }
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
        tables[split] = datasets.Dataset.from_dict(columns, features=kinds)
    return datasets.DatasetDict(tables)


def test_loaded_tables_train_as_the_folder_does(line, tmp_path):
    data, run, _ = line
    arguments = as_arguments(data=_tables(data), labels=list(NAMES), output_dir=tmp_path / "run", **LINE)
    result = hf_ctxseg.train(**arguments)
    assert same_weights(run, result.output_dir)
    written = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert written["data"] == result.metrics["data"]["source"] and written["labels"] == list(NAMES)


@pytest.mark.slow
def test_parquet_trains_as_the_folder_does(line, tmp_path, monkeypatch):
    data, run, _ = line
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "street"
    folder.mkdir()
    for name, table in _tables(data).items():
        table.to_parquet(folder / f"{'validation' if name == 'val' else name}.parquet")
    (folder / "labels.txt").write_text("\n".join(NAMES))
    assert main(["train", *flags(data=folder, output_dir=tmp_path / "run", **LINE)]) == 0
    assert same_weights(run, tmp_path / "run")
    assert _metrics(tmp_path / "run")["data"]["source"] == "street"


def test_dry_run_trains_nothing_and_stands_in_no_ones_way(small, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *flags(data=small, output_dir=run, dry_run=True)]) == 0
    assert "Dry run: nothing was trained" in capsys.readouterr().out
    assert [path.name for path in run.iterdir()] == ["contact_sheet.png"]
    assert main(["train", *flags(data=small, output_dir=run, max_steps=1)]) == 0


def test_scores_are_those_of_the_best_weights_where_these_are_kept(small, tmp_path):
    result = hf_ctxseg.train(
        **as_arguments(
            data=small,
            output_dir=tmp_path / "run",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="mean_iou",
            greater_is_better=True,
            learning_rate=0.1,
        )
    )
    kept = hf_ctxseg.evaluate(tmp_path / "run", small)["evaluation"]
    assert result.metrics["evaluation"]["mean_iou"] == pytest.approx(kept["mean_iou"], abs=1e-9)
    assert result.metrics["evaluation"]["loss"] == pytest.approx(kept["loss"], rel=1e-4)


# Interrupted and resumed


def _interrupt_at(monkeypatch, step, error):
    """Raise in the training step of that number."""
    real, calls = SegmentationTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == step:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SegmentationTrainer, "training_step", training_step)


def test_resumed_run_ends_in_the_same_weights(line, tmp_path, monkeypatch, capsys):
    data, whole, _ = line
    run = tmp_path / "run"
    arguments = flags(data=data, output_dir=run, **LINE)
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 6, KeyboardInterrupt())
        assert main(["train", *arguments]) == 130
    assert "--resume" in capsys.readouterr().err
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForSemanticSegmentation.from_pretrained(run)
    assert main(["train", *arguments]) == 2
    assert "already holds a run" in capsys.readouterr().err

    for step in (6, 7):
        shutil.copytree(run / "checkpoint-5", run / f"checkpoint-{step}")
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    torn = run / "checkpoint-7" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    assert main(["train", *arguments, "--resume"]) == 0
    assert "Continuing from checkpoint-5" in capsys.readouterr().out
    assert same_weights(run, whole)
    assert _metrics(run)["training"]["steps"] == 6
    assert _metrics(run)["evaluation"]["mean_iou"] == _metrics(whole)["evaluation"]["mean_iou"]
    assert "resume" not in yaml.safe_load((run / "args.yaml").read_text())

    assert main(["train", *arguments, "--resume"]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert same_weights(run, whole)


@pytest.mark.slow
def test_resumed_run_with_a_worker_ends_in_the_same_weights(small, tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    recipe = {**LINE, "data": small, "dataloader_num_workers": 1}
    assert main(["train", *flags(output_dir=whole, **recipe)]) == 0
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 6, KeyboardInterrupt())
        assert main(["train", *flags(output_dir=run, **recipe)]) == 130
    assert main(["train", *flags(output_dir=run, **recipe), "--resume"]) == 0
    assert same_weights(run, whole)


def test_failed_run_does_not_look_finished(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    _interrupt_at(monkeypatch, 2, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        hf_ctxseg.train(**as_arguments(data=small, output_dir=run))
    assert not (run / "config.json").exists() and not (run / "model.safetensors").exists()
    for auto in (AutoModel, AutoModelForSemanticSegmentation, AutoImageProcessor):
        with pytest.raises((OSError, ValueError)):
            auto.from_pretrained(run)
    with pytest.raises(ValueError, match="holds no finished model"):
        start = {"backbone": None, "backbone_weights": None, "model_name_or_path": str(run)}
        hf_ctxseg.train(**as_arguments(data=small, output_dir=tmp_path / "next", **start))


def test_run_interrupted_while_its_report_is_written_can_be_finished(small, tmp_path, monkeypatch):
    from hf_ctxseg import report

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(report, "plot_curves", interrupt)
        hf_ctxseg.train(**as_arguments(data=small, output_dir=run, save_steps=1))
    assert not (run / "config.json").exists()
    hf_ctxseg.train(**as_arguments(data=small, output_dir=run, save_steps=1, resume=True))
    assert (run / "config.json").is_file() and (run / "README.md").is_file()
    written = json.loads((run / "metrics.json").read_text())["training"]
    assert written["steps"] == 3 and written["seconds"] is None  # of the last session alone nothing is claimed


def test_run_is_not_continued_with_other_arguments(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    _interrupt_at(monkeypatch, 2, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        hf_ctxseg.train(**as_arguments(data=small, output_dir=run, save_steps=1))
    before = (run / "args.yaml").read_text()
    with pytest.raises(ValueError, match=r"started with output_stride=None, but is to be continued with .*stride=8"):
        hf_ctxseg.train(**as_arguments(data=small, output_dir=run, save_steps=1, resume=True, output_stride=8))
    assert (run / "args.yaml").read_text() == before


# Several processes


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_make_one_run_and_score_each_picture_once(line, tmp_path):
    data, run = line[0], tmp_path / "run"
    arguments = flags(data=data, output_dir=run, **LINE | {"max_steps": 3}, per_device_eval_batch_size=2)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(_free_port())]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "scripts" / "finetune.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("evaluation: mIoU") == 1 and done.stdout.count("The run folder") == 1
    metrics = _metrics(run)
    assert metrics["training"]["batch_size"] == 4 and "2 processes" in metrics["training"]["device"]
    alone = hf_ctxseg.evaluate(run, data)["evaluation"]
    assert metrics["evaluation"]["num_images"] == 3
    for key in ("mean_iou", "mean_accuracy", "overall_accuracy", "per_category_iou"):
        assert metrics["evaluation"][key] == pytest.approx(alone[key], abs=1e-9), key
    assert metrics["evaluation"]["loss"] == pytest.approx(alone["loss"], rel=1e-4)
