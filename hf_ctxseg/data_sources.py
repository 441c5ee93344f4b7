"""Where data sets lie: folders of files, parquet files, folders of `datasets`, and the Hub.

Finds splits, pairs files by their stems and guesses columns; what is missing or ambiguous is refused by name.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hub_errors import HUB_ERRORS, HUB_SECONDS, ask, cause_of, hub_error, impatient
from .wording import listed

if TYPE_CHECKING:
    import datasets

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
LABEL_FOLDERS = ("labels", "masks")
IMAGE_COLUMNS = ("image", "pixel_values", "img", "images")
LABEL_COLUMNS = (
    *("label", "labels", "mask", "masks", "annotation", "annotations"),
    *("segmentation_mask", "semantic_segmentation", "segmentation", "segmentation_map"),
)
LAYOUTS = (
    "accepted are <split>/images with <split>/labels, images/<split> with labels/<split>, or images with labels "
    "(masks serves as well as labels); a folder of parquet files; a folder that save_to_disk wrote"
)
WHOLE = ""  # names the only split of data without splits


def near(name: str, known: Iterable[str]) -> str:
    """A hint at the most similar known name, or nothing."""
    match = get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def find_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Find the image and label folder of each split.

    Args:
        root: Folder of a data set.

    Returns:
        Split to folders; one entry named `WHOLE` if there are no splits. A label folder need not exist.

    Raises:
        ValueError: If no layout fits.
    """
    splits = {
        folder.name: (folder / "images", _label_folder(folder))
        for folder in _subfolders(root)
        if (folder / "images").is_dir()
    }
    if (root / "images").is_dir():
        images, labels = root / "images", _label_folder(root)
        splits |= {folder.name: (folder, labels / folder.name) for folder in _subfolders(images)}
        if not splits:
            return {WHOLE: (images, labels)}
    if not splits:
        found = [folder.name for folder in _subfolders(root)]
        hint = next(filter(None, (near(name, ["images"]) for name in found)), "")
        raise ValueError(
            f"{root.name} holds no data set in a known layout: found "
            f"{'the folders ' + listed(found) if found else 'no folders'}{hint}; {LAYOUTS}."
        )
    return splits


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _label_folder(parent: Path) -> Path:
    found = [parent / name for name in LABEL_FOLDERS if (parent / name).is_dir()]
    if len(found) > 1:
        raise ValueError(
            f"{parent.name} holds both {' and '.join(LABEL_FOLDERS)}; keep one, so that it is clear which."
        )
    return found[0] if found else parent / LABEL_FOLDERS[0]


def pair_files(root: Path, images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Pair images and label maps of equal stems, in the order of their names.

    Raises:
        ValueError: If a folder is missing or empty, a stem occurs twice, or a file has no partner.
    """
    if not labels.is_dir():
        beside = _subfolders(labels.parent) if labels.parent.is_dir() else []
        raise ValueError(
            f"{_below(root, images)} needs its label maps in {_below(root, labels)}, which does not exist"
            f"{near(labels.name, [folder.name for folder in beside if folder != images])}; {LAYOUTS}."
        )
    pictures, maps = _by_stem(root, images, IMAGE_SUFFIXES), _by_stem(root, labels, LABEL_SUFFIXES)
    problems = []
    for one, others, here, there, noun in (
        (pictures, maps, images, labels, "label"),
        (maps, pictures, labels, images, "image"),
    ):
        lonely = sorted(one.keys() - others.keys())
        if lonely:
            free = {stem: path.name for stem, path in others.items() if stem not in one}
            names = [one[stem].name + _near_file(stem, free) for stem in lonely[:10]]
            problems.append(
                f"{len(lonely)} of {len(one)} files in {_below(root, here)} have no {noun} of the same stem in "
                f"{_below(root, there)} (first: {', '.join(names)})"
            )
    if problems:
        raise ValueError("; ".join(problems) + ". Image and label map must have the same name but for the suffix.")
    return [(pictures[stem], maps[stem]) for stem in sorted(pictures)]


def _near_file(stem: str, free: Mapping[str, str]) -> str:
    match = get_close_matches(stem, free, n=1)
    return f" [near: {free[match[0]]}]" if match else ""


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _by_stem(root: Path, folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in suffixes:
            others.append(path.name)
        elif path.stem in stems:
            raise ValueError(
                f"{_below(root, folder)} holds {stems[path.stem].name} and {path.name}, two files of one stem; "
                f"keep one of them."
            )
        else:
            stems[path.stem] = path
    if not stems:
        found = f"only {listed(others, 3)}" if others else "nothing"
        raise ValueError(
            f"{_below(root, folder)} holds {found}, but files ending in {', '.join(suffixes)} are needed."
        )
    return stems


def load_tables(
    path: Path, try_hub: bool, streaming: bool = False, split: str | None = None
) -> "dict[str, datasets.Dataset | datasets.IterableDataset] | None":
    """Load the tables of a data set: parquet, written by `save_to_disk`, or on the Hub.

    Args:
        path: File, folder, or Hub name.
        try_hub: Whether a name that is no path but could be one of the Hub is looked up there.
        streaming: Whether to give streams, of parquet and from the Hub.
        split: The only one to load; None: all.

    Returns:
        Split to table, or None if the path is a folder without tables.

    Raises:
        FileNotFoundError: If nothing of that name exists.
        ConnectionError: If the Hub cannot be reached.
        ValueError: If a file is unreadable, or of another kind.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            from datasets import load_from_disk

            if streaming:
                raise ValueError(f"{path.name} was written by save_to_disk, which needs no loading: drop --streaming.")
            return as_tables(_readable(path.name, lambda: load_from_disk(str(path))))
        files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
        return _load_parquet(path.name, files, streaming, split) if files else None
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(
                f"{path.name} is a file, but a folder, a .parquet file or a Hub name is needed; {LAYOUTS}."
            )
        return {WHOLE: next(iter(_load_parquet(path.name, [path], streaming).values()))}
    name = path.as_posix()
    if try_hub and could_be_on_hub(name):
        return as_tables(_load_hub(name, streaming, split), split)
    beside = path.absolute().parent
    names = [folder.name for folder in _subfolders(beside)] if beside.is_dir() else []
    raise FileNotFoundError(f"There is no folder {name}{near(path.name, names)}; give the path of a data set.")


def could_be_on_hub(name: str) -> bool:
    """Whether a text has the form of a data set's name on the Hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def as_tables(data: Any, split: str | None = None) -> "dict[str, datasets.Dataset | datasets.IterableDataset]":
    """Give a data set of `datasets`, streamed or not, or a mapping of such as split to table.

    Args:
        data: The data set.
        split: What a single one is called.

    Raises:
        ValueError: If it is another thing.
    """
    from datasets import Dataset, IterableDataset

    kinds = (Dataset, IterableDataset)
    if isinstance(data, kinds):
        return {split or WHOLE: data}
    if isinstance(data, Mapping) and data and all(isinstance(table, kinds) for table in data.values()):
        return {str(name): table for name, table in data.items()}
    raise ValueError(
        f"The data is a {type(data).__name__}, but a folder, a Hub name, a datasets.Dataset, an IterableDataset or a "
        f"mapping of splits to such is needed."
    )


def is_stream(table: Any) -> bool:
    """Whether a table of `datasets` is read in order alone."""
    from datasets import IterableDataset

    return isinstance(table, IterableDataset)


def _load_parquet(
    name: str, files: list[Path], streaming: bool = False, split: str | None = None
) -> "dict[str, datasets.Dataset | datasets.IterableDataset]":
    from datasets import load_dataset

    splits = parquet_splits(files)
    if split is not None:
        splits = {split: splits[split]}
    return dict(_readable(name, lambda: load_dataset("parquet", data_files=splits, streaming=streaming)))


def parquet_splits(files: Iterable[Path]) -> dict[str, list[str]]:
    """The splits of parquet files that are named as the Hub does: `train-00000-of-00002.parquet`."""
    splits: dict[str, list[str]] = {}
    for file in files:
        start = re.match(r"[A-Za-z]\w*", file.stem)
        splits.setdefault(start.group() if start else "train", []).append(str(file))
    return splits


def _readable(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    # Arrow, parquet and datasets have an exception each for a broken file
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{name} cannot be read as a table: {type(cause).__name__}: {cause}") from error


def _load_hub(name: str, streaming: bool, split: str | None) -> Any:
    from datasets import load_dataset

    with explained_hub(name), impatient():
        return load_dataset(name, **({"streaming": True} if streaming else {}), **({"split": split} if split else {}))


@contextmanager
def explained_hub(name: str) -> Iterator[None]:
    """Look for a data set on the Hub within; what goes wrong is told in our words.

    Raises:
        ConnectionError: If the Hub cannot be reached.
        FileNotFoundError, PermissionError: If there is no such data set, or it may not be read.
        ValueError: If it cannot be read.
    """
    from datasets import config
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import HfApi

    *owner, short = name.split("/")
    cached = Path(config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(short)])).is_dir()
    found = f"{name!r} is no folder here, so it was looked for on the Hub"
    try:
        if not cached:  # asked once first, since datasets would try again for half a minute
            ask(lambda: HfApi().dataset_info(name, timeout=HUB_SECONDS))
        yield
    except Exception as error:
        if isinstance(cause := cause_of(error), HUB_ERRORS):
            raise hub_error(cause, name, kind="data set") from error
        kind = ValueError if isinstance(error, ValueError) else ConnectionError
        raise kind(
            f"{found}, but could not be loaded from there ({type(error).__name__}: {error}). Check the path, or the "
            f"connection; without one, only folders and data sets loaded before can be used."
        ) from error


def is_picture(feature: Any) -> bool:
    """Whether a feature holds pictures: `Image`, or what became of it in a file that does not say so."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, Mapping) and "bytes" in feature)


def pick_columns(table: Any, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Choose the columns of images and label maps, by the names given or else by what they are usually called.

    Raises:
        ValueError: If a named column is missing or none can be guessed; lists the columns.
    """
    image = pick_column(table.features, image_column, IMAGE_COLUMNS, "--image_column")
    return image, pick_column(table.features, label_column, LABEL_COLUMNS, "--label_column")


def pick_column(features: Any, given: str | None, usual: Sequence[str], flag: str) -> str:
    """Choose a column of pictures by the name given, or else by the usual ones; raises what `pick_columns` raises."""
    if features is None:
        raise ValueError("The stream does not say what its columns hold: pass one whose features are known.")
    kinds = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    column = given or next((name for name in usual if name in features and is_picture(features[name])), None)
    if column is None:
        raise ValueError(
            f"Name the right column with {flag}: none of pictures is called {usual[0]!r} or alike among {kinds}."
        )
    if column not in features:
        raise ValueError(f"{flag} is {column!r}{near(column, features)}, but the columns are {kinds}.")
    return column


def table_class_names(tables: Mapping[str, Any], label_column: str | None) -> tuple[str, ...] | None:
    """Class names that the label column's feature carries, if any."""
    for table in tables.values():
        for column in [label_column] if label_column else LABEL_COLUMNS:
            feature = (table.features or {}).get(column)
            names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
            if names:
                return tuple(names)
    return None
