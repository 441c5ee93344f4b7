"""Model cards: a README.md for a trained model, written from what was measured and nothing else.

The card is rendered from a run folder's `config.json` and `metrics.json` and shows the pictures that lie beside them.
A section whose facts are missing is left out. Local paths and tokens are cut from every text, for cards are published;
whatever a user may name (classes, data sets, folders) is escaped for Markdown and YAML.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .publishable import base_name, public_json

TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Identifiers that the Hub knows and that data sets for segmentation carry; it refuses a card with any other.
HUB_LICENSES = frozenset(
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0"
    " cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0"
    " cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 gpl-2.0 gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 odbl odc-by pddl unlicense".split()
)
_SETTINGS = {
    "steps": "steps",
    "epochs": "epochs",
    "batch_size": "batch size",
    "crop_size": "crop, height x width",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "head_learning_rate_factor": "learning rate of the head, times",
    "lr_scheduler": "schedule",
    "precision": "precision",
    "seed": "seed",
    "device": "device",
    "init_from": "started from",
    "train_loss": "training loss",
}
_IOUS = {"mean_iou": "mean IoU", "frequency_weighted_iou": "frequency-weighted IoU", "boundary_iou": "boundary IoU"}
_MEASURES = {**_IOUS, "mean_accuracy": "mean accuracy", "overall_accuracy": "overall accuracy"}
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def render_card(
    run: Path, *, repo_id: str | None = None, include_pictures: bool = True, config_file: Path | None = None
) -> str:
    """Render the model card of a run folder.

    Args:
        run: The run folder; `config.json` must be there, `metrics.json` and the pictures may be.
        repo_id: Name on the Hub that the card tells its readers to load; the folder's own name if it is not given.
        include_pictures: Whether the card shows the run's pictures.
        config_file: The config, where it is not in the run folder yet.

    Returns:
        The Markdown text with its YAML header.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: `config.json` or `metrics.json` is not a JSON object.
    """
    run = Path(run)
    config = public_json(config_file or run / "config.json")
    metrics = public_json(run / "metrics.json") if (run / "metrics.json").is_file() else {}
    name = repo_id or run.resolve().name
    pictures = card_pictures(run) if include_pictures else []
    context = {
        **_description(config, metrics, name),
        **_results(metrics),
        **_classes(metrics),
        **_training(metrics),
        **_limits_and_licence(config, metrics),
        **_conversion(metrics),
        "preview": next((picture for picture in pictures if picture.startswith("previews/")), None),
        "confusion_picture": "confusion.png" if "confusion.png" in pictures else None,
        "per_class_picture": "per_class.png" if "per_class.png" in pictures else None,
        "curves": "curves.png" if "curves.png" in pictures else None,
    }
    card = str(ModelCard.from_template(_metadata(config, metrics, name), template_path=str(TEMPLATE), **context))
    # The template's conditions leave empty lines behind: none inside a table, never two in a row.
    card = re.sub(r"\|\n\n(?=\|)", "|\n", card)
    return re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n"


def write_card(run: Path, repo_id: str | None = None, config_file: Path | None = None) -> Path:
    """Render the card of a run folder into its `README.md` and return that path; raises what `render_card` raises."""
    path = Path(run) / "README.md"
    path.write_text(render_card(Path(run), repo_id=repo_id, config_file=config_file), encoding="utf-8", newline="\n")
    return path


def card_pictures(run: Path) -> list[str]:
    """List the pictures that the card shows, as paths inside the run folder: the newest preview and the plots."""
    previews = [path for path in Path(run).glob("previews/step-*.png") if re.fullmatch(r"step-\d+", path.stem)]
    newest = sorted(previews, key=lambda path: int(path.stem.removeprefix("step-")))[-1:]
    plots = [name for name in ("per_class.png", "confusion.png", "curves.png") if (Path(run) / name).is_file()]
    return [f"previews/{path.name}" for path in newest] + plots


def _plain(value: object) -> str:
    """One line of text without control characters: safe as a YAML value."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def _markdown(value: object) -> str:
    text = _plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def _code(value: object) -> str:
    """Inline code, or escaped text where the value itself would end the code or a table's cell."""
    text = _plain(value)
    return _markdown(text) if not text or set(text) & set("`|\\") else f"`{text}`"


def _number(value: object) -> str:
    """Integers in full, other numbers to four digits, sizes with an x between; texts are escaped."""
    if isinstance(value, list):
        return " x ".join(_number(item) for item in value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else _markdown(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.4g} s"


def _section(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    """The facts of one part of metrics.json that are known."""
    return {key: value for key, value in (metrics.get(name) or {}).items() if value is not None}


def _hub_id(value: object) -> str | None:
    """The value if it can only be meant as `namespace/name` on the Hub: not a folder that is here, nor a path."""
    text = str(value or "")
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) and not os.path.exists(text)
    return text if is_id else None


def _head(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    return str(_section(metrics, "model").get("head") or str(config.get("model_type", "")).removeprefix("ctxseg_"))


def _source_name(metrics: dict[str, Any]) -> str:
    source = _section(metrics, "data").get("source")
    return _hub_id(source) or base_name(str(source)) if source else ""


def _metadata(config: dict[str, Any], metrics: dict[str, Any], name: str) -> ModelCardData:
    data, model, evaluation = (_section(metrics, part) for part in ("data", "model", "evaluation"))
    weights = re.match(r"timm/[\w.-]+", str(model.get("backbone_weights", "")))
    base_model = _hub_id(_section(metrics, "training").get("init_from")) or (weights[0] if weights else None)
    dataset = _hub_id(data.get("source"))
    licence = str((_section(metrics, "conversion") or data).get("license", "")).lower()
    tags = ["ctxseg", "semantic-segmentation", _head(config, metrics), config.get("backbone")]
    result = None
    if evaluation.get("mean_iou") is not None:
        source = _plain(_source_name(metrics)) or "unnamed"
        result = EvalResult(
            task_type="image-segmentation",
            dataset_type=dataset or re.sub(r"[^a-z0-9._-]+", "-", source.lower()).strip("-.") or "unnamed",
            dataset_name=source,
            dataset_split=_plain(evaluation["split"]) if "split" in evaluation else None,
            metric_type="mean_iou",
            metric_name="Mean IoU",
            metric_value=evaluation["mean_iou"],
        )
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        license=licence if licence in HUB_LICENSES else None,
        tags=[_plain(tag) for tag in tags if tag],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        metrics=["mean_iou"] if result else None,
        model_name=_plain(name.rpartition("/")[2]),
        eval_results=[result] if result else None,
    )


def _description(config: dict[str, Any], metrics: dict[str, Any], name: str) -> dict[str, Any]:
    model = _section(metrics, "model")
    architecture = str(model.get("class") or next(iter(config.get("architectures") or []), "Model"))
    family = architecture.removesuffix("ForSemanticSegmentation")
    source = _source_name(metrics)
    title = family + (f" on {config['backbone']}" if config.get("backbone") else "")
    facts = [f"with the timm backbone {_code(config['backbone'])}" if config.get("backbone") else ""]
    facts += [f"at output stride {_number(config['output_stride'])}" if config.get("output_stride") else ""]
    summary = " ".join(["A semantic segmentation model:", _markdown(family), *filter(None, facts)])
    if config.get("id2label"):
        summary += f", {_number(len(config['id2label']))} classes"
    if model.get("parameters"):
        summary += f", {_number(model['parameters'])} parameters"
    return {
        "title": _markdown(title) + (f", trained on {_markdown(source)}" if source else ""),
        "summary": summary + ".",
        "model_literal": json.dumps(name),
        "head": _head(config, metrics),
    }


def _results(metrics: dict[str, Any]) -> dict[str, Any]:
    evaluation = _section(metrics, "evaluation")
    scores = [(label, f"{_percent(evaluation[key])} %") for key, label in _MEASURES.items() if key in evaluation]
    for width, iou in (evaluation.get("trimap_mean_iou") or {}).items():
        scores.append((f"trimap mean IoU, {_number(width)} px from edges", f"{_percent(iou)} %"))
    if "loss" in evaluation:
        scores.append(("loss", _number(evaluation["loss"])))
    if "seconds" in evaluation:
        scores.append(("time of the evaluation", _duration(evaluation["seconds"])))
    split = f"the split {_code(evaluation['split'])}" if "split" in evaluation else "the evaluation data"
    images = f", {_number(evaluation['num_images'])} images" if "num_images" in evaluation else ""
    protocol = _markdown(evaluation["protocol"]).rstrip(".") if "protocol" in evaluation else None
    return {"scores": scores, "evaluated_on": f"Measured on {split}{images}.", "protocol": protocol}


def _classes(metrics: dict[str, Any]) -> dict[str, Any]:
    evaluation = _section(metrics, "evaluation")
    ious = evaluation.get("per_category_iou") or {}
    accuracies = evaluation.get("per_category_accuracy") or {}
    pixels = _section(metrics, "data").get("class_pixels") or {}
    rows = [
        {
            "name": _markdown(name),
            "iou": _percent(iou),
            "accuracy": _percent(accuracies.get(name)),
            "pixels": _number(pixels[name]) if name in pixels else "-",
        }
        for name, iou in ious.items()
    ]
    ranked = sorted((name for name, iou in ious.items() if iou is not None), key=lambda name: -ious[name])
    count = min(5, len(ranked) // 2)

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"{_markdown(name)} ({_percent(ious[name])} %)" for name in names)

    best, worst = listed(ranked[:count]), listed(reversed(ranked[len(ranked) - count :]))
    confusions = ", ".join(
        f"{_markdown(found['reference'])} taken for {_markdown(found['prediction'])} ({_percent(found['share'])} %)"
        for found in (evaluation.get("worst_confusions") or [])[:5]
    )
    return {"classes": rows, "has_pixels": bool(pixels), "best": best, "worst": worst, "confusions": confusions}


def _training(metrics: dict[str, Any]) -> dict[str, Any]:
    training, data, model = (_section(metrics, part) for part in ("training", "data", "model"))
    rows = [(label, _number(training[key])) for key, label in _SETTINGS.items() if key in training]
    if "backbone_weights" in model:
        rows.insert(0, ("backbone weights", _markdown(model["backbone_weights"])))
    if data.get("train_images"):
        rows.insert(0, ("training images", _number(data["train_images"])))
    if "seconds" in training:
        rows.append(("time", _duration(training["seconds"])))
    command = _plain(training["command"]) if "command" in training else ""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall(r"`+", command))])
    versions = ", ".join(f"{_code(name)} {_markdown(value)}" for name, value in _section(metrics, "versions").items())
    return {
        "training": rows,
        "command": f"{fence}bash\n{command}\n{fence}" if command else None,
        "versions": versions + "." if versions else None,
    }


def _conversion(metrics: dict[str, Any]) -> dict[str, Any]:
    """Facts of a converted model; its limits and licence take the place of a trained one's."""
    if not (facts := _section(metrics, "conversion")):
        return {}
    licence = facts.get("license") or "not stated; check it at their source before publishing"
    return {
        "conversion": [(name, _markdown(facts[name])) for name in ("source", "format", "sha256", "comparison")],
        "conversion_notes": [_markdown(note) for note in facts.get("notes", [])],
        "limits": ["Not evaluated here: no score is known."],
        "data_licence": f"Licence of the converted weights: {_markdown(licence)}.",
    }


def _limits_and_licence(config: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    data, training, evaluation = (_section(metrics, part) for part in ("data", "training", "evaluation"))
    source = f" of {_markdown(_source_name(metrics))}" if data.get("source") else ""
    images = f"{_number(data['train_images'])} images" if data.get("train_images") else "the images"
    limits = [f"Trained on {images}{source}: on pictures of another kind its quality is not known."]
    if "crop_size" in training:
        limits.append(f"Trained on crops of {_number(training['crop_size'])} pixels; other scales were not measured.")
    if "mean_iou" not in evaluation:
        limits.append("Not evaluated: no score is known.")
    ious = evaluation.get("per_category_iou") or {}
    absent = [name for name, iou in ious.items() if iou is None]
    if absent:
        count = f"{_number(len(absent))} of {_number(len(ious))} classes"
        names = ", ".join(map(_markdown, absent))
        limits.append(f"Not in the evaluation images, hence without a score ({count}): {names}.")
    unseen = [name for name, pixels in (data.get("class_pixels") or {}).items() if pixels == 0]
    if unseen:
        limits.append(f"Never seen in training, so not to be expected: {', '.join(map(_markdown, unseen))}.")
    weights = _section(metrics, "model").get("backbone_weights")
    backbone = f"Licence of the backbone weights, {_markdown(weights)}: not stated; check it at their source."
    licence = _markdown(data.get("license") or "not stated; check the data's licence before publishing")
    return {
        "limits": limits,
        "data_licence": f"Licence of the training data: {licence}.",
        "backbone_licence": backbone if weights not in (None, "none") else None,
    }
