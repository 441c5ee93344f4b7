import pytest
import torch
import torchvision
from torch import nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from hf_ctxseg import MODELS, DeepLabV3Config, NonLocal2d, list_models, preset
from hf_ctxseg.conversion_torchvision import from_torchvision
from hf_ctxseg.presets import PRESETS

NAMES = [entry.name for entry in list_models()]

# As the papers and code bases state them: backbone, output stride, rates at that stride, width.
DILATED = [12, 24, 36]
ATROUS = {
    "deeplabv1-largefov": ("resnet101", 8, [12], 1024),
    "deeplabv2-aspp-s": ("resnet101", 8, [2, 4, 8, 12], 1024),
    "deeplabv2-aspp-l": ("resnet101", 8, [6, 12, 18, 24], 1024),
    "deeplabv2-resnet101-largefov": ("resnet101", 8, [12], None),
    "deeplabv2-resnet101": ("resnet101", 8, [6, 12, 18, 24], None),
    "deeplabv3-aspp": ("resnet101", 16, [6, 12, 18], 256),
    "deeplabv3-resnet50": ("resnet50", 16, [6, 12, 18], 256),
    "deeplabv3-resnet101": ("resnet101", 16, [6, 12, 18], 256),
    "deeplabv3-mobilenetv2": ("mobilenetv2_100", 16, [], 256),
    "deeplabv3-resnet50-torchvision": ("resnet50", 8, DILATED, 256),
    "deeplabv3-resnet101-torchvision": ("resnet101", 8, DILATED, 256),
    "deeplabv3-mobilenetv3-torchvision": ("mobilenetv3_large_100", 16, DILATED, 256),
    "deeplabv3-resnet50-mmseg": ("resnet50c", 8, DILATED, 512),
    "deeplabv3-resnet101-mmseg": ("resnet101c", 8, DILATED, 512),
    "deeplabv3-mobilenetv2-mmseg": ("mobilenetv2_100", 8, DILATED, 512),
    "deeplabv3plus-resnet50": ("resnet50", 16, [6, 12, 18], 256),
    "deeplabv3plus-resnet101": ("resnet101", 16, [6, 12, 18], 256),
    "deeplabv3plus-xception41": ("xception41", 16, [6, 12, 18], 256),
    "deeplabv3plus-xception65": ("xception65", 16, [6, 12, 18], 256),
    "deeplabv3plus-xception71": ("xception71", 16, [6, 12, 18], 256),
    "deeplabv3plus-mobilenetv2": ("mobilenetv2_100", 16, [6, 12, 18], 256),
    "deeplabv3plus-resnet50-mmseg": ("resnet50c", 8, DILATED, 512),
    "deeplabv3plus-resnet101-mmseg": ("resnet101c", 8, DILATED, 512),
    "deeplabv3plus-mobilenetv2-mmseg": ("mobilenetv2_100", 8, DILATED, 512),
    "deeplabv3-resnet50-nonlocal-backbone": ("resnet50", 16, [6, 12, 18], 256),
    "deeplabv3-resnet50-nonlocal": ("resnet50", 16, [6, 12, 18], 256),
    "deeplabv3-resnet101-nonlocal": ("resnet101", 16, [6, 12, 18], 256),
}
NONLOCAL = {
    f"nonlocal-resnet{depth}{ending}": (f"resnet{depth}c", mode)
    for depth in (50, 101)
    for ending, mode in {
        "": "embedded_gaussian",
        "-gaussian": "gaussian",
        "-dot-product": "dot_product",
        "-concatenation": "concatenation",
    }.items()
}
# Parameters in millions with 21 classes: torchvision's documentation, the paper of MobileNetV2 (table 7), and models
# that mmsegmentation 1.2 built of its own configs.
PUBLISHED_SIZES = {
    "deeplabv3-resnet50-torchvision": 42.0,
    "deeplabv3-resnet101-torchvision": 61.0,
    "deeplabv3-mobilenetv3-torchvision": 11.03,
    "deeplabv3-mobilenetv2": 2.11,
    "deeplabv3-resnet50-mmseg": 68.115,
    "deeplabv3-resnet101-mmseg": 87.107,
    "deeplabv3plus-resnet50-mmseg": 43.591,
    "nonlocal-resnet50": 50.025,
    "nonlocal-resnet50-gaussian": 49.763,
    "nonlocal-resnet101-dot-product": 69.017,
}


def _on_meta(name, **overrides):
    with torch.device("meta"):
        return AutoModelForSemanticSegmentation.from_config(preset(name, **overrides)).eval()


def _twin_is_slow(name):
    twin = "resnet101" in name and name.replace("resnet101", "resnet50") in NAMES
    return pytest.param(name, marks=pytest.mark.slow) if twin else name


@pytest.mark.parametrize("name", [_twin_is_slow(name) for name in NAMES])
def test_every_preset_builds_and_runs_at_its_stride(name):
    model = _on_meta(name, num_labels=21)
    height, width = 391, 330
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, height, width, device="meta")).logits
    stride = 4 if "v3plus" in name else model.config.output_stride
    assert logits.shape == (1, 21, -(-height // stride), -(-width // stride))
    if name in PUBLISHED_SIZES:
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert size == pytest.approx(PUBLISHED_SIZES[name], abs=0.005)


def test_every_preset_is_described_here():
    assert [entry.name for entry in PRESETS if entry.name not in ATROUS | NONLOCAL] == []
    assert len(PRESETS) == len(ATROUS | NONLOCAL) == len({entry.name for entry in PRESETS})
    assert all(entry.reported for entry in PRESETS)


@pytest.mark.parametrize("name", ATROUS)
def test_rates_strides_and_widths_are_those_reported(name):
    backbone, stride, rates, width = ATROUS[name]
    config = preset(name)
    assert (config.backbone, config.output_stride) == (backbone, stride)
    if isinstance(config, DeepLabV3Config):
        assert config.effective_rates == rates and config.hidden_size == width
        papers = not name.endswith(("torchvision", "mmseg", "-backbone")) and backbone.startswith("resnet")
        assert config.multi_grid == ([1, 2, 4] if papers else None)
        assert config.use_image_pooling == ("xception71" not in name)
        assert config.align_corners is False
    else:
        assert config.atrous_rates == rates and config.branch_channels == width
        # The papers fuse scales with ResNet-101, whose classifiers are the branches.
        assert config.input_scales == ([1.0] if width else [0.5, 0.75, 1.0])


@pytest.mark.parametrize("name", NONLOCAL)
def test_nonlocal_presets_are_those_of_mmsegmentation_in_every_mode(name):
    config = preset(name)
    assert (config.backbone, config.nonlocal_mode) == NONLOCAL[name]
    assert (config.output_stride, config.hidden_size, config.reduction) == (8, 512, 2)
    assert config.concat_input and config.use_scale and not config.sub_sample


@pytest.mark.parametrize("name", [*(name for name in ATROUS if name.endswith("-mmseg")), *NONLOCAL])
def test_presets_of_mmsegmentation_train_an_auxiliary_head(name):
    config = preset(name)
    assert config.use_auxiliary_head and config.auxiliary_loss_weight == 0.4 and config.auxiliary_hidden_size == 256
    assert config.classifier_dropout == 0.1 and getattr(config, "variant", "mmseg") == "mmseg"


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("deeplabv3-resnet50-torchvision", "deeplabv3_resnet50"),
        ("deeplabv3-resnet101-torchvision", "deeplabv3_resnet101"),
        ("deeplabv3-mobilenetv3-torchvision", "deeplabv3_mobilenet_v3_large"),
    ],
)
def test_presets_of_torchvision_take_its_tensors(name, peer):
    with torch.device("meta"):
        build = getattr(torchvision.models.segmentation, peer)
        theirs = build(weights=None, weights_backbone=None, aux_loss="mobilenet" not in name, num_classes=21)
    config, tensors = from_torchvision(theirs.state_dict())
    ours = _on_meta(name, num_labels=21)
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }
    assert ours.config.effective_rates == config.effective_rates
    # Their reference training weighs the auxiliary loss 0.5; the rates are stated for stride 16 here.
    different = {"atrous_rates", "absolute_rates", "auxiliary_loss_weight"}
    fields = {key: value for key, value in config.to_dict().items() if key not in different}
    assert fields.items() <= ours.config.to_dict().items()


def test_multi_grid_reaches_the_convolutions():
    blocks = _on_meta("deeplabv3-aspp").backbone._backbone["layer4"]
    assert [block.conv2.dilation[0] for block in blocks] == [2, 4, 8]  # arXiv 1706.05587, section 3.1.1


def test_nonlocal_blocks_are_where_the_names_say():
    def places(name):
        return [key for key, module in _on_meta(name).named_modules() if isinstance(module, NonLocal2d)]

    inside = places("deeplabv3-resnet50-nonlocal-backbone")
    assert len(inside) == 5 and all(".backbone." in key for key in inside)  # arXiv 1711.07971, section 4.1: 5 blocks
    assert sum("layer2" in key for key in inside) == 2 and sum("layer3" in key for key in inside) == 3
    assert places("deeplabv3-resnet50-nonlocal") == ["model.decode_head.nonlocal_block"]
    assert places("deeplabv3-resnet50") == []


def test_mobilenet_of_the_paper_has_neither_atrous_branches_nor_decoder():
    aspp = _on_meta("deeplabv3-mobilenetv2").model.decode_head.aspp
    assert [conv.kernel_size for conv in aspp.modules() if isinstance(conv, nn.Conv2d)] == [(1, 1)] * 3
    assert preset("deeplabv3-mobilenetv2").use_image_pooling


def test_fields_can_be_overridden(tmp_path):
    config = preset("deeplabv3plus-xception65", output_stride=8, id2label={0: "road", 1: "car"}, low_level_channels=32)
    assert type(config).__name__ == "DeepLabV3PlusConfig"
    assert (config.backbone, config.output_stride, config.low_level_channels) == ("xception65", 8, 32)
    assert config.num_labels == 2 and config.effective_rates == [12, 24, 36]
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_a_config_of_ones_own_leaves_the_preset_as_it_is():
    config = preset("deeplabv3-mobilenetv3-torchvision")
    config.atrous_rates.append(1)
    config.backbone_kwargs["bn_eps"] = 1.0
    assert preset("deeplabv3-mobilenetv3-torchvision").atrous_rates == [12, 24, 36]
    assert preset("deeplabv3-mobilenetv3-torchvision").backbone_kwargs["bn_eps"] == 1e-3


def test_wrong_names_and_fields_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no preset 'deeplabv3-resnet5': did you mean deeplabv3-resnet50"):
        preset("deeplabv3-resnet5")
    with pytest.raises(ValueError, match=r"no preset 'unet': it must be one of deeplabv2, deeplabv3, .*xception65"):
        preset("unet")
    with pytest.raises(ValueError, match="no field 'atrous_rate': did you mean atrous_rates"):
        preset("deeplabv3-aspp", atrous_rate=[1])


def test_lists_can_be_searched():
    assert [entry.name for entry in list_models("*xception*")] == [
        "deeplabv3plus-xception41",
        "deeplabv3plus-xception65",
        "deeplabv3plus-xception71",
    ]
    assert list_models("xception") == []


def test_every_head_with_its_defaults_is_listed_too():
    assert len(list_models()) == len(PRESETS) + len(MODELS)
    for config_class, _, _ in MODELS:
        name = config_class.model_type.removeprefix("ctxseg_")
        assert preset(name, hidden_size=32).to_dict() == config_class(hidden_size=32).to_dict()


def test_another_backbone_leaves_out_what_belongs_to_the_first():
    assert preset("deeplabv3-resnet50").multi_grid == [1, 2, 4]
    assert preset("deeplabv3-resnet50", backbone="mobilenetv2_100").multi_grid is None
    assert preset("deeplabv3-mobilenetv3-torchvision", backbone="resnet18").backbone_kwargs is None
    assert preset("deeplabv3-resnet50", backbone="resnet101", multi_grid=[1, 1, 2]).multi_grid == [1, 1, 2]
