"""The verb `ctxseg export`."""

import sys

from .cli_parser import make_parser

_EXAMPLES = """ctxseg export runs/a model.onnx
       ctxseg export runs/a model.onnx --mask --uint8
       ctxseg export runs/a model.pt2 --height 512 --width 1024"""


def run_export(argv: list[str]) -> int:
    """Run `ctxseg export`; give the exit code."""
    parser = make_parser("export", _EXAMPLES)
    parser.add_argument("model", help="run folder, or name of a model on the Hub")
    parser.add_argument("output", help="new file: FILE.onnx, or FILE.pt2 for torch.export.load")
    parser.add_argument("--height", type=int, help="height of the pictures, with --width (default: any size)")
    parser.add_argument("--width", type=int, help="width of the pictures")
    parser.add_argument("--mask", action="store_true", help="class indices at the pictures' size instead of logits")
    parser.add_argument(
        "--uint8", action="store_true", help="takes RGB pictures (B, H, W, 3) as they are, and normalises them itself"
    )
    parser.add_argument("--opset", type=int, help="ONNX opset (default: the exporter's own choice)")
    options = vars(parser.parse_args(argv))
    from .exporting import ExportError, export

    try:
        exported = export(options.pop("model"), options.pop("output"), **options)
    except ExportError as error:
        print(f"ctxseg export: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        raise ValueError(str(error)) from error
    print(f"{exported.path}: {exported.path.stat().st_size / 1e6:.1f} MB")
    for part in ("input", "output"):
        print(f"  {part}: {exported.metadata[part]}")
    print("Compared with the model in its runtime:")
    for check in exported.checks:
        print(f"  {check}")
    return 0
