"""Any picture file to a Pillow picture, and that to upright 8-bit RGB: the same for training and for prediction.

Pillow alone clips 16-bit and floating-point values to white, leaves the EXIF rotation to its caller, and refuses
pictures above 179 megapixels without a way to allow one of them.
"""

import os
import struct
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 256_000_000
MAX_PIXELS_VARIABLE = "CTXSEG_MAX_PIXELS"
_MAX_DOWNLOAD = 1 << 29  # bytes
_TIMEOUT = 10  # seconds

# By the orientation in the EXIF data, CIPA DC-008; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # metadata that may hold the orientation

Convert = Callable[[Image.Image], Image.Image]


def open_image(source: Any, *, allow_url: bool = False) -> Image.Image:
    """Read any picture: upright, 8-bit RGB, the first frame of several, alpha dropped.

    Args:
        source: A path, encoded bytes, an open file, a cell of a data set, `{"bytes": …, "path": …}`, or a Pillow
            picture of any mode.
        allow_url: Whether to fetch the picture where `source` is an http or https URL.

    Raises:
        ValueError: If it is no readable picture, a URL that was not asked for, or larger than the limit of 256
            million pixels, which the environment variable CTXSEG_MAX_PIXELS sets.
        FileNotFoundError: If there is no such file.
    """
    if allow_url and isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return read_picture(_download(source), source, to_rgb)
    return to_rgb(source) if isinstance(source, Image.Image) else open_stored(source, to_rgb)


def open_stored(source: Any, convert: Convert) -> Image.Image:
    """Decode a picture as `open_image` does, but convert it as asked.

    Raises:
        ValueError: As `open_image`.
        FileNotFoundError: If there is no such file.
    """
    stored = source.get("bytes") or source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(stored, str | Path) or not str(stored):
        return read_picture(stored, "The picture", convert)
    name = _shortened(str(stored))
    if str(stored).lower().startswith(("data:", "file:")) or "://" in str(stored):
        raise ValueError(
            f"{name} is a URL, which is not fetched unasked: give the path of a file, or fetch a picture from the web "
            "by hf_ctxseg.open_image(url, allow_url=True)."
        )
    try:
        return read_picture(Path(stored), name, convert)
    except ValueError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(f"There is no picture {name}: check the path.") from error
        raise


def read_picture(source: Any, name: str, convert: Convert) -> Image.Image:
    """Decode a picture (the first frame of several) and convert it.

    Args:
        source: Path, encoded bytes, open file, or a cell of a data set, `{"bytes": …, "path": …}`.
        name: What messages call it.
        convert: Applied to the decoded picture.

    Raises:
        ValueError: If it is missing, empty, cut off, no picture, too large or not to be converted; says which and why.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        source = Path(source) if source else None
    if isinstance(source, bytes | bytearray | memoryview):
        source = BytesIO(source)
    if not isinstance(source, Path) and not hasattr(source, "read"):
        found = "is empty" if source is None else f"holds a {type(source).__name__}"
        raise ValueError(f"{name} {found}, but a picture is needed: a file path, encoded bytes or an open file")
    try:
        with _without_pillow_limit():
            stored = Image.open(source)
        with stored as image:
            _load(image)
            converted = convert(image)
            return converted.copy() if converted is image else converted  # independent of the file
    # Broken files make Pillow's decoders raise anything: OSError, SyntaxError, struct.error, IndexError …
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {_cause(error, source)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Give a picture of any Pillow mode upright and as 8-bit RGB; alpha is dropped.

    Raises:
        ValueError: If it cannot be decoded or is too large, or its values lie in no known range.
    """
    return stored_to_rgb(turned_upright(image))


def stored_to_rgb(image: Image.Image) -> Image.Image:
    """Give a picture of any Pillow mode as 8-bit RGB, turned as it is stored; alpha is dropped.

    Raises:
        ValueError: As `to_rgb`.
    """
    image = _decoded(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(to_8_bit(np.asarray(image)))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may hold transparency, which a direct conversion warns about
    elif image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def turned_upright(image: Image.Image) -> Image.Image:
    """Turn or mirror a picture as its EXIF data ask; what is turned has none any more.

    Raises:
        ValueError: If it cannot be decoded or is too large.
    """
    image = _decoded(image)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged data make Pillow raise anything, and the pixels are good
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _ORIENTED:  # Pillow's own function keeps the rest, and fails where it cannot write that
        turned.info.pop(key, None)
    return turned


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Bring values of a known range (bool, 0 … 1, 0 … 255, 16-bit) to uint8.

    Raises:
        ValueError: If they are not finite, or in no known range.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        return (values // 257).astype(np.uint8)
    if not np.isfinite(values).all():
        raise ValueError("The picture holds NaN or infinite values: give finite pixel values.")
    low, high = float(values.min()), float(values.max())
    # Slightly above 1 or 255, as resizing leaves it, the range is one or the next.
    unclear = values.dtype.kind == "f" and (1 < high < 2 or 255 < high < 511)
    if low < 0 or high > 65535 or unclear:
        raise ValueError(
            f"The picture's values run from {low:g} to {high:g}, a range of unknown meaning: clip or convert it to "
            "0 … 1 or to 8 bit, or give an array scaled by yourself with do_rescale=False."
        )
    scale = 255.0 if values.dtype.kind == "f" and high <= 1 else 1.0 if high <= 255 else 1 / 257
    return np.rint(values * scale).astype(np.uint8)


def check_pixels(width: int, height: int) -> None:
    """Raise `ValueError` if a picture has more pixels than the limit: a few kilobytes can hold a gigapixel."""
    limit = _max_pixels()
    if width * height > limit:
        raise ValueError(
            f"it has {width * height} pixels ({width}x{height}, width x height), more than the limit of {limit}: if "
            f"you trust it and have the memory, set {MAX_PIXELS_VARIABLE}={width * height} in the environment"
        )


def _max_pixels() -> int:
    text = os.environ.get(MAX_PIXELS_VARIABLE) or str(MAX_PIXELS)
    if not text.isdecimal():
        raise ValueError(f"{MAX_PIXELS_VARIABLE} is {text!r}, but a whole number of pixels is expected: {MAX_PIXELS}")
    return int(text)


def _decoded(image: Image.Image) -> Image.Image:
    """Decode a picture that Pillow has only opened, unless it is too large."""
    name = _shortened(str(getattr(image, "filename", ""))) or "The picture"
    try:
        _load(image)
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {_cause(error)}") from error
    return image


def _load(image: Image.Image) -> None:
    check_pixels(image.width, image.height)
    # Pillow looks at a TIFF's size once more; an icon may hold a larger picture than it says, and stays limited.
    with _without_pillow_limit() if image.format == "TIFF" else nullcontext():
        image.load()


_lock = threading.Lock()
_limits: list[int | None] = []  # Pillow's own, once for each thread that did without


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    # Pillow's limit is one for the process. The first to come puts it away, the last to leave puts it back.
    with _lock:
        _limits.append(_limits[0] if _limits else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lock:
            limit = _limits.pop()
            if not _limits:
                Image.MAX_IMAGE_PIXELS = limit


def _cause(error: BaseException, source: Path | IO[bytes] | None = None) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = source.stat().st_size == 0 if isinstance(source, Path) else source is not None and _is_empty(source)
        return "the file is empty" if empty else "it is no picture of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, struct.error | IndexError | EOFError):
        return f"it is cut off or damaged ({error})"
    return str(error) or type(error).__name__


def _is_empty(source: IO[bytes]) -> bool:
    return source.seekable() and source.seek(0, os.SEEK_END) == 0


def _shortened(name: str) -> str:
    return name if len(name) <= 300 else f"{name[:140]} … {name[-140:]}"


def _download(url: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "hf-ctxseg"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            content: bytes = response.read(_MAX_DOWNLOAD + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{url} cannot be fetched ({error}): check the address and the connection.") from error
    if len(content) > _MAX_DOWNLOAD:
        raise ValueError(f"{url} is larger than {_MAX_DOWNLOAD >> 20} MiB: download it and give the file's path.")
    return content
