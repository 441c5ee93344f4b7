"""Dense 3×3 convolution by Winograd's minimal filtering F(2×2, 3×3), for maps with the channels last in memory.

Each 2×2 block of outputs takes 16 products per pair of channels instead of 36 (Lavin and Gray, arXiv 1509.09308,
section 4.1): the 4×4 cells below it and the kernel are transformed by additions, multiplied point by point, which over
all channels and blocks is a product of matrices for each of the 16 points, and transformed back. The result is exact;
its rounding error in float32 is no larger than that of the library's sum of 9 times as many products.
"""

import torch
from torch.nn import functional as F

_HELD, _HELD_VALUES = 128, 1 << 20  # blocks whose transformed cells are held at a time: at least, and by values
_LARGE = 1 << 21  # values of transformed kernels that are split where this saves memory
# The transform of a kernel, (16, 9): the Kronecker square of the one along an edge.
_EDGE = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])


def winograd_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolve with padding 1 and stride 1; nothing is recorded for autograd.

    Args:
        x: (B, I, H, W), channels last in memory.
        weight: (O, I, 3, 3).

    Returns:
        (B, O, H, W), channels last in memory.
    """
    count, channels, height, width = x.shape
    outputs = weight.shape[0]
    down, across = -(-height // 2), -(-width // 2)  # blocks of outputs
    # Transformed kernels, where they are larger than all products, are made for some channels at a time.
    size = 16 * channels * outputs
    in_pieces = size > _LARGE and 32 * count * down * across * outputs <= size
    pieces = torch.arange(channels).tensor_split(min(channels, -(-size // _LARGE)) if in_pieces else 1)
    at_once = max(_HELD, _HELD_VALUES // (16 * len(pieces[0])))
    maps, rows = max(1, at_once // (down * across)), min(down, max(1, at_once // across))
    parts = [(first, top) for first in range(0, count, maps) for top in range(0, down, rows)]
    cells = x.permute(0, 2, 3, 1)  # (B, H, W, I)
    result = x.new_empty(count, height, width, outputs)
    products: dict[tuple[int, int], torch.Tensor] = {}
    for number, piece in enumerate(pieces, start=1):
        chosen = slice(int(piece[0]), int(piece[-1]) + 1)
        kernels = _transformed(weight[:, chosen])  # (16, i, O)
        for first, top in parts:
            bottom = min(top + rows, down)
            # One cell more on each side, and what lacks to an even edge.
            above, below = int(top == 0), max(0, 2 * bottom + 1 - height)
            part = cells[first : first + maps, 2 * top - 1 + above : 2 * bottom + 1, :, chosen]
            part = F.pad(part, (0, 0, 1, 2 * across + 1 - width, above, below))  # (b, 2 rows + 2, 2 across + 2, i)
            points = _points(part, bottom - top, across)  # (16, b * rows * across, i)
            earlier = products.pop((first, top), None)
            product = points @ kernels if earlier is None else earlier.baddbmm_(points, kernels)
            if number < len(pieces):
                products[first, top] = product
            else:
                product = product.view(4, 4, len(part), bottom - top, across, outputs)
                _write(product, result[first : first + maps, 2 * top : 2 * bottom])
    return result.permute(0, 3, 1, 2)  # (B, O, H, W)


def _transformed(weight: torch.Tensor) -> torch.Tensor:
    """Kernels (O, I, 3, 3) as (16, I, O)."""
    outputs, channels = weight.shape[:2]
    square = torch.kron(_EDGE, _EDGE).to(weight)  # (16, 9)
    if weight.is_contiguous(memory_format=torch.channels_last):
        taps = weight.permute(0, 2, 3, 1).reshape(outputs, 9, channels)
        return (square @ taps).permute(1, 2, 0)
    return (square @ weight.reshape(-1, 9).t()).view(16, outputs, channels).transpose(1, 2)


def _points(part: torch.Tensor, rows: int, across: int) -> torch.Tensor:
    """Transformed cells (16, b * rows * across, I) of a padded part (b, 2 rows + 2, 2 across + 2, I)."""
    lines = [part[:, row : row + 2 * rows - 1 : 2] for row in range(4)]
    lines = [lines[0] - lines[2], lines[1] + lines[2], lines[2] - lines[1], lines[1] - lines[3]]
    values = part.new_empty(4, 4, len(part), rows, across, part.shape[3])
    for line, into in zip(lines, values, strict=True):
        points = [line[:, :, column : column + 2 * across - 1 : 2] for column in range(4)]
        torch.sub(points[0], points[2], out=into[0])
        torch.add(points[1], points[2], out=into[1])
        torch.sub(points[2], points[1], out=into[2])
        torch.sub(points[1], points[3], out=into[3])
    return values.view(16, -1, part.shape[3])


def _write(product: torch.Tensor, place: torch.Tensor) -> None:
    """Write the outputs (b, h, w, O) of a product (4, 4, b, rows, across, O); odd edges halve the last blocks."""
    upper = (product[0] + product[1]).add_(product[2])  # (4, b, rows, across, O)
    lower = (product[1] - product[2]).sub_(product[3])
    for row, line in enumerate((upper, lower)):
        left = (line[0] + line[1]).add_(line[2])  # (b, rows, across, O)
        right = (line[1] - line[2]).sub_(line[3])
        for column, values in enumerate((left, right)):
            into = place[:, row::2, column::2]
            into.copy_(values[:, : into.shape[1], : into.shape[2]])
