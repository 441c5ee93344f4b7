"""Dense 3×3 convolution by Winograd's minimal filtering F(2×2, 3×3), for maps with the channels last in memory.

Each 2×2 block of outputs takes 16 products per pair of channels instead of 36 (Lavin and Gray, arXiv 1509.09308,
section 4.1): the 4×4 cells below it and the kernel are transformed by additions, multiplied point by point, which over
all channels and blocks is a product of matrices for each of the 16 points, and transformed back. The result is exact;
its rounding error in float32 is no larger than that of the library's sum of 9 times as many products.
"""

import torch
from torch.nn import functional as F

_BLOCK = 1 << 22  # values of transformed cells held at a time
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
    kernels = _transformed(weight)  # (16, I, O)
    count, channels, height, width = x.shape
    outputs = weight.shape[0]
    down, across = -(-height // 2), -(-width // 2)  # blocks
    cells = x.permute(0, 2, 3, 1)  # (B, H, W, I)
    result = x.new_empty(count, height, width, outputs)
    held = max(1, _BLOCK // (16 * channels))  # blocks at a time
    maps, rows = max(1, held // (down * across)), min(down, max(1, held // across))
    for first in range(0, count, maps):
        for top in range(0, down, rows):
            bottom = min(top + rows, down)
            # One cell more on each side, and what lacks to an even edge.
            above, below = int(top == 0), max(0, 2 * bottom + 1 - height)
            part = cells[first : first + maps, 2 * top - 1 + above : 2 * bottom + 1]
            part = F.pad(part, (0, 0, 1, 2 * across + 1 - width, above, below))  # (b, 2 rows + 2, 2 across + 2, I)
            sums = _sums(part, bottom - top, across) @ kernels  # (16, b * rows * across, O)
            sums = sums.view(4, 4, len(part), bottom - top, across, outputs)
            place = result[first : first + maps, 2 * top : 2 * bottom]
            _write(sums, place)
    return result.permute(0, 3, 1, 2)  # (B, O, H, W)


def _transformed(weight: torch.Tensor) -> torch.Tensor:
    """Kernels (O, I, 3, 3) as (16, I, O)."""
    outputs, channels = weight.shape[:2]
    square = torch.kron(_EDGE, _EDGE).to(weight)  # (16, 9)
    if weight.is_contiguous(memory_format=torch.channels_last):
        taps = weight.permute(0, 2, 3, 1).reshape(outputs, 9, channels)
        return (square @ taps).permute(1, 2, 0)
    return (square @ weight.reshape(-1, 9).t()).view(16, outputs, channels).transpose(1, 2)


def _sums(part: torch.Tensor, rows: int, across: int) -> torch.Tensor:
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


def _write(sums: torch.Tensor, place: torch.Tensor) -> None:
    """Write the outputs (b, h, w, O) of sums (4, 4, b, rows, across, O); an odd edge takes half of the last block."""
    upper = (sums[0] + sums[1]).add_(sums[2])  # (4, b, rows, across, O)
    lower = (sums[1] - sums[2]).sub_(sums[3])
    for row, line in enumerate((upper, lower)):
        left = (line[0] + line[1]).add_(line[2])  # (b, rows, across, O)
        right = (line[1] - line[2]).sub_(line[3])
        for column, values in enumerate((left, right)):
            into = place[:, row::2, column::2]
            into.copy_(values[:, : into.shape[1], : into.shape[2]])
