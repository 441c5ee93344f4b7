"""Decoded pictures in shared memory: the same pixels, within the budget, seen by workers."""

import pytest
import torch
from torch.utils.data import DataLoader
from training_helpers import NAMES, make_data

from hf_ctxseg import picture_cache
from hf_ctxseg.augmentation import training_transform
from hf_ctxseg.data import TrainingDataset, load_data
from hf_ctxseg.image_processing_ctxseg import CtxSegImageProcessor
from hf_ctxseg.picture_cache import PictureCache


def _pictures(sizes, dtype=torch.uint8):
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for number, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8).permute(2, 0, 1)
        image = image.contiguous() if number % 2 else image
        pairs.append((image, torch.randint(0, 9, (height, width), generator=draw).to(dtype)))
    return pairs


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_pixels_and_strides_are_kept(dtype, monkeypatch):
    monkeypatch.setattr(picture_cache, "CHUNK", 2000)
    pairs = _pictures([(5, 7), (20, 30), (1, 9), (33, 1), (40, 40), (3, 3)], dtype)
    cache = PictureCache(len(pairs), pairs.__getitem__, 1 << 20)
    assert len(cache) == len(pairs)
    for index, pair in enumerate(pairs):
        found = cache.get(index)
        for one, other in zip(found, pair, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
            assert one.is_contiguous() == other.is_contiguous()
        found[0].zero_()
        assert torch.equal(cache.get(index)[0], pair[0])


@pytest.mark.parametrize("budget", [0, 100, 4 * 35, 1000, 5000])
def test_budget_is_not_exceeded(budget, monkeypatch):
    monkeypatch.setattr(picture_cache, "CHUNK", 400)
    pairs = _pictures([(5, 7)] * 10)
    cache = PictureCache(10, pairs.__getitem__, budget)
    assert cache.allocated == sum(chunk.numel() for chunk in cache._chunks) <= budget
    # 105 + 35 bytes, filled up to 112 + 40: two in a block of 400
    assert len(cache) == min(10, budget // 400 * 2 + budget % 400 // 152)
    for index in range(10):
        found = cache.get(index)
        assert (found is not None) == (index < len(cache))


def test_too_little_shared_memory_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(picture_cache, "_SHARED", tmp_path)
    monkeypatch.setattr(picture_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="lower --cache_gib"):
        PictureCache(1, _pictures([(5, 7)]).__getitem__, 1000)


@pytest.mark.parametrize("longest_edge", [None, 40])
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_the_same_with_and_without(tmp_path, longest_edge, workers):
    samples = load_data(make_data(tmp_path / "data"), labels=NAMES).train
    processor = CtxSegImageProcessor.for_backbone("test_resnet")
    transform = training_transform((33, 33))
    found = []
    for budget in (0, 30_000, 1 << 24):  # none, some, all
        dataset = TrainingDataset(samples, transform, processor, 3, longest_edge, budget)
        dataset.set_epoch(1)
        if budget:
            assert 0 < len(dataset.cache) <= len(samples) and (len(dataset.cache) < len(samples)) == (budget == 30_000)
        batches = DataLoader(dataset, batch_size=4, num_workers=workers)
        found.append([batch["pixel_values"] for batch in batches] + [batch["labels"] for batch in batches])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_nothing_is_read_again(tmp_path):
    root = make_data(tmp_path / "data")
    samples = load_data(root, labels=NAMES).train
    dataset = TrainingDataset(
        samples, training_transform((33, 33)), CtxSegImageProcessor.for_backbone("test_resnet"), 0, None, 1 << 24
    )
    for path in (root / "train" / "images").iterdir():
        path.unlink()
    assert dataset[0]["pixel_values"].shape == (3, 33, 33)
