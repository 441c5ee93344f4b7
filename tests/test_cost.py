import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_ctxseg import (
    DeepLabV3Config,
    DeepLabV3ForSemanticSegmentation,
    NonLocalConfig,
    NonLocalForSemanticSegmentation,
)
from hf_ctxseg.cost import count_gmacs, measure_cost


class Net(nn.Module):
    """A grouped convolution and a product of matrices; what it does besides is the test's."""

    def __init__(self, besides=lambda x: None):
        super().__init__()
        self.config = SimpleNamespace(num_channels=4)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.besides = besides

    def forward(self, x):
        self.besides(x)
        logits = self.conv(x)  # (1, 6, H, W)
        flat = logits.flatten(2)
        return SimpleNamespace(logits=logits + (flat @ flat.transpose(1, 2)).mean())  # of (1, 6, 6)


def test_multiply_accumulates_are_those_of_the_formulas():
    height, width = 10, 7
    convolution, product = 6 * (4 // 2) * 9 * height * width, 6 * 6 * height * width
    assert count_gmacs(Net(), height, width) == pytest.approx((convolution + product) / 1e9)


def test_fast_forms_are_counted_as_the_formulas_that_they_stand_for(monkeypatch):
    torch.manual_seed(0)
    config = NonLocalConfig(backbone="test_resnet", hidden_size=16, nonlocal_mode="dot_product")
    model = NonLocalForSemanticSegmentation(config).eval()
    counted = count_gmacs(model, 96, 64)
    monkeypatch.setitem(os.environ, "CTXSEG_PLAIN", "1")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 96, 64))
    assert counted == pytest.approx(counter.get_total_flops() / 2e9)


def test_what_torch_cannot_count_is_none():
    assert count_gmacs(Net(lambda x: x.sum().item()), 8, 8) is None


def test_a_model_is_measured_and_left_as_it_was(caplog):
    config = DeepLabV3Config(backbone="test_resnet", hidden_size=16, output_stride=8)
    model = DeepLabV3ForSemanticSegmentation(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = measure_cost(model, [33, (48, 64)])
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not caplog.records  # of rates that reach over the whole map, which is no news here
    assert cost["dtype"] == "float32" and cost["threads"] == torch.get_num_threads() and cost["smallest_edge"] == 1
    assert [(row["height"], row["width"]) for row in cost["sizes"]] == [(33, 33), (48, 64)]
    assert all(row["gmacs"] > 0 and row["milliseconds"] > 0 for row in cost["sizes"])


def test_peak_memory_is_what_the_pass_holds_at_once():
    """Of two blocks one after the other the larger counts, not their sum."""

    def hold(x):
        for mebibytes in (40, 96, 40):
            torch.ones(mebibytes, 2**18)

    (row,) = measure_cost(Net(hold), [8])["sizes"]
    assert 96 <= row["peak_mib"] < 96.1


def test_peak_memory_does_not_depend_on_what_was_freed_before():
    found = []
    for used in (0, 64):
        held = [torch.ones(2**18) for _ in range(used)]
        del held[::2]  # holes of a mebibyte
        (row,) = measure_cost(Net(lambda x: [torch.ones(mib, 2**18) for mib in (3, 5)]), [8])["sizes"]
        found.append(row["peak_mib"])
    assert found[0] == found[1]


def test_at_the_end_of_a_training_a_size_that_does_not_fit_is_left_out():
    def refuse(x):
        if x.shape[2] > 8:
            raise torch.OutOfMemoryError("no room")

    assert [row["height"] for row in measure_cost(Net(refuse), [8, 16], seconds=60)["sizes"]] == [8]
    with pytest.raises(RuntimeError, match="no room"):
        measure_cost(Net(refuse), [8, 16])


def test_sizes_that_would_take_too_long_are_left_out():
    assert [row["height"] for row in measure_cost(Net(), [4, 5, 6], seconds=0)["sizes"]] == [4]
    assert len(measure_cost(Net(), [4, 5, 6], seconds=60)["sizes"]) == 3


def test_the_smallest_picture_is_found():
    def refuse(x):
        if min(x.shape[2:]) < 5:
            raise ValueError("too small")

    assert measure_cost(Net(refuse), [8])["smallest_edge"] == 8


def test_no_size_is_refused():
    with pytest.raises(ValueError, match="sizes is empty"):
        measure_cost(Net(), [])


@pytest.mark.parametrize("size", [0, (8, 0), (8, 8, 8)])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match=r"sizes holds .* must be an edge"):
        measure_cost(Net(), [size])
