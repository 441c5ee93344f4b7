"""Decoded pictures kept in memory that all workers share, as many as a budget holds.

Decoding a JPEG photo and its PNG label map takes longer than cropping them. The cache is filled once, before training,
and read only afterwards, so that it needs no locks; what does not fit is decoded each time.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

CHUNK = 1 << 26  # bytes of a block of shared memory, each of which holds a file open
_SHARED = Path("/dev/shm")

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, with its axes in the order of memory: kernels round differently by memory format."""

    chunk: int
    start: int
    shape: torch.Size
    dtype: torch.dtype
    axes: tuple[int, ...]


class PictureCache:
    """Images and label maps, read from shared memory.

    Args:
        count: Number of samples.
        read: Gives image uint8 (3, H, W) and label map (H, W) of a sample.
        budget: Bytes to use at most.

    Raises:
        ValueError: If shared memory has no room for the budget, or a sample cannot be read.
    """

    def __init__(self, count: int, read: Callable[[int], Pair], budget: int) -> None:
        self.allocated = 0  # bytes
        self._left = budget
        self._chunks: list[torch.Tensor] = []
        self._room = 0  # in the newest chunk
        self._places: list[tuple[_Place, _Place]] = []
        self._fill(count, read)

    def __len__(self) -> int:
        """Number of samples held: the first ones."""
        return len(self._places)

    def _fill(self, count: int, read: Callable[[int], Pair]) -> None:
        threads = min(16, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, count, threads):
                for pair in pool.map(read, range(start, min(start + threads, count))):
                    if not self._put(pair):
                        return

    def _put(self, pair: Pair) -> bool:
        needed = sum(_padded(tensor) for tensor in pair)
        if needed > self._room and not self._add_chunk(needed):
            return False
        self._places.append((self._store(pair[0]), self._store(pair[1])))
        return True

    def _add_chunk(self, needed: int) -> bool:
        if needed > self._left:
            return False
        size = max(needed, min(CHUNK, self._left))
        if _SHARED.is_dir() and (free := shutil.disk_usage(_SHARED).free) < size:
            raise ValueError(
                f"The picture cache needs {size / 2**20:.0f} MiB more shared memory, but {_SHARED} has "
                f"{free / 2**20:.0f} MiB free: lower --cache_gib, or give the container more (docker: --shm-size)."
            )
        self._chunks.append(torch.empty(size, dtype=torch.uint8).share_memory_())  # type: ignore[no-untyped-call]
        self.allocated += size
        self._left -= size
        self._room = size
        return True

    def _store(self, tensor: torch.Tensor) -> _Place:
        chunk = self._chunks[-1]
        start = len(chunk) - self._room
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
        flat = tensor.permute(order).contiguous()
        chunk[start : start + _size(tensor)] = flat.view(-1).view(torch.uint8)
        self._room -= _padded(tensor)
        axes = tuple(order.index(axis) for axis in range(tensor.dim()))
        return _Place(len(self._chunks) - 1, start, flat.shape, tensor.dtype, axes)

    def get(self, index: int) -> Pair | None:
        """Image and label map of a sample, copies of one's own; None if it is not held."""
        if index >= len(self._places):
            return None
        image, mask = self._places[index]
        return self._load(image), self._load(mask)

    def _load(self, place: _Place) -> torch.Tensor:
        size = place.shape.numel() * place.dtype.itemsize
        copy = self._chunks[place.chunk][place.start : place.start + size].clone()
        return copy.view(place.dtype).view(place.shape).permute(place.axes)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _padded(tensor: torch.Tensor) -> int:
    return (_size(tensor) + 7) // 8 * 8  # so that a tensor of any type may follow
