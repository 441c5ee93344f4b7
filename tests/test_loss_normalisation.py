"""However a batch is split over steps and processes, its pixels count alike."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_training import one_step

from hf_ctxseg.modeling_ctxseg import CtxSegForSemanticSegmentation
from hf_ctxseg.trainer import SegmentationTrainer

HERE = Path(__file__).parent
# Sums over pixels, whose parts add up exactly
SETTINGS = {
    "plain": {},
    "weighted": {"class_weights": [0.5, 1.0, 4.0], "label_smoothing": 0.1, "loss": "cross_entropy+0.5*focal"},
    "several scales": {"several_scales": True},
}


def check_same(one, other):
    """Compare losses and moves of two steps."""
    (loss, moves), (other_loss, other_moves) = one, other
    assert other_loss == pytest.approx(loss, rel=1e-5) and loss > 0.1
    assert max(move.abs().max() for move in moves.values()) > 1e-4
    for key, move in moves.items():
        torch.testing.assert_close(other_moves[key], move, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("steps", [2, 4])
def test_accumulation_equals_one_larger_batch(tmp_path, name, steps):
    whole = one_step(tmp_path / "whole", per_device_train_batch_size=8, **SETTINGS[name])
    size = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
    check_same(whole, one_step(tmp_path / "parts", **size, **SETTINGS[name]))


@pytest.mark.parametrize("name", ["cross_entropy", "dice+0.5*lovasz"])
def test_what_is_logged_is_the_mean_of_what_the_model_gives(tmp_path, monkeypatch, name):
    seen = []
    forward = CtxSegForSemanticSegmentation.forward
    monkeypatch.setattr(
        CtxSegForSemanticSegmentation,
        "forward",
        lambda self, *args, **kwargs: seen.append(out := forward(self, *args, **kwargs)) or out,
    )
    loss, _ = one_step(tmp_path, loss=name, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert len(seen) == 4
    assert loss == pytest.approx(sum(output.loss.item() for output in seen) / 4, rel=1e-6)


def test_l2_a_step_without_a_valid_pixel_has_no_loss_and_moves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "loss_training.UnequalCrops.__getitem__",
        lambda self, index: {"pixel_values": self.pixels[index], "labels": torch.full((33, 33), 255)},
    )
    for loss in ("cross_entropy", "ohem+dice+lovasz+focal"):
        found, moves = one_step(tmp_path, loss=loss, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        assert found == 0
        assert not any(move.any() for move in moves.values())


def test_the_model_keeps_no_loss_of_the_trainer(tmp_path, monkeypatch):
    models = []
    train = SegmentationTrainer.train
    monkeypatch.setattr(SegmentationTrainer, "train", lambda self: (train(self), models.append(self.model)))
    one_step(tmp_path, per_device_train_batch_size=8)
    assert models[0].training_loss is None


def _two_processes(folder, settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = folder / "found.pt"
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "loss_training.py"), str(target), json.dumps(settings)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(HERE.parent)},
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-3000:]
    return torch.load(target)


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name != "plain")]
)
def test_two_processes_that_accumulate_equal_one_with_the_whole_batch(tmp_path, name):
    whole = one_step(tmp_path / "whole", per_device_train_batch_size=8, **SETTINGS[name])
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    check_same(whole, _two_processes(tmp_path, size | SETTINGS[name]))
