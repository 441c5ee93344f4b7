"""Backbones as other code bases build them, where timm's network of that name computes otherwise.

Each is an entry point of timm, so that configurations, strides and saved models work as with timm's own names. There
are no pretrained weights for them: they are what converted checkpoints run on.

`resnet50_caffe`, `resnet101_caffe`: as released in Caffe (He et al., arXiv 1512.03385) and used by the authors'
DeepLab v2 (arXiv 1606.00915): a bottleneck's stride is in its first 1×1 convolution, and the pooling of the stem
rounds sizes up, so that maps of pictures with a side of 4 n or 4 n - 1 pixels have up to one cell more than other
backbones'. Of batch normalisation's running statistics 0.001 is renewed at a step.

`resnet18d_mmseg` … `resnet152d_mmseg`: mmsegmentation's ResNetV1d. Where a stage is dilated instead of strided, timm's
shortcut averages 2×2 cells, mmsegmentation's does not.

`mobilenetv2_100_smp`: segmentation_models_pytorch takes MobileNetV2's last 1×1 convolution, of 1280 channels, as the
deepest map; timm's maps end before it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers import AvgPool2dSame
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models.efficientnet import _create_effnet
from timm.models.resnet import Bottleneck, _create_resnet
from torch import nn

CAFFE_MEAN = (122.675, 116.669, 104.008)  # red, green, blue, of values 0 to 255

_CAFFE = {"resnet50_caffe": (3, 4, 6, 3), "resnet101_caffe": (3, 4, 23, 3)}
_AVERAGED = {f"resnet{depth}d_mmseg": f"resnet{depth}d" for depth in (18, 34, 50, 101, 152)}
_SMP = "mobilenetv2_100_smp"
_SMP_STAGES = (
    *("ds_r1_k3_s1_c16", "ir_r2_k3_s2_e6_c24", "ir_r3_k3_s2_e6_c32", "ir_r4_k3_s2_e6_c64"),
    *("ir_r3_k3_s1_e6_c96", "ir_r3_k3_s2_e6_c160", "ir_r1_k3_s1_e6_c320", "cn_r1_k1_s1_c1280"),
)


class CaffeBottleneck(Bottleneck):
    """timm's bottleneck with the stride in the first 1×1 convolution instead of the 3×3."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride


def _caffe_resnet(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    norm = partial(nn.BatchNorm2d, momentum=1e-3)
    arguments = {"block": CaffeBottleneck, "layers": _CAFFE[name], "norm_layer": norm}
    net: nn.Module = _create_resnet(name, pretrained, **arguments | kwargs)
    net.get_submodule("maxpool").ceil_mode = True  # type: ignore[assignment]
    return net


def _averaged_resnet(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    net: nn.Module = timm.create_model(_AVERAGED[name], pretrained=pretrained, **kwargs)
    for module in list(net.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, AvgPool2dSame):  # timm's form in a dilated stage only
                setattr(module, child, nn.Identity())
    return net


def _smp_mobilenet(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    net: nn.Module = _create_effnet(
        name,
        pretrained,
        block_args=decode_arch_def([[stage] for stage in _SMP_STAGES]),
        stem_size=32,
        round_chs_fn=round_channels,
        norm_layer=kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, "relu6"),
        **kwargs,
    )
    return net


_PLAIN = {"num_classes": 1000, "input_size": (3, 224, 224)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_RESNET = {"first_conv": "conv1", "classifier": "fc"}
_CAFFE_INPUT = {"mean": tuple(value / 255 for value in CAFFE_MEAN), "std": (1 / 255,) * 3}
default_cfgs = generate_default_cfgs(  # timm looks for this name in the module of an entry point
    {f"{name}.untrained": {**_PLAIN, **_CAFFE_INPUT, **_RESNET} for name in _CAFFE}
    | {f"{name}.untrained": {**_PLAIN, **_IMAGENET, **_RESNET, "first_conv": "conv1.0"} for name in _AVERAGED}
    | {f"{_SMP}.untrained": {**_PLAIN, **_IMAGENET, "first_conv": "conv_stem", "classifier": "classifier"}}
)


def _entry_point(name: str, builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return builder(name, pretrained, **kwargs)

    build.__name__ = name
    return build


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **dict.fromkeys(_CAFFE, _caffe_resnet),
    **dict.fromkeys(_AVERAGED, _averaged_resnet),
    _SMP: _smp_mobilenet,
}
PEER_BACKBONES = tuple(_BUILDERS)
for _name, _builder in _BUILDERS.items():
    if not timm.is_model(_name):  # code saved beside a model is imported beside the package
        register_model(_entry_point(_name, _builder))
