"""Rows S1 to S7 of what a training must survive; the random kills of S1 are in test_kill.py."""

import errno
import json
import os
import resource
import signal

import pytest
import torch
from survival_helpers import at_call
from training_helpers import LINE, as_arguments, flags, make_data, same_weights, trained, weights

import hf_ctxseg
from hf_ctxseg import checkpoints, report, survival
from hf_ctxseg.checkpoints import newest_checkpoint
from hf_ctxseg.cli import main
from hf_ctxseg.survival import TrainingStopped
from hf_ctxseg.trainer import SegmentationTrainer

RECIPE = LINE | {"save_steps": 2}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Data folder and run folder of a training that nothing disturbed."""
    return trained(tmp_path_factory.getbasetemp())[:2]


@pytest.fixture
def small(tmp_path):
    return make_data(tmp_path / "data")


class Killed(BaseException):
    """Passes through everything that a SIGKILL would not give a chance to either."""


def _mostly_slow(cases, *fast):
    return [case if case in fast else pytest.param(case, marks=SLOW) for case in cases]


def _kill():
    raise Killed


# Where the second of three checkpoints is cut off, and which is the newest afterwards.
SAVING = {
    "weights": (SegmentationTrainer, "save_model", 2, 2),
    "optimizer": (SegmentationTrainer, "_save_optimizer_and_scheduler", 2, 2),
    "state": (SegmentationTrainer, "_save_rng_state", 2, 2),
    "manifest": (checkpoints, "write_manifest", 2, 2),
    "name": (checkpoints.os, "rename", 2, 2),
    "rotation": (checkpoints, "discard", 1, 4),
    "deletion": (checkpoints.os, "rename", 3, 4),
}


@pytest.mark.parametrize("place", _mostly_slow(SAVING, "optimizer", "name", "deletion"))
def test_s2_kill_during_save_leaves_the_old_or_the_new_state(line, tmp_path, monkeypatch, place):
    data, whole = line
    run = tmp_path / "run"
    owner, name, number, newest = SAVING[place]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, number, _kill)
        with pytest.raises(Killed):
            main(["train", *flags(data=data, output_dir=run, **RECIPE)])
    assert newest_checkpoint(run).name == f"checkpoint-{newest}"
    assert main(["train", *flags(data=data, output_dir=run, **RECIPE), "--resume"]) == 0
    assert same_weights(run, whole)
    left = [path.name for path in run.iterdir() if path.is_dir() and path.name not in ("previews", "samples")]
    assert left == ["checkpoint-6"] and not list(run.glob("*.partial"))


ELSEWHERE = {
    "before the first checkpoint": (SegmentationTrainer, "training_step", 2),
    "in an evaluation": (SegmentationTrainer, "prediction_step", 5),
    "after the last step": (report, "plot_curves", 1),
}


@pytest.mark.parametrize("place", _mostly_slow(ELSEWHERE, "in an evaluation"))
def test_s1_kill_elsewhere_loses_nothing(line, tmp_path, monkeypatch, place):
    data, whole = line
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, *ELSEWHERE[place], _kill)
        with pytest.raises(Killed):
            main(["train", *flags(data=data, output_dir=run, **RECIPE)])
    assert not (run / "config.json").exists()
    assert main(["train", *flags(data=data, output_dir=run, **RECIPE), "--resume"]) == 0
    assert same_weights(run, whole)


def test_s1_step_draws_the_same_whatever_data_loaders_drew(line, tmp_path):
    # Workers that outlive an epoch are started once, and once more by a resumed run: each start takes from torch's
    # generator, which dropout takes from too. Without workers every epoch takes from it.
    data, whole = line
    assert main(["train", *flags(data=data, output_dir=tmp_path / "run", **LINE | {"dataloader_num_workers": 1})]) == 0
    assert same_weights(tmp_path / "run", whole)


@pytest.mark.slow
def test_s1_best_weights_are_kept_after_a_kill_behind_the_last_step(line, tmp_path, monkeypatch):
    data = line[0]
    recipe = RECIPE | {
        "save_steps": 3, "save_total_limit": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-4, "max_steps": 9,
    }  # fmt: skip
    whole = hf_ctxseg.train(**as_arguments(data=data, output_dir=tmp_path / "whole", **recipe))
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_call(patch, report, "plot_curves", 1, _kill)
        hf_ctxseg.train(**as_arguments(data=data, output_dir=run, **recipe))
    best = json.loads((newest_checkpoint(run) / "trainer_state.json").read_text())["best_global_step"]
    assert best < 9, "the last step is the best: the test shows nothing"
    hf_ctxseg.train(**as_arguments(data=data, output_dir=run, resume=True, **recipe))
    assert same_weights(run, whole.output_dir)


@pytest.mark.parametrize("limit", [1 << 20, pytest.param(4 << 20, marks=SLOW)], ids=["weights", "optimizer"])
def test_s3_full_disk_at_save_is_reported_and_training_goes_on(line, tmp_path, monkeypatch, capsys, limit):
    data, whole = line
    run = tmp_path / "run"
    sizes = {path.name: path.stat().st_size for path in newest_checkpoint(whole).iterdir()}
    assert (sizes["model.safetensors"] > limit) == (limit == 1 << 20) and sizes["optimizer.pt"] > limit
    kept = []

    def narrow():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write beyond it fails as on a full disk

    def widen():
        kept.append(newest_checkpoint(run).name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        at_call(monkeypatch, SegmentationTrainer, "_save_checkpoint", 2, narrow)
        at_call(monkeypatch, SegmentationTrainer, "training_step", 5, widen)
        assert main(["train", *flags(data=data, output_dir=run, **RECIPE)]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    printed = capsys.readouterr().out
    needed = round(sum(sizes[name] for name in ("model.safetensors", "optimizer.pt")) / 1e6)
    assert f"checkpoint-4 was not saved. The disk of {run} is full: about {needed} MB are needed" in printed
    assert "checkpoint-2 is kept" in printed and kept == ["checkpoint-2"]
    assert same_weights(run, whole) and newest_checkpoint(run).name == "checkpoint-6"


def test_s3_full_disk_at_the_end_leaves_no_half_model(line, tmp_path, monkeypatch, capsys):
    data, whole = line
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_call(
            patch,
            hf_ctxseg.training,
            "save_model",
            1,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard)),
        )
        try:
            assert main(["train", *flags(data=data, output_dir=run, **RECIPE)]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "The trained model was not saved. The disk of" in said and "--resume finishes" in said
    assert not (run / "config.json").exists() and not (run / "model.safetensors").exists()
    assert not list(run.glob("*.partial"))
    assert main(["train", *flags(data=data, output_dir=run, **RECIPE), "--resume"]) == 0
    assert same_weights(run, whole)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/1"),
        survival.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["disk", "quota", "torch", "safetensors"],
)
def test_s3_full_disk_is_known_by_what_libraries_say(error):
    assert survival.is_disk_full(error)
    assert not survival.is_disk_full(PermissionError(errno.EACCES, "Permission denied"))


@pytest.mark.slow
def test_s3_other_failure_to_save_stops(line, tmp_path, monkeypatch, capsys):
    def fail():
        raise PermissionError(errno.EACCES, "Permission denied")

    at_call(monkeypatch, checkpoints.os, "rename", 2, fail)
    assert main(["train", *flags(data=line[0], output_dir=tmp_path / "run", **RECIPE)]) == 1
    said = capsys.readouterr().err
    assert "checkpoint-4 could not be saved: [Errno 13] Permission denied. checkpoint-2 is kept" in said


def _lose(monkeypatch, *steps):
    """Make the loss of these calls NaN, and what the forward pass leaves in the running statistics too."""
    real, calls = SegmentationTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        calls.append(None)
        if len(calls) in steps:
            inputs = {**inputs, "pixel_values": inputs["pixel_values"] * torch.nan}
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SegmentationTrainer, "compute_loss", compute_loss)


def test_s6_nan_loss_stops_with_the_names_of_the_batches(line, tmp_path, monkeypatch, capsys):
    data, run = line[0], tmp_path / "run"
    _lose(monkeypatch, 3, 4)
    seen = []
    real = SegmentationTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["name"])
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SegmentationTrainer, "training_step", training_step)
    assert main(["train", *flags(data=data, output_dir=run, max_nan_steps=2, **RECIPE)]) == 1
    said = capsys.readouterr().err
    assert "NaN or infinite in the 2 steps 3 to 4" in said and "checkpoint-2 is kept" in said
    assert len(seen) == 4 and f"the batches were {', '.join(seen[2] + seen[3])}. Look" in said
    assert all(name.startswith("train/images/") for name in seen[2])
    assert not (run / "config.json").exists()


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=SLOW)])
def test_s6_step_without_a_finite_loss_changes_nothing(line, tmp_path, monkeypatch, accumulation):
    recipe = RECIPE | {"gradient_accumulation_steps": accumulation, "save_total_limit": 3, "max_nan_steps": 9}
    # of an accumulated step one batch of two is enough
    _lose(monkeypatch, *range(2 * accumulation + 1, 6 * accumulation + 1, accumulation))
    hf_ctxseg.train(**as_arguments(data=line[0], output_dir=tmp_path / "run", **recipe))
    assert same_weights(tmp_path / "run", tmp_path / "run" / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values() if tensor.is_floating_point())


@pytest.mark.slow
def test_s6_only_steps_in_a_row_count(line, tmp_path, monkeypatch):
    _lose(monkeypatch, 2, 4, 6)
    result = hf_ctxseg.train(**as_arguments(data=line[0], output_dir=tmp_path / "run", max_nan_steps=2, **RECIPE))
    assert result.metrics["training"]["steps"] == 6
    assert not same_weights(tmp_path / "run", line[1])


@pytest.mark.slow
def test_s6_weights_that_are_not_finite_are_not_saved(line, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def poison(self, *args, **kwargs):
        if self.state.global_step == 4:
            self.model.classifier.bias.data[0] = torch.inf
        return real(self, *args, **kwargs)

    real = SegmentationTrainer._save_checkpoint
    monkeypatch.setattr(SegmentationTrainer, "_save_checkpoint", poison)
    with pytest.raises(TrainingStopped, match=r"classifier.bias is not finite after step 4.*checkpoint-2 is kept"):
        hf_ctxseg.train(**as_arguments(data=line[0], output_dir=run, **RECIPE))
    assert newest_checkpoint(run).name == "checkpoint-2"


@pytest.mark.parametrize(
    ("workers", "split"),
    [(1, "train"), *(pytest.param(*case, marks=SLOW) for case in ((0, "val"), (0, "train"), (1, "val")))],
)
def test_s7_picture_deleted_in_mid_run_is_named(small, tmp_path, monkeypatch, capsys, workers, split):
    picture = small / split / "images" / "001.png"
    at_call(monkeypatch, SegmentationTrainer, "_save_checkpoint", 1, picture.unlink)
    recipe = RECIPE | {"dataloader_num_workers": workers}
    assert main(["train", *flags(data=small, output_dir=tmp_path / "run", **recipe)]) == 1
    said = capsys.readouterr().err
    assert f"{split}/images/001.png" in said and "--resume continues from it" in said and "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.slow  # torch takes seconds to notice
def test_s7_dead_worker_is_told_and_the_checkpoint_kept(small, tmp_path, monkeypatch, capsys):
    main_process = os.getpid()
    real = hf_ctxseg.data.TrainingDataset.__getitem__

    def getitem(self, index):
        if os.getpid() != main_process and int(self._epoch) == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does for want of memory
        return real(self, index)

    monkeypatch.setattr(hf_ctxseg.data.TrainingDataset, "__getitem__", getitem)
    recipe = RECIPE | {"dataloader_num_workers": 1}
    assert main(["train", *flags(data=small, output_dir=tmp_path / "run", **recipe)]) == 1
    said = capsys.readouterr().err
    assert "A process that loads pictures died after step 4" in said and "lower --dataloader_num_workers" in said
    assert "checkpoint-4 is kept" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), marks=SLOW),
        pytest.param(MemoryError(), marks=SLOW),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_s7_out_of_memory_names_crops_and_knobs(small, tmp_path, monkeypatch, capsys, error):
    def fail():
        raise error

    at_call(monkeypatch, SegmentationTrainer, "compute_loss", 4, fail)
    assert main(["train", *flags(data=small, output_dir=tmp_path / "run", **RECIPE)]) == 1
    said = capsys.readouterr().err
    assert "Out of memory in step 4 with 2 crops of 33x33 pixels" in said
    assert "--per_device_train_batch_size or --crop_size" in said and "checkpoint-2 is kept" in said
