import pytest
import torch
from torch.nn import functional as F

from hf_ctxseg import upsampling
from hf_ctxseg.upsampling import upsampled_argmax
from hf_ctxseg.views import PLAIN, Views, probability_blocks, segment, segment_with_loss, view_maps

ALIGN = pytest.mark.parametrize("align_corners", [False, True])


class Network:
    """A fixed convolution of stride 4 with three classes; remembers the sizes it was shown."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.kernel, self.sizes = torch.randn(3, 3, 5, 5, generator=draw), []

    def __call__(self, pixels):
        self.sizes.append(tuple(pixels.shape[-2:]))
        return F.conv2d(pixels, self.kernel, stride=4, padding=2)


def picture(size=(41, 58), seed=1):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def label_of(size, seed=2):
    label = torch.randint(0, 3, size, generator=torch.Generator().manual_seed(seed))
    label[0], label[1] = 255, -100
    return label


def mean_probabilities(maps, size, align_corners):
    """As mmseg and DeepLab's own code have it: softmax of each view at full size, then the mean."""
    upsampled = [F.interpolate(view, size, mode="bilinear", align_corners=align_corners) for view in maps]
    return torch.stack([view.softmax(1) for view in upsampled]).mean(0)


def test_scales_and_mirror_images_are_views_of_their_own():
    network, pixels = Network(), picture()
    maps = view_maps(network, pixels, Views(scales=(0.5, 1, 1.25), flip=True), 4)
    # halves up: 41 · 0.5 = 20.5 and 58 · 1.25 = 72.5
    assert network.sizes == [(21, 29)] * 2 + [(41, 58)] * 2 + [(51, 73)] * 2
    assert torch.equal(maps[2], Network()(pixels))
    assert torch.equal(maps[3], Network()(pixels.flip(-1)).flip(-1))
    shrunk = F.interpolate(pixels, (21, 29), mode="bilinear", antialias=True)
    torch.testing.assert_close(maps[0], Network()(shrunk))


@ALIGN
@pytest.mark.parametrize("block", [500, 1 << 20])
def test_several_views_give_the_mean_of_their_probabilities(monkeypatch, align_corners, block):
    monkeypatch.setattr(upsampling, "CPU_BLOCK", block)
    maps = view_maps(Network(), picture(), Views(scales=(0.75, 1.5), flip=True), 4)
    expected = mean_probabilities(maps, (50, 61), align_corners)
    found = torch.empty_like(expected)
    for pictures, rows, values in probability_blocks(maps, (50, 61), align_corners):
        found[pictures, :, rows] = values.permute(1, 2, 0, 3)
    torch.testing.assert_close(found, expected)
    assert torch.equal(segment(maps, (50, 61), align_corners), found.argmax(1))
    assert (found.argmax(1) != segment(maps[:1], (50, 61), align_corners)).any()


@ALIGN
def test_a_single_view_takes_the_fast_path(align_corners):
    maps = view_maps(Network(), picture(), PLAIN, 4)
    assert PLAIN.is_plain and len(maps) == 1
    assert torch.equal(segment(maps, (50, 61), align_corners), upsampled_argmax(maps[0], (50, 61), align_corners))


@ALIGN
@pytest.mark.parametrize("block", [500, 1 << 20])
def test_loss_of_a_single_view_is_cross_entropy(monkeypatch, align_corners, block):
    monkeypatch.setattr(upsampling, "CPU_BLOCK", block)
    maps, label = view_maps(Network(), picture(), PLAIN, 4), label_of((50, 61))
    classes, loss = segment_with_loss(maps, label, align_corners)
    upsampled = F.interpolate(maps[0], (50, 61), mode="bilinear", align_corners=align_corners)
    targets = label.masked_fill(label == -100, 255)[None]
    assert loss.item() == pytest.approx(F.cross_entropy(upsampled, targets, ignore_index=255, reduction="sum").item())
    assert torch.equal(classes, segment(maps, (50, 61), align_corners)[0])


@ALIGN
def test_loss_of_several_views_is_that_of_their_mean_probability(align_corners):
    maps, label = view_maps(Network(), picture(), Views(flip=True, scales=(1, 2)), 4), label_of((50, 61))
    classes, loss = segment_with_loss(maps, label, align_corners)
    logs = mean_probabilities(maps, (50, 61), align_corners).log()
    targets = label.masked_fill(label == -100, 255)[None]
    assert loss.item() == pytest.approx(F.nll_loss(logs, targets, ignore_index=255, reduction="sum").item(), rel=1e-5)
    assert torch.equal(classes, segment(maps, (50, 61), align_corners)[0])


def test_certain_mistakes_leave_the_loss_finite():
    sure = torch.zeros(1, 3, 2, 2)
    sure[:, 0] = 1e4
    label = torch.ones(4, 4, dtype=torch.long)
    assert segment_with_loss([sure], label)[1].item() == pytest.approx(16e4)
    assert torch.isfinite(segment_with_loss([sure, sure], label)[1])


def test_nothing_scored_has_no_loss():
    maps = view_maps(Network(), picture(), PLAIN, 4)
    assert segment_with_loss(maps, torch.full((41, 58), 255))[1].item() == 0


def test_windows_scales_and_mirror_images_combine():
    network = Network()
    maps = view_maps(network, picture((40, 60)), Views(window=16, overlap=0, scales=(0.5, 1), flip=True, batch=9), 4)
    # 2 × 2 windows, then 3 × 4: each time two corners, then the rest of each row
    assert network.sizes == [(16, 16), (16, 14), (16, 14), (16, 16)] * 2 + [(16, 16)] * 5 * 2
    assert [tuple(view.shape[-2:]) for view in maps] == [(5, 8)] * 2 + [(10, 15)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ("whole pictures", "single scale, no flip")),
        ({"scales": (0.75, 1.0), "flip": True}, ("whole pictures", "scales 0.75, 1, flipped too")),
        ({"scales": [2]}, ("whole pictures", "scale 2, no flip")),
        ({"window": 512}, ("windows of 512 pixels (overlap 0.5, gaussian) of pictures", "single scale, no flip")),
    ],
)
def test_views_say_what_they_are(options, words):
    assert Views(**options).describe() == words
    assert Views(**options).is_plain == (not options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0, but must be an edge of 1 pixel or more"),
        ({"overlap": 1.0}, "overlap is 1.0, but must be a share from 0 to below 1"),
        ({"blend": "hann"}, "blend is 'hann', but must be one of gaussian, constant"),
        ({"scales": ()}, r"scales are \(\), but must be factors above 0"),
        ({"scales": (1, float("nan"))}, "but must be factors above 0"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Views(**options)
