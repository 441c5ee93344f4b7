"""Checkpoints that are pickles: leftovers of training are met, code is refused, torn files are told."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from hf_ctxseg.safe_pickle import StandIn, read_pickle
from hf_ctxseg.state_dict import find_state_dict, plain_text, read_checkpoint


def weights():
    return {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.ones(3)}


def save(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request):
    return request.param


@pytest.fixture
def foreign():
    """A package that is there while a checkpoint is written and gone when it is read."""
    module = types.ModuleType("mmengine_like")
    source = """
class History:
    def __init__(self):
        self.values = [1.0]
        self.mean = getattr(self, "average")
    def average(self):
        return 1.0
class ConfigDict(dict):
    pass
class Slotted:
    __slots__ = ("value",)
"""
    exec(source, module.__dict__)
    for name in ("History", "ConfigDict", "Slotted"):
        getattr(module, name).__module__ = module.__name__
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def test_leftovers_of_training_are_met_and_the_tensors_are_right(tmp_path, foreign, legacy):
    slotted = foreign.Slotted()
    slotted.value = 3
    content = {
        "state_dict": collections.OrderedDict(weights()),
        "hub": {"loss": foreign.History()},
        "cfg": foreign.ConfigDict(a=foreign.ConfigDict(b=1)),
        "slotted": slotted,
        "args": argparse.Namespace(lr=0.1, when=datetime.datetime(2024, 1, 1), out=pathlib.Path("x")),
        "score": np.float64(0.5),
        "history": np.arange(6.0).reshape(2, 3),
        "counts": collections.defaultdict(list, a=[1]),
        "last": collections.deque([1, 2], maxlen=5),
        "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9).state_dict(),
    }
    path = save(tmp_path / "epoch.pth", content, legacy)
    del sys.modules["mmengine_like"]
    found = read_pickle(path)
    assert "mmengine_like" not in sys.modules
    assert list(found) == list(content)
    for key, value in weights().items():
        assert torch.equal(found["state_dict"][key], value)
    for key in ("args", "score", "history"):
        assert isinstance(found[key], StandIn)
    assert isinstance(found["hub"]["loss"], StandIn)
    assert (found["cfg"], found["counts"], found["last"]) == ({"a": {"b": 1}}, {"a": [1]}, [1, 2])


class Calls:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    "payload",
    [
        lambda mark: Calls(os.system, f"touch {mark}"),
        lambda mark: Calls(eval, f"open({str(mark)!r}, 'w').close()"),
        lambda mark: Calls(exec, f"open({str(mark)!r}, 'w').close()"),
        lambda mark: Calls(open, str(mark), "w"),
        lambda mark: Calls(pathlib.Path.touch, mark),
        lambda mark: Calls(__import__("subprocess").check_call, ["touch", str(mark)]),
        lambda mark: Calls(torch.hub.load, str(mark.parent), "entry"),
        lambda mark: Calls(torch.load, str(mark)),
        lambda mark: Calls(np.save, str(mark), 1),
        lambda mark: Calls(__import__("timm").create_model, "resnet18"),
        lambda mark: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(mark)))),
        lambda mark: Calls(__import__("importlib").import_module, "antigravity"),
    ],
    ids=["os", "eval", "exec", "open", "touch", "subprocess", "hub", "load", "numpy", "timm", "pickle", "import"],
)
def test_pickles_with_code_are_refused_and_nothing_runs(tmp_path, payload, legacy):
    mark = tmp_path / "mark"
    path = save(tmp_path / "evil.pth", {"state_dict": weights(), "extra": payload(mark)}, legacy)
    mark.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"evil.pth is refused: .*Nothing of it was run.*save the state dict alone"):
        read_pickle(path)
    assert not mark.exists()


def test_getattr_which_histories_need_gives_nothing_that_can_be_called(tmp_path, legacy):
    path = save(tmp_path / "bound.pth", {"model": weights(), "x": Calls(getattr, "text", "upper")}, legacy)
    assert isinstance(read_pickle(path)["x"], StandIn)
    path = save(tmp_path / "bound.pth", {"model": weights(), "x": Calls("text".upper)}, legacy)
    with pytest.raises(ValueError, match=r"bound.pth is refused: .*Trying to call reduce"):
        read_pickle(path)


def test_objects_from_raw_opcodes_cannot_reach_what_is_allowed(tmp_path):
    """STACK_GLOBAL, INST and EXT reach functions without the opcode that is looked for."""
    for body in (b"\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", b"(S'ls'\nios\nsystem\n.", b"\x82\x01."):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + body)
            archive.writestr("a/version", b"3\n")
            archive.writestr("a/byteorder", b"little")
        (tmp_path / "raw.pth").write_bytes(buffer.getvalue())
        with pytest.raises(ValueError, match=r"raw.pth is no whole PyTorch checkpoint"):
            read_pickle(tmp_path / "raw.pth")


def test_views_and_shared_storages_stay_right(tmp_path, legacy):
    base = torch.arange(24.0)
    content = {"all": base, "part": base[4:10].reshape(2, 3), "turned": base.reshape(4, 6).t(), "same": base}
    path = save(tmp_path / "views.pth", content, legacy)
    found, notes = find_state_dict(read_pickle(path), "views.pth", path.stat().st_size)
    assert not notes
    assert all(torch.equal(found[key], value) for key, value in content.items())


def test_every_truncation_is_refused(tmp_path, legacy):
    path = save(tmp_path / "whole.pth", weights(), legacy)
    whole = path.read_bytes()
    torn = tmp_path / "torn.pth"
    for length in {0, 1, 2, 4, *range(8, len(whole), 37), len(whole) - 1}:
        torn.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"torn.pth is no whole PyTorch checkpoint"):
            read_pickle(torn)


def test_flipped_bytes_never_end_in_another_error(tmp_path, legacy):
    whole = bytearray(save(tmp_path / "whole.pth", weights(), legacy).read_bytes())
    path = tmp_path / "flipped.pth"
    refused = 0
    for position in range(0, min(len(whole), 900), 11):
        flipped = bytearray(whole)
        flipped[position] ^= 0x15
        path.write_bytes(flipped)
        try:
            find_state_dict(read_pickle(path), str(path), len(whole))
        except ValueError as error:
            assert "flipped.pth" in str(error)
            refused += 1
    assert refused > 10


class Claims:
    """A tensor of a size and stride that are not those of its storage."""

    def __init__(self, size, stride):
        self.size, self.stride = size, stride

    def __reduce__(self):
        arguments = (torch.ones(12).storage(), 0, self.size, self.stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(("size", "stride"), [((100,), (1,)), ((1 << 40,), (1,)), ((1 << 40, 3, 3, 3), (0, 0, 0, 0))])
def test_tensors_larger_than_the_file_are_refused(tmp_path, size, stride, legacy):
    path = save(tmp_path / "huge.pth", {"weight": Claims(size, stride)}, legacy)
    with pytest.raises(ValueError, match=r"huge.pth is (no whole PyTorch checkpoint|smaller than tensors)"):
        find_state_dict(read_pickle(path), str(path), path.stat().st_size)


def repacked(path, compression=zipfile.ZIP_STORED, **changed):
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(buffer, "w", compression) as other:
        for entry in archive.infolist():
            name = entry.filename.rpartition("/")[2]
            other.writestr(entry.filename, changed.get(name.replace(".", "_"), archive.read(entry)))
        for name, content in changed.items():
            if "__" in name:
                other.writestr(name.replace("__", "/"), content)
    path.write_bytes(buffer.getvalue())
    return path


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    path = save(tmp_path / "a.pth", weights())
    for changed, text in (
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed entries"),
        ({"b__data.pkl": b"."}, "no single data.pkl"),
        ({"a__constants.pkl": b"."}, "TorchScript"),
    ):
        save(path, weights())
        with pytest.raises(ValueError, match=text):
            read_pickle(repacked(path, **changed))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inner.pth", b"x")
    with pytest.raises(ValueError, match=r"no single data\.pkl"):
        read_pickle(path)
    for content in (b"<!DOCTYPE html>", b"\x89PNG\r\n", struct.pack("<Q", 1 << 60), pickle.dumps(weights())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no whole PyTorch checkpoint"):
            read_pickle(path)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.register_buffer("grid", torch.ones(2), persistent=False)
        self.double()


def test_modules_that_were_pickled_whole_give_their_state_dict(tmp_path):
    network = Network()
    path = save(tmp_path / "best.pth", nn.DataParallel(network))
    found, notes = find_state_dict(read_pickle(path), "best.pth", path.stat().st_size)
    expected = network.state_dict()
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[key].double(), expected[key].double()) for key in expected)
    assert [note.split()[0] for note in notes] == ["The", "Stored"]  # prefix, double precision


def found_in(content, **options):
    return find_state_dict(content, "FILE", 10**6, **options)


def test_state_dicts_are_found_in_what_wraps_them():
    plain, average = weights(), {key: value + 1 for key, value in weights().items()}
    for key in ("state_dict", "model_state_dict", "model", "net"):
        tensors, notes = found_in({key: plain, "epoch": 3, "optimizer": {"state": {}}})
        assert torch.equal(tensors["layer.weight"], plain["layer.weight"]) and list(tensors) == list(plain)
        assert notes == [f"Weights from the entry {key!r} of the checkpoint."]
    tensors, notes = found_in({"model": plain, "ema": average})
    assert torch.equal(tensors["layer.weight"], average["layer.weight"])
    assert notes == ["Weights from the entry 'ema' of the checkpoint; not taken: model."]
    tensors, _ = found_in({"model": plain, "ema": average}, entry="model")
    assert torch.equal(tensors["layer.weight"], plain["layer.weight"])
    # mmengine's hook puts the average into state_dict when it saves.
    tensors, _ = found_in({"meta": {}, "state_dict": average, "ema_state_dict": plain})
    assert torch.equal(tensors["layer.weight"], average["layer.weight"])
    with pytest.raises(ValueError, match=r"FILE has no state dict in an entry 'nets': it has model, ema"):
        found_in({"model": plain, "ema": average}, entry="nets")
    for nothing in ({"epoch": 3, "args": [1]}, [plain], torch.ones(2), {}, None, {"state_dict": {}}):
        with pytest.raises(ValueError, match="FILE holds no state dict"):
            found_in(nothing)


def test_prefixes_of_wrappers_are_taken_off():
    wrapped = {f"module._orig_mod.model.{key}": value for key, value in weights().items()}
    tensors, notes = found_in({"n_averaged": torch.tensor(3), **wrapped})
    assert list(tensors) == list(weights()) and len(notes) == 3
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(found_in(mixed)[0]) == list(mixed)


def test_half_precision_becomes_float32():
    tensors, notes = found_in({"bn.weight": torch.full((2,), 0.5).half(), "bn.num_batches_tracked": torch.tensor(3)})
    assert {key: value.dtype for key, value in tensors.items()} == {
        "bn.weight": torch.float32,
        "bn.num_batches_tracked": torch.int64,
    }
    assert notes == ["Stored as torch.float16, given as float32."]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor([1.0, float("nan")]), r"NaN or infinite values in 1 tensors \(layer.odd\)"),
        (torch.tensor([float("-inf")]), "NaN or infinite"),
        (torch.eye(3).to_sparse(), "sparse, quantised or complex"),
        (torch.ones(2, dtype=torch.complex64), "sparse, quantised or complex"),
        (torch.ones(2, device="meta"), "or none at all"),
    ],
)
def test_c8_what_is_no_plain_number_is_refused(value, text):
    with pytest.raises(ValueError, match=f"FILE holds .*{text}"):
        found_in({**weights(), "layer.odd": value})


def test_c6_torn_safetensors_are_refused_by_name(tmp_path):
    path = tmp_path / "torn.safetensors"
    for content in (b"", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"torn.safetensors is no whole safetensors file"):
            read_checkpoint(path)


def test_texts_of_a_checkpoint_become_one_line():
    assert plain_text("a\nb\x1b[31m  c\u202e") == "a b [31m c"
