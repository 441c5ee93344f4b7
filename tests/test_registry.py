import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from training_helpers import NAMES, flags, make_data
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    pipeline,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

import hf_ctxseg
from hf_ctxseg import MODELS, CtxSegConfig, CtxSegForSemanticSegmentation, CtxSegImageProcessor, CtxSegModel
from hf_ctxseg.cli import main
from hf_ctxseg.layers import ConvNormAct, resize_like
from hf_ctxseg.modeling_ctxseg import ContextHead
from hf_ctxseg.registry import find_head, head_name


# What a user writes for a head of their own (Zhao et al., arXiv 1612.01105): a config, a head, two model classes.
class PSPConfig(CtxSegConfig):
    model_type = "ctxseg_psp"

    bin_sizes: list[int] | tuple[int, ...] = (1, 2, 3, 6)


class PSPHead(ContextHead):
    def __init__(self, config, channels, reductions):
        super().__init__(config, out_channels=config.hidden_size)
        width = channels[-1] // len(config.bin_sizes)
        self.branches = nn.ModuleList(ConvNormAct(channels[-1], width) for _ in config.bin_sizes)
        joined = channels[-1] + width * len(config.bin_sizes)
        self.projection = ConvNormAct(joined, config.hidden_size, kernel_size=3)

    def forward(self, features):
        deepest = features[-1]
        maps = [deepest]
        for size, branch in zip(self.config.bin_sizes, self.branches, strict=True):
            maps.append(resize_like(branch(F.adaptive_avg_pool2d(deepest, size)), deepest.shape[-2:]))
        return self.projection(torch.cat(maps, dim=1))


class PSPModel(CtxSegModel):
    config_class = PSPConfig
    head_class = PSPHead


class PSPForSemanticSegmentation(CtxSegForSemanticSegmentation):
    config_class = PSPConfig
    model_class = PSPModel


@pytest.fixture
def psp():
    hf_ctxseg.register(PSPConfig, PSPModel, PSPForSemanticSegmentation)
    yield (PSPConfig, PSPModel, PSPForSemanticSegmentation)
    MODELS.remove((PSPConfig, PSPModel, PSPForSemanticSegmentation))
    CONFIG_MAPPING._extra_content.pop("ctxseg_psp")
    for mapping in (
        AutoModel._model_mapping,
        AutoModelForSemanticSegmentation._model_mapping,
        IMAGE_PROCESSOR_MAPPING,
    ):
        mapping._extra_content.pop(PSPConfig)
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.pop("ctxseg_psp")


def test_registered_models_belong_together():
    assert "deeplabv3" in [head_name(classes[0]) for classes in MODELS]
    for config_class, model_class, segmentation_class in MODELS:
        assert config_class.model_type == f"ctxseg_{head_name(config_class)}"
        assert issubclass(config_class, CtxSegConfig)
        assert model_class.config_class is segmentation_class.config_class is config_class
        assert segmentation_class.model_class is model_class
        assert find_head(head_name(config_class)) == (config_class, model_class, segmentation_class)


def test_unknown_head_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"no head 'deeplab3': did you mean 'deeplabv3'\? Registered are deeplabv2, deeplabv3"
    ):
        find_head("deeplab3")
    with pytest.raises(ValueError, match="no head 'unet': Registered are deeplabv2, deeplabv3"):
        find_head("unet")


def test_a_head_of_the_users_own_is_like_ours(psp, tiny, live, tmp_path):
    assert find_head("psp") == psp
    torch.manual_seed(0)
    model = live(PSPForSemanticSegmentation(tiny(PSPConfig, bin_sizes=[1, 2], use_auxiliary_head=True)))
    model.save_pretrained(tmp_path)
    CtxSegImageProcessor().save_pretrained(tmp_path)

    assert AutoConfig.from_pretrained(tmp_path).bin_sizes == [1, 2]
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_stride=8)
    assert type(loaded) is PSPForSemanticSegmentation
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is CtxSegImageProcessor
    x = torch.rand(2, 3, 45, 61)
    with torch.inference_mode():
        assert loaded(x).logits.shape == (2, 3, 6, 8)
        features = AutoModel.from_pretrained(tmp_path)(x).last_hidden_state
        assert torch.equal(features, model.model(x).last_hidden_state)
        logits = F.conv2d(features, model.classifier.weight, model.classifier.bias)
        torch.testing.assert_close(model(x).logits, logits)
    loss = loaded.train()(x, torch.randint(0, 3, (2, 45, 61))).loss
    loss.backward()
    assert all(torch.isfinite(value.grad).all() for value in loaded.parameters())

    picture = Image.new("RGB", (61, 45), "red")
    found = pipeline("image-segmentation", model=str(tmp_path))(picture)
    assert all(item["mask"].size == picture.size for item in found)
    assert hf_ctxseg.predict(tmp_path, picture).mask.shape == (45, 61)


def test_a_head_of_the_users_own_trains_reloads_and_exports(psp, tmp_path):
    data, run = make_data(tmp_path / "data", train=4, val=1), tmp_path / "run"
    fields = ["hidden_size=16", "bin_sizes=[1,2]"]
    assert main(["train", *flags(data=data, output_dir=run, head="psp", config_overrides=fields)]) == 0
    assert json.loads((run / "metrics.json").read_text())["model"]["head"] == "psp"

    model = AutoModelForSemanticSegmentation.from_pretrained(run).eval()
    assert type(model) is PSPForSemanticSegmentation and model.config.bin_sizes == [1, 2]
    assert list(model.config.id2label.values()) == list(NAMES)
    norm = model.model.decode_head.projection.norm  # starts with statistics of 0 and 1, weights of 1
    assert norm.num_batches_tracked == 3 and norm.running_mean.abs().min() > 0 and (norm.weight != 1).all()

    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(1, 3, 65, 97),), dynamic_shapes={"pixel_values": sizes})
        for shape in ((1, 3, 65, 97), (1, 3, 97, 33)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported.module()(x)["logits"], model(x).logits, rtol=1e-4, atol=1e-4)


def test_a_head_of_the_users_own_is_listed(psp, capsys):
    assert main(["models", "--report", "json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "psp"]
    assert row["head"] == "psp" and row["reported"] == "PSPForSemanticSegmentation with its defaults"
    assert main(["models"]) == 0
    assert any(line.startswith("psp ") for line in capsys.readouterr().out.splitlines())
    assert type(hf_ctxseg.preset("psp", bin_sizes=[2])) is PSPConfig
    assert "psp" in [entry.name for entry in hf_ctxseg.list_models()]


def test_the_fields_of_such_a_head_are_checked_as_ours(psp):
    with pytest.raises(ValueError, match="PSPConfig has no field 'bin_size': did you mean bin_sizes"):
        PSPConfig(bin_size=[1])
    with pytest.raises(ValueError, match="hidden_size is 0"):
        PSPConfig(hidden_size=0)
    assert not hasattr(hf_ctxseg.DeepLabV3Config(), "bin_sizes")


def test_nothing_is_left_of_a_head_that_is_gone(tiny, tmp_path):
    PSPForSemanticSegmentation(tiny(PSPConfig)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ctxseg_psp"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_pipeline_knows_the_names_of_our_classes():
    for config_class, _, segmentation_class in MODELS:
        assert MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[config_class.model_type] == segmentation_class.__name__


def test_public_names_are_there():
    for name in hf_ctxseg.__all__:
        assert getattr(hf_ctxseg, name) is not None, name
    assert hf_ctxseg.__all__ == sorted(
        hf_ctxseg.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    with pytest.raises(AttributeError, match="no attribute 'DeepLab'"):
        hf_ctxseg.DeepLab  # noqa: B018


class MixedConfig(CtxSegConfig):
    model_type = "ctxseg_mixed"


class MixedHead(ContextHead):
    """Layers that the package's own heads do not have."""

    def __init__(self, config, channels, reductions):
        super().__init__(config, out_channels=8)
        self.linear = nn.Linear(channels[-1], 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 1)
        self.batch_norm = nn.BatchNorm1d(8)

    def forward(self, features):
        height, width = features[-1].shape[2:]
        rows = self.norm(self.linear(features[-1].flatten(2).transpose(1, 2))).transpose(1, 2)  # (B, 8, h * w)
        return self.batch_norm(self.conv(rows)).unflatten(2, (height, width))

    def build_classifier(self, in_channels):
        return nn.ConvTranspose2d(in_channels, self.config.num_labels, 2, stride=2)


class MixedModel(CtxSegModel):
    config_class = MixedConfig
    head_class = MixedHead


class MixedForSemanticSegmentation(CtxSegForSemanticSegmentation):
    config_class = MixedConfig
    model_class = MixedModel


def test_c5_any_layer_that_a_checkpoint_lacks_is_drawn(tmp_path):
    config = MixedConfig(backbone="test_efficientnet", num_labels=3)
    model = MixedForSemanticSegmentation(config)
    weights = {key: value for key, value in model.state_dict().items() if ".decode_head." not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, info = MixedForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key.split(".")[2] for key in info["missing_keys"]} == {"linear", "norm", "conv", "batch_norm"}
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    head = loaded.model.decode_head
    for value in loaded.state_dict().values():
        assert torch.isfinite(value).all() and value.abs().max() < 100
    assert head.norm.weight.eq(1).all() and head.batch_norm.running_var.eq(1).all()
    assert not (head.linear.bias.any() or head.batch_norm.running_mean.any() or head.norm.bias.any())
    for weight in (head.linear.weight, head.conv.weight, loaded.classifier.weight):
        assert 0.005 < weight.std() < 0.5
