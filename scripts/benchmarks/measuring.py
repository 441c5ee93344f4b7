"""Time and memory of several ways to compute the same thing.

Times are taken in one process, the ways in turn (A, B, A, B, …), so that whatever slows the machine slows them all;
the median counts. Memory is the peak of a fresh process for each way. The results of the ways are compared in the same
run, since a fast wrong answer is no result.
"""

import ctypes
import gc
import logging
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils.logging import disable_progress_bar

TOLERANCE = 1e-4  # of the range of the reference's values

Step = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Side:
    """One way to compute what a case is about.

    Args:
        name: Its name; those of ours begin with "ours".
        make: Builds weights and inputs on a device and gives the function to be measured. It is sent to other
            processes: a function of a module, or a `partial` of one.
        needs: Bytes that it is known to need at least; it is left out where that is more than the budget.
        shipped: Whether peers run so by themselves. Other forms (their best memory format) are shown beside.
        peak: Whether its peak memory is measured.
    """

    name: str
    make: Callable[[torch.device], Step]
    needs: int = 0
    shipped: bool = True
    peak: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is a way of this package."""
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Target:
    """What a case has to show: a row's label, and the ratios to reach (theirs / ours); None: no demand."""

    label: str
    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: Unlike all others'.
        group: Curve it belongs to, one panel of a plot.
        x: Its place on that curve, such as the number of positions.
        sides: The ways; the first that is not ours and can run is the reference for the results.
        target: What it has to show.
        timed: Whether times are taken, and results compared.
        with_weights: Whether the peak counts what `make` builds (weights), or only what comes on top.
        steps: How often the function runs for its peak; 2 where the first call leaves something for the next.
        devices: Device types it makes sense on.
    """

    name: str
    group: str
    x: int
    sides: tuple[Side, ...]
    target: Target | None = None
    timed: bool = True
    with_weights: bool = False
    steps: int = 1
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass
class Measured:
    """What was found of one side; None where it was not measured, with the reason in `note`."""

    seconds: float | None = None
    cpu_seconds: float | None = None
    mebibytes: float | None = None
    difference: float | None = None
    note: str = ""


@dataclass
class Result:
    """A case and what was found of its sides, by their names."""

    case: Case
    device: str
    rounds: int = 0
    sides: dict[str, Measured] = field(default_factory=dict)

    def ratio(self, ours: str, key: str, shipped_only: bool = True) -> float | None:
        """The best peer's `seconds` or `mebibytes` divided by ours; None where one of the two is missing."""
        found = getattr(self.sides[ours], key)
        names = [s.name for s in self.case.sides if not s.ours and (s.shipped or not shipped_only)]
        peers = [value for name in names if (value := getattr(self.sides[name], key)) is not None]
        # A peak below what one can tell apart counts as 0.1 MiB.
        return None if found is None or not peers else min(peers) / max(found, 0.1 if key == "mebibytes" else 1e-9)

    def correct(self, ours: str) -> bool:
        """Whether the results equal the reference's, where they were compared."""
        difference = self.sides[ours].difference
        return difference is None or difference <= TOLERANCE


def measure(case: Case, device: torch.device, budget: int, seconds: float, memory: bool = True) -> Result:
    """Measure a case.

    Args:
        case: The case.
        device: Where it runs.
        budget: Bytes; sides that need more are left out.
        seconds: Time to spend on the rounds; there are 3 to 25.
        memory: Whether peaks are measured, each in a process of its own.
    """
    result = Result(case, device.type, sides={side.name: Measured() for side in case.sides})
    fitting = []
    for side in case.sides:
        if side.needs > budget:
            result.sides[side.name].note = f"not run: needs {side.needs / 2**30:.1f} GiB"
        else:
            fitting.append(side)
    if case.timed:
        result.rounds = _time(fitting, device, seconds, result.sides)
    for side in fitting:
        if memory and side.peak:
            measured = result.sides[side.name]
            measured.mebibytes, measured.note = _peak_of_fresh_process(side, device, case.with_weights, case.steps)
    return result


def be_quiet() -> None:
    """Silence what libraries say while their models are built: the figures are what is to be read."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()


def _time(sides: Sequence[Side], device: torch.device, seconds: float, results: dict[str, Measured]) -> int:
    sides = sorted(sides, key=lambda side: side.ours)  # the reference first
    steps = {side.name: side.make(device) for side in sides}
    reference: Sequence[torch.Tensor] = ()
    for side in sides:  # the first call, which is not timed
        outputs = [output.detach() for output in steps[side.name]()]
        if side is sides[0]:
            reference = outputs
        elif not sides[0].ours:
            results[side.name].difference = max(map(_difference, outputs, reference))
        del outputs
    reference = ()
    walls: dict[str, list[float]] = {name: [] for name in steps}
    cpus: dict[str, list[float]] = {name: [] for name in steps}
    calls = dict.fromkeys(steps, 1)
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 25 and time.perf_counter() - start < seconds):
        for name, step in steps.items():
            wall, cpu = _once(step, device, calls[name])
            if rounds == 0 and wall < 0.02:  # too short for a clock: several calls at once
                calls[name] = min(1000, 1 + int(0.02 / wall))
                wall, cpu = _once(step, device, calls[name])
            walls[name].append(wall)
            cpus[name].append(cpu)
        rounds += 1
    for name in steps:
        results[name].seconds, results[name].cpu_seconds = median(walls[name]), median(cpus[name])
    return rounds


def _once(step: Step, device: torch.device, calls: int) -> tuple[float, float]:
    """Wall time and processor time of one call, in seconds."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        step()
    _wait(device)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in parts of the range of what is expected; of class maps, the share of other pixels."""
    if found.shape != expected.shape:
        raise ValueError(f"Results of shapes {tuple(found.shape)} and {tuple(expected.shape)} cannot be compared.")
    if not expected.is_floating_point():
        return (found != expected).float().mean().item()
    spread = (expected.max() - expected.min() if expected.numel() > 1 else expected.abs()).item()
    difference = (found - expected).abs().max().item() / max(spread, 1e-30)
    return difference if math.isfinite(difference) else math.inf


def _peak_of_fresh_process(
    side: Side, device: torch.device, with_weights: bool, steps: int
) -> tuple[float | None, str]:
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None, "peak memory is measured on Linux only"
    # The server has loaded the libraries and computed nothing; each process begins as a copy of it.
    context = multiprocessing.get_context("forkserver")
    # What is not installed is passed over.
    context.set_forkserver_preload(
        ["scripts.benchmarks.models", "torchvision", "segmentation_models_pytorch", "mmseg.models"]
    )
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    arguments = (sender, side.make, device, with_weights, steps, threads)
    process = context.Process(target=_send_peak, args=arguments, daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        return None, f"ended by the system (exit code {process.exitcode})"
    process.join()
    return (None, answer) if isinstance(answer, str) else (answer, "")


def _send_peak(
    sender: Connection, make: Any, device: torch.device, with_weights: bool, steps: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    be_quiet()
    _hold_nothing_freed()
    try:
        sender.send(_peak(make, device, with_weights, steps))
    except (RuntimeError, MemoryError) as error:  # out of memory, for which torch has no class of its own on a CPU
        sender.send(str(error).splitlines()[0][:120])


def _peak(make: Callable[[torch.device], Step], device: torch.device, with_weights: bool, steps: int) -> float:
    """Peak in MiB above what the process held before; only Linux tells it for a CPU."""
    _load_kernels(device)
    before = _held(device)
    step = make(device)
    _give_back()
    if not with_weights:
        before = _held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(steps):
        outputs = step()
        del outputs
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    return (peak - before) / 2**20


def _load_kernels(device: torch.device) -> None:
    """Compute a little of everything, since code that is read from disk counts as memory too."""
    x = torch.randn(1, 16, 24, 24, device=device, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, device=device, requires_grad=True)
    y = F.conv2d(x, weight, dilation=2, padding=2)
    y = y + F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=1)
    rows = y.flatten(2).transpose(1, 2)
    (rows @ rows.transpose(1, 2)).softmax(-1).sum().backward()
    _give_back()


def _held(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _hold_nothing_freed() -> None:
    """Have memory of 64 KiB and more returned when it is freed: what a peak then counts is in use, not kept for later.

    By itself glibc keeps up to 32 MiB per block once such a block was freed, so that peaks depend on what was before.
    """
    try:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    except (AttributeError, OSError):  # another C library than glibc
        pass


def _give_back() -> None:
    """Return freed memory to the system, so that it does not count as held."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library than glibc
        pass
