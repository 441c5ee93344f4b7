"""DenseCRF: equal to pydensecrf, close to the exact mean field, and careful with what it is given."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from hf_ctxseg import CtxSegImageProcessor, DenseCRF
from hf_ctxseg.crf import PRESETS, as_crf
from hf_ctxseg.demo_scenes import CLASSES, render_scene
from hf_ctxseg.permutohedral import PermutohedralLattice
from scripts.pydensecrf_outputs import coarse_probabilities

# Written by scripts/pydensecrf_outputs.py with pydensecrf2 1.1.
OUTPUTS = Path(__file__).parent / "fixtures" / "pydensecrf.npz"


def noise(batch=1, classes=4, size=(21, 18), seed=0):
    """Probabilities and a picture of blobs with noise."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(batch, classes, *size, generator=generator).softmax(dim=1)
    blobs = F.interpolate(torch.rand(batch, 3, 3, 2, generator=generator), size, mode="bilinear") * 215
    return probabilities, (blobs + torch.rand(batch, 3, *size, generator=generator) * 40).to(torch.uint8)


def scene(seed, size):
    picture, label = render_scene(seed, size)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    return coarse_probabilities(label, len(CLASSES))[None], pixels, torch.from_numpy(label).long()


def exact_mean_field(probabilities, picture, crf):
    """Krähenbühl and Koltun's algorithm 1 with matrices of all pairs, of (K, H, W) and (3, H, W), as (K, H, W)."""
    height, width = picture.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places, colours = torch.stack([x, y], dim=-1).view(-1, 2).double(), picture.flatten(1).T.double()

    def kernel(points):
        weights = torch.exp(-torch.cdist(points, points).square() / 2)
        roots = weights.sum(dim=1).sqrt()
        return weights / roots[:, None] / roots

    both = torch.cat([places / crf.bilateral_std_xy, colours / crf.bilateral_std_rgb], dim=1)
    weights = crf.gaussian_weight * kernel(places / crf.gaussian_std) + crf.bilateral_weight * kernel(both)
    unary = probabilities.double().clamp(1e-5, 1).log().flatten(1).T
    belief = unary.softmax(dim=1)
    for _ in range(crf.iterations):
        belief = (unary + weights @ belief).softmax(dim=1)
    return belief.T.view(probabilities.shape)


@pytest.mark.parametrize("name", ["default", "deeplabv1", "deeplabv2", "pydensecrf"])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pydensecrf(name, seed):
    with np.load(OUTPUTS) as stored:
        picture = torch.from_numpy(stored[f"picture_{seed}"]).permute(2, 0, 1)[None]
        probabilities = torch.from_numpy(stored[f"probabilities_{seed}"]).float()[None]
        expected = torch.from_numpy(stored[f"{name}_{seed}"].astype(np.float32) / 65535)[None]
    found = DenseCRF.preset(name)(probabilities, picture)
    assert (found - expected).abs().max() < 1e-4
    assert (found.argmax(dim=1) == expected.argmax(dim=1)).float().mean() >= 0.999
    assert (expected.argmax(dim=1) != probabilities.argmax(dim=1)).float().mean() > 0.02  # it has something to do


@pytest.mark.parametrize("name", ["default", "deeplabv1"])
def test_changes_what_the_exact_mean_field_changes(name):
    crf, alike, changed = DenseCRF.preset(name), 0, 0
    for seed in range(2):
        probabilities, picture, _ = scene(seed, (32, 40))
        found = crf(probabilities, picture)[0].argmax(dim=0)
        exact = exact_mean_field(probabilities[0], picture[0], crf).argmax(dim=0)
        moved = exact != probabilities[0].argmax(dim=0)
        alike, changed = alike + int((found == exact)[moved].sum()), changed + int(moved.sum())
    assert changed > 300
    assert alike >= 0.9 * changed


def test_sharpens_noisy_masks():
    for seed in range(2):
        _, picture, label = scene(seed, (48, 64))
        scores = 1.5 * F.one_hot(label, len(CLASSES)).permute(2, 0, 1).float()[None]
        noisy = (scores + torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed))).softmax(dim=1)
        before, after = ((p.argmax(dim=1)[0] == label).float().mean() for p in (noisy, DenseCRF()(noisy, picture)))
        assert before < 0.6 and after > 0.85


def test_lattice_filters_like_the_matrix_of_pairs():
    points = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) * 3
    values = torch.rand(400, 2, generator=torch.Generator().manual_seed(1))
    weights = torch.exp(-torch.cdist(points, points).square() / 2)
    roots = weights.sum(dim=1).sqrt()
    expected = (weights / roots[:, None] / roots) @ values
    found = PermutohedralLattice(points).filter(values)
    assert (found - expected).abs().mean() < 0.02 * expected.mean()


def test_lattice_is_linear_and_takes_channels_in_parts():
    points = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    values = torch.randn(100, 70, generator=torch.Generator().manual_seed(1))
    lattice = PermutohedralLattice(points)
    whole = lattice.filter(values)
    single = torch.cat([lattice.filter(values[:, [index]]) for index in range(70)], dim=1)
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lattice.filter(values * 2 + 1), whole * 2 + lattice.filter(torch.ones(100, 70)))


def test_each_picture_of_a_batch_has_its_own_kernels():
    probabilities, pictures = noise(batch=3)
    together = DenseCRF()(probabilities, pictures)
    single = [DenseCRF()(probabilities[[index]], pictures[[index]]) for index in range(3)]
    assert torch.equal(together, torch.cat(single))
    assert together.shape == probabilities.shape and together.dtype == torch.float32
    torch.testing.assert_close(together.sum(dim=1), torch.ones(3, 21, 18))
    assert not together.requires_grad


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 1), (2, 3)])
def test_smallest_pictures(size):
    probabilities, picture = noise(size=size)
    refined = DenseCRF.preset("deeplabv2")(probabilities, picture)
    assert torch.isfinite(refined).all()
    exact = exact_mean_field(probabilities[0], picture[0], DenseCRF.preset("deeplabv2"))
    assert size != (1, 1) or torch.allclose(refined[0].double(), exact, atol=1e-5)


@pytest.mark.parametrize("value", [0, 255])
def test_constant_pictures_are_smoothed_by_distance_alone(value):
    probabilities, picture = noise()
    refined = DenseCRF(bilateral_std_xy=3)(probabilities, torch.full_like(picture, value))
    by_distance = DenseCRF(gaussian_weight=8, bilateral_weight=0)(probabilities, picture)
    assert (refined.argmax(dim=1) == by_distance.argmax(dim=1)).float().mean() > 0.95  # another lattice


def test_without_iterations_or_weights_nothing_changes():
    probabilities, picture = noise()
    for crf in (DenseCRF(iterations=0), DenseCRF(gaussian_weight=0, bilateral_weight=0)):
        torch.testing.assert_close(crf(probabilities, picture), probabilities)
    certain = torch.zeros(1, 2, 3, 3)
    certain[:, 0] = 1  # clipped, not infinite
    assert torch.isfinite(DenseCRF()(certain, torch.zeros(1, 3, 3, 3, dtype=torch.uint8))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    probabilities, picture = noise()
    rounded = probabilities.to(dtype)
    expected = DenseCRF()(rounded.float(), picture)
    torch.testing.assert_close(DenseCRF()(rounded, picture), expected)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (torch.randn(1, 4, 21, 18), r"start at -.* off 1: give finite ones .*logits\.softmax\(dim=1\)"),
        (torch.full((1, 4, 21, 18), 0.5), "up to 1 off 1"),
        (torch.full((1, 4, 21, 18), torch.nan), "nan off 1"),
        (torch.full((1, 4, 21, 18), torch.inf), "inf off 1"),
        (torch.ones(1, 4, 21, 18, dtype=torch.int64), "give a floating-point one"),
        (torch.full((4, 21, 18), 0.25), r"\(4, 21, 18\): give a floating-point one \(B, K, H, W\)"),
        (torch.ones(1, 4, 0, 18), "not empty"),
    ],
)
def test_other_things_than_probabilities_are_refused(probabilities, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF()(probabilities, noise()[1])


@pytest.mark.parametrize("change", [torch.Tensor.float, lambda x: x.permute(0, 2, 3, 1), lambda x: x[..., 1:]])
def test_other_pictures_are_refused(change):
    probabilities, picture = noise()
    with pytest.raises(ValueError, match=r"RGB, uint8, at the size of the probabilities, \(1, 3, 21, 18\)"):
        DenseCRF()(probabilities, change(picture))


@pytest.mark.parametrize(
    "deviations",
    [{"bilateral_std_xy": 1e-3, "bilateral_std_rgb": 1e-3}, {"gaussian_std": 1e-9}, {"bilateral_std_rgb": 1e-40}],
)
def test_deviations_too_small_for_the_lattice_are_refused(deviations):
    probabilities, picture = noise()
    with pytest.raises(ValueError, match="raise the standard deviations"):
        DenseCRF(**deviations)(probabilities, picture)


def test_the_default_type_changes_nothing():
    probabilities, picture = noise()
    expected = DenseCRF()(probabilities, picture)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(DenseCRF()(probabilities, picture), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_parameters_are_checked():
    wrong = {"iterations": -1, "gaussian_std": 0, "bilateral_weight": -1, "bilateral_std_rgb": float("nan")}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is {value}, but must be a number"):
            DenseCRF(**{name: value})
    with pytest.raises(ValueError, match=r"iterations is 2\.5, but must be a whole number"):
        DenseCRF(iterations=2.5)
    with pytest.raises(ValueError, match=r"no CRF preset 'deeplab'.*deeplabv1"):
        as_crf("deeplab")
    with pytest.raises(ValueError, match="crf is a int"):
        as_crf(3)
    assert all(as_crf(name) == DenseCRF(**values) for name, values in PRESETS.items())


def test_the_processor_refines_masks_at_the_pictures_size():
    processor, crf = CtxSegImageProcessor(), DenseCRF(iterations=3)
    _, pictures = noise(batch=2, size=(33, 40))
    logits = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 3
    upsampled = F.interpolate(logits, (33, 40), mode="bilinear").softmax(dim=1)
    expected = crf(upsampled, pictures).argmax(dim=1)
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    outputs = SimpleNamespace(logits=logits)
    for sizes, given in ((None, images), ([(33, 40)] * 2, images), (None, tuple(images)), (None, pictures)):
        masks = processor.post_process_semantic_segmentation(outputs, sizes, crf=crf, images=given)
        assert torch.equal(torch.stack(masks), expected)
    plain = processor.post_process_semantic_segmentation(outputs, [(33, 40)] * 2)
    assert not torch.equal(torch.stack(plain), expected)
    scored = processor.post_process_semantic_segmentation(
        outputs, return_segmentation_scores=True, crf="deeplabv1", images=list(pictures)
    )
    refined = DenseCRF.preset("deeplabv1")(upsampled, pictures)
    torch.testing.assert_close(torch.stack([result.segmentation_scores for result in scored]), refined)


def test_the_processor_wants_the_pictures():
    outputs, processor = SimpleNamespace(logits=torch.randn(1, 4, 5, 5)), CtxSegImageProcessor()
    with pytest.raises(ValueError, match=r"0 images .* of 1 pictures.*images="):
        processor.post_process_semantic_segmentation(outputs, [(9, 9)], crf="default")
    with pytest.raises(ValueError, match=r"uint8, at the size of the probabilities, \(1, 3, 9, 9\)"):
        processor.post_process_semantic_segmentation(outputs, [(9, 9)], crf="default", images=Image.new("RGB", (9, 8)))
