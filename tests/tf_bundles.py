"""A writer of TensorFlow's tensor bundles, and the parts that they are made of."""

import struct

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
DTYPES = {"float32": 1, "int64": 9, "float16": 19}


def plain_crc32c(data):
    """Bit by bit, after RFC 3720."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(data, crc32c=plain_crc32c):
    checksum = crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def number(field, value):
    return varint(field << 3) + varint(value) if value else b""


def text(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


HEADER = number(1, 1) + text(3, number(1, 1))  # one shard, version 1


def block(items, shared=True, kind=0):
    data, before = b"", b""
    for key, value in items:
        common = 0
        while shared and common < min(len(key), len(before)) and key[common] == before[common]:
            common += 1
        data += varint(common) + varint(len(key) - common) + varint(len(value)) + key[common:] + value
        before = key
    data += struct.pack("<II", 0, 1) + bytes([kind])
    return data + masked(data)


def table(blocks, kind=0):
    """A sorted table of LevelDB's format: blocks of items, and the block that says where they are."""
    data, handles = b"", []
    for items in blocks:
        made = block(items, kind=kind)
        handles.append((items[-1][0] if items else b"", varint(len(data)) + varint(len(made) - 5)))
        data += made
    meta = block([])
    index = block(handles, shared=False)
    footer = varint(len(data)) + varint(len(meta) - 5)
    footer += varint(len(data) + len(meta)) + varint(len(index) - 5)
    return data + meta + index + footer.ljust(40, b"\0") + MAGIC


def entry(value, offset, crc32c, shard=0, **changes):
    fields = {"dtype": DTYPES[value.dtype.name], "size": value.nbytes, "shape": value.shape, "more": b""} | changes
    shape = b"".join(text(2, number(1, edge)) for edge in fields["shape"])
    message = number(1, fields["dtype"]) + text(2, shape) + number(3, shard) + number(4, offset)
    return message + number(5, fields["size"]) + b"\x35" + masked(value.tobytes(), crc32c) + fields["more"]


def write_bundle(folder, tensors, header=HEADER, one_block=True, kind=0, crc32c=plain_crc32c, **changes):
    """Write `model.index` and its one shard, and give the prefix; what changes is stated of the first tensor."""
    items, offset = [(b"", header)], 0
    with (folder / "model.data-00000-of-00001").open("wb") as shard:
        for name, value in sorted(tensors.items()):
            items.append((name.encode(), entry(value, offset, crc32c, **changes)))
            offset += shard.write(value.tobytes())
            changes = {}
    (folder / "model.index").write_bytes(table([items] if one_block else [[item] for item in items], kind))
    return folder / "model"
