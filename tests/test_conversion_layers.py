"""Layers of other code bases by themselves, against their formulas written out with torch's own layers."""

import pytest
import torch
from peer_helpers import TOLERANCE, difference, make_peer
from torch import nn
from torch.nn import functional as F

from hf_ctxseg import NonLocal1d, NonLocal2d, NonLocal3d
from hf_ctxseg.conversion_layers import aspp_from_state_dict, nonlocal_from_state_dict

RATES = (2, 3)


def conv_norm(channels, width, size, rate, bias):
    layers = nn.Conv2d(channels, width, size, padding=rate * (size // 2), dilation=rate, bias=bias)
    return nn.Sequential(layers, nn.BatchNorm2d(width, eps=1e-3), nn.ReLU())


class CopiedPyramid(nn.Module):
    """The often copied module: branches of their own names, a bias before every normalisation."""

    def __init__(self, channels=5, width=4):
        super().__init__()
        self.branch1 = conv_norm(channels, width, 1, 1, bias=True)
        for branch, rate in enumerate(RATES, start=2):
            self.add_module(f"branch{branch}", conv_norm(channels, width, 3, rate, bias=True))
        pooling = conv_norm(channels, width, 1, 1, bias=True)
        self.branch4_conv, self.branch4_bn = pooling[0], pooling[1]
        self.conv_cat = conv_norm(4 * width, width, 1, 1, bias=True)

    def forward(self, x):
        pooled = F.relu(self.branch4_bn(self.branch4_conv(x.mean(dim=(2, 3), keepdim=True))))
        pooled = F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=True)
        return self.conv_cat(torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), pooled], dim=1))


class CountedPyramid(nn.Module):
    """torchvision's arrangement."""

    def __init__(self, channels=5, width=4):
        super().__init__()
        self.convs = nn.ModuleList([conv_norm(channels, width, 1, 1, bias=False)])
        self.convs.extend(conv_norm(channels, width, 3, rate, bias=False) for rate in RATES)
        self.convs.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm(channels, width, 1, 1, bias=False)))
        self.project = conv_norm(4 * width, width, 1, 1, bias=False)

    def forward(self, x):
        branches = [branch(x) for branch in self.convs]
        return self.project(torch.cat([branch.expand(-1, -1, *x.shape[2:]) for branch in branches], dim=1))


class NamedPyramid(nn.Module):
    """The arrangement of pytorch-deeplab-xception."""

    def __init__(self, channels=5, width=4):
        super().__init__()
        for branch, rate in enumerate((0, *RATES), start=1):
            conv, norm, _ = conv_norm(channels, width, 3 if rate else 1, rate or 1, bias=False)
            self.add_module(f"aspp{branch}", nn.ModuleDict({"atrous_conv": conv, "bn": norm}))
        self.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm(channels, width, 1, 1, bias=False))
        self.conv1, self.bn1, _ = conv_norm(4 * width, width, 1, 1, bias=False)

    def forward(self, x):
        branches = [F.relu(part["bn"](part["atrous_conv"](x))) for part in (self.aspp1, self.aspp2, self.aspp3)]
        branches.append(self.global_avg_pool(x).expand(-1, -1, *x.shape[2:]))
        return F.relu(self.bn1(self.conv1(torch.cat(branches, dim=1))))


@pytest.mark.parametrize("pyramid", [CopiedPyramid, CountedPyramid, NamedPyramid])
def test_a_pyramid_gives_the_same(pyramid):
    generator = torch.Generator().manual_seed(2)
    peer = make_peer(pyramid, torch.randn(3, 5, 9, 8, generator=generator))
    aspp = aspp_from_state_dict(peer.state_dict(), atrous_rates=RATES, norm_eps=1e-3, norm_momentum=0.2).eval()
    assert aspp.projection.norm.momentum == 0.2
    assert not any(name.endswith("conv.bias") for name, _ in aspp.named_parameters())
    for size in [(8, 6), (9, 9), (3, 17)]:
        x = torch.randn(1, 5, *size, generator=generator)
        with torch.no_grad():
            assert difference(aspp(x), peer(x)) <= TOLERANCE, size
            aspp.projection.norm.running_mean += 0.1  # what a lost bias would do
            assert difference(aspp(x), peer(x)) > 3 * TOLERANCE
            aspp.projection.norm.running_mean -= 0.1


def test_a_pyramid_with_another_number_of_rates_is_refused():
    tensors = CountedPyramid().state_dict()
    with pytest.raises(ValueError, match=r"no place for 5 tensors .*convs\.3\.2"):
        aspp_from_state_dict(tensors, atrous_rates=(6, 12, 18))
    with pytest.raises(ValueError, match=r"needs a tensor 'branches\.0\.conv\.weight'"):
        aspp_from_state_dict({}, atrous_rates=RATES)


class PlainNonLocal(nn.Module):
    """Blocks in the names of Non-local_pytorch; pooling as an own layer after g and phi."""

    def __init__(self, mode, dimensions, pooled, norm, channels=6, width=3):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        pool = (nn.MaxPool1d(2), nn.MaxPool2d(2), nn.MaxPool3d((1, 2, 2)))[dimensions - 1]
        bn = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.mode = mode
        self.g = conv(channels, width, 1)
        if mode != "gaussian":
            self.theta, self.phi = conv(channels, width, 1), conv(channels, width, 1)
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * width, 1, 1, bias=False), nn.ReLU())
        if pooled:
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if mode == "gaussian" else nn.Sequential(self.phi, pool)
        self.W = conv(width, channels, 1)
        if norm:
            self.W = nn.Sequential(self.W, bn(channels))

    def forward(self, x):
        g = self.g(x).flatten(2).transpose(1, 2)  # (B, K, width)
        theta = (x if self.mode == "gaussian" else self.theta(x)).flatten(2)  # (B, C, N)
        phi = (self.phi(x) if hasattr(self, "phi") else x).flatten(2)  # (B, C, K)
        if self.mode == "concatenation":
            pairs = torch.cat(
                [
                    theta[..., None].expand(-1, -1, -1, phi.shape[2]),
                    phi[:, :, None].expand(-1, -1, theta.shape[2], -1),
                ],
                dim=1,
            )
            weights = self.concat_project(pairs)[:, 0] / phi.shape[2]
        else:
            weights = theta.transpose(1, 2) @ phi
            weights = weights / phi.shape[2] if self.mode == "dot_product" else weights.softmax(dim=-1)
        y = (weights @ g).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
        return self.W(y) + x


@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_plain_non_local_block_gives_the_same(dimensions, pooled, mode):
    for norm in (False, True):
        generator = torch.Generator().manual_seed(3)
        sizes = [(4, 6, 8), (3, 5, 7)]
        peer = make_peer(
            lambda norm=norm: PlainNonLocal(mode, dimensions, pooled, norm),
            torch.randn(2, 6, *sizes[0][-dimensions:], generator=generator),
        )
        block = nonlocal_from_state_dict(peer.state_dict(), mode=mode).eval()
        assert type(block) is (NonLocal1d, NonLocal2d, NonLocal3d)[dimensions - 1]
        assert (block.sub_sample, block.norm is not None) == (pooled, norm)
        for size in sizes:
            x = torch.randn(1, 6, *size[-dimensions:], generator=generator)
            with torch.no_grad():
                assert difference(block(x), peer(x)) <= TOLERANCE


def nonlocal_tensors(dimensions, sub_sample, norm=True):
    block = (NonLocal1d, NonLocal2d, NonLocal3d)[dimensions - 1](7, reduction=3, norm="batch" if norm else None)
    names = {"norm": "conv_out.bn", "g": "g.0.conv" if sub_sample else "g.conv"}
    names["phi"] = "phi.0.conv" if sub_sample else "phi.conv"
    return {
        f"{names.get(layer, f'{layer}.conv')}.{rest}": torch.randn(value.shape) if value.dim() else value
        for layer, _, rest, value in ((*key.partition("."), value) for key, value in block.state_dict().items())
    }


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_block_of_mmcv_tells_what_it_is(dimensions):
    for sub_sample in (False, True):
        for norm in (False, True):
            tensors = nonlocal_tensors(dimensions, sub_sample, norm)
            block = nonlocal_from_state_dict(tensors, mode="dot_product", norm_eps=1e-3)
            assert type(block) is (NonLocal1d, NonLocal2d, NonLocal3d)[dimensions - 1]
            assert (block.sub_sample, block.mode, block.g.weight.shape[:2]) == (sub_sample, "dot_product", (2, 7))
            assert torch.equal(block.phi.weight, tensors["phi.0.conv.weight" if sub_sample else "phi.conv.weight"])
            assert block.norm.eps == 1e-3 if norm else block.norm is None


@pytest.mark.parametrize(
    ("change", "mode", "text"),
    [
        ({}, "gaussian", "not those of a non-local block of mode 'gaussian'"),
        ({}, "concatenation", "not those of a non-local block of mode 'concatenation'"),
        ({"g.conv.weight": torch.ones(2, 7)}, "dot_product", "3 to 5 dimensions"),
        ({"g.0.conv.weight": torch.ones(2, 7, 1, 1)}, "dot_product", "no place for 1 tensors .*g.0.conv"),
        ({"gate.conv.weight": torch.ones(2, 7)}, "dot_product", "no place for 1 tensors .*gate"),
    ],
)
def test_tensors_of_another_block_are_refused(change, mode, text):
    with pytest.raises(ValueError, match=text):
        nonlocal_from_state_dict(nonlocal_tensors(2, sub_sample=False) | change, mode=mode)
