"""Class names, and pictures and label maps as they are read."""

import json

import numpy as np
import pytest
from data_helpers import write_pictures
from PIL import Image

from hf_ctxseg.data import (
    ClassInfo,
    FolderSamples,
    load_data,
    read_classes,
    read_label,
    read_pair,
)

NAMES = ("sky", "road", "car")


def test_class_info_maps():
    info = ClassInfo(("sky", "road"), ((0, 0, 0), (9, 9, 9)))
    assert info.num_labels == 2 and info.id2label == {0: "sky", 1: "road"} and info.label2id == {"sky": 0, "road": 1}


@pytest.mark.parametrize(
    ("names", "palette", "ignore_index", "message"),
    [
        ((), (), 255, "at least one"),
        (("a", "a"), ((0, 0, 0),) * 2, 255, r"\['a'\] occur more than once"),
        (("a", "b"), ((0, 0, 0),), 255, "1 colours for 2 classes"),
        (("a",), ((0, 0, 256),), 255, "from 0 to 255"),
        (("a",), ((0, 0),), 255, "three whole numbers"),
        (("sky", "road"), ((0, 0, 0),) * 2, 1, "ignore_index is 1, which is also class 'road'"),
    ],
)
def test_contradictory_classes_are_refused(names, palette, ignore_index, message):
    with pytest.raises(ValueError, match=message):
        ClassInfo(names, palette, ignore_index)


def test_every_form_of_class_names_reads_alike(tmp_path):
    (tmp_path / "names.txt").write_text("sky\n# comment\n\n road \ncar\n")
    (tmp_path / "list.json").write_text(json.dumps(NAMES))
    (tmp_path / "ids.json").write_text(json.dumps({"2": "car", "0": "sky", "1": "road"}))
    meta = {"classes": NAMES, "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "ignore_index": 77}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    forms = ["sky, road,car", list(NAMES), *(str(tmp_path / n) for n in ("names.txt", "list.json", "ids.json"))]
    for form in forms:
        assert read_classes(form).names == NAMES
        assert read_classes(form).ignore_index == 255
    full = read_classes(tmp_path / "meta.json")
    assert full == ClassInfo(NAMES, ((1, 2, 3), (4, 5, 6), (7, 8, 9)), 77)
    assert read_classes(tmp_path / "meta.json", ignore_index=-100).ignore_index == -100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": "sky", "2": "road"}', r"\[1\] are missing"),
        ('{"sky": 0}', "keys are 0, 1, 2"),
        ("[1, 2]", "list of texts"),
        ("[", "names.json cannot be read"),
        ('{"classes": ["a"], "palette": 3}', "palette must be"),
        ('{"classes": ["a"], "ignore_index": "x"}', "whole number"),
    ],
)
def test_malformed_class_files_are_refused(tmp_path, content, message):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "names.json")


def test_missing_class_file_suggests_the_near_one(tmp_path):
    (tmp_path / "labels.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"did you mean labels.txt\?"):
        read_classes(str(tmp_path / "lables.txt"))


def _read_back(tmp_path, image, suffix=".png"):
    path = tmp_path / f"label{suffix}"
    image.save(path)
    return FolderSamples([(path, path)], tmp_path).label(0)


def test_l4_label_modes_keep_their_indices(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(ids)
    palette.putpalette([(7 * i) % 256 for i in range(768)])
    assert palette.mode == "P"
    for image, suffix in [
        (palette, ".png"),
        (palette, ".gif"),
        (Image.fromarray(ids), ".png"),
        (Image.fromarray(ids), ".bmp"),
        (Image.fromarray(ids.astype(np.uint16)), ".png"),
        (Image.fromarray(ids.astype(np.int32)), ".tif"),
        (Image.fromarray(ids.astype(np.float32)), ".tif"),
        (Image.merge("RGB", [Image.fromarray(ids)] * 3), ".png"),
        (Image.merge("LA", [Image.fromarray(ids)] * 2), ".png"),
    ]:
        label = _read_back(tmp_path, image, suffix)
        assert label.dtype == np.uint8 and np.array_equal(label, ids), (image.mode, suffix)
    bits = _read_back(tmp_path, Image.fromarray(ids > 5))
    assert bits.dtype == np.uint8 and np.array_equal(bits, ids > 5)


def test_l4_wide_ids_are_kept(tmp_path):
    sixteen = np.array([[0, 300, 65535]], dtype=np.uint16)
    label = _read_back(tmp_path, Image.fromarray(sixteen))
    assert label.dtype == np.int32 and label.tolist() == [[0, 300, 65535]]
    negative = _read_back(tmp_path, Image.fromarray(np.array([[-100, 3]], np.int32)), ".tif")
    assert negative.tolist() == [[-100, 3]]


def test_l4_colours_and_fractions_are_no_labels(tmp_path):
    message = (
        r"labels/017.png is an RGB picture \(mode RGB\), but a label map holds one class index per pixel; convert the "
        r"colours to indices \(a palette PNG or 8-bit grey\), or say in a recipe which colour is which "
        r"class \(--recipe\)"
    )
    with pytest.raises(ValueError, match=message):
        read_label(Image.new("RGB", (2, 2), (128, 0, 0)), "labels/017.png")
    with pytest.raises(ValueError, match="mode RGBA"):
        read_label(Image.new("RGBA", (2, 2), (128, 0, 0, 255)), "x")
    for value in (0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="x holds floats that are not whole"):
            read_label(Image.fromarray(np.full((2, 2), value, np.float32)), "x")
    with pytest.raises(ValueError, match="x has mode CMYK"):
        read_label(Image.new("CMYK", (2, 2)), "x")


def test_image_is_upright_rgb(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images/a.png", exif=exif)
    image = FolderSamples([(tmp_path / "images/a.png",) * 2], tmp_path).image(0)
    assert image.mode == "RGB" and image.size == (4, 6)
    assert np.array_equal(np.asarray(image), np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_image_of_any_mode(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    image = Image.fromarray(np.full((3, 5), 65535, np.uint16)) if mode == "I;16" else Image.new("RGB", (5, 3), "white")
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / f"a{suffix}")
    image = FolderSamples([(tmp_path / f"a{suffix}",) * 2], tmp_path).image(0)
    assert image.mode == "RGB" and np.asarray(image).min() >= 254


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (_truncate, "(?i:truncated|cut off|broken)"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("hello"), "no picture of a known format"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
@pytest.mark.parametrize(("kind", "suffix"), [("images", ".jpg"), ("images", ".png"), ("labels", ".png")])
def test_broken_files_are_named(tmp_path, damage, cause, kind, suffix):
    folder = tmp_path / "train"
    write_pictures(folder, ["a"], (64, 48), suffix if kind == "images" else ".png")
    samples = load_data(tmp_path, labels=NAMES, eval_fraction=0).train
    noise = np.random.default_rng(0).integers(0, 3, (48, 64), np.uint8)
    Image.fromarray(noise).save(folder / kind / f"a{suffix}")
    damage(folder / kind / f"a{suffix}")
    with pytest.raises(ValueError, match=rf"^train/{kind}/a{suffix} cannot be read: .*({cause})") as caught:
        read_pair(samples, 0)
    assert str(tmp_path) not in str(caught.value) and caught.value.__cause__ is not None
