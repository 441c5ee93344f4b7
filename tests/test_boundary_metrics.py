import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hf_ctxseg.boundary_metrics import (
    TRIMAP_WIDTHS,
    boundary_counts,
    boundary_distance,
    boundary_scores,
    near_other,
)
from hf_ctxseg.metrics import confusion_matrix

VOID = 255


def blobs(seed, size, num_labels, void=VOID, smooth=2):
    """Two smooth label maps of which one resembles the other, with patches of void in the second."""
    draw = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(draw.normal(size=size), smooth) for _ in range(num_labels + 1)])
    *_, hole = fields
    fields = fields[:-1]
    reference = fields.argmax(0)
    prediction = (fields + 0.4 * np.roll(fields, 3, axis=2)).argmax(0)
    reference[hole > 1.8 * hole.std()] = void
    return torch.from_numpy(prediction), torch.from_numpy(reference)


def outline(mask, distance):
    """Pixels of a mask that its erosion by a 3×3 square, `distance` times, takes away; the picture's edge too."""
    square = np.ones((3, 3))
    return mask & ~ndimage.binary_erosion(mask, square, iterations=distance, border_value=0)


def ratio(part, whole):
    return part / whole if whole else math.nan


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "void"), [((41, 58), VOID), ((30, 33), -100)])
def test_boundary_iou_is_that_of_eroded_masks(seed, size, void):
    prediction, reference = blobs(seed, size, 4, void)
    counts = boundary_counts(prediction, reference, 5, void).numpy()
    found = boundary_scores(counts)
    distance = boundary_distance(*size)
    expected = []
    scored = (reference != void).numpy()
    for label in range(5):
        mine = outline((reference == label).numpy(), distance)
        theirs = outline((prediction == label).numpy() & scored, distance)
        expected.append(ratio((mine & theirs).sum(), (mine | theirs).sum()))
    assert found["per_category_boundary_iou"] == pytest.approx(expected, nan_ok=True)
    assert math.isnan(expected[4]) and 0.1 < np.mean(expected[:4]) < 0.95
    assert found["boundary_iou"] == pytest.approx(np.mean(expected[:4]))


@pytest.mark.parametrize("seed", range(3))
def test_trimap_is_the_iou_inside_bands_by_brute_force(seed):
    prediction, reference = blobs(seed, (70, 90), 3, smooth=8)
    found = boundary_scores(boundary_counts(prediction, reference, 3, VOID).numpy())["trimap_mean_iou"]
    labels, previous = reference.numpy(), 0
    for width in TRIMAP_WIDTHS:
        band = np.zeros(labels.shape, bool)
        for row, column in np.ndindex(labels.shape):
            rows = slice(max(0, row - width), row + width + 1)
            columns = slice(max(0, column - width), column + width + 1)
            band[row, column] = (labels[rows, columns] != labels[row, column]).any()
        band &= labels != VOID
        assert band.sum() > previous
        previous = band.sum()
        matrix = confusion_matrix(prediction[band], reference[band], 3, VOID).numpy()
        hits = np.diag(matrix)
        assert found[width] == pytest.approx((hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean())


def test_void_that_outlines_objects_gives_the_dilated_void():
    # The papers' trimap: void, dilated, without void itself.
    reference = torch.zeros(24, 30, dtype=torch.long)
    reference[6:15, 8:19] = VOID
    reference[8:13, 10:17] = 1
    bands = near_other(reference, TRIMAP_WIDTHS)
    for width, band in zip(TRIMAP_WIDTHS, bands.numpy(), strict=True):
        void = (reference == VOID).numpy()
        dilated = ndimage.binary_dilation(void, np.ones((3, 3)), iterations=width)
        assert np.array_equal(band & ~void, dilated & ~void)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 9999),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.lists(st.integers(1, 30), min_size=1, max_size=3, unique=True),
    st.booleans(),
)
def test_near_other_looks_at_the_square_around_each_pixel(seed, size, distances, with_edge):
    labels = np.random.default_rng(seed).integers(0, 2, size) * (seed % 3 - 1)
    distances = tuple(sorted(distances))
    found = near_other(torch.from_numpy(labels), distances, with_edge)
    for distance, band in zip(distances, found.numpy(), strict=True):
        for row, column in np.ndindex(*size):
            rows, columns = (range(place - distance, place + distance + 1) for place in (row, column))
            seen = {
                labels[r, c] if 0 <= r < size[0] and 0 <= c < size[1] else None if with_edge else labels[row, column]
                for r in rows
                for c in columns
            }
            assert band[row, column] == (len(seen) > 1)


def test_a_perfect_prediction_scores_one_everywhere():
    _, reference = blobs(1, (40, 44), 3)
    prediction = torch.where(reference == VOID, 2, reference)
    found = boundary_scores(boundary_counts(prediction, reference, 3, VOID).numpy())
    assert found["boundary_iou"] == 1.0 and set(found["trimap_mean_iou"].values()) == {1.0}


def test_without_anything_scored_there_is_no_score():
    reference = torch.full((9, 7), VOID)
    found = boundary_scores(boundary_counts(torch.zeros_like(reference), reference, 2, VOID).numpy())
    assert math.isnan(found["boundary_iou"]) and all(math.isnan(iou) for iou in found["trimap_mean_iou"].values())


def test_small_object_weighs_more_than_in_iou():
    # Cheng et al., section 3: shifting a large square costs little IoU and much boundary IoU.
    reference = torch.zeros(200, 200, dtype=torch.long)
    reference[40:160, 40:160] = 1
    prediction = reference.roll(4, 1)
    boundary = boundary_scores(boundary_counts(prediction, reference, 2, VOID).numpy())["per_category_boundary_iou"]
    matrix = confusion_matrix(prediction, reference, 2, VOID).numpy()
    iou = matrix[1, 1] / (matrix[1].sum() + matrix[:, 1].sum() - matrix[1, 1])
    assert boundary_distance(200, 200) == 6
    # outlines of 120² - 108² pixels; in common are two bars of 116 × 6 and two of 2 × 108
    common = 2 * 116 * 6 + 2 * 2 * 108
    assert boundary[1] == pytest.approx(common / (2 * (120**2 - 108**2) - common))
    assert iou > 0.93 > 0.6 > boundary[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_are_the_same_on_the_device():
    prediction, reference = blobs(2, (70, 90), 4)
    found = boundary_counts(prediction.cuda(), reference.cuda(), 4, VOID)
    assert torch.equal(found.cpu(), boundary_counts(prediction, reference, 4, VOID))
