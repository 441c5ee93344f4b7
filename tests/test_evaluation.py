import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F
from training_helpers import NAMES, make_data, random_run
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from hf_ctxseg.evaluation import evaluate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("street") / "data", val=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("random") / "run")


def _matrix(run, data, split="val", ignore_index=255):
    """The confusion matrix by a plain loop."""
    model, processor = AutoModelForSemanticSegmentation.from_pretrained(run), AutoImageProcessor.from_pretrained(run)
    matrix = 0
    for path in sorted((data / split / "images").iterdir()):
        label = torch.from_numpy(np.array(Image.open(data / split / "labels" / path.name))).long()
        with torch.inference_mode():
            logits = model(**processor(images=Image.open(path), return_tensors="pt")).logits
        guess = F.interpolate(logits, size=label.shape, mode="bilinear", align_corners=False).argmax(1)[0]
        valid = label != ignore_index
        matrix = matrix + confusion_matrix(label[valid], guess[valid], labels=range(3))
    return matrix


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_equal_a_plain_loop_whatever_the_batch(run, data, tmp_path, batch_size):
    found = evaluate(run, data, output_dir=tmp_path / "out", batch_size=batch_size, say=lambda line: None)[
        "evaluation"
    ]
    matrix = _matrix(run, data)
    assert (matrix.sum(0) > 0).all()
    hits = np.diag(matrix)
    iou = hits / (matrix.sum(0) + matrix.sum(1) - hits)
    assert list(found["per_category_iou"]) == list(NAMES)
    assert list(found["per_category_iou"].values()) == pytest.approx(iou.tolist(), abs=1e-9)
    assert found["mean_iou"] == pytest.approx(iou.mean(), abs=1e-9)
    assert found["overall_accuracy"] == pytest.approx(hits.sum() / matrix.sum(), abs=1e-9)
    assert found["num_images"] == 5


def test_what_is_written_is_what_is_returned(run, data, tmp_path):
    copy, said = tmp_path / "copy", []
    shutil.copytree(run, copy)
    metrics = evaluate(copy, data, split="train", say=said.append)
    folder = copy / "eval-train"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert said == [f"Metrics and a preview grid are in {folder}."]
    with Image.open(folder / "previews" / "step-000000.png") as picture:
        picture.load()
    evaluation = metrics["evaluation"]
    assert evaluation["split"] == "train" and evaluation["num_images"] == 8
    for words in ("original size", "single scale, no flip", "ignore_index 255", "output stride 8", "as they are"):
        assert words in evaluation["protocol"]
    assert metrics["model"]["class"] == "DeepLabV3ForSemanticSegmentation"
    assert metrics["data"] == {"source": "data"}
    assert AutoModelForSemanticSegmentation.from_pretrained(copy).config.id2label == dict(enumerate(NAMES))


def test_loss_is_the_mean_over_all_valid_pixels(run, data, tmp_path):
    model, processor = AutoModelForSemanticSegmentation.from_pretrained(run), AutoImageProcessor.from_pretrained(run)
    total, pixels = 0.0, 0
    for path in sorted((data / "val" / "images").iterdir()):
        label = torch.from_numpy(np.array(Image.open(data / "val" / "labels" / path.name))).long()
        with torch.inference_mode():
            logits = model(**processor(images=Image.open(path), return_tensors="pt")).logits
        logits = F.interpolate(logits, size=label.shape, mode="bilinear", align_corners=False)
        total += F.cross_entropy(logits, label[None], ignore_index=255, reduction="sum").item()
        pixels += int((label != 255).sum())
    found = evaluate(run, data, output_dir=tmp_path, batch_size=2, say=lambda line: None)
    assert found["evaluation"]["loss"] == pytest.approx(total / pixels, rel=1e-5)


def test_labels_keep_their_size_where_pictures_are_scaled(data, tmp_path):
    run = random_run(tmp_path / "run")
    settings = json.loads((run / "preprocessor_config.json").read_text())
    settings |= {"do_resize": True, "size": {"max_height": 24, "max_width": 24}}
    (run / "preprocessor_config.json").write_text(json.dumps(settings))
    found = evaluate(run, data, batch_size=3, say=lambda line: None)["evaluation"]
    matrix = _matrix(run, data)
    pixels = sum((np.array(Image.open(path)) != 255).sum() for path in (data / "val" / "labels").iterdir())
    assert matrix.sum() == pixels
    assert found["overall_accuracy"] == pytest.approx(np.diag(matrix).sum() / pixels, abs=1e-9)
    assert "scaled to a longest edge of 24 pixels" in found["protocol"]


def test_ignore_index_of_the_model_serves_where_the_data_names_none(data, tmp_path):
    run = random_run(tmp_path / "run", semantic_loss_ignore_index=250)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for path in (other / "val" / "labels").iterdir():
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label == 255, 250, label).astype(np.uint8)).save(path)
    found = evaluate(run, other, say=lambda line: None)["evaluation"]
    assert "ignore_index 250" in found["protocol"]
    matrix = _matrix(run, other, ignore_index=250)
    assert found["overall_accuracy"] == pytest.approx(np.diag(matrix).sum() / matrix.sum(), abs=1e-9)
    assert "ignore_index 255" in evaluate(run, data, ignore_index=255, say=lambda line: None)["evaluation"]["protocol"]


def test_class_that_never_occurs_is_left_out_of_the_mean(run, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for path in (other / "val" / "labels").iterdir():  # only what the model sees: no other class on either side
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label == 255, 255, 0).astype(np.uint8)).save(path)
    only = random_run(tmp_path / "run")
    model = AutoModelForSemanticSegmentation.from_pretrained(only)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    model.save_pretrained(only)
    found = evaluate(only, other, say=lambda line: None)["evaluation"]
    assert found["mean_iou"] == found["mean_accuracy"] == found["overall_accuracy"] == 1
    written = json.loads((only / "eval-val" / "metrics.json").read_text())["evaluation"]
    assert written["per_category_iou"] == {"ground": 1.0, "disc": None, "box": None}


def test_hub_model_does_not_get_a_folder_of_its_name(run, data, tmp_path, monkeypatch):
    from hf_ctxseg import evaluation, inference

    real = inference.Predictor(run)
    monkeypatch.setattr(evaluation, "Predictor", lambda name, device: real)
    monkeypatch.chdir(tmp_path)
    evaluate("org/name", data, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["name-eval-val"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "a,b,c"}, "The model knows the classes ground, disc, box, but the data has a, b, c"),
        ({"labels": "disc,ground,box"}, "The model knows the classes ground, disc, box, but the data has disc"),
        ({"split": "vall"}, "has no split 'vall' .did you mean 'val'"),
    ],
)
def test_data_that_does_not_fit_is_refused(run, data, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(run, data, output_dir=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_model_that_is_not_there_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="holds no finished model: continue its training with --resume"):
        evaluate(tmp_path, data)
