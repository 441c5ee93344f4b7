"""What one pixel takes from the rest of a picture: the weights of a non-local block as a heat map, and its picture.

Only the row of the weights that is asked for is computed, from the input of the block, never all pairs of positions.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F

from .image_processing_ctxseg import CtxSegImageProcessor
from .layers import resize_like
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .nonlocal_block import NonLocalBlock
from .sheet import colour_bar, stack, text_line

_OPACITY = 0.9


def check_has_block(model: nn.Module) -> None:
    """Raise `ValueError` unless the model has a non-local block."""
    if not any(isinstance(module, NonLocalBlock) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} has no non-local block, so there are no attention weights to show: use a "
            "model with the head 'nonlocal', or with nonlocal_mode or backbone_nonlocal_stages set."
        )


def heat_map(
    model: CtxSegForSemanticSegmentation, processor: CtxSegImageProcessor, picture: Image.Image, query: tuple[int, int]
) -> NDArray[np.float32]:
    """Give the weights of one pixel in the model's last non-local block, at the picture's size.

    Args:
        model: A model with a non-local block.
        processor: Its image processor.
        picture: An RGB picture.
        query: The pixel (x to the right, y down), counted from 0.

    Returns:
        (H, W): the weight that the block gives to what lies there, interpolated between the positions of its map.

    Raises:
        ValueError: If the model has no non-local block, or the pixel lies outside the picture.
    """
    check_has_block(model)
    width, height = picture.size
    if not (0 <= query[0] < width and 0 <= query[1] < height):
        raise ValueError(
            f"The query pixel {query[0]},{query[1]} lies outside the picture of {width} x {height} pixels: give X "
            f"from 0 to {width - 1} and Y from 0 to {height - 1}."
        )
    pixel_values = processor(images=picture, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            block, x = _last_block(model, pixel_values)
            rows, columns = x.shape[2:]
            align = model.config.align_corners
            row, column = _cell(query[1], height, rows, align), _cell(query[0], width, columns, align)
            weights = block.weights_of(x, torch.tensor([row * columns + column], device=x.device))  # (1, 1, h', w')
    finally:
        model.train(was_training)
    heat = resize_like(_unpooled(weights, rows, columns), (height, width), align)  # (1, 1, H, W)
    return heat[0, 0].float().cpu().numpy()


def _last_block(model: nn.Module, pixel_values: torch.Tensor) -> tuple[NonLocalBlock, torch.Tensor]:
    seen: dict[NonLocalBlock, torch.Tensor] = {}

    def keep(block: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.setdefault(block, inputs[0])  # of several scales of the picture, the first is the picture's own

    hooks = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, NonLocalBlock)]
    try:
        model(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen.items())[-1]


def _cell(pixel: int, pixels: int, cells: int, align_corners: bool) -> int:
    """The cell of the map that upsampling gives most weight at a pixel."""
    if align_corners:
        return round(pixel * (cells - 1) / max(pixels - 1, 1))
    return int((pixel + 0.5) * cells / pixels)


def _unpooled(weights: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Give each position the weight of the key it was pooled into, and 0 where pooling left out an odd last one."""
    for dim, size in ((2, rows), (3, columns)):
        if weights.shape[dim] != size:
            weights = weights.repeat_interleave(2, dim)
    return F.pad(weights, (0, columns - weights.shape[3], 0, rows - weights.shape[2]))  # (1, 1, h, w)


def attention_picture(picture: Image.Image, heat: NDArray[Any], query: tuple[int, int]) -> Image.Image:
    """Lay a heat map over its picture, with the query pixel marked and a colour bar below.

    Args:
        picture: The picture, RGB.
        heat: Weights (H, W) of its size; where some are negative, red is positive and blue negative.
        query: The pixel (x, y) whose weights these are.

    Returns:
        RGB picture; one under 256 pixels is enlarged by a whole factor.
    """
    from matplotlib import colormaps

    low, high = float(min(heat.min(), 0)), float(max(heat.max(), 0))
    if low < 0:
        low, high = -max(high, -low), max(high, -low)
    colours = colormaps["RdBu_r" if low < 0 else "inferno"]
    drawn = Image.fromarray(colours((heat - low) / ((high - low) or 1.0), bytes=True)[..., :3])
    # The picture shows where nothing is looked at; the root lets small weights tint it.
    strength = np.sqrt(np.abs(heat) / (high or 1.0))
    opacity = Image.fromarray((255 * _OPACITY * strength).astype(np.uint8))
    grey = picture.convert("L").point(lambda value: value * 3 // 5 + (96 if low < 0 else 0)).convert("RGB")
    factor = max(1, round(256 / max(picture.size)))
    shown = Image.composite(drawn, grey, opacity)
    shown = shown.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    _mark(shown, (query[0] + 0.5) * factor, (query[1] + 0.5) * factor)
    size = max(13, round((shown.width * shown.height) ** 0.5 / 42))
    title = text_line(f"What the pixel ({query[0]}, {query[1]}) looks at", shown.width, size)
    factor_of_mean = high / (float(heat.mean()) or 1.0)
    times = f"{high:.2g} = {factor_of_mean:.{0 if factor_of_mean >= 10 else 1}f} × the mean"
    ticks = [f"{low:.2g}", "0", f"{high:.2g}"] if low < 0 else ["weight 0", times]
    scale = [(red, green, blue) for red, green, blue, _ in colours(np.arange(256), bytes=True).tolist()]
    bar = colour_bar(scale, ticks, shown.width, size)
    return stack([title, shown, bar])


def _mark(picture: Image.Image, x: float, y: float) -> None:
    radius = max(5.0, max(picture.size) / 70)
    line = max(2, round(radius / 4))
    draw = ImageDraw.Draw(picture)
    for extra, colour in ((line, "black"), (0, "white")):
        box = (x - radius - extra / 2, y - radius - extra / 2, x + radius + extra / 2, y + radius + extra / 2)
        draw.ellipse(box, outline=colour, width=line + extra)
    draw.ellipse((x - line / 2, y - line / 2, x + line / 2, y + line / 2), fill="white", outline="black")
