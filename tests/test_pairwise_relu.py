"""The sorted sums against the formula with all pairs: values, gradients, ties, rounding, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_ctxseg.pairwise_relu import pairwise_relu


def all_pairs(a, b, g):
    return F.relu(a.unsqueeze(2) + b.unsqueeze(1)) @ g


def with_gradients(function, a, b, g, dy):
    a, b, g = (tensor.detach().requires_grad_() for tensor in (a, b, g))
    y = function(a, b, g)
    return [y.detach(), *torch.autograd.grad(y, (a, b, g), dy)]


def sample(batch, queries, keys, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries), (batch, keys), (batch, keys, channels), (batch, queries, channels))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_channel(rows):
    """The same rows, in memory as a convolution leaves them."""
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


def worst(found, expected):
    """The largest error of each, relative to the largest value."""
    pairs = zip(found, expected, strict=True)
    return [float((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-300)) for x, y in pairs]


SUMMANDS = {
    "random": lambda a, b: (a, b),
    "ties": lambda a, b: (a.round(), b.round()),
    "one value": lambda a, b: (torch.zeros_like(a), torch.zeros_like(b)),
    "all active": lambda a, b: (a.abs() + 1, b.abs()),
    "none active": lambda a, b: (-a.abs(), -b.abs()),
    "far apart": lambda a, b: (a - 1e4, b + 1e4),
    "far off": lambda a, b: (a + 1e4, b + 1e4),
}


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(0, 3),
    queries=st.integers(0, 50),
    keys=st.integers(0, 50),
    channels=st.sampled_from([0, 1, 3, 64, 65, 130]),
    summands=st.sampled_from(sorted(SUMMANDS)),
    layout=st.sampled_from([torch.clone, by_channel]),
    seed=st.integers(0, 99),
)
def test_equal_to_all_pairs(batch, queries, keys, channels, summands, layout, seed):
    a, b, g, dy = sample(batch, queries, keys, channels, seed=seed)
    a, b = SUMMANDS[summands](a, b)
    expected = with_gradients(all_pairs, a, b, g, dy)
    found = with_gradients(pairwise_relu, a, b, layout(g), layout(dy))
    for x, y in zip(found, expected, strict=True):
        scale = float(y.abs().max()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10 * max(scale, 1.0))


@pytest.mark.parametrize("summands", sorted(SUMMANDS))
def test_float32_errs_no_more_than_all_pairs(summands):
    a, b, g, dy = sample(2, 700, 600, 70, torch.float32)
    a, b = SUMMANDS[summands](a, b)
    exact = with_gradients(all_pairs, *(tensor.double() for tensor in (a, b, g, dy)))
    ours = worst(with_gradients(pairwise_relu, a, b, g, dy), exact)
    theirs = worst(with_gradients(all_pairs, a, b, g, dy), exact)
    assert max(ours) <= max(max(theirs), 2e-7), (ours, theirs)


def test_pairs_that_cancel_are_not_active():
    # The mean of b, a third, is no float: centred, the pairs of sum 0 would seem to have sums of either sign.
    b = torch.tensor([[0.1, 0.2, 0.7, -0.1, 0.7, 0.4]])
    a = -b[:, [0, 2, 3, 5]]
    _, da, db, dg = with_gradients(pairwise_relu, a, b, torch.ones(1, 6, 1), torch.ones(1, 4, 1))
    above = b.unsqueeze(1) > -a.unsqueeze(2)  # (1, 4, 6)
    assert torch.equal(da, above.sum(2).float()) and torch.equal(db, above.sum(1).float())
    torch.testing.assert_close(dg[..., 0], F.relu(a.unsqueeze(2) + b.unsqueeze(1)).sum(1))


def test_gradients_are_right():
    a, b, g, _ = (tensor.requires_grad_() for tensor in sample(2, 5, 19, 3))
    assert torch.autograd.gradcheck(pairwise_relu, (a, b, g))


def test_a_second_derivative_is_refused():
    a, b, g, _ = (tensor.requires_grad_() for tensor in sample(1, 5, 6, 2))
    for total in (pairwise_relu(a, b, g).square().sum(), pairwise_relu(a, b, g).sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total, a, create_graph=True)


@pytest.mark.parametrize("far, count", [(-1e6, 1), (-1e3, 300), (-30, 300), (-torch.inf, 1)])
def test_keys_that_no_query_reaches_take_no_digits_from_the_others(far, count):
    torch.manual_seed(0)
    a, b, g = torch.randn(2, 600), torch.randn(2, 600), torch.randn(2, 600, 5)
    b[:, :count] = far
    exact = [tensor.double().requires_grad_() for tensor in (a, b, g)]
    given = [tensor.requires_grad_() for tensor in (a, b, g)]
    y = pairwise_relu(*given)
    plain = F.relu(given[0].unsqueeze(2) + given[1].unsqueeze(1)) @ given[2]
    expected = F.relu(exact[0].unsqueeze(2) + exact[1].unsqueeze(1)) @ exact[2]
    upstream = torch.randn_like(y)
    triples = zip(
        (y, *torch.autograd.grad(y, given, upstream)),
        (plain, *torch.autograd.grad(plain, given, upstream)),
        (expected, *torch.autograd.grad(expected, exact, upstream.double())),
        strict=True,
    )
    for found, reference, truth in triples:
        error, allowed = ((tensor - truth).abs().max() for tensor in (found, reference))
        assert error <= 3 * allowed + 1e-6 * truth.abs().max()


def test_backward_under_autocast_keeps_float32():
    a, b, g, dy = sample(1, 40, 50, 3, torch.float32)
    expected = with_gradients(pairwise_relu, a, b, g, dy)
    a, b, g = (tensor.requires_grad_() for tensor in (a, b, g))
    y = pairwise_relu(a, b, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y, (a, b, g), dy)
    assert all(torch.equal(x, y) for x, y in zip(found, expected[1:], strict=True))


def test_what_is_not_a_number_shows_where_it_counts():
    a, b, g, _ = sample(1, 20, 30, 2)
    g[0, 7, 1] = torch.nan
    active = a[0] + b[0, 7] > 0
    assert active.any() and pairwise_relu(a, b, g)[0, active, 1].isnan().all()
    b[0, 3] = torch.nan
    assert pairwise_relu(a, b, g).isnan().all()
