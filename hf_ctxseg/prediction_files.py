"""Picture files to mask files: what `ctxseg predict` does for files, folders, patterns and videos."""

import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from .attention import attention_picture, check_has_block
from .data_sources import IMAGE_SUFFIXES
from .inference import Predictor
from .prediction import Prediction
from .video import VIDEO_SUFFIXES, predict_video

_MADE_BY = "ctxseg predict"


@dataclass(frozen=True)
class FileOptions:
    """What is written for each picture.

    Args:
        overlay: Whether to write `NAME_overlay.png`.
        probabilities: Whether to write `NAME_probabilities.npy`, float16 (H, W, K): `numpy.load(…, mmap_mode="r")`.
        query: A pixel (x, y) whose attention weights are drawn as `NAME_attention.png`.
        frames: Whether to write a mask for each frame of a video.
        batch_size: Pictures of one size in a forward pass.
        overwrite: Whether files that this did not write may be replaced.

    Raises:
        ValueError: If the batch size is not above 0.
    """

    overlay: bool = True
    probabilities: bool = False
    query: tuple[int, int] | None = None
    frames: bool = False
    batch_size: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, but must be 1 picture or more.")


@dataclass
class FileResult:
    """What was found in a picture or video, and where it was written."""

    source: Path
    size: tuple[int, int]  # width, height
    classes: dict[str, int]  # pixels by name
    how: str
    seconds: float
    files: dict[str, Path]
    frames: int | None = None

    @property
    def shown(self) -> Path:
        """The file to look at."""
        return self.files.get("overlay") or self.files.get("mask") or next(iter(self.files.values()))

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        total = sum(self.classes.values()) or 1
        return {
            "path": str(self.source),
            "width": self.size[0],
            "height": self.size[1],
            **({} if self.frames is None else {"frames": self.frames}),
            "classes": {name: {"share": n / total, "pixels": n} for name, n in self.classes.items()},
            "looked_at": self.how,
            "seconds": round(self.seconds, 3),
            "files": {what: str(path) for what, path in self.files.items()},
        }


@dataclass
class FileResults:
    """What became of all inputs: in `failed` one sentence for each that could not be read or written."""

    done: list[FileResult] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str | Path],
    out: str | Path,
    options: FileOptions | None = None,
    *,
    say: Callable[[FileResult], None] = lambda result: None,
    note: Callable[[str], None] = lambda line: None,
) -> FileResults:
    """Segment picture and video files; each gives `NAME_mask.png` (class indices) and what the options ask for.

    A file of the same name is replaced if an earlier call wrote it, else the picture counts as failed.

    Args:
        predictor: The model.
        inputs: Files, folders, and patterns such as `photos/**/*.jpg`.
        out: Folder for the results; the structure of folders is kept in it.
        options: What is written.
        say: Called with each result as soon as it is there.
        note: Called with a line on each picture that is segmented by windows.

    Returns:
        The results, and the pictures that failed.

    Raises:
        FileNotFoundError: If an input does not exist.
        ValueError: If a folder holds no picture, is the folder of the results, or the model lacks what is asked for;
            if the folder of the results cannot be written.
    """
    options = options or FileOptions()
    out = Path(out)
    if options.query is not None:
        check_has_block(predictor.model)
    results = FileResults()
    taken: set[Path] = set()
    named = [(path, _free_stem(name, taken)) for path, name in find_pictures(inputs, out)]
    check_writable(out)
    for group in _groups(predictor, named, options, results.failed):
        for result in _written(predictor, group, out, options, results.failed, note):
            results.done.append(result)
            say(result)
    return results


def write_summary(path: Path, model: str, predictor: Predictor, results: FileResults) -> None:
    """Write what was found in all pictures, and what failed, as JSON."""
    summary = {
        "model": model,
        "classes": list(predictor.names),
        "views": asdict(predictor.views),
        "crf": None if predictor.crf is None else asdict(predictor.crf),
        "pictures": [result.summary() for result in results.done],
        "errors": [{"path": str(path), "error": sentence} for path, sentence in results.failed.items()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as stream:
        stream.write((json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())


def check_writable(folder: Path) -> None:
    """Make a folder for results; raises `ValueError` if nothing can be written there, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): give another folder.") from error


def find_pictures(inputs: Sequence[str | Path], out: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """List picture and video files with the name under which their results are written.

    Args:
        inputs: Files, folders that are searched through, and patterns; the structure of folders is kept.
        out: Folder of results, whose pictures are not taken for inputs.

    Raises:
        FileNotFoundError: If one does not exist.
        ValueError: If a folder holds no picture, or is that of the results.
    """
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    for item in map(Path, inputs):
        if item.is_file():
            yield item, Path(item.name)
            continue
        if item.is_dir():
            if out is not None and out.resolve() == item.resolve():
                raise ValueError(f"{item} holds the pictures, and results would lie among them: give another --out.")
            root, paths = item, list(item.rglob("*"))
        elif glob.has_magic(str(item)):
            root, paths = _root(item), [Path(path) for path in glob.iglob(str(item), recursive=True)]
        else:
            raise FileNotFoundError(f"There is no picture or folder {item}: check the path.")
        named = (path for path in paths if path.suffix.lower() in suffixes and not path.is_dir())
        found = sorted(path for path in named if out is None or out.resolve() not in path.resolve().parents)
        if not found:
            if any(path.suffix.lower() in suffixes for path in paths):
                raise ValueError(
                    f"The pictures of {item} lie in the folder of the results, {out}: give another --out."
                )
            raise ValueError(f"{item} holds no picture ({', '.join(IMAGE_SUFFIXES)}): give another folder.")
        yield from ((path, path.relative_to(root)) for path in found)


def _root(pattern: Path) -> Path:
    parts = list(pattern.parts)
    place = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:place])


def _free_stem(name: Path, taken: set[Path]) -> Path:
    # a.jpg and a.png side by side: the second becomes a_png, a third of the name a_png_2
    stem = name.with_suffix("")
    second = f"{stem.name}_{name.suffix[1:]}"
    numbered = (stem.with_name(f"{second}_{number}") for number in count(2))
    free = next(path for path in chain([stem, stem.with_name(second)], numbered) if path not in taken)
    taken.add(free)
    return free


@dataclass
class _Job:
    source: Path
    stem: Path
    picture: Image.Image | None  # None of a video
    started: float


def _groups(
    predictor: Predictor, named: Iterable[tuple[Path, Path]], options: FileOptions, failed: dict[Path, str]
) -> Iterator[list[_Job]]:
    """Open pictures; neighbours of one size come together, up to the batch size."""
    group: list[_Job] = []
    for path, stem in named:
        started, picture = time.monotonic(), None
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            try:
                picture = predictor.open(path)
            except (ValueError, OSError) as error:
                failed[path] = _sentence(path, error)
                continue
        same = group and picture is not None and group[0].picture and group[0].picture.size == picture.size
        if group and (not same or len(group) == options.batch_size):
            yield group
            group = []
        group.append(_Job(path, stem, picture, started))
    if group:
        yield group


def _sentence(path: Path, error: Exception) -> str:
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def _written(
    predictor: Predictor,
    group: list[_Job],
    out: Path,
    options: FileOptions,
    failed: dict[Path, str],
    note: Callable[[str], None],
) -> Iterator[FileResult]:
    predictions: list[Prediction] | None = None
    pictures = [job.picture for job in group if job.picture is not None]
    if len(pictures) > 1 and not options.probabilities:
        with suppress(ValueError):  # it is told of each of them below
            predictions = predictor.several(pictures)
    for place, job in enumerate(group):
        try:
            target = _target(out, job.stem)
            if job.picture is None:
                yield _video(predictor, job, target, options)
            else:
                prediction = predictions[place] if predictions else None
                yield _picture(predictor, job, job.picture, prediction, target, options, note)
        except (ValueError, OSError) as error:
            failed[job.source] = _sentence(job.source, error)


def _target(out: Path, stem: Path) -> Path:
    """Make the folder of a result, which lies in `out` whatever links there are."""
    target = out / stem
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{target} would be written outside of {out}, through a link: remove the link.")
    return target


def _picture(
    predictor: Predictor,
    job: _Job,
    picture: Image.Image,
    prediction: Prediction | None,
    target: Path,
    options: FileOptions,
    note: Callable[[str], None],
) -> FileResult:
    files = {"mask": target.with_name(f"{target.name}_mask.png")}
    for what, wanted, suffix in (
        ("overlay", options.overlay, "png"),
        ("attention", options.query is not None, "png"),
        ("probabilities", options.probabilities, "npy"),
    ):
        if wanted:
            files[what] = target.with_name(f"{target.name}_{what}.{suffix}")
    if not options.overwrite:
        _check_free(files.values(), files["mask"])
    if prediction is None:
        plan = predictor.plan(picture)
        if plan.reason:
            note(f"{job.source}: {picture.width} x {picture.height} pixels, {plan.describe()}.")
        if options.probabilities:
            prediction = _with_probabilities(predictor, picture, files["probabilities"])
        else:
            prediction = predictor(picture)
    save_png(prediction.mask_image, files["mask"])
    if options.overlay:
        save_png(prediction.overlay, files["overlay"])
    if options.query is not None:
        weights = predictor.attention(picture, options.query)
        save_png(attention_picture(picture, weights, options.query), files["attention"])
    seconds = time.monotonic() - job.started
    return FileResult(job.source, picture.size, prediction.pixels, prediction.how, seconds, files)


def _video(predictor: Predictor, job: _Job, target: Path, options: FileOptions) -> FileResult:
    if options.probabilities or options.query is not None:
        raise ValueError("Of a video masks and an overlay are written: leave out --probabilities and --attention.")
    files: dict[str, Path] = {}
    if options.overlay:
        files["overlay"] = target.with_name(f"{target.name}_overlay.mp4")
    if options.frames or not options.overlay:
        files["masks"] = target.with_name(f"{target.name}_masks")
    for path in files.values():
        if path.exists() and not options.overwrite:
            raise ValueError(f"{path} is there already: give --overwrite to replace it, or another --out.")
    found = predict_video(predictor, job.source, files.get("overlay"), files.get("masks"), save_png)
    seconds = time.monotonic() - job.started
    return FileResult(job.source, found.size, found.pixels, found.how, seconds, files, found.frames)


def _with_probabilities(predictor: Predictor, picture: Image.Image, path: Path) -> Prediction:
    shape = (picture.height, picture.width, len(predictor.names))
    need, free = 2 * picture.height * picture.width * shape[2], shutil.disk_usage(path.parent).free
    if need > free:
        raise ValueError(
            f"{path} would take {need / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of the disk are free: leave out "
            "--probabilities, or give another --out."
        )
    with _replacing(path) as stream:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)

        def sink(rows: slice, values: torch.Tensor) -> None:
            stream.write(values.transpose(1, 2).half().cpu().contiguous().numpy().tobytes())

        return predictor(picture, sink=sink)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG that is whole or not there, and says who made it."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Software", _MADE_BY)
    with _replacing(path) as stream:
        picture.save(stream, "PNG", pnginfo=notes)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_free(files: Iterable[Path], mask: Path) -> None:
    """Refuse to replace what an earlier call did not write; what is no PNG belongs to the mask beside it."""
    for path in files:
        if path.exists() and not _is_ours(path if path.suffix == ".png" else mask):
            raise ValueError(
                f"{path} is there already, and ctxseg predict did not write it: give another --out, or --overwrite to "
                "replace it."
            )


def _is_ours(path: Path) -> bool:
    # Pillow refuses large pictures; it writes the note before the pixels.
    try:
        with path.open("rb") as stream:
            return f"tEXtSoftware\0{_MADE_BY}".encode() in stream.read(4096)
    except OSError:
        return False
