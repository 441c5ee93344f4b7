"""A backbone by its name."""

from hf_ctxseg import DeepLabV3Config
from hf_ctxseg.backbone import DilatedBackbone


def backbone(name, stride=16, **fields):
    return DilatedBackbone(DeepLabV3Config(backbone=name, output_stride=stride, **fields)).eval()
