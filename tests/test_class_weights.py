import json
import math

import numpy as np
import pytest
import torch
from training_helpers import NAMES, as_arguments, make_data

import hf_ctxseg
from hf_ctxseg.arguments import read_yaml
from hf_ctxseg.class_weights import (
    check_class_weights,
    effective_number_weights,
    find_class_weights,
    median_frequency_weights,
)
from hf_ctxseg.data import load_data
from hf_ctxseg.label_scan import LabelStatistics, scan_labels
from hf_ctxseg.losses import SegmentationLoss


def statistics(histogram, image_pixels=None):
    histogram = np.array(histogram)
    image_pixels = np.full(len(histogram), 1000) if image_pixels is None else np.array(image_pixels)
    return LabelStatistics(histogram, 0, 10, (histogram > 0).astype(int), image_pixels, ((10, 10), (10, 10)))


def test_median_frequency_counts_the_images_in_which_a_class_occurs():
    # Frequencies 0.8, 0.1 and 20 of 100 = 0.2, of which 0.2 is the median; the third class occurs in few images
    weights = median_frequency_weights(statistics([800, 100, 20, 0], [1000, 1000, 100, 0]))
    assert weights == pytest.approx((0.25, 2.0, 1.0, 1.0))


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999])
def test_effective_numbers_are_sums_of_powers(beta):
    counts = [700, 50, 3]
    effective = [sum(beta**power for power in range(count)) for count in counts]  # 1 + beta + beta^2 + …
    mean = sum(1 / number for number in effective) / 3
    weights = effective_number_weights(statistics([*counts, 0]), beta)
    assert weights == pytest.approx([*(1 / number / mean for number in effective), 1.0])


def test_effective_numbers_do_not_depend_on_the_size_of_the_data_set():
    small = effective_number_weights(statistics([7000, 2000, 100]))
    assert small == pytest.approx(effective_number_weights(statistics([7_000_000, 2_000_000, 100_000])), rel=1e-2)
    assert small[0] < small[1] < small[2] < 70 * small[0]
    assert effective_number_weights(statistics([5, 5])) == pytest.approx((1.0, 1.0))
    assert effective_number_weights(statistics([1])) == pytest.approx((1.0,))


def test_the_scan_counts_what_the_weights_need(tmp_path):
    data = load_data(make_data(tmp_path / "data"))
    found = scan_labels(data.train, data.classes, split="train", progress=False)
    labels = [data.train.label(index) for index in range(len(data.train))]
    expected = [sum(label.size for label in labels if (label == k).any()) for k in range(3)]
    assert found.image_pixels.tolist() == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("none", ["none"]),
        (["median_frequency"], ["median_frequency"]),
        ("effective_number(beta=0.9999)", ["effective_number(beta=0.9999)"]),
        ([1, 2.5, 0], ["1", "2.5", "0"]),
    ],
)
def test_weights_are_given_in_words_or_numbers(given, words):
    assert check_class_weights(given) == words


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("median", "class_weights is 'median', but must be none, median_frequency, effective_number"),
        ([1, -2], "class_weights is '1 -2', but must be"),
        ([0, 0], "not all 0"),
        ([1, math.nan], "class_weights is '1 nan'"),
        ([], "class_weights is ''"),
        ("effective_number(beta=1)", "beta=1, but it must lie between 0 and 1"),
        ("effective_number(beta=x)", "beta=x, but it must lie between 0 and 1"),
    ],
)
def test_other_weights_are_refused(given, message):
    with pytest.raises(ValueError) as caught:
        check_class_weights(given)
    assert message in str(caught.value)


def test_there_is_one_number_for_each_class():
    found = statistics([5, 5, 5])
    assert find_class_weights(["1", "2.5", "0"], found, NAMES) == (1.0, 2.5, 0.0)
    assert find_class_weights(["none"], found, NAMES) is None
    with pytest.raises(ValueError, match=r"holds 2 numbers, but there are 3 classes: .* ground, disc, box"):
        find_class_weights(["1", "2"], found, NAMES)


def test_a_run_measures_the_weights_trains_with_them_and_writes_them_down(tmp_path, monkeypatch):
    seen = []
    count = SegmentationLoss.count
    monkeypatch.setattr(
        SegmentationLoss, "count", lambda self, labels: seen.append(self.class_weights) or count(self, labels)
    )
    data = make_data(tmp_path / "data")
    settings = {"class_weights": "median_frequency", "loss": "ohem(top_k=0.5)+dice", "label_smoothing": 0.1}
    hf_ctxseg.train(**as_arguments(data=data, output_dir=tmp_path / "run", max_steps=1, **settings))
    splits = load_data(data)
    expected = median_frequency_weights(scan_labels(splits.train, splits.classes, split="train", progress=False))
    assert min(expected) < 0.5 and max(expected) > 1.05
    assert all(torch.equal(weights, torch.tensor(expected)) for weights in seen) and seen
    training = json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]
    assert training["class_weights"] == pytest.approx(dict(zip(NAMES, expected, strict=True)))
    assert training["loss"] == "ohem(top_k=0.5)+dice" and training["label_smoothing"] == 0.1
    assert read_yaml(tmp_path / "run" / "args.yaml")["class_weights"] == "median_frequency"
