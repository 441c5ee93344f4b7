"""Reads every image and label map before training, so that wrong ones are named and not guessed from bad scores."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from .samples import ClassInfo, Label, Samples, read_pair
from .visualization import contact_sheet

SHOWN = 10


@dataclass(frozen=True)
class LabelStatistics:
    """What a split holds.

    Args:
        histogram: Pixels of each class, int64 (K,).
        ignored: Pixels with ignore_index.
        num_images: Number of samples.
        images_per_class: Images in which each class occurs, int64 (K,).
        image_pixels: Pixels of these images, of whatever class, int64 (K,).
        sizes: Lowest and highest (height, width), each edge on its own.
    """

    histogram: npt.NDArray[np.int64]
    ignored: int
    num_images: int
    images_per_class: npt.NDArray[np.int64]
    image_pixels: npt.NDArray[np.int64]
    sizes: tuple[tuple[int, int], tuple[int, int]]

    def table(self, class_names: tuple[str, ...]) -> str:
        """Render as text: size, then share of the valid pixels in percent and number of images of each class."""
        valid = int(self.histogram.sum())
        (low_height, low_width), (high_height, high_width) = self.sizes
        size = f"{low_width}x{low_height}"
        if self.sizes[0] != self.sizes[1]:
            size += f" to {high_width}x{high_height}"
        ignored = 100 * self.ignored / (valid + self.ignored)
        width = max(len("class"), *map(len, class_names))
        lines = [
            f"{self.num_images} images of {size} pixels, {ignored:.1f} % of them ignored",
            f"{'class':<{width}}  pixels %  images",
        ]
        for name, pixels, images in zip(class_names, self.histogram, self.images_per_class, strict=True):
            lines.append(f"{name:<{width}}  {100 * pixels / valid:>8.2f}  {images:>6}")
        absent = [name for name, pixels in zip(class_names, self.histogram, strict=True) if not pixels]
        if absent:
            lines.append(f"never occurs: {', '.join(absent)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class LabelCounts:
    """Values of a label map with their pixels, and its (height, width)."""

    values: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]
    size: tuple[int, int]


def scan_labels(
    samples: Samples, classes: ClassInfo, *, split: str, num_workers: int | None = None, progress: bool = True
) -> LabelStatistics:
    """Decode every image and label map and count the labels.

    Args:
        samples: The split.
        classes: What labels may hold.
        split: Its name, for messages.
        num_workers: Threads; by default as many as the processor has cores, at most 16.
        progress: Whether to show a progress bar.

    Returns:
        Counts of pixels and images per class.

    Raises:
        ValueError: If there are no samples, if files are broken, of unequal size or hold values that are no class (the
            first 10 are listed), or if every pixel is ignored.
    """
    if not len(samples):
        raise ValueError(f"{split}: there are no images.")
    num_labels = classes.num_labels
    histogram, images_per_class, image_pixels = np.zeros((3, num_labels), np.int64)
    ignored, sizes, problems = 0, set(), []
    for i, found in enumerate(_read_all(samples, split, num_workers, progress)):
        if isinstance(found, str):
            problems.append(found)
            continue
        inside = (found.values >= 0) & (found.values < num_labels)
        void = found.values == classes.ignore_index
        if problem := describe_strangers(samples.label_name(i), found, classes):
            problems.append(problem)
        histogram[found.values[inside]] += found.pixels[inside]
        images_per_class[found.values[inside]] += 1
        image_pixels[found.values[inside]] += found.size[0] * found.size[1]
        ignored += int(found.pixels[void].sum())
        sizes.add(found.size)
    if problems:
        more = f"\n  …and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        raise ValueError(f"{split}: {len(problems)} of {len(samples)} labels or images cannot be used:{listed}{more}")
    if not histogram.any():
        raise ValueError(
            f"{split}: every pixel of the {len(samples)} labels is {classes.ignore_index}, the ignore_index, so there "
            f"is nothing to learn; check the label files, or pass another --ignore_index."
        )
    edges = np.array(sorted(sizes))
    smallest, largest = edges.min(0).tolist(), edges.max(0).tolist()
    sizes_found = (tuple(smallest), tuple(largest))
    return LabelStatistics(histogram, ignored, len(samples), images_per_class, image_pixels, sizes_found)


def _read_all(samples: Samples, split: str, num_workers: int | None, progress: bool) -> Iterator[LabelCounts | str]:
    """Counts, or what is wrong, of each sample in order."""

    def read(i: int) -> LabelCounts | str:
        try:
            _, label = read_pair(samples, i)
        except ValueError as error:
            return str(error)
        return count_values(label)

    # Threads suffice: Pillow decodes without holding the interpreter's lock
    pool = ThreadPoolExecutor(num_workers or min(16, os.cpu_count() or 1))
    try:
        counts = pool.map(read, range(len(samples)))
        # disable=None: only on a terminal
        yield from tqdm(
            counts,
            total=len(samples),
            desc=f"checking {split}",
            unit=" images",
            leave=False,
            disable=None if progress else True,
        )
    finally:
        pool.shutdown(cancel_futures=True)  # at an interrupt, do not read the rest first


def count_values(label: Label) -> LabelCounts:
    """Count the pixels of each value in a label map (H, W)."""
    if label.dtype == np.uint8:
        pixels = np.bincount(label.ravel(), minlength=256)
        values = np.flatnonzero(pixels)
        return LabelCounts(values, pixels[values], label.shape)
    values, pixels = np.unique(label, return_counts=True)
    return LabelCounts(values.astype(np.int64), pixels, label.shape)


def describe_strangers(name: str, found: LabelCounts, classes: ClassInfo) -> str:
    """Say which values of a label map are neither a class nor ignored; empty if there are none."""
    outside = ((found.values < 0) | (found.values >= classes.num_labels)) & (found.values != classes.ignore_index)
    if not outside.any():
        return ""
    values, pixels = found.values[outside].tolist(), found.pixels[outside].tolist()
    shown = " and ".join(f"{v} ({p} pixel{'s' * (p != 1)})" for v, p in zip(values[:3], pixels[:3], strict=True))
    more = f" and {len(values) - 3} other values" if len(values) > 3 else ""
    cure = "add names with --labels" + (f", or pass --ignore_index {values[0]}" if len(values) == 1 else "")
    last = classes.num_labels - 1
    return (
        f"{name} holds {shown}{more}, but the classes are {f'0-{last}' if last else '0'} and ignore_index is "
        f"{classes.ignore_index}; {cure}"
    )


def write_contact_sheet(samples: Samples, classes: ClassInfo, path: Path, count: int = 4) -> None:
    """Save a PNG of labels laid over some images spread evenly over the samples.

    Args:
        samples: Where the pictures come from.
        classes: Names and colours.
        path: File to write.
        count: Number of pictures, fewer if there are not as many.
    """
    total = len(samples)
    count = min(count, total)
    picks = [(2 * k + 1) * total // (2 * count) for k in range(count)]
    rows = [(*read_pair(samples, i), samples.name(i)) for i in picks]
    contact_sheet(rows, classes.names, classes.palette, classes.ignore_index).save(path, format="PNG")
