"""The arguments of training: three dataclasses that flags, a YAML file and `hf_ctxseg.train(...)` all fill."""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from .class_weights import check_class_weights
from .losses import parse_loss
from .recipes import find_recipe
from .trainer_options import TrainerOptions


@dataclass
class ModelArguments:
    """Which model is trained, and from which weights."""

    head: str = field(default="deeplabv3", metadata={"help": "Context head: the name of a registered model."})
    backbone: str = field(default="resnet50", metadata={"help": "Name of a timm model that can dilate."})
    preset: str | None = field(
        default=None, metadata={"help": "Head and backbone by one name, instead of both: see `ctxseg models`."}
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "ImageNet weights of the backbone: a .safetensors or .pth file in timm's names, or 'none' for "
            "random ones. By default those of an installed package (tf_efficientnet_lite0), else timm's from the Hub."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Start from this segmentation checkpoint of ours; its classes may be others."},
    )
    output_stride: int | None = field(
        default=None, metadata={"help": "Input pixels per step of the deepest map (default: 16, or the checkpoint's)."}
    )
    use_auxiliary_head: bool | None = field(
        default=None, metadata={"help": "Also train an FCN head on the last but one stage."}
    )
    config_overrides: list[str] | None = field(
        default=None,
        metadata={"help": "Further config fields, for example: atrous_rates=[3,6,9] use_image_pooling=false"},
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Channel means of the backbone's training (default: timm's for its name)."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Channel standard deviations of the backbone's training."}
    )


@dataclass
class DataArguments:
    """Which pictures are trained on, and how they are cut."""

    data: str | None = field(
        default=None,
        metadata={"help": "Folder of images and masks, parquet file or folder, or name of a Hub data set."},
    )
    recipe: str | None = field(
        default=None,
        metadata={
            "help": "Known data set (see `ctxseg models --recipes`) or a recipe file: its folders, label maps and "
            "classes, and the schedule to start from."
        },
    )
    labels: str | None = field(
        default=None,
        metadata={"help": "Class names: a .txt (one a line) or .json file, or names separated by commas."},
    )
    ignore_index: int | None = field(
        default=None, metadata={"help": "Label value of pixels without a class (default: the data's own, or 255)."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split that is scored (default: val or validation, else held-out pictures)."}
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of the pictures held out where there is no split to score; 0: none."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the pictures in a table."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the label maps in a table."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training split of parquet or the Hub as it comes; needs --max_steps."},
    )
    shuffle_buffer: int = field(
        default=300, metadata={"help": "Rows of a stream that each worker holds, encoded, to draw the next from."}
    )
    cache_gib: float = field(
        default=0.0, metadata={"help": "Decoded training pictures kept in shared memory, in GiB per process; 0: none."}
    )
    data_license: str | None = field(
        default=None, metadata={"help": "Licence of the data as the Hub spells it, for the model card: cc-by-nc-4.0"}
    )
    crop_size: list[int] = field(
        default_factory=lambda: [320], metadata={"help": "Height and width of the training crops, in pixels."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Scale pictures to this longest edge in pixels, in training and use (default: as they are)."
        },
    )
    scale: list[float] = field(
        default_factory=lambda: [0.5, 2.0], metadata={"help": "Range of the random scale before the crop."}
    )
    max_class_ratio: float = field(
        default=0.75, metadata={"help": "Crops that one class covers more than this are drawn again (10 tries)."}
    )
    scan_workers: int | None = field(default=None, metadata={"help": "Threads of the label scan (default: all)."})
    dry_run: bool = field(
        default=False, metadata={"help": "Scan the labels, write the contact sheet, build the model, and stop."}
    )


@dataclass
class CtxSegTrainingArguments(TrainerOptions):
    """transformers' `TrainingArguments` with the defaults of this recipe, and what it lacks."""

    output_dir: str | None = field(default=None, metadata={"help": "Run folder: model, card, figures, checkpoints."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Crops per device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Whole pictures per device at evaluation."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the data; without it and --max_steps, 600 steps are trained."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Of the backbone; see head_learning_rate_factor."})
    head_learning_rate_factor: float = field(
        default=10.0, metadata={"help": "Learning rate of head and classifier, as a multiple of the backbone's."}
    )
    weight_decay: float = field(default=1e-4, metadata={"help": "Not applied to normalisations and biases."})
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Schedule of the learning rate."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Of the schedule (polynomial: power 0.9 to a learning rate of 0)."}
    )
    loss: str = field(
        default="cross_entropy",
        metadata={"help": "cross_entropy, ohem, dice, lovasz, focal or a sum: 'cross_entropy+0.5*lovasz'"},
    )
    class_weights: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "Of the classes in the loss: none, median_frequency or effective_number, both measured from the "
            "training labels, or one number for each class."
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of the target that cross_entropy and ohem spread over all classes."}
    )
    freeze_batch_norm: str = field(
        default="none",
        metadata={
            "help": "Keep statistics and weights of batch normalisation as loaded, in: none, backbone or all.",
            "choices": ["none", "backbone", "all"],
        },
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to score: no, steps or epoch."})
    eval_steps: float | None = field(default=0.25, metadata={"help": "Steps between scores; below 1: share of all."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save checkpoints: no, steps or epoch."})
    save_steps: float = field(default=0.25, metadata={"help": "Steps between checkpoints; below 1: share of all."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between lines of the log."})
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that load and augment pictures."})
    dataloader_persistent_workers: bool = field(default=True, metadata={"help": "Keep them between epochs."})
    # HfArgumentParser reads the union in this order alone
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Tracker: none, tensorboard, …"}
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "Lines instead of a progress bar."})
    resume: bool = field(
        default=False, metadata={"help": "Continue from the newest complete checkpoint of output_dir, or start."}
    )
    max_nan_steps: int = field(
        default=3,
        metadata={"help": "Stop after this many steps in a row without a finite loss; each of them is left out."},
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Memory format of the weights on a GPU: faster with bf16 or fp16."}
    )
    preview_images: int = field(default=4, metadata={"help": "Validation pictures drawn at each evaluation."})
    measure_cost: bool = field(
        default=True,
        metadata={"help": "Measure time and memory of the trained model for its card, in about 10 s at the end."},
    )
    # What follows is needed by the trainer of this package and not for users to choose.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always false here."})
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Always true here: scores are streamed."})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is missing: name the run folder with --output_dir.")
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0
            if self.max_steps <= 0:  # type: ignore[has-type]
                self.max_steps = 600
        if self.lr_scheduler_type == "polynomial" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"power": 0.9, "lr_end": 0.0}
        self._refuse_unusable()
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False
        self.remove_unused_columns, self.batch_eval_metrics = False, True
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch would warn at every data loader
        for name in self.report_to or []:
            if name not in (available := get_available_reporting_integrations()):
                raise ValueError(
                    f"report_to names {name!r}, but this tracker is not installed: install its package, or choose "
                    f"from none{', '.join(['', *available])}."
                )

    def _refuse_unusable(self) -> None:
        if self.freeze_batch_norm not in ("none", "backbone", "all"):
            raise ValueError(f"freeze_batch_norm is {self.freeze_batch_norm!r}, but must be none, backbone or all.")
        if self.max_nan_steps < 1:
            raise ValueError(f"max_nan_steps is {self.max_nan_steps}, but must be at least 1.")
        self._check_loss()
        if self.resume_from_checkpoint:
            raise ValueError("resume_from_checkpoint is not taken: --resume continues the run in output_dir.")
        if self.save_only_model:
            raise ValueError("save_only_model is not taken: such a checkpoint could not be continued from.")
        if self.push_to_hub:
            raise ValueError("push_to_hub is not taken: publish the finished run with `ctxseg push`.")

    def _check_loss(self) -> None:
        terms = parse_loss(self.loss)
        self.class_weights = check_class_weights(self.class_weights)
        if self.label_smoothing_factor != 0:
            raise ValueError("label_smoothing_factor is of no effect on pixel labels: give --label_smoothing instead.")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, but must lie between 0 and 1: 0.1 is usual.")
        for name, given in (("label_smoothing", self.label_smoothing), ("class_weights", self.class_weights)):
            if given not in (0, ["none"]) and not any(term.accepts(name) for term in terms):
                raise ValueError(f"{name} is of no effect on the loss {self.loss}: leave it out, or add a term to it.")


Arguments = tuple[ModelArguments, DataArguments, CtxSegTrainingArguments]
_CLASSES = (ModelArguments, DataArguments, CtxSegTrainingArguments)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise; argparse would print every flag there is before the message."""
        raise ValueError(f"{message}; see {self.prog} --help.")


def parse_arguments(argv: Sequence[str]) -> tuple[Arguments, dict[str, Any]]:
    """Read flags, and a YAML file named by `--config FILE` that they override.

    Returns:
        The three argument objects, and the arguments that were given, by name, for `args.yaml`.

    Raises:
        ValueError: If the file is missing or has an unknown key, or a value is out of range.
        SystemExit: After `--help` has been printed.
    """
    config = _Parser([], prog="ctxseg train", add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path, flags = config.parse_known_args(list(argv))
    given = read_yaml(path.config) if path.config else {}
    names = _field_names()
    named = {token[2:].split("=")[0].replace("-", "_") for token in flags if token.startswith("--")}
    named = {name if name in names else name.removeprefix("no_") for name in named}
    if unknown := sorted(named - names - {"help"}):
        raise ValueError(_unknown_message(unknown[0], "flag"))
    parser = _Parser(_CLASSES, prog="ctxseg train", allow_abbrev=False)
    values = vars(parser.parse_args([*_as_flags(given), *flags]))
    given = {name: values[name] for name in [*given, *sorted(named - set(given))]}
    return _build(given), given


def arguments_from_dict(given: dict[str, Any]) -> Arguments:
    """Make the three argument objects from keyword arguments; an unknown one raises `ValueError`."""
    for name in given:
        if name not in _field_names():
            raise ValueError(_unknown_message(name, "argument"))
    return _build(given)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of arguments; an unknown key raises `ValueError` with the nearest name."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no arguments file {path}: check the path.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but must hold lines of the form `name: value`.")
    for name in content:
        if name not in _field_names():
            raise ValueError(f"{path}: {_unknown_message(str(name), 'key')}")
    return content


def _as_flags(given: dict[str, Any]) -> list[str]:
    # Through the parser, so that a YAML value is typed and checked as a flag is.
    flags: list[str] = []
    for name, value in given.items():
        if value is None:
            continue
        if name == "labels" and isinstance(value, list):
            flags += ["--labels", ",".join(map(str, value))]
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return flags


def _build(given: dict[str, Any]) -> Arguments:
    if given.get("recipe"):
        given = {**_starting_point(given), **given}
    built = []
    for kind in _CLASSES:
        names = {item.name for item in fields(kind) if item.init}
        built.append(kind(**{name: value for name, value in given.items() if name in names}))
    model_arguments, data_arguments, training_arguments = built
    stated = {name for name, value in given.items() if value}
    both = sorted({"head", "backbone", "backbone_weights", "preset"} & stated)
    if given.get("model_name_or_path") is not None and both:
        raise ValueError(
            f"{both[0]} is given beside model_name_or_path, whose checkpoint brings its own: leave it out."
        )
    if "preset" in stated and (both := sorted({"head", "backbone"} & stated)):
        raise ValueError(f"{both[0]} is given beside preset, which brings its own: leave one of the two out.")
    _check_pictures(model_arguments)
    _check(data_arguments)
    return model_arguments, data_arguments, training_arguments  # type: ignore[return-value]


def _starting_point(given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's arguments; its steps give way to epochs that are given."""
    values = dict(find_recipe(given["recipe"]).arguments)
    for name in values:
        if name not in _field_names():
            raise ValueError(f"Recipe {given['recipe']}: {_unknown_message(str(name), 'argument')}")
    if given.get("num_train_epochs") is not None:
        values.pop("max_steps", None)
    return values


def _check_pictures(arguments: Any) -> None:
    for name in ("image_mean", "image_std"):
        value = getattr(arguments, name)
        if value is not None and len(value) != 3:
            raise ValueError(f"{name} is {value}, but must be three numbers, for red, green and blue.")


def _check(arguments: Any) -> None:
    if arguments.data is None:
        raise ValueError("data is missing: name a folder of images and masks, or a Hub data set, with --data.")
    if isinstance(arguments.crop_size, int):
        arguments.crop_size = [arguments.crop_size]
    if len(arguments.crop_size) not in (1, 2) or min(arguments.crop_size) < 1:
        raise ValueError(f"crop_size is {arguments.crop_size}, but must be one or two whole numbers above 0.")
    if len(arguments.scale) != 2 or not 0 < arguments.scale[0] <= arguments.scale[1]:
        raise ValueError(f"scale is {arguments.scale}, but must be two numbers above 0, the smaller first.")
    if not 0 < arguments.max_class_ratio <= 1:
        raise ValueError(f"max_class_ratio is {arguments.max_class_ratio}, but must be above 0 and at most 1.")
    for name, least in (("shuffle_buffer", 1), ("cache_gib", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} is {getattr(arguments, name)}, but must be at least {least}.")
    if arguments.image_size is not None and arguments.image_size < 1:
        raise ValueError(f"image_size is {arguments.image_size}, but must be above 0.")


def _field_names() -> set[str]:
    return {item.name for kind in _CLASSES for item in fields(kind) if item.init}


def _unknown_message(name: str, kind: str) -> str:
    near = difflib.get_close_matches(name, sorted(_field_names()), n=1)
    return f"There is no {kind} {name!r}" + (f": did you mean {near[0]!r}?" if near else "; see --help-all.")


def short_help(stream: Any = None) -> None:
    """Print the arguments of this package; those of `TrainingArguments` beside them are under `--help-all`."""
    stream = stream or sys.stdout
    for kind, title in zip(_CLASSES, ("Model", "Data", "Training"), strict=True):
        print(f"\n{title}", file=stream)
        own = {**kind.__annotations__, **(TrainerOptions.__annotations__ if title == "Training" else {})}
        for item in fields(kind):
            if item.name not in own or "Always" in item.metadata.get("help", "") or not item.init:
                continue
            default: Any = item.default
            if item.default_factory is not MISSING:
                default = " ".join(map(str, item.default_factory()))
            shown = "" if default is None else f" [{default}]"
            print(f"  --{item.name:<28} {item.metadata.get('help', '')}{shown}", file=stream)
