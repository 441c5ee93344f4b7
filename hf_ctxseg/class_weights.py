"""Weights of the classes in the loss, given as numbers or measured from the pixel counts of the label scan.

Rare classes get larger weights. A class that never occurs in the training labels has no frequency to measure: its
weight is 1, which is that of the median class and the mean of the effective numbers' weights.
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from .label_scan import LabelStatistics

_EFFECTIVE = re.compile(r"effective_number(?:\(\s*beta\s*=\s*([^()\s]+)\s*\))?")
_ALLOWED = "none, median_frequency, effective_number, effective_number(beta=0.999999) or one number for each class"


def check_class_weights(given: str | Sequence[str | float]) -> list[str]:
    """Give the argument `class_weights` as a list of words; raises `ValueError` if it says nothing that is allowed."""
    words = [given] if isinstance(given, str) else [str(word) for word in given]
    if words in (["none"], ["median_frequency"]):
        return words
    if len(words) == 1 and (found := _EFFECTIVE.fullmatch(words[0].strip())):
        if found[1] is not None and not 0 < (_number(found[1]) or 0) < 1:
            raise ValueError(f"class_weights has beta={found[1]}, but it must lie between 0 and 1, both excluded.")
        return words
    numbers = [_number(word) for word in words]
    if None in numbers or not any(numbers):
        raise ValueError(f"class_weights is {' '.join(words)!r}, but must be {_ALLOWED}, from 0 on and not all 0.")
    return words


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None


def find_class_weights(
    given: Sequence[str], statistics: LabelStatistics, names: Sequence[str]
) -> tuple[float, ...] | None:
    """Weight of each class, or None for `none`.

    Args:
        given: What `check_class_weights` gives.
        statistics: Of the training labels.
        names: Of the classes.

    Raises:
        ValueError: If there are numbers, but not one for each class.
    """
    if given[0] == "none":
        return None
    if given[0] == "median_frequency":
        return median_frequency_weights(statistics)
    if found := _EFFECTIVE.fullmatch(given[0].strip()):
        return effective_number_weights(statistics, None if found[1] is None else float(found[1]))
    if len(given) != len(names):
        raise ValueError(
            f"class_weights holds {len(given)} numbers, but there are {len(names)} classes: give one for each of "
            f"{', '.join(names)}, in this order."
        )
    return tuple(float(word) for word in given)


def median_frequency_weights(statistics: LabelStatistics) -> tuple[float, ...]:
    """Median of the frequencies over the class's own (Eigen, Fergus, arXiv 1411.4734, section 6.3.2).

    The frequency of a class is its pixels over all pixels of the images in which it occurs.
    """
    present = statistics.histogram > 0
    frequencies = statistics.histogram[present] / statistics.image_pixels[present]
    weights = np.ones(len(present))
    weights[present] = np.median(frequencies) / frequencies
    return tuple(weights.tolist())


def effective_number_weights(statistics: LabelStatistics, beta: float | None = None) -> tuple[float, ...]:
    """Weights (1 - beta) / (1 - beta^n) for classes of n pixels, brought to a mean of 1 over the classes that occur.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", arXiv 1901.05555, equation 4. After about
    1 / (1 - beta) samples further ones add little. The paper's 0.9 to 0.9999 are for counts of pictures and would give
    all classes the same weight here, where pixels are counted; by default that number is the mean number of pixels of
    a class, so that the weights do not depend on the size of the data set.

    Args:
        statistics: Of the training labels.
        beta: Between 0 and 1; None: the default.
    """
    present = statistics.histogram > 0
    counts = statistics.histogram[present].astype(np.float64)
    rest = 1 / counts.mean() if beta is None else 1 - beta
    found = 1 / np.maximum(-np.expm1(counts * np.log1p(-min(rest, 1 - 1e-12))), 1e-300)
    weights = np.ones(len(present))
    weights[present] = found / found.mean()
    return tuple(weights.tolist())
