"""What stands in the sections of a model card, gathered from `config.json` and `metrics.json`.

Each function gives what the template asks for, as texts that are ready to stand there; a fact that is not known gives
nothing, and the template leaves its place out.
"""

import json
from collections.abc import Iterable
from typing import Any

from .card_text import bar, code, fenced, hub_id, known, markdown, number, percent, plain
from .citations import citations
from .licences import find_licence
from .publishable import base_name
from .wording import duration

_SETTINGS = {
    "steps": "steps",
    "epochs": "epochs",
    "batch_size": "batch size",
    "crop_size": "crop, height x width",
    "augmentation": "augmentation",
    "loss": "loss",
    "label_smoothing": "label smoothing",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "head_learning_rate_factor": "learning rate of the head, times",
    "layer_decay": "learning rate of a stage, times that of the next",
    "lr_scheduler": "schedule",
    "warmup_steps": "warm-up, in steps or as a share",
    "weight_decay": "weight decay",
    "ema_decay": "moving average of the weights, decay",
    "freeze_batch_norm": "batch normalisation kept as loaded",
    "precision": "precision",
    "seed": "seed",
    "device": "device",
    "init_from": "started from",
    "train_loss": "training loss",
}
_IOUS = {"mean_iou": "mean IoU", "frequency_weighted_iou": "frequency-weighted IoU", "boundary_iou": "boundary IoU"}
MEASURES = {**_IOUS, "mean_accuracy": "mean accuracy", "overall_accuracy": "overall accuracy"}


def body(config: dict[str, Any], metrics: dict[str, Any], name: str) -> dict[str, Any]:
    """Everything that the template fills in below the header, except pictures.

    Args:
        config: The content of `config.json`.
        metrics: The content of `metrics.json`.
        name: What readers are told to load.
    """
    return {
        **_description(config, metrics, name),
        **_results(metrics),
        **_seeds(metrics),
        **_classes(metrics),
        **_training(metrics),
        **_cost(metrics),
        "stored": _stored(metrics),
        "limits": _limits(metrics),
        **_licences(metrics),
        **_conversion(metrics),
        "citations": citations(head_of(config, metrics), config),
    }


def head_of(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The name of the head."""
    return str(known(metrics, "model").get("head") or str(config.get("model_type", "")).removeprefix("ctxseg_"))


def source_name(metrics: dict[str, Any]) -> str:
    """The name of the data: of a folder, its last part."""
    source = known(metrics, "data").get("source")
    return hub_id(source) or base_name(str(source)) if source else ""


def _description(config: dict[str, Any], metrics: dict[str, Any], name: str) -> dict[str, Any]:
    model = known(metrics, "model")
    architecture = str(model.get("class") or next(iter(config.get("architectures") or []), "Model"))
    family = architecture.removesuffix("ForSemanticSegmentation")
    source = source_name(metrics)
    title = family + (f" on {config['backbone']}" if config.get("backbone") else "")
    facts = [f"with the timm backbone {code(config['backbone'])}" if config.get("backbone") else ""]
    facts += [f"at output stride {number(config['output_stride'])}" if config.get("output_stride") else ""]
    summary = " ".join(["A semantic segmentation model:", markdown(family), *filter(None, facts)])
    if config.get("id2label"):
        summary += f", {number(len(config['id2label']))} classes"
    if model.get("parameters"):
        summary += f", {number(model['parameters'])} parameters"
    return {
        "title": markdown(title) + (f", trained on {markdown(source)}" if source else ""),
        "summary": summary + ".",
        "model_literal": json.dumps(name, ensure_ascii=False),
    }


def _results(metrics: dict[str, Any]) -> dict[str, Any]:
    evaluation = known(metrics, "evaluation")
    scores = [(label, f"{percent(evaluation[key])} %") for key, label in MEASURES.items() if key in evaluation]
    for width, iou in (evaluation.get("trimap_mean_iou") or {}).items():
        scores.append((f"trimap mean IoU, {number(width)} px from edges", f"{percent(iou)} %"))
    if "loss" in evaluation:
        scores.append(("loss", number(evaluation["loss"])))
    if "seconds" in evaluation:
        scores.append(("time of the evaluation", duration(evaluation["seconds"])))
    split = f"the split {code(evaluation['split'])}" if "split" in evaluation else "the evaluation data"
    images = f", {number(evaluation['num_images'])} images" if "num_images" in evaluation else ""
    protocol = markdown(evaluation["protocol"]).rstrip(".") if "protocol" in evaluation else None
    return {"scores": scores, "evaluated_on": f"Measured on {split}{images}.", "protocol": protocol}


def _seeds(metrics: dict[str, Any]) -> dict[str, Any]:
    """The spread over trainings that differ in their seed alone."""
    if not (facts := known(metrics, "seeds")):
        return {}
    rows = [
        (MEASURES[measure], *(f"{percent(found[key])} %" for key in ("mean", "deviation", "lowest", "highest")))
        for measure, found in facts["scores"].items()
    ]
    seeds = [number(seed) for seed in facts["seeds"]]
    listed = f"{', '.join(seeds[:-1])} and {seeds[-1]}"
    return {"seed_rows": rows, "seeds": f"The same training with the seeds {listed}"}


def _classes(metrics: dict[str, Any]) -> dict[str, Any]:
    evaluation = known(metrics, "evaluation")
    ious = evaluation.get("per_category_iou") or {}
    accuracies = evaluation.get("per_category_accuracy") or {}
    pixels = known(metrics, "data").get("class_pixels") or {}
    rows = [
        {
            "name": markdown(name),
            "iou": percent(iou),
            "bar": bar(iou),
            "accuracy": percent(accuracies.get(name)),
            "pixels": number(pixels[name]) if name in pixels else "-",
        }
        for name, iou in ious.items()
    ]
    ranked = sorted((name for name, iou in ious.items() if iou is not None), key=lambda name: -ious[name])
    count = min(5, len(ranked) // 2)
    best, worst = _scored(ranked[:count], ious), _scored(reversed(ranked[len(ranked) - count :]), ious)
    confusions = ", ".join(
        f"{markdown(found['reference'])} taken for {markdown(found['prediction'])} ({percent(found['share'])} %)"
        for found in (evaluation.get("worst_confusions") or [])[:5]
    )
    return {"classes": rows, "has_pixels": bool(pixels), "best": best, "worst": worst, "confusions": confusions}


def _scored(names: Iterable[str], ious: dict[str, float]) -> str:
    return ", ".join(f"{markdown(name)} ({percent(ious[name])} %)" for name in names)


def _training(metrics: dict[str, Any]) -> dict[str, Any]:
    training, data, model = (known(metrics, part) for part in ("training", "data", "model"))
    rows = [(label, number(training[key])) for key, label in _SETTINGS.items() if key in training]
    if "backbone_weights" in model:
        rows.insert(0, ("backbone weights", markdown(model["backbone_weights"])))
    if data.get("train_images"):
        rows.insert(0, ("training images", number(data["train_images"])))
    if weights := training.get("class_weights"):
        rows.append(("class weights", ", ".join(f"{markdown(name)} {number(weights[name])}" for name in weights)))
    if "seconds" in training:
        rows.append(("time", duration(training["seconds"])))
    versions = ", ".join(f"{code(name)} {markdown(value)}" for name, value in known(metrics, "versions").items())
    return {
        "training": rows,
        "command": fenced(training["command"], "bash") if plain(training.get("command", "")) else None,
        "versions": versions + "." if versions else None,
    }


def _cost(metrics: dict[str, Any]) -> dict[str, Any]:
    cost = known(metrics, "cost")
    if not cost.get("sizes"):
        return {}
    titles = {"gmacs": "GMACs", "milliseconds": "time, ms", "peak_mib": "peak memory, MiB"}
    titles = {key: title for key, title in titles.items() if any(row.get(key) is not None for row in cost["sizes"])}
    rows = [
        [number([row["height"], row["width"]]), *("-" if row[key] is None else number(row[key]) for key in titles)]
        for row in cost["sizes"]
    ]
    count = cost.get("threads")
    threads = "" if count is None else f", {number(count)} thread" + ("s" if count > 1 else "")
    how = f"{markdown(cost['device'])}{threads}, {markdown(cost['dtype'])}, median of {number(cost['repeats'])} runs"
    return {"cost_titles": list(titles.values()), "cost_rows": rows, "cost_how": how}


def _stored(metrics: dict[str, Any]) -> str | None:
    """How the weights of a publishable folder differ from those that were trained."""
    if not (stored := known(metrics, "stored")):
        return None
    text = f"The weights take {number(stored['megabytes'])} MB, stored as {markdown(stored['dtype'])}"
    text += "." if stored["dtype"] == "float32" else " (vectors, such as those of norms, as float32)."
    if "agreement" in stored:
        images = f"{number(stored['num_images'])} images of {code(stored['split'])}"
        same = f"{100 * stored['agreement']:.3f}"
        text += f" On {images} their masks agree with those of the trained weights on {same} % of the pixels"
        text += f", with a mean IoU of {percent(stored['mean_iou'])} %."
    return text


def _conversion(metrics: dict[str, Any]) -> dict[str, Any]:
    """Facts of a converted model."""
    if not (facts := known(metrics, "conversion")):
        return {}
    return {
        "conversion": [(name, markdown(facts[name])) for name in ("source", "format", "sha256", "comparison")],
        "conversion_notes": [markdown(note) for note in facts.get("notes", [])],
    }


def _limits(metrics: dict[str, Any]) -> list[str]:
    data, training, evaluation = (known(metrics, part) for part in ("data", "training", "evaluation"))
    source = f" of {markdown(source_name(metrics))}" if data.get("source") else ""
    images = f"{number(data['train_images'])} images" if data.get("train_images") else "the images"
    limits = []
    if data or training:
        limits.append(f"Trained on {images}{source}: on pictures of another kind its quality is not known.")
    if "crop_size" in training:
        sizes = "at sizes and scales other than the protocol's" if "protocol" in evaluation else "at other scales"
        crops = f"Trained on crops of {number(training['crop_size'])} pixels"
        limits.append(f"{crops}: {sizes} its quality is not known.")
    if "mean_iou" not in evaluation:
        limits.append("Not evaluated: no score is known.")
    ious = evaluation.get("per_category_iou") or {}
    if weak := sorted((name for name, iou in ious.items() if iou is not None and iou < 0.5), key=ious.__getitem__):
        limits.append(f"Not to be relied on, with an IoU below a half: {_scored(weak, ious)}.")
    if absent := [name for name, iou in ious.items() if iou is None]:
        count = f"{number(len(absent))} of {number(len(ious))} classes"
        names = ", ".join(map(markdown, absent))
        limits.append(f"Not in the evaluation images, hence without a score ({count}): {names}.")
    unseen = [name for name, pixels in (data.get("class_pixels") or {}).items() if pixels == 0]
    if unseen:
        limits.append(f"Never seen in training, so not to be expected: {', '.join(map(markdown, unseen))}.")
    cost = known(metrics, "cost")
    if "smallest_edge" in cost:
        largest = max((row["height"] * row["width"], [row["height"], row["width"]]) for row in cost["sizes"])[1]
        smallest = number([cost["smallest_edge"]] * 2)
        limits.append(f"Sizes that were run: from {smallest} up to {number(largest)} pixels of the network's input.")
    limits.append(
        "Every pixel gets one of the classes, also where the picture shows none of them. Out of scope: decisions that "
        "can harm people, without a check on data of their own."
    )
    return limits


def _licences(metrics: dict[str, Any]) -> dict[str, Any]:
    conversion, model = known(metrics, "conversion"), known(metrics, "model")
    facts = conversion or known(metrics, "data")
    if stated := plain(facts.get("license", "")):
        name, link = find_licence(stated)
        told = markdown(stated) + (f" ({name}, <{link}>)" if link and name != link else "")
    else:
        whose = "it at their source" if conversion else "the data's licence"
        told = f"not stated; check {whose} before publishing"
    credit = f" {markdown(facts['credit']).rstrip('.')}." if facts.get("credit") else ""
    weights, licence = model.get("backbone_weights"), model.get("backbone_license")
    backbone = f"Licence of the backbone weights, {markdown(weights)}: "
    backbone += f"{markdown(licence)}." if licence else "not stated; check it at their source."
    return {
        "data_licence": f"Licence of the {'converted weights' if conversion else 'training data'}: {told}.{credit}",
        "backbone_licence": backbone if weights not in (None, "none") else None,
    }
