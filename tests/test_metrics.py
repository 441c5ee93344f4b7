import copy
import math
import pickle

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_matrix

from hf_ctxseg.metrics import MeanIoU, confusion_matrix, scores


def make_masks(seed, num_labels=4, shape=(3, 9, 11), ignore_index=255):
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, num_labels, shape)
    prediction = np.where(rng.random(shape) < 0.6, reference, rng.integers(0, num_labels, shape))
    reference[rng.random(shape) < 0.1] = ignore_index
    return prediction, reference


def iou_by_sets(prediction, reference, label, ignore_index):
    counted = {i for i, value in enumerate(reference.ravel()) if value != ignore_index}
    said = {i for i, value in enumerate(prediction.ravel()) if value == label} & counted
    true = {i for i, value in enumerate(reference.ravel()) if value == label}
    return len(said & true) / len(said | true) if said | true else math.nan


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_matrix_equals_sklearn(dtype):
    prediction, reference = make_masks(0)
    matrix = confusion_matrix(torch.tensor(prediction).to(dtype), torch.tensor(reference).to(dtype), 4, 255)
    valid = reference != 255
    assert matrix.dtype == torch.int64
    np.testing.assert_array_equal(matrix, sklearn_matrix(reference[valid], prediction[valid], labels=range(4)))


@pytest.mark.parametrize("ignore_index", [255, -100, 6, -1])
def test_scores_equal_set_arithmetic_for_any_ignored_value(ignore_index):
    prediction, reference = make_masks(1, ignore_index=ignore_index)
    prediction[prediction == 3] = 0
    metric = MeanIoU(6, ignore_index=ignore_index)
    result = metric.compute(predictions=prediction, references=reference)
    expected = [iou_by_sets(prediction, reference, label, metric.ignore_index) for label in range(6)]
    np.testing.assert_allclose(result["per_category_iou"], expected, rtol=1e-12)
    assert result["per_category_iou"][3] == 0
    assert math.isnan(result["per_category_iou"][5])
    assert result["mean_iou"] == pytest.approx(np.mean(expected[:4]))
    valid = reference != ignore_index
    assert result["overall_accuracy"] == pytest.approx((prediction == reference)[valid].mean())
    recalls = [(prediction[reference == label] == label).mean() for label in range(4)]
    assert result["mean_accuracy"] == pytest.approx(np.mean(recalls))


def test_scores_of_a_matrix_worked_out_by_hand():
    # Class 2 is never true but predicted twice: IoU 0 counts in the mean; class 3 is absent from both sides.
    matrix = np.array([[3, 1, 0, 0], [0, 4, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = scores(matrix)
    np.testing.assert_allclose(result["per_category_iou"], [3 / 4, 4 / 7, 0, np.nan])
    np.testing.assert_allclose(result["per_category_accuracy"], [3 / 4, 4 / 6, np.nan, np.nan])
    assert result["mean_iou"] == pytest.approx((3 / 4 + 4 / 7) / 3)
    assert result["mean_accuracy"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert result["overall_accuracy"] == pytest.approx(7 / 10)
    assert result["frequency_weighted_iou"] == pytest.approx(4 / 10 * 3 / 4 + 6 / 10 * 4 / 7)


def test_false_positives_lower_the_iou():
    # The stock metric's reported fault: predictions of a class on other ground go uncounted.
    result = MeanIoU(2).compute(predictions=np.ones((1, 2, 2), int), references=np.array([[[1, 0], [0, 0]]]))
    assert result["per_category_iou"] == [0.0, 0.25]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(0, 10_000), st.data())
def test_any_order_and_any_split_gives_the_same_matrix(num_labels, seed, data):
    rng = np.random.default_rng(seed)
    sizes = [tuple(rng.integers(1, 6, 2)) for _ in range(rng.integers(1, 6))]
    pairs = [make_masks(seed + i, num_labels, size) for i, size in enumerate(sizes)]
    whole, shuffled = MeanIoU(num_labels), MeanIoU(num_labels)
    whole.add_batch(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])
    for prediction, reference in data.draw(st.permutations(pairs)):
        shuffled.add(prediction=torch.tensor(prediction), reference=torch.tensor(reference))
    np.testing.assert_array_equal(whole.confusion_matrix, shuffled.confusion_matrix)
    assert whole.confusion_matrix.sum() == sum((reference != 255).sum() for _, reference in pairs)
    result = whole.compute()
    present = [value for value in result["per_category_iou"] if not math.isnan(value)]
    assert all(0 <= value <= 1 for value in present)
    assert len(whole) == 0 and len(shuffled) == len(pairs)


def test_is_an_evaluate_metric_and_combines_with_others():
    metric = MeanIoU(3, class_names=["sky", "road", "car"])
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == "mean_io_u" and metric.class_names == ["sky", "road", "car"]
    prediction, reference = make_masks(2, 3)
    combined = evaluate.combine([metric])
    combined.add_batch(predictions=prediction, references=reference)
    alone = MeanIoU(3).compute(predictions=prediction, references=reference)
    np.testing.assert_equal(combined.compute(), alone)


def test_compute_starts_anew_and_the_property_is_a_copy():
    metric = MeanIoU(2)
    metric.add(prediction=[[0, 1]], reference=[[0, 0]])
    metric.confusion_matrix[:] = 99
    assert metric.confusion_matrix.tolist() == [[1, 1], [0, 0]]
    assert metric.compute()["mean_iou"] == pytest.approx(0.25)
    assert metric.confusion_matrix.sum() == 0
    assert metric.compute(predictions=[[[1]]], references=[[[1]]])["mean_iou"] == 1.0


def test_merging_matrices_equals_adding_the_pictures():
    prediction, reference = make_masks(3)
    whole, merged = MeanIoU(4), MeanIoU(4)
    whole.add_batch(predictions=prediction, references=reference)
    for p, r in zip(prediction, reference, strict=True):
        merged.add_matrix(confusion_matrix(torch.tensor(p), torch.tensor(r), 4, 255))
    np.testing.assert_array_equal(whole.confusion_matrix, merged.confusion_matrix)


def test_nothing_valid_gives_nan_without_warning():
    metric = MeanIoU(3)
    for result in (metric.compute(), metric.compute(predictions=[[[0, 1]]], references=[[[255, 255]]])):
        assert all(math.isnan(result[key]) for key in ("mean_iou", "mean_accuracy", "overall_accuracy"))
        assert all(math.isnan(value) for value in result["per_category_iou"])


def test_memory_and_disk_stay_flat(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    metric = MeanIoU(3)
    prediction, reference = make_masks(4, 3, (2, 64, 64))
    metric.add_batch(predictions=prediction, references=reference)
    size = len(pickle.dumps(metric))
    for _ in range(50):
        metric.add_batch(predictions=prediction, references=reference)
    assert len(pickle.dumps(metric)) <= size + 16
    metric.compute()
    assert not list(tmp_path.iterdir())


def test_copies_do_not_share_counts():
    metric = MeanIoU(2)
    metric.add(prediction=[[0]], reference=[[0]])
    twin = copy.deepcopy(metric)
    twin.add(prediction=[[1]], reference=[[1]])
    assert (metric.confusion_matrix.sum(), twin.confusion_matrix.sum()) == (1, 2)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0, 1]], [[7, 7]], r"Reference holds 7 \(2 pixels\), but only the class ids 0 to 2 or 255 \(ignored\)"),
        ([[0, 1]], [[-100, 1]], r"Reference holds -100 \(1 pixel\)"),
        ([[0, 3]], [[0, 1]], r"Prediction holds 3 \(1 pixel\), but only the class ids 0 to 2 are"),
        ([[0, 255]], [[0, 255]], r"Prediction holds 255"),
        ([[0, 1]], [[0], [1]], r"same shape, but the prediction is \(1, 2\) and the reference \(2, 1\)"),
        ([[0.0, 1.0]], [[0, 1]], "must be integers, but a mask holds float64"),
        (torch.rand(1, 2), torch.zeros(1, 2, dtype=torch.long), "prediction is torch.float32"),
        (None, [[0]], "one of them is missing"),
    ],
)
def test_wrong_masks_are_refused_and_not_counted(prediction, reference, message):
    metric = MeanIoU(3)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference)
    assert metric.confusion_matrix.sum() == 0


def test_a_refused_batch_leaves_no_trace():
    metric = MeanIoU(2)
    with pytest.raises(ValueError, match="Prediction holds 9"):
        metric.add_batch(predictions=[[[0]], [[9]]], references=[[[0]], [[0]]])
    assert metric.confusion_matrix.sum() == 0
    with pytest.raises(ValueError, match="holds 1 and 2"):
        metric.add_batch(predictions=[[[0]]], references=[[[0]], [[0]]])
    with pytest.raises(ValueError, match="missing"):
        metric.compute(predictions=[[[0]]])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [(np.zeros((3, 3), int), r"\(3, 3\), but"), (-np.eye(2, dtype=int), "0 or more"), (np.eye(2), "float64")],
)
def test_wrong_matrices_are_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(2).add_matrix(matrix)


def test_wrong_constructor_arguments():
    with pytest.raises(ValueError, match="ignore_index 255 is one of the class ids 0 to 299"):
        MeanIoU(300)
    with pytest.raises(ValueError, match="num_labels is 0"):
        MeanIoU(0)
    with pytest.raises(ValueError, match="1 names for 2 classes"):
        MeanIoU(2, class_names=["sky"])


def test_counts_beyond_32_bits_are_exact():
    metric = MeanIoU(2)
    metric.add_matrix(np.array([[2**40, 0], [0, 1]]))
    metric.add(prediction=[[0]], reference=[[0]])
    assert metric.confusion_matrix.tolist() == [[2**40 + 1, 0], [0, 1]]


def test_n8_counts_of_millions_of_pixels_are_exact_in_any_order():
    """Row N8: exact int64 counts, whatever the order; the absent class left out of the mean, and NaN."""
    rng = np.random.default_rng(0)
    pairs = [make_masks(seed, 5, (int(height), 2000)) for seed, height in enumerate(rng.integers(100, 900, 6))]
    found = []
    for order in (range(6), reversed(range(6))):
        metric = MeanIoU(7)
        for index in order:
            metric.add(prediction=torch.tensor(pairs[index][0]), reference=torch.tensor(pairs[index][1]))
        assert metric.confusion_matrix.dtype == np.int64
        found.append((metric.confusion_matrix, metric.compute()))
    (matrix, result), (again, same) = found
    np.testing.assert_array_equal(matrix, again)
    np.testing.assert_equal(result, same)
    prediction, reference = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    assert len(reference) > 3_000_000
    hits = [int(((prediction == label) & (reference == label)).sum()) for label in range(5)]
    unions = [int((((prediction == label) | (reference == label)) & (reference != 255)).sum()) for label in range(5)]
    expected = [hit / union for hit, union in zip(hits, unions, strict=True)]
    assert result["per_category_iou"][:5] == expected and result["mean_iou"] == pytest.approx(np.mean(expected))
    assert all(math.isnan(iou) for iou in result["per_category_iou"][5:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_matrix_is_the_same_on_the_device():
    prediction, reference = (torch.tensor(mask) for mask in make_masks(5))
    on_device = confusion_matrix(prediction.cuda(), reference.cuda(), 4, 255)
    assert on_device.device.type == "cuda"
    assert torch.equal(on_device.cpu(), confusion_matrix(prediction, reference, 4, 255))
