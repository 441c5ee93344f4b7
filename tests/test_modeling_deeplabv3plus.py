import json

import aspp_formulas
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from hf_ctxseg import DeepLabV3Config, DeepLabV3PlusConfig, DeepLabV3PlusForSemanticSegmentation, DeepLabV3PlusModel
from hf_ctxseg.modeling_deeplabv3plus import DeepLabV3PlusHead

VARIANTS = ("paper", "mmseg", "smp")


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return DeepLabV3PlusForSemanticSegmentation(config)


def head_of(live, config):
    torch.manual_seed(0)
    return live(DeepLabV3PlusHead(config, [6, 12], [4, config.output_stride]))


def head_written_out(weights, low, deep, config, rates, prefix="", eps=1e-5):
    """The decoder of section 3.1, or the one of segmentation_models_pytorch, by the formulas."""
    between = config.variant != "smp" if config.separable else None

    def refine(x, name):
        if between is None:
            return aspp_formulas.conv_norm_relu(weights, x, prefix + name, eps=eps)
        return aspp_formulas.separable(weights, x, prefix + name, between, eps=eps)

    context = aspp_formulas.aspp(weights, deep, rates, prefix=f"{prefix}aspp.", eps=eps, between=between)
    if config.variant == "smp":
        context = refine(context, "context_refinement")
    low = aspp_formulas.conv_norm_relu(weights, low, f"{prefix}low_level_projection", eps=eps)
    context = F.interpolate(context, low.shape[-2:], mode="bilinear", align_corners=config.align_corners)
    refined = refine(torch.cat([context, low], dim=1), "refinement.0")
    return refined if config.variant == "smp" else refine(refined, "refinement.1")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_head_of_a_variant_is_its_formula(live, tiny, variant, separable, align_corners):
    config = tiny(
        DeepLabV3PlusConfig,
        variant=variant,
        separable=separable,
        align_corners=align_corners,
        atrous_rates=[1, 3],
        low_level_channels=5,
        norm_eps=1e-3,
    )
    head = head_of(live, config)
    # The low map is not a multiple of the deep one, where peers raise.
    for low_size, deep_size in (((27, 33), (7, 9)), ((16, 16), (4, 4)), ((1, 13), (1, 4))):
        low, deep = torch.randn(2, 6, *low_size), torch.randn(2, 12, *deep_size)
        expected = head_written_out(head.state_dict(), low, deep, config, [1, 3], eps=1e-3)
        assert expected.shape == (2, 16, *low_size)
        with torch.inference_mode():
            torch.testing.assert_close(head([low, deep]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_of_a_variant(tiny, variant, separable):
    config = tiny(DeepLabV3PlusConfig, variant=variant, separable=separable, low_level_channels=5)
    head = DeepLabV3PlusHead(config, [6, 12], [4, 16])
    refining = ["aspp.branches.1", "aspp.branches.2", "aspp.branches.3", "refinement.0"]
    refining += ["context_refinement"] if variant == "smp" else ["refinement.1"]
    dense = ["aspp.branches.0", "aspp.image_pooling", "aspp.projection", "low_level_projection"]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    layer = ["conv.weight", *(f"norm.{name}" for name in norm)]
    convs = layer
    if separable:
        convs = ["depthwise.weight", *(f"pointwise.{name}" for name in layer)]
        convs += [] if variant == "smp" else [f"depthwise_norm.{name}" for name in norm]
    expected = {f"{name}.{part}" for name in dense for part in layer}
    assert set(head.state_dict()) == expected | {f"{name}.{part}" for name in refining for part in convs}
    assert head.aspp.projection.conv.kernel_size == ((3, 3) if variant == "mmseg" else (1, 1))
    assert head.low_level_projection.conv.weight.shape == (5, 6, 1, 1)
    first = head.refinement[0]
    assert (first.depthwise if separable else first.conv).in_channels == 16 + 5


@pytest.mark.parametrize(
    ("variant", "values"),
    [("paper", (256, 0.0, 0.1, False)), ("mmseg", (512, 0.0, 0.1, False)), ("smp", (256, 0.5, 0.0, True))],
)
def test_a_variant_sets_what_the_user_does_not(tmp_path, variant, values):
    names = ("hidden_size", "aspp_dropout", "classifier_dropout", "align_corners")
    config = DeepLabV3PlusConfig(variant=variant)
    assert tuple(getattr(config, name) for name in names) == values
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert tuple(saved[name] for name in names) == values
    assert (saved["low_level_channels"], saved["separable"]) == (48, True)
    given = dict(zip(names, (64, 0.3, 0.2, False), strict=True))
    DeepLabV3PlusConfig(variant=variant, **given).save_pretrained(tmp_path)
    loaded = DeepLabV3PlusConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in names} == given


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("variant", "torchvision", "variant is 'torchvision'.*paper, mmseg, smp"),
        ("variant", "mmsegg", "did you mean 'mmseg'"),
        ("variant", None, "variant is None"),
        ("low_level_channels", 0, "low_level_channels is 0"),
        ("low_level_channels", 4.0, "low_level_channels is 4.0"),
        ("low_level_channels", None, "low_level_channels is None"),
        ("separable", 1, "separable is 1"),
        ("separable", None, "separable is None"),
        ("atrous_rates", [0], "atrous_rates"),
        ("low_level_chanels", 48, "did you mean low_level_channels"),
    ],
)
def test_c2_bad_values_are_refused(field, value, text):
    with pytest.raises(ValueError, match=text):
        DeepLabV3PlusConfig(**{field: value})


def test_fields_of_the_decoder_are_not_those_of_deeplabv3():
    for fields in ({"low_level_channels": 48}, {"variant": "smp"}):
        with pytest.raises(ValueError):
            DeepLabV3Config(**fields)


@pytest.mark.parametrize("use_auxiliary_head", [False, True])
@pytest.mark.parametrize(("stride", "rates"), [(8, [2, 6]), (16, [1, 3])])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_forward_is_the_composition(live, tiny, variant, stride, rates, use_auxiliary_head):
    config = tiny(
        DeepLabV3PlusConfig,
        variant=variant,
        output_stride=stride,
        atrous_rates=[1, 3],
        use_auxiliary_head=use_auxiliary_head,
    )
    model = live(model_of(config))
    weights = model.state_dict()
    network = timm.create_model(config.backbone, features_only=True, output_stride=stride).eval()
    stem = "model.backbone._backbone."
    network.load_state_dict({key.removeprefix(stem): value for key, value in weights.items() if key.startswith(stem)})
    x = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        maps = dict(zip(network.feature_info.reduction(), network(x), strict=True))  # the last of each stride
        context = head_written_out(weights, maps[4], maps[stride], config, rates, "model.decode_head.")
        logits = F.conv2d(context, weights["classifier.weight"], weights["classifier.bias"])
        assert logits.shape == (2, 3, 12, 16)
        torch.testing.assert_close(model(x).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.model(x).last_hidden_state, context, rtol=1e-4, atol=1e-4)


def test_rates_of_smp_are_absolute(tiny):
    # Its default at stride 16 is twice the paper's.
    fields = {"variant": "smp", "atrous_rates": [12, 24, 36], "absolute_rates": True}
    model = DeepLabV3PlusModel(tiny(DeepLabV3PlusConfig, **fields))
    convolutions = [branch.depthwise for branch in model.decode_head.aspp.branches[1:]]
    assert [layer.dilation[0] for layer in convolutions] == [12, 24, 36]
    assert DeepLabV3PlusConfig(variant="smp").effective_rates == [6, 12, 18]


def test_c4_a_backbone_without_a_map_at_stride_4_is_refused(tiny):
    config = tiny(DeepLabV3PlusConfig, backbone="test_vit", output_stride=16)
    with pytest.raises(ValueError, match=r"stride 4.*test_vit"):
        DeepLabV3PlusModel(config)


def test_the_low_level_map_is_chosen_by_its_stride(tiny):
    # ConvNeXt's first map has stride 4, the first of EfficientNet stride 2.
    for name in ("test_convnext", "test_efficientnet", "test_resnet"):
        model = DeepLabV3PlusModel(tiny(DeepLabV3PlusConfig, backbone=name))
        assert model.backbone.reductions == [4, 16]
        low = model.backbone(torch.rand(1, 3, 64, 96))[0]
        assert low.shape == (1, model.decode_head.low_level_projection.conv.in_channels, 16, 24)


def test_constants_of_the_norm_reach_the_head_and_not_the_backbone(tiny):
    for variant in VARIANTS:
        model = model_of(tiny(DeepLabV3PlusConfig, variant=variant, norm_eps=1e-2, norm_momentum=0.3))
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert ((module.eps, module.momentum) == (1e-2, 0.3)) is ("backbone" not in name), name


def test_depthwise_convolutions_start_with_the_spread_of_their_own_kernel(tiny):
    model = model_of(tiny(DeepLabV3PlusConfig, backbone="test_resnet", hidden_size=64))
    kernel = model.model.decode_head.refinement[0].depthwise.weight
    assert kernel.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    projection = model.model.decode_head.aspp.projection.conv.weight
    assert projection.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(tiny, variant, separable):
    fields = {"classifier_dropout": 0.0, "aspp_dropout": 0.0, "nonlocal_mode": "embedded_gaussian"}
    config = tiny(DeepLabV3PlusConfig, variant=variant, separable=separable, atrous_rates=[1, 2], **fields)
    model = model_of(config).train()
    nn.init.ones_(model.model.decode_head.nonlocal_block.norm.weight)
    model(torch.rand(3, 3, 64, 64), torch.randint(0, 3, (3, 64, 64))).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_n1_one_picture_trains_every_variant(tiny, variant):
    model = model_of(tiny(DeepLabV3PlusConfig, variant=variant, use_auxiliary_head=True)).train()
    loss = model(torch.rand(1, 3, 47, 61), torch.randint(0, 3, (1, 47, 61))).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())
    pooled = model.model.decode_head.aspp.image_pooling.norm
    assert not pooled.running_mean.any()


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_have_stride_4(tiny, variant, stride):
    model = model_of(tiny(DeepLabV3PlusConfig, variant=variant, output_stride=stride, pooling_window=33)).eval()
    for size in ((97, 61), (33, 130), (3, 5)):
        with torch.inference_mode():
            logits = model(torch.rand(1, 3, *size)).logits
        assert logits.shape == (1, 3, -(-size[0] // 4), -(-size[1] // 4))
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_variant_gives_the_same_bits(tiny, live, tmp_path, variant):
    fields = {"nonlocal_mode": "dot_product", "pooling_window": [45, 30], "pool_norm": "group", "separable": False}
    model = live(model_of(tiny(DeepLabV3PlusConfig, variant=variant, **fields)))
    model.save_pretrained(tmp_path)
    loaded = DeepLabV3PlusForSemanticSegmentation.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 61, 85)
    with torch.inference_mode():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("mode", ["gaussian", "concatenation"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nonlocal_block_follows_the_pyramid_and_starts_as_the_identity(live, tiny, variant, mode):
    fields = {"variant": variant, "atrous_rates": [1, 2], "low_level_channels": 5}
    plain = head_of(live, tiny(DeepLabV3PlusConfig, **fields))
    config = tiny(DeepLabV3PlusConfig, nonlocal_mode=mode, **fields)
    head = DeepLabV3PlusHead(config, [6, 12], [4, 16]).eval()
    missing, unexpected = head.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {key.split(".")[0] for key in missing} == {"nonlocal_block"}
    maps = [torch.randn(2, 6, 27, 33), torch.randn(2, 12, 7, 9)]
    with torch.inference_mode():
        before = head(maps)
        assert torch.equal(before, plain(maps))
        nn.init.normal_(head.nonlocal_block.norm.weight, std=3.0)
        nn.init.normal_(head.nonlocal_block.norm.bias)
        nn.init.normal_(head.nonlocal_block.conv_out.weight)
        plain.aspp.register_forward_hook(lambda module, inputs, output: head.nonlocal_block(output))
        torch.testing.assert_close(head(maps), plain(maps))
        assert not torch.allclose(head(maps), before, atol=0.01)


def test_parameters_of_the_published_size():
    def millions(**fields):
        with torch.device("meta"):
            model = DeepLabV3PlusForSemanticSegmentation(DeepLabV3PlusConfig(num_labels=21, **fields))
        return round(sum(map(torch.numel, model.parameters())) / 1e6, 3)

    assert millions(variant="smp") == 26.683  # segmentation_models_pytorch's DeepLabV3Plus on ResNet-50, 21 classes
    # A norm after every depthwise convolution: three on 2048 channels, one on 304, one on 256.
    assert millions(variant="paper") == round(26.682725 + 2 * (3 * 2048 + 304 + 256) / 1e6, 3)
