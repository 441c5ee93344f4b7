"""State dicts that a training loop saved: under names of its own, beside tensors that are no network's."""

import functools

import pytest
import torch
from torch import nn

from hf_ctxseg.safe_pickle import StandIn, read_pickle
from hf_ctxseg.state_dict import MARKS, find_state_dict

MARK = MARKS["smp"][0]


def network(prefix=""):
    names = (MARK, "encoder.conv1.weight", "decoder.aspp.0.weight")
    return {f"{prefix}{name}": torch.full((2,), float(value)) for value, name in enumerate(names)}


def found_in(content, size=10**6):
    return find_state_dict(content, "FILE", size)


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x}], ids=["plain", "entry"])
def test_counters_without_weights_are_refused(wrap):
    with pytest.raises(ValueError, match="FILE holds counters of an average, but no weights"):
        found_in(wrap({"n_averaged": torch.tensor(1)}))


@pytest.mark.parametrize(
    "beside",
    [{"mean": torch.ones(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, {"criterion.weight": torch.ones(21)}],
    ids=["smp's example", "criterion"],
)
@pytest.mark.parametrize("prefix", ["model.", "_forward_module.", "_forward_module.model.", "segmentation_model."])
def test_a_network_among_other_tensors_is_taken_alone(prefix, beside):
    tensors, notes = found_in({"state_dict": {**beside, **network(prefix)}, "epoch": 3})
    assert same(tensors, network())
    assert notes[1:] == [
        f"The prefix {prefix!r} was taken from the network's names; left out, as no part of the network: "
        f"{len(beside)} tensors ({', '.join(beside)})."
    ]


def test_a_prefix_of_the_users_own_is_taken_off():
    tensors, notes = found_in(network("module.segmentation_model."))
    assert same(tensors, network())
    assert notes == [
        "The prefix 'module.' was taken from every name.",
        "The prefix 'segmentation_model.' was taken from every name.",
    ]


@pytest.mark.parametrize("kind", MARKS)
def test_networks_of_every_kind_are_found(kind):
    for mark in MARKS[kind]:
        tensors, _ = found_in({f"wrapped.{mark}": torch.ones(1), "loss.weight": torch.ones(1)})
        assert list(tensors) == [mark]
        plain = {mark: torch.ones(1), "loss.weight": torch.ones(1)}
        assert list(found_in(plain)[0]) == list(plain)  # the converter tells what is too much


def test_two_networks_are_refused():
    with pytest.raises(ValueError, match=r"holds 2 networks, under 'student\.', 'teacher\.': save the state dict"):
        found_in({**network("student."), **network("teacher.")})
    with pytest.raises(ValueError, match=r"holds 2 networks, under 'model\.', 'model\.teacher\.'"):
        found_in({**network("model."), **network("model.teacher."), "loss.weight": torch.ones(1)})


def test_names_of_a_file_reach_the_notes_as_one_line():
    _, notes = found_in({**network("a\x1b[31m."), "b\nc": torch.ones(1)})
    assert len(notes) == 1 and notes[0].isprintable()


def test_entries_that_are_none_are_left_out():
    tensors, notes = found_in({"state_dict": {**network(), "criterion.weight": None}})
    assert same(tensors, network()) and len(notes) == 1


def test_views_that_would_fill_the_memory_are_refused(tmp_path):
    base = torch.zeros(1 << 20, dtype=torch.float16)
    path = tmp_path / "views.pth"
    torch.save({f"layer{index}.weight": base.view(-1) for index in range(2000)}, path)
    assert path.stat().st_size < 3_000_000
    with pytest.raises(ValueError, match=r"its 2000 tensors, which share them, would take 4194304000: save"):
        found_in(read_pickle(path), path.stat().st_size)


def test_tied_weights_are_no_such_views(tmp_path):
    base = torch.ones(1 << 20)
    path = tmp_path / "tied.pth"
    torch.save({"a.weight": base, "b.weight": base}, path)
    tensors, _ = found_in(read_pickle(path), path.stat().st_size)
    assert torch.equal(tensors["b.weight"], base)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_whole_files_of_other_protocols_are_told_so(tmp_path, protocol, legacy):
    path = tmp_path / "new.pth"
    torch.save(network(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=rf"is whole, but was saved with pickle protocol {protocol}, which is not"):
        read_pickle(path)


def test_partial_functions_are_leftovers(tmp_path):
    path = tmp_path / "partial.pth"
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    torch.save({"state_dict": network(), "norm": norm}, path)
    assert isinstance(read_pickle(path)["norm"], StandIn)
    torch.save({"state_dict": network(), "norm": functools.partial(eval, "1")}, path)
    with pytest.raises(ValueError, match=r"is refused: .*Nothing of it was run"):
        read_pickle(path)
