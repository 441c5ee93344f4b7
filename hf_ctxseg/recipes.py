"""Recipes of known data sets: classes, what label maps store, how folders lie, and a schedule to start from.

A recipe is a YAML file, of this package (`recipes/`) or the user's own::

    title: My streets
    like: cityscapes                  # optional: take from this recipe what is not said here
    layouts:                          # the first whose folders exist counts
      - images: photos/{split}/{name}.jpg
        labels: masks/{split}/{name}_ids.png        # or a list: the first that exists
        names: lists/{split}.txt      # optional: which names; else all pictures, {name} may hold folders
        splits: {train: training}     # optional: what the folder calls a split
    ignore_index: 255
    void: [0]                         # stored values, or colours, without a class; `others`: all that are not listed
    classes:
      - {name: road, colour: [128, 64, 128], stored: 7}        # or [7, 8], or colours; else the class's own number
    arguments: {crop_size: 769, max_steps: 90000}              # of `ctxseg train`, where the user gives none
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .data_sources import WHOLE, near
from .label_map import LabelMap
from .samples import ClassInfo, FolderSamples, Samples
from .visualization import default_palette
from .wording import listed

FOLDER = Path(__file__).parent / "recipes"
_KEYS = {"title", "source", "like", "layouts", "ignore_index", "void", "classes", "arguments"}
_LAYOUT_KEYS = {"images", "labels", "names", "splits"}


@dataclass(frozen=True)
class Layout:
    """Where pictures and label maps lie below a data set's folder; `{split}` and `{name}` stand in each template.

    Args:
        images: Template of the pictures.
        labels: Templates of the label maps, the first that exists counts.
        names: Template of the text files that list names; None: all pictures that are there.
        splits: Split to what the folder calls it; empty: splits are called what the folder calls them.
    """

    images: str
    labels: tuple[str, ...]
    names: str | None
    splits: Mapping[str, str]

    def find(self, root: Path) -> dict[str, str]:
        """Splits found below a folder, each with what `{split}` stands for there; empty if the layout does not fit."""
        marker = self.names or _parent(self.images)
        pattern = re.compile(re.escape(marker).replace(re.escape("{split}"), "([^/]+)"))
        found = []
        for path in sorted(root.glob(marker.replace("{split}", "*"))):
            match = pattern.fullmatch(path.relative_to(root).as_posix())
            split = match.group(1) if match and pattern.groups else WHOLE
            folders = [(root / _parent(text).format(split=split)).is_dir() for text in (self.images, *self.labels)]
            if folders[0] and any(folders[1:]):
                found.append(split)
        if self.splits:
            return {name: there for name, there in self.splits.items() if there in found}
        return {name: name for name in found}

    def pairs(self, root: Path, split: str) -> list[tuple[Path, Path]]:
        """Pictures of a split with their label maps, in the order of the list or of the names.

        Raises:
            ValueError: If there are none, or some lack a file; the first 10 are named.
        """
        names = self._listed(root, split) if self.names is not None else self._found(root, split)
        pairs, lacking = [], []
        for name in names:
            image = root / self.images.format(split=split, name=name)
            candidates = [root / text.format(split=split, name=name) for text in self.labels]
            label = next((path for path in candidates if path.is_file()), None)
            if label is None or not image.is_file():
                lacking.append((image if label is not None else candidates[-1]).relative_to(root).as_posix())
            else:
                pairs.append((image, label))
        if lacking:
            raise ValueError(f"{len(lacking)} of {len(names)} files are missing: {listed(lacking)}.")
        if not pairs:
            raise ValueError(f"There is no picture named {self.images.format(split=split, name='*')}.")
        return pairs

    def _listed(self, root: Path, split: str) -> list[str]:
        lines = (root / str(self.names).format(split=split)).read_text(encoding="utf-8").splitlines()
        words = [line.split()[0] for line in lines if line.strip()]
        # Some lists hold the paths of picture and label map
        return [PurePosixPath(word).stem if "/" in word else word for word in words]

    def _found(self, root: Path, split: str) -> list[str]:
        before, _, after = self.images.format(split=split, name="{name}").partition("{name}")
        folder = root / before
        paths = sorted(path for path in folder.rglob(f"*{after}") if not path.name.startswith("."))
        return [path.relative_to(folder).as_posix().removesuffix(after) for path in paths]


def _parent(template: str) -> str:
    return PurePosixPath(template).parent.as_posix()


@dataclass(frozen=True)
class Recipe:
    """A known data set.

    Args:
        name: What it is asked for by.
        title: In a line, what it is.
        classes: Names, colours and ignored value.
        label_map: Translates stored label maps; None: they hold class indices.
        layouts: Known folder forms.
        arguments: Of `ctxseg train`, as a starting point.
    """

    name: str
    title: str
    classes: ClassInfo
    label_map: LabelMap | None
    layouts: tuple[Layout, ...]
    arguments: Mapping[str, Any]

    def find_splits(self, root: Path) -> dict[str, Callable[[], Samples]]:
        """Find the splits of a folder, each to be opened when called.

        Raises:
            ValueError: If no layout fits.
        """
        for layout in self.layouts:
            if found := layout.find(root):
                return {name: partial(self._open, root, layout, there) for name, there in found.items()}
        forms = "; ".join(
            " with ".join([item.images, " or ".join(item.labels), *([item.names] if item.names else [])])
            for item in self.layouts
        )
        here = sorted(path.name for path in root.iterdir())[:10]
        raise ValueError(
            f"{root.name} is not laid out as recipe {self.name} knows: it holds {', '.join(here) or 'nothing'}, but "
            f"needed is {forms}. Give the folder that holds these, or a recipe file of your own with other layouts."
        )

    def _open(self, root: Path, layout: Layout, split: str) -> Samples:
        return FolderSamples(layout.pairs(root, split), root, self.label_map)


def recipe_names() -> list[str]:
    """Names of the recipes of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A name of this package's, or a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such name, or the file is malformed.
    """
    content, name = _read(recipe), Path(recipe).stem
    try:
        return _build(content, name)
    except (KeyError, TypeError, AttributeError) as error:
        detail = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"Recipe {recipe} is malformed: {detail}; see the recipes of hf_ctxseg.") from error
    except ValueError as error:
        raise ValueError(f"Recipe {recipe}: {error}") from error


def _read(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if str(recipe) not in recipe_names():
            raise ValueError(
                f"There is no recipe {str(recipe)!r}{near(str(recipe), recipe_names())}: name one of "
                f"{', '.join(recipe_names())}, or a YAML file of your own."
            )
        path = FOLDER / f"{recipe}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe file {path}: check the path.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.keys() <= _KEYS:
        found = sorted(content.keys() - _KEYS) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found}, but must be a mapping with some of {sorted(_KEYS)}.")
    return {**_read(content["like"]), **content} if "like" in content else content


def _build(content: Mapping[str, Any], name: str) -> Recipe:
    rows: Sequence[Mapping[str, Any]] = content["classes"]
    for row in rows:
        if not row.keys() <= {"name", "colour", "stored"}:
            raise ValueError(f"class {dict(row)} must have name, colour and stored alone.")
    palette = default_palette(len(rows))
    classes = ClassInfo(
        tuple(str(row["name"]) for row in rows),
        tuple(tuple(row.get("colour", palette[index])) for index, row in enumerate(rows)),
        content.get("ignore_index", 255),
    )
    label_map = None
    if "void" in content or any("stored" in row for row in rows):
        stored = [_as_stored(row.get("stored", index)) for index, row in enumerate(rows)]
        void = content.get("void", [])
        label_map = LabelMap(stored, None if void == "others" else _as_stored(void), classes.ignore_index)
    layouts = tuple(_as_layout(item) for item in content.get("layouts", []))
    return Recipe(name, str(content.get("title", name)), classes, label_map, layouts, content.get("arguments", {}))


def _as_stored(value: Any) -> list[int | tuple[int, int, int]]:
    items = value if isinstance(value, list) else [value]
    stored: list[int | tuple[int, int, int]] = []
    for item in items:
        if isinstance(item, list) and len(item) == 3 and all(isinstance(part, int) for part in item):
            stored.append((item[0], item[1], item[2]))
        elif isinstance(item, int):
            stored.append(item)
        else:
            raise ValueError(f"stored is {value!r}, but must be a whole number, a list of such, or a list of colours.")
    return stored


def _as_layout(item: Mapping[str, Any]) -> Layout:
    if not {"images", "labels"} <= item.keys() <= _LAYOUT_KEYS:
        raise ValueError(f"layout {dict(item)} must have images and labels, and may have names and splits.")
    labels = item["labels"] if isinstance(item["labels"], list) else [item["labels"]]
    for text in [item["images"], *labels]:
        if "{name}" not in text.rpartition("/")[2] or "/" not in text:
            raise ValueError(f"layout {text!r} must be a folder and a file name with {{name}} in it.")
    return Layout(item["images"], tuple(labels), item.get("names"), item.get("splits", {}))
