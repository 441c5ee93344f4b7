"""Training pictures that are read in order and never all at once: streamed Hub data sets and sharded parquet.

A stream is endless: pass after pass over the data, each in another order. It is dealt out to lanes, one for each
worker of each process, so that a pass gives every sample to one lane, once: by shards where their number divides into
the lanes, else row by row. What a lane gives depends on the seed and the lane alone; a resumed run reads over the rows
it has seen without decoding them, and goes on with the same pictures, provided that it has as many processes and
workers as before. Shards, and rows in a buffer, are shuffled here and not by `datasets`, which does it differently
from release to release.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count, islice
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.data_loader import DataLoaderShard
from PIL import Image
from transformers import TrainingArguments

from .crops import CropMaker
from .label_scan import count_values, describe_strangers
from .picture_reading import read_picture, to_rgb, turned_upright
from .samples import ClassInfo, Label, ReadLabel, check_sizes, read_label, undecoded

if TYPE_CHECKING:
    import datasets

_Item = TypeVar("_Item")
SCANNED = 256  # samples of a stream that are looked at before training
_ROWS = 16  # read at once


class StreamedSamples:
    """Samples in a `datasets.IterableDataset`, of unknown number.

    Args:
        table: The stream.
        image_column: Column of the images.
        label_column: Column of the label maps.
        label_map: Turns a stored label map into class indices; None: `read_label`.
    """

    def __init__(
        self,
        table: "datasets.IterableDataset",
        image_column: str,
        label_column: str,
        label_map: ReadLabel | None = None,
    ) -> None:
        self.image_column, self.label_column = image_column, label_column
        self.label_map = label_map or read_label
        self.table = undecoded(undecoded(table, label_column, image_column), image_column, label_column)
        self._head: SampleHead | None = None

    def head(self) -> "SampleHead":
        """The first samples, kept in memory as they are stored."""
        if self._head is None:
            self._head = SampleHead(self, list(islice(rows_of(self.table), SCANNED)))
        return self._head

    def names(self, row: Mapping[str, Any], where: str) -> tuple[str, str]:
        """What messages call image and label of a row: the names of their files, or else `where` with the column."""
        names = []
        for column in (self.image_column, self.label_column):
            path = row[column].get("path") if isinstance(row[column], Mapping) else None
            names.append(f"{path} ({column})" if path else f"{where} ({column})")
        return names[0], names[1]

    def image(self, row: Mapping[str, Any], name: str) -> Image.Image:
        """Image of a row, upright RGB."""
        return read_picture(row[self.image_column], name, to_rgb)

    def label(self, row: Mapping[str, Any], name: str) -> Label:
        """Label map of a row, (H, W)."""
        return self.label_map(read_picture(row[self.label_column], name, turned_upright), name)


def rows_of(table: "datasets.IterableDataset") -> Iterator[dict[str, Any]]:
    """Rows of a stream, all of them in each worker: iterating over the table itself would deal them out."""
    for batch in table.iter(batch_size=_ROWS):
        columns = list(batch)
        for cells in zip(*batch.values(), strict=True):
            yield dict(zip(columns, cells, strict=True))


def shuffled(items: Iterable[_Item], size: int, seed: str) -> Iterator[_Item]:
    """Give each item once, drawn from a buffer of `size` that is filled up after each draw."""
    draw = Random(seed)
    buffer: list[_Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        index = draw.randrange(size)
        yield buffer[index]
        buffer[index] = item
    draw.shuffle(buffer)
    yield from buffer


class SampleHead:
    """The first rows of a stream as samples that can be asked for by number."""

    def __init__(self, samples: StreamedSamples, rows: list[dict[str, Any]]) -> None:
        self.samples = samples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def _names(self, i: int) -> tuple[str, str]:
        return self.samples.names(self.rows[i], f"row {i}")

    def name(self, i: int) -> str:
        """Name of the image's file, or its row and column."""
        return self._names(i)[0]

    def label_name(self, i: int) -> str:
        """Name of the label's file, or its row and column."""
        return self._names(i)[1]

    def image(self, i: int) -> Image.Image:
        """Image `i`, upright RGB."""
        return self.samples.image(self.rows[i], self.name(i))

    def label(self, i: int) -> Label:
        """Label map `i`, (H, W)."""
        return self.samples.label(self.rows[i], self.label_name(i))


class TrainingStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Augmented samples of a stream, without end, for one process.

    Args:
        samples: The stream.
        classes: What labels may hold.
        crops: Augments.
        seed: Of the order and of the draws.
        buffer: Number of rows that a lane holds to draw the next from.
        batch_size: Of the data loader that reads it.
        rank: Number of this process.
        world_size: Number of processes.

    Shape:
        pixel_values float (3, h, w), labels int64 (h, w); and the sample's name, for messages.
    """

    def __init__(
        self,
        samples: StreamedSamples,
        classes: ClassInfo,
        crops: CropMaker,
        *,
        seed: int,
        buffer: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if buffer < 1:
            raise ValueError(f"The shuffle buffer holds {buffer} rows, but must hold at least 1.")
        self.samples = samples
        self.classes = classes
        self.crops = crops
        self.seed = seed
        self.buffer = buffer
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seen = 0

    def skip_batches(self, seen: int) -> None:
        """Give the first `seen` batches as empty samples, for a data loader that throws them away."""
        self.seen = seen

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        lane, lanes = self.rank * workers + worker, self.world_size * workers
        hollow = self._batches_seen(worker, workers) * self.batch_size
        for cycle in count():
            position = -1
            for position, row in enumerate(self._rows(cycle, lane, lanes)):
                if hollow:
                    hollow -= 1
                    yield {}
                else:
                    yield self._draw(row, f"{cycle}/{lane}/{position}", f"sample {position} of lane {lane}")
            if position < 0:
                raise ValueError(
                    f"The stream has no sample for worker {lane + 1} of {lanes}: it holds too few for so many; lower "
                    f"--dataloader_num_workers."
                )

    def _batches_seen(self, worker: int, workers: int) -> int:
        """How many of the batches seen came from a worker; a data loader takes one from each in turn."""
        return (self.seen - worker + workers - 1) // workers

    def _rows(self, cycle: int, lane: int, lanes: int) -> Iterator[dict[str, Any]]:
        """A lane's rows of a pass, shuffled."""
        table = self.samples.table
        total = table.num_shards
        shards = Random(f"{self.seed}/{cycle}").sample(range(total), total)
        by_shard = total % lanes == 0
        if by_shard:
            shards = shards[lane::lanes]
        rows = chain.from_iterable(rows_of(table.shard(num_shards=total, index=shard)) for shard in shards)
        yield from shuffled(rows if by_shard else islice(rows, lane, None, lanes), self.buffer, f"{self.seed}/{cycle}")

    def _draw(self, row: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
        name, label_name = self.samples.names(row, where)
        picture, label = self.samples.image(row, name), self.samples.label(row, label_name)
        check_sizes(picture, label, name, label_name)
        if problem := describe_strangers(label_name, count_values(label), self.classes):
            raise ValueError(problem)
        return {**self.crops.draw(*self.crops.prepare(picture, label), f"{self.seed}/{key}"), "name": name}


def stream_loader(
    stream: TrainingStream, arguments: TrainingArguments, collate: Callable[[Any], Any], device: torch.device
) -> DataLoaderShard:
    """A data loader of one process's part of a stream; accelerate's own would have every process read everything."""
    workers = arguments.dataloader_num_workers
    return DataLoaderShard(
        stream,
        device=device,
        batch_size=stream.batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=arguments.dataloader_pin_memory,
        persistent_workers=arguments.dataloader_persistent_workers and workers > 0,
        prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
    )
