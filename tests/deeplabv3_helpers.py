"""Models and heads of DeepLabV3 whose weights are those of a seed."""

import torch

from hf_ctxseg import DeepLabV3ForSemanticSegmentation
from hf_ctxseg.modeling_deeplabv3 import DeepLabV3Head


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return DeepLabV3ForSemanticSegmentation(config)


def head_of(live, config, channels=12):
    torch.manual_seed(0)
    return live(DeepLabV3Head(config, [channels], [config.output_stride]))
