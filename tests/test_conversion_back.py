"""Ways back to other code bases: each undoes its converter, bit by bit, and refuses what is not to be had there.

That the peers themselves take what comes out is held in tests/parity.
"""

import pytest
import torch
from torchvision.models import segmentation
from transformers import AutoModelForSemanticSegmentation

from hf_ctxseg import DeepLabV2Config, DeepLabV3Config, DeepLabV3PlusConfig, NonLocalConfig
from hf_ctxseg.conversion_back import mmseg_model, smp_arguments, to_mmseg, to_smp, to_torchvision
from hf_ctxseg.conversion_mmseg import from_mmseg
from hf_ctxseg.conversion_smp import from_smp
from hf_ctxseg.conversion_torchvision import from_torchvision


def forth_from_torchvision(config, tensors, back):
    return from_torchvision(back, atrous_rates=config.effective_rates, output_stride=config.output_stride)


def forth_from_smp(config, tensors, back):
    given = smp_arguments(config)
    told = ("encoder_name", "encoder_output_stride", "decoder_atrous_rates", "in_channels")
    return from_smp(back, **{key: given[key] for key in told}, encoder_kwargs=config.backbone_kwargs)


def forth_from_mmseg(config, tensors, back):
    return from_mmseg(back, mmseg_model(config, tensors))


def v3(variant, backbone="resnet50", **fields):
    return DeepLabV3Config(variant=variant, backbone=backbone, hidden_size=8, num_labels=3, **fields)


def plus(variant, backbone="resnet50", **fields):
    return DeepLabV3PlusConfig(variant=variant, backbone=backbone, hidden_size=8, num_labels=3, **fields)


AUXILIARY = {"use_auxiliary_head": True, "auxiliary_hidden_size": 4}
MOBILENET_V3 = {"dilate_first_block": True, "backbone_kwargs": {"bn_eps": 1e-3, "bn_momentum": 0.01}}
CORNERS = {"align_corners": True, "dilate_first_block": True}
BASIC_RATES = {f"layer4.{block}.conv2": 1 for block in (0, 1)}
MOBILENET_RATES = {f"blocks.{stage}.{block}.conv_dw": 1 for stage in (5, 6) for block in range(3 if stage == 5 else 1)}
MODELS = {
    "torchvision": (to_torchvision, forth_from_torchvision, v3("torchvision", output_stride=8, **AUXILIARY)),
    "torchvision, tagged": (to_torchvision, forth_from_torchvision, v3("torchvision", "resnet50.a1_in1k")),
    "torchvision, MobileNetV3": (
        to_torchvision,
        forth_from_torchvision,
        v3("torchvision", "mobilenetv3_large_100", **MOBILENET_V3),
    ),
    "smp": (to_smp, forth_from_smp, v3("torchvision", "resnet18", **CORNERS)),
    "smp, timm's": (
        to_smp,
        forth_from_smp,
        v3("torchvision", "test_resnet", align_corners=True, backbone_kwargs={"stem_type": "deep"}),
    ),
    "smp, MobileNetV2": (to_smp, forth_from_smp, plus("smp", "mobilenetv2_100_smp", **CORNERS)),
    "mmseg": (to_mmseg, forth_from_mmseg, v3("mmseg", "resnet50c", norm_eps=1e-3, **AUXILIARY)),
    "mmseg, plus": (to_mmseg, forth_from_mmseg, plus("mmseg", "resnet50d_mmseg", multi_grid=[1, 2, 4])),
    "mmseg, non-local": (
        to_mmseg,
        forth_from_mmseg,
        NonLocalConfig(backbone="resnet18", output_stride=16, backbone_rates=BASIC_RATES, hidden_size=8, num_labels=3),
    ),
    "mmseg, MobileNetV2": (
        to_mmseg,
        forth_from_mmseg,
        plus("mmseg", "mobilenetv2_050", backbone_rates=MOBILENET_RATES),
    ),
}


def drawn(config):
    torch.manual_seed(0)
    with torch.device("meta"):
        expected = AutoModelForSemanticSegmentation.from_config(config).state_dict()
    return {key: torch.rand(value.shape).to(value.dtype) for key, value in expected.items()}


def same(found, expected):
    return set(found) == set(expected) and all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_again_gives_the_same_tensors(name):
    to, forth, config = MODELS[name]
    tensors = drawn(config)
    back = to(config, tensors)
    again_config, again = forth(config, tensors, back)
    assert same(again, tensors)
    assert again_config.effective_rates == config.effective_rates if hasattr(config, "effective_rates") else True
    assert same(to(again_config, again), back)


def test_torchvision_takes_what_comes_back():
    make = segmentation.deeplabv3_resnet50
    peer = make(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    config, tensors = from_torchvision(peer.state_dict())
    assert same(to_torchvision(config, tensors), peer.state_dict())


@pytest.mark.parametrize(
    ("to", "config", "text"),
    [
        (to_torchvision, v3("paper", "test_resnet"), "DeepLabv3 of the variant 'torchvision' only"),
        (to_torchvision, DeepLabV2Config(backbone="test_resnet", num_labels=3), "of the variant 'torchvision' only"),
        (to_torchvision, v3("torchvision", align_corners=True), "align_corners=False, not True"),
        (to_torchvision, v3("torchvision", norm_eps=1e-3), "norm_eps=1e-05, not 0.001"),
        (to_torchvision, v3("torchvision", dilate_first_block=True), "dilate_first_block=False, not True"),
        (to_torchvision, v3("torchvision", multi_grid=[1, 2, 4]), r"multi_grid=None, not \[1, 2, 4\]"),
        (to_torchvision, v3("torchvision", pooling_window=65), "pooling_window=None, not 65"),
        (to_torchvision, v3("torchvision", "resnet18"), r"must be MobileNetV3-Large or a ResNet .* \[2, 2, 2, 2\]"),
        (to_torchvision, v3("torchvision", nonlocal_mode="gaussian"), "no place for .*nonlocal_block"),
        (to_smp, v3("torchvision"), "align_corners=True, not False"),
        (to_smp, plus("smp", "test_resnet", align_corners=True, low_level_channels=24), "48 low_level_channels"),
        (to_smp, v3("torchvision", "test_resnet", output_stride=32), "output strides 8 and 16"),
        (to_smp, plus("smp", "test_resnet", separable=False), "separable convolutions only"),
        (to_smp, v3("torchvision", "test_resnet", align_corners=True, **AUXILIARY), "no place for .*auxiliary_head"),
        (to_smp, NonLocalConfig(backbone="test_resnet", num_labels=3), r"DeepLabv3 and DeepLabv3\+ only"),
        (to_mmseg, v3("paper", "test_resnet"), "of the variant 'mmseg' and NonLocal only"),
        (to_mmseg, v3("mmseg", "test_resnet"), "its backbones are MobileNetV2 and the ResNets"),
        (to_mmseg, v3("mmseg", "resnet18"), "backbone_rates=.*, not None"),
        (to_mmseg, v3("mmseg", "resnet18d"), "backbone='resnet18d_mmseg', not 'resnet18d'"),
        (to_mmseg, v3("mmseg", "resnet18", backbone_nonlocal_stages=[16]), "no place for .*nonlocal_block"),
        (to_mmseg, v3("mmseg", "resnet18", pool_norm="none"), "lacks .*image_pooling"),
    ],
)
def test_what_is_not_to_be_had_there_is_refused(to, config, text):
    with pytest.raises(ValueError, match=text) as found:
        to(config, drawn(config))
    assert f"no equal of this {config.model_type} model" in str(found.value)
