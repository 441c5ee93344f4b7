"""Checkpoints that TensorFlow's `Saver` writes, read without TensorFlow.

A tensor bundle is `PREFIX.index`, a sorted table in LevelDB's file format whose values are protocol buffers
(tensorflow/core/protobuf/tensor_bundle.proto), and the raw values in `PREFIX.data-00000-of-00001`, or in several such
shards. Nothing in either is executed, and no length that a file states is believed before the file is that long.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER = 48  # two block handles, zeros, the magic number
_BLOCK_TRAILER = 5  # kind of compression, checksum
# Far above what networks need; an index beyond them would only fill the memory.
_MOST_BYTES, _MOST_TENSORS, _LONGEST_NAME = 1 << 24, 1 << 16, 1 << 10

# DataType of tensorflow/core/framework/types.proto.
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: DataType, shape, number of the shard, offset and size in bytes, masked CRC-32C."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    is_sliced: bool


class TFCheckpoint(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, each read and checked when it is asked for.

    Args:
        path: Prefix of the bundle (`…/model.ckpt-30000`), one of its files, or a folder that holds one bundle or names
            one in its file `checkpoint`.

    Attributes:
        prefix: Path of the bundle without the endings of its files.
        entries: Where each tensor lies.

    Raises:
        ValueError: If there is no bundle, a file is damaged or cut off, or the checkpoint is of a kind that is not
            read: the older format of one file, a compressed table, big-endian values.
    """

    def __init__(self, path: str | Path) -> None:
        self.prefix = find_bundle(Path(path))
        index = self.prefix.with_name(f"{self.prefix.name}.index")
        try:
            self.entries, self._shards = _read_index(index)
        except (IndexError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{index} is damaged: its table ends within a value. Fetch the checkpoint again."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor, in TensorFlow's layout; raises `ValueError` if its shard is missing or damaged."""
        entry = self.entries[name]
        if entry.dtype not in _DTYPES or entry.is_sliced:
            kind = "is stored in parts" if entry.is_sliced else f"has TensorFlow's data type {entry.dtype}"
            raise ValueError(
                f"The tensor {name!r} of {self.prefix} {kind}, which is not read: expected whole numbers."
            )
        dtype = np.dtype(_DTYPES[entry.dtype])
        if prod(entry.shape) * dtype.itemsize != entry.size:
            raise ValueError(
                f"The tensor {name!r} of {self.prefix} takes {entry.size} bytes, which contradicts its shape "
                f"{list(entry.shape)} of {dtype.itemsize} bytes a value: fetch the checkpoint again."
            )
        shard = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05d}-of-{self._shards:05d}")
        if not shard.is_file():
            raise ValueError(f"The tensor {name!r} lies in {shard}, which does not exist: put all files side by side.")
        if entry.offset + entry.size > shard.stat().st_size:
            raise ValueError(
                f"{shard} has {shard.stat().st_size} bytes, but the tensor {name!r} ends at byte "
                f"{entry.offset + entry.size}: the file is cut off, fetch it again."
            )
        data = np.fromfile(shard, np.uint8, entry.size, offset=entry.offset)
        if _mask(crc32c(data)) != entry.checksum:
            raise ValueError(f"The values of {name!r} in {shard} do not fit their checksum: fetch the file again.")
        return torch.from_numpy(data.view(dtype).reshape(entry.shape))


def find_bundle(path: Path) -> Path:
    """Give the prefix of the bundle that a path means.

    Raises:
        ValueError: If there is none, or more than one, or what lies there is of another kind.
    """
    if path.is_dir():
        return _find_in_folder(path)
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    if shard := re.fullmatch(r"(.+)\.data-\d{5}-of-\d{5}", path.name):
        path = path.with_name(shard[1])
    if path.with_name(f"{path.name}.index").is_file():
        return path
    if not path.is_file():
        raise ValueError(
            f"There is no TensorFlow checkpoint {path}: {path.name}.index does not exist. Check the path."
        )
    with path.open("rb") as file:
        file.seek(-min(len(_MAGIC), path.stat().st_size), 2)
        if file.read() == _MAGIC:
            raise ValueError(
                f"{path} is a checkpoint in TensorFlow's older format of one file, which is not read: restore it with "
                "TensorFlow and save it again with tf.compat.v1.train.Saver."
            )
    raise ValueError(
        f"{path} is no TensorFlow checkpoint: give the prefix of PREFIX.index and PREFIX.data-00000-of-00001, or "
        "their folder (an archive has to be unpacked; a frozen graph, .pb, is not read)."
    )


def _find_in_folder(folder: Path) -> Path:
    prefixes = sorted(index.with_suffix("") for index in folder.glob("*.index"))
    record = folder / "checkpoint"
    if record.is_file() and record.stat().st_size < 1 << 20:
        named = re.search(r'^model_checkpoint_path:\s*"([^"]+)"', record.read_text(errors="replace"), re.MULTILINE)
        # The path is that of the computer which trained; the bundle lies beside the file.
        latest = folder / re.split(r"[/\\]", named[1])[-1] if named else folder
        if latest in prefixes:
            return latest
    if len(prefixes) == 1:
        return prefixes[0]
    found = ", ".join(prefix.name for prefix in prefixes[:5]) or "none"
    raise ValueError(
        f"{folder} must hold one TensorFlow checkpoint (PREFIX.index), but holds {found}: name the prefix."
    )


def _read_index(path: Path) -> tuple[dict[str, TensorEntry], int]:
    """Give the entries of an index and the number of shards."""
    size = path.stat().st_size
    if not _FOOTER <= size <= _MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes, but an index has {_FOOTER} to {_MOST_BYTES}: fetch it again.")
    table = path.read_bytes()
    if table[-len(_MAGIC) :] != _MAGIC:
        raise ValueError(
            f"{path} does not end as the index of a TensorFlow checkpoint does: it is cut off or something else."
        )
    entries: dict[str, TensorEntry] = {}
    header: dict[int, list[int | bytes]] | None = None
    _, place = _handle(table, size - _FOOTER)  # of the block of further information, which is empty
    end = 0
    for _, handle in _block(table, _handle(table, place)[0], path):
        (offset, size), _ = _handle(handle, 0)
        if offset < end:
            raise ValueError(f"{path} names a block twice: it is damaged, fetch it again.")
        end = offset + size
        for key, value in _block(table, (offset, size), path):
            if len(entries) == _MOST_TENSORS:
                raise ValueError(f"{path} lists more than {_MOST_TENSORS} tensors: it is no checkpoint of a network.")
            fields = _fields(value)
            if header is None:
                if key:
                    raise ValueError(
                        f"{path} does not begin with the header of a tensor bundle: it is something else."
                    )
                header = fields
            else:
                entries[key.decode()] = _entry(fields, key, path)
    if header is None:
        raise ValueError(f"{path} is an empty table, without the header of a tensor bundle.")
    shards = _number(header, 1)
    if _number(header, 2) or not 1 <= shards < 100_000:
        order = "big-endian values" if _number(header, 2) else f"{shards} shards"
        raise ValueError(
            f"{path} states {order}, which is not read: expected little-endian values in 1 shard or more."
        )
    return entries, shards


def _entry(fields: dict[int, list[int | bytes]], key: bytes, path: Path) -> TensorEntry:
    shape = _fields(_bytes(fields, 2))
    sizes = tuple(_number(_fields(dim), 1) for dim in shape.get(2, []) if isinstance(dim, bytes))
    dtype, shard, offset, size, checksum = (_number(fields, number) for number in (1, 3, 4, 5, 6))
    if any(value >= 1 << 63 for value in (*sizes, shard, offset, size)) or len(sizes) > 32:
        raise ValueError(f"{path} gives {key.decode()!r} a negative size or place, or {len(sizes)} dimensions.")
    return TensorEntry(dtype, sizes, shard, offset, size, checksum, 7 in fields)


def _block(table: bytes, handle: tuple[int, int], path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Give the keys and values of a block; a key says how much of the one before it begins with."""
    offset, size = handle
    end = offset + size
    if end + _BLOCK_TRAILER > len(table) - _FOOTER:
        raise ValueError(f"{path} has a block that ends at byte {end} of {len(table)}: it is damaged, fetch it again.")
    if table[end]:
        raise ValueError(f"{path} is compressed, which is not read: restore it and save it again with TensorFlow.")
    (checksum,) = struct.unpack_from("<I", table, end + 1)
    if _mask(crc32c(np.frombuffer(table, np.uint8, size + 1, offset))) != checksum:
        raise ValueError(f"{path} has a block that does not fit its checksum: it is damaged, fetch it again.")
    block = table[offset:end]
    (restarts,) = struct.unpack_from("<I", block, size - 4)
    key, place, stop = b"", 0, size - 4 * (restarts + 1)
    if stop < 0:
        raise ValueError(f"{path} has a block of {size} bytes that states {restarts} restarts: it is damaged.")
    while place < stop:
        shared, place = _varint(block, place)
        added, place = _varint(block, place)
        length, place = _varint(block, place)
        if shared > len(key) or shared + added > _LONGEST_NAME or place + added + length > stop:
            raise ValueError(f"{path} has a name of {shared + added} bytes, or one beyond its block: it is damaged.")
        key = key[:shared] + block[place : place + added]
        place += added + length
        yield key, block[place - length : place]


def _handle(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    """Read offset and size of a block, and give where they end."""
    offset, place = _varint(data, place)
    size, place = _varint(data, place)
    return (offset, size), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise IndexError("a number without an end")


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """Give the values of a protocol buffer by the numbers of its fields."""
    fields: dict[int, list[int | bytes]] = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        value: int | bytes
        if tag & 7 == 0:
            value, place = _varint(message, place)
        elif tag & 7 == 2:
            length, place = _varint(message, place)
            value = message[place : place + length]
            place += length
        elif tag & 7 in (1, 5):
            length = 8 if tag & 7 == 1 else 4
            value = int.from_bytes(message[place : place + length], "little")
            place += length
        else:
            raise IndexError("a field of unknown kind")
        if place > len(message):
            raise IndexError("a field beyond its message")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], number: int) -> int:
    value = fields.get(number, [0])[-1]  # a field that is 0 is left out
    if not isinstance(value, int):
        raise IndexError("text where a number belongs")
    return value


def _bytes(fields: dict[int, list[int | bytes]], number: int) -> bytes:
    value = fields.get(number, [b""])[-1]
    if not isinstance(value, bytes):
        raise IndexError("a number where text belongs")
    return value


def _mask(checksum: int) -> int:
    """Disguise a checksum as the formats store it, so that checksums of data with checksums in it stay useful."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _byte_table() -> NDArray[Any]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _byte_table()
_ONES = np.frombuffer(b"Td\x1fd", np.uint8)  # what brings a register of zeros to the ones that it starts with


def crc32c(data: NDArray[Any]) -> int:
    """CRC-32C (Castagnoli polynomial, RFC 3720) of an array of bytes (N,).

    The bytes are cut into equal rows that advance side by side; being linear, the checksums of two neighbouring rows
    become that of both after the first has advanced by as many zeros as the second has bytes.
    """
    padded = np.concatenate([_ONES, data])
    rows = 1 << min(14, max(0, len(padded).bit_length() - 5))
    length = -(-len(padded) // rows)
    columns = np.zeros(rows * length, np.uint8)
    columns[len(columns) - len(padded) :] = padded  # zeros before the first one leave the register at zero
    columns = np.ascontiguousarray(columns.reshape(rows, length).T)  # (length, rows)
    register = np.zeros(rows, np.uint32)
    shift = np.uint32(1) << np.arange(32, dtype=np.uint32)  # what `length` zeros make of each bit
    for column in columns:
        register = _TABLE[(register ^ column) & 255] ^ register >> 8
        shift = _TABLE[shift & 255] ^ shift >> 8
    while len(register) > 1:
        register = _apply(shift, register[::2]) ^ register[1::2]
        shift = _apply(shift, shift)
    return int(register[0]) ^ 0xFFFFFFFF


def _apply(images: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Map 32-bit words (N,) by a linear function that is given by what it makes of each bit (32,)."""
    bits = values[:, None] >> np.arange(32, dtype=np.uint32) & 1  # (N, 32)
    mapped: NDArray[Any] = np.bitwise_xor.reduce(bits * images, axis=1)
    return mapped
