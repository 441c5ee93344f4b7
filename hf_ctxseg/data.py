"""Data sets: from a folder, a `datasets` table or a Hub name to samples, and from samples to what models train on.

Everything a user can get wrong about data is refused here before training starts, with the files named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .crops import CropMaker, EvaluationDataset, TrainingDataset, collate_evaluation
from .data_sources import (
    WHOLE,
    as_tables,
    find_folders,
    is_stream,
    load_tables,
    near,
    pair_files,
    pick_columns,
    table_class_names,
)
from .recipes import Recipe, find_recipe
from .samples import (
    ClassInfo,
    FolderSamples,
    Samples,
    SampleSubset,
    TableSamples,
    read_classes,
    read_label,
    read_pair,
)
from .streaming import StreamedSamples

if TYPE_CHECKING:
    import datasets

__all__ = [
    "ClassInfo",
    "CropMaker",
    "DataSplits",
    "EvaluationDataset",
    "FolderSamples",
    "SampleSubset",
    "Samples",
    "StreamedSamples",
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
        train: `Samples` to train on, or `StreamedSamples`; None if not asked for.
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

    @property
    def is_streamed(self) -> bool:
        """Whether the samples to train on are a stream, of unknown number."""
        return isinstance(self.train, StreamedSamples)

    @property
    def seen(self) -> Any:
        """`Samples` to look at before training: those to train on, of a stream the first; None if there are none."""
        return self.train.head() if isinstance(self.train, StreamedSamples) else self.train


def load_data(
    data: "str | Path | datasets.Dataset | datasets.DatasetDict",
    *,
    recipe: str | Path | None = None,
    labels: str | Sequence[str] | None = None,
    default_labels: Sequence[str] | None = None,
    ignore_index: int | None = None,
    train_split: str | None = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    eval_fraction: float = 0.1,
    streaming: bool = False,
    seed: int = 0,
) -> DataSplits:
    """Find the images, label maps and classes of a data set.

    Args:
        data: Folder of images and label maps with equal stems (`<split>/images` with `<split>/labels`,
            `images/<split>` with `labels/<split>`, or `images` with `labels`; `masks` serves as well), parquet file
            or folder of such, folder of `save_to_disk`, Hub name, or a loaded `datasets` object.
        recipe: Name of a known data set or a recipe file: says how its folders lie, what its label maps store and
            what the classes are called.
        labels: Class names: list, comma-separated names, or a `.txt` or `.json` file. Else the names that the table's
            label feature carries, or `meta.json`, `labels.txt` or `classes.txt` in the folder.
        default_labels: Class names where neither `labels` nor the data names them.
        ignore_index: Label value that does not count; by default the one in `meta.json`, else 255.
        train_split: Split to train on; None if only evaluation is wanted.
        eval_split: Split to evaluate on; by default the first of val, validation and valid.
        image_column: Column of the images in a table; guessed if None.
        label_column: Column of the label maps; guessed if None.
        eval_fraction: Share of the training samples, in [0, 1), held out if there is no split to evaluate on.
        streaming: Whether the training split is read as it comes instead of being loaded first: Hub and parquet.
        seed: Alone decides which are held out.

    Raises:
        FileNotFoundError: If the folder or a names file does not exist.
        ConnectionError: If the Hub cannot be reached.
        ValueError: For all else that is wrong, with the files, splits or columns found.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}, but it must be at least 0 and below 1.")
    known = find_recipe(recipe) if recipe is not None else None
    if known is not None and (labels is not None or ignore_index is not None):
        given = "labels" if labels is not None else "ignore_index"
        raise ValueError(f"{given} is given beside recipe, which brings its own: leave it out, or change the recipe.")
    path = Path(data).expanduser() if isinstance(data, str | Path) else None
    columns = (image_column, label_column)
    splits, names = _find_splits(data, path, known, columns, streaming)
    source = _describe(data, path)
    classes = known.classes if known is not None else None
    if classes is None:
        classes = _find_classes(source, path, labels if labels is not None else names, default_labels, ignore_index)
    if eval_split is None and WHOLE not in splits:
        eval_split = next((name for name in EVAL_SPLITS if name in splits and name != train_split), None)
    train, validation = _choose_splits(splits, source, train_split, eval_split)
    if isinstance(validation, StreamedSamples):
        validation = _load_whole(data, path, eval_split, columns, known)
    if train is not None and validation is None and eval_fraction:
        train, validation = _hold_out(train, source, eval_fraction, seed)
        eval_split = f"{len(validation)} pictures held out of {train_split}"
    return DataSplits(train, validation, classes, source, eval_split or "all pictures")


def _find_splits(
    data: Any,
    path: Path | None,
    known: Recipe | None,
    columns: tuple[str | None, str | None],
    streaming: bool,
) -> tuple[dict[str, Callable[[], Any]], tuple[str, ...] | None]:
    """Splits, each to be opened when called, and the class names that a table carries."""
    tables = as_tables(data) if path is None else load_tables(path, try_hub=isinstance(data, str), streaming=streaming)
    if tables is not None:
        opened: dict[str, Callable[[], Any]] = {
            name: partial(_from_table, table, columns, known) for name, table in tables.items()
        }
        return opened, table_class_names(tables, columns[1])
    root = Path(data).expanduser()
    if streaming:
        raise ValueError(f"{root.name} is a folder of files, which are read one by one anyway: leave --streaming out.")
    if known is not None:
        return known.find_splits(root), None
    return {name: partial(_from_files, root, *pair) for name, pair in find_folders(root).items()}, None


def _from_files(root: Path, images: Path, labels: Path) -> Samples:
    return FolderSamples(pair_files(root, images, labels), root)


def _from_table(
    table: Any, columns: tuple[str | None, str | None], known: Recipe | None
) -> TableSamples | StreamedSamples:
    kind = StreamedSamples if is_stream(table) else TableSamples
    return kind(table, *pick_columns(table, *columns), known.label_map if known is not None else None)


def _load_whole(
    data: Any, path: Path | None, split: str | None, columns: tuple[str | None, str | None], known: Recipe | None
) -> Any:
    """The split to score, which is asked for by number and therefore not streamed."""
    tables = load_tables(path, try_hub=isinstance(data, str), split=split) if path is not None else None
    if tables is None:
        raise ValueError(
            "The split to score is a stream, but its pictures are asked for by number: pass it as a datasets.Dataset, "
            "or none with eval_fraction=0."
        )
    return _from_table(tables[split or WHOLE], columns, known)


def _describe(data: Any, path: Path | None) -> str:
    if path is not None:
        return path.resolve().name if path.exists() else str(data)
    table = next(iter(data.values())) if isinstance(data, Mapping) else data
    return table.info.dataset_name or table.info.builder_name or "data set"


def _find_classes(
    source: str,
    path: Path | None,
    labels: str | Sequence[str] | None,
    default_labels: Sequence[str] | None,
    ignore_index: int | None,
) -> ClassInfo:
    if labels is not None:
        return read_classes(labels, ignore_index)
    folder = None if path is None else path if path.is_dir() else path.parent if path.is_file() else None
    for name in CLASS_FILES if folder is not None else ():
        if folder is not None and (folder / name).is_file():
            return read_classes(folder / name, ignore_index)
    if default_labels is not None:
        return read_classes(default_labels, ignore_index)
    raise ValueError(
        f"{source} does not say what its classes are called. Give --labels: names separated by commas, or a .txt file "
        f"with one name a line, or a .json file; or put such a file into the folder as {' or '.join(CLASS_FILES)}."
    )


def _choose_splits(
    splits: Mapping[str, Callable[[], Any]], source: str, train_split: str | None, eval_split: str | None
) -> tuple[Any, Any]:
    if WHOLE in splits:
        if eval_split is not None:
            raise ValueError(f"{source} has no splits, so none is named {eval_split!r}; leave --eval_split out.")
        whole = splits[WHOLE]()
        return (None, whole) if train_split is None else (whole, None)
    if eval_split is None and train_split is None:
        raise ValueError(f"{source} has no validation split; name one of {sorted(splits)} with --eval_split.")
    chosen: list[Any] = []
    for flag, name in (("--train_split", train_split), ("--eval_split", eval_split)):
        if name is not None and name not in splits:
            raise ValueError(
                f"{source} has no split {name!r}{near(name, splits)}; name one of {sorted(splits)} with {flag}."
            )
        chosen.append(None if name is None else splits[name]())
        if name is not None and not isinstance(chosen[-1], StreamedSamples) and not len(chosen[-1]):
            raise ValueError(f"The split {name!r} of {source} is empty.")
    return chosen[0], chosen[1]


def _hold_out(samples: Samples | StreamedSamples, source: str, fraction: float, seed: int) -> tuple[Samples, Samples]:
    if isinstance(samples, StreamedSamples):
        raise ValueError(
            f"{source} is streamed and has no validation split, and none can be held out of a stream: name a split "
            "with --eval_split, or score nothing with --eval_fraction 0."
        )
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
