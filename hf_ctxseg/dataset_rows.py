"""The rows of a data set in order, from any row on, a few at a time: what sharded prediction reads.

Parquet files are read where they lie, on a disk or on the Hub, and neither downloaded nor copied into a cache: their
footers tell how many rows each holds, so a process reads its own part alone. Columns that are kept stay Arrow columns,
so that nothing is lost on their way through.
"""

import glob
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .data_sources import (
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    WHOLE,
    as_tables,
    could_be_on_hub,
    explained_hub,
    is_picture,
    is_stream,
    load_tables,
    near,
    parquet_splits,
    pick_column,
)
from .hub_errors import impatient
from .mask_shards import OWN_COLUMNS

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ROWS = 16  # read at once
_PROBES = 16  # rows of a table that tell it from another
_BUFFER = 1 << 20  # bytes of a column that are read at once
_FOOTER_THREADS = 8


@dataclass(frozen=True)
class Shard:
    """Rows whose masks go to one file.

    Args:
        index: Number of the file.
        start: The first row; of a stream, the number of its own shard.
        count: Number of rows; None: all that the stream's shard holds.
    """

    index: int
    start: int
    count: int | None


class RowSource(ABC):
    """A split of a data set.

    Args:
        name: What the data set is called, without paths.
        split: What the split is called.
        features: What its columns hold.
        image_column: Column of the pictures; guessed if None.
        keep_columns: Columns that the result holds too; None: those of numbers and texts, but for names that the
            result has itself.

    Raises:
        ValueError: If a column does not exist or none can be guessed.
    """

    count: int | None = None  # rows, where that is known

    def __init__(
        self, name: str, split: str, features: Any, image_column: str | None, keep_columns: Sequence[str] | None
    ) -> None:
        pictures = [column for column, feature in (features or {}).items() if is_picture(feature)]
        only = pictures[0] if len(pictures) == 1 else None
        self.name, self.split = name, split
        self.image_column = pick_column(features, image_column or only, IMAGE_COLUMNS, "--image_column")
        plain = [column for column in features if _is_plain(features[column]) and column not in OWN_COLUMNS]
        kept = plain if keep_columns is None else list(keep_columns)
        for column in kept:
            if column not in features:
                raise ValueError(
                    f"--keep_columns names {column!r}{near(column, features)}, but the columns are "
                    f"{', '.join(features)}."
                )
        self.features = {column: features[column] for column in dict.fromkeys(kept)}

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys([self.image_column, *self.features]))

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what tells this data from other data."""

    @abstractmethod
    def shards(self, size: int) -> list[Shard]:
        """All shards, of `size` rows where that can be chosen."""

    @abstractmethod
    def read(self, shard: Shard) -> "Iterator[tuple[int, pa.Table]]":
        """Give each row of a shard with its number, as a table of one row; pictures are left encoded."""


class _CountedRows(RowSource):
    """Rows whose number is known."""

    count: int
    _position = -1  # of the row that `_rows` gives next
    _rows: "Iterator[pa.Table]"

    def shards(self, size: int) -> list[Shard]:
        starts = range(0, self.count, size)
        return [Shard(index, start, min(size, self.count - start)) for index, start in enumerate(starts)]

    def read(self, shard: Shard) -> "Iterator[tuple[int, pa.Table]]":
        # Shards that follow each other are read on: the middle of a file may only be found by reading up to it.
        end = shard.start + (shard.count or 0)
        if shard.start != self._position:
            self._rows = self._read(shard.start)
        self._position = -1
        yield from zip(range(shard.start, end), self._rows, strict=False)
        self._position = end

    @abstractmethod
    def _read(self, start: int) -> "Iterator[pa.Table]":
        """Give the rows from `start` on, each as a table."""


class _ParquetRows(_CountedRows):
    """Rows of parquet files, given as paths or as URLs that fsspec opens."""

    def __init__(
        self, name: str, split: str, files: Sequence[str], image_column: str | None, keep: Sequence[str] | None
    ) -> None:
        from datasets import Features

        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            footers = list(pool.map(_read_footer, files))
        try:
            features = Features.from_arrow_schema(footers[0].schema)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise ValueError(f"{_base(files[0])} cannot be read as a table: {error}") from error
        super().__init__(name, split, features, image_column, keep)
        for file, footer in zip(files, footers, strict=True):
            for column in self.columns:
                if column not in footer.schema.names:
                    raise ValueError(
                        f"{_base(file)} has no column {column!r}, but {_base(files[0])} has: give files of one table."
                    )
                kinds = [str(each.schema.field(column).type) for each in (footer, footers[0])]
                if column in self.features and kinds[0] != kinds[1]:
                    raise ValueError(
                        f"{_base(file)} holds {column!r} as {kinds[0]}, but {_base(files[0])} as {kinds[1]}: give "
                        "files of one table, or name the columns to keep without it (--keep_columns)."
                    )
        self.files = list(files)
        self.ends = list(accumulate(footer.rows for footer in footers))
        self.count = self.ends[-1]
        self._digest = _hash(f"{_base(file)} {footer.digest}" for file, footer in zip(files, footers, strict=True))

    def fingerprint(self) -> str:
        # a footer holds the place, size and bounds of every piece of every column
        return self._digest

    def _read(self, start: int) -> "Iterator[pa.Table]":
        for file, end, first in zip(self.files, self.ends, [0, *self.ends], strict=False):
            if start < end:
                try:
                    yield from self._read_file(file, max(0, start - first))
                # Arrow, fsspec and the Hub's client have an exception each for what breaks off
                except Exception as error:
                    raise ValueError(
                        f"{_base(file)} cannot be read to its end ({type(error).__name__}: {error}): repair the file "
                        f"or the connection; the same command continues."
                    ) from error

    def _read_file(self, file: str, skip: int) -> "Iterator[pa.Table]":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _open(file) as stream:
            parquet = pq.ParquetFile(stream, buffer_size=_BUFFER)
            group = 0
            while group < parquet.num_row_groups and parquet.metadata.row_group(group).num_rows <= skip:
                skip -= parquet.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, parquet.num_row_groups))
            batches = parquet.iter_batches(_ROWS, row_groups=groups, columns=self.columns) if groups else iter(())
            tables = (pa.Table.from_batches([batch]) for batch in batches)
            yield from islice(_single_rows(tables), skip, None)


class _TableRows(_CountedRows):
    """Rows of a `datasets.Dataset`."""

    def __init__(
        self, name: str, split: str, table: "datasets.Dataset", image_column: str | None, keep: Sequence[str] | None
    ) -> None:
        super().__init__(name, split, table.features, image_column, keep)
        self.table = table.with_format(None).select_columns(self.columns).with_format("arrow")
        self.count = len(table)

    def fingerprint(self) -> str:
        probes = sorted({round(place * (self.count - 1) / max(_PROBES - 1, 1)) for place in range(_PROBES)})
        cells = (repr(_known(cell)) for row in probes for cell in self.table[[row]].to_pylist()[0].values())
        return _hash([str(self.count), *cells] if self.count else ["0"])

    def _read(self, start: int) -> "Iterator[pa.Table]":
        return _single_rows(self.table[first : first + _ROWS] for first in range(start, self.count, _ROWS))


class _StreamRows(RowSource):
    """Rows of a `datasets.IterableDataset`, which are counted by reading them: its own shards are kept whole."""

    def __init__(
        self,
        name: str,
        split: str,
        table: "datasets.IterableDataset",
        image_column: str | None,
        keep: Sequence[str] | None,
    ) -> None:
        super().__init__(name, split, table.features, image_column, keep)
        self.table = table.with_format(None).select_columns(self.columns).with_format("arrow")

    def fingerprint(self) -> str:
        first = next((row for _, row in self.read(Shard(0, 0, None))), None)
        cells = [] if first is None else [repr(_known(cell)) for cell in first.to_pylist()[0].values()]
        return _hash([str(self.table.num_shards), *cells])

    def shards(self, size: int) -> list[Shard]:
        return [Shard(index, index, None) for index in range(self.table.num_shards)]

    def read(self, shard: Shard) -> "Iterator[tuple[int, pa.Table]]":
        part = self.table.shard(num_shards=self.table.num_shards, index=shard.start)
        return enumerate(_single_rows(part.iter(batch_size=_ROWS)))


def open_rows(data: Any, split: str | None, image_column: str | None, keep_columns: Sequence[str] | None) -> RowSource:
    """Open a split of a data set.

    Args:
        data: Parquet file, folder or glob of such, folder of `save_to_disk`, Hub name, or a loaded `datasets` object.
        split: The split; may be None where there is one.
        image_column: Column of the pictures; guessed if None.
        keep_columns: Columns that the result holds too; None: those of numbers and texts.

    Raises:
        FileNotFoundError: If nothing of that name exists.
        ConnectionError: If the Hub cannot be reached.
        ValueError: If it is no readable data set, or split or column do not exist.
    """
    from datasets import config

    if not isinstance(data, str | Path):
        chosen, table = _pick_split(as_tables(data, split), split)
        kind = _StreamRows if is_stream(table) else _TableRows
        return kind(type(table).__name__, chosen, table, image_column, keep_columns)
    path = Path(data)
    files = _parquet_files(path)
    if files:
        splits = {split or WHOLE: [str(path)]} if path.is_file() else parquet_splits(files)
        return _ParquetRows(path.name, *_pick_split(splits, split), image_column, keep_columns)
    if not path.exists() and could_be_on_hub(path.as_posix()) and not config.HF_HUB_OFFLINE:
        remote = _hub_parquet(path.as_posix())
        if remote is not None:
            return _ParquetRows(path.as_posix(), *_pick_split(remote, split), image_column, keep_columns)
    tables = load_tables(path, try_hub=True)
    if tables is None:
        raise ValueError(
            f"{path} holds neither parquet files nor what save_to_disk wrote: give a folder that does, or, for "
            f"pictures, folders and files of them."
        )
    name = path.name if path.exists() else path.as_posix()
    return _TableRows(name, *_pick_split(tables, split), image_column, keep_columns)


def is_dataset(text: str) -> bool:
    """Whether a text means a data set and not pictures: parquet, a folder of `save_to_disk`, or a name of the Hub."""
    path = Path(text)
    if path.exists():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return saved or bool(_parquet_files(path))
    if path.suffix.lower() == ".parquet":
        return True
    is_misspelt = path.suffix.lower() in IMAGE_SUFFIXES or (path.parent != Path(".") and path.parent.is_dir())
    return not is_misspelt and could_be_on_hub(path.as_posix())


def _parquet_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if path.suffix.lower() != ".parquet":
        return []
    if path.is_file():
        return [path]
    found = sorted(map(Path, glob.glob(str(path))))
    if not found:
        raise FileNotFoundError(f"There is no parquet file {path}: check the path.")
    return found


def _hub_parquet(name: str) -> dict[str, list[str]] | None:
    """Where the parquet files of a data set on the Hub lie, by split; None if it consists of others."""
    from datasets import load_dataset_builder

    with explained_hub(name), impatient():
        found = load_dataset_builder(name).config.data_files or {}
    splits = {str(split): [str(file) for file in files] for split, files in found.items()}
    files = [file for part in splits.values() for file in part]
    return splits if files and all(file.endswith(".parquet") for file in files) else None


def _pick_split(splits: Mapping[str, Any], split: str | None) -> tuple[str, Any]:
    """Name and content of the split that is asked for, or of the only one."""
    if len(splits) == 1 and (split is None or WHOLE in splits):
        return next(iter(splits.items()))
    listed = ", ".join(splits)
    if split is None:
        raise ValueError(f"The data has the splits {listed}: choose one with --split.")
    if split not in splits:
        raise ValueError(f"--split is {split!r}{near(split, splits)}, but the splits are {listed}.")
    return split, splits[split]


@dataclass(frozen=True)
class _Footer:
    rows: int
    schema: "pa.Schema"
    digest: str


def _read_footer(file: str) -> _Footer:
    import pyarrow.parquet as pq

    try:
        with _open(file) as stream:
            parquet = pq.ParquetFile(stream)
            stream.seek(-8, 2)  # its length and "PAR1" end a parquet file
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(-8 - length, 2)
            digest = sha256(stream.read(length)).hexdigest()
            return _Footer(parquet.metadata.num_rows, parquet.schema_arrow, digest)
    # Arrow, fsspec and the Hub's client have an exception each
    except Exception as error:
        raise ValueError(f"{_base(file)} cannot be read as a table: {type(error).__name__}: {error}") from error


def _open(file: str) -> Any:
    if "://" not in file:
        return open(file, "rb")
    from fsspec.core import url_to_fs

    system, path = url_to_fs(file)
    return system.open(path, "rb")


def _base(file: str) -> str:
    return PurePosixPath(Path(file).as_posix()).name


def _single_rows(tables: "Iterable[pa.Table]") -> "Iterator[pa.Table]":
    for table in tables:
        for row in range(table.num_rows):
            yield table.slice(row, 1)


def _is_plain(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "binary" not in feature.dtype)


def _known(cell: Any) -> Any:
    """What of a cell stays the same from machine to machine: a picture's path does not."""
    if isinstance(cell, Mapping) and "bytes" in cell:
        content = cell["bytes"]
        return content if content is not None else re.split(r"[/\\]", cell.get("path") or "")[-1]
    return cell


def _hash(parts: Iterable[str]) -> str:
    digest = sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()
