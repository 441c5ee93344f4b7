"""A folder of parquet files with masks: each whole or not there, all of them of one model, data set and way to look.

Processes that fill a folder share nothing but its file system. A shard is written under a name of its own and renamed
when it is on the disk; `manifest.json` says what all shards come from, so that a call with other weights, data or
settings is refused; who finds every shard there writes `summary.json` and `README.md`.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import MANIFEST, PARTIAL, sync_folder

if TYPE_CHECKING:
    import pyarrow as pa

SUMMARY, README = "summary.json", "README.md"
OWN_COLUMNS = ("row", "mask", "class_pixels", "width", "height", "error")
_OWN_FILES = ("mask-*.parquet", MANIFEST, SUMMARY, README)
_SHOWN = 20  # failed rows in the README
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~<>&-])")


def shard_path(folder: Path, index: int, total: int) -> Path:
    """The file of a shard, named as the Hub names them."""
    return folder / f"mask-{index:05d}-of-{total:05d}.parquet"


def mask_features(kept: Mapping[str, Any]) -> Any:
    """Columns of a shard: the row's number, columns that are kept, the mask with its areas and size, or the error.

    Args:
        kept: What the columns that are kept hold, by name.

    Raises:
        ValueError: If one of them has the name of a column of our own.
    """
    from datasets import Features, Image, List, Value

    taken = [name for name in kept if name in OWN_COLUMNS]
    if taken:
        raise ValueError(
            f"--keep_columns names {', '.join(taken)}, but the result has columns of its own of these names: rename "
            f"them in the data, or leave them out."
        )
    mask = {"mask": Image(), "class_pixels": List(Value("int64"))}
    size = {"width": Value("int32"), "height": Value("int32")}
    return Features({"row": Value("int64"), **kept, **mask, **size, "error": Value("string")})


def is_whole(path: Path, count: int | None) -> bool:
    """Whether a shard is there, readable and of so many rows (None: of any number)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException):
        return False
    return count is None or rows == count


def write_shard(path: Path, tables: "Iterable[pa.Table]", schema: "pa.Schema") -> None:
    """Write a shard, a row group for each table; it has its name when all of it is on the disk.

    Raises:
        OSError: If the disk is full or cannot be written; nothing is left of the shard.
    """
    import pyarrow.parquet as pq

    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            with pq.ParquetWriter(stream, schema) as writer:
                for table in tables:
                    writer.write_table(table)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.replace(partial, path)
        except FileNotFoundError:  # taken away by a process that found all shards there
            if not path.exists():
                raise
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def claim_folder(folder: Path, manifest: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a folder ready for shards that come from what the manifest says.

    Args:
        folder: The folder, which is made if it is missing.
        manifest: Sections of values; `name` in a section is for people and may differ from call to call.

    Raises:
        ValueError: If the folder holds shards of another origin or files of ours that no manifest tells of, or cannot
            be written.
    """
    written = json.loads(json.dumps(manifest))  # as it is read again
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            others = [other for name in _OWN_FILES for other in sorted(folder.glob(name))]
            if others:
                raise ValueError(f"{folder} holds {others[0].name}, but no {MANIFEST} of it: choose another folder.")
            _write_text(path, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another folder.") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another folder.") from error
    differences = [
        f"{section} {name} is {_short(found.get(section, {}).get(name))} there and {_short(values.get(name))} here"
        for section, values in written.items()
        for name in sorted(set(values) | set(found.get(section, {})))
        if name != "name" and found.get(section, {}).get(name) != values.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds masks of another origin: {'; '.join(differences)}. Repeat the command that they were "
            f"made with, or choose another folder."
        )


def finish_folder(folder: Path, total: int, manifest: Mapping[str, Mapping[str, Any]]) -> list[str] | None:
    """Write `summary.json` and `README.md` if all shards are there, and take away what killed processes left.

    Args:
        folder: The folder.
        total: Number of shards.
        manifest: What the shards come from.

    Returns:
        The error of each row without a mask; None if a shard is still missing.
    """
    paths = [shard_path(folder, index, total) for index in range(total)]
    if not all(path.exists() for path in paths):
        return None
    summary = _summarize(paths, manifest["model"]["classes"])
    _write_text(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _write_text(folder / README, _readme(summary, manifest))
    for name in _OWN_FILES:
        for orphan in folder.glob(f"{name}.*{PARTIAL}"):
            with suppress(OSError):
                orphan.unlink()
    return [failure["error"] for failure in summary["failed"]]


def _summarize(paths: Sequence[Path], classes: Sequence[str]) -> dict[str, Any]:
    import pyarrow.parquet as pq

    pixels, rows, failed = [0] * len(classes), 0, []
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(columns=["row", "class_pixels", "error"]):
            for line in batch.to_pylist():
                rows += 1
                if line["error"] is None:
                    pixels = [one + more for one, more in zip(pixels, line["class_pixels"], strict=True)]
                else:
                    failed.append({"shard": path.name, "row": line["row"], "error": line["error"]})
    return {"rows": rows, "failed": failed, "pixels": dict(zip(classes, pixels, strict=True))}


def _readme(summary: Mapping[str, Any], manifest: Mapping[str, Mapping[str, Any]]) -> str:
    data, model, settings = manifest["data"], manifest["model"], manifest["settings"]
    split = data["split"] if re.fullmatch(r"\w+", data["split"]) else "train"
    # `datasets` tells folders of one name apart by this alone; it would give an earlier one's masks from its cache
    origin = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:8]
    whole = max(sum(summary["pixels"].values()), 1)
    shares = [
        f"| {index} | {_escaped(name)} | {count / whole:.2%} |"
        for index, (name, count) in enumerate(summary["pixels"].items())
    ]
    failed = summary["failed"]
    errors = [f"- {failure['shard']}, {_escaped(failure['error'])}" for failure in failed[:_SHOWN]]
    if failed[_SHOWN:]:
        errors.append(f"- and {len(failed) - _SHOWN} more, listed in `{SUMMARY}`")
    return "\n".join(
        [
            "---",
            "task_categories:",
            "- image-segmentation",
            "configs:",
            f"- config_name: masks-{origin}",
            "  data_files:",
            f"  - split: {split}",
            "    path: mask-*.parquet",
            "---",
            "",
            "# Predicted masks",
            "",
            f"Masks of the {summary['rows']} pictures of {_escaped(data['name'])} (column "
            f"{_escaped(settings['image_column'])}), predicted by {_escaped(model['name'])} with hf_ctxseg; weights "
            f"of SHA-256 `{model['weights_sha256']}`. What else they depend on is in `{MANIFEST}`.",
            "",
            f"{len(failed)} of the pictures could not be segmented{': their rows say why.' if failed else '.'}",
            *errors,
            "",
            "- `row`: number of the row in the data set, from 0; of a stream, in its shard",
            "- `mask`: indexed PNG of the picture's size, pixel values are class indices; empty if that failed",
            "- `class_pixels`: pixels of each class in the order below; `width`, `height`: of the mask",
            "- `error`: why there is no mask, else empty; all other columns are those of the data set",
            "",
            "| index | class | share of all pixels |",
            "|---|---|---|",
            *shares,
            "",
        ]
    )


def _escaped(text: object) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return _MARKDOWN.sub(r"\\\1", line)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{text[:120]}…" if len(text) > 120 else text


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileNotFoundError):  # taken away by a process that has just written the same
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
