"""The verbs `ctxseg convert` and `ctxseg push`."""

import sys

from .cli_parser import make_parser

_CONVERT_EXAMPLES = """ctxseg convert deeplabv3_resnet50_coco.pth models/a
       ctxseg convert model.tflite models/b --verify photo.jpg
       ctxseg convert best.pth models/c --encoder_name resnet34 --classes sky,road,car
       ctxseg convert models/a weights.pth --to torchvision"""


def run_convert(argv: list[str]) -> int:
    """Run `ctxseg convert`; give the exit code."""
    parser = make_parser("convert", _CONVERT_EXAMPLES)
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


_PUSH_EXAMPLES = """ctxseg push runs/a my_name/my_model
       ctxseg push runs/a my_name/my_model --with_code
       ctxseg push --all model_cards my_organisation"""


def run_push(argv: list[str]) -> int:
    """Run `ctxseg push`; give the exit code."""
    parser = make_parser("push", _PUSH_EXAMPLES)
    parser.add_argument("run", help="run folder; with --all, a folder of such")
    parser.add_argument("repo_id", help="name on the Hub: owner/name; with --all, the owner")
    parser.add_argument("--all", action="store_true", help="push each folder in it that holds a model")
    parser.add_argument("--with_code", action="store_true", help="add the code, for readers without this package")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--no_pictures", action="store_true", help="leave out pictures of your data")
    parser.add_argument("--yes", action="store_true", help="do not ask after listing what will go up")
    options = parser.parse_args(argv)
    from .publishing import push, push_all

    settings = {
        "private": options.private,
        "include_pictures": not options.no_pictures,
        "with_code": options.with_code,
        "confirm": _agree if options.yes else _ask,
    }
    if not options.all:
        print(push(options.run, options.repo_id, **settings) or "Nothing was uploaded.")
        return 0
    pushed, failed = push_all(options.run, options.repo_id, **settings)
    for name, url in pushed.items():
        print(f"{name}: {url or 'not uploaded'}")
    for name, message in failed.items():
        print(f"ctxseg push: {name}: {message}", file=sys.stderr)
    return 1 if failed else 0


def _agree(listing: str) -> bool:
    print(listing)
    return True


def _ask(listing: str) -> bool:
    print(listing)
    if not sys.stdin.isatty():
        raise ValueError("There is nobody to confirm the upload: pass --yes.")
    try:
        return input("Upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False
