"""The command `ctxseg`: thin verbs over the functions of the package.

Exit codes: 0 done, 1 some inputs failed or a training could not go on, 2 usage or bad input, 130 and 143 ended by
Ctrl-C or SIGTERM.
"""

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli_card import run_card
from .cli_export import run_export
from .cli_inference import run_eval, run_predict
from .cli_parser import VERBS, make_parser
from .cli_publishing import run_convert, run_push

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


def _models(argv: list[str]) -> int:
    examples = "deeplabv3-resnet50", "--backbones '*resnet*'", "--recipes"
    parser = make_parser("models", "\n       ".join(f"ctxseg models {example}" for example in examples))
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
    parser = make_parser("doctor", "ctxseg doctor\n       ctxseg doctor runs/a")
    parser.add_argument(
        "folder", nargs="?", help="run folder, checkpoint or saved model; without: versions, device, cache, disk"
    )
    options = parser.parse_args(argv)
    from .doctor import diagnose, examine

    if options.folder is not None:
        return diagnose(examine(options.folder))
    from .environment import examine_environment

    return diagnose(examine_environment())


def _demo(argv: list[str]) -> int:
    parser = make_parser("demo", "ctxseg demo --output_dir demo_output")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="folder for scenes, run, overlay")
    options = parser.parse_args(argv)
    from .demo import run_demo

    run_demo(options.output_dir)
    return 0


_RUN = {
    "train": _train,
    "eval": run_eval,
    "predict": run_predict,
    "convert": run_convert,
    "export": run_export,
    "card": run_card,
    "push": run_push,
    "models": _models,
    "doctor": _doctor,
    "demo": _demo,
}


if __name__ == "__main__":
    raise SystemExit(main())
