"""S1: a training killed at random moments and started again with the same command ends in the same weights.

The processes are real and so are the kills. They are forked from a server that has imported everything once.
"""

import multiprocessing
import os
import random
import shutil
import time

import pytest
from training_helpers import flags, make_data, run_silently, same_weights

RECIPE = {
    "max_steps": 20,
    "save_steps": 3,
    "eval_steps": 7,
    "logging_steps": 5,
    "output_stride": 8,
    "learning_rate": 0.01,
    "dataloader_num_workers": 2,
}


@pytest.fixture(scope="module")
def context():
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["training_helpers", "hf_ctxseg.training", "matplotlib.pyplot"])
    return made


def _session(context, arguments, seconds=None):
    """Train in a process of its own; give its exit code, None if it was killed after so many seconds."""
    process = context.Process(target=run_silently, args=(["train", *arguments, "--resume"],))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


@pytest.mark.parametrize(
    ("kills", "workers"),
    [(5, 2), pytest.param(30, 2, marks=pytest.mark.slow), pytest.param(10, 0, marks=pytest.mark.slow)],
)
def test_s1_random_kills_end_in_the_same_weights(tmp_path, context, kills, workers):
    data, whole, run = make_data(tmp_path / "data"), tmp_path / "whole", tmp_path / "run"
    recipe = {**RECIPE, "data": data, "dataloader_num_workers": workers}
    assert _session(context, flags(output_dir=tmp_path / "warm", **recipe, dry_run=True)) == 0  # starts the server
    started = time.monotonic()
    assert _session(context, flags(output_dir=whole, **recipe)) == 0
    seconds = time.monotonic() - started
    draw = random.Random(os.environ.get("CTXSEG_SOAK_SEED", "0"))
    killed = finished = 0
    while killed < kills or not finished:
        limit = draw.uniform(0.1 * seconds, seconds) if killed < kills else None
        code = _session(context, flags(output_dir=run, **recipe), limit)
        if code is None:
            killed += 1
            continue
        # 2: killed between its last file and its end
        assert code == 0 or (code == 2 and (run / "config.json").exists())
        assert same_weights(run, whole)
        assert not list(run.glob("*.partial"))
        finished += 1
        if killed < kills:
            shutil.rmtree(run)
