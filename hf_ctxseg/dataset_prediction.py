"""Masks of a whole data set as parquet files, by any number of processes that may be killed at any time.

The rows are cut into shards of equal size, and each process takes an equal run of neighbouring shards. Nothing goes
on between the processes, no message and no waiting, so nothing hangs when one of them dies. The same command
continues, with as many processes as one likes: shards that are there are left alone, and what a shard holds depends
on its rows, the model and the settings alone.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .dataset_rows import RowSource, Shard, is_dataset, open_rows
from .inference import Predictor
from .mask_rows import THREADS, Work, mask_tables
from .mask_shards import claim_folder, finish_folder, is_whole, mask_features, shard_path, write_shard
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .wording import duration

if TYPE_CHECKING:
    import datasets

__all__ = ["DatasetMasks", "is_dataset", "local_device", "predict_dataset", "shards_of_process"]

SHARD_SIZE = 500
_SECONDS = 30.0  # between two lines about a shard


@dataclass(frozen=True)
class DatasetMasks:
    """What a process wrote.

    Args:
        written: The files that it wrote; those that were there already are not among them.
        failed: The error of each row that could not be segmented: of all shards if they are complete, else of those
            that it wrote.
        complete: Whether all shards are there, those of the other processes too.
    """

    written: list[Path]
    failed: list[str]
    complete: bool

    @property
    def exit_code(self) -> int:
        """1 if rows failed, which the process that finishes last tells: torchrun would stop the others."""
        return 1 if self.complete and self.failed else 0


def predict_dataset(
    model: str | Path | CtxSegForSemanticSegmentation | Predictor,
    data: "str | Path | datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict",
    output_dir: str | Path,
    *,
    split: str | None = None,
    image_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    shard_size: int = SHARD_SIZE,
    batch_size: int = 1,
    rank: int | None = None,
    world_size: int | None = None,
    say: Callable[[str], None] = print,
) -> DatasetMasks:
    """Segment the pictures of a data set into parquet files; what is there already is not made again.

    Start it once, or as several processes on any number of machines that share a file system: torchrun and
    `accelerate launch` number them, for other launchers set RANK and WORLD_SIZE. A row whose picture cannot be read
    or segmented gets an `error` instead of a mask. Where pictures exceed 4 megapixels, pass a `Predictor` with
    `memory` or `window`: else the memory that is free decides how they are cut into windows.

    Args:
        model: A run folder, the name of a model on the Hub, a segmentation model, or a `Predictor` of one.
        data: Parquet file, folder or glob of such, folder of `save_to_disk`, Hub name, or a loaded `datasets` object.
            Parquet on the Hub is read from there as it is needed; other formats are downloaded. Of an
            `IterableDataset` each of its own shards gives one file.
        output_dir: Where `mask-00000-of-00010.parquet` … are written; with all of them, `README.md` and
            `summary.json`.
        split: The split; may be None where there is one.
        image_column: Column of the pictures; guessed if None.
        keep_columns: Columns that the result holds too; None: those of numbers and texts.
        shard_size: Rows of a file, the most that a killed process loses.
        batch_size: Neighbouring pictures of one size that go through the model together.
        rank: Number of this process, from 0; by default of the environment's RANK.
        world_size: Number of processes; by default of the environment's WORLD_SIZE.
        say: Where lines for the user go.

    Returns:
        The files written and the rows that failed.

    Raises:
        FileNotFoundError: If there is no such data set.
        PermissionError, ConnectionError: If the Hub does not give it, or cannot be reached.
        ValueError: If model, data, split or column cannot be used, or the folder holds masks of another model, other
            data or other settings.
        OSError: If the disk is full.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, but must be 1 row or more: {SHARD_SIZE} is usual.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be 1 picture or more.")
    rank, world_size = _process(rank, world_size)
    source = open_rows(data, split, image_column, keep_columns)
    features = mask_features(source.features)
    shards = source.shards(shard_size)
    if not shards:
        raise ValueError(f"{source.name} holds no row: give data with pictures.")
    predictor = model if isinstance(model, Predictor) else Predictor(model, device=local_device())
    folder = Path(output_dir)
    manifest = _manifest(predictor, source, len(shards), shard_size, batch_size)
    claim_folder(folder, manifest)
    mine = shards_of_process(len(shards), rank, world_size)
    paths = {shards[index]: shard_path(folder, index, len(shards)) for index in mine}
    missing = {shard: path for shard, path in paths.items() if not is_whole(path, shard.count)}
    say(
        f"Shards: {len(shards)}; process {rank + 1} of {world_size} makes {len(mine)}"
        f"{f', of which {len(mine) - len(missing)} are there' if len(missing) < len(mine) else ''}"
        f"{'.' if mine else ': lower --shard_size to give each process some.'}"
    )
    work = Work(predictor, source, features.arrow_schema, batch_size)
    failed = _write_shards(work, missing, _Progress(missing, say))
    everything = finish_folder(folder, len(shards), manifest)
    return DatasetMasks(list(missing.values()), failed if everything is None else everything, everything is not None)


def shards_of_process(total: int, rank: int, world_size: int) -> range:
    """The shards of one process, of `total`: each falls to one process, and no two processes differ by more than one.

    They are neighbours, so that a process reads its part of the data in one go.
    """
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def local_device() -> str | None:
    """The GPU of this process among those of its machine, as launchers number them; None leaves the choice."""
    number = os.environ.get("LOCAL_RANK", "")
    if not number.isdecimal() or not torch.cuda.is_available():
        return None
    return f"cuda:{int(number) % torch.cuda.device_count()}"


def _process(rank: int | None, world_size: int | None) -> tuple[int, int]:
    numbers = []
    for given, name, default in ((rank, "RANK", "0"), (world_size, "WORLD_SIZE", "1")):
        text = os.environ.get(name, default) if given is None else str(given)
        if not text.isdecimal():
            raise ValueError(f"{name} is {text!r}, but must be a whole number: RANK 0 of WORLD_SIZE 1 if alone.")
        numbers.append(int(text))
    if not numbers[0] < numbers[1]:
        raise ValueError(
            f"RANK is {numbers[0]} of WORLD_SIZE {numbers[1]}, but processes are numbered from 0 to WORLD_SIZE - 1: "
            "let an array of jobs start at 0."
        )
    return numbers[0], numbers[1]


def _manifest(
    predictor: Predictor, source: RowSource, shards: int, shard_size: int, batch_size: int
) -> dict[str, dict[str, Any]]:
    """What the masks depend on; `name` is for people."""
    weights, setup = sha256(), sha256()
    for key, tensor in sorted(predictor.model.state_dict().items()):
        weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    config = predictor.model.config.to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "auto_map"):
        config.pop(key, None)
    setup.update(json.dumps(config, sort_keys=True, default=str).encode())
    setup.update(predictor.processor.to_json_string().encode())
    return {
        "data": {
            "name": source.name,
            "split": source.split,
            "rows": source.count,
            "fingerprint": source.fingerprint(),
        },
        "model": {
            "name": _model_name(predictor.model),
            "classes": list(predictor.names),
            "palette": [list(colour) for colour in predictor.palette],
            "weights_sha256": weights.hexdigest(),
            "setup_sha256": setup.hexdigest(),
        },
        "settings": {
            "shards": shards,
            "shard_size": shard_size,
            "batch_size": batch_size,
            "image_column": source.image_column,
            "keep_columns": list(source.features),
            **_settings(predictor),
        },
    }


def _settings(predictor: Predictor) -> dict[str, Any]:
    """How pictures are looked at: what a predictor holds besides its model, the same in each process."""
    settings: dict[str, Any] = {}
    for name, value in vars(predictor).items():
        if is_dataclass(value) and not isinstance(value, type):
            settings[name] = asdict(value)
        elif isinstance(value, str | int | float):
            settings[name] = value
    return settings


def _model_name(model: CtxSegForSemanticSegmentation) -> str:
    """What a model is called, without the path of a folder."""
    path = Path(str(model.name_or_path)).resolve()
    repository = next((part for part in path.parts if part.startswith("models--")), "")  # in the cache of the Hub
    return repository[8:].replace("--", "/") or (path.name if model.name_or_path else type(model).__name__)


class _Progress:
    """A line for each shard, and now and then one within it."""

    def __init__(self, shards: Iterable[Shard], say: Callable[[str], None]) -> None:
        counts = [shard.count for shard in shards]
        self.total = None if None in counts else sum(count or 0 for count in counts)
        self.say = say
        self.done = 0
        self.started = self.last = time.monotonic()

    def row(self, path: Path) -> None:
        self.done += 1
        if time.monotonic() - self.last > _SECONDS:
            self.line(path, "in work")

    def line(self, path: Path, state: str) -> None:
        self.last = time.monotonic()
        speed = self.done / max(self.last - self.started, 1e-9)
        of = left = ""
        if self.total is not None:
            of, left = f" of {self.total}", f", {duration((self.total - self.done) / speed)} left" if self.done else ""
        self.say(f"{path.name} {state}: {self.done}{of} pictures, {speed:.2f} pictures/s{left}")


def _write_shards(work: Work, missing: dict[Shard, Path], progress: _Progress) -> list[str]:
    failed: list[str] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for number, (shard, path) in enumerate(missing.items()):
            try:
                write_shard(path, mask_tables(work, shard, pool, partial(progress.row, path)), work.schema)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(
                    f"interrupted: {number} of {len(missing)} shards are written; the same command continues."
                ) from error
            failed += _errors(path)
            progress.line(path, "written")
    return failed


def _errors(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [error for error in pq.read_table(path, columns=["error"])["error"].to_pylist() if error is not None]
