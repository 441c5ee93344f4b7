"""Recipes: the published folder forms in miniature, and what label maps become."""

import colorsys
import json

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from training_helpers import TINY, flags, scene

from hf_ctxseg.arguments import arguments_from_dict, parse_arguments
from hf_ctxseg.cli import main
from hf_ctxseg.data import load_data
from hf_ctxseg.label_map import LabelMap
from hf_ctxseg.recipes import FOLDER, find_recipe, recipe_names
from hf_ctxseg.samples import read_pair

ALL = ["ade20k", "camvid", "camvid32", "cityscapes", "cocostuff", "voc2012", "voc2012aug"]


def _image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 2), (9, 9, 9)).save(path)


def _label(path, values):
    """A label map of 4x2 pixels; values of whole numbers or of colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(values, np.uint8)
    Image.fromarray(pixels.reshape(2, 4, *pixels.shape[1:])).save(path)


def _read(root, recipe, **arguments):
    """Names and label maps of both splits."""
    data = load_data(root, recipe=recipe, **arguments)
    splits = []
    for samples in (data.train, data.validation):
        splits.append({samples.name(i): read_pair(samples, i)[1].ravel().tolist() for i in range(len(samples))})
    return splits


def test_what_is_shipped():
    assert recipe_names() == ALL
    counts = {"ade20k": 150, "camvid": 11, "camvid32": 11, "cityscapes": 19, "cocostuff": 171}
    for name in ALL:
        recipe = find_recipe(name)
        assert recipe.classes.num_labels == counts.get(name, 21)
        assert recipe.classes.ignore_index == 255 and recipe.title and recipe.layouts


def test_colours_of_voc_are_those_of_its_bit_pattern():
    # The development kit's rule: three bits of the index at a time, spread over red, green and blue from the top
    for index, colour in enumerate(find_recipe("voc2012").classes.palette):
        expected = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                expected[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        assert list(colour) == expected


def test_voc_in_its_published_form(tmp_path):
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000033\n\n")
    (lists / "trainaug.txt").write_text(
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n2008_000002\n"
    )
    for name in ("2007_000032", "2007_000033", "2008_000002", "2009_000001"):
        _image(tmp_path / "JPEGImages" / f"{name}.jpg")
        _label(tmp_path / "SegmentationClassAug" / f"{name}.png", [20] * 8)
    for name in ("2007_000032", "2007_000033"):
        _label(tmp_path / "SegmentationClass" / f"{name}.png", [0, 1, 2, 15, 20, 255, 0, 0])
    own = [0, 1, 2, 15, 20, 255, 0, 0]
    assert _read(tmp_path, "voc2012") == [
        {"JPEGImages/2007_000032.jpg": own},
        {"JPEGImages/2007_000033.jpg": own},
    ]
    assert find_recipe("voc2012aug").arguments["train_split"] == "trainaug"
    assert _read(tmp_path, "voc2012aug", train_split="trainaug") == [
        {"JPEGImages/2007_000032.jpg": own, "JPEGImages/2008_000002.jpg": [20] * 8},
        {"JPEGImages/2007_000033.jpg": own},
    ]
    (lists / "train.txt").write_text("2007_000032\n2011_000001\n")
    with pytest.raises(ValueError, match=r"1 of 2 files are missing: SegmentationClass/2011_000001.png"):
        load_data(tmp_path, recipe="voc2012")


def test_cityscapes_in_its_published_form(tmp_path):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        _image(tmp_path / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        for kind, values in (("labelIds", [7, 8, 11, 26, 33, 0, 4, 29]), ("instanceIds", [0] * 8)):
            _label(tmp_path / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", values)
    train, val = _read(tmp_path, "cityscapes")
    assert train == {
        f"leftImg8bit/train/{city}/{city}_000000_000019_leftImg8bit.png": [0, 1, 2, 13, 18, 255, 255, 255]
        for city in ("aachen", "bochum")
    }
    assert len(val) == 1


def test_ade20k_in_its_published_form(tmp_path):
    for split in ("training", "validation"):
        _image(tmp_path / "images" / split / f"ADE_{split}_00000001.jpg")
        _label(tmp_path / "annotations" / split / f"ADE_{split}_00000001.png", [0, 1, 2, 3, 13, 149, 150, 0])
    train, val = _read(tmp_path, "ade20k")
    assert train == {"images/training/ADE_training_00000001.jpg": [255, 0, 1, 2, 12, 148, 149, 255]}
    assert len(val) == 1
    _label(tmp_path / "annotations/training/ADE_training_00000001.png", [151] * 8)
    with pytest.raises(ValueError, match=r"00000001.png holds value 151 \(8 pixels\), which the recipe lists neither"):
        _read(tmp_path, "ade20k")


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images/{}/{}.jpg", "annotations/{}/{}.png"), ("{}/{}.jpg", "stuffthingmaps_trainval2017/{}/{}.png")],
)
def test_cocostuff_in_its_published_forms(tmp_path, images, labels):
    for split in ("train2017", "val2017"):
        _image(tmp_path / images.format(split, "000000000009"))
        _label(tmp_path / labels.format(split, "000000000009"), [0, 10, 12, 89, 91, 181, 255, 0])
    train, val = _read(tmp_path, "cocostuff")
    names = find_recipe("cocostuff").classes.names
    (values,) = train.values()
    found = [names[value] if value < 255 else "void" for value in values]
    # cocostuff's labels.txt counts from 1: 1 person, 11 fire hydrant, 13 stop sign, 90 toothbrush, 92 banner, 182 wood
    expected = ["person", "fire hydrant", "stop sign", "toothbrush", "banner", "wood", "void", "person"]
    assert found == expected and len(val) == 1
    _label(tmp_path / labels.format("train2017", "000000000009"), [11] * 8)  # street sign: never annotated
    with pytest.raises(ValueError, match="value 11"):
        _read(tmp_path, "cocostuff")


def test_camvid_in_both_forms_of_eleven_classes(tmp_path):
    for split in ("train", "val", "test"):
        _image(tmp_path / "a" / split / "0001TP_006690.png")
        _label(tmp_path / "a" / f"{split}annot" / "0001TP_006690.png", [0, 1, 2, 3, 8, 9, 10, 11])
        _image(tmp_path / "b" / split / "images" / "x.jpg")
        _label(tmp_path / "b" / split / "labels" / "x.png", [0, 1, 2, 3, 8, 9, 10, 255])
    expected = [0, 1, 2, 3, 8, 9, 10, 255]
    assert _read(tmp_path / "a", "camvid")[0] == {"train/0001TP_006690.png": expected}
    assert _read(tmp_path / "b", "camvid")[1] == {"val/images/x.jpg": expected}


def test_camvid_in_thirty_two_colours(tmp_path):
    stored = [(128, 128, 128), (0, 128, 64), (0, 0, 64), (192, 0, 64), (64, 128, 64), (192, 0, 192), (0, 0, 0)]
    stored.append((128, 64, 64))  # OtherMoving
    expected = [0, 1, 2, 3, 9, 10, 255, 8]
    for split in ("train", "val"):
        _image(tmp_path / "a" / split / "0001TP_006690.png")
        _label(tmp_path / "a" / f"{split}_labels" / "0001TP_006690_L.png", stored)
    assert _read(tmp_path / "a", "camvid32") == [
        {"train/0001TP_006690.png": expected},
        {"val/0001TP_006690.png": expected},
    ]
    for number in range(4):
        _image(tmp_path / "b" / "701_StillsRaw_full" / f"{number}.png")
        _label(tmp_path / "b" / "LabeledApproved_full" / f"{number}_L.png", stored)
    assert len(load_data(tmp_path / "b", recipe="camvid32", eval_fraction=0.25).train) == 3
    (tmp_path / "b" / "train.txt").write_text("/SegNet/CamVid/train/3.png /SegNet/CamVid/trainannot/3.png\n")
    (tmp_path / "b" / "val.txt").write_text("0\n")
    train, val = _read(tmp_path / "b", "camvid32")
    assert train == {"701_StillsRaw_full/3.png": expected} and list(val) == ["701_StillsRaw_full/0.png"]
    _label(tmp_path / "b" / "LabeledApproved_full" / "3_L.png", [(1, 2, 3)] * 8)
    with pytest.raises(ValueError, match=r"3_L.png holds colour \(1, 2, 3\) \(8 pixels\)"):
        _read(tmp_path / "b", "camvid32")


def test_camvid_lists_each_of_the_32_colours_once():
    recipe = yaml.safe_load((FOLDER / "camvid32.yaml").read_text())
    colours = [tuple(colour) for row in recipe["classes"] for colour in row["stored"]]
    colours += [tuple(colour) for colour in recipe["void"]]
    assert len(colours) == len(set(colours)) == 32
    assert all(value in (0, 64, 128, 192) for colour in colours for value in colour)


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "like: cityscapes\n"
        "layouts: [{images: 'photos/{name}.png', labels: 'ids/{name}_ids.png', names: 'lists/{split}.txt',"
        " splits: {train: learn, val: check}}]\n"
        "arguments: {crop_size: 33}\n"
    )
    (tmp_path / "lists").mkdir()
    for name, split in (("a", "learn"), ("b", "check")):
        (tmp_path / "lists" / f"{split}.txt").write_text(name)
        _image(tmp_path / "photos" / f"{name}.png")
        _label(tmp_path / "ids" / f"{name}_ids.png", [33] * 8)
    assert _read(tmp_path, tmp_path / "my.yaml") == [{"photos/a.png": [18] * 8}, {"photos/b.png": [18] * 8}]
    with pytest.raises(ValueError, match=r"recipe voc2012 knows: it holds ids, lists.*JPEGImages/\{name\}.jpg with"):
        load_data(tmp_path, recipe="voc2012")
    for flag, value in (("labels", "a,b"), ("ignore_index", 7)):
        with pytest.raises(ValueError, match=f"{flag} is given beside recipe"):
            load_data(tmp_path, recipe=tmp_path / "my.yaml", **{flag: value})


def test_l7_two_classes_of_a_mask_of_black_and_white(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "classes: [{name: ground, stored: 0}, {name: crack, stored: 255}]\n"
        "layouts: [{images: '{split}/images/{name}.png', labels: '{split}/masks/{name}.png'}]\n"
    )
    for split in ("train", "val"):
        _image(tmp_path / split / "images" / "a.png")
        _label(tmp_path / split / "masks" / "a.png", [0, 255, 255, 0, 0, 0, 0, 255])
    train, val = _read(tmp_path, tmp_path / "my.yaml")
    assert train == {"train/images/a.png": [0, 1, 1, 0, 0, 0, 0, 1]} and len(val) == 1


def test_tables_are_translated_too(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    image, label = Image.new("RGB", (4, 2)), Image.fromarray(np.array([[0, 1, 150, 7]] * 2, np.uint8))
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict({"image": [image] * 2, "annotation": [label] * 2}, features=features)
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    for streaming in (False, True):
        data = load_data(tmp_path, recipe="ade20k", streaming=streaming)
        for samples in (data.seen, data.validation):
            assert samples.label(1).tolist() == [[255, 0, 149, 6]] * 2
        assert data.classes.names[149] == "flag"


def test_recipes_are_listed(capsys):
    assert main(["models", "--recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ALL)
    assert main(["models", "--recipes", "--report", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ALL and rows[3]["classes"] == 19


def test_training_and_scoring_with_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "val"):
        for number in range(2):
            picture, mask = scene(number)
            stored = np.array([7, 26, 33, *[0] * 253])[np.asarray(mask)]
            stem = f"aachen/aachen_000000_00000{number}"
            for folder, kind, image in (
                ("leftImg8bit", "leftImg8bit", picture),
                ("gtFine", "gtFine_labelIds", Image.fromarray(stored.astype(np.uint8))),
            ):
                path = tmp_path / "cs" / folder / split / f"{stem}_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    run = tmp_path / "run"
    data = str(tmp_path / "cs")
    assert (
        main(
            [
                "train",
                *flags(recipe="cityscapes", data=data, output_dir=run, output_stride=8, max_steps=1, preview_images=0),
            ]
        )
        == 0
    )
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert args["recipe"] == "cityscapes" and "learning_rate" not in args
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["training"]["learning_rate"] == 0.007 and metrics["training"]["optimizer"] == "sgd"
    assert metrics["data"]["class_pixels"]["bicycle"] > 0 and metrics["data"]["class_pixels"]["bus"] == 0
    assert main(["eval", str(run), "--data", data, "--recipe", "cityscapes"]) == 0
    again = json.loads((run / "eval-val" / "metrics.json").read_text())
    assert again["evaluation"]["mean_iou"] == pytest.approx(metrics["evaluation"]["mean_iou"], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "holds list, but must be a mapping"),
        ("clases: []", r"holds \['clases'\], but must be"),
        ("title: x", "'classes' is missing"),
        ("classes: [{name: a, colour: [0, 0]}]", "three whole numbers"),
        ("classes: [{name: a, stored: x}]", "stored is 'x'"),
        ("classes: [{name: a, stored: 3}, {name: b, stored: [3, 4]}]", "value 3 is stored for more than one class"),
        ("classes: [{name: a, stored: 3}]\nvoid: [[0, 0, 0]]", "stands among colours"),
        ("classes: [{name: a, store: 3}]", "must have name, colour and stored alone"),
        ("classes: [{name: a}]\nlayouts: [{images: 'x/{name}'}]", "must have images and labels"),
        ("classes: [{name: a}]\nlayouts: [{images: 'x', labels: 'y/{name}'}]", r"'x' must be a folder and a file"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_malformed_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_recipe(tmp_path / "my.yaml")


def test_unknown_recipes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'voc2021' \(did you mean 'voc2012'\?\): name one of ade20k"):
        find_recipe("voc2021")
    with pytest.raises(FileNotFoundError, match="no recipe file"):
        find_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("mode", ["L", "I;16", "P"])
def test_label_map_against_a_loop(mode):
    stored, void = [[3], [300 if mode == "I;16" else 30, 7], [9]], [0]
    draw = np.random.default_rng(0)
    values = draw.choice([0, 3, 7, 9, 255, stored[1][0]], (5, 6)).astype(np.uint16 if mode == "I;16" else np.uint8)
    picture = Image.fromarray(values)
    if mode == "P":
        picture.putpalette([round(255 * part) for i in range(256) for part in colorsys.hsv_to_rgb(i / 256, 1, 1)])
    table = {3: 0, stored[1][0]: 1, 7: 1, 9: 2, 0: 255, 255: 255}
    found = LabelMap(stored, void, 255)(picture, "x")
    assert found.dtype == np.uint8 and found.tolist() == [[table[int(value)] for value in row] for row in values]
    assert LabelMap(stored, void, -100)(Image.fromarray(np.zeros((1, 1), np.uint8)), "x").tolist() == [[-100]]


def test_flags_win_over_the_recipe(tmp_path):
    flags = ["--data", "x", "--output_dir", str(tmp_path), "--recipe", "voc2012aug", "--use_cpu"]
    (model, data, training), given = parse_arguments([*flags, "--max_steps", "5"])
    assert (data.crop_size, data.train_split, model.output_stride) == ([513], "trainaug", 16)
    assert (training.max_steps, training.learning_rate) == (5, 0.007)
    assert training.per_device_train_batch_size == 16 and training.optim == "sgd"
    assert given["recipe"] == "voc2012aug" and "learning_rate" not in given
    epochs = parse_arguments([*flags, "--num_train_epochs", "2"])[0][2]
    assert (epochs.max_steps, epochs.num_train_epochs) == (-1, 2)
    (tmp_path / "my.yaml").write_text("like: voc2012\narguments: {leaning_rate: 1}")
    with pytest.raises(ValueError, match=r"no argument 'leaning_rate': did you mean 'learning_rate'"):
        arguments_from_dict(TINY | {"data": "x", "output_dir": str(tmp_path), "recipe": str(tmp_path / "my.yaml")})
