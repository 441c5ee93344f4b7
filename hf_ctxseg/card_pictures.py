"""The pictures of a model card: which of a run's files it shows, and the samples that the Hub offers for a try."""

import re
from pathlib import Path
from typing import Any

from PIL import Image

PLOTS = ("per_class.png", "confusion.png", "curves.png")
SAMPLES = "samples"
_EDGE = 640


def card_pictures(run: Path) -> list[str]:
    """List the pictures of a card, as paths inside the run folder: the newest preview, the samples and the plots."""
    run = Path(run)
    plots = [name for name in PLOTS if (run / name).is_file()]
    previews = [path for path in run.glob("previews/step-*.png") if re.fullmatch(r"step-\d+", path.stem)]
    newest = sorted(previews, key=lambda path: int(path.stem.removeprefix("step-")))[-1:]
    samples = sorted(path for path in run.glob(f"{SAMPLES}/*.jpg") if re.fullmatch(r"\d+", path.stem))
    return [*(path.relative_to(run).as_posix() for path in [*newest, *samples]), *plots]


def write_samples(run: Path, pictures: Any) -> None:
    """Write the first and the last of the validation pictures, which the Hub's page offers to try the model on.

    Args:
        run: The run folder.
        pictures: Labelled pictures, with `len()` and `image(i)`.
    """
    (run / SAMPLES).mkdir(exist_ok=True)
    for place, index in enumerate(sorted({0, len(pictures) - 1}), start=1):
        picture = pictures.image(index).convert("RGB")
        picture.thumbnail((_EDGE, _EDGE), Image.Resampling.LANCZOS)
        picture.save(run / SAMPLES / f"{place}.jpg", quality=90)
