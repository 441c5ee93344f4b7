"""The configuration fields that every model shares, and their checks.

Stock configurations of `transformers` keep a misspelt key as an attribute and ignore it; here it is refused with the
nearest valid name, and each value is checked when the config is made.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of the package; each config.json holds it, so that an older package knows why it lacks a field.
VERSION = "0.1.0"

# Keys that transformers itself passes or writes beside the declared fields.
_TRANSFORMERS_KEYS = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "use_cache",
    "use_return_dict",
}

# Arguments of timm.create_model that follow from the fields.
_SET_BY_FIELDS = {
    *("checkpoint_path", "feature_cfg", "features_only", "in_chans"),
    *("out_indices", "output_stride", "pretrained", "pretrained_cfg"),
}


def check_number(
    name: str, value: Any, low: float, high: float, kind: type = float, *, exclusive_low: bool = False
) -> None:
    """Raise `ValueError` unless `value` is a number of `kind` (int or float) within `low` and `high`."""
    right_kind = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if right_kind and math.isfinite(value) and (low < value if exclusive_low else low <= value) and value <= high:
        return
    bounds = f"{'above' if exclusive_low else 'from'} {low}" + ("" if high == float("inf") else f" to {high}")
    raise ValueError(
        f"{name} is {value!r}, but must be {'a whole number' if kind is int else 'a number'} {bounds}: set {name}."
    )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`, with the nearest one."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{name} is {value!r}: {hint}It must be one of {', '.join(choices)}.")


def check_flags(config: PreTrainedConfig, *names: str) -> None:
    """Raise `ValueError` unless each of these fields is true or false."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} is {getattr(config, name)!r}, but must be true or false.")


def check_whole_numbers(name: str, values: Any, example: str) -> None:
    """Raise `ValueError` unless `values` is a list of whole numbers above 0."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} is {values!r}, but must be a list such as {example}.")
    if len(values) > 64:
        raise ValueError(f"{name} holds {len(values)} numbers, but must be a list of at most 64, such as {example}.")
    for index, value in enumerate(values):
        check_number(f"{name}[{index}]", value, 1, float("inf"), int)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


NONLOCAL_MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


class CtxSegConfig(PreTrainedConfig):
    """Fields shared by every model of the package.

    Args:
        backbone: Name of a timm model, for example `"resnet50"` or `"tf_efficientnet_lite0"`.
        backbone_kwargs: Further arguments of `timm.create_model`.
        num_channels: Channels of the input picture.
        output_stride: Input pixels per step of the deepest feature map: 8, 16 or 32 for most backbones. What the
            backbone really reaches is checked when the model is built.
        multi_grid: Factors of the last stage's rate, one for each of its blocks (arXiv 1706.05587, section 3.1.1), for
            ResNets and their relatives and for Xception; None: timm's rates, whose first block keeps that of the
            stage before.
        dilate_first_block: Give the first block of a dilated stage the stage's own rate, as torchvision's MobileNetV3
            and smp do; timm, torchvision's ResNets and mmsegmentation give it the rate of the stage before.
        backbone_rates: Atrous rates of single convolutions of the backbone, by timm's name of the convolution; they
            count before all other rules. {"layer4.0.conv2": 1} undoes the dilation of one, as mmsegmentation has it in
            some networks. None: no such exceptions.
        backbone_nonlocal_stages: Native reductions of the backbone's stages in which every second block is followed by
            a non-local block; [8, 16] are res3 and res4 of arXiv 1711.07971, section 4.1. For networks of residual
            blocks with convolutions, not Xception; where timm splits a stage (EfficientNet), its last part. None: no
            such blocks.
        backbone_nonlocal_mode: Pairwise function of these blocks.
        hidden_size: Width of the context head.
        norm_eps: Epsilon of the head's batch normalisation.
        norm_momentum: Share of the new batch in the head's running statistics (torch's convention).
        classifier_dropout: Probability of dropping a channel before the classifier.
        align_corners: How logits are brought to the size of the picture.
        use_auxiliary_head: Whether an FCN head on the last but one stage is trained too.
        auxiliary_hidden_size: Width of the auxiliary head.
        auxiliary_dropout: Probability of dropping a channel before the auxiliary head's classifier.
        auxiliary_loss_weight: Weight of the auxiliary head's loss.
        semantic_loss_ignore_index: Label value of pixels that count neither in the loss nor in the metric.
        palette: One [red, green, blue] per class, 0 to 255, for pictures of masks; None: colours of the package.

    Raises:
        ValueError: If a key is unknown, or a value is outside its range. Unknown keys in the file of a newer version
            are left out with a warning.
    """

    backbone: str = "resnet50"
    backbone_kwargs: dict[str, Any] | None = None
    num_channels: int = 3
    output_stride: int = 16
    multi_grid: list[int] | tuple[int, ...] | None = None
    dilate_first_block: bool = False
    backbone_rates: dict[str, int] | None = None
    backbone_nonlocal_stages: list[int] | tuple[int, ...] | None = None
    backbone_nonlocal_mode: str = "embedded_gaussian"
    hidden_size: int = 256
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    classifier_dropout: float = 0.1
    align_corners: bool = False
    use_auxiliary_head: bool = False
    auxiliary_hidden_size: int = 256
    auxiliary_dropout: float = 0.1
    auxiliary_loss_weight: float = 0.4
    semantic_loss_ignore_index: int = 255
    palette: list[list[int]] | None = None

    # Reduction of a further, finer map that the head takes beside the deepest one; None: no such map.
    low_level_reduction: ClassVar[int | None] = None

    def __post_init__(self, **kwargs: Any) -> None:
        for field in fields(self):  # as JSON gives them back
            if isinstance(getattr(self, field.name), tuple):
                setattr(self, field.name, list(getattr(self, field.name)))
        if not type(self).__module__.startswith("transformers_modules."):
            kwargs.pop("auto_map", None)  # would be saved again, without the code that it names
        written_by, self.ctxseg_version = str(kwargs.pop("ctxseg_version", VERSION)), VERSION
        known = {field.name for field in fields(self)}
        unknown = sorted(set(kwargs) - known - _TRANSFORMERS_KEYS)
        if unknown and _numbers(written_by) > _numbers(VERSION):
            logger.warning(
                f"This {type(self).__name__} was written by hf-ctxseg {written_by}; {VERSION} does not know "
                f"{', '.join(unknown)} and leaves it out: upgrade the package if results differ."
            )
            kwargs = {key: value for key, value in kwargs.items() if key not in unknown}
        else:
            self._refuse_unknown(unknown, known | {"num_labels"})
        names: Any = getattr(self, "id2label", None)
        indices: Any = getattr(self, "label2id", None)
        if names is None and isinstance(indices, Mapping) and indices:
            names = {index: name for name, index in indices.items()}
        self.id2label = names
        if names is not None:
            self._check_labels(names, indices, kwargs.get("num_labels"))
        elif "num_labels" in kwargs:
            check_number("num_labels", kwargs["num_labels"], 1, float("inf"), int)
        super().__post_init__(**kwargs)
        if indices is None and names is not None:
            self.label2id = {name: int(index) for index, name in names.items()}
        self.check_values()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "id2label" and value is not None:
            self._check_labels(value, None, None)  # before transformers' own check of its type
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config from a saved one; names or a number of classes given here replace the saved names."""
        saved = len(config_dict.get("id2label") or ())
        given = {key: kwargs.pop(key) for key in ("id2label", "label2id") if kwargs.get(key) is not None}
        if given or kwargs.get("num_labels", saved) != saved:
            config_dict = {key: value for key, value in config_dict.items() if key not in ("id2label", "label2id")}
        return super().from_dict(config_dict | given, **kwargs)

    def _refuse_unknown(self, unknown: Iterable[str], known: Iterable[str]) -> None:
        for key in unknown:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(self._own_fields()))}."
            raise ValueError(f"{type(self).__name__} has no field {key!r}: {hint}")

    def _own_fields(self) -> set[str]:
        return {field.name for field in fields(self)} - {field.name for field in fields(PreTrainedConfig)}

    @staticmethod
    def _check_labels(id2label: Any, label2id: Any, num_labels: int | None) -> None:
        if not isinstance(id2label, Mapping):
            raise ValueError(f"id2label is {id2label!r}, but must be a dict of class indices to names.")
        try:
            ids = sorted(int(str(key)) for key in id2label)
        except ValueError as error:
            raise ValueError(f"id2label has the keys {list(id2label)}, but they must be class indices.") from error
        if not ids or ids != list(range(len(ids))):
            raise ValueError(f"id2label has the keys {ids}, but must name every class 0 … {len(ids) - 1} once.")
        if num_labels is not None and num_labels != len(ids):
            raise ValueError(
                f"num_labels is {num_labels}, but id2label names {len(ids)} classes: give one of the two."
            )
        names = list(id2label.values())
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError(f"id2label holds the names {names}, but each class needs a name of its own, as text.")
        if label2id and dict(label2id) != {name: int(str(index)) for index, name in id2label.items()}:
            raise ValueError(f"label2id is {label2id}, which contradicts id2label {id2label}: give one of the two.")

    def check_values(self) -> None:
        """Check every value; models call it again, since `from_pretrained(..., key=value)` sets keys afterwards.

        Raises:
            ValueError: Names the field, what was found and what is allowed.
        """
        if not isinstance(self.backbone, str) or not self.backbone:
            raise ValueError(f"backbone is {self.backbone!r}, but must be the name of a timm model.")
        if self.backbone_kwargs is not None and not isinstance(self.backbone_kwargs, dict):
            raise ValueError(f"backbone_kwargs is {self.backbone_kwargs!r}, but must be a dict or None.")
        if taken := sorted(_SET_BY_FIELDS & set(self.backbone_kwargs or ())):
            raise ValueError(f"backbone_kwargs holds {', '.join(taken)}, which the package sets: remove it.")
        try:
            json.dumps(self.backbone_kwargs)
        except TypeError as error:
            raise ValueError(
                f"backbone_kwargs is {self.backbone_kwargs!r}, which config.json cannot hold ({error}): give names as "
                "timm knows them, such as norm_layer='groupnorm'."
            ) from error
        for name in ("num_channels", "hidden_size", "auxiliary_hidden_size", "output_stride"):
            check_number(name, getattr(self, name), 1, float("inf"), int)
        check_number("norm_eps", self.norm_eps, 0, 1, exclusive_low=True)
        check_number("norm_momentum", self.norm_momentum, 0, 1, exclusive_low=True)
        check_number("classifier_dropout", self.classifier_dropout, 0, 1)
        check_number("auxiliary_dropout", self.auxiliary_dropout, 0, 1)
        check_number("auxiliary_loss_weight", self.auxiliary_loss_weight, 0, float("inf"))
        check_number("semantic_loss_ignore_index", self.semantic_loss_ignore_index, float("-inf"), float("inf"), int)
        if 0 <= self.semantic_loss_ignore_index < (self.num_labels or 0):
            raise ValueError(
                f"semantic_loss_ignore_index is {self.semantic_loss_ignore_index}, which is the index of the class "
                f"{self.id2label[self.semantic_loss_ignore_index]!r}: use a value outside 0 … {self.num_labels - 1}."
            )
        self._check_palette()
        check_flags(self, "align_corners", "use_auxiliary_head", "dilate_first_block")
        if self.multi_grid is not None:
            check_whole_numbers("multi_grid", self.multi_grid, "[1, 2, 4]")
        if self.backbone_rates is not None:
            if not isinstance(self.backbone_rates, dict):
                raise ValueError(f'backbone_rates is {self.backbone_rates!r}, but must be {{"name": rate}} or None.')
            for name, rate in self.backbone_rates.items():
                check_number(f"backbone_rates[{name!r}]", rate, 1, float("inf"), int)
        if self.backbone_nonlocal_stages is not None:
            check_whole_numbers("backbone_nonlocal_stages", self.backbone_nonlocal_stages, "[8, 16]")
            if len(set(self.backbone_nonlocal_stages)) < len(self.backbone_nonlocal_stages):
                raise ValueError(f"backbone_nonlocal_stages is {self.backbone_nonlocal_stages}: name each stage once.")
        check_choice("backbone_nonlocal_mode", self.backbone_nonlocal_mode, NONLOCAL_MODES)

    def _check_palette(self) -> None:
        # Another number of classes, given to from_pretrained, leaves the saved colours behind: they are ignored then.
        if self.palette is not None and not isinstance(self.palette, (list, tuple)):
            raise ValueError(f"palette is {self.palette!r}, but must be a list of colours or None.")
        for colour in self.palette or []:
            values = colour if isinstance(colour, (list, tuple)) and len(colour) == 3 else [None]
            if not all(type(value) is int and 0 <= value <= 255 for value in values):
                raise ValueError(f"palette holds {colour!r}, but a colour is three whole numbers from 0 to 255.")
