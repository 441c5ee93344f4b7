"""Compare masks by windows with those of whole pictures: python scripts/window_agreement.py runs/a photos/.

Photos are set beside each other, 3 × 3, so that the pictures are larger than a window at the scale of the training.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_ctxseg import CtxSegImageProcessor
from hf_ctxseg.inference import Predictor, load_run
from hf_ctxseg.prediction_files import find_pictures

_TILES = 3


def mosaic(paths: list[Path], processor: CtxSegImageProcessor) -> Image.Image:
    """Set nine photos beside and below each other, each at the size that the processor brings it to."""
    photos = [Image.open(path).convert("RGB") for path in paths]
    height, width = processor(images=photos[0], return_tensors="pt")["pixel_values"].shape[-2:]
    whole = Image.new("RGB", (_TILES * width, _TILES * height))
    for place, photo in enumerate(photos):
        row, column = divmod(place, _TILES)
        whole.paste(photo.resize((width, height)), (column * width, row * height))
    return whole


def main() -> None:
    """Print the share of equal pixels for each window and overlap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos")
    parser.add_argument("--windows", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--mosaics", type=int, default=2)
    options = parser.parse_args()
    model, processor = load_run(options.model)
    paths = [path for path, _ in find_pictures([options.photos])]
    count = _TILES**2
    starts = range(0, count * options.mosaics, count)
    pictures = [mosaic(paths[start : start + count], processor) for start in starts]
    processor.do_resize = False
    wholes = [Predictor(model, processor, memory="1TiB")(picture).mask for picture in pictures]
    for window in options.windows:
        tiler = Predictor(model, processor, window=window, overlap=options.overlap)
        equal = [(tiler(each).mask == whole).mean() for each, whole in zip(pictures, wholes, strict=True)]
        print(f"window {window}, overlap {options.overlap:g}: {sum(equal) / len(equal):.4%} equal", flush=True)


if __name__ == "__main__":
    main()
