"""What a user gives to `ctxseg convert`: recognised by its content, opened, and handed to its converter."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .configuration_ctxseg import CtxSegConfig, check_choice
from .conversion import BACKBONE, Conversion, Tensors, checked
from .conversion_mmseg import from_mmseg
from .conversion_smp import from_smp
from .conversion_torchvision import from_torchvision
from .convert_mmseg_config import mmseg_classes, mmseg_config, mmseg_preprocessing, parse_mmseg_config
from .label_sets import VOC_CLASSES, voc_palette
from .publishable import read_json
from .state_dict import MARKS, find_state_dict, read_checkpoint


@dataclass
class Source:
    """An opened checkpoint.

    Args:
        path: What the user gave.
        files: The files it consists of.
        kind: Its format, one of `FORMATS`.
        tensors: The state dict, in the source's names; empty for TensorFlow's formats, which are read later.
        settings: What lies beside the tensors: smp's arguments, mmsegmentation's config, a config of ours.
        meta: The `meta` of an mmsegmentation checkpoint.
        notes: What was done while opening.
    """

    path: Path
    files: list[Path]
    kind: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    meta: Any = None
    notes: list[str] = field(default_factory=list)

    def sha256(self) -> str:
        """The SHA-256 of its file, or of each of its files behind the name."""
        digests = []
        for path in self.files:
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            digests.append(digest.hexdigest())
        if len(digests) == 1:
            return digests[0]
        return ", ".join(f"{path.name} {digest}" for path, digest in zip(self.files, digests, strict=True))


def open_source(
    path: str | Path, kind: str | None = None, *, peer_config: str | Path | None = None, entry: str | None = None
) -> Source:
    """Open a checkpoint and tell what it is.

    Args:
        path: A file, a folder, or the prefix of a TensorFlow checkpoint.
        kind: One of `FORMATS`; None: by content.
        peer_config: mmsegmentation's config, where the checkpoint does not hold it.
        entry: Entry of a checkpoint that holds the state dict, where it is not the usual one.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it cannot be read, or is of no known kind.
    """
    path = Path(path)
    if kind is not None:
        check_choice("--from", kind, list(FORMATS))
    bundle = _tensorflow_files(path)
    if kind == "tf" or (kind is None and bundle):
        return Source(path, bundle, "tf")
    if path.is_dir():
        return _open_folder(path, kind, entry)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file or folder {path}: check the path.")
    if kind == "tflite" or (kind is None and _is_tflite(path)):
        return Source(path, [path], "tflite")
    content = read_checkpoint(path)
    tensors, notes = find_state_dict(content, str(path), path.stat().st_size, entry=entry)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    kind = kind or _kind_of(tensors, str(path))
    source = Source(path, [path], kind, tensors, meta=meta, notes=notes)
    if kind == "mmseg":
        given = None if peer_config is None else parse_mmseg_config(_text(Path(peer_config)))
        source.settings = given or mmseg_config(meta) or {}
    return source


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: give mmsegmentation's config.") from error


def _is_tflite(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(8)[4:] == b"TFL3" or path.suffix in (".tflite", ".lite")


def _tensorflow_files(path: Path) -> list[Path]:
    """The files of a TensorFlow checkpoint given by its prefix, its index or its folder; empty if it is none."""
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        # Of a folder with several, the reader chooses by the file `checkpoint`.
        return [file for index in found[-1:] for file in _tensorflow_files(index)]
    prefix = path.name.removesuffix(".index").partition(".data-")[0]
    found = [file for file in path.parent.glob("*") if file.name.startswith((f"{prefix}.index", f"{prefix}.data-"))]
    return sorted(found) if any(file.suffix == ".index" for file in found) else []


def _open_folder(path: Path, kind: str | None, entry: str | None) -> Source:
    names = ("model.safetensors", "pytorch_model.bin")
    weights = next((path / name for name in names if (path / name).is_file()), None)
    if weights is None or not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is a folder without config.json and model.safetensors or pytorch_model.bin, and holds no "
            "TensorFlow checkpoint (*.index): give the file that holds the weights."
        )
    settings = read_json(path / "config.json")
    content = read_checkpoint(weights)
    tensors, notes = find_state_dict(content, str(weights), weights.stat().st_size, entry=entry)
    ours = str(settings.get("model_type", "")).startswith("ctxseg_")
    kind = kind or ("ctxseg" if ours else _kind_of(tensors, str(weights)))
    return Source(path, [weights], kind, tensors, settings, notes=notes)


def _kind_of(tensors: Tensors, name: str) -> str:
    for kind, marks in MARKS.items():
        if any(mark in tensors for mark in marks):
            return kind
    raise ValueError(
        f"{name} is no segmentation network that is known here: it has {len(tensors)} tensors "
        f"({', '.join(list(tensors)[:8])}, …). Known are {', '.join(FORMATS)}: name one with --from if it is of these."
    )


def convert_source(source: Source, options: Mapping[str, Any]) -> Conversion:
    """Hand a checkpoint to its converter.

    Args:
        source: The opened checkpoint.
        options: What the user states beside it, by name; None counts as not stated.

    Raises:
        ValueError: If an option means nothing there, a needed one is missing, or the converter refuses.
    """
    given = {name: value for name, value in options.items() if value is not None}
    converter, takes = FORMATS[source.kind]
    if unknown := sorted(set(given) - set(takes)):
        raise ValueError(
            f"--{unknown[0]} means nothing for a checkpoint of {source.kind}, which takes "
            f"{', '.join(f'--{name}' for name in takes) or 'no such option'}: leave it out."
        )
    conversion = converter(source, given)
    conversion.notes = [*source.notes, *conversion.notes]
    if conversion.config.num_labels == 1:
        _make_two_classes(conversion)
    elif source.kind in ("torchvision", "caffe", "tf") and conversion.config.num_labels == len(VOC_CLASSES):
        conversion.config = with_classes(conversion.config, VOC_CLASSES, voc_palette())
        conversion.notes.append("The file names no classes: with 21 of them they are taken to be PASCAL VOC 2012's.")
    broken = [
        key for key, value in conversion.tensors.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise ValueError(f"{source.path} holds NaN or infinite values in {', '.join(broken[:20])} (in our names).")
    return conversion


def _make_two_classes(conversion: Conversion) -> None:
    """Give a network of one logit, whose sigmoid is a probability, the two classes that a softmax takes."""
    for key in ("classifier.weight", "classifier.bias"):
        for name in (key, f"auxiliary_head.{key}"):
            if name in conversion.tensors:
                logit = conversion.tensors[name]
                conversion.tensors[name] = torch.cat([torch.zeros_like(logit), logit])
    fields = {key: value for key, value in conversion.config.to_dict().items() if key not in ("id2label", "label2id")}
    names = {0: "background", 1: "foreground"}
    conversion.config = type(conversion.config).from_dict({**fields, "id2label": names})
    conversion.notes.append(
        "The network gives one logit; ours gives two, the first always 0: a probability above 0.5 is class 1."
    )


def _assumed(given: Mapping[str, Any], config: CtxSegConfig, whose: str) -> list[str]:
    """What the tensors do not tell and nobody stated."""
    values = {"output_stride": config.output_stride, "atrous_rates": getattr(config, "atrous_rates", None)}
    told = [f"{name} {value}" for name, value in values.items() if name not in given and value is not None]
    return [f"The tensors do not tell these; assumed as in {whose}: {', '.join(told)}."] if told else []


def _torchvision(source: Source, given: dict[str, Any]) -> Conversion:
    config, tensors = from_torchvision(source.tensors, **given)
    notes = _assumed(given, config, "torchvision's published networks")
    if not config.use_auxiliary_head and any(key.startswith("aux_classifier.") for key in source.tensors):
        notes.append("The auxiliary classifier, which serves training only, was left out.")
    notes.append(
        "ImageNet mean and deviation, as torchvision's published weights; those scale pictures to 520 pixels."
    )
    return Conversion(config, tensors, {}, notes)


_SMP = {
    "encoder_output_stride": "output_stride",
    "decoder_atrous_rates": "atrous_rates",
    "encoder_name": "encoder_name",
}
_SMP_SAVED = (*_SMP, "decoder_aspp_dropout", "in_channels")


def _smp(source: Source, given: dict[str, Any]) -> Conversion:
    arguments = {name: source.settings[name] for name in _SMP_SAVED if source.settings.get(name) is not None}
    arguments |= {theirs: given[ours] for theirs, ours in _SMP.items() if ours in given}
    if "encoder_name" not in arguments:
        raise ValueError(
            f"{source.path} does not tell smp's encoder: give --encoder_name (as in smp: resnet50, tu-resnet18, …), "
            "and --output_stride and --atrous_rates if they were not smp's defaults."
        )
    config, tensors = from_smp(source.tensors, arguments.pop("encoder_name"), **arguments)
    told = {ours for theirs, ours in _SMP.items() if theirs in arguments}
    notes = _assumed(dict.fromkeys(told), config, "smp's defaults")
    notes.append("Mean and deviation are those that the encoder was pretrained with, if trained as smp advises.")
    return Conversion(config, tensors, _pretrained_statistics(config), notes)


def _pretrained_statistics(config: CtxSegConfig) -> dict[str, Any]:
    from .image_processing_ctxseg import CtxSegImageProcessor

    processor = CtxSegImageProcessor.for_backbone(config.backbone)
    return {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}


def _mmseg(source: Source, given: dict[str, Any]) -> Conversion:
    if not source.settings:
        raise ValueError(
            f"{source.path} holds no config, and its tensors do not tell strides, rates or epsilon: give "
            "mmsegmentation's full config with --peer_config FILE.py (it is read as text, not run)."
        )
    config, tensors = from_mmseg(source.tensors, source.settings["model"])
    preprocessing, bgr, notes = mmseg_preprocessing(source.settings)
    names, palette = mmseg_classes(source.meta)
    if names is not None and len(names) == config.num_labels:
        config = with_classes(config, names, palette)
    conversion = Conversion(config, tensors, preprocessing, notes)
    return from_bgr(conversion) if bgr else conversion


def from_bgr(conversion: Conversion) -> Conversion:
    """Make a network for blue, green, red take red, green, blue: its first convolution's inputs change places."""
    key = next(key for key, value in conversion.tensors.items() if key.startswith(f"{BACKBONE}.") and value.dim() == 4)
    if conversion.tensors[key].shape[1] != 3:
        raise ValueError("The network is said to take blue, green, red, but its pictures do not have three channels.")
    conversion.tensors[key] = conversion.tensors[key].flip(1)
    for name in ("image_mean", "image_std"):
        if name in conversion.preprocessing:
            conversion.preprocessing[name] = conversion.preprocessing[name][::-1]
    conversion.notes.append("Trained on blue, green, red: the first convolution's inputs were put in RGB order.")
    return conversion


def with_classes(
    config: CtxSegConfig, names: Sequence[str], palette: Sequence[Sequence[int]] | None = None
) -> CtxSegConfig:
    """Give the configuration with these class names and colours; raises `ValueError` if their number differs."""
    if len(names) != config.num_labels:
        raise ValueError(
            f"{len(names)} class names were given ({', '.join(list(names)[:5])}, …), but the network tells "
            f"{config.num_labels} classes apart: name each, the background too if it is one."
        )
    fields = {key: value for key, value in config.to_dict().items() if key not in ("id2label", "label2id", "palette")}
    colours = None if palette is None else [list(colour) for colour in palette]
    return type(config).from_dict({**fields, "id2label": dict(enumerate(names)), "palette": colours})


def _caffe(source: Source, given: dict[str, Any]) -> Conversion:
    from .conversion_caffe import from_caffe_deeplabv2

    return from_caffe_deeplabv2(source.tensors, **given)


def _tensorflow(source: Source, given: dict[str, Any]) -> Conversion:
    from .conversion_tf import from_tf_checkpoint

    return from_tf_checkpoint(source.path, **given)


def _tflite(source: Source, given: dict[str, Any]) -> Conversion:
    from .conversion_tflite import from_tflite

    try:
        return from_tflite(source.path, **given)
    except ImportError as error:
        raise ValueError(str(error)) from error


def _own(source: Source, given: dict[str, Any]) -> Conversion:
    fields = {key: value for key, value in source.settings.items() if key not in ("auto_map", "_name_or_path")}
    config, tensors = checked(AutoConfig.for_model(**fields), source.tensors, str(source.path))
    statistics: dict[str, Any] = {}
    if (source.path / "preprocessor_config.json").is_file():
        saved = read_json(source.path / "preprocessor_config.json")
        statistics = {key: value for key, value in saved.items() if key not in ("auto_map", "image_processor_type")}
    return Conversion(config, tensors, statistics)


# What each kind is converted by, and which options it takes.
FORMATS: dict[str, tuple[Callable[[Source, dict[str, Any]], Conversion], tuple[str, ...]]] = {
    "torchvision": (_torchvision, ("output_stride", "atrous_rates")),
    "smp": (_smp, ("encoder_name", "output_stride", "atrous_rates")),
    "mmseg": (_mmseg, ()),
    "caffe": (_caffe, ("atrous_rates",)),
    "tf": (_tensorflow, ("output_stride", "atrous_rates", "image_pooling_crop_size", "multi_grid")),
    "tflite": (_tflite, ()),
    "ctxseg": (_own, ()),
}
