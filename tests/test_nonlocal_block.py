"""The non-local blocks: formula, gradients, initialisation, sub-sampling, precision."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ctxseg import NonLocal1d, NonLocal2d, NonLocal3d
from hf_ctxseg.nonlocal_ops import MODES, nonlocal_attention

SHAPES = {NonLocal1d: (2, 4, 5), NonLocal2d: (2, 4, 3, 4), NonLocal3d: (2, 4, 2, 3, 2)}
MATRIX = list(itertools.product(SHAPES, MODES, (False, True), (None, "batch")))
matrix = pytest.mark.parametrize(("block_class", "mode", "sub_sample", "norm"), MATRIX)


def lively(block, seed=0):
    """Give every weight, those that start at zero too, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.6, generator=generator)
    if block.norm is not None:
        block.norm.running_mean.normal_(generator=generator)
        block.norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return block


def sample(block_class, seed=0, **kind):
    return torch.randn(SHAPES[block_class], generator=torch.Generator().manual_seed(seed), **kind)


def pooled(maps, block_class):
    """Max over cells of two by hand, floor at the end; the time of a video is left."""
    for dim in range(3 if block_class is NonLocal3d else 2, maps.dim()):
        if maps.shape[dim] > 1:
            end = maps.shape[dim] // 2 * 2
            even, odd = (maps.index_select(dim, torch.arange(start, end, 2)) for start in (0, 1))
            maps = torch.maximum(even, odd)
    return maps


def linear(layer, maps):
    """A convolution of size 1, as a matrix: (C', positions) of one picture's (C, positions)."""
    y = layer.weight.flatten(1) @ maps.flatten(1)
    return y if layer.bias is None else y + layer.bias[:, None]


def written_out(block, x, use_scale=True):
    """The block by three loops: pictures, queries, keys."""
    outputs = []
    for picture in x:
        first = block.sub_sample_order == "pool_first"

        def keyed(layer, picture=picture, first=first):
            source = pooled(picture[None], type(block))[0] if block.sub_sample and first else picture
            maps = source.flatten(1) if layer is None else linear(layer, source)
            if block.sub_sample and not first:
                maps = pooled(maps.reshape(1, -1, *picture.shape[1:]), type(block))[0].flatten(1)
            return maps

        if block.mode == "gaussian":
            theta, phi = picture.flatten(1), keyed(None)
        else:
            theta, phi = linear(block.theta, picture), keyed(block.phi)
        g = keyed(block.g)
        columns = []
        for i in range(theta.shape[1]):
            weights = []
            for j in range(phi.shape[1]):
                if block.mode == "concatenation":
                    pair = torch.cat([theta[:, i], phi[:, j]])
                    weights.append(F.relu(block.concat_project.weight.flatten() @ pair) / phi.shape[1])
                    continue
                product = theta[:, i] @ phi[:, j]
                if block.mode == "dot_product":
                    product = product / phi.shape[1]
                elif block.mode == "embedded_gaussian" and use_scale:
                    product = product / len(theta) ** 0.5
                weights.append(product)
            row = torch.stack(weights)
            row = row.exp() / row.exp().sum() if "gaussian" in block.mode else row
            columns.append(sum(row[j] * g[:, j] for j in range(len(row))))
        outputs.append(linear(block.conv_out, torch.stack(columns, dim=1)).reshape(picture.shape))
    y = torch.stack(outputs)
    if block.norm is not None:
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, var = block.norm.running_mean.reshape(shape), block.norm.running_var.reshape(shape)
        y = (y - mean) / (var + 1e-5).sqrt() * block.norm.weight.reshape(shape) + block.norm.bias.reshape(shape)
    return x + y


@matrix
def test_equal_to_the_formula(block_class, mode, sub_sample, norm):
    block = lively(block_class(4, mode=mode, sub_sample=sub_sample, norm=norm)).double().eval()
    x = sample(block_class, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), written_out(block, x), rtol=1e-10, atol=1e-10)


@matrix
def test_gradients_are_right(block_class, mode, sub_sample, norm):
    block = lively(block_class(2, 1, mode=mode, sub_sample=sub_sample, norm=norm)).double().eval()
    x = sample(block_class, dtype=torch.float64)[:1, :2].requires_grad_()
    parameters = dict(block.named_parameters())
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (x,)),
        (x, *parameters.values()),
        fast_mode=True,
    )


@matrix
def test_starts_as_the_identity_and_learns(block_class, mode, sub_sample, norm):
    torch.manual_seed(0)
    block = block_class(4, mode=mode, sub_sample=sub_sample, norm=norm)
    x = sample(block_class)
    assert torch.equal(block(x), x)
    assert torch.equal(block.eval()(x), x)
    # N(0, 0.01) weights on so few channels let a convolution of two channels fall silent after its ReLU.
    if mode == "concatenation":
        block.concat_project.weight.data.abs_()
        x = x.abs()
        for layer in (block.theta, block.phi):
            layer.weight.data.abs_()
    block.train()
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    zero = block.conv_out if norm is None else block.norm
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for step in (1, 2):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        moved = {name for name, parameter in block.named_parameters() if parameter.grad.any()}
        last = {name for name, parameter in block.named_parameters() if any(parameter is p for p in zero.parameters())}
        # A constant shift of all logits of a query changes no softmax, nor the output of a batch normalisation.
        idle = {"phi.bias"} if mode == "embedded_gaussian" else set()
        if norm == "batch" and "gaussian" in mode:
            idle.add("g.bias")
        everything = {name for name, _ in block.named_parameters()}
        assert (moved == last) if step == 1 else (moved >= everything - idle)
        optimizer.step()


@matrix
def test_any_memory_layout(block_class, mode, sub_sample, norm):
    block = lively(block_class(4, mode=mode, sub_sample=sub_sample, norm=norm)).eval()
    x = sample(block_class)
    last = torch.movedim(torch.movedim(x, 1, -1).contiguous(), -1, 1)  # channels last in memory
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not last.is_contiguous() and not strided.is_contiguous()
    with torch.no_grad():
        expected = block(x)
        for other in (last, strided):
            torch.testing.assert_close(block(other), expected)


@pytest.mark.parametrize("block_class", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_keys_do_not_depend_on_sub_sampling(block_class, mode):
    for norm in (None, "batch"):
        plain, other = (block_class(4, mode=mode, sub_sample=sub, norm=norm) for sub in (False, True))
        assert list(plain.state_dict()) == list(other.state_dict())
        other.load_state_dict(plain.state_dict())
    names = {"g", "conv_out", "norm"} | ({"theta", "phi"} if mode != "gaussian" else set())
    names |= {"concat_project"} if mode == "concatenation" else set()
    assert {name for name, _ in plain.named_children()} == names


@matrix
def test_initialised_twice_with_every_part_drawn(block_class, mode, sub_sample, norm):
    for zeros_init in (True, False):
        block = block_class(128, mode=mode, sub_sample=sub_sample, norm=norm, zeros_init=zeros_init)
        lively(block)
        block.reset_parameters()
        for name, layer in block.named_children():
            if name == "norm":
                assert layer.weight.eq(0.0 if zeros_init else 1.0).all() and not layer.bias.any()
                assert not layer.running_mean.any() and layer.running_var.eq(1).all()
                continue
            assert layer.bias is None or not layer.bias.any()
            if name == "conv_out" and norm is None and zeros_init:
                assert not layer.weight.any()
            else:
                assert layer.weight.std().item() == pytest.approx(0.01, rel=0.3)
                assert abs(layer.weight.mean().item()) < 0.004
        assert (block.conv_out.bias is None) == (norm == "batch")


def test_pooling_before_the_convolutions_is_another_function():
    for block_class, mode in itertools.product(SHAPES, MODES):
        x = sample(block_class, dtype=torch.float64)
        first = lively(block_class(4, mode=mode, sub_sample=True, sub_sample_order="pool_first")).double()
        last = block_class(4, mode=mode, sub_sample=True).double()
        last.load_state_dict(first.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(first(x), written_out(first, x), rtol=1e-10, atol=1e-10)
            assert (first(x) - last(x)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_dimension_of_one_is_not_pooled_away(mode):
    cases = [(NonLocal1d, (1,)), (NonLocal2d, (1, 5)), (NonLocal2d, (4, 1)), (NonLocal2d, (1, 1))]
    cases += [(NonLocal3d, (1, 1, 3)), (NonLocal3d, (3, 2, 1))]
    for (block_class, positions), order in itertools.product(cases, ("conv_first", "pool_first")):
        block = lively(block_class(4, mode=mode, sub_sample=True, sub_sample_order=order)).double()
        x = torch.randn(2, 4, *positions, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(block(x), written_out(block, x), rtol=1e-10, atol=1e-10)


def test_scale_is_of_the_embedded_gaussian_only():
    for mode in MODES:
        scaled = lively(NonLocal2d(4, mode=mode)).double()
        plain = NonLocal2d(4, mode=mode, use_scale=False).double()
        plain.load_state_dict(scaled.state_dict())
        x = sample(NonLocal2d, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(plain(x), written_out(plain, x, use_scale=False), rtol=1e-10, atol=1e-10)
            assert torch.equal(plain(x), scaled(x)) == (mode != "embedded_gaussian")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(mode, dtype):
    for block_class, norm in itertools.product(SHAPES, (None, "batch")):
        block = lively(block_class(4, mode=mode, norm=norm)).eval()
        x = sample(block_class)
        with torch.no_grad():
            exact = block(x)
            with torch.autocast("cpu", dtype=dtype):
                assert (block(x) - exact).abs().max() < 0.05 * exact.abs().max()
            half = block.to(dtype)(x.to(dtype))
        assert half.dtype == dtype
        assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("mode", MODES)
def test_large_float16_activations_stay_finite(mode, norm):
    # 65504 / sqrt(512): products of two positions reach the end of float16 times itself.
    torch.manual_seed(0)
    x = (torch.randn(1, 512, 3, 3).sign() * 2800).half()
    for zeros_init in (True, False):
        block = NonLocal2d(512, mode=mode, norm=norm, zeros_init=zeros_init).half().eval()
        with torch.no_grad():
            y = block(x)
        assert torch.isfinite(y).all()
        assert torch.equal(y, x) == zeros_init
    block = NonLocal2d(512, mode=mode, norm=norm, zeros_init=False)
    x = x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        y = block(x)
    y.float().mean().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@matrix
def test_weights_of_chosen_positions(block_class, mode, sub_sample, norm):
    block = lively(block_class(4, mode=mode, sub_sample=sub_sample, norm=norm)).double()
    x = sample(block_class, dtype=torch.float64)
    with torch.no_grad():
        weights = block.weights_of(x, torch.tensor([0, 3]))
        g = block.g(x)
        g = pooled(g, block_class) if sub_sample else g
        assert weights.shape == (2, 2, *g.shape[2:])
        y = torch.einsum("bqk,bck->bcq", weights.flatten(2), g.flatten(2))
        captured = []
        with_hook = block.conv_out.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        block(x)
        with_hook.remove()
    torch.testing.assert_close(y, captured[0].flatten(2)[..., [0, 3]])
    if "gaussian" in mode:
        torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(2, 2, dtype=torch.float64))


def test_one_value_per_channel_trains_in_a_picture():
    block = NonLocal2d(4, norm="batch", zeros_init=False)
    before = block.norm.running_mean.clone()
    block(torch.randn(1, 4, 1, 1)).sum().backward()
    assert torch.equal(block.norm.running_mean, before)


@pytest.mark.parametrize("widths", [(6, 3), (3, 6)])
def test_compiled_softmax_of_two_widths_never_takes_the_math_kernel(widths):
    # As in gaussian mode, whose queries are wider than its values.
    theta, phi, g = (torch.randn(1, 40, width) for width in (widths[0], widths[0], widths[1]))
    torch.compiler.reset()
    compiled = torch.compile(nonlocal_attention, fullgraph=True, backend="eager")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refuses what this kernel does not take
        torch.testing.assert_close(compiled(theta, phi, g, "gaussian"), nonlocal_attention(theta, phi, g, "gaussian"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_compiles_under_autocast(mode):
    block = lively(NonLocal2d(4, mode=mode, sub_sample=True)).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = sample(NonLocal2d)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"in_channels": 0}, "in_channels is 0, but must be a whole number from 1"),
        ({"reduction": 2.0}, "reduction is 2.0, but must be a whole number from 1"),
        ({"mode": "gausian"}, "mode is 'gausian': did you mean 'gaussian'"),
        ({"norm": "group"}, "norm is 'group', but must be 'batch' or None"),
        ({"sub_sample_order": "pool_last"}, "sub_sample_order is 'pool_last': did you mean 'pool_first'"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        NonLocal2d(**({"in_channels": 4} | arguments))


def test_wrong_inputs_are_refused():
    for block_class, shape in SHAPES.items():
        block = block_class(4)
        for wrong in (shape[1:], (*shape, 2), (shape[0], 3, *shape[2:])):
            with pytest.raises(ValueError, match=rf"{block_class.__name__} got .* but takes \(batch, 4\)"):
                block(torch.zeros(wrong))


def test_few_channels_leave_one_embedding():
    block = NonLocal2d(2, reduction=8)
    assert block.g.out_channels == 1
    assert isinstance(block.norm, type(None)) and isinstance(NonLocal2d(2, norm="batch").norm, nn.BatchNorm2d)
