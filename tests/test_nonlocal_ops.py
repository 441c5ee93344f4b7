"""The pairwise functions against formulas written out, in every precision."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_ctxseg import nonlocal_ops
from hf_ctxseg.configuration_ctxseg import NONLOCAL_MODES
from hf_ctxseg.nonlocal_ops import MODES, nonlocal_attention, nonlocal_weights


def rows(queries=5, keys=7, width=4, values=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, queries, width), (2, keys, width), (2, keys, values), (2 * width,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def weight(theta, phi, mode, scale, projection, keys):
    """One unnormalised pair, or the whole weight where it does not depend on the other keys."""
    product = sum(a * b for a, b in zip(theta, phi, strict=True))
    if mode == "dot_product":
        return product / keys
    if mode == "concatenation":
        joined = [*theta, *phi]
        return max(0.0, sum(a * b for a, b in zip(projection, joined, strict=True))) / keys
    return math.exp(product * scale)


def written_out(theta, phi, mode, scale, projection):
    """Weights (B, Q, K) by three loops over Python numbers."""
    result = []
    for queries, keys in zip(theta.tolist(), phi.tolist(), strict=True):
        table = []
        for query in queries:
            row = [weight(query, key, mode, scale, projection.tolist(), len(keys)) for key in keys]
            total = sum(row) if "gaussian" in mode else 1.0
            table.append([value / total for value in row])
        result.append(table)
    return torch.tensor(result, dtype=torch.float64)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives, in a backward pass too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(result) if torch.is_tensor(leaf)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return result


def lean_from_the_first_pair():
    """Take the paths for many positions with few, which a test can check by the formula as written."""
    return mock.patch.multiple(nonlocal_ops, _PAIRS=64, _SORTED_FROM=0)


def with_gradients(theta, phi, g, projection, dy, mode, plain):
    arguments = [tensor.detach().requires_grad_() for tensor in (theta, phi, g, projection)]
    used = arguments if mode == "concatenation" else arguments[:3]
    y = nonlocal_attention(*arguments[:3], mode, 0.6, arguments[3] if mode == "concatenation" else None, plain)
    return [y.detach(), *torch.autograd.grad(y, used, dy)]


def with_exact_sums(theta, phi, g, projection, mode):
    theta, phi, g, projection = (x.detach().double() for x in (theta, phi, g, projection))
    weights = theta @ phi.transpose(1, 2)
    if mode == "concatenation":
        first, second = projection.chunk(2)
        weights = F.relu((theta @ first)[:, :, None] + (phi @ second)[:, None])
    return weights @ g / phi.shape[1]


def test_modes_are_those_of_the_configuration():
    assert MODES == NONLOCAL_MODES


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_equal_to_three_loops(mode, scale):
    theta, phi, g, projection = rows()
    projection = projection if mode == "concatenation" else None
    expected = written_out(theta, phi, mode, scale, rows()[3])
    weights = nonlocal_weights(theta, phi, mode, scale, projection)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    y = nonlocal_attention(theta, phi, g, mode, scale, projection)
    sums = torch.stack([(expected[..., [key]] * g[:, [key]]) for key in range(7)]).sum(0)
    torch.testing.assert_close(y, sums, rtol=1e-12, atol=1e-12)
    # A chosen query has the weights it has among all.
    chosen = nonlocal_weights(theta[:, [3]], phi, mode, scale, projection)
    torch.testing.assert_close(chosen, expected[:, [3]], rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    batch=st.integers(1, 3),
    queries=st.integers(0, 40),
    keys=st.integers(1, 40),
    width=st.integers(1, 9),
    values=st.integers(1, 9),
    by_channel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_lean_and_plain_are_equal(mode, batch, queries, keys, width, values, by_channel, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, width), (batch, keys, width), (batch, keys, values), (batch, queries, values)]
    theta, phi, g, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    projection = torch.randn(2 * width, generator=generator, dtype=torch.float64)
    if by_channel:  # as a convolution leaves them in memory
        theta, phi, g, dy = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (theta, phi, g, dy))
    with lean_from_the_first_pair():
        found = with_gradients(theta, phi, g, projection, dy, mode, plain=False)
    expected = with_gradients(theta, phi, g, projection, dy, mode, plain=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10 * max(0.0, 1.0, *y.abs().flatten().tolist()))


@pytest.mark.parametrize("values", [16, 12])
@pytest.mark.parametrize("mode", MODES)
def test_float32_errs_no_more_than_the_plain_formula(mode, values):
    theta, phi, g, projection = rows(700, 600, 16, values, torch.float32)
    dy = torch.randn(2, 700, values, generator=torch.Generator().manual_seed(1))
    exact = with_gradients(*(x.double() for x in (theta, phi, g, projection, dy)), mode, plain=True)
    errors = []
    for plain in (False, True):
        found = with_gradients(theta, phi, g, projection, dy, mode, plain)
        errors.append(max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, exact, strict=True)))
    # Weights that a backward pass computes again are not the ones of the forward pass to the last digit.
    assert errors[0] <= (4 if "gaussian" in mode else 1.1) * errors[1]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_right(mode, plain):
    arguments = [tensor.requires_grad_() for tensor in rows(3, 4, 2, 3)]
    with lean_from_the_first_pair():
        assert torch.autograd.gradcheck(
            lambda theta, phi, g, projection: nonlocal_attention(
                theta, phi, g, mode, 0.7, projection if mode == "concatenation" else None, plain
            ),
            arguments,
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [8, 6])
def test_n3_memory_is_linear_in_the_positions(mode, values):
    largest = []
    for count in (600, 1200):
        theta, phi, g, projection = rows(count, count, 8, values, torch.float32)
        dy = torch.ones(2, count, values)
        with mock.patch.object(nonlocal_ops, "_PAIRS", 2**14), LargestTensor() as seen:
            found = with_gradients(theta, phi, g, projection, dy, mode, plain=False)
        largest.append(seen.elements)
        expected = with_gradients(*(x.double() for x in (theta, phi, g, projection, dy)), mode, plain=True)
        for x, y in zip(found, expected, strict=True):
            assert (x - y).abs().max() <= 1e-5 * y.abs().max()
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 1200 * 1200 / 8
    with LargestTensor() as seen:
        with_gradients(theta, phi, g, projection, dy, mode, plain=True)
    assert seen.elements >= 2 * 1200 * 1200


def test_softmax_needs_no_kernel():
    theta, phi, g, _ = rows(50, 60, 8, 8, torch.float32)
    expected = nonlocal_attention(theta, phi, g, "gaussian")
    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(nonlocal_ops, "_PAIRS", 240), LargestTensor() as seen:
        y = nonlocal_attention(theta, phi, g, "gaussian")
    assert seen.elements < 1500
    torch.testing.assert_close(y, expected)


def test_dot_product_takes_the_order_with_fewer_operations():
    for count, largest in ((10, 10 * 96), (400, 2 * 400 * 96)):
        theta, phi, g, _ = rows(count, count, 96, 96)
        with LargestTensor() as seen:
            y = nonlocal_attention(theta, phi, g, "dot_product")
        assert seen.elements <= 2 * largest  # neither the 96 x 96 summary nor the 400 x 400 pairs
        torch.testing.assert_close(y, theta @ phi.transpose(1, 2) @ g / count)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_position_and_none(mode, plain):
    theta, phi, g, projection = rows(1, 1, 4, 3)
    given = projection if mode == "concatenation" else None
    product = (theta * phi).sum(-1, keepdim=True)
    weight = {"dot_product": product, "concatenation": F.relu((torch.cat([theta, phi], -1) @ projection)[..., None])}
    with lean_from_the_first_pair():
        y = nonlocal_attention(theta, phi, g, mode, 1.0, given, plain)
        torch.testing.assert_close(y, weight.get(mode, 1.0) * g)
        assert nonlocal_attention(theta[:, :0], phi, g, mode, 1.0, given, plain).shape == (2, 0, 3)
        assert nonlocal_attention(theta[:0], phi[:0], g[:0], mode, 1.0, given, plain).shape == (0, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_computes_in_float32(mode, dtype):
    theta, phi, g, projection = rows(width=16, dtype=dtype)
    given = projection if mode == "concatenation" else None
    y = nonlocal_attention(theta, phi, g, mode, projection=given)
    assert y.dtype == dtype
    exact = nonlocal_attention(theta.float(), phi.float(), g.float(), mode, projection=projection.float())
    assert torch.equal(y, exact.to(dtype))  # one rounding, at the very end
    assert nonlocal_weights(theta, phi, mode, projection=given).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_does_not_touch_the_sums(mode, dtype):
    theta, phi, g, projection = rows(width=16, dtype=torch.float32)
    given = projection if mode == "concatenation" else None
    with torch.autocast("cpu", dtype=dtype):
        assert (theta @ theta.transpose(1, 2)).dtype == dtype  # it would, left alone
        y = nonlocal_attention(theta, phi, g, mode, projection=given)
        weights = nonlocal_weights(theta, phi, mode, projection=given)
    assert torch.equal(y, nonlocal_attention(theta, phi, g, mode, projection=given))
    assert torch.equal(weights, nonlocal_weights(theta, phi, mode, projection=given))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_n2_activations_up_to_the_end_of_float16_over_sqrt_c_stay_finite(mode, plain):
    # 65504 / sqrt(512): the product of two positions is 65504 squared.
    signs = torch.randn(3, 2, 40, 512, generator=torch.Generator().manual_seed(0)).sign()
    theta, phi, g = ((2890.0 * signs).half().requires_grad_()).unbind()
    projection = torch.full((1024,), 0.01).half()
    given = projection if mode == "concatenation" else None
    with lean_from_the_first_pair():
        y = nonlocal_attention(theta, phi, g, mode, 512**-0.5, given, plain)
        assert torch.isfinite(y).all()
        gradients = torch.autograd.grad((y.float() * 1e-8).sum(), (theta, phi, g))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if "gaussian" in mode:
        assert y.abs().max() <= g.abs().max()
    else:
        exact = with_exact_sums(theta, phi, g, projection, mode)
        error = (y.double() - exact.clamp(-65504, 65504)).abs()
        assert (error <= 2e-3 * exact.abs() + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("mode", MODES)
def test_n2_logits_beyond_float16_stay_finite(mode):
    # 512 channels of 40: products of 819200, which float16 does not hold.
    theta, phi = torch.full((1, 3, 512), 40.0).half(), torch.full((1, 5, 512), 40.0).half()
    phi[:, 1] = -40.0
    g = torch.tensor([1e-3, 2e-3, 3e-3, 4e-3, 5e-3]).half().reshape(1, 5, 1).requires_grad_()
    y = nonlocal_attention(theta, phi, g, mode, projection=torch.full((1024,), 20.0).half())
    values = g.detach().double().flatten()
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    pairs = {"dot_product": 819200 * sign, "concatenation": 409600 * (1 + sign)}
    softmax = torch.where(sign > 0, 0.25, 0.0)
    expected = float(((pairs[mode] / 5 if mode in pairs else softmax) * values).sum())
    assert y.flatten().tolist() == pytest.approx([expected] * 3, rel=1e-3)
    (y.float() * 1e-3).sum().backward()
    assert torch.isfinite(g.grad).all()


def test_what_float16_cannot_hold_is_held_at_its_end():
    big = torch.full((1, 4, 64), 2000.0).half()
    y = nonlocal_attention(big, big, big, "dot_product")  # truly 2000^3 * 64
    assert torch.equal(y, torch.full_like(y, 65504.0))
    assert torch.equal(nonlocal_attention(-big, big, big, "dot_product"), -y)


def test_dot_product_needs_no_matrix_of_pairs():
    # 200 000 positions: their pairs would take 160 GB.
    theta, phi, g, _ = rows(200_000, 200_000, 2, 2, torch.float32)
    y = nonlocal_attention(theta, phi, g, "dot_product")
    few = nonlocal_weights(theta[:, :3], phi, "dot_product").double() @ g.double()
    torch.testing.assert_close(y[:, :3].double(), few, rtol=1e-3, atol=1e-5)


def test_concatenation_is_the_projection_of_joined_pairs():
    theta, phi, _, projection = rows()
    pairs = torch.cat([theta[:, :, None].expand(-1, -1, 7, -1), phi[:, None].expand(-1, 5, -1, -1)], dim=-1)
    expected = F.relu(pairs @ projection) / 7  # (2, 5, 7)
    torch.testing.assert_close(nonlocal_weights(theta, phi, "concatenation", projection=projection), expected)


def test_mistakes_are_named():
    theta, phi, g, _ = rows()
    for function in (lambda mode: nonlocal_attention(theta, phi, g, mode), lambda m: nonlocal_weights(theta, phi, m)):
        with pytest.raises(ValueError, match="mode is 'dot', but must be one of gaussian, embedded_gaussian"):
            function("dot")
        with pytest.raises(ValueError, match="needs a projection"):
            function("concatenation")
