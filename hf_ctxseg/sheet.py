"""Setting pictures on a white page: legend strips, captioned grids, and what it takes to keep text inside its cell."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


def shorten(text: str, limit: int = 40) -> str:
    """Put a text on one line and cut its middle out beyond `limit` characters, since names differ at their ends."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    kept = limit - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has no letters beyond ASCII; matplotlib brings one with Latin, Greek, Cyrillic and Arabic.
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def legend(entries: Sequence[tuple[str, Colour]], width: int, size: int) -> Image.Image:
    """Draw colour chips with their names, in as many columns as fit, read downwards.

    Args:
        entries: Text and colour of each chip, at least one.
        width: Wished width in pixels; the strip is wider where one text alone needs it.
        size: Height of the letters in pixels.

    Returns:
        RGB strip on white.
    """
    font = _font(size)
    gap = size // 2
    cells = [math.ceil(font.getlength(text)) + size + 4 * gap for text, _ in entries]
    for columns in range(min(5, len(entries)), 0, -1):
        rows = math.ceil(len(entries) / columns)
        widths = [max(cells[start : start + rows]) for start in range(0, len(cells), rows)]
        if sum(widths) <= width:
            break
    line = round(size * 1.6)
    strip = Image.new("RGB", (max(width, sum(widths)), rows * line + 2 * gap), "white")
    draw = ImageDraw.Draw(strip)
    for place, (text, colour) in enumerate(entries):
        column, row = divmod(place, rows)
        left, middle = sum(widths[:column]) + gap, gap + row * line + line // 2
        box = (left, middle - size // 2, left + size, middle - size // 2 + size)
        draw.rectangle(box, fill=colour, outline=(120, 120, 120))
        draw.text((left + size + gap, middle), text, fill="black", font=font, anchor="lm")
    return strip


def colour_bar(colours: Sequence[Colour], ticks: Sequence[str], width: int, size: int) -> Image.Image:
    """Draw a scale of colours with texts below it, the first at its left end, the last at its right end.

    Args:
        colours: Colours from left to right.
        ticks: Two texts or more, at equal distances.
        width: Wished width in pixels; the strip is wider where the texts need it.
        size: Height of the letters in pixels.

    Returns:
        RGB strip on white.
    """
    font = _font(size)
    gap = size // 2
    width = max(width, math.ceil(sum(font.getlength(text) + 2 * gap for text in ticks)))
    strip = Image.new("RGB", (width, gap * 3 + size * 2), "white")
    scale = Image.new("RGB", (len(colours), 1))
    scale.putdata(list(colours))
    strip.paste(scale.resize((width - 2 * gap, size)), (gap, gap))
    draw = ImageDraw.Draw(strip)
    for place, text in enumerate(ticks):
        share = place / (len(ticks) - 1)
        anchor = {0.0: "lm", 1.0: "rm"}.get(share, "mm")
        draw.text((gap + share * (width - 2 * gap), size * 2 + gap), text, fill="black", font=font, anchor=anchor)
    return strip


def text_line(text: str, width: int, size: int) -> Image.Image:
    """Draw one line of text, its middle cut out where it is wider than `width` pixels."""
    font = _font(size)
    limit = len(text)
    text = shorten(text, limit)
    while limit > 1 and font.getlength(text) > width - size:
        limit -= 1
        text = shorten(text, limit)
    strip = Image.new("RGB", (width, round(size * 1.8)), "white")
    ImageDraw.Draw(strip).text((size // 2, strip.height // 2), text, fill="black", font=font, anchor="lm")
    return strip


def cell_box(images: Sequence[Image.Image], limit: int) -> tuple[int, int]:
    """Width and greatest height of a grid's cells: the widest picture's, between 160 and `limit` pixels."""
    if not images:
        raise ValueError("There is no picture to show; give at least one row.")
    width = min(limit, max(160, *(image.width for image in images)))
    return width, round(width * 1.4)


def scaled(image: Image.Image, box: tuple[int, int]) -> Image.Image:
    """Scale a picture into a box, keeping its proportions; enlarged pixels stay square."""
    ratio = min(box[0] / image.width, box[1] / image.height)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.NEAREST)


def grid_of(rows: Sequence[Sequence[tuple[str, Image.Image]]], width: int, gap: int = 8) -> Image.Image:
    """Set captioned pictures, none wider than `width`, in rows; a row without captions takes no room for them."""
    columns = max(len(row) for row in rows)
    strips = []
    for row in rows:
        parts = [stack([*([text_line(text, width, 15)] if text else []), picture]) for text, picture in row]
        strip = Image.new("RGB", (columns * (width + gap) + gap, max(part.height for part in parts) + gap), "white")
        for place, part in enumerate(parts):
            strip.paste(part, (gap + place * (width + gap), 0))
        strips.append(strip)
    return stack(strips)


def stack(parts: Sequence[Image.Image]) -> Image.Image:
    """Set pictures below each other, flush left, on white."""
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page
