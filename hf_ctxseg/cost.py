"""What a model costs: multiply-accumulates, time and memory of a forward pass, measured where it runs.

Multiply-accumulates are those of the formulas as written, counted by torch on a copy without memory: the fast forms
of this package compute fewer, how many depends on the picture's size. Time and memory are those of the model as it is.
"""

import copy
import gc
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

SIZES = (256, 512, 1024)
_EDGES = (1, 2, 4, 8, 16, 32, 64, 128)  # tried for the smallest picture
_REPEATS = 5
_RUNS = _REPEATS + 2  # and one to warm up, one for memory


def measure_cost(
    model: nn.Module, sizes: Sequence[int | tuple[int, int]] = SIZES, *, seconds: float | None = None
) -> dict[str, Any]:
    """Measure a forward pass of one picture, in evaluation mode, up to the logits at the head's stride.

    Args:
        model: A model of ours; its mode is restored.
        sizes: Pictures' edges, or heights and widths, in pixels.
        seconds: Time to spend; sizes that would take longer, judged by the size before, are left out, and so are those
            that the memory or the network does not allow.

    Returns:
        The part `cost` of `metrics.json`: device, threads, number format, the smallest square picture that the model
        takes (`smallest_edge`, pixels), and for each size `gmacs` (1e9 multiply-accumulates; None where torch cannot
        count them), `milliseconds` (median) and `peak_mib` (weights and all that the pass holds at once in
        tensors, 2^20 bytes).

    Raises:
        ValueError: If there is no size, or one is not above 0.
    """
    if not sizes:
        raise ValueError("sizes is empty: name at least one edge.")
    shapes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    for shape in shapes:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"sizes holds {shape}, but each must be an edge, or a height and a width, above 0.")
    weight = next(model.parameters())
    was_training, limit = model.training, None if seconds is None else time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    gc.collect()  # no memory of others is freed, and reused, while it is measured
    with _quiet(), torch.inference_mode():
        model.eval()
        try:
            smallest = next((edge for edge in _EDGES if _takes(model, edge)), None)
            for height, width in shapes:
                if limit is not None and rows and _expected(rows[-1], height * width) > limit - time.monotonic():
                    break
                try:
                    rows.append(_measure(model, height, width))
                except (RuntimeError, ValueError):
                    if limit is None:
                        raise
                    break
        finally:
            model.train(was_training)
    return {
        "device": _device_name(weight.device),
        "threads": torch.get_num_threads() if weight.device.type == "cpu" else None,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "batch_size": 1,
        "repeats": _REPEATS,
        "smallest_edge": smallest,
        "sizes": rows,
    }


def _measure(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    picture = _picture(model, height, width)
    gmacs = count_gmacs(model, height, width)
    model(picture)  # the first call of a size finds its kernels
    milliseconds = median(_milliseconds(model, picture) for _ in range(_REPEATS))
    return {
        "height": height,
        "width": width,
        "gmacs": gmacs,
        "milliseconds": round(milliseconds, 3),
        "peak_mib": _peak_mib(model, picture),
    }


def count_gmacs(model: nn.Module, height: int, width: int) -> float | None:
    """Count 1e9 multiply-accumulates of one picture in convolutions, matrix products and attention, by the formulas.

    Returns:
        The number; None if an operation of the model does not run without memory.
    """
    counter = FlopCounterMode(display=False)
    try:
        with _as_written(), torch.inference_mode(), counter:
            shadow = copy.deepcopy(model).to("meta").eval()
            shadow(_picture(shadow, height, width))
    except RuntimeError:
        return None
    return counter.get_total_flops() / 2 / 1e9


def _picture(model: nn.Module, height: int, width: int) -> torch.Tensor:
    weight = next(model.parameters())
    config: Any = model.config
    return torch.zeros((1, config.num_channels, height, width), device=weight.device, dtype=weight.dtype)


def _takes(model: nn.Module, edge: int) -> bool:
    try:
        return bool(model(_picture(model, edge, edge)).logits.isfinite().all())
    except (RuntimeError, ValueError):
        return False


def _expected(row: dict[str, Any], pixels: int) -> float:
    return _RUNS * row["milliseconds"] / 1000 * pixels / (row["height"] * row["width"])


def _milliseconds(model: nn.Module, picture: torch.Tensor) -> float:
    _wait(picture.device)
    started = time.perf_counter()
    model(picture)
    _wait(picture.device)
    return (time.perf_counter() - started) * 1000


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(model: nn.Module, picture: torch.Tensor) -> float:
    """Weights, and what tensors take more at the most while the pass runs than before it."""
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if picture.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(picture.device)
        before = torch.cuda.memory_allocated(picture.device)
        model(picture)
        peak = torch.cuda.max_memory_allocated(picture.device)
        return round((peak - before + weights) / 2**20, 1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its tracer tells of each start on the standard error
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as tracer:
        model(picture)
    found: Any = tracer.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return round((max(held, default=0) + weights) / 2**20, 1)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"
    return device.type


@contextmanager
def _as_written() -> Iterator[None]:
    """Have models compute their plain formulas."""
    before = os.environ.get("CTXSEG_PLAIN")
    os.environ["CTXSEG_PLAIN"] = "1"
    try:
        yield
    finally:
        os.environ.pop("CTXSEG_PLAIN")
        if before is not None:
            os.environ["CTXSEG_PLAIN"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence our warnings of small pictures, which are tried on purpose."""
    logger = logging.getLogger(__package__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
