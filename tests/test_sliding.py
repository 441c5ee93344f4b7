import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_ctxseg import sliding
from hf_ctxseg.sliding import sliding_logits

STRIDE = 4


def pooled(pixels):
    """A network without context: the mean of each cell, and its negative. Windows must not matter to it."""
    cells = F.avg_pool2d(pixels, STRIDE, ceil_mode=True, count_include_pad=False)
    return torch.cat([cells, -cells], dim=1)


class Constant:
    """A network that says the same everywhere, and remembers what it was shown."""

    def __init__(self, stride=STRIDE):
        self.sizes, self.stride = [], stride

    def __call__(self, pixels):
        self.sizes.append(tuple(pixels.shape))
        size = [-(-edge // self.stride) for edge in pixels.shape[-2:]]
        return torch.tensor([0.25, -3.0])[None, :, None, None].expand(len(pixels), 2, *size)


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    window=st.integers(1, 40),
    overlap=st.floats(0, 0.99),
    blend=st.sampled_from(["gaussian", "constant"]),
    batch=st.integers(1, 5),
    pictures=st.integers(1, 2),
)
def test_a_network_without_context_gives_what_it_gives_for_the_whole(size, window, overlap, blend, batch, pictures):
    pixels = torch.randn(pictures, 3, *size, generator=torch.Generator().manual_seed(0))
    found = sliding_logits(pooled, pixels, window, overlap, blend, STRIDE, batch)
    torch.testing.assert_close(found, pooled(pixels))


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("size", [(64, 100), (33, 35), (70, 20)])
def test_constant_logits_stay_constant(blend, size):
    found = sliding_logits(Constant(), torch.zeros(1, 3, *size), 32, 0.5, blend, STRIDE)
    assert found.shape == (1, 2, -(-size[0] // STRIDE), -(-size[1] // STRIDE))
    torch.testing.assert_close(found, Constant()(torch.zeros(1, 3, *size)), rtol=1e-6, atol=0)


def test_one_window_is_the_whole_picture():
    network, pixels = Constant(), torch.zeros(1, 3, 30, 47)
    sliding_logits(network, pixels, 48, multiple=STRIDE)
    assert network.sizes == [(1, 3, 30, 47)]


def test_windows_are_of_the_size_asked_for_and_come_in_batches():
    network = Constant()
    sliding_logits(network, torch.zeros(1, 3, 80, 50), 30, 0.5, multiple=8, batch=3)
    # 32 is the next multiple of 8; rows start at 0 16 32 48, columns at 0 16 24, and the last column ends at 50;
    # two opposite corners come first, then what is left of each row
    corners, row = [(1, 3, 32, 32), (1, 3, 32, 26)], [(2, 3, 32, 32), (1, 3, 32, 26)]
    assert network.sizes == [*corners, (1, 3, 32, 32), (1, 3, 32, 26), *row, *row, (2, 3, 32, 32)]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_overlapping_logits_are_the_weighted_mean(blend):
    pixels = torch.randn(1, 3, 16, 40, generator=torch.Generator().manual_seed(1))

    def network(window):  # depends on the whole window
        return window.amax(dim=(1, 2, 3), keepdim=True) * torch.ones(1, 2, 4, window.shape[-1] // 4)

    found = sliding_logits(network, pixels, 16, 0.5, blend, STRIDE)[0, 0, 0]
    cells = np.arange(4) - 1.5
    weights = np.ones(4) if blend == "constant" else np.maximum(np.exp(-(cells**2) / (2 * 0.5**2)), 1e-3)
    sums, mass = np.zeros(10), np.zeros(10)
    for start in (0, 8, 16, 24):
        sums[start // 4 : start // 4 + 4] += weights * pixels[..., start : start + 16].max().item()
        mass[start // 4 : start // 4 + 4] += weights
    assert found.tolist() == pytest.approx((sums / mass).tolist(), rel=1e-5)


@pytest.mark.parametrize("down", [True, False])
def test_networks_that_round_down_are_taken_as_they_are(down):
    def network(pixels):
        return F.avg_pool2d(pixels, STRIDE, ceil_mode=not down, count_include_pad=False)

    pixels = torch.randn(1, 3, 39, 50)
    torch.testing.assert_close(sliding_logits(network, pixels, 16, multiple=STRIDE), network(pixels))


def test_logits_that_do_not_fit_a_grid_are_refused():
    with pytest.raises(ValueError, match="5 logits for a window of 16 pixels, which do not divide it evenly"):
        sliding_logits(lambda pixels: torch.zeros(len(pixels), 2, 5, 5), torch.zeros(1, 3, 40, 40), 16)


def test_large_sums_are_kept_by_the_cpu(monkeypatch):
    monkeypatch.setattr(sliding, "DEVICE_VALUES", 0)
    pixels = torch.randn(1, 3, 40, 40)
    found = sliding_logits(pooled, pixels, 16, multiple=STRIDE)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, pooled(pixels))


def test_half_precision_is_summed_in_full():
    pixels = torch.randn(1, 3, 40, 40).bfloat16()
    found = sliding_logits(pooled, pixels, 16, multiple=STRIDE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pooled(pixels).float(), rtol=1e-3, atol=1e-3)
