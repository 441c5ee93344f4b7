"""Videos, frame by frame in constant memory; PyAV (`pip install "hf-ctxseg[video]"`) reads and writes them."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .inference import Predictor
from .prediction import Prediction
from .progress import terminal_bar
from .sheet import legend, stack
from .visualization import overlay

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_MAX_LEGEND = 24  # classes; more would leave little of the picture


@dataclass
class VideoResult:
    """What was found in a video: its size (width, height), frames, and pixels of each class in all of them."""

    size: tuple[int, int] = (0, 0)
    frames: int = 0
    how: str = ""
    pixels: Counter[str] = field(default_factory=Counter)


def predict_video(
    predictor: Predictor,
    path: Path,
    overlay_path: Path | None,
    masks: Path | None,
    save: Callable[[Image.Image, Path], None],
) -> VideoResult:
    """Segment each frame of a video.

    Args:
        predictor: The model.
        path: The video.
        overlay_path: Where an MP4 of the overlays is written, with the frames' own times and a legend below.
        masks: Folder for a mask of each frame, `000000.png` and so on.
        save: Writes a mask.

    Raises:
        ValueError: If PyAV is not installed, or it cannot read the video.
    """
    av = _av(path)
    result = VideoResult()
    try:
        with ExitStack() as stack_, av.open(str(path)) as source:
            if not source.streams.video:
                raise ValueError(f"{path} holds no pictures: give a video.")
            stream = source.streams.video[0]
            stream.thread_type = "AUTO"
            writer = None if overlay_path is None else stack_.enter_context(_writer(av, overlay_path, stream))
            folder = None if masks is None else stack_.enter_context(_folder(masks))
            progress = stack_.enter_context(terminal_bar(unit="frame"))
            for frame in source.decode(stream):
                prediction = predictor(_upright(frame))
                if folder is not None:
                    save(prediction.mask_image, folder / f"{result.frames:06d}.png")
                if writer is not None:
                    writer(_drawn(prediction), frame.pts)
                result.frames += 1
                result.size, result.how = prediction.picture.size, prediction.how
                result.pixels.update(prediction.pixels)
                progress(result.frames, max(stream.frames, result.frames))
            if not result.frames:
                raise ValueError(f"{path} holds no picture that can be read: replace or remove the file.")
    except av.FFmpegError as error:
        raise ValueError(f"{path} is not a readable video ({error}): replace or remove the file.") from error
    result.pixels = Counter(dict(result.pixels.most_common()))
    return result


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f'{path} is a video, which PyAV reads: pip install "hf-ctxseg[video]" (or pip install av).'
        ) from error
    return av


def _upright(frame: Any) -> Image.Image:
    picture: Image.Image = frame.to_image()
    turn = round(getattr(frame, "rotation", 0)) % 360  # degrees against the clock, as phones store it
    return picture.rotate(turn, expand=True) if turn else picture


def _drawn(prediction: Prediction) -> Image.Image:
    """The overlay with the colours of all classes below, of even width and height as H.264 wants them."""
    drawn = overlay(prediction.picture, prediction.mask, prediction.palette, ignore_index=-1)
    if len(prediction.names) <= _MAX_LEGEND:
        size = max(13, round((drawn.width * drawn.height) ** 0.5 / 42))
        drawn = stack([drawn, legend(list(zip(prediction.names, prediction.palette, strict=True)), drawn.width, size)])
    even = (drawn.width + drawn.width % 2, drawn.height + drawn.height % 2)
    return (
        drawn if drawn.size == even else stack([drawn, Image.new("RGB", (even[0], even[1] - drawn.height), "white")])
    )


@contextmanager
def _writer(av: Any, path: Path, source: Any) -> Iterator[Callable[[Image.Image, int | None], None]]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            stream = container.add_stream(codec, rate=source.average_rate or 25)
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = source.time_base
            count = 0

            def write(picture: Image.Image, pts: int | None) -> None:
                nonlocal count
                if not count:
                    stream.width, stream.height = picture.size
                frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
                frame.time_base = source.time_base
                frame.pts = pts
                container.mux(stream.encode(frame))
                count += 1

            yield write
            if count:
                container.mux(stream.encode(None))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
