import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_helpers import LINE, flags, trained, weights

import hf_ctxseg
from hf_ctxseg.ema import AVERAGE
from hf_ctxseg.processes import failing_together, is_lost_process

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())[0]


def _launch(**arguments):
    """Train in two processes; what they printed, and torchrun's own report."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return subprocess.run(
        [sys.executable, *launch, str(ROOT / "scripts" / "finetune.py"), *flags(**arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_one_process_fails_with_its_own_error():
    arguments = SimpleNamespace(world_size=1, process_index=0)
    with failing_together(arguments):
        pass
    with pytest.raises(FileNotFoundError, match="no such folder"), failing_together(arguments):
        raise FileNotFoundError("no such folder")


@pytest.mark.parametrize(("rank", "expected"), [(0, SystemExit), (1, ValueError), (2, SystemExit)])
def test_of_several_processes_the_first_that_failed_tells(monkeypatch, rank, expected):
    def reduce(failed):  # what the others, of which 1 and 2 failed, add
        for other in {1, 2} - {rank}:
            failed[other] = 1

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    monkeypatch.setattr("hf_ctxseg.processes._HEADSTART", 0.0)
    arguments = SimpleNamespace(world_size=3, process_index=rank, device=torch.device("cpu"))
    with pytest.raises(expected) as caught, failing_together(arguments):
        if rank:
            raise ValueError("bad input")
    assert caught.value.args == ((2,) if expected is SystemExit else ("bad input",))


def test_lost_processes_are_told_from_other_errors(monkeypatch):
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2000")
    assert not is_lost_process(lost)  # of a single process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert is_lost_process(lost) and not is_lost_process(RuntimeError("a bug"))


BAD = {
    "label": "holds 77",
    "argument": "ema_decay is 2.0",
    "model": "there is no head",
    "stride": "cannot reach output_stride 12",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_told_once_and_without_traces(data, tmp_path, kind):
    given = {"argument": {"ema_decay": 2.0}, "model": {"head": "no_head"}, "stride": {"eval_output_stride": 12}}
    if kind == "label":
        data = shutil.copytree(data, tmp_path / "data")
        Image.fromarray(np.full((40, 48), 77, np.uint8)).save(data / "train" / "labels" / "002.png")
    done = _launch(data=data, output_dir=tmp_path / "run", **given.get(kind, {}))
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.lower().count(BAD[kind].lower()) == 1, said
    assert "hf_ctxseg/" not in said  # of a trace
    assert "exitcode  : 2" in said


@pytest.mark.slow
def test_two_processes_score_and_save_one_average(data, tmp_path):
    run = tmp_path / "run"
    recipe = LINE | {"ema_decay": 0.5, "gradient_checkpointing": True, "max_steps": 3, "save_steps": 3}
    done = _launch(data=data, output_dir=run, **recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((run / "metrics.json").read_text())["evaluation"]
    alone = hf_ctxseg.evaluate(run, data)["evaluation"]
    assert scores["per_category_iou"] == pytest.approx(alone["per_category_iou"], abs=1e-9)
    assert scores["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    saved = weights(run)
    average = load_file(run / "checkpoint-3" / AVERAGE)
    assert all(torch.equal(average[name], tensor) for name, tensor in saved.items())
