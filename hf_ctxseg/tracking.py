"""What TensorBoard and Trackio get beside the numbers that Trainer logs: scores by class and the preview pictures."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import TrackioCallback


def track_evaluation(
    callbacks: Iterable[TrainerCallback], step: int, scores: Mapping[str, float], preview: Image.Image | None
) -> None:
    """Give the results of an evaluation to each tracker among the callbacks of a trainer.

    Args:
        callbacks: The callbacks.
        step: Optimisation steps done.
        scores: Numbers by name, such as `eval/iou/road`; those of absent classes, NaN, are left out.
        preview: Pictures with their masks, if any are drawn.
    """
    scores = {name: score for name, score in scores.items() if not math.isnan(score)}
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for name, score in scores.items():
                callback.tb_writer.add_scalar(name, score, step)
            if preview is not None:
                callback.tb_writer.add_image("previews", np.asarray(preview), step, dataformats="HWC")
            callback.tb_writer.flush()
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            trackio: Any = callback._trackio
            pictures = {} if preview is None else {"previews": trackio.Image(preview, caption=f"step {step}")}
            trackio.log({**scores, **pictures, "train/global_step": step})


def class_scores(scores: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Name the scores by class of `StreamedScores` as trackers group them: `eval/iou/road`, `eval/accuracy/road`."""
    return {
        f"eval/{measure}/{name}": float(score)
        for measure in ("iou", "accuracy")
        for name, score in zip(names, scores[f"per_category_{measure}"], strict=True)
    }
