import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from data_helpers import write_pictures
from PIL import Image
from torch.utils.data import DataLoader

from hf_ctxseg.augmentation import training_transform
from hf_ctxseg.data import (
    EvaluationDataset,
    TableSamples,
    TrainingDataset,
    collate_evaluation,
    load_data,
    read_pair,
)

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"
NAMES = ("sky", "road", "car")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "street"
    write_pictures(root / "train", [f"{i:03}" for i in range(6)])
    write_pictures(root / "val", ["a", "b"])
    (root / "labels.txt").write_text("# classes\nsky\n\nroad\ncar\n")
    return root


def _processor(images, segmentation_maps=None, return_tensors="pt", do_resize=True):
    """The image processor's interface: halves the size if it may resize, subtracts nothing."""
    if isinstance(images, Image.Image):
        images = torch.from_numpy(np.array(images)).permute(2, 0, 1)
    pixels = images[None] / 255
    batch = {"pixel_values": torch.nn.functional.avg_pool2d(pixels, 2) if do_resize else pixels}
    if segmentation_maps is not None:
        batch["labels"] = torch.from_numpy(np.asarray(segmentation_maps))[None].to(torch.int64)
    return batch


def test_l3_sizes_must_agree(root):
    Image.new("L", (9, 12)).save(root / "train/labels/000.png")
    with pytest.raises(ValueError, match=r"train/labels/000.png is 9x12 pixels, but train/images/000.png is 12x9"):
        read_pair(load_data(root).train, 0)


def _names(samples):
    return [samples.name(i) for i in range(len(samples))]


def test_all_layouts_give_the_same_samples(root, tmp_path):
    other = tmp_path / "other"
    masks = tmp_path / "masks"
    for split in ("train", "val"):
        shutil.copytree(root / split / "images", other / "images" / split)
        shutil.copytree(root / split / "labels", other / "masks" / split)
        shutil.copytree(root / split / "images", masks / split / "images")
        shutil.copytree(root / split / "labels", masks / split / "masks")
    (root / "train/images/.DS_Store").write_text("hidden")
    (root / ".git/images").mkdir(parents=True)
    first = load_data(root)
    assert (len(first.train), len(first.validation), first.source) == (6, 2, "street")
    assert first.classes.names == NAMES
    assert _names(first.train)[0] == "train/images/000.png"
    for folder in (other, masks):
        data = load_data(str(folder), labels="sky,road,car")
        for one, same in ((data.train, first.train), (data.validation, first.validation)):
            assert len(one) == len(same)
            for i in range(len(one)):
                assert np.array_equal(np.asarray(one.image(i)), np.asarray(same.image(i)))
                assert np.array_equal(one.label(i), same.label(i))


def test_flat_folder_is_held_out_by_seed_alone(root, caplog):
    splits = [load_data(root / "train", labels=NAMES, eval_fraction=0.34, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert all((len(data.train), len(data.validation)) == (4, 2) for data in splits)
    held = [_names(data.validation) for data in splits]
    assert held[0] == held[1] and len({tuple(names) for names in held}) > 1
    assert not set(held[0]) & set(_names(splits[0].train))
    assert "2 of the 6 training samples are held out" in caplog.text
    assert load_data(root / "train", labels=NAMES, eval_fraction=0).validation is None


def test_choice_of_splits(root):
    write_pictures(root / "test", ["t"])
    assert len(load_data(root).validation) == 2
    assert _names(load_data(root, eval_split="test").validation) == ["test/images/t.png"]
    only = load_data(root, train_split=None)
    assert only.train is None and len(only.validation) == 2
    shutil.rmtree(root / "val")
    assert _names(load_data(root).validation) != ["test/images/t.png"]  # a test set is used only if named
    with pytest.raises(
        ValueError, match=r"no split 'tets' \(did you mean 'test'\?\); name one of \['test', 'train'\]"
    ):
        load_data(root, eval_split="tets")
    with pytest.raises(ValueError, match="no validation split"):
        load_data(root, train_split=None)
    with pytest.raises(ValueError, match="has no splits"):
        load_data(root / "train", labels=NAMES, eval_split="val")
    with pytest.raises(ValueError, match="eval_fraction is 1"):
        load_data(root, eval_fraction=1)


def test_a_split_that_is_not_asked_for_may_be_incomplete(root):
    (root / "test/images").mkdir(parents=True)
    assert len(load_data(root).train) == 6
    with pytest.raises(ValueError, match="test/images needs its label maps in test/labels"):
        load_data(root, eval_split="test")


def test_l6_files_without_partner_are_listed_both_ways(root):
    for i in range(12):
        Image.new("RGB", (12, 9)).save(root / f"train/images/new{i:02}.jpg")
    Image.new("L", (12, 9)).save(root / "train/labels/new00_mask.png")
    with pytest.raises(ValueError) as caught:
        load_data(root)
    text = str(caught.value)
    assert "12 of 18 files in train/images have no label of the same stem in train/labels" in text
    assert "(first: new00.jpg [near: new00_mask.png], new01.jpg" in text
    assert "new09.jpg" in text and "new10.jpg" not in text
    assert "1 of 7 files in train/labels have no image of the same stem in train/images" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: shutil.copy(r / "train/images/000.png", r / "train/images/000.JPG"), "two files of one stem"),
        (lambda r: (r / "train/labels").rename(r / "train/lables"), r"did you mean 'lables'\?.*accepted are <split>"),
        (lambda r: shutil.copytree(r / "train/labels", r / "train/masks"), "train holds both labels and masks"),
        (lambda r: [p.unlink() for p in (r / "train/images").iterdir()], "train/images holds nothing, but files"),
        (lambda r: [p.rename(p.with_suffix(".npy")) for p in (r / "val/labels").iterdir()], "only a.npy, b.npy, but"),
        (lambda r: (r / "labels.txt").unlink(), "does not say what its classes are called. Give --labels"),
        (lambda r: (r / "train").rename(r / "trian"), r"no split 'train' \(did you mean 'trian'\?\)"),
        (lambda r: [(r / s / "images").rename(r / s / "image") for s in ("train", "val")], "no data set in a known"),
    ],
)
def test_l6_mistakes_in_folders(root, spoil, message):
    spoil(root)
    with pytest.raises(ValueError, match=message):
        load_data(root)


def test_missing_path_suggests_the_near_folder(root):
    for missing in (root.parent / "steet", str(root.parent / "steet")):
        with pytest.raises(FileNotFoundError, match=r"did you mean 'street'\?"):
            load_data(missing)
    with pytest.raises(FileNotFoundError, match="There is no folder steet"):
        load_data(Path("steet"))
    with pytest.raises(ValueError, match=r"labels.txt is a file, but a folder, a .parquet file"):
        load_data(root / "labels.txt")


def _table(count=4, **names):
    columns = {names.get("image", "image"): [], names.get("label", "label"): []}
    for i in range(count):
        image, label = Image.new("RGB", (8, 6), (i, 0, 0)), Image.new("L", (8, 6), i % 3)
        for column, value in zip(columns, (image, label), strict=True):
            columns[column].append(value)
    features = datasets.Features({name: datasets.Image() for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def _check_table(samples, count):
    assert len(samples) == count
    for i in range(count):
        assert np.asarray(samples.image(i))[0, 0].tolist() == [i, 0, 0]
        assert (samples.label(i) == i % 3).all() and samples.label(i).shape == (6, 8)


def test_table_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pair = datasets.DatasetDict({"train": _table(5), "validation": _table(2)})
    pair.save_to_disk(tmp_path / "disk")
    for folder in ("parquet", "hub/data"):
        (tmp_path / folder).mkdir(parents=True)
    pair["train"].to_parquet(tmp_path / "parquet/train.parquet")
    pair["validation"].to_parquet(tmp_path / "parquet/validation.parquet")
    pair["train"].to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    pair["validation"].to_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet")
    (tmp_path / "hub/meta.json").write_text(json.dumps({"classes": NAMES, "ignore_index": 9}))
    for data, source in [
        (pair, "data set"),
        (tmp_path / "disk", "disk"),
        (tmp_path / "parquet", "parquet"),
        (str(tmp_path / "hub"), "hub"),
    ]:
        found = load_data(data, labels=None if source == "hub" else NAMES)
        _check_table(found.train, 5)
        _check_table(found.validation, 2)
        assert found.source == source and found.classes.names == NAMES
        assert found.classes.ignore_index == (9 if source == "hub" else 255)
    single = load_data(tmp_path / "parquet/train.parquet", labels=NAMES, train_split=None)
    _check_table(single.validation, 5)
    whole = load_data(_table(5), labels=NAMES)
    assert (len(whole.train), len(whole.validation)) == (4, 1)


def test_cells_of_bytes_and_paths(tmp_path):
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "a.png")
    Image.new("L", (8, 6), 2).save(tmp_path / "b.png")
    table = datasets.Dataset.from_dict(
        {"pic": [str(tmp_path / "a.png"), None], "map": [(tmp_path / "b.png").read_bytes(), b"nothing"]}
    )
    samples = load_data(table, labels=NAMES, image_column="pic", label_column="map", eval_fraction=0).train
    assert np.asarray(samples.image(0))[0, 0].tolist() == [1, 2, 3] and (samples.label(0) == 2).all()
    with pytest.raises(ValueError, match=r"row 1 \(pic\) is empty, but a picture is needed"):
        samples.image(1)
    with pytest.raises(ValueError, match=r"row 1 \(map\) cannot be read: it is no picture"):
        samples.label(1)


def test_columns_are_guessed_or_listed():
    _check_table(load_data(_table(3, image="img", label="mask"), labels=NAMES, eval_fraction=0).train, 3)
    with pytest.raises(
        ValueError, match=r"--label_column: none of pictures is called 'label' or alike among image \(Image\), odd"
    ):
        load_data(_table(3, label="odd"), labels=NAMES)
    with pytest.raises(ValueError, match=r"--image_column is 'imge' \(did you mean 'image'\?\)"):
        load_data(_table(3), labels=NAMES, image_column="imge")
    with pytest.raises(ValueError, match="does not say what its classes are called"):
        load_data(_table(3))
    with pytest.raises(ValueError, match="The data is a list"):
        load_data([1, 2], labels=NAMES)


def test_class_names_of_a_feature_are_used():
    table = _table(2).add_column("labels", [0, 1]).cast_column("labels", datasets.ClassLabel(names=["day", "night"]))
    assert load_data(table, eval_fraction=0).classes.names == ("day", "night")


def test_broken_parquet_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"train.parquet cannot be read as a table"):
        load_data(tmp_path / "train.parquet", labels=NAMES)


def test_hub_name_that_cannot_be_reached_or_found(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def unreachable(self, name, timeout):
        assert timeout <= 10
        raise OSError("Name or service not known")

    def unknown(self, name, timeout):
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        error.response, error.server_message = SimpleNamespace(status_code=404), None
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(ConnectionError, match=r"'some/thing' is no folder here.*could not be loaded.*Check the path"):
        load_data("some/thing", labels=NAMES)
    monkeypatch.setattr(HfApi, "dataset_info", unknown)
    with pytest.raises(FileNotFoundError, match="no folder thing here, and no data set of that name"):
        load_data("thing", labels=NAMES)


def test_hub_name_is_loaded(monkeypatch):
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": _table(3)}))
    found = load_data("me/street", labels=NAMES, eval_fraction=0)
    _check_table(found.train, 3)
    assert found.source == "me/street"


class _Draws:
    """A transform that writes its random draws into the image."""

    def __call__(self, image, mask):
        image = image.clone()
        image[:, 0, :4] = torch.randint(256, (4,)).to(torch.uint8)
        return image, mask


def test_n6_draws_depend_on_seed_epoch_and_index_alone(root):
    samples = load_data(root).train

    def draw(seed, epoch, workers=0, order=range(6)):
        dataset = TrainingDataset(samples, _Draws(), _processor, seed)
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, sampler=list(order), num_workers=workers, batch_size=None)
        rows = {i: item["pixel_values"] for i, item in zip(order, loader, strict=True)}
        return torch.stack([rows[i] for i in range(6)])

    torch.manual_seed(0)
    first = draw(3, 1)
    torch.manual_seed(99)
    assert torch.equal(first, draw(3, 1, order=[5, 3, 1, 0, 2, 4]))
    assert torch.equal(first, draw(3, 1, workers=2))
    assert not torch.equal(first, draw(3, 2)) and not torch.equal(first, draw(4, 1))
    assert len({tuple(row[1, 0, :4].tolist()) for row in first}) == 6


def test_reading_leaves_the_global_generator_alone(root):
    dataset = TrainingDataset(load_data(root).train, _Draws(), _processor, 0)
    before = torch.get_rng_state()
    dataset[0]
    assert torch.equal(before, torch.get_rng_state())


def test_persistent_workers_see_the_epoch(root):
    dataset = TrainingDataset(load_data(root).train, _Draws(), _processor, 0)
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True, batch_size=6)
    seen = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        seen.append(next(iter(loader))["pixel_values"])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_training_item(root):
    transform = training_transform((5, 7))
    item = TrainingDataset(load_data(root).train, transform, _processor, 0)[0]
    assert item["pixel_values"].shape == (3, 5, 7) and item["pixel_values"].dtype == torch.float32
    assert item["labels"].shape == (5, 7) and item["labels"].dtype == torch.int64


@pytest.mark.parametrize(("longest_edge", "size"), [(24, (18, 24)), (6, (4, 6)), (1, (1, 1))])
def test_longest_edge_scales_image_and_label(root, longest_edge, size):
    seen = []

    def transform(image, mask):
        seen.append((tuple(image.shape[1:]), tuple(mask.shape), mask.unique().tolist()))
        return image, mask

    dataset = TrainingDataset(load_data(root).train, transform, _processor, 0, longest_edge=longest_edge)
    item = dataset[1]
    assert seen[0][:2] == (size, size) and set(seen[0][2]) <= {1, 255}
    assert item["pixel_values"].shape[1:] == size
    with pytest.raises(ValueError, match="longest_edge is 0"):
        TrainingDataset(dataset.samples, transform, _processor, 0, longest_edge=0)


def test_evaluation_keeps_the_label_at_its_own_size(root):
    Image.new("RGB", (20, 14)).save(root / "val/images/b.png")
    Image.new("L", (20, 14), 2).save(root / "val/labels/b.png")
    dataset = EvaluationDataset(load_data(root).validation, _processor)
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate_evaluation)
    batch = next(iter(loader))
    assert list(batch) == ["index", "pixel_values", "labels"]
    assert batch["index"].tolist() == [0, 1]
    assert [tuple(p.shape) for p in batch["pixel_values"]] == [(3, 4, 6), (3, 7, 10)]
    assert [tuple(label.shape) for label in batch["labels"]] == [(9, 12), (14, 20)]
    assert batch["labels"][1].dtype == torch.int64 and (batch["labels"][1] == 2).all()


def test_with_the_image_processor(root):
    from hf_ctxseg.image_processing_ctxseg import CtxSegImageProcessor

    processor = CtxSegImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    data = load_data(root)
    item = TrainingDataset(data.train, lambda image, mask: (image, mask), processor, 0)[2]
    expected = (torch.tensor([2, 50, 90]) / 255 - 0.5) / 0.5
    assert torch.allclose(item["pixel_values"], expected.view(3, 1, 1).expand(3, 9, 12), atol=1e-6)
    assert item["labels"][0, 0] == 255 and (item["labels"].flatten()[1:] == 2).all()
    evaluated = EvaluationDataset(data.validation, processor)[1]
    assert evaluated["pixel_values"].shape == (3, 9, 12) and evaluated["labels"].shape == (9, 12)


def test_file_deleted_during_training_is_named(root):
    data = load_data(root)
    dataset = TrainingDataset(data.train, training_transform((5, 5)), _processor, 0)
    (root / "train/images/003.png").unlink()
    with pytest.raises(ValueError, match=r"train/images/003.png cannot be read: No such file"):
        dataset[3]


def test_table_ignores_the_format_of_the_dataset():
    _check_table(TableSamples(_table(2).with_format("numpy"), "image", "label"), 2)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs the CamVid copy in shared/data")
def test_camvid():
    data = load_data(CAMVID)
    assert (len(data.train), len(data.validation), data.source) == (367, 101, "camvid")
    assert data.classes.names[0] == "sky" and data.classes.palette[0] == (128, 128, 128)
    _, label = read_pair(data.validation, 5)
    assert label.dtype == np.uint8 and set(np.unique(label)) <= {*range(11), 255}
