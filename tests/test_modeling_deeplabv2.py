import math
from dataclasses import fields

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSemanticSegmentation

from hf_ctxseg import CtxSegConfig, DeepLabV2Config, DeepLabV2ForSemanticSegmentation, DeepLabV2Model

SCALES = [0.5, 0.75, 1.0]
BAD = {
    "atrous_rates": (6, None, "6", [], [0], [6, -1], [1.5], [True]),
    "branch_channels": (0, -1, 1.5, "8", True, [8]),
    "branch_dropout": (-0.1, 1.1, "0.1", None, math.nan),
    "input_scales": (1.0, None, "1", [], [0.5], [0, 1], [1, -0.5], ["1"], [1, 1.0], [1.0, math.nan], [1, math.inf]),
}


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return DeepLabV2ForSemanticSegmentation(config)


def batch(size, classes=3):
    return torch.rand(2, 3, *size), torch.randint(0, classes, (2, *size))


def deepest_map(model, x):
    """The deepest map of a network that timm builds by itself, with the model's weights."""
    config, stem = model.config, "model.backbone._backbone."
    network = timm.create_model(
        config.backbone, features_only=True, output_stride=config.output_stride, out_indices=(-1,)
    ).eval()
    weights = model.state_dict()
    network.load_state_dict({key.removeprefix(stem): value for key, value in weights.items() if key.startswith(stem)})
    with torch.no_grad():
        return network(x)[-1]


def dilated_convolution(x, kernel, bias, rate):
    """A 3×3 convolution written out: each tap is a 1×1 convolution of the map, moved by the rate."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (rate,) * 4)
    y = bias[None, :, None, None].expand(len(x), -1, height, width).clone()
    for row in range(3):
        for column in range(3):
            moved = padded[:, :, row * rate : row * rate + height, column * rate : column * rate + width]
            y += torch.einsum("oc,bchw->bohw", kernel[:, :, row, column], moved)
    return y


@pytest.mark.parametrize(("stride", "size"), [(8, (45, 61)), (16, (33, 70)), (32, (1, 1))])
@pytest.mark.parametrize("rates", [[6, 12, 18, 24], [1, 3], [12]])
def test_classifiers_of_the_resnet_form_are_summed_at_their_own_rates(live, tiny, stride, size, rates):
    model = live(model_of(tiny(DeepLabV2Config, output_stride=stride, atrous_rates=rates)))
    x, weights = torch.randn(2, 3, *size), model.state_dict()
    deepest = deepest_map(model, x)
    expected = sum(
        dilated_convolution(
            deepest, weights[f"classifier.branches.{i}.weight"], weights[f"classifier.branches.{i}.bias"], rate
        )
        for i, rate in enumerate(rates)
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(model.model(x).last_hidden_state, deepest, rtol=1e-5, atol=1e-5)


def vgg_branch(weights, x, index, rate):
    fc6, fc7 = ([weights[f"{layer}.{kind}"] for kind in ("weight", "bias")] for layer in branch_layers(index))
    hidden = dilated_convolution(x, *fc6, rate).clamp(min=0)
    hidden = torch.einsum("oc,bchw->bohw", fc7[0][:, :, 0, 0], hidden) + fc7[1][:, None, None]
    return hidden.clamp(min=0)


def branch_layers(index):
    return [f"model.decode_head.branches.{index}.{layer}" for layer in ("fc6", "fc7")]


@pytest.mark.parametrize("rates", [[2, 4, 8, 12], [3]])
def test_one_classifier_on_the_joined_branches_is_the_sum_of_the_branches_classifiers(live, tiny, rates):
    width, classes = 5, 3
    model = live(model_of(tiny(DeepLabV2Config, atrous_rates=rates, branch_channels=width)))
    separate = [nn.Conv2d(width, classes, kernel_size=1) for _ in rates]
    model.classifier.weight.data = torch.cat([layer.weight.data for layer in separate], dim=1)
    model.classifier.bias.data = sum(layer.bias.data for layer in separate)
    for index in range(len(rates)):
        for name in branch_layers(index):
            model.get_submodule(name).bias.data.normal_()
    x = torch.randn(2, 3, 45, 61)
    deepest, weights = deepest_map(model, x), model.state_dict()
    branches = [vgg_branch(weights, deepest, index, rate) for index, rate in enumerate(rates)]
    with torch.no_grad():
        expected = sum(layer(branch) for layer, branch in zip(separate, branches, strict=True))
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.model(x).last_hidden_state, torch.cat(branches, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_rates_do_not_follow_the_stride(tiny, stride, width):
    model = model_of(tiny(DeepLabV2Config, output_stride=stride, branch_channels=width))
    layers = [*model.classifier.modules(), *model.model.decode_head.modules()]
    kernels = [layer for layer in layers if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert [layer.dilation for layer in kernels] == [layer.padding for layer in kernels]
    assert [layer.dilation[0] for layer in kernels] == [6, 12, 18, 24]
    assert DeepLabV2Config().output_stride == 8


def test_there_is_no_normalisation_in_the_head(tiny):
    for width in (None, 8):
        model = model_of(tiny(DeepLabV2Config, branch_channels=width))
        layers = [*model.classifier.modules(), *model.model.decode_head.modules()]
        assert not any(isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)) for layer in layers)
        assert all(layer.bias is not None for layer in layers if isinstance(layer, nn.Conv2d))


def test_classifiers_start_from_small_weights(tiny):
    model = model_of(tiny(DeepLabV2Config, num_labels=40))
    kernels = [branch.weight for branch in model.classifier.branches]
    assert len(kernels) == 4 and not any(branch.bias.any() for branch in model.classifier.branches)
    for kernel in kernels:
        assert kernel.std().item() == pytest.approx(0.01, rel=0.05)
        assert kernel.mean().item() == pytest.approx(0, abs=1e-3)
    assert not torch.equal(kernels[0], kernels[1])
    wide = model_of(tiny(DeepLabV2Config, num_labels=40, branch_channels=32))
    assert wide.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    for layer in (wide.model.decode_head.branches[0].fc6, wide.model.decode_head.branches[0].fc7):
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
        assert not layer.bias.any()


def test_dropout_follows_each_layer_of_a_branch_and_drops_single_values(live, tiny):
    model = live(model_of(tiny(DeepLabV2Config, atrous_rates=[2], branch_channels=16)))
    branch, seen = model.model.decode_head.branches[0], {}
    for name, layer in (("fc6", branch.fc6), ("fc7", branch.fc7), ("classifier", model.classifier)):
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    branch.train()
    model(torch.randn(2, 3, 128, 128))
    for before, after in (("fc6", "fc7"), ("fc7", "classifier")):
        full, dropped = seen[before][1].clamp(min=0), seen[after][0]
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], 2 * full[kept])
        assert kept[full > 0].float().mean().item() == pytest.approx(0.5, abs=0.05)
        for channel in range(16):  # neither whole channels nor none at all
            here = full[:, channel] > 0
            assert here.sum() < 30 or 0.2 < kept[:, channel][here].float().mean() < 0.8
    branch.eval()
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(seen["fc7"][0], seen["fc6"][1].clamp(min=0))
    assert torch.equal(seen["classifier"][0], seen["fc7"][1].clamp(min=0))


def test_the_resnet_form_has_no_dropout_by_default(live, tiny):
    model = live(model_of(tiny(DeepLabV2Config)))
    model.dropout.train(), model.model.decode_head.train(), model.classifier.train()
    x = torch.rand(2, 3, 45, 61)
    assert torch.equal(model(x).logits, model(x).logits)


def test_dropout_before_the_classifier_acts_at_every_scale(live, tiny):
    model = live(model_of(tiny(DeepLabV2Config, input_scales=SCALES, classifier_dropout=1.0)))
    model.dropout.train()
    bias = sum(branch.bias for branch in model.classifier.branches)
    logits = model(torch.rand(2, 3, 45, 61)).logits
    torch.testing.assert_close(logits, bias[None, :, None, None].expand_as(logits))


def test_v1_has_the_published_size():
    # Table 2 of arXiv 1412.7062 gives 20.5 M parameters for DeepLab-LargeFOV on VGG-16.
    config = DeepLabV2Config(
        backbone="vgg16", output_stride=32, atrous_rates=[12], branch_channels=1024, num_labels=21
    )
    with torch.device("meta"):
        model = DeepLabV2ForSemanticSegmentation(config)
    assert round(sum(map(torch.numel, model.parameters())) / 1e6, 1) == 20.5


def test_vgg_works_at_its_native_stride_only(tiny):
    model = model_of(tiny(DeepLabV2Config, backbone="vgg11", output_stride=32, branch_channels=8)).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 65, 96)).logits.shape[:2] == (1, 3)
    with torch.device("meta"), pytest.raises(ValueError, match=r"'vgg16' cannot reach output_stride 8.* 32"):
        DeepLabV2Model(DeepLabV2Config(backbone="vgg16"))


def sizes_of(scale, size, align_corners):
    """The steps between pixels, or with corners not aligned the pixels, are multiplied and rounded down."""
    if align_corners:
        return tuple(math.floor((length - 1) * scale) + 1 for length in size)
    return tuple(max(1, math.floor(length * scale)) for length in size)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("scales", "size"),
    [(SCALES, (45, 61)), ([1.0, 0.5], (33, 70)), ([1, 1.5], (33, 33)), (SCALES, (1, 2)), ([0.9, 1.0], (80, 40))],
)
def test_scales_are_fused_by_their_maximum(live, tiny, scales, size, align_corners):
    config = tiny(DeepLabV2Config, atrous_rates=[1, 2], align_corners=align_corners, input_scales=scales)
    model = live(model_of(config))
    single = model_of(tiny(DeepLabV2Config, atrous_rates=[1, 2], align_corners=align_corners)).eval()
    single.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        pictures = [
            F.interpolate(x, sizes_of(scale, size, align_corners), mode="bilinear", align_corners=align_corners)
            for scale in scales
        ]
        logits = [single(picture).logits for picture in pictures]
        largest = logits[scales.index(max(scales))]
        resized = [
            F.interpolate(level, largest.shape[-2:], mode="bilinear", align_corners=align_corners) for level in logits
        ]
        output = model(x)
    expected = resized[0]
    for level in resized[1:]:
        expected = torch.where(level > expected, level, expected)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    assert size == (1, 2) or all((expected == level).any() for level in resized)  # each scale wins somewhere


def test_every_scale_and_their_maximum_have_a_loss_in_training(live, tiny):
    fields = {
        "input_scales": SCALES,
        "use_auxiliary_head": True,
        "auxiliary_loss_weight": 0.7,
        "classifier_dropout": 0,
    }
    model = live(model_of(tiny(DeepLabV2Config, branch_channels=8, branch_dropout=0.0, **fields)))
    seen = {"own": [], "auxiliary": []}
    model.classifier.register_forward_hook(lambda *values: seen["own"].append(values[2]))
    model.auxiliary_head.register_forward_hook(lambda *values: seen["auxiliary"].append((values[1][0], values[2])))
    x, labels = batch((45, 61))
    labels[:, :9] = 255

    def loss(logits):
        upsampled = F.interpolate(logits, (45, 61), mode="bilinear")
        return F.cross_entropy(upsampled, labels, ignore_index=255)

    evaluated = model(x, labels)
    torch.testing.assert_close(evaluated.loss, loss(evaluated.logits))
    assert not seen["auxiliary"]
    seen["own"].clear()
    trained = model.train()(x, labels, output_hidden_states=True)
    ((features, auxiliary_logits),) = seen["auxiliary"]
    assert features is trained.hidden_states[-2]
    assert sorted(level.shape[-1] for level in seen["own"]) == [4, 6, 8]
    expected = sum(map(loss, seen["own"])) + loss(trained.logits) + 0.7 * loss(auxiliary_logits)
    torch.testing.assert_close(trained.loss, expected)


def test_loss_without_scales_is_that_of_the_logits(live, tiny):
    model = live(model_of(tiny(DeepLabV2Config)))
    x, labels = batch((45, 61))
    for mode in (False, True):
        output = model.train(mode)(x, labels)
        upsampled = F.interpolate(output.logits, (45, 61), mode="bilinear")
        torch.testing.assert_close(output.loss, F.cross_entropy(upsampled, labels))


@pytest.mark.parametrize("scales", [[1.0], SCALES])
def test_without_valid_pixels_the_loss_is_zero(tiny, scales):
    model = model_of(tiny(DeepLabV2Config, input_scales=scales, use_auxiliary_head=True)).train()
    loss = model(torch.rand(2, 3, 65, 65), torch.full((2, 65, 65), 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(value.grad.any() for value in model.parameters())


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0]])
def test_every_parameter_gets_a_gradient(tiny, live, scales, width, backbone):
    config = tiny(
        DeepLabV2Config,
        backbone=backbone,
        atrous_rates=[1, 2],
        branch_channels=width,
        branch_dropout=0.0,
        input_scales=scales,
        use_auxiliary_head=True,
    )
    model = live(model_of(config)).train()
    x, labels = batch((64, 64))
    model(x, labels).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


@pytest.mark.parametrize("width", [None, 8])
def test_n1_one_picture_of_odd_size_trains(tiny, width):
    model = model_of(tiny(DeepLabV2Config, branch_channels=width, input_scales=SCALES)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):
        loss = model(torch.rand(1, 3, 33, 47), torch.randint(0, 3, (1, 33, 47))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name for name in before if "classifier" in name or "decode_head" in name} <= changed


@pytest.fixture(scope="module")
def saved(tiny, live, tmp_path_factory):
    folder = tmp_path_factory.mktemp("v2")
    config = tiny(DeepLabV2Config, branch_channels=8, input_scales=(0.5, 1.0), use_auxiliary_head=True)
    model = live(model_of(config))
    model.save_pretrained(folder)
    return model, folder


def test_saved_model_with_branches_and_scales_gives_the_same_bits(saved):
    model, folder = saved
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert loaded.config.input_scales == [0.5, 1.0]
    x = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("scales", [[1.0], (0.75, 1.0), SCALES])
def test_scales_may_be_changed_at_load(saved, scales):
    _, folder = saved
    loaded = AutoModelForSemanticSegmentation.from_pretrained(folder, input_scales=scales)
    x = torch.randn(2, 3, 45, 61)
    with torch.inference_mode():
        found, hidden = loaded(x).logits, loaded.model(x).last_hidden_state
        single = loaded.classifier(hidden)
        assert torch.equal(found, single) is (len(scales) == 1)
        assert found.shape == single.shape and (found >= single).all()
        features = AutoModel.from_pretrained(folder, input_scales=scales)(x).last_hidden_state
    assert torch.equal(features, hidden) and features.shape == (2, 4 * 8, 6, 8)
    with pytest.raises(ValueError, match=r"input_scales is \[0.5\], but must hold 1"):
        AutoModelForSemanticSegmentation.from_pretrained(folder, input_scales=[0.5])


def test_tuple_and_dictionary_are_the_same_with_scales(saved):
    model, _ = saved
    x, labels = batch((45, 61))
    for arguments in ({"labels": labels}, {}):
        for hidden in (False, True):
            with torch.inference_mode():
                output = model(x, output_hidden_states=hidden, **arguments)
                values = model(x, output_hidden_states=hidden, return_dict=False, **arguments)
            assert isinstance(values, tuple) and len(values) == len(output) == 1 + bool(arguments) + hidden
            assert torch.equal(values[bool(arguments)], output.logits)
            assert not arguments or torch.equal(values[0], output.loss)
            if hidden:  # those of the picture as it is
                expected = model.model(x, output_hidden_states=True).hidden_states
                assert all(map(torch.equal, values[-1], expected))


def test_n7_export_with_scales_and_dynamic_sizes(saved):
    model, _ = saved
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 3, 65, 97),), dynamic_shapes={"pixel_values": sizes})
        for shape in ((2, 3, 65, 97), (3, 3, 98, 33)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported.module()(x)["logits"], model(x).logits, rtol=1e-4, atol=1e-4)


def test_bad_values_are_tried_for_every_field():
    shared = {field.name for field in fields(CtxSegConfig)}
    assert set(BAD) == {field.name for field in fields(DeepLabV2Config)} - shared


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_c2_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        DeepLabV2Config(**{name: value})


def test_edges_of_the_ranges_are_allowed():
    config = DeepLabV2Config(atrous_rates=(12,), branch_channels=1, branch_dropout=0, input_scales=(1, 2))
    assert (config.atrous_rates, config.input_scales) == ([12], [1, 2])
    assert DeepLabV2Config(branch_dropout=1).branch_dropout == 1
