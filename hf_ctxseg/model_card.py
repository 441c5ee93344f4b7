"""Model cards: a README.md for a trained model, written from what was measured and nothing else.

The card is rendered from a run folder's `config.json` and `metrics.json` and shows the pictures that lie beside them.
A section whose facts are missing is left out. Local paths and tokens are cut from every text, for cards are published;
whatever a user may name (classes, data sets, folders) is escaped for Markdown and YAML.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_pictures import SAMPLES, card_pictures
from .card_sections import body, head_of, source_name
from .card_text import hub_id, known, plain
from .licences import header_fields
from .publishable import public_json

__all__ = ["TEMPLATE", "card_pictures", "render_card", "write_card"]

TEMPLATE = Path(__file__).with_name("model_card_template.md")
# What the header tells of an evaluation: our name of a measure, the Hub's, and how it is read.
_RESULTS = {
    "mean_iou": ("mean_iou", "Mean IoU"),
    "boundary_iou": ("boundary_iou", "Boundary IoU"),
    "mean_accuracy": ("mean_accuracy", "Mean class accuracy"),
    "overall_accuracy": ("accuracy", "Pixel accuracy"),
}


def render_card(
    run: Path,
    *,
    repo_id: str | None = None,
    include_pictures: bool = True,
    config_file: Path | None = None,
    with_code: bool = False,
    code_revision: str | None = None,
) -> str:
    """Render the model card of a run folder.

    Args:
        run: The run folder; `config.json` must be there, `metrics.json` and the pictures may be.
        repo_id: Name on the Hub that the card tells its readers to load; the folder's own name if it is not given.
        include_pictures: Whether the card shows the run's pictures; preview and samples show the user's data.
        config_file: The config, where it is not in the run folder yet.
        with_code: Whether the repository holds the model's code, so that the card tells how to load it without this
            package.
        code_revision: The commit that readers are told to load the code of.

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
    context = body(config, metrics, name) | {
        "with_code": with_code,
        "code_revision": code_revision,
        "preview": next((picture for picture in pictures if picture.startswith("previews/")), None),
        "confusion_picture": "confusion.png" if "confusion.png" in pictures else None,
        "per_class_picture": "per_class.png" if "per_class.png" in pictures else None,
        "curves": "curves.png" if "curves.png" in pictures else None,
    }
    header = _header(config, metrics, name, [path for path in pictures if path.startswith(f"{SAMPLES}/")])
    card = str(ModelCard.from_template(header, template_path=str(TEMPLATE), **context))
    # The template's conditions leave empty lines behind: none inside a table, never two in a row.
    card = re.sub(r"\|\n\n(?=\|)", "|\n", card)
    return re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n"


def write_card(run: Path, repo_id: str | None = None, config_file: Path | None = None) -> Path:
    """Render the card of a run folder into its `README.md` and return that path; raises what `render_card` raises."""
    path = Path(run) / "README.md"
    path.write_text(render_card(Path(run), repo_id=repo_id, config_file=config_file), encoding="utf-8", newline="\n")
    return path


def _header(config: dict[str, Any], metrics: dict[str, Any], name: str, samples: list[str]) -> ModelCardData:
    data, conversion = known(metrics, "data"), known(metrics, "conversion")
    dataset = hub_id(data.get("source"))
    results = _eval_results(metrics, dataset)
    tags = ["ctxseg", "semantic-segmentation", head_of(config, metrics), config.get("backbone")]
    licence: dict[str, Any] = header_fields(plain((conversion or data).get("license") or ""))
    titles = [{"src": path, "example_title": f"Validation picture {place}"} for place, path in enumerate(samples, 1)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        **licence,
        tags=[plain(tag) for tag in tags if tag],
        base_model=_base_model(metrics),
        datasets=[dataset] if dataset else None,
        metrics=["mean_iou"] if results else None,
        model_name=plain(name.rpartition("/")[2]),
        eval_results=results or None,
        widget=titles or None,
    )


def _base_model(metrics: dict[str, Any]) -> str | None:
    """The repository that the training started from: a segmentation model, else the backbone's weights."""
    model = known(metrics, "model")
    if started := hub_id(str(known(metrics, "training").get("init_from", "")).partition("@")[0]):
        return started
    # timm's repositories carry the tag of the weights after a dot; a bare network is no repository.
    weights = re.match(r"timm/[\w-]+\.[\w.-]+", str(model.get("backbone_repo") or model.get("backbone_weights", "")))
    return weights[0] if weights else None


def _eval_results(metrics: dict[str, Any], dataset: str | None) -> list[EvalResult]:
    evaluation = known(metrics, "evaluation")
    if "mean_iou" not in evaluation:
        return []
    source = plain(source_name(metrics)) or "unnamed"
    protocol = plain(evaluation["protocol"]) if "protocol" in evaluation else None
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=dataset or re.sub(r"[^a-z0-9._-]+", "-", source.lower()).strip("-.") or "unnamed",
            dataset_name=source,
            dataset_split=plain(evaluation["split"]) if "split" in evaluation else None,
            metric_type=kind,
            metric_name=title,
            metric_value=evaluation[measure],
            metric_config=protocol,
        )
        for measure, (kind, title) in _RESULTS.items()
        if measure in evaluation
    ]
