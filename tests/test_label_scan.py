import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_ctxseg.data import ClassInfo, load_data
from hf_ctxseg.label_scan import scan_labels, write_contact_sheet

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"
CLASSES = ClassInfo(("sky", "road", "car"), ((0, 0, 255), (90, 90, 90), (255, 0, 0)))


@pytest.fixture
def root(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(20):
        size = (8 + i, 6)
        Image.fromarray(rng.integers(0, 256, (6, 8 + i, 3), np.uint8)).save(tmp_path / f"train/images/{i:03}.jpg")
        label = rng.choice(np.array([0, 1, 255], np.uint8), (6, 8 + i))
        Image.fromarray(label).save(tmp_path / f"train/labels/{i:03}.png")
        assert Image.fromarray(label).size == size
    return tmp_path


def _samples(root):
    return load_data(root, labels=CLASSES.names, eval_fraction=0).train


def _scan(root, classes=CLASSES, **arguments):
    return scan_labels(_samples(root), classes, split="train", progress=False, **arguments)


@pytest.mark.parametrize("num_workers", [1, 4, None])
def test_counts_agree_with_counting_one_by_one(root, num_workers):
    labels = [np.asarray(Image.open(path).convert("L")) for path in sorted((root / "train/labels").iterdir())]
    found = _scan(root, num_workers=num_workers)
    for value in range(3):
        assert found.histogram[value] == sum(int((label == value).sum()) for label in labels)
        assert found.images_per_class[value] == sum(bool((label == value).any()) for label in labels)
    assert found.ignored == sum(int((label == 255).sum()) for label in labels)
    assert found.histogram.dtype == np.int64
    assert found.num_images == 20 and found.sizes == ((6, 8), (6, 27))


def test_table_shows_shares_and_absent_classes(root):
    found = _scan(root)
    lines = found.table(CLASSES.names).splitlines()
    assert lines[0].startswith("20 images of 8x6 to 27x6 pixels")
    share = 100 * found.histogram[0] / (found.histogram[0] + found.histogram[1])
    assert lines[2].split() == ["sky", f"{share:.2f}", "20"]
    assert lines[4].split() == ["car", "0.00", "0"]
    assert lines[5] == "never occurs: car"


def test_l1_foreign_values_are_named_with_their_cure(root):
    label = np.zeros((6, 10), np.uint8)
    label[0] = 23
    label[1, 0] = 23
    Image.fromarray(label).save(root / "train/labels/002.png")
    with pytest.raises(ValueError) as caught:
        _scan(root)
    assert str(caught.value) == (
        "train: 1 of 20 labels or images cannot be used:\n"
        "  train/labels/002.png holds 23 (11 pixels), but the classes are 0-2 and ignore_index is 255; add names with "
        "--labels, or pass --ignore_index 23"
    )
    label[2, 0] = 7
    Image.fromarray(label).save(root / "train/labels/002.png")
    with pytest.raises(ValueError, match=r"holds 7 \(1 pixel\) and 23 \(11 pixels\), .*; add names with --labels$"):
        _scan(root)


@pytest.mark.parametrize(("value", "dtype", "suffix"), [(300, np.uint16, ".png"), (-1, np.int32, ".tif")])
def test_l1_values_beyond_8_bits_are_found(root, value, dtype, suffix):
    (root / "train/labels/000.png").unlink()
    label = np.zeros((6, 8), dtype)
    label[3, 3] = value
    Image.fromarray(label).save(root / f"train/labels/000{suffix}")
    with pytest.raises(ValueError, match=rf"000{suffix} holds {value} \(1 pixel\)"):
        _scan(root)
    # The same value may be the ignore_index, if no file holds 255
    for path in (root / "train/labels").iterdir():
        array = np.asarray(Image.open(path))
        Image.fromarray(np.where(array == 255, 0, array).astype(array.dtype)).save(path)
    assert _scan(root, ClassInfo(CLASSES.names, CLASSES.palette, value)).ignored == 1


def test_all_problems_are_told_at_once(root):
    train = root / "train"
    jpeg = (train / "images/000.jpg").read_bytes()
    (train / "images/000.jpg").write_bytes(jpeg[:-60])
    (train / "labels/001.png").write_bytes(b"")
    Image.new("L", (3, 3)).save(train / "labels/002.png")
    Image.new("RGB", (11, 6), "red").save(train / "labels/003.png")
    Image.new("L", (12, 6), 9).save(train / "labels/004.png")
    with pytest.raises(ValueError) as caught:
        _scan(root)
    lines = str(caught.value).splitlines()
    assert lines[0] == "train: 5 of 20 labels or images cannot be used:"
    starts = [
        "  train/images/000.jpg cannot be read: ",
        "  train/labels/001.png cannot be read: the file is empty",
        "  train/labels/002.png is 3x3 pixels, but train/images/002.jpg is 10x6",
        "  train/labels/003.png is an RGB picture",
        "  train/labels/004.png holds 9 (72 pixels)",
    ]
    assert len(lines) == 6
    for line, start in zip(lines[1:], starts, strict=True):
        assert line.startswith(start)


def test_at_most_ten_problems_are_listed(root):
    for path in (root / "train/labels").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        _scan(root)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[0].startswith("train: 20 of 20") and lines[-1] == "  …and 10 more"


def test_nothing_but_ignored_pixels_is_refused(root):
    for path in (root / "train/labels").iterdir():
        with Image.open(path) as label:
            size = label.size
        Image.new("L", size, 255).save(path)
    with pytest.raises(ValueError, match="train: every pixel of the 20 labels is 255, the ignore_index"):
        _scan(root)


def test_tables_are_scanned_too(root):
    import datasets

    folder = root / "train"
    images = [str(path) for path in sorted((folder / "images").iterdir())]
    labels = [str(path) for path in sorted((folder / "labels").iterdir())]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    samples = load_data(table, labels=CLASSES.names, eval_fraction=0).train
    found = scan_labels(samples, CLASSES, split="train", progress=False, num_workers=3)
    assert np.array_equal(found.histogram, _scan(root).histogram)
    (folder / "labels/004.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"row 4 \(label\) cannot be read: the file is empty"):
        scan_labels(samples, CLASSES, split="train", progress=False)


def test_contact_sheet_is_a_picture(root):
    write_contact_sheet(_samples(root), CLASSES, root / "sheet.png")
    with Image.open(root / "sheet.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG" and min(sheet.size) > 27
    write_contact_sheet(_samples(root), CLASSES, root / "all.png", count=99)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs the CamVid copy in shared/data")
def test_camvid_pixel_counts():
    expected = json.loads((CAMVID / "meta.json").read_text())["pixel_counts"]["val"]
    data = load_data(CAMVID)
    found = scan_labels(data.validation, data.classes, split="val", progress=False)
    assert found.histogram.tolist() == [expected[name] for name in data.classes.names]
    assert found.ignored == expected["void"]
    assert found.sizes == ((360, 480), (360, 480))
