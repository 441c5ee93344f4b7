"""The pooled branch of DeepLabV3's head: its window, its norm, its dropout."""

import aspp_formulas
import pytest
import torch
from deeplabv3_helpers import head_of, model_of
from torch import nn
from torch.nn import functional as F

from hf_ctxseg import ASPP, DeepLabV3Model
from hf_ctxseg.aspp import ImagePooling

VARIANTS = ("paper", "mmseg", "torchvision", "plain")


def test_dropout_within_the_pyramid_drops_single_values(live):
    layer = live(ASPP(12, 16, (1, 2), dropout=0.5))
    x = torch.randn(2, 12, 9, 11)
    with torch.no_grad():
        kept = layer(x)
        layer.dropout.train()
        dropped = layer(x)
    assert ((dropped == 0) | torch.isclose(dropped, 2 * kept)).all()
    lost = (dropped == 0) & (kept > 0)
    assert lost.sum() / (kept > 0).sum() == pytest.approx(0.5, abs=0.05)
    whole_channels = lost.flatten(2).any(2) & ~((dropped > 0).flatten(2).any(2))
    assert whole_channels.sum() < kept.flatten(2).any(2).sum() / 4


@pytest.mark.parametrize(
    ("window", "stride", "cells"),
    [(None, 16, None), (513, 16, (33, 33)), ([513, 512], 16, (33, 32)), ((513, 1), 8, (65, 1)), (16, 32, (1, 1))],
)
def test_pooling_window_in_cells(tiny, window, stride, cells):
    config = tiny(pooling_window=window, output_stride=stride)
    assert config.window_cells == cells
    model = DeepLabV3Model(config)
    assert model.decode_head.aspp.image_pooling.window == cells


def sliding_mean(x, window):
    rows, columns = x.shape[2] - window[0] + 1, x.shape[3] - window[1] + 1
    means = [
        x[:, :, row : row + window[0], column : column + window[1]].mean(dim=(2, 3))
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(means, dim=2).unflatten(2, (rows, columns))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("window", [(3, 2), (1, 1), (7, 4), (2, 9)])
def test_window_pooling_is_the_resized_sliding_mean(live, window, align_corners):
    torch.manual_seed(0)
    aspp = ASPP(12, 16, (1, 2), pooling_window=window, align_corners=align_corners)
    layer = live(aspp).image_pooling
    x = torch.randn(2, 12, 7, 9)
    pooled = aspp_formulas.conv_norm_relu(aspp.state_dict(), sliding_mean(x, window), "image_pooling")
    expected = F.interpolate(pooled, (7, 9), mode="bilinear", align_corners=align_corners)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.flatten(2).std(dim=2).max() > 0.01


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_window_over_the_whole_map_is_global_pooling(live, norm):
    torch.manual_seed(0)
    windowed = live(ImagePooling(12, 16, (8, 20), norm))
    whole = ImagePooling(12, 16, None, norm).eval()
    whole.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 12, 7, 9)
    with torch.inference_mode():
        torch.testing.assert_close(windowed(x), whole(x), rtol=1e-4, atol=1e-5)


def test_head_pools_over_the_window_of_its_config(live, tiny):
    config = tiny(pooling_window=[40, 17], variant="plain")
    head = head_of(live, config)
    layer = head.aspp.image_pooling
    assert (layer.window, layer.align_corners) == ((3, 2), True)
    x = torch.randn(1, 12, 7, 9)
    with torch.inference_mode():
        assert layer(x).flatten(2).std(dim=2).max() > 0.01  # not one feature for all positions


def test_n7_a_window_exports_for_pictures_larger_than_it(tiny, live):
    model = live(model_of(tiny(pooling_window=[40, 17], atrous_rates=[1], nonlocal_mode="embedded_gaussian")))
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 3, 65, 97),), dynamic_shapes={"pixel_values": sizes})
        x = torch.randn(3, 3, 97, 49)
        torch.testing.assert_close(exported.module()(x)["logits"], model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "groups"), [(256, 32), (512, 32), (48, 2), (16, 2), (7, 1)])
def test_group_norm_of_the_pooled_branch_is_its_formula(width, groups):
    torch.manual_seed(0)
    layer = ImagePooling(12, width, norm="group", norm_eps=1e-3)
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    x = torch.randn(2, 12, 7, 9)
    y = F.conv2d(x.mean(dim=(2, 3), keepdim=True), layer.conv.weight).view(2, groups, -1)
    mean, variance = y.mean(dim=2, keepdim=True), y.var(dim=2, keepdim=True, unbiased=False)
    y = ((y - mean) / torch.sqrt(variance + 1e-3)).view(2, width, 1, 1)
    expected = (y * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]).clamp(min=0)
    torch.testing.assert_close(layer(x), expected.expand(-1, -1, 7, 9), rtol=1e-4, atol=1e-5)
    assert set(layer.state_dict()) == {"conv.weight", "norm.weight", "norm.bias"}


def test_without_a_norm_the_pooled_branch_has_a_bias():
    torch.manual_seed(0)
    layer = ImagePooling(12, 16, norm="none")
    x = torch.randn(2, 12, 7, 9)
    expected = F.conv2d(x.mean(dim=(2, 3), keepdim=True), layer.conv.weight, layer.conv.bias).clamp(min=0)
    torch.testing.assert_close(layer(x), expected.expand(-1, -1, 7, 9))
    assert set(layer.state_dict()) == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize(("norm", "independent"), [("batch", False), ("group", True), ("none", True)])
def test_pool_norm_and_the_other_pictures_of_a_batch(norm, independent):
    torch.manual_seed(0)
    layer = ImagePooling(12, 16, norm=norm).train()
    x = torch.randn(3, 12, 7, 9)
    assert torch.allclose(layer(x)[:1], layer(torch.cat([x[:1], 5 * x[1:]]))[:1], atol=1e-6) is independent


@pytest.mark.parametrize("pool_norm", ["batch", "group", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_n1_one_picture_trains_every_variant(tiny, variant, pool_norm):
    model = model_of(tiny(variant=variant, pool_norm=pool_norm, nonlocal_mode="gaussian", atrous_rates=[1])).train()
    loss = model(torch.rand(1, 3, 47, 61), torch.randint(0, 3, (1, 47, 61))).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_running_statistics_move_by_the_stated_share():
    # The share is torch's: TensorFlow's decay 0.9997 is 3e-4.
    torch.manual_seed(0)
    layer = ASPP(12, 16, (1, 2), norm_momentum=3e-2).train()
    before = {key: value.normal_().abs_().clone() for key, value in layer.state_dict().items() if "running" in key}
    x = torch.randn(4, 12, 7, 9)
    layer(x)
    inputs = {
        "branches.0": F.conv2d(x, layer.branches[0].conv.weight),
        "branches.2": F.conv2d(x, layer.branches[2].conv.weight, padding=2, dilation=2),
        "image_pooling": F.conv2d(x.mean(dim=(2, 3), keepdim=True), layer.image_pooling.conv.weight),
    }
    for name, y in inputs.items():
        for statistic, batch in (("mean", y.mean(dim=(0, 2, 3))), ("var", y.var(dim=(0, 2, 3)))):
            key = f"{name}.norm.running_{statistic}"
            expected = 0.97 * before[key] + 0.03 * batch
            torch.testing.assert_close(layer.state_dict()[key], expected, rtol=1e-4, atol=1e-6)
