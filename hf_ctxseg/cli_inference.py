"""The verbs `ctxseg eval` and `ctxseg predict`."""

import argparse
import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

from .cli_parser import make_parser


def run_eval(argv: list[str]) -> int:
    """Run `ctxseg eval`; give the exit code."""
    parser = make_parser("eval", "ctxseg eval runs/a --data my_folder --split val")
    parser.add_argument("model", help="run folder, or name of a model on the Hub")
    parser.add_argument("--data", required=True, help="folder, parquet, or Hub data set")
    parser.add_argument("--recipe", help="known data set (see ctxseg models --recipes), or a recipe file")
    parser.add_argument("--split", help="split that is scored (default: the validation split)")
    parser.add_argument("--labels", help="class names, where the data has none: file, or names with commas")
    parser.add_argument("--ignore_index", type=int, help="label value without a class")
    parser.add_argument("--image_column", help="column of the pictures in a table")
    parser.add_argument("--label_column", help="column of the label maps in a table")
    parser.add_argument("--output_dir", help="where metrics and preview go (default: MODEL/eval-SPLIT)")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures per step and device")
    _add_views(parser)
    parser.add_argument("--report", choices=("table", "json", "csv"), default="table", help="what is printed")
    options = vars(parser.parse_args(argv))
    report = options.pop("report")
    from .evaluation import evaluate

    metrics = evaluate(options.pop("model"), options.pop("data"), **options, say=_to_stderr)
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, one speaks
        _print_scores(metrics["evaluation"], report)
    return 0


def _add_views(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", type=int, help="edge of sliding windows in pixels (default: whole pictures)")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of a window that the next one covers too")
    parser.add_argument("--blend", choices=("gaussian", "constant"), default="gaussian", help="weights of windows")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="factors of the pictures' size")
    parser.add_argument("--flip", action="store_true", help="look at each mirrored left to right, too")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _print_scores(scores: dict[str, Any], report: str) -> None:
    from .run_folder import without_nan
    from .scoring import score_table

    if report == "table":
        print(score_table(scores))
        return
    scores = without_nan(scores)
    if report == "json":
        print(json.dumps(scores, indent=2, ensure_ascii=False))
    else:
        writer = csv.writer(sys.stdout)
        writer.writerow(["class", "iou", "accuracy", "boundary_iou"])
        for name, iou in scores["per_category_iou"].items():
            accuracy, boundary = (scores[f"per_category_{measure}"][name] for measure in ("accuracy", "boundary_iou"))
            writer.writerow([name, iou, accuracy, boundary])


def run_predict(argv: list[str]) -> int:
    """Run `ctxseg predict`; give the exit code."""
    parser = make_parser("predict", "ctxseg predict runs/a photo.jpg more_photos/ --out masks")
    parser.add_argument("model", help="run folder, or name of a model on the Hub")
    parser.add_argument("images", nargs="+", help="picture files, and folders of them")
    parser.add_argument("--out", required=True, type=Path, help="folder for NAME_mask.png and NAME_overlay.png")
    parser.add_argument(
        "--attention",
        type=_pixel,
        metavar="X,Y",
        help="also draw what this pixel looks at in a model's non-local block: NAME_attention.png",
    )
    _add_views(parser)
    options = parser.parse_args(argv)
    from .inference import Predictor, find_pictures, predict_files

    list(find_pictures(options.images))
    views = {name: getattr(options, name) for name in ("window", "overlap", "blend", "scales", "flip")}
    predictor = Predictor(options.model, **views)
    written, failed = predict_files(predictor, options.images, options.out, options.attention)
    for path in written:
        print(path)
    for message in failed:
        print(f"ctxseg predict: {message}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(written) + len(failed)} pictures could not be segmented.", file=sys.stderr)
    return 1 if failed else 0


def _pixel(text: str) -> tuple[int, int]:
    try:
        x, y = (int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pixel: give its column and row, for example 120,80"
        ) from error
    return x, y
