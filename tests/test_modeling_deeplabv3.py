import json
import logging
import math

import aspp_formulas
import pytest
import timm
import torch
from deeplabv3_helpers import head_of, model_of
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3 as torchvision_deeplabv3

from hf_ctxseg import (
    ASPP,
    DeepLabV3Config,
    DeepLabV3ForSemanticSegmentation,
    DeepLabV3Model,
)
from hf_ctxseg.modeling_deeplabv3 import DeepLabV3Head

VARIANTS = ("paper", "mmseg", "torchvision", "plain")


def twins(live, rates, in_channels=12, width=16):
    """Our ASPP and torchvision's, with the same weights and statistics; torchvision's dropout is off."""
    torch.manual_seed(0)
    ours = live(ASPP(in_channels, width, rates))
    theirs = torchvision_deeplabv3.ASPP(in_channels, rates, width)
    assert [value.shape for value in ours.state_dict().values()] == [
        value.shape for value in theirs.state_dict().values()
    ]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    theirs.project[3] = nn.Identity()
    return ours, theirs.eval()


@pytest.mark.parametrize("size", [(33, 33), (7, 13), (1, 9), (1, 1)])
@pytest.mark.parametrize("rates", [(6, 12, 18), (1, 2), (3,), ()])
def test_aspp_is_torchvisions(live, rates, size):
    ours, theirs = twins(live, rates)
    x = torch.randn(2, 12, *size)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_aspp_trains_as_torchvisions(live):
    ours, theirs = (module.train() for module in twins(live, (2, 4)))
    x = torch.randn(2, 12, 9, 11)
    weight = torch.randn(2, 16, 9, 11)
    for module in (ours, theirs):
        (module(x) * weight).sum().backward()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-3) for a, b in pairs)
    states = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in states)


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("rates", [(2, 3), (1,), ()])
def test_branches_can_be_left_out(live, rates, pooling):
    aspp = live(ASPP(12, 16, rates, image_pooling=pooling, norm_eps=1e-2))
    assert aspp.projection.conv.in_channels == 16 * (1 + len(rates) + pooling)
    assert (aspp.image_pooling is None) is not pooling
    x = torch.randn(2, 12, 7, 9)
    with torch.inference_mode():
        expected = aspp_formulas.aspp(aspp.state_dict(), x, rates, pooling, eps=1e-2)
        torch.testing.assert_close(aspp(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stride", "rates"), [(8, [4, 6]), (16, [2, 3])])
def test_the_whole_forward_is_the_composition_of_the_paper(live, tiny, stride, rates):
    config = tiny(output_stride=stride, atrous_rates=[2, 3], norm_eps=1e-3)
    model = live(model_of(config))
    weights = model.state_dict()
    network = timm.create_model(config.backbone, features_only=True, output_stride=stride, out_indices=(-1,)).eval()
    stem = "model.backbone._backbone."
    network.load_state_dict({key.removeprefix(stem): value for key, value in weights.items() if key.startswith(stem)})
    x = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        deepest = network(x)[-1]
        context = aspp_formulas.aspp(weights, deepest, rates, prefix="model.decode_head.aspp.", eps=1e-3)
        logits = F.conv2d(context, weights["classifier.weight"], weights["classifier.bias"])
        torch.testing.assert_close(model(x).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.model(x).last_hidden_state, context, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stride", "absolute", "rates"),
    [(8, False, [12, 24, 36]), (16, False, [6, 12, 18]), (32, False, [3, 6, 9]), (8, True, [6, 12, 18])],
)
def test_convolutions_have_the_scaled_rates(tiny, stride, absolute, rates):
    model = DeepLabV3Model(tiny(output_stride=stride, absolute_rates=absolute))
    convolutions = [branch.conv for branch in model.decode_head.aspp.branches[1:]]
    assert [layer.dilation for layer in convolutions] == [(rate, rate) for rate in rates]
    assert [layer.padding for layer in convolutions] == [(rate, rate) for rate in rates]


def test_constants_of_the_norm_reach_the_head_and_not_the_backbone(tiny):
    model = model_of(tiny(norm_eps=1e-2, norm_momentum=0.3, use_auxiliary_head=True))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert ((module.eps, module.momentum) == (1e-2, 0.3)) is ("backbone" not in name), name


@pytest.mark.parametrize(
    ("size", "warned"), [((18, 40), [18]), ((40, 18), [18]), ((19, 19), []), ((6, 6), [6, 12, 18])]
)
def test_rates_that_reach_over_the_map_are_warned_about(size, warned, caplog):
    aspp = ASPP(4, 4).eval()
    with caplog.at_level(logging.WARNING):
        aspp(torch.randn(1, 4, *size))
    assert ([f"atrous rates {warned}" in record.message for record in caplog.records] or [False]) == [bool(warned)]


def test_large_rates_are_warned_about_once(caplog, tiny):
    model = model_of(tiny()).eval()
    with caplog.at_level(logging.WARNING):
        for size in (33, 65, 33, 48):
            model(torch.rand(1, 3, size, size))
    assert len(caplog.records) == 1


def test_n1_one_picture_trains(tiny):
    model = model_of(tiny(use_auxiliary_head=True)).train()
    pooled, deepest = model.model.decode_head.aspp.image_pooling.norm, model.model.decode_head.aspp.branches[0].norm
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        loss = model(torch.rand(1, 3, 33, 47), torch.randint(0, 3, (1, 33, 47))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert torch.equal(pooled.running_mean, torch.zeros(16))
    assert torch.equal(pooled.running_var, torch.ones(16))
    assert deepest.num_batches_tracked == 2
    assert deepest.running_mean.any()
    changed = [name for name, _ in model.named_parameters() if not torch.equal(model.state_dict()[name], before[name])]
    # A constant map cancels in the projection's norm, so the pooled branch itself learns nothing from one picture.
    head = ("branches.0.conv", "branches.1.conv", "projection.conv")
    assert {f"model.decode_head.aspp.{layer}.weight" for layer in head} <= set(changed)


def test_every_parameter_gets_a_gradient(tiny):
    config = tiny(use_auxiliary_head=True, atrous_rates=[1, 2], classifier_dropout=0.0)
    model = model_of(config).train()
    model(torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


@pytest.mark.parametrize(("name", "classes"), [("test_resnet", 21), ("test_efficientnet", 2), ("test_convnext", 150)])
def test_initial_loss_is_that_of_guessing(name, classes, tiny):
    config = tiny(backbone=name, num_labels=classes, use_auxiliary_head=True, hidden_size=256)
    model = model_of(config)
    x, labels = torch.randn(2, 3, 64, 64), torch.randint(0, classes, (2, 64, 64))
    # In training the auxiliary head's share comes on top.
    assert model.train()(x, labels).loss.item() == pytest.approx(1.4 * math.log(classes), rel=0.05)
    assert model.eval()(x, labels).loss.item() == pytest.approx(math.log(classes), rel=0.05)


def test_without_valid_pixels_the_loss_is_zero(tiny):
    model = model_of(tiny(use_auxiliary_head=True)).train()
    loss = model(torch.rand(2, 3, 33, 33), torch.full((2, 33, 33), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(value.grad.any() for value in model.parameters())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("ignore_index", [255, -1])
def test_loss_is_cross_entropy_on_the_upsampled_logits(tiny, live, ignore_index, align_corners):
    config = tiny(semantic_loss_ignore_index=ignore_index, align_corners=align_corners, use_auxiliary_head=True)
    model = live(model_of(config))
    x, labels = torch.rand(2, 3, 45, 61), torch.randint(0, 3, (2, 45, 61))
    labels[:, :7] = ignore_index
    output = model(x, labels)
    upsampled = F.interpolate(output.logits, (45, 61), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(output.loss, F.cross_entropy(upsampled, labels, ignore_index=ignore_index))


def test_auxiliary_loss_is_added_with_its_weight_in_training(tiny, live):
    model = live(model_of(tiny(use_auxiliary_head=True, auxiliary_loss_weight=0.7, classifier_dropout=0.0))).train()
    seen = []
    model.auxiliary_head.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x, labels = torch.rand(2, 3, 45, 61), torch.randint(0, 3, (2, 45, 61))
    output = model(x, labels, output_hidden_states=True)
    ((features, auxiliary_logits),) = seen
    assert features is output.hidden_states[-2]

    def loss(logits):
        return F.cross_entropy(F.interpolate(logits, (45, 61), mode="bilinear"), labels)

    torch.testing.assert_close(output.loss, loss(output.logits) + 0.7 * loss(auxiliary_logits))


def test_auxiliary_head_does_not_touch_the_logits(tiny, live):
    plain, with_head = (live(model_of(tiny(use_auxiliary_head=value))) for value in (False, True))
    with_head.load_state_dict(plain.state_dict(), strict=False)
    x = torch.rand(1, 3, 45, 61)
    assert torch.equal(plain(x).logits, with_head(x).logits)
    assert plain.auxiliary_head is None


def test_labels_may_be_bytes(tiny):
    model = model_of(tiny()).eval()
    x, labels = torch.rand(2, 3, 33, 33), torch.randint(0, 3, (2, 33, 33))
    assert torch.equal(model(x, labels.to(torch.uint8)).loss, model(x, labels).loss)


def test_loss_under_autocast_is_float32(tiny, live):
    model = live(model_of(tiny(use_auxiliary_head=True)))
    x, labels = torch.rand(2, 3, 33, 33), torch.randint(0, 3, (2, 33, 33))
    exact = model(x, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, labels)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    upsampled = F.interpolate(output.logits.float(), (33, 33), mode="bilinear")
    torch.testing.assert_close(output.loss, F.cross_entropy(upsampled, labels))
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.02)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, labels).loss.dtype == torch.float32


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 33, 33, dtype=torch.uint8),
        torch.zeros(3, 33, 33),
        torch.zeros(1, 1, 33, 33),
        torch.zeros(1, 33, 33, 3),
    ],
)
def test_other_pixel_values_are_refused(tiny, pixels):
    model = model_of(tiny()).eval()
    with pytest.raises(ValueError, match=r"pixel_values is a .* must be floating point of shape \(batch, 3,"):
        model(pixels)


@pytest.mark.parametrize(("variant", "extra"), [("torchvision", 0), ("paper", -256 * 256 * 9 - 2 * 256)])
def test_parameters_of_the_published_size(variant, extra):
    with torch.device("meta"):
        ours = DeepLabV3ForSemanticSegmentation(DeepLabV3Config(variant=variant, num_labels=21))
        theirs = torchvision_deeplabv3.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21)
    published = sum(map(torch.numel, theirs.parameters()))
    assert round(published / 1e6, 3) == 39.639  # segmentation_models_pytorch's DeepLabV3 has as many
    assert sum(map(torch.numel, ours.parameters())) == published + extra


@pytest.mark.parametrize("size", [(7, 9), (4, 4), (1, 5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_head_of_a_variant_is_its_formula(live, tiny, variant, size):
    head = head_of(live, tiny(variant=variant, atrous_rates=[1, 3], norm_eps=1e-3))
    weights = head.state_dict()
    x = torch.randn(2, 12, *size)
    context = aspp_formulas.aspp(weights, x, [1, 3], prefix="aspp.", eps=1e-3)
    if variant == "torchvision":
        context = aspp_formulas.conv_norm_relu(weights, context, "refinement", eps=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(head([None, x]), context, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_of_a_variant(tiny, variant):
    head = DeepLabV3Head(tiny(variant=variant), [12], [16])
    layers = ["aspp.branches.0", "aspp.branches.1", "aspp.branches.2", "aspp.branches.3"]
    layers += ["aspp.image_pooling", "aspp.projection"]
    layers += ["refinement"] if variant == "torchvision" else []
    names = ["conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    names += ["norm.num_batches_tracked"] + (["conv.bias"] if variant == "plain" else [])
    assert set(head.state_dict()) == {f"{layer}.{name}" for layer in layers for name in names}
    sizes = {layer: head.get_submodule(layer).conv.kernel_size[0] for layer in layers}
    dense = {"aspp.branches.1", "aspp.branches.2", "aspp.branches.3", "refinement"}
    dense |= {"aspp.projection"} if variant == "mmseg" else set()
    assert sizes == {layer: 3 if layer in dense else 1 for layer in layers}


@pytest.mark.parametrize(
    ("variant", "values"),
    [
        ("paper", (256, 0.0, 0.1, False)),
        ("mmseg", (512, 0.0, 0.1, False)),
        ("torchvision", (256, 0.5, 0.0, False)),
        ("plain", (256, 0.0, 0.1, True)),
    ],
)
def test_a_variant_sets_what_the_user_does_not(tmp_path, variant, values):
    names = ("hidden_size", "aspp_dropout", "classifier_dropout", "align_corners")
    config = DeepLabV3Config(variant=variant)
    assert tuple(getattr(config, name) for name in names) == values
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert tuple(saved[name] for name in names) == values
    for given in ((256, 0.0, 0.1, False), (512, 0.5, 0.0, True)):  # also where it is another variant's default
        chosen = DeepLabV3Config(variant=variant, **dict(zip(names, given, strict=True)))
        chosen.save_pretrained(tmp_path)
        assert tuple(getattr(DeepLabV3Config.from_pretrained(tmp_path), name) for name in names) == given


def test_plain_scales_all_rates_by_one_factor(tiny):
    config = tiny(variant="plain", output_stride=8, atrous_rates=[6, 12, 18])
    assert config.effective_rates == [12, 24, 36]
    model = model_of(config)
    assert [branch.conv.dilation[0] for branch in model.model.decode_head.aspp.branches] == [1, 12, 24, 36]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_variant_gives_the_same_bits(tiny, live, tmp_path, variant):
    fields = {"nonlocal_mode": "dot_product", "pooling_window": [45, 30], "pool_norm": "group"}
    model = live(model_of(tiny(variant=variant, **fields)))
    model.save_pretrained(tmp_path)
    loaded = DeepLabV3ForSemanticSegmentation.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 61, 85)
    with torch.inference_mode():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_a_variant_gets_a_gradient(tiny, variant):
    fields = {"classifier_dropout": 0.0, "aspp_dropout": 0.0, "nonlocal_mode": "embedded_gaussian"}
    model = model_of(tiny(variant=variant, atrous_rates=[1, 2], **fields)).train()
    nn.init.ones_(model.model.decode_head.nonlocal_block.norm.weight)
    model(torch.rand(3, 3, 64, 64), torch.randint(0, 3, (3, 64, 64))).loss.backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())
    without = {name for name, value in model.named_parameters() if not value.grad.any()}
    # A constant added before batch normalisation changes nothing; its gradient is rounding at most.
    assert not {name for name in without if not (variant == "plain" and name.endswith(".conv.bias"))}


@pytest.mark.parametrize("variant", ["paper", "torchvision"])
@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"])
def test_nonlocal_block_follows_the_pyramid_and_starts_as_the_identity(live, tiny, mode, variant):
    plain = head_of(live, tiny(variant=variant, atrous_rates=[1, 2]))
    config = tiny(variant=variant, atrous_rates=[1, 2], nonlocal_mode=mode, norm_eps=1e-3, norm_momentum=0.3)
    head = DeepLabV3Head(config, [12], [16]).eval()
    missing, unexpected = head.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {key.split(".")[0] for key in missing} == {"nonlocal_block"}
    block = head.nonlocal_block
    assert (block.mode, block.norm.eps, block.norm.momentum) == (mode, 1e-3, 0.3)
    for module in plain.modules():  # the config's own epsilon for the comparison
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    x = torch.randn(2, 12, 7, 9)
    with torch.inference_mode():
        assert torch.equal(head([x]), plain([x]))
        nn.init.normal_(block.norm.weight, std=3.0)
        nn.init.normal_(block.norm.bias)
        nn.init.normal_(block.conv_out.weight)
        context = block(plain.aspp(x))
        expected = context if plain.refinement is None else plain.refinement(context)
        torch.testing.assert_close(head([x]), expected)
        assert not torch.allclose(expected, plain([x]), atol=0.1)


def test_a_model_without_the_block_is_opened_with_one(tiny, live, tmp_path):
    model = live(model_of(tiny(atrous_rates=[1, 2])))
    model.save_pretrained(tmp_path)
    loaded, info = DeepLabV3ForSemanticSegmentation.from_pretrained(
        tmp_path, nonlocal_mode="embedded_gaussian", output_loading_info=True
    )
    assert info["missing_keys"]
    assert all(key.startswith("model.decode_head.nonlocal_block.") for key in info["missing_keys"])
    x = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_have_the_output_stride(tiny, variant, stride):
    model = model_of(tiny(variant=variant, output_stride=stride, pooling_window=33)).eval()
    with torch.inference_mode():
        logits = model(torch.rand(1, 3, 97, 61)).logits
    assert logits.shape == (1, 3, -(-97 // stride), -(-61 // stride))
    assert torch.isfinite(logits).all()
