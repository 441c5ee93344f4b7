import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_ctxseg.samples import ClassInfo
from hf_ctxseg.scoring import StreamedScores, count_picture, named_scores, score_table, worst_confusions

NAMES = ("sky", "traffic light", "road")
CLASSES = ClassInfo(NAMES, ((0, 0, 0), (1, 1, 1), (2, 2, 2)))


def counts(seed, size=(12, 17)):
    """What is counted of a random picture in which the last class does not occur."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 3, 3, 4, generator=draw)
    logits[:, 2] -= 100
    label = torch.randint(0, 2, size, generator=draw)
    label[0] = 255
    return count_picture([logits], label, 3, 255, False)


def stream(batches):
    """Scores of pictures that come in these batches."""
    scores, result = StreamedScores(CLASSES), {}
    for number, batch in enumerate(batches, start=1):
        matrices, boundary, losses = (torch.stack(parts) for parts in zip(*batch, strict=True))
        gathered = SimpleNamespace(predictions=(matrices, boundary), label_ids=losses)
        result = scores(gathered, compute_result=number == len(batches))
        assert bool(result) == (number == len(batches))
    return scores, result


def test_batches_do_not_matter():
    pictures = [counts(seed) for seed in range(5)]
    (one, result), (other, same) = stream([pictures]), stream([pictures[3:], pictures[:1], pictures[1:3]])
    assert result == pytest.approx(same) and result["loss"] > 0
    np.testing.assert_equal(one.last["confusion_matrix"], other.last["confusion_matrix"])
    assert set(result) == {
        "mean_iou", "frequency_weighted_iou", "boundary_iou", "mean_accuracy", "overall_accuracy", "loss"
    }  # fmt: skip


def test_each_evaluation_starts_anew():
    scores, _ = stream([[counts(1)]])
    first = scores.last
    matrix, boundary, loss = (part[None] for part in counts(1))
    scores(SimpleNamespace(predictions=(matrix, boundary), label_ids=loss))
    np.testing.assert_equal(scores.last, first)


def test_nothing_scored_is_no_number():
    _, result = stream([[count_picture([torch.zeros(1, 3, 2, 2)], torch.full((5, 5), 255), 3, 255, False)]])
    assert result.pop("loss") == 0 and all(math.isnan(value) for value in result.values())


def test_a_label_without_a_class_is_refused():
    with pytest.raises(ValueError, match="Reference holds 7"):
        count_picture([torch.zeros(1, 3, 2, 2)], torch.full((5, 5), 7), 3, 255, False)


def test_names_stand_for_numbers():
    scores, _ = stream([[counts(1), counts(2)]])
    named = named_scores(scores.last, NAMES)
    assert named["absent_classes"] == ["road"] and math.isnan(named["per_category_boundary_iou"]["road"])
    assert named["per_category_iou"]["sky"] == scores.last["per_category_iou"][0]
    assert list(named["trimap_mean_iou"]) == ["1", "2", "4", "8", "16"]
    assert "confusion_matrix" not in named


def test_worst_confusions_are_named_in_order():
    matrix = np.array([[50, 3, 0], [20, 60, 20], [9, 0, 1]])
    assert worst_confusions(matrix, NAMES) == [
        {"reference": "traffic light", "prediction": "sky", "pixels": 20, "share": 0.2},
        {"reference": "traffic light", "prediction": "road", "pixels": 20, "share": 0.2},
        {"reference": "road", "prediction": "sky", "pixels": 9, "share": 0.9},
        {"reference": "sky", "prediction": "traffic light", "pixels": 3, "share": 3 / 53},
    ]
    assert worst_confusions(np.eye(3, dtype=int), NAMES) == []
    assert len(worst_confusions(np.ones((9, 9), dtype=int), "abcdefghi")) == 10


def test_score_table_shows_absent_classes():
    scores = {
        "per_category_iou": {"sky": 0.5, "traffic light": math.nan},
        "per_category_accuracy": {"sky": 0.75, "traffic light": math.nan},
        "per_category_boundary_iou": {"sky": 0.25, "traffic light": math.nan},
        "mean_iou": 0.5,
        "mean_accuracy": 0.75,
        "boundary_iou": 0.25,
        "frequency_weighted_iou": 0.625,
        "overall_accuracy": 0.875,
        "trimap_mean_iou": {"1": 0.1, "2": 0.2},
    }
    assert [line.split() for line in score_table(scores).splitlines()] == [
        ["class", "IoU", "accuracy", "boundary", "IoU"],
        ["sky", "0.5000", "0.7500", "0.2500"],
        ["traffic", "light", "absent", "absent", "absent"],
        ["mean", "0.5000", "0.7500", "0.2500"],
        ["pixel", "accuracy", "0.8750"],
        ["frequency-weighted", "IoU", "0.6250"],
        ["mean", "IoU", "near", "edges:", "1", "px", "0.1000,", "2", "px", "0.2000"],
    ]
