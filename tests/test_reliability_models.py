"""Rows of the reliability sheet that concern every model; what one module settles alone is tested there, by its id."""

import copy
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from training_helpers import make_data, scene
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, PreTrainedConfig

from hf_ctxseg import MODELS, CtxSegImageProcessor
from hf_ctxseg.aspp import ImagePooling
from hf_ctxseg.augmentation import training_transform
from hf_ctxseg.data import TrainingDataset, load_data
from hf_ctxseg.registry import head_name


@pytest.fixture(scope="module", params=MODELS, ids=lambda classes: head_name(classes[0]))
def classes(request):
    return request.param


def scenes(numbers):
    pairs = [scene(number) for number in numbers]
    pixels = np.stack([np.asarray(picture) for picture, _ in pairs])
    labels = np.stack([np.asarray(label) for _, label in pairs])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(labels).long()


def train(model, steps, learning_rate=0.01):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate)
    pixels, labels = scenes(range(100, 140))
    for step in range(steps):
        chosen = torch.arange(4) + 4 * (step % 10)
        optimizer.zero_grad()
        model(pixels[chosen], labels[chosen]).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(classes, tiny):
    """A model that tells the shapes from the ground: its scores are as far apart as those of one in use."""
    torch.manual_seed(0)
    names = {field.name for field in fields(classes[0])}
    quick = {"atrous_rates": [1, 2], "pool_norm": "group"}  # four pooled values teach a batch norm little
    config = tiny(classes[0], backbone="test_resnet", output_stride=8, **{k: quick[k] for k in quick if k in names})
    return train(classes[2](config), 60)


def test_c1_misspelt_keys_of_every_head_are_refused_with_the_nearest(classes, tmp_path):
    config_class = classes[0]
    own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    for name in own:
        misspelt = name.replace("_", "", 1) if "_" in name else f"{name}s"
        with pytest.raises(ValueError, match=rf"no field '{misspelt}': did you mean {name}\?"):
            config_class(**{misspelt: 1})
    config_class().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"hidden_size"', '"hiden_size"'))
    with pytest.raises(ValueError, match=r"no field 'hiden_size': did you mean hidden_size\?"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def saved_files(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    MODELS[0][2](tiny(MODELS[0][0])).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(saved_files, tmp_path):
    """A copy to spoil."""
    for name, content in saved_files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:20] + bytes([content[20] ^ 0x40]) + content[21:],
        lambda content: content[:7] + b"\x40" + content[8:],
        lambda content: b"",
    ],
    ids=["half", "last byte", "flipped bit", "huge header", "empty"],
)
def test_c6_torn_weights_are_refused_by_name(saved, spoil):
    file = saved / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        with pytest.raises(ValueError, match=r"/model\.safetensors is not a whole safetensors file"):
            auto_class.from_pretrained(saved)


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_c6_weights_of_a_wrong_type_are_refused_by_name(saved, kind):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.startswith("classifier."))
    save_file({**tensors, key: tensors[key].to(kind)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"model\.safetensors holds weights that are no floating-point .*{key}"):
        AutoModelForSemanticSegmentation.from_pretrained(saved)
    save_file({name: value.half() for name, value in tensors.items()}, file, metadata={"format": "pt"})
    AutoModelForSemanticSegmentation.from_pretrained(saved)


def test_c8_missing_weights_of_the_network_are_refused_unless_it_is_trained(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    gone = [key for key in tensors if "backbone" in key][3]
    save_file({key: value for key, value in tensors.items() if key != gone}, file, metadata={"format": "pt"})
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        with pytest.raises(ValueError, match=r"lacks 1 tensors of backbone or head"):
            auto_class.from_pretrained(saved)
    _, info = AutoModelForSemanticSegmentation.from_pretrained(
        saved, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {gone}
    save_file({**tensors, "model.backbone.surplus": torch.ones(1)}, file, metadata={"format": "pt"})
    _, info = AutoModelForSemanticSegmentation.from_pretrained(saved, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"model.backbone.surplus"}  # of which transformers warns


@pytest.mark.parametrize("kind", ["../other", "absolute", "backslash", "pickle", "number"])
def test_c9_shards_that_are_no_safetensors_beside_the_index_are_refused(saved, kind):
    tensors = load_file(saved / "model.safetensors")
    other = saved / "other"
    other.mkdir()
    (saved / "model.safetensors").rename(other / "model.safetensors")
    torch.save(tensors, saved / "pytorch_model.bin")
    name = {
        "../other": f"../{saved.name}/other/model.safetensors",
        "absolute": str(other / "model.safetensors"),
        "backslash": "..\\other\\model.safetensors",
        "pickle": "pytorch_model.bin",
        "number": 3,
    }[kind]
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names the shard .*only safetensors files beside it"):
        AutoModelForSemanticSegmentation.from_pretrained(saved)
    for content in ("[1]", "{", '{"weight_map": 3}'):
        (saved / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ValueError, match="is no index of shards"):
            AutoModelForSemanticSegmentation.from_pretrained(saved)


def test_c9_shards_beside_the_index_open_and_torn_ones_do_not(saved):
    model = AutoModelForSemanticSegmentation.from_pretrained(saved)
    shards = saved / "shards"
    model.save_pretrained(shards, max_shard_size="20KB")
    files = sorted(shards.glob("model-*.safetensors"))
    opened = AutoModelForSemanticSegmentation.from_pretrained(shards).state_dict()
    assert len(files) > 1 and all(torch.equal(value, opened[key]) for key, value in model.state_dict().items())
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{files[1].name} is not a whole safetensors file"):
        AutoModelForSemanticSegmentation.from_pretrained(shards)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("atrous_rates", [6, -12], "a whole number from 1"),
        ("atrous_rates", [0], "a whole number from 1"),
        ("atrous_rates", ["6"], "a whole number from 1"),
        ("atrous_rates", 6, "a list such as"),
        ("atrous_rates", list(range(1, 66)), "at most 64"),
        ("classifier_dropout", 1.5, "a number from 0 to 1"),
        ("hidden_size", 0, "a whole number from 1"),
        ("hidden_size", "256", "a whole number from 1"),
    ],
)
def test_c2_values_outside_their_range_are_refused_by_every_head(classes, field, value, allowed):
    if not hasattr(classes[0](), field):
        allowed = "did you mean|it has"  # a head without that field
    with pytest.raises(ValueError, match=rf"{field}.*({allowed})"):
        classes[0](**{field: value})


def test_n1_batches_of_one_picture_train(classes, tiny, caplog):
    torch.manual_seed(0)
    model = classes[2](tiny(classes[0], use_auxiliary_head=True)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pooled = [f"{name}.norm" for name, module in model.named_modules() if isinstance(module, ImagePooling)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pixels, labels = scenes(range(3))
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            loss = model(pixels[index : index + 1], labels[index : index + 1]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert torch.isfinite(loss)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.isfinite(value).all() for value in after.values())
    for key in before:
        if key.endswith("running_mean"):
            assert torch.equal(after[key], before[key]) == (key.removesuffix(".running_mean") in pooled), key
    said = [record for record in caplog.records if "one value per channel" in record.message]
    assert len(said) == len(pooled) <= 1


def test_n4_half_precision_agrees_with_float32(trained):
    pixels, labels = scenes(range(8))
    halved = copy.deepcopy(trained).to(torch.bfloat16)

    def classes_of(output):
        return F.interpolate(output.logits.float(), labels.shape[1:], mode="bilinear").argmax(dim=1)

    with torch.inference_mode():
        exact, half = trained(pixels, labels), halved(pixels.bfloat16(), labels)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = trained(pixels, labels)
    mask, valid = classes_of(exact), labels != 255
    assert (mask == labels)[valid].float().mean() > (labels == 0)[valid].float().mean() + 0.05
    assert set(mask.unique().tolist()) == {0, 1, 2}
    for output in (half, mixed):
        assert output.loss.dtype == torch.float32
        assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
        assert (classes_of(output) == mask).float().mean() >= 0.995


def test_n5_same_seed_gives_the_same_weights_after_training(classes, tiny):
    def weights(seed):
        torch.manual_seed(seed)
        config = tiny(classes[0], backbone="test_resnet", classifier_dropout=0.3, use_auxiliary_head=True)
        return train(classes[2](config), 4).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_n6_batch_of_8_equals_one_by_one(trained):
    pixels, _ = scenes(range(8))
    with torch.inference_mode():
        single = torch.cat([trained(picture[None]).logits for picture in pixels])
        torch.testing.assert_close(trained(pixels).logits, single, rtol=0, atol=1e-5)


def test_n6_eight_threads_share_a_model(trained):
    pixels, _ = scenes(range(8))

    def logits(picture):
        with torch.inference_mode():
            return [trained(picture[None]).logits for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(logits, pixels))
    for picture, found in zip(pixels, threaded, strict=True):
        (expected, *_) = logits(picture)
        assert all(torch.equal(value, expected) for value in found)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this computer has cores
def test_n6_number_of_workers_changes_neither_order_nor_augmentations(tmp_path):
    samples = load_data(make_data(tmp_path / "data", train=9, val=1)).train
    processor = CtxSegImageProcessor()

    def batches(workers, epoch=1):
        dataset = TrainingDataset(samples, training_transform((33, 35)), processor, seed=5)
        dataset.set_epoch(epoch)
        order = torch.Generator().manual_seed(3)
        loader = DataLoader(dataset, batch_size=2, shuffle=True, num_workers=workers, generator=order)
        return [(batch["pixel_values"], batch["labels"]) for batch in loader]

    alone = batches(0)
    for workers in (2, 4):
        for found, expected in zip(batches(workers), alone, strict=True):
            assert all(map(torch.equal, found, expected))
    assert not any(torch.equal(pixels, other) for (pixels, _), (other, _) in zip(batches(0, 2), alone, strict=True))
