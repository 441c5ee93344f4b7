"""A folder to be published, made from a run: small weights, processor, metrics, plots, card and licence notice.

Nothing of the data goes along but numbers: no previews, no samples, no arguments with their paths, no checkpoints.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation

from .card_pictures import PLOTS
from .card_sections import source_name
from .checkpoints import write_manifest
from .configuration_ctxseg import check_choice
from .cost import measure_cost
from .data import load_data
from .inference import Predictor
from .licences import find_licence
from .metrics import MeanIoU
from .model_building import backbone_source
from .model_card import write_card
from .new_folder import checked_target, new_folder
from .publishable import public_json, read_json
from .run_folder import write_json
from .samples import read_pair
from .seeds import spread

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TABLES = ("per_class.csv", "confusion.csv")
_MODEL = ("config.json", "model.safetensors", "preprocessor_config.json")


def update_card(run: str | Path, *, sizes: list[int] | None = None, seeds: tuple[str | Path, ...] = ()) -> Path:
    """Write a run folder's card anew, with what else is measured for it.

    Args:
        run: A folder with a model of ours.
        sizes: Edges of square pictures for which the cost is measured; None: what was measured before stays.
        seeds: Run folders of the same training with other seeds.

    Returns:
        The card.

    Raises:
        FileNotFoundError, ValueError: If the folder holds no model of ours, or `spread` refuses a run.
    """
    run = Path(run)
    metrics = read_json(run / "metrics.json") if (run / "metrics.json").is_file() else {}
    if seeds:
        metrics["seeds"] = spread(run, [Path(other) for other in seeds])
    if sizes is not None:
        metrics["cost"] = measure_cost(Predictor(run).model, sizes)
    if seeds or sizes is not None:
        write_json(run / "metrics.json", metrics)
    return write_card(run)


def write_release(
    run: str | Path,
    output_dir: str | Path,
    *,
    dtype: str = "float16",
    data: Any = None,
    recipe: str | Path | None = None,
    split: str | None = None,
    data_license: str | None = None,
    credit: str | None = None,
) -> Path:
    """Make a folder to be published from a run folder, which stays as it is.

    Args:
        run: The folder that a training saved.
        output_dir: Folder to write; it must be new or empty.
        dtype: Number format in the file, float16, bfloat16 or float32; vectors (norms, biases) stay float32, and
            models are opened in float32 unless their reader asks for another.
        data: Labelled pictures, as of `evaluate`, on which the masks of stored and trained weights are compared;
            needed unless `dtype` is float32.
        recipe: Known data set or recipe file, as for training.
        split: Split of the data; by default its validation split.
        data_license: Licence of the training data or of the converted weights, where the folder does not know it.
        credit: A sentence that names the data's makers, as most licences ask for.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, ValueError: If the run is not whole, its data's licence is not known, a value does not fit
            the format, or the output folder is not empty; then nothing is written.
    """
    run, target = Path(run), checked_target(output_dir)
    check_choice("dtype", dtype, tuple(DTYPES))
    config, metrics = public_json(run / "config.json"), public_json(run / "metrics.json")
    if data is None and dtype != "float32":
        raise ValueError(f"Weights stored as {dtype} give slightly other masks: name labelled pictures with --data.")
    facts = metrics.get("conversion") or metrics.setdefault("data", {})
    facts |= {"license": data_license or facts.get("license"), "credit": credit or facts.get("credit")}
    if not facts["license"]:
        raise ValueError(
            "The licence of the training data, or of converted weights, is not known, but the weights come under it: "
            "name it with --license."
        )
    model = metrics.setdefault("model", {})
    metrics["model"] = backbone_source(str(config.get("backbone")), model.get("backbone_weights")) | model
    with new_folder(target) as partial:
        write_json(partial / "config.json", config | {"dtype": "float32"})
        shutil.copy(run / "preprocessor_config.json", partial)
        _store(run / "model.safetensors", partial / "model.safetensors", DTYPES[dtype])
        size = (partial / "model.safetensors").stat().st_size
        metrics["stored"] = {"dtype": dtype, "megabytes": round(size / 1e6, 1)}
        if data is None:
            AutoModelForSemanticSegmentation.from_pretrained(partial)
        else:
            metrics["stored"] |= _compare(run, partial, data, recipe, split)
        for name in (*PLOTS, *_TABLES):
            if (run / name).is_file():
                shutil.copy(run / name, partial)
        write_json(partial / "metrics.json", metrics)
        (partial / "LICENSE").write_text(_notice(metrics), encoding="utf-8")
        write_card(partial, repo_id=target.name)
        write_manifest(partial, _MODEL)
    return target


def _store(source: Path, file: Path, dtype: torch.dtype) -> None:
    tensors = load_file(source)
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} holds values that {dtype} cannot: choose bfloat16 or float32.")
    save_file(tensors, file, metadata={"format": "pt"})


def _compare(
    run: Path, folder: Path, data: Any, recipe: str | Path | None, split: str | None
) -> dict[str, str | int | float]:
    """How far the stored weights' masks agree with the trained ones', and how good they are."""
    trained, stored = Predictor(run), Predictor(folder)
    loaded = load_data(data, recipe=recipe, train_split=None, eval_split=split, default_labels=trained.names)
    pictures, classes = loaded.validation, loaded.classes
    if tuple(classes.names) != trained.names:
        raise ValueError(
            f"The model knows the classes {', '.join(trained.names)}, but the data has {', '.join(classes.names)}: "
            "compare on data of its own classes."
        )
    metric = MeanIoU(classes.num_labels, classes.ignore_index, classes.names)
    same = pixels = 0
    for index in range(len(pictures)):
        picture, label = read_pair(pictures, index)
        mask = stored(picture).mask
        same += int((mask == trained(picture).mask).sum())
        pixels += mask.size
        metric.add(prediction=mask, reference=label)
    return {
        "split": loaded.validation_name,
        "num_images": len(pictures),
        "agreement": same / pixels,
        "mean_iou": float(metric.compute()["mean_iou"]),
    }


def _notice(metrics: dict[str, Any]) -> str:
    """The text of `LICENSE`: whose terms the weights come under."""
    conversion, model = metrics.get("conversion"), metrics["model"]
    facts = conversion or metrics["data"]
    stated = facts["license"]
    if conversion:
        origin = f"converted from {conversion['source']}, and come under the licence of these:"
    else:
        origin = f"trained on {source_name(metrics) or 'data'}, and come under its licence:"
    name, link = find_licence(stated)
    lines = [
        f"The weights in this folder were {origin}",
        "",
        f"    {name}" + (f" ({stated})" if stated != name else ""),
        *([f"    {link}"] if link and link != name else []),
    ]
    if facts["credit"]:
        lines += ["", facts["credit"]]
    if model.get("backbone_license"):
        weights = f"The training started from {model['backbone_weights']}, which is"
        lines += ["", f"{weights} under {find_licence(model['backbone_license']).name}."]
    lines += ["", "The code that runs them, hf_ctxseg, is under the Apache License 2.0."]
    return "\n".join(lines) + "\n"
