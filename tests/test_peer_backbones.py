"""The backbones that timm builds otherwise, as parts of models: registered, saved and opened again.

What they compute is held by the converters' tests, against the networks written out and against the peers.
"""

import importlib

import pytest
import timm
import torch
from timm.layers import AvgPool2dSame

from hf_ctxseg import CtxSegImageProcessor, DeepLabV2Config, DeepLabV2ForSemanticSegmentation, peer_backbones
from hf_ctxseg.backbone import DilatedBackbone


def config(backbone, stride=8, **fields):
    return DeepLabV2Config(backbone=backbone, output_stride=stride, num_labels=3, **fields)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [("resnet50_caffe", [256, 2048]), ("resnet18d_mmseg", [64, 512]), ("mobilenetv2_100_smp", [24, 1280])],
)
def test_a_model_on_it_is_saved_and_opened_again_bit_by_bit(backbone, channels, live, tmp_path):
    model = live(DeepLabV2ForSemanticSegmentation(config(backbone)))
    assert model.backbone.channels[-1] == channels[-1]
    model.save_pretrained(tmp_path)
    again = DeepLabV2ForSemanticSegmentation.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 65, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_a_stride_of_caffe_is_in_the_first_convolution():
    with torch.device("meta"):
        net = DilatedBackbone(config("resnet50_caffe", 32))._backbone
    for stage in (net.layer2, net.layer3, net.layer4):
        assert (stage[0].conv1.stride, stage[0].conv2.stride, stage[0].downsample[0].stride) == (
            (2, 2),
            (1, 1),
            (2, 2),
        )
    assert net.maxpool.ceil_mode and net.bn1.momentum == 1e-3


def test_the_shortcut_of_a_dilated_stage_averages_in_timm_alone():
    with torch.device("meta"):
        timms, mmsegs = (DilatedBackbone(config(name))._backbone for name in ("resnet18d", "resnet18d_mmseg"))
    assert isinstance(timms.layer3[0].downsample[0], AvgPool2dSame)
    assert not any(isinstance(module, AvgPool2dSame) for module in mmsegs.modules())
    assert isinstance(mmsegs.layer2[0].downsample[0], torch.nn.AvgPool2d)  # strided


def test_the_processor_of_a_caffe_backbone_subtracts_its_mean():
    processor = CtxSegImageProcessor.for_backbone("resnet101_caffe")
    black = processor(torch.zeros(3, 4, 4, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert torch.allclose(black[0, :, 0, 0], -torch.tensor([122.675, 116.669, 104.008]))


def test_a_second_import_changes_nothing():
    before = timm.model_entrypoint("resnet50_caffe")
    importlib.reload(peer_backbones)  # timm warns where it overwrites
    assert timm.model_entrypoint("resnet50_caffe") is before


def test_rates_of_single_convolutions_count_before_all_others():
    rates = {"layer4.0.conv2": 3, "layer4.1.conv2": 1}
    with torch.device("meta"):
        net = DilatedBackbone(config("resnet50", multi_grid=[1, 2, 4], backbone_rates=rates))._backbone
    found = [block.conv2 for block in net.layer4]
    assert [layer.dilation for layer in found] == [layer.padding for layer in found] == [(3, 3), (1, 1), (16, 16)]


@pytest.mark.parametrize("name", ["layer5.0.conv2", "layer4.0.conv1", "layer2.0.conv2", "layer4"])
def test_rates_of_what_is_no_such_convolution_are_refused(name):
    with pytest.raises(ValueError, match=rf"backbone_rates names '{name}', .* as layer4\.0\.conv2, layer4\.1\.conv2"):
        DilatedBackbone(config("resnet50", backbone_rates={name: 2}))
