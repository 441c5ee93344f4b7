"""Pictures of masks: palettes, overlays, legends, error maps, previews of training, and curves.

Everything a person looks at to see whether labels, training and predictions are right. Masks are integer arrays
(H, W) of class ids; a pixel of `ignore_index` is drawn black. Pictures are Pillow images in RGB. How cells,
legends and captions are set on a page is in `sheet`; the curves are in `plots`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .plots import plot_curves, plot_per_class
from .sheet import Colour, cell_box, grid_of, legend, scaled, shorten, stack, text_line

__all__ = [
    "Colour",
    "class_counts",
    "colorize",
    "contact_sheet",
    "default_palette",
    "error_map",
    "mask_to_image",
    "overlay",
    "plot_curves",
    "plot_per_class",
    "preview_grid",
    "with_legend",
]

# Okabe and Ito's colours, told apart by colour-blind readers; later ones are computed.
_FIRST_COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
)
_COUNTED_AT_ONCE = 1 << 22
_RIGHT, _WRONG, _IGNORED = (96, 96, 96), (230, 30, 40), (0, 0, 0)


def default_palette(num_labels: int) -> list[Colour]:
    """Give well separated colours, the same ones each time; a longer palette begins with the shorter one.

    Args:
        num_labels: Number of colours; all differ up to about 2500.

    Returns:
        `num_labels` RGB triples of 0..255; none is near black (ignored) or white (paper).
    """
    colours = _colours(min(num_labels, 2500))
    return [colours[label % len(colours)] for label in range(num_labels)]


@lru_cache(maxsize=8)
def _colours(count: int) -> tuple[Colour, ...]:
    levels = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)  # (4096, 3)
    seen = _perceived(grid)
    grid, seen = grid[(seen[:, 0] > 0.4) & (seen[:, 0] < 0.95)], seen[(seen[:, 0] > 0.4) & (seen[:, 0] < 0.95)]
    chosen: list[Colour] = list(_FIRST_COLOURS[:count])
    taken = _perceived(np.array([*_FIRST_COLOURS, (0, 0, 0), (255, 255, 255), _RIGHT]))
    distance = ((seen[:, None] - taken[None]) ** 2).sum(-1).min(1)
    while len(chosen) < count:
        farthest = int(distance.argmax())
        red, green, blue = grid[farthest].tolist()
        chosen.append((red, green, blue))
        distance = np.minimum(distance, ((seen - seen[farthest]) ** 2).sum(-1))
    return tuple(chosen)


def _perceived(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """Oklab coordinates (N, 3) of colours (N, 3), hue weighted above lightness: an overlay shifts lightness."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    cones = [[0.41222, 0.53633, 0.05145], [0.2119, 0.6807, 0.1074], [0.0883, 0.28172, 0.62998]]
    opponents = [[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80867]]
    lab: NDArray[np.float64] = np.cbrt(linear @ np.transpose(cones)) @ np.transpose(opponents)
    return lab * [1.0, 2.0, 2.0]


def colorize(mask: NDArray[Any], palette: Sequence[Colour], ignore_index: int = 255) -> NDArray[np.uint8]:
    """Draw each class in its colour and ignored pixels black.

    Args:
        mask: Class ids (H, W).
        palette: One RGB triple per class.
        ignore_index: Value drawn black.

    Returns:
        Colours, uint8 (H, W, 3).

    Raises:
        ValueError: The mask is not an integer (H, W) array, or holds a value that the palette has no colour for.
    """
    colours = np.array([*palette, _IGNORED], dtype=np.uint8)  # (K + 1, 3)
    return colours[_slots(mask, len(palette), ignore_index)]


def _slots(mask: NDArray[Any], num_labels: int, ignore_index: int) -> NDArray[np.int32]:
    """Check a mask; ids stay, ignored pixels become `num_labels`: (H, W)."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iub":
        raise ValueError(f"A mask is an integer array (H, W), but this one is {mask.dtype} of shape {mask.shape}.")
    ignored = mask == ignore_index
    wrong = ((mask < 0) | (mask >= num_labels)) & ~ignored
    if wrong.any():
        raise ValueError(
            f"The mask holds {int(mask[wrong][0])} ({int(wrong.sum())} such pixels in all), but there are colours for "
            f"the classes 0 to {num_labels - 1} and {ignore_index} is ignored. Correct the mask, the list of classes "
            "or ignore_index."
        )
    slots = mask.astype(np.int32)
    slots[ignored] = num_labels
    return slots


def class_counts(mask: NDArray[Any], num_labels: int, ignore_index: int = 255) -> NDArray[np.int64]:
    """Count the pixels of each class, some rows at a time: a mask may be as large as memory allows.

    Returns:
        `num_labels` + 1 numbers, the last of them the ignored pixels.

    Raises:
        ValueError: The mask is not an integer (H, W) array, or holds a value that is no class.
    """
    mask = np.asarray(mask)
    rows = max(1, _COUNTED_AT_ONCE // max(1, mask.shape[-1] if mask.ndim else 1))
    counts = np.zeros(num_labels + 1, dtype=np.int64)
    for start in range(0, max(1, len(mask)), rows):
        slots = _slots(mask[start : start + rows], num_labels, ignore_index)
        counts += np.bincount(slots.ravel(), minlength=num_labels + 1)
    return counts


def mask_to_image(mask: NDArray[Any], palette: Sequence[Colour]) -> Image.Image:
    """Make a picture that stores the class ids themselves, to be saved as an indexed PNG.

    Args:
        mask: Class ids (H, W), 0..255, or 0..65535 where the palette holds more than 256 colours.
        palette: One RGB triple per class; values without a class, such as 255 for ignored, are shown black.

    Returns:
        Mode "P" with the palette, or "I;16" without one for more than 256 classes.

    Raises:
        ValueError: The mask is not an integer (H, W) array, or a value does not fit the file.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iub":
        raise ValueError(f"A mask is an integer array (H, W), but this one is {mask.dtype} of shape {mask.shape}.")
    highest = 255 if len(palette) <= 256 else 65535
    if mask.size and (mask.min() < 0 or mask.max() > highest):
        raise ValueError(
            f"The mask holds values from {mask.min()} to {mask.max()}, but a PNG of {len(palette)} classes stores 0 "
            f"to {highest}. Write ignored pixels as {highest}."
        )
    if len(palette) > 256:
        return Image.fromarray(mask.astype(np.uint16))
    picture = Image.fromarray(mask.astype(np.uint8))
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(palette)] = np.reshape(palette, (-1, 3))
    picture.putpalette(colours.tobytes())
    return picture


def overlay(
    image: Image.Image,
    mask: NDArray[Any],
    palette: Sequence[Colour],
    opacity: float = 0.55,
    ignore_index: int = 255,
) -> Image.Image:
    """Lay the colours of a mask over its picture, with a thin white line between classes.

    Args:
        image: The picture, any mode.
        mask: Class ids (H, W) at the picture's size; ignored pixels are darkened.
        palette: One RGB triple per class.
        opacity: Weight of the colours, 0..1.
        ignore_index: Value without a class.

    Returns:
        RGB picture of the same size. Pictures under 128 pixels get no lines, which would cover them.

    Raises:
        ValueError: Picture and mask differ in size, a value has no colour, or the opacity is outside 0..1.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}; it must lie between 0 (picture only) and 1 (colours only).")
    _check_size(image, mask, "mask")
    slots = _slots(mask, len(palette), ignore_index)
    colours = np.array([*palette, _IGNORED], dtype=np.uint8)
    blended = Image.blend(_rgb(image), Image.fromarray(colours[slots]), opacity)
    if min(image.size) < 128:
        return blended
    step = max(1, round(max(image.size) / 1000))
    line = np.zeros(slots.shape, dtype=bool)
    line[:, step:] |= slots[:, step:] != slots[:, :-step]
    line[step:] |= slots[step:] != slots[:-step]
    blended.paste((255, 255, 255), mask=Image.fromarray(line))
    return blended


def _check_size(image: Image.Image, mask: NDArray[Any], role: str) -> None:
    shape = np.shape(mask)
    if shape != (image.height, image.width):
        raise ValueError(
            f"The picture is {image.width} x {image.height} pixels (width x height), so its {role} must have shape "
            f"({image.height}, {image.width}), but it has {shape}. Resize the {role} (nearest) to the picture."
        )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # Pillow would clip these wide ranges to white.
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        span = max(float(np.ptp(values)), 1e-12)
        image = Image.fromarray(((values - values.min()) / span * 255).astype(np.uint8))
    return image.convert("RGB")


def error_map(prediction: NDArray[Any], truth: NDArray[Any], ignore_index: int = 255) -> NDArray[np.uint8]:
    """Show where a prediction is wrong.

    Args:
        prediction: Class ids (H, W).
        truth: Class ids (H, W).
        ignore_index: Value of the truth that is not judged.

    Returns:
        Colours, uint8 (H, W, 3): dim grey where right, red where wrong, black where ignored.

    Raises:
        ValueError: The shapes differ.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"The prediction has shape {prediction.shape}, but the truth {truth.shape}; they must agree.")
    colours = np.array([_RIGHT, _WRONG, _IGNORED], dtype=np.uint8)
    return colours[np.where(truth == ignore_index, 2, (prediction != truth).astype(np.intp))]


def with_legend(
    picture: Image.Image,
    mask: NDArray[Any],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int = 255,
) -> Image.Image:
    """Write below a picture which classes its mask holds: colour, name, share of the area.

    Args:
        picture: An overlay or a colour map; one under 256 pixels is enlarged by a whole factor.
        mask: Class ids (H, W) of any size.
        class_names: One name per class.
        palette: One RGB triple per class.
        ignore_index: Value listed last, as "ignored".

    Returns:
        The picture with a white legend strip below, largest area first; wider than the picture where a name needs it.

    Raises:
        ValueError: Names and palette differ in number, or a value has no colour.
    """
    entries = _present([mask], class_names, palette, ignore_index, shares=True)
    factor = max(1, round(256 / max(picture.size)))
    picture = _rgb(picture).resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = max(13, round(math.sqrt(picture.width * picture.height) / 42))
    return stack([picture, legend(entries, picture.width, size)])


def preview_grid(
    rows: Sequence[tuple[Image.Image, NDArray[Any], NDArray[Any]]],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int = 255,
    title: str = "",
) -> Image.Image:
    """Set pictures beside their truth, prediction and errors, with a legend below.

    Args:
        rows: Picture, truth (H, W) and prediction (H, W), all of one size; sizes may differ between rows.
        class_names: One name per class.
        palette: One RGB triple per class.
        ignore_index: Value of the truth that is not judged.
        title: Line above the grid.

    Returns:
        RGB picture of four columns, each at most 400 pixels wide.

    Raises:
        ValueError: No rows, sizes differ within a row, or a value has no colour.
    """
    box = cell_box([image for image, _, _ in rows], 400)
    cells: list[list[tuple[str, Image.Image]]] = []
    for image, truth, prediction in rows:
        _check_size(image, truth, "truth")
        _check_size(image, prediction, "prediction")
        drawn = [colorize(truth, palette, ignore_index), colorize(prediction, palette, ignore_index)]
        drawn.append(error_map(prediction, truth, ignore_index))
        pictures = [_rgb(image), *(Image.fromarray(array) for array in drawn)]
        captions = ("image", "truth", "prediction", "error") if not cells else ("",) * 4
        cells.append([(text, scaled(each, box)) for text, each in zip(captions, pictures, strict=True)])
    masks = [mask for _, truth, prediction in rows for mask in (truth, prediction)]
    entries = _present(masks, class_names, palette, ignore_index)
    entries += [("error: wrong", _WRONG), ("error: right", _RIGHT)]
    grid = grid_of(cells, box[0])
    heading = [text_line(title, grid.width, 20)] if title else []
    return stack([*heading, grid, legend(entries, grid.width, 15)])


def contact_sheet(
    rows: Sequence[tuple[Image.Image, NDArray[Any], str]],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int = 255,
) -> Image.Image:
    """Show labels laid over their pictures, two a row, so that wrong labels are seen before training.

    Args:
        rows: Picture, label (H, W) of the same size, and the name written above it.
        class_names: One name per class.
        palette: One RGB triple per class.
        ignore_index: Value without a class.

    Returns:
        RGB picture with a legend of the classes below.

    Raises:
        ValueError: No rows, a label's size differs from its picture's, or a value has no colour.
    """
    box = cell_box([image for image, _, _ in rows], 560)
    cells = []
    for image, label, name in rows:
        _check_size(image, label, "label")
        small = scaled(_rgb(image), box)
        resized = Image.fromarray(np.asarray(label).astype(np.int32)).resize(small.size, Image.Resampling.NEAREST)
        drawn = overlay(small, np.asarray(resized), palette, ignore_index=ignore_index)
        cells.append((name, drawn))
    grid = grid_of([cells[start : start + 2] for start in range(0, len(cells), 2)], box[0])
    entries = _present([label for _, label, _ in rows], class_names, palette, ignore_index)
    return stack([grid, legend(entries, grid.width, 15)])


def _present(
    masks: Sequence[NDArray[Any]],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int,
    shares: bool = False,
) -> list[tuple[str, Colour]]:
    """Name and colour of each class that the masks hold, largest first, ignored pixels last."""
    if len(class_names) != len(palette):
        raise ValueError(f"There are {len(class_names)} class names, but {len(palette)} colours; give one per class.")
    num_labels = len(palette)
    counts = np.sum([class_counts(mask, num_labels, ignore_index) for mask in masks], axis=0)
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda label: (label == num_labels, -counts[label]))
    entries = []
    for label in order:
        name = shorten(class_names[label]) if label < num_labels else "ignored"
        percent = 100 * counts[label] / counts.sum()
        share = f"  {percent:.1f} %" if percent >= 0.05 else "  < 0.1 %"
        entries.append((name + share if shares else name, palette[label] if label < num_labels else _IGNORED))
    return entries
