"""Score a model with and without a dense CRF: what `DenseCRF` gains or costs on a labelled split.

python scripts/crf_gain.py runs/a --data camvid --recipe camvid --crf default deeplabv1 deeplabv2
"""

import argparse
import sys
from pathlib import Path

# Python looks into the folder of this file first, where evaluate.py would hide the library of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402

from hf_ctxseg import DenseCRF  # noqa: E402
from hf_ctxseg.boundary_metrics import boundary_counts, boundary_scores, empty_boundary_counts  # noqa: E402
from hf_ctxseg.crf import PRESETS  # noqa: E402
from hf_ctxseg.data import load_data  # noqa: E402
from hf_ctxseg.inference import Predictor  # noqa: E402
from hf_ctxseg.metrics import MeanIoU, confusion_matrix  # noqa: E402


def main(arguments: list[str]) -> int:
    """Print a table of scores: without a CRF, then with each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder, or name of a model on the Hub")
    parser.add_argument("--data", required=True, help="folder, parquet, or Hub data set")
    parser.add_argument("--recipe", help="known data set, or a recipe file")
    parser.add_argument("--split", help="split that is scored (default: the validation split)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="score every N-th picture alone")
    parser.add_argument("--crf", nargs="+", choices=PRESETS, default=list(PRESETS), help="parameters to try")
    given = parser.parse_args(arguments)
    predictor = Predictor(given.model)
    model, processor, names = predictor.model, predictor.processor, predictor.names
    data = load_data(given.data, recipe=given.recipe, train_split=None, eval_split=given.split, default_labels=names)
    samples, classes = data.validation, (len(names), data.classes.ignore_index)
    crfs = {"none": None} | {name: DenseCRF.preset(name) for name in given.crf}
    scores = {name: (MeanIoU(*classes), empty_boundary_counts(len(names))) for name in crfs}
    for index in range(0, len(samples), given.every):
        picture, label = samples.image(index), torch.as_tensor(samples.label(index)).long()
        with torch.inference_mode():
            outputs = model(processor(picture, return_tensors="pt")["pixel_values"].to(model.device))
        for name, crf in crfs.items():
            mask = processor.post_process_semantic_segmentation(outputs, [label.shape], crf=crf, images=picture)[0]
            metric, boundary = scores[name]
            metric.add_matrix(confusion_matrix(mask.cpu(), label, *classes).numpy())
            boundary += boundary_counts(mask.cpu(), label, *classes).numpy()
    print("| CRF | mIoU | boundary IoU |\n|---|---|---|")
    for name, (metric, boundary) in scores.items():
        edges = boundary_scores(boundary)["boundary_iou"]
        print(f"| {name} | {metric.compute()['mean_iou']:.2%} | {edges:.2%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
