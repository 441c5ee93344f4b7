"""Convert a checkpoint of another code base: the same as `ctxseg convert`."""

import sys
from pathlib import Path

# Python looks into the folder of this file first, where evaluate.py would hide the library of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from hf_ctxseg.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
