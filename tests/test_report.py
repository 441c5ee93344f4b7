import json
import math
import re
from importlib.metadata import version

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from test_model_card import told_numbers, written_numbers
from training_helpers import NAMES, as_arguments, trained

import hf_ctxseg
from hf_ctxseg.report import farewell, versions, write_report
from hf_ctxseg.samples import ClassInfo
from hf_ctxseg.visualization import default_palette


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def metrics(line):
    return json.loads((line[1] / "metrics.json").read_text(encoding="utf-8"))


def test_metrics_are_json_without_nan(line):
    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((line[1] / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert list(content) == ["model", "data", "training", "evaluation", "versions"]


def test_data_is_what_was_in_the_folder(line, metrics):
    data, _, _ = line
    pixels = np.zeros(256, int)
    for path in (data / "train" / "labels").iterdir():
        pixels += np.bincount(np.array(Image.open(path)).ravel(), minlength=256)
    assert metrics["data"] == {
        "source": "data",
        "license": None,
        "train_images": 8,
        "eval_images": 3,
        "classes": list(NAMES),
        "ignore_index": 255,
        "class_pixels": dict(zip(NAMES, pixels[:3].tolist(), strict=True)),
    }


def test_training_is_what_was_asked_for(metrics):
    training = metrics["training"]
    expected = {
        "steps": 6,
        "epochs": 1.5,
        "batch_size": 2,
        "crop_size": [33, 33],
        "learning_rate": 0.01,
        "head_learning_rate_factor": 10.0,
        "lr_scheduler": "polynomial 0.9",
        "precision": "float32",
        "init_from": None,
    }
    assert {key: training[key] for key in expected} == expected
    assert training["device"].startswith("cpu, ")
    assert 0 < training["train_loss"] < 10 and training["seconds"] > 0
    assert training["command"].startswith("ctxseg train ") and "--max_steps 6" in training["command"]
    assert "/" not in training["command"].replace("test_resnet", "")  # no folder of this machine


def test_model_and_protocol_are_named(line, metrics):
    assert metrics["model"]["head"] == "deeplabv3" and metrics["model"]["output_stride"] == 8
    assert metrics["model"]["backbone"] == "test_resnet" and metrics["model"]["backbone_weights"] == "none"
    evaluation = metrics["evaluation"]
    assert evaluation["split"] == "val"
    assert evaluation["protocol"] == (
        "whole pictures as they are, logits upsampled to the label's original size, single scale, no flip, "
        "ignore_index 255, output stride 8"
    )
    assert evaluation["mean_iou"] == pytest.approx(np.mean(list(evaluation["per_category_iou"].values())))


def test_versions_are_those_installed(metrics):
    found = versions()
    assert metrics["versions"] == found
    assert found["torch"] == version("torch") and found["hf_ctxseg"] == version("hf-ctxseg")
    assert re.fullmatch(r"3\.\d+\.\d+.*", found["python"])


def test_every_number_in_a_real_card_is_in_its_metrics(line, metrics):
    config = json.loads((line[1] / "config.json").read_text(encoding="utf-8"))
    card = ModelCard((line[1] / "README.md").read_text(encoding="utf-8"))
    found = told_numbers(card.text)
    assert len(found) > 40 and set(found) <= written_numbers(config, metrics)
    assert [item["src"] for item in card.data.widget] == ["samples/1.jpg", "samples/2.jpg"]
    headings = re.findall(r"^## (.*)", card.text, re.MULTILINE)
    shown = ["Use", "Examples", "Results", "Classes", "Training", "Limits", "Licence", "Versions", "Citation"]
    assert headings == shown
    for path in re.findall(r"\]\((?!https?:)(.*?)\)", card.text):
        assert (line[1] / path).is_file(), path


def test_the_cost_is_measured_once_at_the_end(line, tmp_path):
    arguments = as_arguments(data=str(line[0]), output_dir=str(tmp_path / "run"), measure_cost=True, max_steps=1)
    result = hf_ctxseg.train(**arguments, eval_strategy="no", save_strategy="no")
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert saved["cost"] == result.metrics["cost"] and saved["cost"]["sizes"][0]["height"] == 256
    assert saved["training"]["augmentation"].startswith("scaled by 0.5 to 2, cropped, again up to 10 times where one")
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| 256 x 256 | {saved['cost']['sizes'][0]['gmacs']:.4g} |" in card


def test_card_tells_the_score(line, metrics):
    card = (line[1] / "README.md").read_text(encoding="utf-8")
    assert f"{metrics['evaluation']['mean_iou']:.4f}"[:5] in card


def test_class_table_holds_the_scores(line, metrics):
    rows = [row.split(",") for row in (line[1] / "per_class.csv").read_text().splitlines()[1:]]
    iou = metrics["evaluation"]["per_category_iou"]
    assert {name: float(value) for name, value, _, _ in rows} == pytest.approx(iou, abs=1e-6)
    assert {name: int(pixels) for name, _, _, pixels in rows} == metrics["data"]["class_pixels"]


def test_absent_classes_and_missing_scores_are_reported(line, metrics, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((line[1] / name).read_text())
    classes = ClassInfo(NAMES, tuple(default_palette(3)))
    metrics["evaluation"]["per_category_iou"]["box"] = math.nan
    scores = {"per_category_iou": [0.5, 0.25, math.nan], "per_category_accuracy": [1.0, 1.0, math.nan]}
    scores["confusion_matrix"] = np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
    history = [{"step": 1, "loss": 1.0, "learning_rate": 0.1}]
    write_report(tmp_path, metrics, history, classes, scores)
    assert json.loads((tmp_path / "metrics.json").read_text())["evaluation"]["per_category_iou"]["box"] is None
    assert (tmp_path / "per_class.csv").read_text().splitlines()[3].startswith("box,,,")
    assert {path.name for path in tmp_path.glob("*.png")} == {"confusion.png", "curves.png", "per_class.png"}
    assert (tmp_path / "confusion.csv").read_text().splitlines() == [
        "reference \\ prediction,ground,disc,box",
        "ground,3,1,0",
        "disc,2,2,0",
        "box,0,0,0",
    ]


def test_farewell_says_what_to_type_next(line, metrics):
    metrics["training"]["seconds"] = 200.0
    text = farewell(line[1], metrics)
    assert text.startswith("Trained 6 steps in 3 min 20 s.")
    assert f"Next: ctxseg predict {line[1]} PICTURES --out masks" in text and f"ctxseg push {line[1]}" in text
    for name in NAMES:
        assert re.search(rf"^{name} +{metrics['evaluation']['per_category_iou'][name]:.4f} ", text, re.MULTILINE)
    metrics["evaluation"] = {}
    assert "mean" not in farewell(line[1], metrics)
