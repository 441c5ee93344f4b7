import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_ctxseg import demo_painter, demo_scenes
from hf_ctxseg.demo_scenes import CLASSES, PALETTE, pixel_color_miou, render_scene, write_demo_dataset

SMALL = (32, 40)


def test_seed_decides_the_scene():
    image, label = render_scene(3)
    np.random.seed(0)
    again, label_again = render_scene(3)
    assert np.array_equal(image, again) and np.array_equal(label, label_again)
    assert image.dtype == label.dtype == np.uint8
    assert image.shape == (192, 256, 3) and label.shape == (192, 256)


def test_seeds_give_different_scenes():
    scenes = [render_scene(seed, SMALL) for seed in range(20)]
    assert len({image.tobytes() for image, _ in scenes}) == 20
    assert len({label.tobytes() for _, label in scenes}) == 20


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 131), (40, 200), (200, 40), (240, 320)])
def test_any_size(size):
    for seed in range(3):
        image, label = render_scene(seed, size)
        assert image.shape == (*size, 3) and label.shape == size
        assert label.max() < len(CLASSES)
        assert len(np.unique(label)) >= 4
        assert image.std() > 10


@pytest.mark.parametrize(("seed", "size", "message"), [(0, (31, 64), "at least 32"), (-1, (64, 64), "negative")])
def test_refused_arguments(seed, size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        render_scene(seed, size)
    with pytest.raises(ValueError, match=message):
        write_demo_dataset(tmp_path / "scenes", 1, 1, seed, size)
    assert not list(tmp_path.iterdir())


def test_no_class_is_rare():
    counts = sum(np.bincount(render_scene(seed)[1].ravel(), minlength=len(CLASSES)) for seed in range(30))
    assert len(CLASSES) == len(PALETTE) == len(set(PALETTE)) >= 6
    assert (counts / counts.sum()).min() > 0.02


def test_boundaries_are_clean():
    """Nearly every pixel has a neighbour on each axis that shares its label: no speckles."""
    for seed in range(10):
        padded = np.pad(render_scene(seed)[1], 1, mode="edge")
        center = padded[1:-1, 1:-1]
        alone = (padded[:-2, 1:-1] != center) & (padded[2:, 1:-1] != center)
        alone |= (padded[1:-1, :-2] != center) & (padded[1:-1, 2:] != center)
        assert alone.mean() < 0.005


def test_shadows_darken_and_leave_the_label(monkeypatch):
    image, label = render_scene(5)
    monkeypatch.setattr(demo_painter._Painter, "shadow", lambda self, half_width: None)
    bright, same_label = render_scene(5)
    assert np.array_equal(label, same_label)
    difference = bright.astype(int) - image
    assert difference.min() >= -2  # blur rounds
    assert (difference > 8).any(axis=-1).mean() > 0.01


def test_photograph_changes_light_and_adds_noise():
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    photos = [demo_painter._photograph(gray, np.random.default_rng(seed)).astype(float) for seed in range(20)]
    noise = [np.diff(photo, axis=1).std() / np.sqrt(2) for photo in photos]
    assert min(noise) > 0.9 and max(noise) < 5.6
    assert np.std([photo.mean() for photo in photos]) > 4
    assert np.std([photo[..., 0].mean() - photo[..., 2].mean() for photo in photos]) > 2


def test_color_of_a_pixel_says_little():
    train = [render_scene(seed) for seed in range(60)]
    test = [render_scene(1000 + seed) for seed in range(20)]
    score = pixel_color_miou(train, test, len(CLASSES))
    labels = np.concatenate([label.ravel() for _, label in test])
    chance = np.bincount(labels).max() / labels.size / len(CLASSES)
    assert chance < score < 0.35


def scene(*pixels):
    """A picture one pixel high from (gray value, label) pairs."""
    values, labels = (np.array(column, dtype=np.uint8)[None] for column in zip(*pixels, strict=True))
    return np.repeat(values[..., None], 3, axis=-1), labels


def test_color_classifier_separates_what_colors_separate():
    train = [scene((0, 0), (200, 1)), scene((100, 2), (100, 255))]
    assert pixel_color_miou(train, [scene((3, 0), (200, 1), (100, 2), (0, 255))], 3) == 1.0


def test_color_classifier_uses_fine_bins():
    assert pixel_color_miou([scene((0, 0), (8, 1))], [scene((0, 0), (8, 1))], 2) == 1.0


def test_color_classifier_sees_each_channel():
    colors = np.array([[[200, 0, 0], [0, 200, 0], [0, 0, 200]]], dtype=np.uint8)
    labels = np.array([[0, 1, 2]], dtype=np.uint8)
    assert pixel_color_miou([(colors, labels)], [(colors, labels)], 3) == 1.0


def test_color_classifier_reports_the_better_weighting():
    # One colour, labels 0 0 0 0 1 and another colour always 0: counts are 8 of class 0 and 1 of class 1.
    train = [scene(*[(0, 0)] * 4, (0, 1), *[(200, 0)] * 4)]
    # Most frequent: all 0 -> IoU (4/6 + 0) / 2. In proportion: 0 -> class 1 (1/1 > 4/8), 200 -> class 0.
    test = [scene((0, 0), (0, 1), (0, 1), *[(200, 0)] * 3)]
    assert pixel_color_miou(train, test, 2) == pytest.approx((3 / 4 + 2 / 3) / 2)


def test_unseen_color_goes_to_the_commonest_class():
    assert pixel_color_miou([scene((0, 1), (0, 1), (200, 0))], [scene((100, 1), (100, 1), (200, 0))], 2) == 1.0


def test_color_classifier_refuses():
    good = [scene((0, 0), (200, 1))]
    with pytest.raises(ValueError, match="no scenes"):
        pixel_color_miou(good, [], 2)
    with pytest.raises(ValueError, match="value 7, but num_labels=2"):
        pixel_color_miou(good, [scene((0, 7))], 2)


def test_dataset_on_disk(tmp_path):
    folder = write_demo_dataset(tmp_path / "deep" / "scenes", num_train=3, num_val=2, seed=4, size=SMALL)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    images = [*(f"train/images/{i:03}.png" for i in range(3)), *(f"val/images/{i:03}.png" for i in range(2))]
    assert files == sorted(["meta.json", *images, *(name.replace("images", "labels") for name in images)])
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["classes"] == list(CLASSES) and meta["ignore_index"] == 255 and "generated" in meta["source"]
    assert [tuple(color) for color in meta["palette"]] == list(PALETTE)
    assert len({(folder / name).read_bytes() for name in images}) == 5
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scenes"]


def test_labels_are_palette_images_of_the_rendered_indices(tmp_path, monkeypatch):
    rendered = []
    monkeypatch.setattr(
        demo_scenes, "render_scene", lambda *a: rendered.append((a[0], render_scene(*a))) or rendered[-1][1]
    )
    folder = write_demo_dataset(tmp_path / "scenes", num_train=2, num_val=2, size=SMALL)
    names = [folder / split / "images" / f"{i:03}.png" for split in ("train", "val") for i in range(2)]
    for path, (_, (image, label)) in zip(names, rendered, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)
        mask = Image.open(folder / path.parts[-3] / "labels" / path.name)
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), label)
        assert np.array_equal(np.asarray(mask.convert("RGB")), np.array(PALETTE, dtype=np.uint8)[label])
    other = write_demo_dataset(tmp_path / "other", num_train=2, num_val=2, seed=1, size=SMALL)
    assert other.is_dir() and len({seed for seed, _ in rendered}) == 8


def test_equal_call_keeps_the_folder(tmp_path, monkeypatch):
    folder = write_demo_dataset(tmp_path / "scenes", num_train=2, num_val=1, size=SMALL)
    monkeypatch.setattr(demo_scenes, "render_scene", None)
    assert write_demo_dataset(folder, num_train=2, num_val=1, size=SMALL) == folder


@pytest.mark.parametrize("changed", [{"num_train": 3}, {"num_val": 2}, {"seed": 1}, {"size": (34, 40)}])
def test_other_dataset_is_left_alone(tmp_path, changed):
    arguments = {"num_train": 2, "num_val": 1, "size": SMALL}
    folder = write_demo_dataset(tmp_path / "scenes", **arguments)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(FileExistsError, match="delete it or give another folder"):
        write_demo_dataset(folder, **(arguments | changed))
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_dataset_is_not_taken_for_a_whole_one(tmp_path):
    folder = write_demo_dataset(tmp_path / "scenes", num_train=2, num_val=1, size=SMALL)
    (folder / "val" / "labels" / "000.png").unlink()
    with pytest.raises(FileExistsError, match="only a part of it"):
        write_demo_dataset(folder, num_train=2, num_val=1, size=SMALL)


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left as it is"):
        write_demo_dataset(tmp_path, num_train=1, num_val=1, size=SMALL)
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_demo_dataset(tmp_path / "notes.txt", num_train=1, num_val=1, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scenes").mkdir()
    assert (write_demo_dataset(Path("scenes"), num_train=1, num_val=1, size=SMALL) / "meta.json").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def fail_at_third(seed, size, calls=[]):  # noqa: B006
        calls.append(seed)
        if len(calls) == 3:
            raise error
        return render_scene(seed, size)

    monkeypatch.setattr(demo_scenes, "render_scene", fail_at_third)
    with pytest.raises(type(error)):
        write_demo_dataset(tmp_path / "scenes", num_train=3, num_val=1, size=SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("same", [True, False])
def test_another_process_is_faster(tmp_path, monkeypatch, same):
    write_split = demo_scenes._write_split
    folder = tmp_path / "scenes"

    def overtaken(*args):
        monkeypatch.setattr(demo_scenes, "_write_split", write_split)
        write_demo_dataset(folder, num_train=2, num_val=1, seed=0 if same else 1, size=SMALL)
        write_split(*args)

    monkeypatch.setattr(demo_scenes, "_write_split", overtaken)
    if same:
        assert write_demo_dataset(folder, num_train=2, num_val=1, size=SMALL) == folder
    else:
        with pytest.raises(FileExistsError, match="holds something else"):
            write_demo_dataset(folder, num_train=2, num_val=1, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


@pytest.mark.parametrize("name", ["num_train", "num_val"])
def test_split_needs_scenes(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0 is out of range"):
        write_demo_dataset(tmp_path / "scenes", **{name: 0})
