import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F
from training_helpers import NAMES, make_data, random_run
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from hf_ctxseg.cli import main
from hf_ctxseg.evaluation import evaluate
from hf_ctxseg.scoring import score_table


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


def test_output_stride_is_that_asked_for_and_told(run, data, tmp_path, capsys):
    told = evaluate(run, data, output_dir=tmp_path / "a", output_stride=16, say=lambda line: None)["evaluation"]
    saved = AutoModelForSemanticSegmentation.from_pretrained(run)
    coarse = AutoModelForSemanticSegmentation.from_pretrained(run, output_stride=16)
    coarse.save_pretrained(tmp_path / "coarse")
    shutil.copy(run / "preprocessor_config.json", tmp_path / "coarse")
    assert saved.config.output_stride == 8
    as_saved = evaluate(run, data, output_dir=tmp_path / "b", say=lambda line: None)["evaluation"]
    expected = evaluate(tmp_path / "coarse", data, output_dir=tmp_path / "c", say=lambda line: None)["evaluation"]
    assert told["per_category_iou"] == expected["per_category_iou"] != as_saved["per_category_iou"]
    assert told["settings"]["output_stride"] == 16 and "(the model as saved: 8)" in told["protocol"]
    options = ["--data", str(data), "--output_stride", "12", "--output_dir", str(tmp_path / "d")]
    assert main(["eval", str(run), *options]) == 2
    assert "cannot reach output_stride 12" in capsys.readouterr().err


def test_what_is_written_is_what_is_returned(run, data, tmp_path):
    copy, said = tmp_path / "copy", []
    shutil.copytree(run, copy)
    metrics = evaluate(copy, data, split="train", say=said.append)
    folder = copy / "eval-train"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert said == [f"Metrics, confusion matrix and a preview grid are in {folder}."]
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
    assert written["absent_classes"] == ["disc", "box"]
    assert ["disc", "absent", "absent", "absent"] in [line.split() for line in score_table(found).splitlines()]


def test_hub_model_does_not_get_a_folder_of_its_name(run, data, tmp_path, monkeypatch):
    from hf_ctxseg import evaluation, inference

    real = inference.Predictor(run)
    monkeypatch.setattr(evaluation, "Predictor", lambda name, **options: real)
    monkeypatch.chdir(tmp_path)
    evaluate("org/name", data, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["name-eval-val"]


def _mean_probabilities(model, pixels, scales, size):
    """As mmseg and DeepLab's own code have it: the mean of the softmax of each scale and its mirror image."""
    found = []
    for scale in scales:
        edges = [int(edge * scale + 0.5) for edge in pixels.shape[-2:]]
        scaled = F.interpolate(pixels, edges, mode="bilinear", antialias=True)
        for mirror in (False, True):
            with torch.inference_mode():
                logits = model(scaled.flip(-1) if mirror else scaled).logits
            upsampled = F.interpolate(logits, size, mode="bilinear")
            found.append((upsampled.flip(-1) if mirror else upsampled).softmax(1))
    return torch.stack(found).mean(0)[0]


def test_scales_and_flip_score_the_mean_of_probabilities(run, data, tmp_path):
    model, processor = AutoModelForSemanticSegmentation.from_pretrained(run), AutoImageProcessor.from_pretrained(run)
    matrix, loss = 0, 0.0
    for path in sorted((data / "val" / "images").iterdir()):
        label = torch.from_numpy(np.array(Image.open(data / "val" / "labels" / path.name))).long()
        pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        chances = _mean_probabilities(model, pixels, (0.75, 1.25), label.shape)
        valid = label != 255
        matrix = matrix + confusion_matrix(label[valid], chances.argmax(0)[valid], labels=range(3))
        loss += F.nll_loss(chances.log()[None], label[None], ignore_index=255, reduction="sum").item()
    found = evaluate(
        run, data, output_dir=tmp_path, batch_size=2, scales=[0.75, 1.25], flip=True, say=lambda line: None
    )["evaluation"]
    assert found["overall_accuracy"] == pytest.approx(np.diag(matrix).sum() / matrix.sum(), abs=1e-9)
    assert found["loss"] == pytest.approx(loss / matrix.sum(), rel=1e-5)
    assert "whole pictures as they are" in found["protocol"] and "scales 0.75, 1.25, flipped too" in found["protocol"]
    assert found["settings"]["scales"] == [0.75, 1.25] and found["settings"]["flip"] is True
    rows = [line.split(",") for line in (tmp_path / "confusion.csv").read_text().splitlines()]
    assert rows[0][1:] == [row[0] for row in rows[1:]] == list(NAMES)
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], int), matrix)


def test_windows_see_less_than_the_whole(run, data, tmp_path):
    def score(name, **options):
        out = tmp_path / name
        return evaluate(run, data, output_dir=out, say=lambda line: None, **options)["evaluation"]

    whole, large, small = score("whole"), score("large", window=64), score("small", window=24, overlap=0.25)
    assert large["loss"] == whole["loss"] != small["loss"]
    assert "windows of 24 pixels (overlap 0.25, gaussian) of pictures as they are" in small["protocol"]
    assert (small["settings"]["window"], whole["settings"]["window"], whole["settings"]["overlap"]) == (24, None, None)


def test_worst_confusions_are_the_largest_counts_beside_the_diagonal(run, data, tmp_path):
    found = evaluate(run, data, output_dir=tmp_path, say=lambda line: None)["evaluation"]
    matrix = _matrix(run, data)
    pairs = {
        (NAMES[row], NAMES[column]): matrix[row, column] for row in range(3) for column in range(3) if row != column
    }
    listed = found["worst_confusions"]
    assert [entry["pixels"] for entry in listed] == sorted((n for n in pairs.values() if n), reverse=True)
    for entry in listed:
        assert pairs[entry["reference"], entry["prediction"]] == entry["pixels"]
        total = matrix[NAMES.index(entry["reference"])].sum()
        assert entry["share"] == pytest.approx(entry["pixels"] / total)
    frequencies = matrix.sum(1) / matrix.sum()
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert found["frequency_weighted_iou"] == pytest.approx((frequencies * iou).sum())


def test_data_without_names_has_those_of_the_model(run, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "labels.txt").unlink()
    found = evaluate(run, other, output_dir=tmp_path / "out", say=lambda line: None)["evaluation"]
    expected = evaluate(run, data, output_dir=tmp_path / "again", say=lambda line: None)["evaluation"]
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "a,b,c"}, "The model knows the classes ground, disc, box, but the data has a, b, c"),
        ({"labels": "disc,ground,box"}, "The model knows the classes ground, disc, box, but the data has disc"),
        ({"window": -1}, "window is -1, but must be an edge of 1 pixel or more"),
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


# Several processes, many pictures

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_two_processes_score_what_one_does(run, data, tmp_path, batch_size):
    # Five pictures: the sampler gives one of them, or three, out twice.
    options = ["--data", data, "--batch_size", batch_size, "--scales", 1, 1.5, "--flip", "--report", "json"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", _free_port()]
    command = [
        sys.executable,
        *launch,
        ROOT / "scripts" / "evaluate.py",
        run,
        *options,
        "--output_dir",
        tmp_path / "2",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    alone = evaluate(run, data, output_dir=tmp_path / "1", scales=[1, 1.5], flip=True, say=lambda line: None)
    for changing in ("seconds", "loss"):
        expected = alone["evaluation"].pop(changing)
        assert found.pop(changing) == pytest.approx(expected, rel=1e-6) or changing == "seconds"
    assert found == json.loads(json.dumps(alone["evaluation"]))
    assert (tmp_path / "1" / "confusion.csv").read_text() == (tmp_path / "2" / "confusion.csv").read_text()


_PEAK = """
import resource, sys
from pathlib import Path
from hf_ctxseg.cli import main
from hf_ctxseg.evaluation import evaluate

run, data, out = map(Path, sys.argv[1:])
peaks = []
for split in ("few", "few", "many"):  # the second time what is loaded once is there
    found = evaluate(run, data, split=split, output_dir=out, say=lambda line: None)["evaluation"]
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(found["num_images"], peaks[2] / peaks[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the peak of a process is read as Unix tells it")
def test_memory_does_not_grow_with_the_pictures(run, data, tmp_path):
    """The resident peak of a child process that scores 10 pictures, and then 1000."""
    many = tmp_path / "data"
    for split, count in (("few", 10), ("many", 1000)):
        for kind in ("images", "labels"):
            (many / split / kind).mkdir(parents=True)
            for number in range(count):
                os.link(data / "val" / kind / f"{number % 5:03}.png", many / split / kind / f"{number:04}.png")
    command = [sys.executable, "-c", _PEAK, run, many, tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    pictures, growth = done.stdout.split()
    assert int(pictures) == 1000 and float(growth) < 1.05
