"""Every contract for every registered model."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    pipeline,
)

from hf_ctxseg import MODELS, CtxSegImageProcessor
from hf_ctxseg.registry import find_head, head_name

FIXTURES = Path(__file__).parent / "fixtures"
ODD_SIZES = [(45, 61), (33, 70), (1, 1), (2, 50)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda classes: head_name(classes[0]))
def classes(request):
    return request.param


@pytest.fixture(scope="module")
def model(classes, tiny, live):
    torch.manual_seed(0)
    names = {0: "ground", 1: "disc", 2: "box"}
    return live(classes[2](tiny(classes[0], id2label=names, use_auxiliary_head=True)))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    CtxSegImageProcessor.for_backbone(model.config.backbone).save_pretrained(path)
    return path


def picture(size, seed=0):
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size[::-1])
    return Image.fromarray((np.asarray(blobs) * 0.8 + rng.integers(0, 50, (*size, 3))).astype(np.uint8))


def equal_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return list(first) == list(second) and all(map(torch.equal, first.values(), second.values()))


def clean(info):
    return not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])


def test_auto_classes_find_ours(classes, folder):
    assert type(AutoConfig.from_pretrained(folder)) is classes[0]
    assert type(AutoModel.from_pretrained(folder)) is classes[1]
    assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is classes[2]
    assert type(AutoImageProcessor.from_pretrained(folder)) is CtxSegImageProcessor


@pytest.mark.parametrize("size", ODD_SIZES)
def test_saved_model_gives_the_same_bits(model, folder, size):
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert clean(info)
    assert equal_weights(loaded, model)
    assert not loaded.training
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        logits = model(x).logits
        assert torch.equal(loaded(x).logits, logits)
    assert torch.isfinite(logits).all()
    stride = model.config.low_level_reduction or model.config.output_stride
    assert logits.shape == (2, 3, -(-size[0] // stride), -(-size[1] // stride))


def test_automodel_gives_the_features_of_the_segmentation_model(model, folder):
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert clean(info)
    x = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        ours, theirs = loaded(x, output_hidden_states=True), model.model(x, output_hidden_states=True)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert len(ours.hidden_states) == len(loaded.backbone.channels)
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))


def test_a_base_model_opens_as_a_segmentation_model_with_a_new_classifier(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"] == set()
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"classifier", "auxiliary_head"}
    assert equal_weights(loaded.model, model.model)
    # Built without memory, the new parts must not hold what happened to lie there.
    for name, value in [*loaded.classifier.named_parameters(), *loaded.auxiliary_head.classifier.named_parameters()]:
        assert not value.any() if name.endswith("bias") else 0.005 < value.std() < 0.02
    norm = loaded.auxiliary_head.conv.norm
    assert norm.weight.eq(1).all() and norm.running_var.eq(1).all()
    assert not (norm.bias.any() or norm.running_mean.any() or norm.num_batches_tracked.any())
    kernel = loaded.auxiliary_head.conv.conv.weight
    assert kernel.std().item() == pytest.approx((2 / (kernel.shape[0] * 9)) ** 0.5, rel=0.1)


def test_same_seed_gives_the_same_weights(classes, tiny):
    config = tiny(classes[0], use_auxiliary_head=True)
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(AutoModelForSemanticSegmentation.from_config(config))
    assert all(torch.isfinite(value).all() for value in models[0].state_dict().values())
    assert equal_weights(*models[:2])
    assert not equal_weights(*models[1:])


def test_pipeline_gives_the_masks_of_the_image_processor(classes, folder):
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        segmenter = pipeline("image-segmentation", model=str(folder))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [message for message in messages if "not supported" in message]
    assert type(segmenter.model) is classes[2]
    assert type(segmenter.image_processor) is CtxSegImageProcessor
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    for size in ODD_SIZES:
        image = picture(size)
        with torch.inference_mode():
            outputs = model(**processor(image, return_tensors="pt"))
        (mask,) = processor.post_process_semantic_segmentation(outputs, [size])
        found = segmenter(image)
        assert [item["label"] for item in found] == [model.config.id2label[index] for index in mask.unique().tolist()]
        assert len(found) > 1 or min(size) < 33
        joined = np.full(size, 255)
        for item in found:
            assert item["mask"].size == image.size
            joined[np.asarray(item["mask"]) == 255] = model.config.label2id[item["label"]]
        assert np.array_equal(joined, mask.numpy())


def test_stride_given_to_from_pretrained_is_the_real_one(model, folder):
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_stride=8, output_loading_info=True)
    assert clean(info)
    assert equal_weights(loaded, model)
    assert loaded.config.output_stride == loaded.backbone.reductions[-1] == 8
    with torch.inference_mode():
        features = loaded(torch.rand(1, 3, 64, 48), output_hidden_states=True).hidden_states
    assert features[-1].shape[-2:] == (8, 6)
    assert AutoModel.from_pretrained(folder, output_stride=32).backbone.reductions[-1] == 32


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"output_stride": 12}, "cannot reach output_stride 12"),
        ({"output_stride": 0}, "output_stride is 0"),
        ({"classifier_dropout": 2}, "classifier_dropout is 2"),
        ({"backbone": "test_efficientne"}, "no backbone 'test_efficientne'"),
    ],
)
def test_bad_values_given_to_from_pretrained_are_refused(folder, given, text):
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        with pytest.raises(ValueError, match=text):
            auto_class.from_pretrained(folder, **given)


def test_c5_other_classes_are_refused_unless_asked_for(model, folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSemanticSegmentation.from_pretrained(folder, num_labels=11)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(
        folder, num_labels=11, ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = {key for key, *_ in info["mismatched_keys"]}
    last = {"auxiliary_head.classifier.weight", "auxiliary_head.classifier.bias"}
    assert new - last == {key for key in loaded.state_dict() if key.startswith("classifier")}
    assert last <= new and not info["missing_keys"] and not info["unexpected_keys"]
    before = model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items() if key not in new)
    assert loaded(torch.rand(1, 3, 33, 33)).logits.shape[1] == loaded.config.num_labels == 11


def test_tuple_and_dictionary_are_the_same(model):
    x, labels = torch.rand(2, 3, 45, 61), torch.randint(0, 3, (2, 45, 61))
    for part, arguments in ((model, {"labels": labels}), (model, {}), (model.model, {})):
        for hidden in (False, True):
            with torch.inference_mode():
                output = part(x, output_hidden_states=hidden, **arguments)
                values = part(x, output_hidden_states=hidden, return_dict=False, **arguments)
            assert isinstance(values, tuple)
            assert len(values) == len(output) == 1 + bool(arguments) + hidden
            for value, expected in zip(values, output.values(), strict=True):
                if isinstance(value, tuple):
                    assert all(map(torch.equal, value, expected))
                else:
                    assert torch.equal(value, expected)


def test_hidden_states_may_be_asked_for_by_the_config(folder):
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder, output_hidden_states=True)
    assert loaded(torch.rand(1, 3, 33, 33)).hidden_states is not None


def test_n6_batch_equals_one_by_one(model):
    x = torch.randn(4, 3, 45, 61)
    with torch.inference_mode():
        single = torch.cat([model(item[None]).logits for item in x])
        torch.testing.assert_close(model(x).logits, single, rtol=0, atol=1e-5)


def test_evaluation_is_deterministic_and_leaves_the_model(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        assert torch.equal(model(x).logits, model(x).logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dropout_acts_in_training_only(classes, tiny):
    model = classes[2](tiny(classes[0], classifier_dropout=0.5)).train()
    for parameter in model.classifier.parameters():
        parameter.data.fill_(1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.randn(2, 3, 45, 61)
    assert not torch.equal(model(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)


def test_weights_are_written_as_safetensors(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"].startswith("ctxseg_")


def test_trainer_is_told_that_the_loss_is_a_mean(classes):
    # Trainer would otherwise divide it a second time when it accumulates gradients.
    assert classes[2].accepts_loss_kwargs is False


def test_half_precision_loads(model, folder):
    x = torch.randn(1, 3, 65, 65)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    with torch.inference_mode():
        logits, exact = loaded(x.bfloat16()).logits, model(x).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_n7_export_with_dynamic_sizes(model):
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 3, 65, 97),), dynamic_shapes={"pixel_values": sizes})
        for shape in ((2, 3, 65, 97), (3, 3, 97, 33)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported.module()(x)["logits"], model(x).logits, rtol=1e-4, atol=1e-4)


def stored_input():
    rows, columns = np.mgrid[:77, :109]
    planes = [np.sin(columns / (5 + c)) + np.cos(rows / (3 + 2 * c)) for c in range(3)]
    return torch.from_numpy(np.stack(planes).astype(np.float32))[None]


@pytest.mark.parametrize(
    "saved", sorted(path.parent for path in FIXTURES.glob("*/config.json")), ids=lambda path: path.name
)
def test_c10_a_model_saved_by_an_older_version_opens_with_the_same_output(saved):
    # Written once, when the model was first published; its files stay as they are.
    model, info = AutoModelForSemanticSegmentation.from_pretrained(
        saved, dtype=torch.float32, output_loading_info=True
    )
    assert clean(info)
    config_class, _, segmentation_class = find_head(saved.name.split("_")[0])
    assert type(model) is segmentation_class
    assert type(model.config) is config_class
    assert model.config.id2label == {0: "ground", 1: "disc", 2: "box"}
    with np.load(saved / "expected.npz") as expected, torch.inference_mode():
        output = model(stored_input(), output_hidden_states=True)
        np.testing.assert_allclose(output.logits.numpy(), expected["logits"], atol=1e-4)
        auxiliary_logits = model.auxiliary_head(output.hidden_states[-2])
        np.testing.assert_allclose(auxiliary_logits.numpy(), expected["auxiliary_logits"], atol=1e-4)
    assert tuple(AutoImageProcessor.from_pretrained(saved).image_mean) == (0.485, 0.456, 0.406)


def test_c10_every_head_has_a_saved_model(classes):
    assert list(FIXTURES.glob(f"{head_name(classes[0])}_*"))
