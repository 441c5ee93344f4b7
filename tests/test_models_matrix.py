"""Every head on a dozen backbone families at strides 8, 16 and native: what each such model has to do.

Fast: a few cells with every pair of choices. Slow: every head and variant on every family and stride, and every
variant with every extra.
"""

import copy

import pytest
import torch
from model_matrix import ALL_FAMILIES, FAMILIES, FIRST, HEADS, LARGER_FAMILIES, PAIRWISE, cells

from hf_ctxseg.backbone import reachable_strides
from hf_ctxseg.nonlocal_block import NonLocalBlock
from hf_ctxseg.registry import find_head

WHOLE = [cell for cell in cells(ALL_FAMILIES, extras=["auxiliary"]) if cell.variant == FIRST[cell.head]]
WHOLE += [cell for cell in cells(["resnet18"]) if cell not in WHOLE]
SLOW = [cell for cell in WHOLE if cell not in PAIRWISE]


CELLS = [*PAIRWISE, *(pytest.param(cell, marks=pytest.mark.slow) for cell in SLOW)]


@pytest.fixture(scope="module", params=CELLS, ids=str)
def cell(request):
    return request.param


@pytest.fixture(scope="module")
def model(cell):
    return cell.build()


def batch(cell, count, size=None):
    height, width = size or cell.size
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, 3, (count, height, width), generator=generator)
    labels[:, :3] = 255
    return torch.randn(count, 3, height, width, generator=generator), labels


def may_be_without_effect(model, cell, name):
    """Whether a parameter changes nothing that reaches the loss in training, by mathematics or by the network."""
    layer, _, kind = name.rpartition(".")
    owner = model.get_submodule(layer.rpartition(".")[0])
    if isinstance(owner, NonLocalBlock) and kind == "bias":
        # Softmax does not see what all keys have in common, nor the following norm what all values have.
        return layer.endswith((".phi", ".g")) and "gaussian" in owner.mode
    if cell.variant == "plain" and name.endswith(".conv.bias"):  # a batch normalisation follows
        return True
    # HRNet has a map of its own for each stride, most of which a head does not take.
    return cell.family == "hrnet_w18_small" and (".stage4." in name or ".incre_modules." in name)


def test_forward_and_reload(model, cell, tmp_path):
    model.eval()
    pixels, labels = batch(cell, 2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        output = model(pixels, labels, output_hidden_states=True)
        assert torch.equal(loaded(pixels).logits, output.logits)
    stride = cell.stride or ALL_FAMILIES[cell.family].native
    assert model.backbone.reductions[-1] == stride
    assert output.hidden_states[-1].shape[2:] == tuple(-(-edge // stride) for edge in cell.size)
    step, scale = model.config.low_level_reduction or stride, max(getattr(model.config, "input_scales", [1]))
    assert output.logits.shape == (2, 3, *(-(-int(edge * scale) // step) for edge in cell.size))
    assert torch.isfinite(output.logits).all()
    assert torch.isfinite(output.loss)


def test_every_parameter_gets_a_gradient(model, cell):
    model.train()
    model.zero_grad(set_to_none=True)
    pixels, labels = batch(cell, 2, (70, 97))
    model(pixels, labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    without = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    assert {name for name in without if not may_be_without_effect(model, cell, name)} == set()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)


def test_n1_one_picture_trains(model, cell):
    model.train()
    model.zero_grad(set_to_none=True)
    names = list(model.state_dict())
    loss = model(*batch(cell, 1)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert list(model.state_dict()) == names


def test_half_precision_is_finite(model, cell):
    model.train()
    model.zero_grad(set_to_none=True)
    pixels, labels = batch(cell, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixels, labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    halved = copy.deepcopy(model).to(torch.bfloat16).eval()
    with torch.inference_mode():
        output = halved(pixels.bfloat16(), labels)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.logits).all()
    assert torch.isfinite(output.loss)


PAIRS = [
    ("head", "family"),
    ("head", "variant", "stride"),
    ("head", "extra"),
    ("family", "stride"),
    ("family", "extra"),
    ("stride", "extra"),
]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_the_fast_cells_have_every_pair(names):
    fast, every = ({tuple(getattr(cell, name) for name in names) for cell in c} for c in (PAIRWISE, cells(FAMILIES)))
    assert fast == every
    assert len(PAIRWISE) < 60


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER_FAMILIES)]
)
def test_c3_strides_of_a_family_are_these_and_others_are_refused(family):
    entry = ALL_FAMILIES[family]
    reached = {8, 16, 32} if entry.dilates else {entry.native}
    assert set(reachable_strides(family, arguments=entry.kwargs)) == reached
    for name in HEADS:
        config_class, model_class, _ = find_head(name)
        for stride in {8, 12, 16, 32} - reached:
            with pytest.raises(
                ValueError, match=f"{family!r} cannot reach output_stride {stride} .*: it reaches .*{entry.native}"
            ):
                model_class(config_class(backbone=family, backbone_kwargs=entry.kwargs, output_stride=stride))


def test_c4_heads_with_a_decoder_refuse_families_without_a_map_at_stride_4():
    decoders = [classes for classes in map(find_head, HEADS) if classes[0].low_level_reduction == 4]
    families = [name for name, family in ALL_FAMILIES.items() if not family.low_level]
    assert decoders and families
    for config_class, _, segmentation_class in decoders:
        for name in families:
            family = ALL_FAMILIES[name]
            config = config_class(backbone=name, backbone_kwargs=family.kwargs, output_stride=family.native)
            with pytest.raises(
                ValueError, match=f"takes a feature map at stride 4, but the backbone {name!r} has maps"
            ):
                segmentation_class(config)
