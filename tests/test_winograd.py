"""Winograd's filtering gives what the plain convolution gives, with no larger rounding error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hf_ctxseg import fast_conv, winograd
from hf_ctxseg.fast_conv import FastConv2d, use_fast_convs
from hf_ctxseg.winograd import winograd_conv


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, 5),
    st.sampled_from([1, 200, 1 << 22]),
    st.sampled_from([16, 100, 1 << 22]),
    st.booleans(),
)
def test_equals_the_plain_convolution(shape, outputs, block, large, turned):
    torch.manual_seed(sum(shape))
    x = channels_last(torch.randn(shape, dtype=torch.float64))
    weight = torch.randn(outputs, shape[1], 3, 3, dtype=torch.float64)
    before = (x.clone(), weight.clone())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_HELD", 1)
        patch.setattr(winograd, "_HELD_VALUES", block)
        patch.setattr(winograd, "_LARGE", large)
        found = winograd_conv(x, channels_last(weight) if turned else weight)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=1e-10, atol=1e-12)
    assert found.permute(0, 2, 3, 1).is_contiguous()
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 20)])
def test_wide_convolutions_take_it_in_inference_alone(rate, size, monkeypatch):
    torch.manual_seed(0)
    taken = []
    monkeypatch.setattr(fast_conv, "winograd_conv", lambda *given: taken.append(1) or winograd_conv(*given))
    net = nn.Sequential(nn.Conv2d(256, 256, 3, padding=rate, dilation=rate))
    use_fast_convs(net)
    assert type(net[0]) is FastConv2d
    x = channels_last(torch.randn(2, 256, *size))
    exact = F.conv2d(x.double(), net[0].weight.double(), net[0].bias.double(), padding=rate, dilation=rate)
    with torch.inference_mode():
        found = net(x)
        plain = F.conv2d(x, net[0].weight, net[0].bias, padding=rate, dilation=rate)
    assert taken == [1]
    assert (found - exact).abs().max() <= 1.5 * (plain - exact).abs().max()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert net(x).requires_grad
    assert taken == [1]


def test_it_is_left_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(fast_conv, "winograd_conv", None)
    cases = [
        (256, 256, 1, (8, 8)),  # few blocks
        (256, 128, 1, (40, 40)),  # narrow
        (256, 256, 6, (40, 40)),  # much padding
        (256, 256, 4, (17, 33)),  # blocks that stand out
    ]
    for channels, outputs, rate, size in cases:
        conv = FastConv2d(channels, outputs, 3, padding=rate, dilation=rate).requires_grad_(False)
        x = channels_last(torch.randn(1, channels, *size))
        torch.testing.assert_close(
            conv(x), F.conv2d(x, conv.weight, conv.bias, padding=rate, dilation=rate), rtol=1e-4, atol=1e-5
        )
