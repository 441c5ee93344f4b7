import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from training_helpers import NAMES, flags, make_data, random_run, trained, weights
from transformers import AutoModelForSemanticSegmentation

from hf_ctxseg import CtxSegImageProcessor, DeepLabV2Config, DeepLabV2ForSemanticSegmentation
from hf_ctxseg.arguments import DataArguments, ModelArguments
from hf_ctxseg.cli import main
from hf_ctxseg.model_building import build_model
from hf_ctxseg.samples import ClassInfo
from hf_ctxseg.visualization import default_palette


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """Data folder, run folder and printed lines of one whole training."""
    return trained(tmp_path_factory.getbasetemp())


def _classes(names):
    return ClassInfo(tuple(names), tuple(default_palette(len(names))))


def _from(run, names, **arguments):
    told = []
    model, processor, origin = build_model(
        ModelArguments(model_name_or_path=str(run)), DataArguments(data="d", **arguments), _classes(names), told.append
    )
    assert origin == str(run)
    return model, processor, told


def _changed(run, model):
    saved, state = weights(run), model.state_dict()
    assert saved.keys() == state.keys()
    return {key for key in saved if saved[key].shape != state[key].shape or not torch.equal(saved[key], state[key])}


NEW = {f"{head}.{kind}" for head in ("classifier", "auxiliary_head.classifier") for kind in ("weight", "bias")}


@pytest.mark.parametrize("names", [("a", "b", "c", "d", "e"), ("disc", "ground", "box"), ("only", "two")])
def test_other_classes_get_new_classifiers_and_nothing_else(line, names):
    _, run, _ = line
    model, _, told = _from(run, names)
    assert _changed(run, model) == NEW
    assert len(told) == 1 and all(key in told[0] for key in NEW)
    assert model.config.id2label == dict(enumerate(names)) and model.config.num_labels == len(names)
    assert model.config.palette == [list(colour) for colour in default_palette(len(names))]
    for head in (model.classifier, model.auxiliary_head.classifier):
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.5) and not head.bias.any()


def test_every_branch_of_summed_classifiers_is_new(tiny, live, tmp_path):
    live(DeepLabV2ForSemanticSegmentation(tiny(DeepLabV2Config))).save_pretrained(tmp_path)
    CtxSegImageProcessor().save_pretrained(tmp_path)
    model, _, told = _from(tmp_path, ("a", "b", "c"))
    branches = {f"classifier.branches.{index}.{kind}" for index in range(4) for kind in ("weight", "bias")}
    assert _changed(tmp_path, model) == branches
    assert len(told) == 1 and all(key in told[0] for key in branches)
    assert all(branch.weight.std().item() == pytest.approx(0.01, rel=0.5) for branch in model.classifier.branches)


def test_same_classes_continue_from_all_weights(line):
    _, run, _ = line
    model, processor, told = _from(run, NAMES)
    assert _changed(run, model) == set() and told == []
    assert processor.do_resize is False


def test_picture_size_reaches_the_processor_of_a_checkpoint(line):
    _, processor, _ = _from(line[1], NAMES, image_size=24)
    assert processor(images=Image.new("RGB", (48, 36)), return_tensors="pt")["pixel_values"].shape == (1, 3, 18, 24)


def test_five_classes_are_trained_from_three(line, tmp_path, capsys):
    names = ("a", "b", "c", "d", "e")
    data = make_data(tmp_path / "data", names)
    arguments = flags(data=data, output_dir=tmp_path / "run", max_steps=1, backbone_weights=None, backbone=None)
    start = ["--config_overrides", "norm_momentum=0.2", "--model_name_or_path", str(line[1])]
    assert main(["train", *arguments, *start]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NEW)
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run").config.num_labels == 5
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["training"]["init_from"] == Path(line[1]).name and found["model"]["backbone"] == "test_resnet"
    assert found["evaluation"]["per_category_accuracy"]["e"] is None  # never occurs


def test_fields_that_change_the_shape_of_a_checkpoint_are_refused(line):
    arguments = ModelArguments(model_name_or_path=str(line[1]), config_overrides=["hidden_size=8"])
    with pytest.raises(ValueError, match=r"does not fit the model asked for: \d+ tensors of backbone or head differ"):
        build_model(arguments, DataArguments(), _classes(NAMES))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "vit"}, "holds a model of the type 'vit', but --model_name_or_path takes checkpoints of this"),
        ({"model_type": "no_such"}, "holds a model of the type 'no_such'"),
        ({}, "holds no finished model"),
        (None, "holds no finished model|There is no checkpoint"),
    ],
)
def test_checkpoint_that_is_not_ours_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        build_model(ModelArguments(model_name_or_path=str(tmp_path)), DataArguments(), _classes(NAMES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "preprocessor_config.json"])
def test_checkpoint_without_a_file_is_refused(tmp_path, missing):
    run = random_run(tmp_path / "run")
    (run / missing).unlink()
    with pytest.raises(
        ValueError, match=r"is no whole checkpoint .*: give a run folder with model\.safetensors"
    ) as caught:
        build_model(ModelArguments(model_name_or_path=str(run)), DataArguments(), _classes(NAMES))
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint_is_refused(tmp_path):
    run = random_run(tmp_path / "run")
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        build_model(ModelArguments(model_name_or_path=str(run)), DataArguments(), _classes(NAMES))


def test_backbone_weights_from_a_file_are_named_and_used(tmp_path):
    torch.manual_seed(3)
    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), tmp_path / "mine.safetensors")
    arguments = ModelArguments(backbone="test_resnet", backbone_weights=str(tmp_path / "mine.safetensors"))
    model, processor, origin = build_model(arguments, DataArguments(), _classes(NAMES))
    assert origin == "mine.safetensors"
    stem = next(
        value for key, value in model.state_dict().items() if key.endswith("backbone._backbone.conv1.0.weight")
    )
    assert torch.equal(stem, source.conv1[0].weight)
    assert list(processor.image_mean) == list(timm.get_pretrained_cfg("test_resnet").mean)


def test_a_preset_gives_head_and_backbone_and_the_other_arguments_come_on_top():
    arguments = ModelArguments(
        preset="deeplabv3-mobilenetv2",
        backbone_weights="none",
        output_stride=8,
        config_overrides=["hidden_size=8", "atrous_rates=[3]"],
    )
    model, processor, origin = build_model(arguments, DataArguments(data="d"), _classes(NAMES))
    config = model.config
    assert type(model).__name__ == "DeepLabV3ForSemanticSegmentation" and origin == "none"
    assert (config.backbone, config.output_stride, config.hidden_size) == ("mobilenetv2_100", 8, 8)
    assert config.atrous_rates == [3] and not config.use_auxiliary_head
    assert list(config.id2label.values()) == list(NAMES) and len(config.palette) == len(NAMES)
    assert list(processor.image_mean) == list(timm.get_pretrained_cfg("mobilenetv2_100").mean)


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no preset 'deeplabv3-resnet18': did you mean deeplabv3-resnet"):
        build_model(ModelArguments(preset="deeplabv3-resnet18"), DataArguments(data="d"), _classes(NAMES))
