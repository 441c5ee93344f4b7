"""Streams: every sample once a pass over processes and workers, and the same pictures after a resumption."""

import shutil
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from PIL import Image
from torchvision import tv_tensors
from training_helpers import NAMES, as_arguments, same_weights, scene
from transformers import TrainingArguments

import hf_ctxseg
from hf_ctxseg.augmentation import training_transform
from hf_ctxseg.data import CropMaker, load_data
from hf_ctxseg.image_processing_ctxseg import CtxSegImageProcessor
from hf_ctxseg.streaming import SCANNED, StreamedSamples, TrainingStream, rows_of, stream_loader

ROWS, SHARDS = 13, 3


def _write(root, count=ROWS, shards=SHARDS, val=2):
    """Shards of parquet; a row's number is the red of its picture's first pixel."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    root.mkdir(parents=True)
    for split, total, parts in (("train", count, shards), ("validation", val, 1)):
        rows = []
        for number in range(total):
            picture, mask = scene(number, (40, 36))
            picture.putpixel((0, 0), (number, 0, 0))
            rows.append({"image": picture, "label": mask})
        for part in range(parts):
            table = datasets.Dataset.from_list(rows[part::parts], features=features)
            table.to_parquet(root / f"{split}-{part:05}-of-{parts:05}.parquet")
    (root / "labels.txt").write_text("\n".join(NAMES))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path):
    return load_data(_write(tmp_path / "data"), streaming=True)


def _as_they_are(image, mask):
    return tv_tensors.Image(image[:, :33, :33]), tv_tensors.Mask(mask[:33, :33])


def _stream(data, transform=_as_they_are, **settings):
    processor = CtxSegImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    crops = CropMaker(transform, processor)
    settings = {"seed": 0, "buffer": 4, "batch_size": 2} | settings
    return TrainingStream(data.train, data.classes, crops, **settings)


def _loader(stream, tmp_path, workers):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=workers, dataloader_pin_memory=False
    )

    def collate(batch):
        return {key: torch.stack([item[key] for item in batch]) for key in batch[0] if key != "name"}

    return stream_loader(stream, arguments, collate, torch.device("cpu"))


def _numbers(batch):
    return (batch["pixel_values"][:, 0, 0, 0] * 255).round().int().tolist()


def _row_number(row):
    return int(np.asarray(_open(row["image"]))[0, 0, 0])


def _open(cell):
    import io

    return Image.open(io.BytesIO(cell["bytes"]))


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6])
def test_a_pass_gives_each_sample_to_one_lane(data, lanes):
    stream = _stream(data)
    orders = []
    for cycle in range(2):
        dealt = [[_row_number(row) for row in stream._rows(cycle, lane, lanes)] for lane in range(lanes)]
        assert sorted(number for lane in dealt for number in lane) == list(range(ROWS))
        assert all(dealt)
        orders.append(dealt)
    assert orders[0] != orders[1]
    assert orders[0] == [[_row_number(row) for row in stream._rows(0, lane, lanes)] for lane in range(lanes)]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_share_the_stream(data, tmp_path, workers):
    seen = []
    for rank in range(2):
        loader = _loader(_stream(data, rank=rank, world_size=2, batch_size=1), tmp_path, workers)
        # Every lane holds at least 3 of the 13 samples in its first pass
        seen += [_numbers(batch)[0] for batch in islice(iter(loader), 6)]
    assert len(set(seen)) == len(seen) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_same_crops(data, tmp_path, workers):
    transform = training_transform((33, 33))
    whole = list(islice(iter(_loader(_stream(data, transform), tmp_path, workers)), 16))
    assert len({batch["pixel_values"].sum().item() for batch in whole}) == 16
    for seen in (1, 5, 12):  # 13 samples a pass: 12 batches are nearly two
        stream = _stream(data, transform)
        stream.skip_batches(seen)
        rest = iter(skip_first_batches(_loader(stream, tmp_path, workers), seen))
        for expected in whole[seen : seen + 3]:
            batch = next(rest)
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
            assert torch.equal(batch["labels"], expected["labels"])


def test_rows_that_were_seen_are_not_decoded(data, tmp_path, monkeypatch):
    decoded = []
    original = StreamedSamples.image
    monkeypatch.setattr(StreamedSamples, "image", lambda *a: decoded.append(a) or original(*a))
    stream = _stream(data)
    stream.skip_batches(4)
    next(iter(skip_first_batches(_loader(stream, tmp_path, 0), 4)))
    assert len(decoded) <= 4  # the batch asked for, and the one that accelerate reads ahead


def test_seed_decides_the_order(data):
    orders = [[_row_number(row) for row in _stream(data, seed=seed)._rows(0, 0, 1)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_head_and_validation_can_be_asked_by_number(data):
    head = data.seen
    assert len(head) == ROWS < SCANNED and data.is_streamed
    assert [np.asarray(head.image(i))[0, 0, 0] for i in range(3)] == [
        _row_number(row) for row in islice(rows_of(data.train.table), 3)
    ]
    assert head.label(0).shape == (36, 40) and head.name(2) == "row 2 (image)"
    assert len(data.validation) == 2 and data.validation_name == "validation"


def test_broken_samples_are_named_by_their_file(data):
    path, bad = "street_7.png", Image.new("L", (40, 36), 7)
    samples = data.train
    row = dict(next(rows_of(samples.table)))
    stream = _stream(data)
    row["label"] = {"bytes": _png(bad), "path": path}
    with pytest.raises(ValueError, match=r"street_7.png \(label\) holds 7 \(1440 pixels\), but the classes are 0-2"):
        stream._draw(row, "key", "sample 0 of lane 0")
    row["label"] = {"bytes": _png(Image.new("L", (9, 9))), "path": None}
    with pytest.raises(
        ValueError, match=r"sample 0 of lane 0 \(label\) is 9x9 pixels, but sample 0 of lane 0 \(image"
    ):
        stream._draw(row, "key", "sample 0 of lane 0")
    row["image"] = {"bytes": b"nothing", "path": "street_8.jpg"}
    with pytest.raises(ValueError, match=r"street_8.jpg \(image\) cannot be read"):
        stream._draw(row, "key", "sample 0 of lane 0")


def _png(image):
    import io

    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def test_more_lanes_than_samples_are_refused(tmp_path):
    data = load_data(_write(tmp_path / "few", count=1, shards=1), streaming=True)
    with pytest.raises(ValueError, match=r"no sample for worker 2 of 2.*lower --dataloader_num_workers"):
        next(iter(_stream(data, rank=1, world_size=2)))
    with pytest.raises(ValueError, match="buffer holds 0 rows"):
        _stream(data, buffer=0)


def test_what_cannot_be_streamed_is_refused(tmp_path):
    root = _write(tmp_path / "data")
    (root / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="none can be held out of a stream"):
        load_data(root, streaming=True)
    assert load_data(root, streaming=True, eval_fraction=0).validation is None
    table = datasets.Dataset.from_dict({"image": [], "label": []})
    with pytest.raises(ValueError, match="split to score is a stream"):
        load_data(
            dict.fromkeys(("train", "val"), load_data(root, streaming=True, eval_fraction=0).train.table), labels="a"
        )
    table.save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match="save_to_disk, which needs no loading"):
        load_data(tmp_path / "disk", labels="a", streaming=True)
    (tmp_path / "files" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="folder of files, which are read one by one anyway"):
        load_data(tmp_path / "files", labels="a", streaming=True)


@pytest.mark.slow
def test_a_run_on_a_stream_resumes_bit_for_bit(tmp_path, capsys):
    root = _write(tmp_path / "data")
    settings = as_arguments(
        data=str(root),
        streaming=True,
        shuffle_buffer=4,
        max_steps=6,
        save_steps=4,
        save_total_limit=2,
    ) | {"dataloader_num_workers": 2, "learning_rate": 0.01}
    result = hf_ctxseg.train(**settings, output_dir=str(tmp_path / "a"))
    assert f"the first {ROWS} samples were looked at" in capsys.readouterr().out
    assert result.metrics["data"]["train_images"] is None and result.metrics["data"]["eval_images"] == 2
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")
    shutil.copy(tmp_path / "a" / "args.yaml", tmp_path / "b" / "args.yaml")
    hf_ctxseg.train(**settings | {"output_dir": str(tmp_path / "b"), "resume": True})
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_stream_needs_a_number_of_steps(tmp_path):
    settings = as_arguments(data=str(_write(tmp_path / "data")), streaming=True, max_steps=None, num_train_epochs=2)
    with pytest.raises(ValueError, match="give --max_steps"):
        hf_ctxseg.train(**settings, output_dir=str(tmp_path / "run"))
