"""The verb `ctxseg card`."""

from .cli_parser import make_parser

_EXAMPLES = """ctxseg card runs/a --cost
       ctxseg card runs/a --seeds runs/b runs/c
       ctxseg card runs/a --to model_cards/a --data my_folder"""


def run_card(argv: list[str]) -> int:
    """Run `ctxseg card`; give the exit code."""
    parser = make_parser("card", _EXAMPLES)
    parser.add_argument("run", help="run folder; its metrics.json and README.md are written anew")
    parser.add_argument(
        "--cost",
        nargs="*",
        type=int,
        metavar="EDGE",
        help="measure time and memory for square pictures of these edges, in pixels (default: 256 512 1024)",
    )
    parser.add_argument("--seeds", nargs="+", default=[], metavar="RUN", help="the same training with other seeds")
    release = parser.add_argument_group("a folder to be published, without pictures of the data")
    release.add_argument("--to", metavar="FOLDER", help="write it here; it must be new or empty")
    release.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="of weights (default: float16)")
    release.add_argument("--data", help="labelled pictures on which stored and trained weights are compared")
    release.add_argument("--recipe", help="known data set (see ctxseg models --recipes), or a recipe file")
    release.add_argument("--split", help="split of the data (default: the validation split)")
    release.add_argument("--license", help="licence of the training data, where the run does not know it")
    release.add_argument("--credit", help="a sentence that names the makers of the data")
    options = parser.parse_args(argv)
    given = [name for name in ("dtype", "data", "recipe", "split", "license", "credit") if getattr(options, name)]
    if options.to is None and given:
        parser.error(f"--{given[0]} belongs to a folder to be published: name it with --to")
    from .cost import SIZES
    from .new_folder import checked_target
    from .release import update_card, write_release

    if options.to is not None:
        checked_target(options.to)  # before anything is measured
    sizes = None if options.cost is None else options.cost or list(SIZES)
    print(update_card(options.run, sizes=sizes, seeds=tuple(options.seeds)))
    if options.to is not None:
        folder = write_release(
            options.run,
            options.to,
            dtype=options.dtype or "float16",
            data=options.data,
            recipe=options.recipe,
            split=options.split,
            data_license=options.license,
            credit=options.credit,
        )
        print(folder / "README.md")
    return 0
