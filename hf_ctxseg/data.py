"""Data sets: from a folder, a `datasets` table or a Hub name to samples, and from samples to what models train on.

Everything a user can get wrong about data is refused here before training starts, with the files named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision import tv_tensors
from transformers.utils import logging

from .augmentation import resize_pair
from .data_sources import (
    WHOLE,
    as_tables,
    find_folders,
    load_tables,
    near,
    pair_files,
    pick_columns,
    table_class_names,
)
from .samples import ClassInfo, FolderSamples, Samples, SampleSubset, TableSamples, read_classes, read_label, read_pair

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ClassInfo",
    "DataSplits",
    "EvaluationDataset",
    "FolderSamples",
    "SampleSubset",
    "Samples",
    "TableSamples",
    "TrainingDataset",
    "collate_evaluation",
    "load_data",
    "read_classes",
    "read_label",
    "read_pair",
]

logger = logging.get_logger(__name__)

CLASS_FILES = ("meta.json", "labels.txt", "classes.txt")
EVAL_SPLITS = ("val", "validation", "valid")


@dataclass
class DataSplits:
    """What `load_data` found.

    Args:
        train: `Samples` to train on; None if not asked for.
        validation: `Samples` to evaluate on; None if there are none.
        classes: Names, colours and ignore_index.
        source: Short description without paths: folder name or Hub name.
        validation_name: What the validation samples are called, for reports.
    """

    train: Any
    validation: Any
    classes: ClassInfo
    source: str
    validation_name: str = "validation"


def load_data(
    data: "str | Path | datasets.Dataset | datasets.DatasetDict",
    *,
    labels: str | Sequence[str] | None = None,
    ignore_index: int | None = None,
    train_split: str | None = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> DataSplits:
    """Find the images, label maps and classes of a data set.

    Args:
        data: Folder of images and label maps with equal stems (`<split>/images` with `<split>/labels`,
            `images/<split>` with `labels/<split>`, or `images` with `labels`; `masks` serves as well), parquet file
            or folder of such, folder of `save_to_disk`, Hub name, or a loaded `datasets` object.
        labels: Class names: list, comma-separated names, or a `.txt` or `.json` file. Else the names that the table's
            label feature carries, or `meta.json`, `labels.txt` or `classes.txt` in the folder.
        ignore_index: Label value that does not count; by default the one in `meta.json`, else 255.
        train_split: Split to train on; None if only evaluation is wanted.
        eval_split: Split to evaluate on; by default the first of val, validation and valid.
        image_column: Column of the images in a table; guessed if None.
        label_column: Column of the label maps; guessed if None.
        eval_fraction: Share of the training samples, in [0, 1), held out if there is no split to evaluate on.
        seed: Alone decides which are held out.

    Raises:
        FileNotFoundError: If the folder or a names file does not exist.
        ConnectionError: If the Hub cannot be reached.
        ValueError: For all else that is wrong, with the files, splits or columns found.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}, but it must be at least 0 and below 1.")
    path = Path(data).expanduser() if isinstance(data, str | Path) else None
    tables = as_tables(data) if path is None else load_tables(path, try_hub=isinstance(data, str))
    names: tuple[str, ...] | None = None
    splits: dict[str, Callable[[], Samples]] = {}
    if tables is not None:
        names = table_class_names(tables, label_column)
        splits |= {name: partial(_from_table, table, image_column, label_column) for name, table in tables.items()}
    elif path is not None:
        splits |= {name: partial(_from_files, path, *pair) for name, pair in find_folders(path).items()}
    source = _describe(data, path)
    classes = _find_classes(source, path, labels if labels is not None else names, ignore_index)
    if eval_split is None and WHOLE not in splits:
        eval_split = next((name for name in EVAL_SPLITS if name in splits and name != train_split), None)
    train, validation = _choose_splits(splits, source, train_split, eval_split)
    if train is not None and validation is None and eval_fraction:
        train, validation = _hold_out(train, source, eval_fraction, seed)
        eval_split = f"{len(validation)} pictures held out of {train_split}"
    return DataSplits(train, validation, classes, source, eval_split or "all pictures")


def _from_files(root: Path, images: Path, labels: Path) -> Samples:
    return FolderSamples(pair_files(root, images, labels), root)


def _from_table(table: "datasets.Dataset", image_column: str | None, label_column: str | None) -> Samples:
    return TableSamples(table, *pick_columns(table, image_column, label_column))


def _describe(data: Any, path: Path | None) -> str:
    if path is not None:
        return path.resolve().name if path.exists() else str(data)
    table = next(iter(data.values())) if isinstance(data, Mapping) else data
    return table.info.dataset_name or table.info.builder_name or "data set"


def _find_classes(
    source: str, path: Path | None, labels: str | Sequence[str] | None, ignore_index: int | None
) -> ClassInfo:
    if labels is not None:
        return read_classes(labels, ignore_index)
    folder = None if path is None else path if path.is_dir() else path.parent if path.is_file() else None
    for name in CLASS_FILES if folder is not None else ():
        if folder is not None and (folder / name).is_file():
            return read_classes(folder / name, ignore_index)
    raise ValueError(
        f"{source} does not say what its classes are called. Give --labels: names separated by commas, or a .txt file "
        f"with one name a line, or a .json file; or put such a file into the folder as {' or '.join(CLASS_FILES)}."
    )


def _choose_splits(
    splits: Mapping[str, Callable[[], Samples]], source: str, train_split: str | None, eval_split: str | None
) -> tuple[Samples | None, Samples | None]:
    if WHOLE in splits:
        if eval_split is not None:
            raise ValueError(f"{source} has no splits, so none is named {eval_split!r}; leave --eval_split out.")
        whole = splits[WHOLE]()
        return (None, whole) if train_split is None else (whole, None)
    if eval_split is None and train_split is None:
        raise ValueError(f"{source} has no validation split; name one of {sorted(splits)} with --eval_split.")
    chosen: list[Samples | None] = []
    for flag, name in (("--train_split", train_split), ("--eval_split", eval_split)):
        if name is not None and name not in splits:
            raise ValueError(
                f"{source} has no split {name!r}{near(name, splits)}; name one of {sorted(splits)} with {flag}."
            )
        chosen.append(None if name is None else splits[name]())
        if name is not None and not len(chosen[-1] or ()):
            raise ValueError(f"The split {name!r} of {source} is empty.")
    return chosen[0], chosen[1]


def _hold_out(samples: Samples, source: str, fraction: float, seed: int) -> tuple[Samples, Samples]:
    total = len(samples)
    if total < 2:
        raise ValueError(
            f"{source} has {total} sample and no validation split; at least 2 are needed to hold one out."
        )
    count = min(total - 1, max(1, round(total * fraction)))
    held = set(Random(seed).sample(range(total), count))
    logger.warning(
        f"{source} has no validation split: {count} of the {total} training samples are held out to evaluate on "
        f"(seed {seed}); if it has a split for that, name it with --eval_split."
    )
    return SampleSubset(samples, [i for i in range(total) if i not in held]), SampleSubset(samples, sorted(held))


class TrainingDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Augmented samples whose random draws depend on (seed, epoch, index) alone.

    A run resumed in the middle of an epoch, or with another number of workers, therefore sees the same pictures.

    Args:
        samples: Images with labels.
        transform: Augmentation of (`tv_tensors.Image`, `tv_tensors.Mask`), all of one size afterwards.
        image_processor: Rescales and normalises; called with `do_resize=False`.
        seed: Seed of the draws.
        longest_edge: If given, image and label are first scaled so that the longer edge has this many pixels, as the
            image processor does in evaluation.

    Shape:
        pixel_values float (3, h, w), labels int64 (h, w).
    """

    def __init__(
        self,
        samples: Samples,
        transform: Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[torch.Tensor, torch.Tensor]],
        image_processor: Callable[..., Mapping[str, torch.Tensor]],
        seed: int,
        longest_edge: int | None = None,
    ) -> None:
        if longest_edge is not None and longest_edge < 1:
            raise ValueError(f"longest_edge is {longest_edge}, but it must be at least 1.")
        self.samples = samples
        self.transform = transform
        self.image_processor = image_processor
        self.seed = seed
        self.longest_edge = longest_edge
        # Shared memory: workers that outlive an epoch must see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn from now on; accelerate's data loaders call it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture, label = read_pair(self.samples, index)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, H, W)
        image, mask = tv_tensors.Image(pixels), tv_tensors.Mask(torch.from_numpy(label.copy()))
        if self.longest_edge is not None:
            image, mask = resize_pair(image, mask, _fit(label.shape, self.longest_edge))
        key = f"{self.seed}/{int(self._epoch)}/{index}".encode()
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: in the main process it would reset the accelerator's generators too
            torch.default_generator.manual_seed(int.from_bytes(blake2b(key, digest_size=7).digest(), "big"))
            drawn, drawn_mask = self.transform(image, mask)
        batch = self.image_processor(
            images=drawn.as_subclass(torch.Tensor),
            segmentation_maps=drawn_mask.numpy(),
            do_resize=False,
            return_tensors="pt",
        )
        return {"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0].to(torch.int64)}


def _fit(size: tuple[int, ...], longest_edge: int) -> tuple[int, int]:
    height, width = (max(1, round(edge * longest_edge / max(size))) for edge in size)
    return height, width


class EvaluationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Whole images as the image processor makes them, with their labels untouched.

    Args:
        samples: Images with labels.
        image_processor: Called with its own settings, its resize included.

    Shape:
        pixel_values float (3, h, w), labels int64 (H, W) of the size the label was stored with.
    """

    def __init__(self, samples: Samples, image_processor: Callable[..., Mapping[str, torch.Tensor]]) -> None:
        self.samples = samples
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = read_pair(self.samples, index)
        pixel_values = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"index": index, "pixel_values": pixel_values, "labels": torch.from_numpy(label.astype(np.int64))}


def collate_evaluation(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collect evaluation samples whose sizes may differ: index (B,), and lists of pixel_values and labels."""
    return {
        "index": torch.tensor([sample["index"] for sample in batch]),
        "pixel_values": [sample["pixel_values"] for sample in batch],
        "labels": [sample["labels"] for sample in batch],
    }
