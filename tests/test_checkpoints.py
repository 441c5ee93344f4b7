"""Checkpoints on the disk, and the lock of a run folder."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ctxseg import run_lock
from hf_ctxseg.checkpoints import (
    checkpoints,
    discard,
    find_damage,
    newest_checkpoint,
    publish,
    remove_orphans,
    rotate,
    step_of,
)
from hf_ctxseg.run_folder import check_run, prepare_run
from hf_ctxseg.run_lock import locked


def _checkpoint(run, step):
    partial = run / f"checkpoint-{step}.partial"
    (partial / "inner").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (partial / "inner" / "state.json").write_text(f'{{"step": {step}}}')
    publish(partial, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def _names(run):
    return sorted(path.name for path in run.iterdir())


def test_manifest_lists_every_file_with_its_size_and_hash(tmp_path):
    folder = _checkpoint(tmp_path, 5)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed == {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("inner/state.json", "model.safetensors")
    }
    assert find_damage(folder) == [] and _names(tmp_path) == ["checkpoint-5"]


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut": (_cut, "model.safetensors has 100 bytes instead of 5120"),
    "flipped": (_flip, "model.safetensors is not what was saved"),
    "missing": (Path.unlink, "model.safetensors is missing"),
    "no manifest": (lambda path: path.with_name("manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (lambda path: _cut(path.with_name("manifest.json")), "manifest.json cannot be read"),
    "other manifest": (lambda path: path.with_name("manifest.json").write_text("[]"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    for step in (5, 100, 20):
        _checkpoint(tmp_path, step)
    harm, words = DAMAGE[damage]
    harm(tmp_path / "checkpoint-100" / "model.safetensors")
    told = []
    assert newest_checkpoint(tmp_path, told.append).name == "checkpoint-20"
    assert len(told) == 1 and told[0].startswith("checkpoint-100 is not complete and passed over") and words in told[0]
    assert prepare_run(tmp_path, resume=True).name == "checkpoint-20"


def test_only_damaged_checkpoints_mean_starting_anew(tmp_path):
    (_checkpoint(tmp_path, 6) / "manifest.json").unlink()
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_checkpoints_are_ordered_by_step_and_nothing_else_is_one(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-9.partial", "my-checkpoint-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [9, 10]


def test_published_folder_takes_the_place_of_a_damaged_one(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "old").write_text("x")
    folder = _checkpoint(tmp_path, 5)
    assert not (folder / "old").exists() and find_damage(folder) == [] and _names(tmp_path) == ["checkpoint-5"]


def test_deletion_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    folder = _checkpoint(tmp_path, 5)
    monkeypatch.setattr("hf_ctxseg.checkpoints.shutil.rmtree", lambda *args, **kwargs: None)
    discard(folder)
    assert checkpoints(tmp_path) == [] and _names(tmp_path) == ["checkpoint-5.old.partial"]


def test_remains_of_killed_processes_are_removed(tmp_path):
    for name in ("checkpoint-5.partial", "model.partial", "checkpoint-3.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".tmpAbC123").write_text("of safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    (_checkpoint(tmp_path, 4))
    remove_orphans(tmp_path)
    assert _names(tmp_path) == ["checkpoint-4", "notes.txt"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4, 9]),
        (1, None, [4, 9]),
        (2, None, [3, 4, 9]),
        (1, 2, [2, 4, 9]),
        (2, 2, [2, 4, 9]),
        (3, 2, [2, 3, 4, 9]),
        (1, 4, [4, 9]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    for step in (1, 2, 3, 4):
        _checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9").mkdir()  # damaged and passed over: the run goes on from 4
    rotate(tmp_path, 4, limit, None if best is None else f"elsewhere/checkpoint-{best}")
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == left


# S5


HOLD = """
import fcntl, os, socket, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(os.getpid(), socket.gethostname(), end="", file=file, flush=True)
print("held", flush=True)
sys.stdin.readline()
"""


def test_s5_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        words = rf"in use by another training \(process {holder.pid} on {socket.gethostname()}\): wait for its end"
        with pytest.raises(ValueError, match=words), locked(run):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (run / ".lock").exists()  # it had no chance to take it away
    with locked(run):
        pass
    assert _names(run) == []


def test_s5_lock_of_a_file_system_without_locks_is_that_of_a_living_process(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for holder, is_free in (
        (f"{os.getppid()} {socket.gethostname()}", False),
        (f"{gone.pid} {socket.gethostname()}", True),
        (f"{os.getppid()} another.machine", True),
        ("", True),
    ):
        (tmp_path / ".lock").write_text(holder)
        if is_free:
            with locked(tmp_path):
                assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {socket.gethostname()}"
        else:
            with pytest.raises(ValueError, match="in use by another"), locked(tmp_path):
                pass


def test_s5_new_folder_that_stays_empty_is_taken_away(tmp_path):
    with locked(tmp_path / "a"):
        pass
    with pytest.raises(KeyError), locked(tmp_path / "b"):
        (tmp_path / "b" / "kept").write_text("x")
        raise KeyError
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c"):
        pass
    assert _names(tmp_path) == ["b", "c"] and _names(tmp_path / "b") == ["kept"]


@pytest.fixture
def unprivileged():
    """Without the rights of root, for whom no folder is read-only."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    yield
    os.seteuid(was)


@pytest.mark.parametrize("name", ["", "run"])
def test_s5_read_only_folder_is_refused(tmp_path, unprivileged, name):
    was = os.geteuid()
    os.seteuid(os.getuid())
    for folder in (tmp_path, *tmp_path.parents[:3]):  # a worker of xdist adds a level
        folder.chmod(0o755)
    tmp_path.chmod(0o555)
    os.seteuid(was)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\): choose another folder"):
        with locked(tmp_path / name):
            pass


@pytest.mark.parametrize("held", ["README.md", "metrics.json", "model.safetensors", "previews"])
def test_s5_folder_with_files_that_a_run_would_write_over_is_refused(tmp_path, held):
    (tmp_path / held).write_text("mine")
    with pytest.raises(ValueError, match=rf"already holds a run \({held}\): choose another folder"):
        check_run(tmp_path, resume=False)
    with pytest.raises(ValueError, match=rf"already holds a run \({held}\): choose another folder"):
        check_run(tmp_path, resume=True)
    assert (tmp_path / held).read_text() == "mine"
    (tmp_path / "args.yaml").write_text("")
    with pytest.raises(ValueError, match="continue it with --resume, or choose"):
        check_run(tmp_path, resume=False)
