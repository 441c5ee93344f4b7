"""One picture to its mask: as a whole or by windows, chosen by the memory that it takes; with or without a CRF."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from .crf import DenseCRF
from .image_processing_ctxseg import CtxSegImageProcessor
from .memory_budget import default_budget, format_bytes, measured_need
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .prediction import mask_type
from .tiling import picture_source, resizes, tiled_blocks
from .upsampling import place_of, upsampled_blocks
from .views import Views, probability_blocks, segment, view_maps

Sink = Callable[[slice, torch.Tensor], None]
Progress = Callable[[int, int], None]

# Pictures of fewer pixels are looked at whole where no amount of memory is given.
_SMALL = 1 << 22
# Windows of this edge agree with the whole picture where rates of 18 at output stride 16 reach 288 pixels far.
_EDGE, _SMALLEST_EDGE = 1024, 64
_MEASURED_EDGE = 512


@dataclass(frozen=True)
class Plan:
    """How a picture is looked at, and why by windows if nobody asked for them."""

    views: Views
    reason: str = ""

    def describe(self) -> str:
        """Say it in words."""
        what = "whole"
        if self.views.window is not None:
            what = f"windows of {self.views.window} pixels, {self.views.overlap:.0%} overlap"
        return f"{what}: {self.reason}" if self.reason else what


class Segmenter:
    """A model with its image processor and its views.

    Args:
        model: The model; it is put into evaluation mode while it is used.
        processor: Its image processor.
        views: How pictures are looked at.
        memory: Bytes that a look may take; None takes those of `default_budget`.
        crf: What refines the probabilities.
    """

    def __init__(
        self,
        model: CtxSegForSemanticSegmentation,
        processor: CtxSegImageProcessor,
        views: Views,
        memory: int | None = None,
        crf: DenseCRF | None = None,
    ) -> None:
        self.model, self.processor, self.views, self.memory, self.crf = model, processor, views, memory, crf
        self._bytes_per_pixel = 0.0

    def plan(self, width: int, height: int) -> Plan:
        """Choose how to look at a picture of this size.

        Raises:
            ValueError: If the memory does not suffice for a small window, or for the CRF.
        """
        views = self.views
        pixels = width * height * max(views.scales) ** 2
        if self.crf is not None:
            self._check_crf(width, height)
        if views.window is not None or resizes(self.processor) or (self.memory is None and pixels <= _SMALL):
            return Plan(views)
        need = self._need_per_pixel()
        budget = self.memory or default_budget(self.model.device)
        whole = need * pixels
        if whole <= budget:
            return Plan(views)
        edge, batch = _EDGE, 1 if self.model.device.type == "cpu" else views.batch
        while batch * edge**2 * need > budget:
            edge, batch = (edge, batch // 2) if batch > 1 else (edge // 2, 1)
            if edge < _SMALLEST_EDGE:
                least = format_bytes(_SMALLEST_EDGE**2 * need)
                raise ValueError(
                    f"memory is {format_bytes(budget)}, but a window of {_SMALLEST_EDGE} pixels takes {least}: give "
                    "more, or a model with a lighter backbone."
                )
        reason = f"the whole would take about {format_bytes(whole)}, and {format_bytes(budget)} are allowed (--memory)"
        return Plan(replace(views, window=edge, batch=batch), reason)

    def allows(self, pixels: int) -> bool:
        """Whether so many pixels can be looked at at once within the memory that was given, if any was."""
        if self.memory is None or resizes(self.processor):
            return True
        return self._need_per_pixel() * pixels * max(self.views.scales) ** 2 <= self.memory

    def mask(
        self, picture: Image.Image, views: Views, sink: Sink | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Segment one RGB picture.

        Args:
            picture: The picture.
            views: Those of its plan.
            sink: Called with some rows and their probabilities (rows, K, W), from the top down.
            progress: Called with the windows looked at and their number.

        Returns:
            Class indices (H, W).
        """
        size = (picture.height, picture.width)
        with self._evaluating():
            if views.window is None and self.crf is None and sink is None:
                maps = self._maps([picture], views)
                return self._narrow(segment(maps, size, self.processor.align_corners)[0])
            blocks = self._blocks(picture, views, progress or (lambda done, total: None))
            if self.crf is not None:
                blocks = self._refined(self.crf, blocks, picture)
            elif sink is not None and views.is_single:
                blocks = ((rows, values.softmax(dim=2)) for rows, values in blocks)
            mask = np.empty(size, mask_type(self.model.config.num_labels))
            for rows, values in blocks:
                if sink is not None:
                    sink(rows, values[:, 0])
                best = values.amax(dim=2, keepdim=True)
                mask[rows] = place_of(best, values)[:, 0].cpu().numpy()
            return mask

    def masks(self, pictures: Sequence[Image.Image], views: Views) -> list[np.ndarray]:
        """Segment several RGB pictures of one size in one forward pass."""
        size = (pictures[0].height, pictures[0].width)
        with self._evaluating():
            classes = segment(self._maps(pictures, views), size, self.processor.align_corners)
            return [self._narrow(mask) for mask in classes]

    def _maps(self, pictures: Sequence[Image.Image], views: Views) -> list[torch.Tensor]:
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return view_maps(self._forward, pixels, views, self.model.config.output_stride)

    def _blocks(self, picture: Image.Image, views: Views, progress: Progress) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows and values (rows, 1, K, W): logits of a single view, probabilities of several."""
        size, align_corners = (picture.height, picture.width), self.processor.align_corners
        if views.window is not None:
            source, stride = picture_source(picture, self.processor), self.model.config.output_stride
            return tiled_blocks(
                self._forward,
                source,
                views,
                size,
                output_stride=stride,
                align_corners=align_corners,
                progress=progress,
            )
        maps = self._maps([picture], views)
        blocks = (
            upsampled_blocks(maps[0], size, align_corners)
            if views.is_single
            else probability_blocks(maps, size, align_corners)
        )
        return ((rows, values) for _, rows, values in blocks)

    def _refined(
        self, crf: DenseCRF, blocks: Iterator[tuple[slice, torch.Tensor]], picture: Image.Image
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        shape = (1, self.model.config.num_labels, picture.height, picture.width)
        chances = torch.empty(shape, device=self.model.device)
        for rows, values in blocks:
            values = values.softmax(dim=2) if self.views.is_single else values
            chances[0, :, rows] = values[:, 0].transpose(0, 1).to(chances)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(chances.device)
        yield slice(0, picture.height), crf(chances, pixels).permute(2, 0, 1, 3)

    def _check_crf(self, width: int, height: int) -> None:
        budget = self.memory or default_budget(self.model.device)
        need = width * height * (28 * self.model.config.num_labels + 700)  # as DenseCRF tells
        if need > budget:
            raise ValueError(
                f"The CRF takes about {format_bytes(need)} for {width} x {height} pixels at once, but the memory is "
                f"{format_bytes(budget)}: allow more with --memory (memory= in Python), or give a smaller picture."
            )

    def _need_per_pixel(self) -> float:
        if not self._bytes_per_pixel:
            blank = Image.new("RGB", (_MEASURED_EDGE, _MEASURED_EDGE))
            with self._evaluating(), _quiet():
                self._bytes_per_pixel = measured_need(lambda: self._maps([blank], Views())) / _MEASURED_EDGE**2
        return self._bytes_per_pixel

    def _forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixels.to(self.model.device, self.model.dtype)).logits
        return logits

    def _narrow(self, classes: torch.Tensor) -> np.ndarray:
        return classes.cpu().numpy().astype(mask_type(self.model.config.num_labels))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"The memory of {self.model.device} does not suffice ({str(error).splitlines()[0]}): give less to a "
                "picture with --memory (memory= in Python), or smaller windows with --window."
            ) from error
        finally:
            self.model.train(was_training)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(__package__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
