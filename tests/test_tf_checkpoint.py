"""The reader of TensorFlow's checkpoints: against one that TensorFlow wrote, and against a writer of our own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tf_bundles import HEADER, MAGIC, block, masked, number, plain_crc32c, table, text, varint, write_bundle

from hf_ctxseg.tf_checkpoint import TFCheckpoint, crc32c

FIXTURE = Path(__file__).parent / "fixtures" / "tf_bundle_tiny"  # by TensorFlow 2.21, in two shards
TENSORS = {
    "a/weights": np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3),
    "a/weights_2": np.array(7, np.int64),
    "b/empty": np.zeros((2, 0), np.float16),
}


def values(shape, step, dtype):
    return torch.from_numpy((np.arange(np.prod(shape)).reshape(shape) * step - 1).astype(dtype))


def test_what_tensorflow_wrote_is_read():
    checkpoint = TFCheckpoint(FIXTURE)
    expected = {
        "global_step": torch.tensor(30000),
        "net/conv/BatchNorm/gamma": values((4,), 0.5, "f4"),
        "net/conv/depthwise_weights": values((3, 3, 2, 1), 0.125, "f2"),
        "net/conv/weights": values((3, 3, 2, 4), 0.25, "f4"),
        "net/conv/weights/Momentum": values((3, 3, 2, 4), 0, "f4"),
        "net/double": values((2,), 0.5, "f8"),
    }
    assert list(checkpoint) == sorted(expected) and len(checkpoint) == 6
    for name, value in expected.items():
        assert checkpoint[name].dtype == value.dtype and torch.equal(checkpoint[name], value), name
    assert checkpoint.entries["net/conv/weights"].shape == (3, 3, 2, 4)


@pytest.mark.parametrize(
    "name", ["", "model.ckpt-30000", "model.ckpt-30000.index", "model.ckpt-30000.data-00001-of-00002"]
)
def test_a_checkpoint_is_found_by_its_folder_prefix_or_file(name):
    assert TFCheckpoint(FIXTURE / name).prefix == FIXTURE / "model.ckpt-30000"


def test_checksums_of_the_standard():
    # RFC 3720, B.4.
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA
    assert crc32c(np.full(32, 255, np.uint8)) == 0x62A8AB43
    assert crc32c(np.arange(32, dtype=np.uint8)) == 0x46DD794E


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=600))
def test_checksums_of_any_length(data):
    assert crc32c(np.frombuffer(data, np.uint8)) == plain_crc32c(data)


@pytest.mark.parametrize("one_block", [True, False])
def test_a_written_bundle_is_read(tmp_path, one_block):
    checkpoint = TFCheckpoint(write_bundle(tmp_path, TENSORS, one_block=one_block))
    assert list(checkpoint) == list(TENSORS)
    for name, value in TENSORS.items():
        assert torch.equal(checkpoint[name], torch.from_numpy(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": number(1, 1) + number(2, 1)}, "big-endian"),
        ({"header": number(1, 200_000)}, "200000 shards"),
        ({"header": b""}, "0 shards"),
        ({"kind": 1}, "compressed"),
        ({"shape": (1 << 63,)}, "negative size"),
        ({"shape": (1,) * 33}, "33 dimensions"),
        ({"more": b"\x0b"}, "damaged"),
        ({"more": text(1, b"x")}, "damaged"),
    ],
)
def test_an_index_that_cannot_be_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        TFCheckpoint(write_bundle(tmp_path, TENSORS, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (1 << 40, 1 << 20)}, "takes 24 bytes, which contradicts"),
        ({"size": 1 << 50, "shape": (1 << 48,)}, "cut off"),
        ({"dtype": 8}, "data type 8"),
        ({"more": text(7, b"")}, "in parts"),
        ({"shard": 3}, "data-00003-of-00001, which does not exist"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path, change, message):
    checkpoint = TFCheckpoint(write_bundle(tmp_path, TENSORS, **change))
    with pytest.raises(ValueError, match=message):
        checkpoint["a/weights"]
    assert checkpoint["a/weights_2"].item() == 7


def read_all(path):
    return {name: value for name, value in TFCheckpoint(path).items()}


@pytest.mark.parametrize("file", ["model.index", "model.data-00000-of-00001"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, file):
    prefix = write_bundle(tmp_path, TENSORS)
    whole = (tmp_path / file).read_bytes()
    for length in range(len(whole)):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.(index|data)"):
            read_all(prefix)


def test_a_changed_byte_is_noticed_or_does_not_matter(tmp_path):
    prefix = write_bundle(tmp_path, TENSORS)
    missed = 0
    for file in ("model.index", "model.data-00000-of-00001"):
        whole = (tmp_path / file).read_bytes()
        for place in range(len(whole)):
            for bits in (1, 128, 255):
                changed = bytearray(whole)
                changed[place] ^= bits
                (tmp_path / file).write_bytes(changed)
                try:
                    found = read_all(prefix)
                except ValueError:
                    continue
                missed += 1
                assert found.keys() == TENSORS.keys()
                assert all(torch.equal(found[name], torch.from_numpy(value)) for name, value in TENSORS.items())
        (tmp_path / file).write_bytes(whole)
    assert missed <= 3 * (len(block([])) + 40)  # in the block of further information, and the zeros before the end


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 60))
def test_any_block_is_refused_or_read(tmp_path_factory, content, first, second):
    """Whatever stands between sound checksums, only a ValueError comes out."""
    folder = tmp_path_factory.mktemp("any")
    made = content + b"\0"
    made += masked(made)
    footer = varint(first) + varint(second) + varint(0) + varint(len(content))
    (folder / "model.index").write_bytes(made + footer.ljust(40, b"\0") + MAGIC)
    with pytest.raises(ValueError, match=r"model\.index"):
        TFCheckpoint(folder / "model")


def test_what_would_fill_the_memory_is_refused(tmp_path):
    items = [(b"", HEADER), (b"x" * 2000, b"")]
    (tmp_path / "model.index").write_bytes(table([items]))
    with pytest.raises(ValueError, match="name of 2000 bytes"):
        TFCheckpoint(tmp_path)
    one = block([(b"", HEADER)])
    handle = varint(0) + varint(len(one) - 5)
    twice = block([(b"a", handle), (b"b", handle)], shared=False)
    footer = varint(0) + varint(0) + varint(len(one)) + varint(len(twice) - 5)
    (tmp_path / "model.index").write_bytes(one + twice + footer.ljust(40, b"\0") + MAGIC)
    with pytest.raises(ValueError, match="names a block twice"):
        TFCheckpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none"):
        TFCheckpoint(tmp_path)
    with pytest.raises(ValueError, match=r"model\.index does not exist"):
        TFCheckpoint(tmp_path / "model")
    (tmp_path / "frozen.pb").write_bytes(b"")
    with pytest.raises(ValueError, match=r"frozen graph, \.pb, is not read"):
        TFCheckpoint(tmp_path / "frozen.pb")
    (tmp_path / "old.ckpt").write_bytes(table([[(b"", b"")]]))
    with pytest.raises(ValueError, match="older format of one file"):
        TFCheckpoint(tmp_path / "old.ckpt")
    (tmp_path / "empty.index").write_bytes(table([[]]))
    with pytest.raises(ValueError, match="empty table"):
        TFCheckpoint(tmp_path)
    with (tmp_path / "empty.index").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="1073741824 bytes"):
        TFCheckpoint(tmp_path)


def test_a_folder_with_several_checkpoints_needs_a_name(tmp_path):
    write_bundle(tmp_path, TENSORS)
    for file in list(tmp_path.iterdir()):
        (tmp_path / file.name.replace("model", "other")).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="holds model, other: name the prefix"):
        TFCheckpoint(tmp_path)
    record = tmp_path / "checkpoint"
    record.write_text('model_checkpoint_path: "../../other"\n')  # never left: only the name counts
    assert TFCheckpoint(tmp_path).prefix == tmp_path / "other"
    record.write_text('model_checkpoint_path: "gone"\n')
    with pytest.raises(ValueError, match="name the prefix"):
        TFCheckpoint(tmp_path)
