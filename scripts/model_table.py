"""Write the README's table of models from the metrics.json of each folder in model_cards/."""

import json
from pathlib import Path
from typing import Any

from hf_ctxseg.card_text import markdown

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- models, by scripts/model_table.py -->", "<!-- end of models -->"
TITLES = "model | head, backbone, output stride | trained on | mIoU | boundary IoU | parameters | "
TITLES += "512×512: GMACs, ms, MiB | file | licence"


def model_table(folder: Path) -> str:
    """Render a row for each model; empty if there is none."""
    rows = [row(path.parent) for path in sorted(folder.glob("*/metrics.json"))]
    lines = [TITLES, "|".join(["---"] * (TITLES.count("|") + 1)), *rows]
    return "".join(f"| {line} |\n" for line in lines) if rows else ""


def row(folder: Path) -> str:
    """Render the cells of one model."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    model, data, scores = metrics["model"], metrics["data"], metrics["evaluation"]
    sizes = (metrics.get("cost") or {}).get("sizes", [])
    at_512 = next((size for size in sizes if (size["height"], size["width"]) == (512, 512)), {})
    formats = {"gmacs": ".1f", "milliseconds": ".0f", "peak_mib": ".0f"}
    cost = ", ".join(told(at_512.get(key), form) for key, form in formats.items()) if at_512 else "-"
    return " | ".join(
        [
            f"[{folder.name}](model_cards/{folder.name}/README.md)",
            f"{model['head']}, `{model['backbone']}`, {model['output_stride']}",
            f"{markdown(data['source'])}, {told(data['train_images'], 'd')} images",
            f"{scores['mean_iou']:.3f} ({scores['split']})",
            told(scores.get("boundary_iou"), ".3f"),
            f"{model['parameters'] / 1e6:.2f} M",
            cost,
            f"{metrics['stored']['megabytes']} MB, {metrics['stored']['dtype']}",
            markdown(data["license"]),
        ]
    )


def told(value: float | None, form: str) -> str:
    """Format a number; `-` where it is not known."""
    return "-" if value is None else format(value, form)


def with_table(readme: str, table: str) -> str:
    """Put the table between its two comments."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END}, once each: put them where the table shall be.")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README = ROOT / "README.md"
    README.write_text(with_table(README.read_text(encoding="utf-8"), model_table(ROOT / "model_cards")), "utf-8")
