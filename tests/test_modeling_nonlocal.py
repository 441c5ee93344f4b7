"""The non-local head: its arithmetic, its initialisation within a model, training, export."""

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSemanticSegmentation

from hf_ctxseg import CtxSegConfig, NonLocalConfig, NonLocalForSemanticSegmentation, NonLocalModel
from hf_ctxseg.nonlocal_block import NonLocal2d
from hf_ctxseg.nonlocal_ops import MODES, nonlocal_attention


@pytest.fixture
def lively(tiny, live):
    """Build a model whose block matters."""

    def build(**fields):
        torch.manual_seed(0)
        model = live(NonLocalForSemanticSegmentation(tiny(NonLocalConfig, **fields)))
        for parameter in model.model.decode_head.nonlocal_block.parameters():
            parameter.data.normal_(std=0.5)
        return model

    return build


def conv_norm_act(layer, x):
    norm = layer.norm
    y = F.conv2d(x, layer.conv.weight, padding=1)
    shape = (1, -1, 1, 1)
    y = (y - norm.running_mean.reshape(shape)) / (norm.running_var.reshape(shape) + norm.eps).sqrt()
    return (y * norm.weight.reshape(shape) + norm.bias.reshape(shape)).relu()


@pytest.mark.parametrize("concat_input", [True, False])
def test_head_is_conv_block_conv_and_fusion_in_the_order_input_result(lively, concat_input):
    model = lively(concat_input=concat_input, norm_eps=1e-3)
    head = model.model.decode_head
    features = torch.randn(2, model.backbone.channels[-1], 5, 7)
    with torch.no_grad():
        result = conv_norm_act(head.conv_out, head.nonlocal_block(conv_norm_act(head.conv_in, features)))
        if concat_input:
            result = conv_norm_act(head.fusion, torch.cat([features, result], dim=1))
        torch.testing.assert_close(head([features]), result)
    assert (head.fusion is None) != concat_input


def test_fields_reach_the_block(tiny):
    fields = {"nonlocal_mode": "concatenation", "reduction": 4, "sub_sample": True, "zeros_init": False}
    head = NonLocalModel(tiny(NonLocalConfig, **fields, norm_eps=1e-3, norm_momentum=0.3)).decode_head
    block = head.nonlocal_block
    assert (block.mode, block.sub_sample, block.g.out_channels) == ("concatenation", True, 4)
    assert (block.norm.eps, block.norm.momentum, head.conv_in.norm.eps) == (1e-3, 0.3, 1e-3)
    assert block.norm.weight.eq(1).all()
    scales = [NonLocalModel(tiny(NonLocalConfig, use_scale=s)).decode_head.nonlocal_block.scale for s in (True, False)]
    assert scales == [8**-0.5, 1.0]


def test_defaults_are_those_of_the_published_head():
    config = NonLocalConfig()
    assert (config.hidden_size, config.output_stride, config.reduction) == (512, 8, 2)
    assert config.nonlocal_mode == "embedded_gaussian" and config.use_scale and config.concat_input
    assert not config.sub_sample and config.zeros_init


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("nonlocal_mode", "dotproduct", "did you mean 'dot_product'"),
        ("reduction", 0, "reduction is 0, but must be a whole number from 1"),
        ("sub_sample", "yes", "sub_sample is 'yes', but must be true or false"),
        ("zeros_init", 1, "zeros_init is 1"),
        ("use_scale", None, "use_scale is None"),
        ("concat_input", 0, "concat_input is 0"),
    ],
)
def test_c2_bad_values_are_refused(field, value, text):
    with pytest.raises(ValueError, match=text):
        NonLocalConfig(**{field: value})
    assert not hasattr(CtxSegConfig(), field)


def check_fresh(block):
    """Weights as the block itself draws them, not as other convolutions start."""
    assert block.theta.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert block.conv_out.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert not block.theta.bias.any() and not block.norm.weight.any() and not block.norm.bias.any()
    assert not block.norm.running_mean.any() and block.norm.running_var.eq(1).all()


def test_block_starts_as_the_identity_in_a_model(tiny):
    torch.manual_seed(0)
    model = NonLocalForSemanticSegmentation(tiny(NonLocalConfig, hidden_size=32))
    block = model.model.decode_head.nonlocal_block
    check_fresh(block)
    x = torch.randn(2, 32, 5, 7)
    assert torch.equal(block(x), x)
    kernel = model.model.decode_head.conv_in.conv.weight
    assert kernel.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)


def test_block_missing_in_a_checkpoint_is_drawn_as_its_own_and_the_rest_stays(tiny, live, tmp_path):
    config = tiny(NonLocalConfig, backbone="resnet18", hidden_size=32, backbone_nonlocal_stages=[16])
    model = live(NonLocalForSemanticSegmentation(config))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if "nonlocal_block" not in key}
    save_file(kept, file, metadata={"format": "pt"})
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(model.state_dict()) - set(kept)
    blocks = [module for name, module in loaded.named_modules() if name.endswith("nonlocal_block")]
    assert len(blocks) == 2  # in the backbone, and the head's
    for block in blocks:
        check_fresh(block)
    after = loaded.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items())


def test_loaded_blocks_keep_their_weights(lively, tmp_path):
    model = lively()
    model.model.decode_head.nonlocal_block.norm.running_mean.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    after = loaded.state_dict()
    assert all(torch.equal(after[key], value) for key, value in model.state_dict().items())


def test_key_names_are_a_promise(tiny):
    head = NonLocalModel(tiny(NonLocalConfig, nonlocal_mode="concatenation")).decode_head
    layers = {key.removesuffix(".weight") for key in head.state_dict() if key.endswith(".weight")}
    convs = {f"{name}.{part}" for name in ("conv_in", "conv_out", "fusion") for part in ("conv", "norm")}
    block = {f"nonlocal_block.{name}" for name in ("g", "theta", "phi", "concat_project", "conv_out", "norm")}
    assert layers == convs | block


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sub_sample", [False, True])
def test_every_parameter_learns(lively, mode, sub_sample):
    model = lively(nonlocal_mode=mode, sub_sample=sub_sample).train()
    x, labels = torch.randn(2, 3, 65, 49), torch.randint(0, 3, (2, 65, 49))
    model(x, labels=labels).loss.backward()
    silent = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert silent == set()


def test_n1_one_small_picture_trains(tiny):
    model = NonLocalForSemanticSegmentation(tiny(NonLocalConfig)).train()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # timm's own need two values per channel
    loss = model(torch.randn(1, 3, 8, 8), labels=torch.zeros(1, 8, 8, dtype=torch.long)).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("mode", MODES)
def test_n4_bfloat16_autocast_agrees(lively, mode):
    model = lively(nonlocal_mode=mode)
    x = torch.randn(2, 3, 65, 49)
    with torch.no_grad():
        exact = model(x).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x).logits
    assert torch.isfinite(logits).all()
    assert (logits.argmax(1) == exact.argmax(1)).float().mean() > 0.95
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("mode", "sub_sample"),
    [
        pytest.param(mode, sub, marks=() if (mode, sub) == ("dot_product", True) else pytest.mark.slow)
        for mode in MODES
        for sub in (False, True)
    ],
)
def test_n7_exports_with_dynamic_sizes(lively, mode, sub_sample):
    model = lively(nonlocal_mode=mode, sub_sample=sub_sample)
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 3, 65, 97),), dynamic_shapes={"pixel_values": sizes})
        for shape in ((2, 3, 65, 97), (3, 3, 97, 33)):
            x = torch.randn(shape)
            torch.testing.assert_close(exported.module()(x)["logits"], model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_attn_implementation_chooses_the_plain_formulas(lively, tmp_path, mode):
    model = lively(nonlocal_mode=mode)
    x = torch.randn(1, 3, 33, 41)
    asked = []

    def note(*arguments):
        asked.append(arguments[-1])
        return nonlocal_attention(*arguments)

    with torch.no_grad(), mock.patch("hf_ctxseg.nonlocal_block.nonlocal_attention", note):
        lean = model(x).logits
        model.set_attn_implementation("eager")
        plain = model(x).logits
        model.set_attn_implementation("sdpa")
        model(x)
        model.save_pretrained(tmp_path)
        loaded = NonLocalForSemanticSegmentation.from_pretrained(tmp_path, attn_implementation="eager")
        assert torch.equal(loaded(x).logits, plain)
    assert asked == [False, True, False, True]
    torch.testing.assert_close(lean, plain)
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        model.set_attn_implementation("flash_attention_2")


def test_attn_implementation_reaches_blocks_in_the_backbone(tiny):
    fields = {"backbone": "resnet18", "backbone_nonlocal_stages": [16], "attn_implementation": "eager"}
    blocks = [m for m in NonLocalModel(tiny(NonLocalConfig, **fields)).modules() if isinstance(m, NonLocal2d)]
    assert len(blocks) > 1 and all(block.config._attn_implementation == "eager" for block in blocks)
