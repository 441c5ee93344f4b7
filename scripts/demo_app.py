"""Serve a page on which a model is tried: `python scripts/demo_app.py runs/a`, then open the address that it prints.

The same file is a Space: name it app.py there, put `hf-ctxseg[page]` into requirements.txt, and the model's name into
the variable CTXSEG_MODEL of the Space's settings.
"""

import argparse
import os
import sys
from pathlib import Path

# Python looks into the folder of this file first, where evaluate.py would hide the library of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from hf_ctxseg.page import Page  # noqa: E402


def main() -> int:
    """Serve the page; give the exit code."""
    parser = argparse.ArgumentParser(usage="python scripts/demo_app.py runs/a", description=__doc__)
    parser.add_argument(
        "model", nargs="?", default=os.environ.get("CTXSEG_MODEL"), help="run folder, or name of a model on the Hub"
    )
    parser.add_argument("--host", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    options = parser.parse_args()
    if options.model is None:
        parser.error("give a model, here or in the variable CTXSEG_MODEL")
    try:
        Page(options.model).serve(options.host, options.port)
    except (ValueError, OSError, ImportError) as error:
        print(f"demo_app: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
