"""How a head becomes known: to the Auto classes, the pipeline, the command line and the tests, by one line."""

import difflib

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_ctxseg import CtxSegConfig
from .image_processing_ctxseg import CtxSegImageProcessor
from .modeling_ctxseg import CtxSegForSemanticSegmentation, CtxSegModel

ModelClasses = tuple[type[CtxSegConfig], type[CtxSegModel], type[CtxSegForSemanticSegmentation]]

# Every registered triple, in order: what the command line offers as heads and what the tests run over.
MODELS: list[ModelClasses] = []


def register(
    config_class: type[CtxSegConfig],
    model_class: type[CtxSegModel],
    segmentation_class: type[CtxSegForSemanticSegmentation],
) -> None:
    """Make a head known to the Auto classes, the pipeline and the command line.

    Args:
        config_class: Its configuration, with a `model_type` that starts with `ctxseg_`.
        model_class: Backbone and head.
        segmentation_class: The model with a classifier.
    """
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoModelForSemanticSegmentation.register(config_class, segmentation_class)
    AutoImageProcessor.register(config_class, image_processor_classes={"torchvision": CtxSegImageProcessor})
    # pipeline("image-segmentation") looks the class name up here and logs an error where it is missing.
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[config_class.model_type] = segmentation_class.__name__
    MODELS.append((config_class, model_class, segmentation_class))


def head_name(config_class: type[CtxSegConfig]) -> str:
    """The name that users type for a head: its model type without the prefix of the package."""
    return config_class.model_type.removeprefix("ctxseg_")


def find_head(name: str) -> ModelClasses:
    """Give the classes of a registered head.

    Raises:
        ValueError: If there is no such head, with the nearest names.
    """
    heads = {head_name(classes[0]): classes for classes in MODELS}
    if name in heads:
        return heads[name]
    near = difflib.get_close_matches(name, heads, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"There is no head {name!r}: {hint}Registered are {', '.join(heads)}.")
