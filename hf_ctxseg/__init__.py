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
from .crf import DenseCRF
from .dense_loss import upsampled_cross_entropy
from .folding import fold_batch_norm
from .image_processing_ctxseg import CtxSegImageProcessor
from .modeling_ctxseg import CtxSegForSemanticSegmentation, CtxSegModel
from .modeling_deeplabv2 import DeepLabV2Config, DeepLabV2ForSemanticSegmentation, DeepLabV2Model
from .modeling_deeplabv3 import DeepLabV3Config, DeepLabV3ForSemanticSegmentation, DeepLabV3Model
from .modeling_deeplabv3plus import DeepLabV3PlusConfig, DeepLabV3PlusForSemanticSegmentation, DeepLabV3PlusModel
from .modeling_nonlocal import NonLocalConfig, NonLocalForSemanticSegmentation, NonLocalModel
from .nonlocal_block import NonLocal1d, NonLocal2d, NonLocal3d
from .picture_reading import open_image
from .pixel_losses import upsampled_focal, upsampled_ohem
from .presets import Preset, list_models, preset
from .region_losses import upsampled_dice, upsampled_lovasz
from .registry import MODELS, register
from .upsampling import upsampled_argmax

if TYPE_CHECKING:
    from .conversion import Conversion
    from .conversion_back import to_mmseg, to_smp, to_torchvision
    from .conversion_caffe import from_caffe_deeplabv2
    from .conversion_layers import aspp_from_state_dict, nonlocal_from_state_dict
    from .conversion_mmseg import from_mmseg
    from .conversion_smp import from_smp
    from .conversion_tf import from_tf_checkpoint
    from .conversion_tflite import from_tflite
    from .conversion_torchvision import from_torchvision
    from .converting import convert, convert_back
    from .dataset_prediction import predict_dataset
    from .evaluation import evaluate
    from .exporting import export
    from .inference import Prediction, Predictor, attention_map, predict
    from .metrics import MeanIoU
    from .publishing import push, push_all
    from .remote_code import export_remote_code
    from .training import train

__version__ = version("hf-ctxseg")

register(DeepLabV2Config, DeepLabV2Model, DeepLabV2ForSemanticSegmentation)
register(DeepLabV3Config, DeepLabV3Model, DeepLabV3ForSemanticSegmentation)
register(DeepLabV3PlusConfig, DeepLabV3PlusModel, DeepLabV3PlusForSemanticSegmentation)
register(NonLocalConfig, NonLocalModel, NonLocalForSemanticSegmentation)

_LAZY = {
    "Conversion": "conversion",
    "MeanIoU": "metrics",
    "Prediction": "inference",
    "Predictor": "inference",
    "aspp_from_state_dict": "conversion_layers",
    "attention_map": "inference",
    "convert": "converting",
    "convert_back": "converting",
    "evaluate": "evaluation",
    "export": "exporting",
    "export_remote_code": "remote_code",
    "from_caffe_deeplabv2": "conversion_caffe",
    "from_mmseg": "conversion_mmseg",
    "from_smp": "conversion_smp",
    "from_tf_checkpoint": "conversion_tf",
    "from_tflite": "conversion_tflite",
    "from_torchvision": "conversion_torchvision",
    "nonlocal_from_state_dict": "conversion_layers",
    "predict": "inference",
    "predict_dataset": "dataset_prediction",
    "push": "publishing",
    "push_all": "publishing",
    "to_mmseg": "conversion_back",
    "to_smp": "conversion_back",
    "to_torchvision": "conversion_back",
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
    "Conversion",
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
    "DenseCRF",
    "MeanIoU",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
    "NonLocalConfig",
    "NonLocalForSemanticSegmentation",
    "NonLocalModel",
    "Prediction",
    "Predictor",
    "Preset",
    "aspp_from_state_dict",
    "attention_map",
    "convert",
    "convert_back",
    "evaluate",
    "export",
    "export_remote_code",
    "fold_batch_norm",
    "from_caffe_deeplabv2",
    "from_mmseg",
    "from_smp",
    "from_tf_checkpoint",
    "from_tflite",
    "from_torchvision",
    "list_backbones",
    "list_models",
    "nonlocal_from_state_dict",
    "open_image",
    "predict",
    "predict_dataset",
    "preset",
    "push",
    "push_all",
    "register",
    "to_mmseg",
    "to_smp",
    "to_torchvision",
    "train",
    "upsampled_argmax",
    "upsampled_cross_entropy",
    "upsampled_dice",
    "upsampled_focal",
    "upsampled_lovasz",
    "upsampled_ohem",
]
