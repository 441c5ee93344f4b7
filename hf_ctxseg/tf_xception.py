"""Aligned Xception as TensorFlow's DeepLab uses it, under names of its own in timm: `xception65_tf` and two others.

The layers are those of timm's `xception41`, `xception65` and `xception71`. What differs: maps from within a block are
taken before the ReLU that follows (`separable_conv2_pointwise` in `deeplab/core/feature_extractor.py` of
tensorflow/models; timm takes them after it), batch normalisation has a decay of 0.9997, and at output stride 8 the
last entry block of Xception-71 keeps the convolution of its shortcut. Strided convolutions pad on all sides, as timm's
do, and both give a block whose stride is left out the rate of the block before.

Chen, Zhu, Papandreou, Schroff, Adam: "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", arXiv 1802.02611, section 3.2 and figure 4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.xception_aligned import XceptionAligned
from torch import nn

# Width and stride of each block of the entry flow, and the number of blocks of the middle flow.
_ENTRY_FLOW = ((128, 2), (256, 2), (728, 2))
XCEPTIONS: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "xception41_tf": (_ENTRY_FLOW, 8),
    "xception65_tf": (_ENTRY_FLOW, 16),
    "xception71_tf": (((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)), 16),
}

default_cfgs = generate_default_cfgs(  # timm looks for this name
    {
        f"{name}.untrained": {
            "url": "",
            "input_size": (3, 299, 299),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "stem.0.conv",
            "classifier": "head.fc",
        }
        for name in XCEPTIONS
    }
)


class TfXception(XceptionAligned):
    """Xception with maps from before the ReLU, and the same layers at every output stride."""

    def __init__(self, block_cfg: list[dict[str, Any]], norm_layer: Callable[..., nn.Module], **kwargs: Any) -> None:
        strided = [block["stride"] > 1 for block in block_cfg]  # timm changes the list
        super().__init__(block_cfg, norm_layer=norm_layer, **kwargs)
        for block, was_strided in zip(self.blocks, strided, strict=True):
            if was_strided and block.shortcut is None:
                width = block.out_channels
                block.shortcut = ConvNormAct(width, width, 1, norm_layer=norm_layer, apply_act=False)
        for level in self.feature_info:
            stack, _, layer = level["module"].rpartition(".")
            if layer == "act3":
                self.get_submodule(level["module"]).inplace = False  # it would change the map that was taken
                level["module"] = f"{stack}.conv2"


def _build(
    name: str, pretrained: bool = False, bn_eps: float = 1e-3, bn_momentum: float = 0.0003, **kwargs: Any
) -> nn.Module:
    entry, middle = XCEPTIONS[name]
    widths = [64, *(width for width, _ in entry)]
    blocks: list[dict[str, Any]] = [
        {"in_chs": before, "out_chs": width, "stride": stride}
        for before, (width, stride) in zip(widths[:-1], entry, strict=True)
    ]
    blocks += [{"in_chs": 728, "out_chs": 728, "stride": 1} for _ in range(middle)]
    blocks += [
        {"in_chs": 728, "out_chs": (728, 1024, 1024), "stride": 2},
        {"in_chs": 1024, "out_chs": (1536, 1536, 2048), "stride": 1, "no_skip": True, "start_with_relu": False},
    ]
    network: nn.Module = build_model_with_cfg(
        TfXception,
        name,
        pretrained,
        feature_cfg={"flatten_sequential": True, "feature_cls": "hook"},
        block_cfg=blocks,
        norm_layer=partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum),
        **kwargs,
    )
    return network


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """Give the function that `timm.create_model` calls, which timm knows by its name and module."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(name, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name}, an Xception of TensorFlow's DeepLab; see the module for what is particular in it."
    return build


for _name in XCEPTIONS:
    if not timm.is_model(_name):  # code saved beside a model is imported beside the package
        register_model(_entry_point(_name))
