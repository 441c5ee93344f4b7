"""Gaussian filtering of many points in a space of few dimensions by the permutohedral lattice, in torch alone.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Eurographics 2010): every
point lies in a simplex of a lattice, between d + 1 vertices. Values are spread onto these (splat), blurred along the
d + 1 directions of the lattice (blur) and gathered again (slice), at a cost that is linear in the points. Vertices of
no point's simplex do not exist and count as zero, which makes the order of the directions part of the result: it is
that of Krähenbühl and Koltun's C++ code, whose results these are but for rounding.

Splat, blur and slice are weighted sums of a table's rows, which `embedding_bag` computes on CPUs and GPUs alike.
"""

import math

import torch
from torch.nn import functional as F

_FARTHEST = 2**18  # coordinates beyond leave float32 too few digits for the place within a simplex
_TOO_FAR = (
    "The picture spreads over too many standard deviations of a kernel for the lattice: raise the standard "
    "deviations, or give a smaller picture."
)
_CHANNELS = 32  # filtered at once: more take memory, and a smaller table stays in the processor's cache


class PermutohedralLattice:
    """The lattice of one set of points: built once, it filters any values at these points.

    Its kernel exp(-|p - q|² / 2) between points p and q is normalised symmetrically: K becomes D^-½ K D^-½, with D the
    diagonal matrix of K's row sums.

    Args:
        features: Coordinates of the points in units of the kernel's standard deviation.

    Shape:
        features: (N, d), float32

    Raises:
        ValueError: If the points lie so far apart that float32 cannot tell their places, or that the lattice's
            vertices cannot be numbered in 64 bits.
    """

    def __init__(self, features: torch.Tensor) -> None:
        if not features.abs().amax() < _FARTHEST:
            raise ValueError(_TOO_FAR)
        count, width = len(features), features.shape[1] + 1
        closest, coordinates, shares = _simplices(features)
        codes, steps = _number(closest, coordinates)
        del closest, coordinates
        codes, order = codes.flatten().sort(stable=True)
        vertices, places, sizes = torch.unique_consecutive(codes, return_inverse=True, return_counts=True)
        del codes
        # Splat: for vertex after vertex the points around it; a last one has none and stays zero.
        self._starts = F.pad(sizes.cumsum(0), (1, 0)).int()  # (M + 1,)
        self._points = (order // width).int()  # (N (d + 1),)
        self._point_shares = shares.flatten().index_select(0, order)
        # Blur: in each direction a vertex and its two neighbours, or the last row where there is none.
        self._neighbours = torch.stack([_neighbours(vertices, step) for step in steps])  # (d + 1, M + 1, 3)
        self._blur_shares = features.new_tensor([1.0, 0.5, 0.5]).repeat(len(vertices) + 1, 1)  # (M + 1, 3)
        # Slice: the vertices around each point.
        corners = torch.empty_like(places, dtype=torch.int32)
        corners[order] = places.int()
        self._corners, self._corner_shares = corners.view(count, width), shares  # (N, d + 1)
        del order, places, corners
        scale = self.filter(features.new_ones(count, 1)).add_(1e-20).rsqrt_()  # (N, 1)
        self._corner_shares = shares * scale
        self._point_shares *= scale[self._points, 0]

    def filter(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply values (N, K), float32, with the normalised kernel matrix: the result has the same shape."""
        if values.shape[1] <= _CHANNELS:
            return self._filter(values)
        filtered = torch.empty_like(values)
        for start in range(0, values.shape[1], _CHANNELS):
            part = slice(start, start + _CHANNELS)
            filtered[:, part] = self._filter(values[:, part].contiguous())
        return filtered

    def _filter(self, values: torch.Tensor) -> torch.Tensor:
        table = _weighted_sums(values, self._points, self._point_shares, self._starts)  # (M + 1, K)
        for neighbours in self._neighbours:
            table = _weighted_sums(table, neighbours, self._blur_shares)
        return _weighted_sums(table, self._corners, self._corner_shares)  # (N, K)


def _weighted_sums(
    table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    # rows (n, m), or (n,) with the start of each sum
    return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)


def _simplices(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the simplex around each point (sections 3.1 and 3.2 of the paper).

    Every step, the deviation first, is rounded to float32 as in the C++ code: a point on the border of two simplices
    makes vertices in one of them only, and the other one gives probabilities that differ by up to 0.002.

    Args:
        features: (N, d).

    Returns:
        The simplex's vertex of remainder 0 (N, d + 1), int64; the coordinate in which each vertex is followed by the
        next (N, d), int64; the shares (barycentric coordinates) of its vertices (N, d + 1).
    """
    dimensions = features.shape[1]
    width = dimensions + 1
    deviation = torch.tensor(math.sqrt(2 / 3) * width, dtype=torch.float32).item()  # of splat, blur and slice together
    elevated = features.new_empty(len(features), width)
    total = features.new_zeros(len(features))
    for axis in range(dimensions, 0, -1):
        scaled = features[:, axis - 1] * (deviation / math.sqrt(axis * (axis + 1)))
        elevated[:, axis] = total - axis * scaled
        total = total + scaled
    elevated[:, 0] = total
    rounded = (elevated * (1 / width)).round_()
    closest = rounded * width
    # The coordinates' order by their distance from the closest multiple gives the simplex; multiples that do not sum
    # to zero lie off the lattice's plane and are corrected where the distances are largest.
    order = (elevated - closest).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(width, device=order.device).expand_as(order))
    ranks += rounded.sum(dim=1, keepdim=True).long()
    wrapped = (ranks < 0).int() - (ranks >= width).int()
    ranks += width * wrapped
    closest += width * wrapped
    distances = torch.empty_like(elevated).scatter_(1, ranks, (elevated - closest) * (1 / width))
    order.scatter_(1, ranks, torch.arange(width, device=order.device).expand_as(order))
    shares = torch.empty_like(elevated)
    shares[:, 0] = distances[:, -1] + (1 - distances[:, 0])
    shares[:, 1:] = (distances[:, :-1] - distances[:, 1:]).flip(1)
    return closest.long(), order[:, 1:].flip(1), shares


def _number(closest: torch.Tensor, coordinates: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Number the vertices so that neighbours along a direction differ by a constant.

    From a vertex the next one along direction j is reached by adding 1 to all coordinates and subtracting d + 1 from
    coordinate j. The coordinates sum to zero: all but the last are digits of the number.

    Args:
        closest: The simplices' vertices of remainder 0, (N, d + 1).
        coordinates: The directions from vertex to vertex, (N, d).

    Returns:
        The numbers of all vertices, (N, d + 1), and for each of the d + 1 directions the difference of neighbours.
    """
    width = closest.shape[1]
    low, high = closest.amin(dim=0), closest.amax(dim=0)
    # Vertices of a simplex lie up to d beside the first, and their neighbours up to d more.
    sizes = [int(size) + 4 * (width - 1) + 1 for size in (high - low)[:-1]]
    if math.prod(sizes) >= 2**62:
        raise ValueError(_TOO_FAR)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(width - 1)] + [0]
    steps = [sum(strides) - width * stride for stride in strides]
    codes = torch.empty_like(closest)
    codes[:, 0] = ((closest - low) * closest.new_tensor(strides)).sum(dim=1)
    codes[:, 1:] = closest.new_tensor(steps)[coordinates].cumsum_(dim=1) + codes[:, :1]
    return codes, steps


def _neighbours(vertices: torch.Tensor, step: int) -> torch.Tensor:
    """Rows (M + 1, 3) of each vertex and its two neighbours; M where there is none, and for the last row itself.

    Args:
        vertices: Numbers of the vertices, ascending, (M,).
        step: Difference of the neighbours' numbers.
    """
    count = len(vertices)
    rows = torch.full((count + 1, 3), count, dtype=torch.int32, device=vertices.device)
    rows[:, 0] = torch.arange(count + 1, device=vertices.device)
    wanted = vertices + step
    places = torch.searchsorted(vertices, wanted).clamp_(max=count - 1)
    found = (vertices[places] == wanted).nonzero()[:, 0]
    rows[found, 1] = places[found].int()
    rows[places[found], 2] = found.int()
    return rows
