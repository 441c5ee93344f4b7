"""What `ctxseg models` prints: heads, presets and backbones, as a table, JSON or CSV."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from .catalogue import BackboneInfo, backbone_names, check_backbones, serves
from .presets import find_preset, list_models, preset
from .recipes import find_recipe, recipe_names
from .registry import find_head

# Fewer networks are checked before further processes have started.
_WORTH_PROCESSES = 40


def print_models(report: str) -> None:
    """Print the registered heads and the presets, in the form `table`, `json` or `csv`."""
    rows = []
    for entry in list_models():
        config = preset(entry.name)
        reported = entry.reported or f"{find_head(entry.head)[2].__name__} with its defaults"
        rows.append([entry.name, entry.head, config.backbone, config.output_stride, reported])
    columns = ["name", "head", "backbone", "output_stride", "reported"]
    _print_rows(columns, rows, report)
    if report == "table":
        print(
            "\nctxseg train --preset NAME trains one; ctxseg models NAME shows its configuration;\n"
            "ctxseg models --backbones lists the networks that can stand in for its backbone."
        )


def print_recipes(report: str) -> None:
    """Print the known data sets, in the form `table`, `json` or `csv`."""
    found = [find_recipe(name) for name in recipe_names()]
    rows = [[recipe.name, recipe.classes.num_labels, recipe.title] for recipe in found]
    _print_rows(["name", "classes", "title"], rows, report)
    if report == "table":
        print("\nctxseg train --recipe NAME --data FOLDER starts from its schedule; flags that are given win.")


def _print_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], report: str) -> None:
    if report == "json":
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))
    elif report == "csv":
        csv.writer(sys.stdout).writerows([columns, *rows])
    else:
        _print_table(columns, rows)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) - 1)]
    for row in cells:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))


def print_preset(name: str) -> None:
    """Print the configuration of a preset as JSON and, on standard error, where it is reported and how large it is."""
    entry, config = find_preset(name), preset(name)
    model_class = find_head(entry.head)[2]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    reported = f"; {entry.reported}" if entry.reported else ""
    print(
        f"{name}: {model_class.__name__}, {size / 1e6:.1f} M parameters with {config.num_labels} classes{reported}",
        file=sys.stderr,
    )
    print(config.to_json_string(), end="")


def print_backbones(pattern: str, output_stride: int | None, report: str, everything: bool) -> None:
    """Print the timm networks that serve as backbones, each as soon as it has been checked.

    Args:
        pattern: timm's name, with wildcards.
        output_stride: Only networks that reach it; None: all that serve.
        report: `table`, `json` or `csv`.
        everything: Whether to print the networks that do not serve too, with the reason.

    Raises:
        ValueError: If no name matches, or the stride is no whole number above 0.
    """
    names = backbone_names(pattern)
    serves(BackboneInfo(names[0]), output_stride)  # a wrong stride is refused before the work
    width = max(map(len, names))
    if report == "table":
        print(_row(width, "name", "strides", "channels", "M parameters", "stride 4 map"))
    elif report == "csv":
        csv.writer(sys.stdout).writerow(asdict(BackboneInfo("")))
    of_no_use, too_coarse, rows = 0, 0, []
    for found in _with_progress(names):
        of_no_use += not found.strides
        too_coarse += bool(found.strides) and not serves(found, output_stride)
        if not (serves(found, output_stride) or (everything and not found.strides)):
            continue
        if report == "table":
            print(_backbone_row(width, found), flush=True)
        elif report == "csv":
            strides = " ".join(map(str, found.strides))
            csv.writer(sys.stdout).writerow((asdict(found) | {"strides": strides}).values())
            sys.stdout.flush()
        else:
            rows.append(asdict(found))
    if report == "json":
        print(json.dumps(rows, indent=2))
    if too_coarse:
        print(f"{too_coarse} of {len(names)} networks do not reach output stride {output_stride}.", file=sys.stderr)
    if of_no_use:
        hint = "" if everything else ": --all lists them with the reason"
        print(f"{of_no_use} of {len(names)} networks give no maps for pictures of any size{hint}.", file=sys.stderr)


def _row(width: int, name: str, strides: str, channels: str, parameters: str, low_level: str) -> str:
    return f"{name:<{width}}  {strides:<8}  {channels:>8}  {parameters:>12}  {low_level}"


def _backbone_row(width: int, found: BackboneInfo) -> str:
    if not found.strides:
        return f"{found.name:<{width}}  none: {found.reason}"
    strides = " ".join(map(str, found.strides))
    size, low_level = f"{found.parameters / 1e6:.1f}", "yes" if found.low_level else "no"
    return _row(width, found.name, strides, str(found.channels), size, low_level)


def _with_progress(names: Sequence[str]) -> Iterator[BackboneInfo]:
    """Check networks; on a terminal, standard error shows how far it is."""
    processes = min(os.cpu_count() or 1, 8) if len(names) > _WORTH_PROCESSES else 1
    shown = sys.stderr.isatty()
    for done, found in enumerate(check_backbones(names, processes), start=1):
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        yield found
        if shown and done < len(names):
            print(f"{done} of {len(names)} checked", end="", file=sys.stderr, flush=True)
