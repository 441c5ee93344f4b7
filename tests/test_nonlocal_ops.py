"""The pairwise functions against formulas written out, in every precision."""

import math

import pytest
import torch
from torch.nn import functional as F

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


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_right(mode):
    arguments = [tensor.requires_grad_() for tensor in rows(3, 4, 2, 3)]
    assert torch.autograd.gradcheck(
        lambda theta, phi, g, projection: nonlocal_attention(
            theta, phi, g, mode, 0.7, projection if mode == "concatenation" else None
        ),
        arguments,
    )


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


@pytest.mark.parametrize("mode", MODES)
def test_logits_beyond_float16_stay_finite(mode):
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
