"""Pairs of image and label map, read one at a time from files or from a `datasets` table.

A label map holds one class index per pixel. People store it as palette PNG, grey PNG, 1-bit, 16-bit or float TIFF:
`read_label` turns each into integers without ever changing an index, and refuses colours.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from .picture_reading import read_picture, to_rgb, turned_upright
from .visualization import default_palette

Label = npt.NDArray[np.uint8] | npt.NDArray[np.int32]
ReadLabel = Callable[[Image.Image, str], Label]  # of a stored label map and its name


@dataclass(frozen=True)
class ClassInfo:
    """Names and colours of the classes; class `i` is value `i` of a label map.

    Args:
        names: One name per class, no two alike.
        palette: One (red, green, blue) per class, 0 to 255.
        ignore_index: Label value of pixels that count neither in the loss nor in the metrics.

    Raises:
        ValueError: If names repeat or are missing, the palette does not fit, or ignore_index is also a class.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("There is no class name; give at least one.")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"Each class needs a name of its own, but {twice} occur more than once.")
        if len(self.palette) != self.num_labels:
            raise ValueError(
                f"The palette has {len(self.palette)} colours for {self.num_labels} classes; give as many."
            )
        for color in self.palette:
            if len(color) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in color):
                raise ValueError(f"The palette holds {color}, but a colour is three whole numbers from 0 to 255.")
        if 0 <= self.ignore_index < self.num_labels:
            raise ValueError(
                f"ignore_index is {self.ignore_index}, which is also class {self.names[self.ignore_index]!r}; "
                f"it must be negative or at least {self.num_labels}."
            )

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def id2label(self) -> dict[int, str]:
        """Class index to name, as transformers' configs want it."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Class name to index."""
        return {name: index for index, name in enumerate(self.names)}


class Samples(Protocol):
    """What training, evaluation and the label scan need of a data set."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Short name of image `i` for messages: no absolute path."""
        ...

    def label_name(self, i: int) -> str:
        """Short name of label `i` for messages."""
        ...

    def image(self, i: int) -> Image.Image:
        """Image `i` as 8-bit RGB, turned upright; ValueError naming it if it cannot be read."""
        ...

    def label(self, i: int) -> Label:
        """Label map `i` (H, W), uint8 where the values fit, else int32; ValueError naming it if it is no label map."""
        ...


def read_pair(samples: Samples, i: int) -> tuple[Image.Image, Label]:
    """Read image and label `i`; ValueError if either is unreadable or their sizes differ."""
    image, label = samples.image(i), samples.label(i)
    check_sizes(image, label, samples.name(i), samples.label_name(i))
    return image, label


def check_sizes(image: Image.Image, label: Label, name: str, label_name: str) -> None:
    """Raise `ValueError` naming both if a label map has not its image's size."""
    if label.shape != (image.height, image.width):
        raise ValueError(
            f"{label_name} is {label.shape[1]}x{label.shape[0]} pixels, but {name} is {image.width}x{image.height} "
            f"(widthxheight, upright); a label map must have its image's size"
        )


class FolderSamples:
    """Samples in files.

    Args:
        pairs: Image path and label path of each sample.
        root: Folder that the names in messages are relative to.
        label_map: Turns a stored label map into class indices; None: `read_label`.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], root: Path, label_map: ReadLabel | None = None) -> None:
        self.pairs = list(pairs)
        self.root = root
        self.label_map = label_map or read_label

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        """Path of the image below the root."""
        return self.pairs[i][0].relative_to(self.root).as_posix()

    def label_name(self, i: int) -> str:
        """Path of the label below the root."""
        return self.pairs[i][1].relative_to(self.root).as_posix()

    def image(self, i: int) -> Image.Image:
        """Image `i`, upright RGB."""
        return read_picture(self.pairs[i][0], self.name(i), to_rgb)

    def label(self, i: int) -> Label:
        """Label map `i`, (H, W)."""
        name = self.label_name(i)
        return self.label_map(read_picture(self.pairs[i][1], name, turned_upright), name)


class TableSamples:
    """Samples in a `datasets.Dataset` whose cells hold pictures: Image features, `{"bytes", "path"}`, bytes or paths.

    Args:
        dataset: A `datasets.Dataset`.
        image_column: Column of the images.
        label_column: Column of the label maps.
        label_map: Turns a stored label map into class indices; None: `read_label`.
    """

    def __init__(self, dataset: Any, image_column: str, label_column: str, label_map: ReadLabel | None = None) -> None:
        self.image_column, self.label_column = image_column, label_column
        self.label_map = label_map or read_label
        self.images = undecoded(dataset, image_column)
        self.labels = undecoded(dataset, label_column)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Row and image column."""
        return f"row {i} ({self.image_column})"

    def label_name(self, i: int) -> str:
        """Row and label column."""
        return f"row {i} ({self.label_column})"

    def image(self, i: int) -> Image.Image:
        """Image `i`, upright RGB."""
        return read_picture(self.images[i][self.image_column], self.name(i), to_rgb)

    def label(self, i: int) -> Label:
        """Label map `i`, (H, W)."""
        name = self.label_name(i)
        return self.label_map(read_picture(self.labels[i][self.label_column], name, turned_upright), name)


class SampleSubset:
    """Some of the samples of another data set, in the order of `indices`."""

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples = samples
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """Name in the whole data set."""
        return self.samples.name(self.indices[i])

    def label_name(self, i: int) -> str:
        """Name in the whole data set."""
        return self.samples.label_name(self.indices[i])

    def image(self, i: int) -> Image.Image:
        """Image `i` of the subset, upright RGB."""
        return self.samples.image(self.indices[i])

    def label(self, i: int) -> Label:
        """Label map `i` of the subset, (H, W)."""
        return self.samples.label(self.indices[i])


def undecoded(dataset: Any, column: str, *kept: str) -> Any:
    """One column, and those in `kept`, with its pictures left as bytes or paths.

    `datasets` would decode with messages that name no row.
    """
    from datasets import Image as ImageFeature

    table = dataset.with_format(None).select_columns([column, *kept])
    if isinstance(table.features[column], ImageFeature):
        table = table.cast_column(column, ImageFeature(decode=False))
    return table


def read_label(image: Image.Image, name: str) -> Label:
    """Turn a picture of class indices into an array without changing an index.

    Args:
        image: Palette (its indices are taken, not its colours), 8-bit grey, 1-bit (0 and 1), 16- or 32-bit integer,
            float with whole numbers, or colour with three equal channels.
        name: What messages call it.

    Returns:
        (H, W) array, uint8 where the values fit, else int32.

    Raises:
        ValueError: For colours, and for floats that are not whole.
    """
    values: npt.NDArray[Any] = np.asarray(image)
    if image.mode in ("RGB", "RGBA"):
        if not (values[..., :1] == values[..., 1:3]).all():
            raise ValueError(
                f"{name} is an RGB picture (mode {image.mode}), but a label map holds one class index per pixel; "
                f"convert the colours to indices (a palette PNG or 8-bit grey), or say in a recipe which colour is "
                f"which class (--recipe)"
            )
        values = values[..., 0]
    elif image.mode in ("LA", "PA"):
        values = values[..., 0]
    elif image.mode == "F":
        if not (np.isfinite(values).all() and (values == np.rint(values)).all() and np.abs(values).max() < 2**31):
            raise ValueError(f"{name} holds floats that are not whole, but a label map holds class indices")
    elif image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
        raise ValueError(f"{name} has mode {image.mode}, but a label map is a palette PNG or 8- or 16-bit grey")
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    fits = values.min() >= 0 and values.max() <= 255
    return values.astype(np.uint8) if fits else values.astype(np.int32)


def read_classes(labels: str | Path | Sequence[str], ignore_index: int | None = None) -> ClassInfo:
    """Read class names.

    Args:
        labels: A list of names, names separated by commas, or a file: `.txt` (a name per line; blank lines and lines
            starting with # are skipped) or `.json` (a list, `{"0": "sky", …}`, or an object with "classes" and, if
            wanted, "palette" and "ignore_index").
        ignore_index: Wins over the file's; 255 when neither says.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is malformed or the names, palette and ignore_index contradict each other.
    """
    content: Any = labels
    if isinstance(labels, Path) or (isinstance(labels, str) and Path(labels).suffix.lower() in (".txt", ".json")):
        content = _read_class_file(Path(labels))
    elif isinstance(labels, str):
        content = [name.strip() for name in labels.split(",") if name.strip()]
    meta = content if isinstance(content, Mapping) and "classes" in content else {}
    names = _names(meta.get("classes", content))
    try:
        palette = tuple(tuple(color) for color in meta.get("palette") or default_palette(len(names)))
    except TypeError as error:
        raise ValueError("The palette must be a list with three numbers per class.") from error
    found = meta.get("ignore_index", 255) if ignore_index is None else ignore_index
    if not isinstance(found, int):
        raise ValueError(f"ignore_index is {found!r}, but it must be a whole number.")
    return ClassInfo(names, palette, found)


def _read_class_file(path: Path) -> Any:
    if not path.is_file():
        near = get_close_matches(path.name, [other.name for other in path.absolute().parent.glob("*")], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"There is no file {path} to read class names from{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read as class names: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _names(content: Any) -> tuple[str, ...]:
    if isinstance(content, Mapping):
        try:
            content = {int(key): name for key, name in content.items()}
        except ValueError as error:
            raise ValueError(
                f"Class names must be a list, or an object whose keys are 0, 1, 2 …; found {list(content)[:5]}."
            ) from error
        if sorted(content) != list(range(len(content))):
            missing = sorted(set(range(len(content))) - set(content))
            raise ValueError(f"Class ids must run from 0 without gaps, but {missing[:5]} are missing.")
        content = [content[key] for key in sorted(content)]
    if not isinstance(content, list | tuple) or not all(isinstance(name, str) for name in content):
        raise ValueError('Class names must be a list of texts, such as ["sky", "road"].')
    return tuple(content)
