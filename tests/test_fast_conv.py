"""Every way to compute an atrous convolution gives what the plain one gives, forward and backward."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hf_ctxseg import fast_conv
from hf_ctxseg.fast_conv import FastConv2d, use_fast_convs

FUNCTIONS = ("_TapByTap", "_RowByRow", "_InTiles")


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def build(depthwise, size, rate, bias, channels=4):
    groups = channels if depthwise else 1
    out = channels if depthwise else 3
    pad = rate * (size // 2)
    return FastConv2d(channels, out, size, padding=pad, dilation=rate, groups=groups, bias=bias).double()


def plain(conv, x):
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def gradients(output, inputs):
    return torch.autograd.grad(
        output, inputs, torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    )


@pytest.fixture
def used(monkeypatch):
    """Which of the ways were taken, in order."""
    names = []
    for name in FUNCTIONS:
        function = getattr(fast_conv, name)

        def apply(*args, _function=function, _name=name):
            names.append(_name)
            return _function.apply(*args)

        monkeypatch.setattr(fast_conv, name, type(name, (), {"apply": staticmethod(apply)}))
    return names


@settings(max_examples=120, deadline=None)
@given(
    st.booleans(),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 9),
    st.booleans(),
    st.tuples(st.integers(1, 2), st.integers(1, 11), st.integers(1, 11)),
    st.booleans(),
)
def test_equals_the_plain_convolution(depthwise, size, rate, bias, shape, trains):
    torch.manual_seed(sum(shape))
    conv = build(depthwise, size, rate, bias).requires_grad_(trains)
    x = channels_last(torch.randn(shape[0], 4, *shape[1:], dtype=torch.float64)).requires_grad_(trains)
    found, expected = conv(x), plain(conv, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if trains:
        inputs = [x, *conv.parameters()]
        torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "depthwise, size, rate, way",
    [(False, 3, 5, "_TapByTap"), (True, 3, 6, "_RowByRow"), (True, 3, 2, "_InTiles"), (True, 5, 2, "_InTiles")],
)
def test_gradcheck_and_a_clear_error_on_a_second_derivative(depthwise, size, rate, way, used):
    conv = build(depthwise, size, rate, True)
    x = channels_last(torch.randn(1, 4, 5, 7, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: conv(x), (x, *conv.parameters()))
    assert set(used) == {way}
    for total in (conv(x).sin().sum(), conv(x).sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total, x, create_graph=True)


def test_a_backward_within_autocast_keeps_float32():
    torch.manual_seed(0)
    conv = build(False, 3, 5, False).float()
    x = channels_last(torch.randn(1, 4, 9, 11)).requires_grad_()
    output, expected = conv(x), gradients(plain(conv, x), [x, conv.weight])
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(output, [x, conv.weight])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_export_with_the_channels_last_takes_other_sizes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([FastConv2d(4, 4, 3, padding=5, dilation=5), build(True, 3, 6, True).float()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    net = Net().eval()
    sizes = {"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    program = torch.export.export(net, (channels_last(torch.randn(1, 4, 16, 24)),), dynamic_shapes=sizes)
    x = torch.randn(1, 4, 31, 19)
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("trains", [False, True])
def test_a_large_kernel_in_pieces_gives_the_same(trains, monkeypatch):
    monkeypatch.setattr(fast_conv, "_LARGE", 50)
    monkeypatch.setattr(fast_conv, "_OUTPUTS", 2)
    for rate in (1, 5):
        conv = build(False, 3, rate, True).requires_grad_(trains)
        x = channels_last(torch.randn(2, 4, 6, 7, dtype=torch.float64)).requires_grad_(trains)
        found, expected = conv(x), plain(conv, x)
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)
        if trains:
            inputs = [x, *conv.parameters()]
            torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


def test_only_what_needs_a_gradient_gets_one():
    for depthwise, rate in ((False, 5), (True, 6), (True, 2)):
        conv = build(depthwise, 3, rate, False)
        x = channels_last(torch.randn(1, 4, 7, 8, dtype=torch.float64))
        (expected,) = gradients(plain(conv, x), [conv.weight])
        torch.testing.assert_close(gradients(conv(x), [conv.weight])[0], expected)
        x.requires_grad_()
        (expected,) = gradients(plain(conv, x), [x])
        conv.requires_grad_(False)
        torch.testing.assert_close(gradients(conv(x), [x])[0], expected)


@pytest.mark.parametrize("rate, size, way", [(6, 3, "_RowByRow"), (12, 5, "_RowByRow"), (4, 5, "_InTiles")])
def test_float32_errs_no_more_than_the_plain_convolution(rate, size, way, used):
    torch.manual_seed(0)
    conv = build(True, size, rate, True, channels=16)
    x = channels_last(torch.randn(2, 16, 19, 23, dtype=torch.float64))
    exact = plain(conv, x)
    conv, x = conv.float(), x.float()
    with torch.no_grad():
        assert (conv(x) - exact).abs().max() <= 1.5 * (plain(conv, x) - exact).abs().max()
    assert used == [way]


def test_the_plain_way_is_taken_where_the_others_do_not_apply(used):
    x = torch.randn(1, 4, 9, 9)
    others = [
        (nn.Conv2d(4, 4, 3, padding=5, dilation=6, groups=4), channels_last(x)),
        (nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4, stride=2), channels_last(x)),
        (nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=2), channels_last(x)),
        (nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4, padding_mode="circular"), channels_last(x)),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=6, groups=4), channels_last(x)),
        (nn.Conv2d(4, 4, (3, 1), padding=(6, 0), dilation=6, groups=4), channels_last(x)),
        (nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4), x),
        (nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4).bfloat16(), channels_last(x.bfloat16())),
        (nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4), channels_last(x)[0]),
        (nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=4), channels_last(x[:0])),
    ]
    for conv, pixels in others:
        expected = conv(pixels)
        use_fast_convs(conv)
        assert type(conv) is FastConv2d
        assert torch.equal(conv(pixels), expected)
    conv = build(True, 3, 6, False).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(channels_last(x)).dtype is torch.bfloat16
    assert used == []


def test_outputs_and_gradients_keep_the_channels_last():
    for depthwise, rate in ((False, 5), (True, 6), (True, 2)):
        conv = build(depthwise, 3, rate, True)
        x = channels_last(torch.randn(2, 4, 7, 8, dtype=torch.float64)).requires_grad_()
        output = conv(x)
        output.sum().backward()
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_changed_network_keeps_names_and_can_be_copied_and_pickled():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)}))
    keys = list(net.state_dict())
    use_fast_convs(net)
    assert list(net.state_dict()) == keys
    assert [type(net[0]), type(net[1]["a"])] == [FastConv2d, nn.Conv2d]
    x = channels_last(torch.randn(1, 4, 5, 5))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other[0]) is FastConv2d
        assert torch.equal(other[0](x), net[0](x))
