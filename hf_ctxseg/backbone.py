"""timm networks as dilated backbones: feature maps at an output stride that is checked, not believed."""

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import TimmBackbone, TimmBackboneConfig
from transformers import initialization as init

from .backbone_edit import NONLOCAL_NAME, dilate_first_blocks, insert_nonlocal_blocks, set_multi_grid, set_rates
from .backbone_probe import FeatureLevels, build_without_memory, probe, run_padded, to_channels_first
from .configuration_ctxseg import CtxSegConfig
from .fast_conv import use_fast_convs
from .layers import BatchNorm2d, BatchNormAct2d
from .nonlocal_block import NonLocal2d
from .peer_backbones import PEER_BACKBONES
from .tf_mobilenet import TF_MOBILENET
from .tf_xception import XCEPTIONS

DILATABLE = ("resnet50", "mobilenetv2_100", "tf_efficientnet_lite0", "convnext_tiny", "regnety_016", "xception65")
# Networks of the package, which timm knows once this module is imported.
OWN_BACKBONES = (*PEER_BACKBONES, TF_MOBILENET, *XCEPTIONS)


_ONE_VALUE: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: BatchNorm2d,
    timm.layers.BatchNormAct2d: BatchNormAct2d,
}


class DilatedBackbone(TimmBackbone):
    """A timm network that gives feature maps, its deepest at `config.output_stride`.

    Channels and reductions are its whole interface to the heads. Networks that cannot dilate (VGG, Swin, ViT,
    DenseNet, HRNet, …) are taken at their native stride when `output_stride` says so.

    Args:
        config: A configuration of this package; its fields on backbone, stride and input channels are read,
            `use_auxiliary_head` and `low_level_reduction`.

    Attributes:
        channels: Channels of each returned map, shallow to deep.
        reductions: Input pixels per step of each returned map.

    Shape:
        input (B, num_channels, H, W), output: a list of (B, C, ceil(H / reduction), ceil(W / reduction)); the deepest
        last, before it the last but one stage where an auxiliary head needs it, before them the map of
        `low_level_reduction` where the head takes one.

    Raises:
        ValueError: If timm does not know the name, or the network cannot reach the output stride, has no map that the
            head takes, or no stages for `multi_grid` or `backbone_nonlocal_stages`.
    """

    def __init__(self, config: CtxSegConfig) -> None:
        check_backbone_name(config.backbone)
        stride, plan = _plan(config)
        chosen = _choose_levels(config, plan)
        arguments = {**(config.backbone_kwargs or {}), **plan.arguments}
        timm_config = TimmBackboneConfig(
            backbone=config.backbone,
            num_channels=config.num_channels,
            out_indices=[plan.indices[level] for level in chosen],
            output_stride=stride,
        )
        super().__init__(timm_config, **arguments)
        self.arguments = arguments
        self.pad_to = plan.pad_to
        self.reductions: list[int] = [plan.reductions[level] for level in chosen]
        for module in self._backbone.modules():  # one small picture may leave a deep layer one value per channel
            if type(module) in _ONE_VALUE:
                module.__class__ = _ONE_VALUE[type(module)]
        self._edit(config, plan)
        use_fast_convs(self._backbone)

    def _edit(self, config: CtxSegConfig, plan: FeatureLevels) -> None:
        """Make the changes that timm's own arguments cannot express."""
        asked = (config.dilate_first_block, config.multi_grid, config.backbone_rates, config.backbone_nonlocal_stages)
        if not any(asked):
            return
        native = probe(config.backbone, None, config.num_channels, config.backbone_kwargs).reductions
        build = partial(build_without_memory, config.backbone, in_chans=config.num_channels, **self.arguments)
        rates = [old // new for old, new in zip(native, plan.reductions, strict=True)]
        try:
            if config.dilate_first_block:
                dilated = {stage: rate for stage, rate in zip(plan.modules, rates, strict=True) if rate > 1}
                dilate_first_blocks(self._backbone, build(), dilated)
            if config.multi_grid is not None:
                set_multi_grid(self._backbone, build(), plan.modules[-1], config.multi_grid, rates[-1])
            set_rates(self._backbone, config.backbone_rates or {})
            for stage in config.backbone_nonlocal_stages or ():
                if stage not in native:
                    raise ValueError(f"backbone_nonlocal_stages names {stage}, but there is no such stage")
                level = _last(native, stage)
                block = partial(NonLocal2d, plan.channels[level], mode=config.backbone_nonlocal_mode)
                with torch.device("meta"):  # blocks that give other channels than their stage fail here, not later
                    trial = build()
                    insert_nonlocal_blocks(trial, plan.modules[level], block)
                    edge = -(-64 // plan.pad_to) * plan.pad_to
                    trial(torch.zeros(1, config.num_channels, edge, 2 * edge))
                insert_nonlocal_blocks(self._backbone, plan.modules[level], block)
        except ValueError as error:
            raise ValueError(
                f"The backbone {config.backbone!r}, with stages at the reductions {list(native)}, cannot be changed "
                f"as asked: {error}."
            ) from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NonLocal2d):
            module.reset_parameters(init)
        else:
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module, is_custom_code=False)  # blocks too, as in CtxSegPreTrainedModel

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Give the feature maps, shallow to deep, channels first."""
        if self.pad_to > 1:
            return run_padded(self._backbone, pixel_values, self.pad_to, self.reductions)
        return to_channels_first(self._backbone, self._backbone(pixel_values))

    @property
    def stages(self) -> set[nn.Module]:
        """The modules that give the network's maps, and those that hold them."""
        levels = [level["module"].replace(".", "_") for level in self._backbone.feature_info.info]
        return {self._backbone} | {
            module
            for name, module in self._backbone.named_modules()
            if name == "model"  # where timm wraps a transformer
            or any(f"{level}_".startswith(f"{name.removeprefix('model.').replace('.', '_')}_") for level in levels)
        }

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
        added = {key: value for key, value in self._backbone.state_dict().items() if NONLOCAL_NAME in key}
        self._backbone.load_state_dict({**source.state_dict(), **added})

    def _timm_keys(self) -> list[str]:
        return [key for key in self._backbone.state_dict() if NONLOCAL_NAME not in key]

    def _select(self, state_dict: Mapping[str, torch.Tensor], weights: Any) -> dict[str, torch.Tensor]:
        """Give the tensors that this backbone has; timm's feature networks call `stages.0` `stages_0` or prefix it."""
        wanted = {key.removeprefix("model.").replace(".", "_"): key for key in self._timm_keys()}
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


def _plan(config: CtxSegConfig) -> tuple[int | None, FeatureLevels]:
    """Find the levels of the network at the output stride, and what timm is asked for to give them.

    Raises:
        ValueError: If it does not reach the stride.
    """
    found: list[str] = []
    for stride in (None, config.output_stride):  # networks without dilation do not know the argument at all
        try:
            levels = probe(config.backbone, stride, config.num_channels, config.backbone_kwargs)
        except ValueError as error:
            found.append(f"timm: {error}")
            continue
        if levels.reductions[-1] == config.output_stride:
            return stride, levels
        found.append(f"timm gave stride {levels.reductions[-1]}")
    raise ValueError(_stride_message(config, found))


def _choose_levels(config: CtxSegConfig, plan: FeatureLevels) -> list[int]:
    levels = {len(plan.reductions) - 1}
    if config.use_auxiliary_head:
        levels.add(len(plan.reductions) - 2)
    low = config.low_level_reduction
    if low is not None:
        if low not in plan.reductions[:-1]:
            raise ValueError(
                f"The head takes a feature map at stride {low}, but the backbone {config.backbone!r} has maps at "
                f"{list(plan.reductions)} only: choose another, for example {', '.join(DILATABLE)}."
            )
        levels.add(_last(plan.reductions, low))
    return sorted(levels)


def _last(values: Sequence[int], value: int) -> int:
    return len(values) - 1 - list(reversed(values)).index(value)


def check_backbone_name(name: str) -> None:
    """Raise `ValueError` with near names where timm does not know the architecture or its pretrained tag."""
    if timm.is_model(name):
        _, _, tag = name.partition(".")
        if not tag or name in timm.list_pretrained():
            return
    near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models('*name*') lists the names."
    raise ValueError(f"timm {timm.__version__} has no backbone {name!r}: {hint}")


def reachable_strides(
    name: str, num_channels: int = 3, arguments: Mapping[str, Any] | None = None
) -> dict[int, FeatureLevels]:
    """Which output strides a timm network reaches, 8 and 16 and its native one, found by building and running it."""
    reached: dict[int, FeatureLevels] = {}
    for stride in (8, 16, None):
        try:
            levels = probe(name, stride, num_channels, arguments)
        except ValueError:
            continue
        reached.setdefault(levels.reductions[-1], levels)
    return dict(sorted(reached.items()))


def _stride_message(config: CtxSegConfig, found: Sequence[str]) -> str:
    strides = reachable_strides(config.backbone, config.num_channels, config.backbone_kwargs)
    if not strides and config.backbone_kwargs and reachable_strides(config.backbone, config.num_channels):
        return f"The backbone {config.backbone!r} could not be built with {config.backbone_kwargs}: {found[0]}"
    if not strides:
        return (
            f"The backbone {config.backbone!r} gives no feature maps for pictures of any size in timm "
            f"{timm.__version__} ({found[0]}): choose another, for example {', '.join(DILATABLE)}."
        )
    able = ", ".join(str(stride) for stride in strides)
    return (
        f"The backbone {config.backbone!r} cannot reach output_stride {config.output_stride} ({found[-1]}): it "
        f"reaches {able}. Set output_stride to one of these, or choose a backbone that can dilate, for example "
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
