import json
from pathlib import Path

import pytest

from scripts.model_table import BEGIN, END, model_table, with_table

ROOT = Path(__file__).parents[1]
METRICS = {
    "model": {"head": "deeplabv3", "backbone": "resnet50", "output_stride": 16, "parameters": 5_929_494},
    "data": {"source": "camvid", "train_images": 367, "license": "cc-by-nc-4.0"},
    "evaluation": {"mean_iou": 0.6097, "boundary_iou": 0.4567, "split": "val"},
    "cost": {"sizes": [{"height": 512, "width": 512, "gmacs": 6.2467, "milliseconds": 359.6, "peak_mib": 111.7}]},
    "stored": {"megabytes": 12.2, "dtype": "float16"},
}


def save(folder, name, metrics):
    (folder / name).mkdir()
    (folder / name / "metrics.json").write_text(json.dumps(metrics))


def test_a_row_tells_what_the_metrics_hold(tmp_path):
    save(tmp_path, "b", METRICS)
    save(tmp_path, "a", {key: value for key, value in METRICS.items() if key != "cost"})
    title, _, first, second = model_table(tmp_path).splitlines()
    assert {line.count("|") for line in (title, first, second)} == {title.count("|")}
    assert second == (
        "| [b](model_cards/b/README.md) | deeplabv3, `resnet50`, 16 | camvid, 367 images | 0.610 (val) | 0.457 | "
        "5.93 M | 6.2, 360, 112 | 12.2 MB, float16 | cc-by-nc-4.0 |"
    )
    assert first.startswith("| [a]") and "| - | 12.2 MB" in first


def test_what_is_not_known_or_would_end_a_cell_stays_in_its_cell(tmp_path):
    unknown = {"height": 512, "width": 512, "gmacs": None, "milliseconds": 3.0, "peak_mib": None}
    data = {"source": "a|b", "train_images": None, "license": "my | own"}
    save(tmp_path, "a", METRICS | {"cost": {"sizes": [unknown]}, "data": data})
    line = model_table(tmp_path).splitlines()[-1]
    assert r"| a\|b, - images |" in line and "| -, 3, - |" in line and line.endswith(r"| my \| own |")


def test_the_table_takes_its_place_and_stays_there():
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_table(readme, "| new |\n") == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    assert with_table(with_table(readme, "| new |\n"), "| new |\n") == with_table(readme, "| new |\n")
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        with_table("before", "| new |\n")


def test_the_readmes_table_is_that_of_the_model_cards():
    table = model_table(ROOT / "model_cards")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if table or BEGIN in readme:
        assert with_table(readme, table) == readme, "run scripts/model_table.py"
