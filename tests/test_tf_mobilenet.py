import copy

import pytest
import timm
import torch
from tflite_writer import same_padding
from torch import nn
from torch.nn import functional as F

from hf_ctxseg import CtxSegImageProcessor, DeepLabV3Config, DeepLabV3ForSemanticSegmentation, DeepLabV3PlusConfig
from hf_ctxseg.backbone import DilatedBackbone, reachable_strides
from hf_ctxseg.modeling_deeplabv3plus import DeepLabV3PlusForSemanticSegmentation
from hf_ctxseg.tf_mobilenet import fit_channels

SMALL = {"channel_multiplier": 0.25, "channel_divisor": 1}
# arXiv 1801.04381, table 2: expansion, blocks, stride of the first one.
STAGES = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))


def model(stride=16, plus=False, **fields):
    torch.manual_seed(0)
    fields = {"backbone": "mobilenetv2_tf", "backbone_kwargs": SMALL, "output_stride": stride, **fields}
    fields |= {"hidden_size": 16, "atrous_rates": [], "num_labels": 3}
    if plus:
        return DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(**fields)).eval()
    return DeepLabV3ForSemanticSegmentation(DeepLabV3Config(**fields)).eval()


def randomise(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.001, 2)  # of the order of the epsilon too, which then counts
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.5)


def reference(weights, x, output_stride):
    """The network by slim's description, from the tensors alone: the deepest map and that of layer_4."""

    def unit(conv, norm, x, stride=1, rate=1, act=True, depthwise=False):
        weight = weights[f"{conv}.weight"]
        padding = same_padding(x.shape[2:], weight.shape[2], stride, rate)
        x = F.conv2d(F.pad(x, padding), weight, None, stride, 0, rate, x.shape[1] if depthwise else 1)
        mean, variance, scale, shift = (
            weights[f"{norm}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (variance + 0.001).sqrt() * scale + shift
        return x.clamp(0, 6) if act else x

    x = unit("conv_stem", "bn1", x, stride=2)
    reached, rate, low = 2, 1, None
    for stage, (expansion, blocks, native) in enumerate(STAGES):
        for block in range(blocks):
            place, stride, applied = f"blocks.{stage}.{block}", native if block == 0 else 1, rate
            if stride > 1 and reached == output_stride:
                rate, stride = rate * stride, 1
            reached *= stride
            y = x
            if expansion > 1:
                y = unit(f"{place}.conv_pw", f"{place}.bn1", y)
                y = unit(f"{place}.conv_dw", f"{place}.bn2", y, stride, applied, depthwise=True)
                low = y if (stage, block) == (1, 1) else low
                y = unit(f"{place}.conv_pwl", f"{place}.bn3", y, act=False)
            else:
                y = unit(f"{place}.conv_dw", f"{place}.bn1", y, stride, applied, depthwise=True)
                y = unit(f"{place}.conv_pw", f"{place}.bn2", y, act=False)
            x = y + x if block > 0 else y
    return x, low


@pytest.mark.parametrize("size", [(33, 33), (48, 70), (65, 34)])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_trap_26_it_computes_what_slim_does_at_even_and_odd_sizes(stride, size):
    net = model(stride, plus=True).model.backbone
    randomise(net)
    net.double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        low, deepest = net(x)
        expected, expected_low = reference(net._backbone.state_dict(), x, stride)
    assert torch.allclose(deepest, expected, rtol=0, atol=1e-9)
    assert torch.allclose(low, expected_low, rtol=0, atol=1e-9)


def test_trap_26_timms_own_network_differs_at_even_sizes_alone():
    net = model(8, backbone_kwargs={}).model.backbone._backbone
    own = timm.create_model("mobilenetv2_100", features_only=True, output_stride=8, bn_eps=1e-3).eval()
    own.load_state_dict(net.state_dict())
    with torch.no_grad():
        for size, alike in ((65, True), (64, False)):
            x = torch.randn(1, 3, size, size)
            assert torch.allclose(net(x)[-1], own(x)[-1], atol=1e-5) is alike


def test_strides_and_channels_are_those_of_the_paper():
    levels = reachable_strides("mobilenetv2_tf")
    assert list(levels) == [8, 16, 32]
    assert levels[32].channels == (16, 144, 32, 96, 320) and levels[32].reductions == (2, 4, 8, 16, 32)


def test_constants_of_the_normalisation_are_tensorflows():
    net = DilatedBackbone(DeepLabV3Config(backbone="mobilenetv2_tf"))
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.003)}
    assert CtxSegImageProcessor.for_backbone("mobilenetv2_tf").image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("plus", [False, True])
def test_a_saved_model_opens_with_the_same_outputs(tmp_path, plus):
    saved = model(8, plus)
    randomise(saved)
    saved.save_pretrained(tmp_path)
    opened = type(saved).from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 50, 37)
    with torch.no_grad():
        assert torch.equal(opened(x).logits, saved(x).logits)
    assert opened.config.backbone_kwargs == SMALL


def test_initial_weights_are_those_of_timm():
    """Normal with the deviation sqrt(2 / fan_out) of each group, not the 0.02 of transformers."""
    net = model(backbone_kwargs={}).model.backbone._backbone
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name


@pytest.mark.parametrize("plus", [False, True])
def test_checkpointing_gives_the_same_gradients(plus):
    plain = model(8, plus).train()
    saving = copy.deepcopy(plain)
    saving.model.backbone._backbone.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 40, 40)
    for net in (plain, saving):
        torch.manual_seed(1)
        net(x).logits.square().mean().backward()
    gradients = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name].grad, atol=1e-6), name


def test_a_nonlocal_block_is_refused_where_the_low_level_map_is_taken_and_works_elsewhere():
    with pytest.raises(ValueError, match="cannot be changed"):
        model(backbone_nonlocal_stages=[4])
    assert model(backbone_nonlocal_stages=[8])(torch.rand(1, 3, 40, 40)).logits.shape == (1, 3, 3, 3)


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((32, 16, 24, 32, 64, 96, 160, 320), (1.0, 8)),
        ((16, 8, 12, 16, 32, 48, 80, 160), (0.5, 1)),  # TensorFlow's DeepLab
        ((16, 8, 16, 16, 32, 48, 80, 160), (0.5, 8)),
        ((11, 6, 8, 11, 22, 34, 56, 112), (0.35, 1)),
        ((29, 14, 22, 29, 58, 86, 144, 288), (0.9, 1)),
    ],
)
def test_multiplier_and_divisor_follow_from_the_channels(widths, expected):
    found = fit_channels(widths)
    assert (found["channel_multiplier"], found["channel_divisor"]) == expected
    net = timm.create_model("mobilenetv2_tf", features_only=True, **found)
    stages = [block[-1].conv_pwl if hasattr(block[-1], "conv_pwl") else block[-1].conv_pw for block in net.blocks]
    assert (net.conv_stem.out_channels, *(conv.out_channels for conv in stages)) == widths


def test_channels_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"channels .* not known: expected"):
        fit_channels((32, 16, 24, 40, 64, 96, 160, 320))
    with pytest.raises(ValueError, match="multiplier above 0"):
        timm.create_model("mobilenetv2_tf", features_only=True, channel_multiplier=0)
