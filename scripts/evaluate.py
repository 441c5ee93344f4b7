"""Score a model: the same as `ctxseg eval`, as a file that torchrun and accelerate can launch."""

import sys

from hf_ctxseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
