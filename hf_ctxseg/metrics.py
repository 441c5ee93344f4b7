"""Segmentation scores from one (K, K) confusion matrix, as an `evaluate` metric of constant memory.

The stock `mean_iou` needs the network to load, keeps every mask of the set on disk, and drops predictions along with
ignored labels, so that it drifts towards recall. Here only counts are kept. Rows are the reference, columns the
prediction. A pixel is left out by its *reference* alone; a class that neither side holds (union 0) is left out of the
means and is NaN in the lists; accuracies are averaged over the classes that the reference holds.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import NDArray

_PAIRS = 1 << 20  # of ids that are counted at once: few enough for a processor's cache

_DESCRIPTION = "Mean intersection over union and accuracies of semantic segmentation, from streamed counts."
_INPUTS = """
Args:
    predictions: Integer class ids, (B, H, W), or a list of (H, W) of any sizes.
    references: Integer class ids of the same shapes; `ignore_index` where a pixel is not to be counted.
"""


def confusion_matrix(
    prediction: torch.Tensor, reference: torch.Tensor, num_labels: int, ignore_index: int
) -> torch.Tensor:
    """Count how often each reference class was predicted as each class, on the tensors' own device.

    Args:
        prediction: Class ids of any integer type, any shape.
        reference: Class ids of the same shape; `ignore_index` where a pixel is not counted.
        num_labels: Number of classes K.
        ignore_index: Reference value left out, for example 255 or -100; never a class id.

    Returns:
        Counts, int64 (K, K): rows are the reference, columns the prediction.

    Raises:
        ValueError: Shapes differ, ids are not integers, or a value is outside 0..K-1 (and, in the reference, is not
            `ignore_index`).
    """
    _check_classes(num_labels, ignore_index)
    if prediction.shape != reference.shape:
        raise ValueError(
            f"Prediction and reference must have the same shape, but the prediction is {tuple(prediction.shape)} and "
            f"the reference {tuple(reference.shape)}. Resize the logits to the reference before taking the arg-max."
        )
    if any(ids.is_floating_point() or ids.is_complex() for ids in (prediction, reference)):
        raise ValueError(
            f"Class ids must be integers, but the prediction is {prediction.dtype} and the reference "
            f"{reference.dtype}. Take the arg-max of logits over the class dimension first."
        )
    prediction, reference = prediction.reshape(-1).long(), reference.reshape(-1).long()  # (N,) each
    rows = num_labels if ignore_index < 0 else max(num_labels, ignore_index + 1)
    if reference.numel() and rows * num_labels <= _PAIRS and prediction.device.type == "cpu":
        (low, high), (lowest, highest) = prediction.aminmax(), reference.aminmax()
        if low >= 0 and high < num_labels and lowest >= 0 and highest < rows:
            # Every pair counts, ignored ones too, in rows of their own: one pass, and no masks.
            pairs = torch.bincount(torch.add(prediction, reference, alpha=num_labels), minlength=rows * num_labels)
            counts = pairs.view(rows, num_labels)
            if not counts[num_labels : max(ignore_index, num_labels)].any():  # legal, or refused below
                return counts[:num_labels].clone()  # (K, K)
    counted = (reference >= 0) & (reference < num_labels)
    legal = (prediction >= 0) & (prediction < num_labels) & (counted | (reference == ignore_index))
    spare = num_labels * num_labels
    bins = torch.where(counted, reference * num_labels + prediction, spare)
    # Illegal pixels get a bin of their own: the check then costs no extra pass and no extra wait for the device.
    counts = torch.bincount(torch.where(legal, bins, spare + 1), minlength=spare + 2)
    if counts[-1]:
        _refuse_illegal("Reference", reference[reference != ignore_index], num_labels, f" or {ignore_index} (ignored)")
        _refuse_illegal("Prediction", prediction, num_labels, "")
    return counts[:spare].reshape(num_labels, num_labels)  # (K, K)


def scores(matrix: NDArray[Any]) -> dict[str, Any]:
    """Turn a confusion matrix into scores, named as in `evaluate`'s `mean_iou`.

    Args:
        matrix: Counts (K, K), rows reference, columns prediction.

    Returns:
        `mean_iou`, `frequency_weighted_iou` (each class by its share of the reference), `mean_accuracy` and
        `overall_accuracy` as floats in 0..1 (NaN where no pixel was counted), and `per_category_iou`,
        `per_category_accuracy` as lists of K floats, NaN for absent classes.
    """
    hits = np.diagonal(matrix).astype(np.float64)
    in_reference, in_prediction = matrix.sum(axis=1), matrix.sum(axis=0)
    iou = ratio(hits, in_reference + in_prediction - hits)
    accuracy = ratio(hits, in_reference)
    return {
        "mean_iou": mean_of_present(iou),
        "frequency_weighted_iou": _weighted_mean(iou, in_reference),
        "mean_accuracy": mean_of_present(accuracy),
        "overall_accuracy": float(ratio(hits.sum(keepdims=True), in_reference.sum(keepdims=True))[0]),
        "per_category_iou": iou.tolist(),
        "per_category_accuracy": accuracy.tolist(),
    }


class MeanIoU(evaluate.Metric):
    """Mean IoU as an `evaluate` metric that holds nothing but a confusion matrix.

    Used like any metric (`add`, `add_batch`, `compute`), but it writes no file and needs no network, and its memory
    depends on the number of classes only. `compute` starts the counts anew.

    Args:
        num_labels: Number of classes K.
        ignore_index: Reference value that is not counted; never a class id.
        class_names: K names, kept as the attribute `class_names` for whoever prints the lists.

    Shape:
        predictions: (B, H, W) integers, or a list of (H, W) of differing sizes.
        references: As predictions.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, class_names: Sequence[str] | None = None) -> None:
        _check_classes(num_labels, ignore_index)
        if class_names is not None and len(class_names) != num_labels:
            raise ValueError(
                f"class_names holds {len(class_names)} names for {num_labels} classes. Give one name per class."
            )
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.class_names = None if class_names is None else list(class_names)
        self._reset()
        super().__init__()

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        features = datasets.Features({"predictions": mask, "references": mask})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features
        )

    def _build_data_dir(self) -> str:
        # The base class makes a cache folder here; counts need none.
        return ""

    def _reset(self) -> None:
        self._matrix = np.zeros((self.num_labels, self.num_labels), dtype=np.int64)
        self._examples = 0

    def __len__(self) -> int:
        return self._examples

    @property
    def confusion_matrix(self) -> NDArray[np.int64]:
        """A copy of the counts since the last `compute`, (K, K), rows reference, columns prediction."""
        return self._matrix.copy()

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Count one picture.

        Args:
            prediction: Class ids (H, W), array, tensor or nested list.
            reference: Class ids of the same shape.

        Raises:
            ValueError: One of the two is missing, shapes differ, or a value is not a class id.
        """
        if prediction is None or reference is None:
            raise ValueError("add needs both a prediction and a reference; one of them is missing.")
        self._matrix += self._count(prediction, reference)
        self._examples += 1

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Count a batch of pictures; nothing of it is counted when one of them is refused.

        Args:
            predictions: Class ids (B, H, W), or a list of (H, W) of any sizes.
            references: As predictions.

        Raises:
            ValueError: One of the two is missing, lengths or shapes differ, or a value is not a class id.
        """
        if predictions is None or references is None:
            raise ValueError("A batch needs both predictions and references; one of them is missing.")
        if len(predictions) != len(references):
            raise ValueError(
                f"A batch needs as many predictions as references, but it holds {len(predictions)} and "
                f"{len(references)}."
            )
        pairs: Iterable[tuple[Any, Any]] = zip(predictions, references, strict=True)
        if all(hasattr(masks, "shape") for masks in (predictions, references)):
            pairs = [(predictions, references)]
        total = np.zeros_like(self._matrix)
        for prediction, reference in pairs:
            total += self._count(prediction, reference)
        self._matrix += total
        self._examples += len(predictions)

    def add_matrix(self, matrix: Any) -> None:
        """Merge counts made elsewhere: on a device, or by another process.

        Args:
            matrix: Integer counts (K, K), array or tensor, rows reference, columns prediction.

        Raises:
            ValueError: The shape is not (K, K), or the entries are not counts.
        """
        counts = np.asarray(matrix.cpu() if isinstance(matrix, torch.Tensor) else matrix)
        if counts.shape != self._matrix.shape:
            raise ValueError(
                f"The matrix to merge is {counts.shape}, but this metric counts {self.num_labels} classes and needs "
                f"{self._matrix.shape}."
            )
        if counts.dtype.kind not in "iu" or (counts < 0).any():
            raise ValueError(f"The matrix to merge must hold whole counts of 0 or more; found {counts.dtype} entries.")
        self._matrix += counts.astype(np.int64)

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any]:
        """Give the scores of all that was added, and start anew.

        Args:
            predictions: A last batch to add first, as in `add_batch`.
            references: As predictions.

        Returns:
            What `scores` gives; NaN means where no pixel was counted.

        Raises:
            ValueError: As `add_batch`.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        result = scores(self._matrix)
        self._reset()
        return result

    def _count(self, prediction: Any, reference: Any) -> NDArray[np.int64]:
        predicted, expected = _as_tensor(prediction), _as_tensor(reference)
        counts = confusion_matrix(predicted, expected.to(predicted.device), self.num_labels, self.ignore_index)
        matrix: NDArray[np.int64] = counts.cpu().numpy()
        return matrix


def _as_tensor(mask: Any) -> torch.Tensor:
    if isinstance(mask, torch.Tensor):
        return mask.detach()
    array = np.asarray(mask)
    if array.dtype.kind not in "iub" and array.size:
        raise ValueError(f"Class ids must be integers, but a mask holds {array.dtype} values.")
    return torch.from_numpy(array.astype(np.int64))


def _check_classes(num_labels: int, ignore_index: int) -> None:
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}; it must be 1 or more.")
    if 0 <= ignore_index < num_labels:
        raise ValueError(
            f"ignore_index {ignore_index} is one of the class ids 0 to {num_labels - 1}, so that class would never be "
            "counted. Choose a value that is no class, such as -100."
        )


def _refuse_illegal(side: str, values: torch.Tensor, num_labels: int, also: str) -> None:
    found, pixels = torch.unique(values[(values < 0) | (values >= num_labels)], return_counts=True)
    if not len(found):
        return
    listed = [
        f"{value} ({count} pixel{'s' if count > 1 else ''})"
        for value, count in zip(found.tolist(), pixels.tolist(), strict=True)
    ]
    more = f" and {len(listed) - 5} other values" if len(listed) > 5 else ""
    raise ValueError(
        f"{side} holds {', '.join(listed[:5])}{more}, but only the class ids 0 to {num_labels - 1}{also} are allowed. "
        "Correct the label map, the number of classes or ignore_index."
    )


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Divide; NaN where there is nothing to divide by."""
    quotient = np.full(part.shape, np.nan)
    np.divide(part, whole, out=quotient, where=whole > 0)
    return quotient


def mean_of_present(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not NaN; NaN where all are."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _weighted_mean(values: NDArray[np.float64], weights: NDArray[Any]) -> float:
    present = weights > 0
    return float(np.average(values[present], weights=weights[present])) if present.any() else float("nan")
