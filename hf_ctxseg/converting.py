"""`ctxseg convert`: a checkpoint of another code base becomes a folder that the Auto classes open, and back.

The folder is written beside its place and put there when it is whole and has been opened once; it holds the weights
as safetensors, the configuration, the image processor and a card that says where the weights come from, what was
assumed, and how the result compares with its source.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from .checkpoint_source import Source, convert_source, open_source, with_classes
from .configuration_ctxseg import check_choice
from .conversion import Conversion
from .conversion_back import mmseg_model, smp_arguments, to_mmseg, to_smp, to_torchvision
from .convert_verify import Comparison, has_published_form, verify_conversion
from .image_processing_ctxseg import CtxSegImageProcessor
from .model_card import write_card
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .new_folder import checked_target, new_folder, to_disk
from .publishable import read_json
from .registry import find_head, head_name
from .run_folder import write_json
from .state_dict import plain_text, read_checkpoint

TARGETS = ("torchvision", "mmseg", "smp")


@dataclass
class Converted:
    """What a conversion gave.

    Args:
        output_dir: The folder that was written.
        source_format: What the checkpoint was.
        conversion: Configuration, tensors, preprocessing and notes.
        comparison: With the peer or with stored logits, where asked.
    """

    output_dir: Path
    source_format: str
    conversion: Conversion
    comparison: Comparison | None = None


def convert(
    source: str | Path,
    output_dir: str | Path,
    *,
    source_format: str | None = None,
    classes: str | Sequence[str] | None = None,
    license: str | None = None,
    peer_config: str | Path | None = None,
    entry: str | None = None,
    verify: str | Path | None = None,
    logits: str | Path | None = None,
    **options: Any,
) -> Converted:
    """Convert a checkpoint.

    Args:
        source: A file, a folder, or the prefix of a TensorFlow checkpoint.
        output_dir: Folder to write; it must be new or empty.
        source_format: torchvision, smp, mmseg, caffe, tf, tflite or ctxseg; None: recognised.
        classes: Class names: a list, names with commas, or a file with one a line; None: those of the checkpoint.
        license: Licence of the weights, for the card.
        peer_config: mmsegmentation's config, where the checkpoint does not hold it.
        entry: Entry of the checkpoint that holds the state dict.
        verify: A picture to compare the converted model on.
        logits: The source's logits (or arg-max map) of that picture; None: its own code computes them, if installed.
        options: What the tensors do not tell: `output_stride`, `atrous_rates`, `encoder_name` (smp),
            `image_pooling_crop_size` and `multi_grid` (TensorFlow).

    Raises:
        FileNotFoundError, ValueError: If something is missing, is not what it says, or cannot be carried over; then
            nothing is written.
    """
    target = checked_target(output_dir)
    if logits is not None and verify is None:
        raise ValueError("--logits belongs to a picture: give it with --verify IMAGE.")
    with _refusing(source):
        opened = open_source(source, source_format, peer_config=peer_config, entry=entry)
        conversion = convert_source(opened, options)
    if classes is not None:
        conversion.config = with_classes(conversion.config, _class_names(classes))
    elif conversion.config.id2label.get(0) == "LABEL_0":
        conversion.notes.append("The checkpoint does not name its classes.")
    model = _build(conversion)
    fields = {"align_corners": conversion.config.align_corners, **conversion.preprocessing}
    processor = CtxSegImageProcessor(**fields)
    comparison = None
    with new_folder(target) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        # What the folder holds, as users will open it.
        saved = AutoModelForSemanticSegmentation.from_pretrained(partial).eval()
        if verify is not None:
            comparison = verify_conversion(saved, processor, opened, verify, logits, conversion)
        write_json(partial / "metrics.json", {"conversion": _facts(opened, conversion, license, comparison)})
        write_card(partial, repo_id=target.resolve().name)
    return Converted(target, opened.kind, conversion, comparison)


def _facts(
    source: Source, conversion: Conversion, license: str | None, comparison: Comparison | None
) -> dict[str, Any]:
    facts: dict[str, Any] = {"source": source.path.resolve().name, "format": source.kind, "sha256": source.sha256()}
    facts["license"] = license
    facts["comparison"] = "not asked for" if comparison is None else str(comparison)
    facts["notes"] = conversion.notes
    return facts


def _build(conversion: Conversion) -> CtxSegForSemanticSegmentation:
    model_class = find_head(head_name(type(conversion.config)))[2]
    # Not tied to the file that they were read from, nor views of one another.
    tensors = {key: value.detach().clone().contiguous() for key, value in conversion.tensors.items()}
    model = model_class(conversion.config)
    model.load_state_dict(tensors)
    return model.eval()


def _class_names(given: str | Sequence[str]) -> list[str]:
    if not isinstance(given, str):
        return list(given)
    if os.path.isfile(given):  # of names too long for a file as well
        lines = Path(given).read_text(encoding="utf-8").splitlines()
        names = [plain_text(line) for line in lines if line.strip()]
    else:
        names = [plain_text(name) for name in given.split(",")]
    if len(names) < 2 or not all(names):
        raise ValueError(f"--classes is {given!r}, but must be names with commas, or a text file with one a line.")
    return names


@contextmanager
def _refusing(source: str | Path) -> Iterator[None]:
    """Turn what ill-formed content breaks into a refusal."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{source} is not what it looks like ({type(error).__name__}: {str(error).splitlines()[:1]}): its tensors "
            "or the settings beside them do not describe such a network."
        ) from error


def convert_back(run: str | Path, output: str | Path, peer: str) -> str:
    """Write the weights of a model of ours under a peer's names.

    Args:
        run: A folder with a model of ours.
        output: The file to write, `.pth` (a state dict in a pickle) or `.safetensors`; it must not exist.
        peer: torchvision, mmseg or smp.

    Returns:
        How the peer's model is built and loads the file.

    Raises:
        FileNotFoundError, ValueError: If the run is no model of ours, the peer has no such model, or the file exists.
    """
    check_choice("--to", peer, TARGETS)
    run, output = Path(run), Path(output)
    if output.exists() or output.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{output} must be a new file, FILE.pth or FILE.safetensors: choose such a name.")
    if not (run / "config.json").is_file() or not (run / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{run} holds no config.json and model.safetensors: give the folder of a model of ours."
        )
    kind = read_json(run / "config.json").get("model_type")
    if not str(kind).startswith("ctxseg_"):
        raise ValueError(f"{run} holds a model of the type {kind!r}, which is none of ours: give a run folder.")
    config = AutoConfig.from_pretrained(run)
    convert_to = {"torchvision": to_torchvision, "mmseg": to_mmseg, "smp": to_smp}[peer]
    ours = read_checkpoint(run / "model.safetensors")
    tensors = convert_to(config, ours)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        if output.suffix == ".safetensors":
            save_file(tensors, partial, metadata={"format": "pt"})
        else:
            torch.save(tensors, partial)
        to_disk(partial)
        os.replace(partial, output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return _how_to_load(config, ours, output, peer)


def _how_to_load(config: Any, ours: dict[str, torch.Tensor], file: Path, peer: str) -> str:
    """The lines of Python with which a peer opens the file."""
    load = f"torch.load({file.name!r}, weights_only=True)"
    if file.suffix == ".safetensors":
        load = f"safetensors.torch.load_file({file.name!r})"
    if peer == "torchvision":
        name = "mobilenet_v3_large" if config.backbone.startswith("mobilenet") else config.backbone
        auxiliary = config.use_auxiliary_head
        make = f"torchvision.models.segmentation.deeplabv3_{name}(weights=None, weights_backbone=None, "
        make += f"num_classes={config.num_labels}, aux_loss={auxiliary})"
        if not has_published_form(config):
            make += f"  # but built with output stride {config.output_stride}, rates {config.effective_rates}"
    elif peer == "smp":
        arguments = ", ".join(f"{key}={value!r}" for key, value in smp_arguments(config).items())
        kind = "DeepLabV3Plus" if config.model_type.endswith("plus") else "DeepLabV3"
        make = f"segmentation_models_pytorch.{kind}(encoder_weights=None, {arguments})"
    else:
        make = f"mmseg.registry.MODELS.build({mmseg_model(config, ours)!r})"
    return f"model = {make}\nmodel.load_state_dict({load})"
