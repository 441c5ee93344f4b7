import csv
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import NAMES, make_data, random_run
from transformers import AutoModelForSemanticSegmentation

from hf_ctxseg import predict
from hf_ctxseg.card_pictures import write_samples
from hf_ctxseg.cli import main
from hf_ctxseg.doctor import examine
from hf_ctxseg.metrics import MeanIoU
from hf_ctxseg.model_building import backbone_source
from hf_ctxseg.model_card import render_card
from hf_ctxseg.publishing import plan_push
from hf_ctxseg.release import update_card, write_release
from hf_ctxseg.report import describe_model
from hf_ctxseg.samples import FolderSamples
from hf_ctxseg.seeds import spread


def write_metrics(run, seed=0, **evaluation):
    model = describe_model(AutoModelForSemanticSegmentation.from_pretrained(run), "none")
    metrics = {
        "model": model,
        "data": {"source": "shapes", "license": "cc-by-4.0", "train_images": 8, "classes": list(NAMES)},
        "training": {"seed": seed, "steps": 3, "init_from": "/home/alice/start"},
        "evaluation": {"split": "val", "num_images": 3, "mean_iou": 0.5, **evaluation},
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = write_metrics(random_run(tmp_path_factory.mktemp("runs") / "a"))
    for name in ("previews/step-000003.png", "samples/1.jpg", "args.yaml", "checkpoint-3/optimizer.pt", "curves.png"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"picture of alice")
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def released(finished, data, tmp_path_factory):
    target = tmp_path_factory.mktemp("cards") / "shapes"
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert write_release(finished, target, data=data, credit="Shapes by nobody.") == target
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    return target


def test_a_release_holds_what_a_reader_needs_and_nothing_of_the_data(released, finished):
    assert sorted(path.name for path in released.iterdir()) == [
        "LICENSE", "README.md", "config.json", "curves.png", "manifest.json", "metrics.json", "model.safetensors",
        "preprocessor_config.json",
    ]  # fmt: skip
    texts = [path.read_text() for path in released.iterdir() if path.suffix != ".safetensors"]
    assert not any("/home" in text or str(released.parent) in text for text in texts)
    assert not [finding for finding in examine(released) if finding.verdict == "fail"]
    assert [file.path for file in plan_push(released)].count("LICENSE") == 1


def test_matrices_are_stored_in_half_and_opened_in_single_precision(released, finished):
    stored, trained = load_file(released / "model.safetensors"), load_file(finished / "model.safetensors")
    assert stored.keys() == trained.keys()
    for name, tensor in trained.items():
        wanted = torch.float16 if tensor.ndim > 1 else tensor.dtype
        assert stored[name].dtype == wanted and torch.equal(stored[name], tensor.to(wanted)), name
    model = AutoModelForSemanticSegmentation.from_pretrained(released)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_agreement_and_score_of_the_stored_weights_are_those_of_their_masks(released, finished, data):
    same = pixels = 0
    metric = MeanIoU(len(NAMES), 255)
    for path in sorted((data / "val" / "images").iterdir()):
        mask, trained = predict(released, path).mask, predict(finished, path).mask
        same, pixels = same + (mask == trained).sum(), pixels + mask.size
        metric.add(prediction=mask, reference=np.array(Image.open(data / "val" / "labels" / path.name)))
    stored = json.loads((released / "metrics.json").read_text())["stored"]
    assert stored["agreement"] == pytest.approx(same / pixels) and 0.99 < stored["agreement"] <= 1
    assert stored["mean_iou"] == pytest.approx(metric.compute()["mean_iou"])
    assert (stored["split"], stored["num_images"], stored["dtype"]) == ("val", 3, "float16")
    assert f"on {100 * stored['agreement']:.3f} % of the pixels" in (released / "README.md").read_text()
    assert stored["megabytes"] == round((released / "model.safetensors").stat().st_size / 1e6, 1)


def test_the_notice_names_licence_makers_and_code(released):
    notice = (released / "LICENSE").read_text()
    for text in (
        "trained on shapes",
        "Creative Commons Attribution 4.0 International (cc-by-4.0)",
        "https://creativecommons.org/licenses/by/4.0/",
        "Shapes by nobody.",
        "hf_ctxseg, is under the Apache License 2.0",
    ):
        assert text in notice
    assert "Shapes by nobody." in render_card(released)


def test_single_precision_needs_no_data(run, tmp_path):
    write_release(run, tmp_path / "out", dtype="float32")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "stored as float32." in (tmp_path / "out" / "README.md").read_text()


def test_a_release_that_would_not_be_right_is_refused_and_leaves_nothing(run, tmp_path, data):
    def refuse(message, **options):
        with pytest.raises(ValueError, match=message):
            write_release(run, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    refuse("slightly other masks: name labelled pictures with --data")
    refuse("dtype .*int8", dtype="int8", data=data)
    refuse("compare on data of its own classes", data=make_data(tmp_path / "other", names=("a", "b", "c")))
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"data": {"source": "shapes"}}))
    refuse("licence of the training data, or of converted weights, is not known", data=data)
    weights = load_file(run / "model.safetensors")
    save_file(weights | {"classifier.weight": weights["classifier.weight"] * 1e9}, run / "model.safetensors")
    refuse(r"classifier\.weight holds values that torch\.float16 cannot", data=data, data_license="mit")


def test_the_command_measures_renders_and_releases(run, data, tmp_path, capsys):
    target = tmp_path / "out"
    assert main(["card", str(run), "--cost", "33", "48", "--to", str(target), "--data", str(data)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "README.md"), str(target / "README.md")]
    for folder in (run, target):
        sizes = json.loads((folder / "metrics.json").read_text())["cost"]["sizes"]
        assert [row["height"] for row in sizes] == [33, 48]
        assert "| 48 x 48 |" in (folder / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["card", str(run), "--data", str(data)])
    assert stopped.value.code == 2 and "name it with --to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["card", str(run), "--dtype", "float32"])
    assert main(["card", str(tmp_path / "nowhere")]) == 2


def test_spread_is_that_of_the_runs(run, tmp_path):
    scores = [0.5, 0.625, 0.7]
    others = []
    for seed, score in enumerate(scores[1:], 1):
        others.append(Path(shutil.copytree(run, tmp_path / f"run-{seed}")))
        write_metrics(others[-1], seed, mean_iou=score)
    found = spread(run, others)
    assert found["seeds"] == [0, 1, 2] and list(found["scores"]) == ["mean_iou"]
    assert found["scores"]["mean_iou"] == pytest.approx(
        {"mean": 0.608333333, "deviation": statistics.stdev(scores), "lowest": 0.5, "highest": 0.7}
    )
    card = update_card(run, seeds=tuple(others)).read_text()
    assert "The same training with the seeds 0, 1 and 2" in card
    assert "| mean IoU | 60.8 % | 10.1 % | 50.0 % | 70.0 % |" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation": {}}, "was not scored"),
        (
            {"training": {"seed": 1, "steps": 4, "init_from": "/home/alice/start"}},
            r"more than the seed: training\.steps is 4 and not 3",
        ),
        ({"evaluation": {"mean_iou": 0.5, "split": "test"}}, r"evaluation\.split is 'test' and not 'val'"),
        (
            {"training": {"seed": 1, "steps": 3, "init_from": "/home/alice/start", "layer_decay": 0.5}},
            r"training\.layer_decay is 0\.5",
        ),
        ({"training": {"seed": 1, "steps": 3, "init_from": "org/other"}}, r"training\.init_from is 'org/other'"),
        ({"training": {"seed": 0, "steps": 3, "init_from": "/home/alice/start"}}, r"seeds are \[0, 0\]"),
    ],
)
def test_runs_that_are_no_siblings_are_refused(run, tmp_path, change, message):
    other = write_metrics(Path(shutil.copytree(run, tmp_path / "other")), 1)
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(metrics | change))
    with pytest.raises(ValueError, match=message):
        spread(run, [other])


def test_samples_are_the_first_and_last_pictures_in_a_size_for_the_web(tmp_path):
    pictures = [Image.new("RGB", (2000, 500), colour) for colour in ("red", "green", "blue")]
    pairs = []
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        pairs.append((tmp_path / f"{number}.png", tmp_path / f"{number}.png"))
    write_samples(tmp_path, FolderSamples(pairs, tmp_path))
    found = [Image.open(path) for path in sorted((tmp_path / "samples").iterdir())]
    assert [picture.size for picture in found] == [(640, 160)] * 2
    assert [max(range(3), key=picture.getpixel((5, 5)).__getitem__) for picture in found] == [0, 2]


def test_the_backbones_repository_and_licence_are_timms():
    found = backbone_source("resnet50", "timm/resnet50 (Hub)")
    assert found["backbone_repo"].startswith("timm/resnet50.") and found["backbone_license"] == "apache-2.0"
    assert backbone_source("resnet50", "weights.pth") == backbone_source("resnet50", None) == {}


def test_an_output_that_is_taken_is_refused_before_anything_is_measured(run, tmp_path):
    before = (run / "metrics.json").read_bytes()
    assert main(["card", str(run), "--cost", "33", "--to", str(tmp_path)]) == 2
    assert (run / "metrics.json").read_bytes() == before and not (run / "README.md").exists()


def test_a_converted_models_notice_and_card_name_the_same_licence(run, tmp_path):
    facts = {"source": "weights.pth", "format": "smp", "sha256": "0" * 64, "comparison": "none", "license": None}
    (run / "metrics.json").write_text(json.dumps({"conversion": facts}))
    with pytest.raises(ValueError, match="licence of the training data, or of converted weights, is not known"):
        write_release(run, tmp_path / "out", dtype="float32")
    write_release(run, tmp_path / "out", dtype="float32", data_license="MIT", credit="By nobody.")
    card, notice = ((tmp_path / "out" / name).read_text() for name in ("README.md", "LICENSE"))
    assert "converted from weights.pth" in notice and "MIT License" in notice and "By nobody." in notice
    assert "\nlicense: mit\n" in card and "Licence of the converted weights: MIT (MIT License," in card
    assert "By nobody." in card and "Trained on" not in card


def test_tables_go_along(run, data, tmp_path):
    with (run / "per_class.csv").open("w", newline="") as stream:
        csv.writer(stream).writerow(["class", "iou"])
    write_release(run, tmp_path / "out", data=data)
    assert (tmp_path / "out" / "per_class.csv").read_bytes() == (run / "per_class.csv").read_bytes()
