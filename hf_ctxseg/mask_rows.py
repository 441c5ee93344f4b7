"""Rows of pictures to rows of masks: decoded and encoded by threads, segmented between them, in their order."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from .dataset_rows import RowSource, Shard
from .inference import Predictor
from .mask_shards import OWN_COLUMNS
from .picture_reading import Convert, read_picture
from .prediction import Prediction

if TYPE_CHECKING:
    import pyarrow as pa

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
THREADS = min(4, os.cpu_count() or 1)
_GROUP = 100  # rows of a row group, and the most masks in memory


@dataclass(frozen=True)
class Work:
    """What stays the same from shard to shard.

    Args:
        predictor: The model.
        source: The rows.
        schema: Of the result.
        batch_size: Neighbouring pictures of one size that go through the model together.
    """

    predictor: Predictor
    source: RowSource
    schema: "pa.Schema"
    batch_size: int


def mask_tables(work: Work, shard: Shard, pool: ThreadPoolExecutor, tick: Callable[[], None]) -> "Iterator[pa.Table]":
    """Tables of a shard's masks, of `_GROUP` rows each."""
    import pyarrow as pa

    source, predictor, ahead = work.source, work.predictor, THREADS + work.batch_size
    place = f"shard {shard.index}, " if shard.count is None else ""
    decode = partial(_decode, source, predictor.processor.picture, place)
    decoded = _ahead(pool, decode, source.read(shard), ahead)
    segmented = _segmented(predictor, decoded, work.batch_size)
    encoded = _ahead(pool, partial(_encode, work.schema, len(predictor.names)), segmented, ahead)
    count = 0
    group: list[pa.Table] = []
    for row in encoded:
        tick()
        count += 1
        group.append(row)
        if len(group) == _GROUP:
            yield pa.concat_tables(group).combine_chunks()
            group = []
    if group:
        yield pa.concat_tables(group).combine_chunks()
    if shard.count not in (None, count):
        raise ValueError(
            f"{source.name} gave {count} rows from row {shard.start} on instead of {shard.count}: has it changed? "
            f"The same command continues."
        )


def _ahead(
    pool: ThreadPoolExecutor, make: Callable[[_Item], _Made], items: Iterable[_Item], depth: int
) -> Iterator[_Made]:
    """What `make` gives for each item, in their order, made by threads up to `depth` items before it is asked for."""
    waiting: deque[Future[_Made]] = deque()
    for item in items:
        waiting.append(pool.submit(make, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(frozen=True)
class _Row:
    """A row on its way, with the columns that are kept, and the picture, then the prediction, or the error."""

    number: int
    name: str
    kept: "pa.Table"
    content: Image.Image | Prediction | ValueError


def _decode(source: RowSource, convert: Convert, place: str, numbered: "tuple[int, pa.Table]") -> _Row:
    number, row = numbered
    name = f"{place}row {number} ({source.image_column})"
    kept = row.select(list(source.features))
    try:
        cell = row.column(source.image_column)[0].as_py()
        return _Row(number, name, kept, read_picture(cell, name, convert))
    except ValueError as error:
        return _Row(number, name, kept, error)


def _segmented(predictor: Predictor, rows: Iterable[_Row], batch_size: int) -> Iterator[_Row]:
    for _, alike in groupby(rows, key=lambda row: getattr(row.content, "size", None)):
        while batch := list(islice(alike, batch_size)):
            pictures = [row.content for row in batch if isinstance(row.content, Image.Image)]
            if len(pictures) > 1:
                with suppress(ValueError):  # one of them, as is found below
                    predictions = predictor.several(pictures)
                    batch = [replace(row, content=each) for row, each in zip(batch, predictions, strict=True)]
            yield from (_segment(predictor, row) for row in batch)


def _segment(predictor: Predictor, row: _Row) -> _Row:
    if not isinstance(row.content, Image.Image):
        return row
    try:
        return replace(row, content=predictor(row.content))
    except ValueError as error:
        return replace(row, content=ValueError(f"{row.name} cannot be segmented: {error}"))


def _encode(schema: "pa.Schema", classes: int, row: _Row) -> "pa.Table":
    import pyarrow as pa

    cells: dict[str, Any] = dict.fromkeys(OWN_COLUMNS) | {"row": row.number}
    if isinstance(row.content, Prediction):
        file = BytesIO()
        row.content.mask_image.save(file, "PNG")
        height, width = row.content.mask.shape
        pixels = np.bincount(row.content.mask.ravel(), minlength=classes).tolist()
        cells |= {"mask": {"bytes": file.getvalue(), "path": None}, "class_pixels": pixels}
        cells |= {"width": width, "height": height}
    else:
        cells["error"] = str(row.content)
    kept = {name: _without_path(row.kept[name]) for name in row.kept.column_names}
    arrays = [
        kept[field.name].cast(field.type) if field.name in kept else pa.array([cells[field.name]], field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _without_path(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """A kept cell that names a picture's file gets its content, nothing where there is no such file."""
    import pyarrow as pa

    cell = column[0].as_py()
    if not (isinstance(cell, Mapping) and "bytes" in cell):
        return column
    content, path = cell["bytes"], cell.get("path") or ""
    if content is None:
        try:
            content = Path(path).read_bytes()
        except OSError:
            return pa.chunked_array([pa.nulls(1, column.type)])
    stored = {**cell, "bytes": content, "path": re.split(r"[/\\]", path)[-1] or None}
    return pa.chunked_array([pa.array([stored], column.type)])
