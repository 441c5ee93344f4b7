"""SIGINT and SIGTERM in a training: one checkpoint, and out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from survival_helpers import at_call
from training_helpers import LINE, as_arguments, flags, same_weights, trained

import hf_ctxseg
from hf_ctxseg import checkpoints
from hf_ctxseg.checkpoints import newest_checkpoint
from hf_ctxseg.cli import main
from hf_ctxseg.stop_signals import StopSignals
from hf_ctxseg.trainer import SegmentationTrainer

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Data folder and run folder of a training that nothing disturbed."""
    return trained(tmp_path_factory.getbasetemp())[:2]


def _evaluated_steps(run):
    """The steps that the newest checkpoint knows scores of."""
    state = json.loads((newest_checkpoint(run) / "trainer_state.json").read_text())
    return [entry["step"] for entry in state["log_history"] if "eval_mean_iou" in entry]


def _send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 4), pytest.param(signal.SIGTERM, 143, 6, marks=SLOW)],
    ids=["mid-epoch", "end of epoch", "end of training"],
)
def test_s4_signal_saves_once_and_leaves(line, tmp_path, monkeypatch, capfd, number, code, step):
    data, whole = line
    run = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_call(patch, SegmentationTrainer, "training_step", step, _send(number))
        assert main(["train", *flags(data=data, output_dir=run, **LINE)]) == code
    assert signal.getsignal(number) is before
    assert [folder.name for folder in checkpoints.checkpoints(run)] == [f"checkpoint-{step}"]
    assert f"{number.name} after step {step}. checkpoint-{step} is kept" in capfd.readouterr().err
    assert main(["train", *flags(data=data, output_dir=run, **LINE), "--resume"]) == 0
    assert same_weights(run, whole)


@pytest.mark.parametrize("strategy", ["steps", pytest.param("epoch", marks=SLOW)])
def test_s4_signal_in_an_evaluation_ends_it_and_the_next_session_makes_up_for_it(
    line, tmp_path, monkeypatch, strategy
):
    data, whole = line
    recipe = LINE | {"eval_strategy": strategy, "save_strategy": strategy}
    step = 3 if strategy == "steps" else 4
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        scored = []
        at_call(patch, SegmentationTrainer, "prediction_step", 2, _send(signal.SIGTERM))
        at_call(patch, SegmentationTrainer, "prediction_step", 3, lambda: scored.append(None))
        assert main(["train", *flags(data=data, output_dir=run, **recipe)]) == 143
    assert not scored and newest_checkpoint(run).name == f"checkpoint-{step}"
    assert _evaluated_steps(run) == []
    assert main(["train", *flags(data=data, output_dir=run, **recipe), "--resume"]) == 0
    assert _evaluated_steps(run)[:1] == [step]
    if strategy == "steps":
        assert same_weights(run, whole)
    else:
        hf_ctxseg.train(**as_arguments(data=data, output_dir=tmp_path / "again", **recipe))
        assert same_weights(run, tmp_path / "again")


@pytest.mark.slow
def test_s4_signal_before_an_evaluation_that_is_due_does_not_wait_for_it(line, tmp_path, monkeypatch):
    data, whole = line
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        scored = []
        at_call(patch, SegmentationTrainer, "training_step", 3, _send(signal.SIGTERM))
        at_call(patch, SegmentationTrainer, "prediction_step", 1, lambda: scored.append(None))
        assert main(["train", *flags(data=data, output_dir=run, **LINE)]) == 143
    assert not scored
    assert main(["train", *flags(data=data, output_dir=run, **LINE), "--resume"]) == 0
    assert same_weights(run, whole)
    assert _evaluated_steps(run)[0] == 3


def test_s4_second_signal_ends_the_process_at_once(monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM and not codes
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [130]
    assert capfd.readouterr().err.count("again to leave at once") == 1


def test_s4_echo_of_a_launcher_is_no_second_signal(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == []
        monkeypatch.setattr("hf_ctxseg.stop_signals._ECHO_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [130]


@pytest.mark.slow
def test_s4_signal_to_a_launcher_stops_all_its_processes_after_one_checkpoint(line, tmp_path):
    data, run, whole = line[0], tmp_path / "run", tmp_path / "whole"
    script = Path(__file__).parents[1] / "scripts" / "finetune.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    recipe = LINE | {"max_steps": 40, "save_steps": 40, "eval_steps": 20}

    def start(output_dir):
        arguments = [*launch, *flags(data=data, output_dir=output_dir, **recipe), "--resume"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    printed = ""
    with start(run) as process:
        for text in process.stdout:
            printed += text
            if text.startswith("step 3/40"):
                process.send_signal(signal.SIGTERM)
    (stopped,) = checkpoints.checkpoints(run)
    assert 3 <= checkpoints.step_of(stopped) < 40, printed
    assert not checkpoints.find_damage(stopped) and (stopped / "rng_state_1.pth").exists()
    assert f"interrupted by SIGTERM after step {checkpoints.step_of(stopped)}" in printed
    for folder in (run, whole):
        with start(folder) as process:
            printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    assert same_weights(run, whole)
