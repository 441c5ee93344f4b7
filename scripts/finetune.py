"""Fine-tune a model: the same as `ctxseg train`, as a file that torchrun and accelerate can launch."""

import sys

from hf_ctxseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
