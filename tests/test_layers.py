import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_ctxseg.layers import BatchNorm2d, ConvNormAct, resize_like


def trained_norm(norm_class, channels=5):
    norm = norm_class(channels, eps=1e-3, momentum=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    return norm


def test_n1_one_value_per_channel_uses_the_running_statistics():
    norm = trained_norm(BatchNorm2d).train()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(1, 5, 1, 1)
    expected = (x[0, :, 0, 0] - norm.running_mean) / (norm.running_var + 1e-3).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x)[0, :, 0, 0], expected)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_n1_one_value_per_channel_gives_gradients():
    norm = trained_norm(BatchNorm2d).train()
    x = torch.randn(1, 5, 1, 1, requires_grad=True)
    norm(x).sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0, 0], norm.weight / (norm.running_var + 1e-3).sqrt())
    torch.testing.assert_close(norm.bias.grad, torch.ones(5))


def test_n1_one_value_per_channel_is_warned_about_once(caplog):
    norm = BatchNorm2d(5).train()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            norm(torch.randn(1, 5, 1, 1))
    assert [record.message for record in caplog.records if "one value per channel" in record.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (1, 5, 1, 2), (3, 5, 4, 7)])
def test_otherwise_it_is_torchs_layer(shape, training):
    ours, theirs = (trained_norm(norm_class).train(training) for norm_class in (BatchNorm2d, nn.BatchNorm2d))
    for _ in range(2):
        x = torch.randn(shape)
        assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (3, 2), (3, 18), (5, 3)])
def test_conv_norm_act_is_the_three_functions_at_the_same_size(kernel_size, dilation):
    layer = ConvNormAct(4, 6, kernel_size, dilation, norm_eps=1e-3, norm_momentum=0.25)
    layer.norm = trained_norm(BatchNorm2d, 6)
    assert layer.conv.bias is None
    x = torch.randn(2, 4, 9, 12)
    y = F.conv2d(x, layer.conv.weight, padding=dilation * (kernel_size // 2), dilation=dilation)
    norm = layer.norm
    for training in (False, True):
        layer.train(training)
        y_norm = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0, norm.eps)
        output = layer(x)
        assert output.shape == (2, 6, 9, 12)
        torch.testing.assert_close(output, y_norm.clamp(min=0))


def test_conv_norm_act_passes_on_the_constants_of_its_norm():
    layer = ConvNormAct(4, 6, norm_eps=1e-3, norm_momentum=0.25).train()
    assert layer.norm.eps == 1e-3
    x = torch.randn(2, 4, 9, 12)
    layer(x)
    torch.testing.assert_close(layer.norm.running_mean, 0.25 * layer.conv(x).mean(dim=(0, 2, 3)))


def bilinear(plane, size, align_corners):
    """Bilinear interpolation of one plane, pixel by pixel."""
    height, width = plane.shape
    result = np.empty(size)
    for row in range(size[0]):
        for column in range(size[1]):
            places = []
            for index, old, new in ((row, height, size[0]), (column, width, size[1])):
                place = index * (old - 1) / max(new - 1, 1) if align_corners else (index + 0.5) * old / new - 0.5
                places.append(min(max(place, 0), old - 1))
            (top, left), (y, x) = map(int, places), (place % 1 for place in places)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = plane[top, left] * (1 - x) + plane[top, right] * x
            below = plane[bottom, left] * (1 - x) + plane[bottom, right] * x
            result[row, column] = above * (1 - y) + below * y
    return result


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(7, 11), (1, 1), (3, 9), (4, 2)])
def test_resize_like_interpolates_bilinearly(size, align_corners):
    maps = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    resized = resize_like(maps, size, align_corners)
    for channel in range(2):
        expected = bilinear(maps[0, channel].numpy(), size, align_corners)
        np.testing.assert_allclose(resized[0, channel].numpy(), expected, atol=1e-12)


def test_resize_like_leaves_a_map_of_that_size():
    maps = torch.randn(1, 2, 3, 4)
    assert resize_like(maps, (3, 4)) is maps
    assert resize_like(maps, maps.shape[-2:], align_corners=True) is maps
