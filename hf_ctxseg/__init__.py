"""DeepLab and Non-local semantic segmentation for transformers, on any timm backbone that can dilate.

Importing the package registers its models with transformers' Auto classes and its image-segmentation pipeline.
"""

import os
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# OpenMP's threads spin while they wait, which on a CPU shared with anything else (another program, the processes that
# load pictures) makes a training step up to sixteen times slower. Read once, when torch is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .aspp import ASPP
from .catalogue import BackboneInfo, list_backbones
from .configuration_ctxseg import CtxSegConfig
from .dense_loss import upsampled_cross_entropy
from .folding import fold_batch_norm
from .image_processing_ctxseg import CtxSegImageProcessor
from .modeling_ctxseg import CtxSegForSemanticSegmentation, CtxSegModel
from .modeling_deeplabv2 import DeepLabV2Config, DeepLabV2ForSemanticSegmentation, DeepLabV2Model
from .modeling_deeplabv3 import DeepLabV3Config, DeepLabV3ForSemanticSegmentation, DeepLabV3Model
from .modeling_deeplabv3plus import DeepLabV3PlusConfig, DeepLabV3PlusForSemanticSegmentation, DeepLabV3PlusModel
from .modeling_nonlocal import NonLocalConfig, NonLocalForSemanticSegmentation, NonLocalModel
from .nonlocal_block import NonLocal1d, NonLocal2d, NonLocal3d
from .presets import Preset, list_models, preset
from .registry import MODELS, register
from .upsampling import upsampled_argmax

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .inference import Prediction, attention_map, predict
    from .metrics import MeanIoU
    from .publishing import push
    from .training import train

__version__ = version("hf-ctxseg")

register(DeepLabV2Config, DeepLabV2Model, DeepLabV2ForSemanticSegmentation)
register(DeepLabV3Config, DeepLabV3Model, DeepLabV3ForSemanticSegmentation)
register(DeepLabV3PlusConfig, DeepLabV3PlusModel, DeepLabV3PlusForSemanticSegmentation)
register(NonLocalConfig, NonLocalModel, NonLocalForSemanticSegmentation)

_LAZY = {
    "MeanIoU": "metrics",
    "Prediction": "inference",
    "attention_map": "inference",
    "evaluate": "evaluation",
    "predict": "inference",
    "push": "publishing",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    # Training, drawing and publishing bring in heavy packages that using a model does not need.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ASPP",
    "MODELS",
    "BackboneInfo",
    "CtxSegConfig",
    "CtxSegForSemanticSegmentation",
    "CtxSegImageProcessor",
    "CtxSegModel",
    "DeepLabV2Config",
    "DeepLabV2ForSemanticSegmentation",
    "DeepLabV2Model",
    "DeepLabV3Config",
    "DeepLabV3ForSemanticSegmentation",
    "DeepLabV3Model",
    "DeepLabV3PlusConfig",
    "DeepLabV3PlusForSemanticSegmentation",
    "DeepLabV3PlusModel",
    "MeanIoU",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
    "NonLocalConfig",
    "NonLocalForSemanticSegmentation",
    "NonLocalModel",
    "Prediction",
    "Preset",
    "attention_map",
    "evaluate",
    "fold_batch_norm",
    "list_backbones",
    "list_models",
    "predict",
    "preset",
    "push",
    "register",
    "train",
    "upsampled_argmax",
    "upsampled_cross_entropy",
]
