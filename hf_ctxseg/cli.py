"""The command `ctxseg`: thin verbs over the functions of the package.

Exit codes: 0 done, 1 some inputs failed or a training could not go on, 2 usage or bad input, 130 and 143 ended by
Ctrl-C or SIGTERM.
"""

import argparse
import csv
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERBS = {
    "train": "fine-tune a model on a folder of images and masks",
    "eval": "score a model on labelled pictures",
    "predict": "segment pictures: masks and overlays",
    "convert": "open a checkpoint of another code base, or write one for it",
    "push": "publish a run folder on the Hub",
    "models": "list heads, presets and backbones",
    "doctor": "verify a run folder, a checkpoint or a saved model",
    "demo": "train on generated scenes, from nothing to an overlay, in a few minutes",
}

_TRAIN_HELP = """Examples:
  ctxseg train --data my_folder --backbone resnet50 --output_dir runs/a
  ctxseg train --data my_folder --model_name_or_path org/name --output_dir runs/b
  ctxseg train --recipe cityscapes --data /data/cityscapes --preset deeplabv3plus-resnet50 --output_dir runs/e
  ctxseg train --data my_folder --output_dir runs/a --resume
  ctxseg train --config runs/a/args.yaml --output_dir runs/c
  torchrun --nproc_per_node 2 scripts/finetune.py --data my_folder --output_dir runs/d

--data is a folder (<split>/images + <split>/labels, or images/<split> + masks/<split>, equal stems; class names in
meta.json, labels.txt or --labels), a parquet file or folder, or the name of a data set on the Hub."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; give the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    arguments = arguments[debug:]
    if arguments[:1] == ["--import"]:
        try:
            _import(arguments[1] if len(arguments) > 1 else "")
        except ImportError as error:
            print(f"ctxseg: error: --import takes the name of a Python module: {error}", file=sys.stderr)
            return 2
        arguments = arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in VERBS:
        return _usage(arguments)
    _quiet()
    try:
        return _RUN[arguments[0]](arguments[1:])
    except KeyboardInterrupt as error:
        hint = " The same command with --resume continues." if arguments[0] == "train" else ""
        print(f"\nctxseg {arguments[0]}: {str(error) or 'interrupted.' + hint}", file=sys.stderr)
        return getattr(error, "exit_code", 130)  # of a training that a signal ended
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"ctxseg {arguments[0]}: error: {error}", file=sys.stderr)
        return 2


def _usage(arguments: Sequence[str]) -> int:
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    stream = sys.stdout if asked else sys.stderr
    if arguments and not asked:
        import difflib

        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        print(
            f"ctxseg: there is no verb {arguments[0]!r}" + (f": did you mean {near[0]!r}?" if near else "."),
            file=stream,
        )
    print(
        "usage: ctxseg VERB …  (ctxseg VERB --help shows an example first)\n"
        "       ctxseg --debug VERB …          with traces\n"
        "       ctxseg --import my_head VERB …  with heads that the module my_head registers\n",
        file=stream,
    )
    for verb, what in VERBS.items():
        print(f"  {verb:<8} {what}", file=stream)
    return 0 if asked else 2


def _import(module: str) -> None:
    """Import a module of the user's, which registers heads of their own."""
    if not module:
        raise ImportError("none was given.")
    sys.path.insert(0, os.getcwd())
    importlib.import_module(module.removesuffix(".py"))


def _quiet() -> None:
    """Drop notes of other libraries that a user cannot act upon; only here, never in the library."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("timm", "httpx", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _parser(verb: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"ctxseg {verb}",
        usage=f"{example}\n\n{VERBS[verb].capitalize()}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _train(argv: list[str]) -> int:
    from .arguments import parse_arguments, short_help

    if not argv or "-h" in argv or "--help" in argv:
        print(f"{_TRAIN_HELP}\n")
        short_help()
        print("\nEvery argument of transformers' TrainingArguments is taken too: --help-all lists them.")
        return 0 if argv else 2
    if "--help-all" in argv:
        argv = ["--help"]
    try:
        arguments, given = parse_arguments(argv)
    except (ValueError, OSError):
        if os.environ.get("RANK", "0") != "0":  # of several processes, the first one tells
            return 2
        raise
    # What differs from a checkpoint is listed in our own words.
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_load_report)
    from .processes import is_lost_process
    from .publishable import public_command
    from .survival import TrainingStopped
    from .training import run_training

    try:
        run_training(arguments, given, command=public_command(["train", *argv]))
    except TrainingStopped as error:
        print(f"ctxseg train: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        return 1
    return 0


def _eval(argv: list[str]) -> int:
    parser = _parser("eval", "ctxseg eval runs/a --data my_folder --split val")
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


def _predict(argv: list[str]) -> int:
    parser = _parser("predict", "ctxseg predict runs/a photo.jpg more_photos/ --out masks")
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


_CONVERT_EXAMPLES = """ctxseg convert deeplabv3_resnet50_coco.pth models/a
       ctxseg convert model.tflite models/b --verify photo.jpg
       ctxseg convert best.pth models/c --encoder_name resnet34 --classes sky,road,car
       ctxseg convert models/a weights.pth --to torchvision"""


def _convert(argv: list[str]) -> int:
    parser = _parser("convert", _CONVERT_EXAMPLES)
    parser.add_argument("source", help="file, folder, or prefix of a TensorFlow checkpoint; with --to, a run folder")
    parser.add_argument("output", help="new folder; with --to, a new file: FILE.pth or FILE.safetensors")
    parser.add_argument("--from", dest="source_format", metavar="FORMAT", help="if the file is not recognised")
    parser.add_argument("--to", metavar="PEER", help="the other way: torchvision, mmseg or smp")
    parser.add_argument("--output_stride", type=int, help="what the network was built with; tensors do not tell")
    parser.add_argument("--atrous_rates", type=int, nargs="+", metavar="RATE", help="the same, of the pyramid")
    parser.add_argument(
        "--image_pooling_crop_size", type=int, nargs="+", metavar="EDGE", help="TensorFlow's, in pixels"
    )
    parser.add_argument("--multi_grid", type=int, nargs="+", metavar="FACTOR", help="TensorFlow's, of Xception")
    parser.add_argument("--encoder_name", help="smp's name of the encoder, for a state dict of smp")
    parser.add_argument("--peer_config", metavar="FILE", help="mmsegmentation's config, read as text")
    parser.add_argument("--entry", help="entry of the checkpoint that holds the state dict (ema, model, …)")
    parser.add_argument("--classes", metavar="FILE_OR_NAMES", help="class names: one a line, or with commas")
    parser.add_argument("--license", help="licence of the weights, for the card")
    parser.add_argument("--verify", metavar="IMAGE", help="compare with the source's own code, if installed, on it")
    parser.add_argument("--logits", metavar="FILE", help="compare with these logits of IMAGE (.npy) instead")
    options = vars(parser.parse_args(argv))
    source, output, peer = options.pop("source"), options.pop("output"), options.pop("to")
    if len(options["image_pooling_crop_size"] or ()) == 1:  # a square
        options["image_pooling_crop_size"] = options["image_pooling_crop_size"][0]
    from .converting import convert, convert_back

    if peer is not None:
        if given := sorted(name for name, value in options.items() if value is not None):
            parser.error(f"--to takes no --{given[0].replace('source_format', 'from')}: leave it out")
        print(convert_back(source, output, peer))
        return 0
    converted = convert(source, output, **options)
    print(f"{converted.output_dir}: {converted.conversion.config.model_type} from {converted.source_format}")
    for note in converted.conversion.notes:
        print(f"- {note}")
    if converted.comparison is not None:
        print(f"Compared {converted.comparison}".replace("Compared not compared", "Not compared"))
    return 0


def _push(argv: list[str]) -> int:
    parser = _parser("push", "ctxseg push runs/a my_name/my_model")
    parser.add_argument("run", help="run folder")
    parser.add_argument("repo_id", help="name on the Hub: owner/name")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--no_pictures", action="store_true", help="leave out pictures of your data")
    parser.add_argument("--yes", action="store_true", help="do not ask after listing what will go up")
    options = parser.parse_args(argv)
    from .publishing import push

    url = push(
        options.run,
        options.repo_id,
        private=options.private,
        include_pictures=not options.no_pictures,
        confirm=_agree if options.yes else _ask,
    )
    print(url if url else "Nothing was uploaded.")
    return 0


def _agree(listing: str) -> bool:
    print(listing)
    return True


def _ask(listing: str) -> bool:
    print(listing)
    if not sys.stdin.isatty():
        raise ValueError("There is nobody to confirm the upload: pass --yes.")
    return input("Upload? [y/N] ").strip().lower() in ("y", "yes")


def _models(argv: list[str]) -> int:
    examples = "[deeplabv3-resnet50]", "--backbones '*resnet*'", "--recipes"
    parser = _parser("models", "\n       ".join(f"ctxseg models {example}" for example in examples))
    parser.add_argument("name", nargs="?", help="preset or head whose configuration is printed")
    parser.add_argument(
        "--backbones",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="list timm's networks by building and running each, a second apiece the first time; wildcards in quotes",
    )
    parser.add_argument("--recipes", action="store_true", help="list the data sets that ctxseg train --recipe knows")
    parser.add_argument("--output_stride", type=int, help="only backbones that reach this stride")
    parser.add_argument("--all", action="store_true", help="also the networks that give no maps, with the reason")
    parser.add_argument("--report", choices=("table", "json", "csv"), default="table", help="what is printed")
    options = parser.parse_args(argv)
    if options.backbones is None and (options.all or options.output_stride is not None):
        parser.error("--output_stride and --all choose among --backbones: give it too")
    if options.recipes and (options.name is not None or options.backbones is not None):
        parser.error("--recipes lists data sets alone: leave out names and --backbones")
    if options.name is not None and (options.backbones is not None or options.report != "table"):
        parser.error(f"the configuration of {options.name} is printed alone, as JSON: leave out the flags")
    from .listing import print_backbones, print_models, print_preset, print_recipes

    if options.recipes:
        print_recipes(options.report)
    elif options.backbones is not None:
        print_backbones(options.backbones, options.output_stride, options.report, options.all)
    elif options.name is not None:
        print_preset(options.name)
    else:
        print_models(options.report)
    return 0


def _doctor(argv: list[str]) -> int:
    parser = _parser("doctor", "ctxseg doctor runs/a")
    parser.add_argument("folder", help="run folder, checkpoint or saved model")
    options = parser.parse_args(argv)
    from .doctor import diagnose

    return diagnose(options.folder)


def _demo(argv: list[str]) -> int:
    parser = _parser("demo", "ctxseg demo --output_dir demo_output")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="folder for scenes, run, overlay")
    options = parser.parse_args(argv)
    from .demo import run_demo

    run_demo(options.output_dir)
    return 0


_RUN = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "convert": _convert,
    "push": _push,
    "models": _models,
    "doctor": _doctor,
    "demo": _demo,
}


if __name__ == "__main__":
    raise SystemExit(main())
