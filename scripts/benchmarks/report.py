"""What the benchmark writes: JSON with everything, Markdown tables, plots over positions and pixels."""

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .measuring import TOLERANCE, Result

LIBRARIES = ("hf-ctxseg", "torch", "torchvision", "transformers", "timm", "segmentation-models-pytorch")
LIBRARIES += ("onedl-mmsegmentation", "onedl-mmcv", "evaluate", "numpy")
# Groups whose growth is demanded: how memory of ours may grow with x, as an exponent.
_GROWTH = {f"{mode}, training": 1.1 for mode in ("concatenation", "dot product", "embedded gaussian", "gaussian")} | {
    "evaluation, 150 classes": 0.1
}
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#7f7f7f")
_HEADER = "| | ours | time: peer / ours | memory: peer / ours | against the peer's best format | result differs by | |"


def environment() -> dict[str, Any]:
    """Say on what the figures were taken; the load tells whether the machine did other things too."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "allocator": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")} or "as shipped",
        "openmp": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "KMP_"))},
        "load_at_start": load(),
    }


def load() -> float | None:
    """Processes that want to run, averaged over a minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """Write benchmark.json, benchmark.md and the plots.

    Args:
        results: What was measured.
        about: Of `environment`, and of the run.
        folder: Where to; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = {"environment": about, "targets": [_row(*row) for row in _demanded(results)]}
    entries["growth"] = list(_growth(results))
    entries["results"] = [_entry(result) for result in results]
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    (folder / "benchmark.json").write_text(text, encoding="utf-8")
    (folder / "benchmark.md").write_text(markdown(results, about), encoding="utf-8")
    for device in sorted({result.device for result in results}):
        there = [result for result in results if result.device == device and len(_curves(results, result)) > 1]
        for name, label, chosen in (
            ("positions", "positions N", [r for r in there if r.case.name.startswith("non-local ")]),
            ("pixels", "pixels", [r for r in there if not r.case.name.startswith(("non-local ", "evaluation "))]),
        ):
            if chosen:
                _plot(chosen, label, folder / f"{name}-{device}.png")


def markdown(results: Sequence[Result], about: dict[str, Any]) -> str:
    """Give the tables: first what has to be shown, then every figure."""
    lines = ["# Benchmark", "", *_described(about), "", "## What it must show", "", targets(results)]
    lines += ["", "## Every figure", "", "| case | way | time | processor time | peak memory | differs by | |"]
    lines += ["|---" * 7 + "|"]
    for result in results:
        for side in result.case.sides:
            found = result.sides[side.name]
            figures = (_time(found.seconds), _time(found.cpu_seconds), _memory(found.mebibytes))
            note = found.note if result.correct(side.name) else "FAILED: the results differ"
            cells = (f"{result.case.name} ({result.device})", side.name, *figures, _small(found.difference), note)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def targets(results: Sequence[Result]) -> str:
    """Give the tables of what has to be shown: demanded and found ratios, and how memory grows."""
    lines = [_HEADER, "|---" * 7 + "|", *(_target_line(*row) for row in _demanded(results))]
    growth = list(_growth(results))
    if growth:
        lines += ["", "| memory of ours grows with | exponent | at most | |", "|---" * 4 + "|"]
    for row in growth:
        cells = (f"{row['group']} ({row['device']})", f"{row['exponent']:.2f}", str(row["demanded"]), _met(row["met"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def line(result: Result) -> str:
    """Give what was found of a case in one line, for whoever waits."""
    sides = [
        f"{name} {_time(found.seconds)} {_memory(found.mebibytes)}{'' if result.correct(name) else ' WRONG RESULT'}"
        for name, found in result.sides.items()
    ]
    return f"{result.case.name} ({result.device}): {'; '.join(sides)}"


def _described(about: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
    machine = f"{about['processor']}, {about['cores']} cores, {threads}"
    if about["gpu"]:
        machine += f"; {about['gpu']}"
    loads = [about["load_at_start"], about.get("load_at_end")]
    # The run itself adds up to its threads at the end; before it, nothing should run.
    limits = (0.5, about["threads"] + 0.5)
    busy = any(value is not None and value > limit for value, limit in zip(loads, limits, strict=True))
    told = " and ".join("unknown" if value is None else f"{value:.1f}" for value in loads)
    return [
        f"- Machine: {machine}{'' if about['gpu'] else '; no GPU: nothing was measured on one'}.",
        f"- Load at start and end: {told}{' — **other programs ran: take these figures with care**' if busy else ''}.",
        f"- Command: `{about.get('command', '')}`, {about['system']}, Python {about['python']}.",
        f"- Versions: {versions}.",
        f"- Allocator settings: {about['allocator']}; OpenMP: {about['openmp'] or 'as shipped'}.",
        "- float32. Ways take turns in one process, medians of the wall time of 3 to 25 rounds; memory is the peak of "
        "a fresh process each, for training with the weights, for inference and operators without weights and inputs.",
        "- Models: the peer's random weights, converted; logits at the size of the picture; ours as they come, and "
        "where named with batch normalisation folded or compiled. Peers as shipped; their best memory format is the "
        "better of that and channels_last. Dropout is off in training steps, so that the losses can be compared.",
        f"- Ratios above 1 are in our favour; results that differ by more than {TOLERANCE:.0e} of their range fail.",
    ]


def _demanded(results: Iterable[Result]) -> list[tuple[Result, str]]:
    """The results with a target, once for each way of ours."""
    chosen = [result for result in results if result.case.target is not None]
    return [(result, side.name) for result in chosen for side in result.case.sides if side.ours]


def _row(result: Result, ours: str) -> dict[str, Any]:
    target = result.case.target
    assert target is not None
    ratios = {"time": result.ratio(ours, "seconds"), "memory": result.ratio(ours, "mebibytes")}
    demanded = {"time": target.time, "memory": target.memory}
    verdicts = [
        None if (found := ratios[key]) is None else found >= wanted
        for key, wanted in demanded.items()
        if wanted is not None
    ]
    met = None if None in verdicts else all(verdicts) and result.correct(ours)
    best = {"time": result.ratio(ours, "seconds", False), "memory": result.ratio(ours, "mebibytes", False)}
    row = {"label": target.label, "device": result.device, "ours": ours, "demanded": demanded, "found": ratios}
    return row | {"against_best_format": best, "difference": result.sides[ours].difference, "met": met}


def _target_line(result: Result, ours: str) -> str:
    row = _row(result, ours)
    cells = [f"{row['label']} ({result.device})", ours]
    for key in ("time", "memory"):
        wanted = row["demanded"][key]
        cells.append(_ratio(row["found"][key]) + (f" (≥ {wanted:g})" if wanted is not None else ""))
    best = row["against_best_format"]
    cells.append(f"{_ratio(best['time'])}, {_ratio(best['memory'])}")
    return f"| {' | '.join([*cells, _small(row['difference']), _met(row['met'])])} |"


def _growth(results: Sequence[Result]) -> Iterable[dict[str, Any]]:
    for device in sorted({result.device for result in results}):
        for group, demanded in _GROWTH.items():
            chosen = [result for result in results if result.case.group == group and result.device == device]
            points = sorted((r.case.x, memory) for r in chosen if (memory := r.sides["ours"].mebibytes))
            if len(points) > 1:
                (x0, y0), (x1, y1) = points[-2:]  # the largest two, where constants matter least
                exponent = math.log(y1 / y0) / math.log(x1 / x0)
                row = {"group": group, "device": device, "exponent": exponent, "demanded": demanded}
                yield row | {"met": exponent <= demanded}


def _entry(result: Result) -> dict[str, Any]:
    case = result.case
    sides = {name: vars(found) | {"correct": result.correct(name)} for name, found in result.sides.items()}
    entry = {"case": case.name, "group": case.group, "x": case.x, "device": result.device}
    return entry | {"rounds": result.rounds, "sides": sides}


def _met(met: bool | None) -> str:
    return {True: "met", False: "**not met**", None: "not measured"}[met]


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"


def _small(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _memory(mebibytes: float | None) -> str:
    return "–" if mebibytes is None else f"{mebibytes:.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"


def _curves(results: Sequence[Result], like: Result) -> set[int]:
    return {r.case.x for r in results if (r.case.group, r.device) == (like.case.group, like.device)}


def _plot(results: Sequence[Result], label: str, path: Path) -> None:
    """Draw time and memory of each group over x, both axes logarithmic, a row of panels for each group."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    groups = list(dict.fromkeys(result.case.group for result in results))
    figure = Figure(figsize=(9, 0.4 + 2.5 * len(groups)), dpi=110, layout="constrained")
    for place, group in enumerate(groups):
        chosen = sorted((r for r in results if r.case.group == group), key=lambda r: r.case.x)
        names = list(dict.fromkeys(side.name for result in chosen for side in result.case.sides))
        for column, (key, unit) in enumerate((("seconds", "time in s"), ("mebibytes", "peak in MiB"))):
            axes = figure.add_subplot(len(groups), 2, 2 * place + column + 1)
            for name in sorted(names, key=lambda name: not name.startswith("ours")):
                points = [(r.case.x, value) for r in chosen if (value := getattr(r.sides.get(name), key, None))]
                if points:
                    colour = _colour(name, names)
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
            xs = sorted({result.case.x for result in chosen})
            axes.set(xscale="log", yscale="log", ylabel=unit, title=group if column == 0 else "")
            axes.set_xticks(xs, [_short(x) for x in xs])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3, which="major")
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.legend(fontsize=8)
            if place == len(groups) - 1:
                axes.set_xlabel(label)
    figure.savefig(path, format="png")


def _colour(name: str, names: Sequence[str]) -> str:
    """Blues for ours, warm colours for the others."""
    ours = name.startswith("ours")
    alike = [other for other in names if other.startswith("ours") == ours]
    return _COLOURS[alike.index(name) % 2 if ours else 2 + alike.index(name) % 3]


def _short(x: int) -> str:
    return f"{x / 2**20:g}M" if x >= 2**20 else f"{x / 2**10:g}k" if x >= 2**16 else str(x)
