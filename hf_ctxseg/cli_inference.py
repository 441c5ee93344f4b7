"""The verbs `ctxseg eval` and `ctxseg predict`."""

import argparse
import csv
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_parser import make_parser

if TYPE_CHECKING:
    from .inference import Predictor

_FILE_FLAGS = ("no_overlay", "probabilities", "attention", "frames", "json", "overwrite")


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
    parser.add_argument("--output_stride", type=int, help="input pixels per step of the deepest map [model's]")
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
    options = _predict_parser().parse_args(argv)
    from .dataset_prediction import is_dataset

    if options.memory is not None:
        from .memory_budget import parse_bytes

        parse_bytes(options.memory)
    if len(options.inputs) == 1 and is_dataset(options.inputs[0]):
        return _predict_dataset(options)
    with _sigterm_unwinds():
        return _predict_files(options)


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Leave on SIGTERM as on Ctrl-C, so that half files are removed."""
    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _predict_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "predict",
        "ctxseg predict runs/a photo.jpg more_photos/ 'scans/**/*.tif' --out masks\n"
        "       ctxseg predict runs/a holiday.mp4 --out masks\n"
        "       torchrun --nproc_per_node 2 -m hf_ctxseg.cli predict runs/a org/pictures --split test --out masks",
    )
    parser.add_argument("model", help="run folder, or name of a model on the Hub")
    parser.add_argument(
        "inputs", nargs="+", help="pictures, videos, folders of them and patterns; or one data set: parquet, Hub name"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for NAME_mask.png and NAME_overlay.png")
    _add_views(parser)
    parser.add_argument(
        "--memory",
        metavar="2GiB",
        help="what a picture may take; a larger one is looked at by windows [2GiB; of a GPU 80 %%]",
    )
    parser.add_argument(
        "--crf", metavar="PRESET", help="refine with a fully connected CRF: deeplabv1, deeplabv2, default …"
    )
    parser.add_argument("--device", help="where to compute: cpu, cuda, cuda:1 [a GPU if there is one]")
    parser.add_argument("--batch_size", type=int, default=1, help="neighbouring pictures of one size at a time [1]")
    files = parser.add_argument_group("pictures and videos")
    files.add_argument("--no_overlay", action="store_true", help="write masks alone")
    files.add_argument(
        "--probabilities", action="store_true", help="also NAME_probabilities.npy, float16 (H, W, classes)"
    )
    files.add_argument(
        "--attention",
        type=_pixel,
        metavar="X,Y",
        help="also draw what this pixel looks at in a model's non-local block: NAME_attention.png",
    )
    files.add_argument("--frames", action="store_true", help="of a video also a mask for each frame, in NAME_masks/")
    files.add_argument("--json", type=Path, metavar="FILE", help="write classes, areas, files and errors as JSON")
    files.add_argument("--overwrite", action="store_true", help="replace files that ctxseg predict did not write, too")
    data = parser.add_argument_group("data sets")
    data.add_argument("--split", help="split that is segmented")
    data.add_argument("--image_column", help="column of the pictures")
    data.add_argument("--keep_columns", nargs="*", metavar="COLUMN", help="columns kept [those of numbers and texts]")
    data.add_argument(
        "--shard_size", type=int, default=500, help="rows of a file, the most that a killed job loses [500]"
    )
    return parser


def _predictor(
    options: argparse.Namespace, device: str | None, progress: Callable[[int, int], None] | None
) -> "Predictor":
    from .inference import Predictor

    views = {
        name: getattr(options, name) for name in ("window", "overlap", "blend", "scales", "flip", "memory", "crf")
    }
    return Predictor(options.model, device=options.device or device, progress=progress, **views)


def _predict_files(options: argparse.Namespace) -> int:
    from .prediction_files import FileOptions, check_writable, find_pictures, predict_files, write_summary
    from .progress import lines

    chosen = FileOptions(
        overlay=not options.no_overlay,
        probabilities=options.probabilities,
        query=options.attention,
        frames=options.frames,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )
    list(find_pictures(options.inputs, options.out))
    predictor = _predictor(options, None, None if sys.stderr.isatty() else lines(_to_stderr))
    if options.json is not None:
        if options.json.is_dir():
            raise ValueError(f"--json {options.json} is a folder: give a file, {options.json / 'summary.json'}.")
        check_writable(options.json.parent)
    results = predict_files(
        predictor, options.inputs, options.out, chosen, say=lambda result: print(result.shown), note=_to_stderr
    )
    for message in results.failed.values():
        _to_stderr(f"ctxseg predict: {message}")
    if results.failed:
        total = len(results.done) + len(results.failed)
        _to_stderr(f"{len(results.failed)} of {total} pictures could not be segmented.")
    if options.json is not None:
        write_summary(options.json, options.model, predictor, results)
    return 1 if results.failed else 0


def _predict_dataset(options: argparse.Namespace) -> int:
    from .dataset_prediction import local_device, predict_dataset

    given = [f"--{name}" for name in _FILE_FLAGS if getattr(options, name)]
    if given:
        raise ValueError(f"{', '.join(given)} is for pictures and videos: of a data set masks are written as parquet.")
    masks = predict_dataset(
        _predictor(options, local_device(), lambda done, total: None),
        options.inputs[0],
        options.out,
        split=options.split,
        image_column=options.image_column,
        keep_columns=options.keep_columns,
        shard_size=options.shard_size,
        batch_size=options.batch_size,
        say=_to_stderr,
    )
    for path in masks.written:
        print(path)
    for message in masks.failed[:20]:
        _to_stderr(f"ctxseg predict: {message}")
    if masks.failed:
        _to_stderr(f"{len(masks.failed)} rows could not be segmented.")
    return masks.exit_code


def _pixel(text: str) -> tuple[int, int]:
    try:
        x, y = (int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pixel: give its column and row, for example 120,80"
        ) from error
    return x, y
