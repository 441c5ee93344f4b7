"""Train smp's DeepLabV3+ under exactly the data, crops, schedule and scores of `ctxseg train`, to compare with ours.

python scripts/train_peer.py train --data camvid --recipe camvid --image_size 640 --seed 0 --output_dir runs/peer-0
python scripts/train_peer.py eval runs/peer-0 --data camvid --recipe camvid --scales 0.75 1 1.25 --flip

Takes the arguments of `ctxseg train` and `ctxseg eval`; needs segmentation-models-pytorch (`make parity` sets it up).
"""

import sys
from pathlib import Path

# Python looks into the folder of this file first, where evaluate.py would hide the library of that name.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry).resolve() != ROOT / "scripts")]

from hf_ctxseg.cli import main  # noqa: E402
from scripts.benchmarks import smp_peer  # noqa: E402, F401 (registers the head)

PEER = ["--head", "smp_deeplabv3plus", "--backbone", "tf_efficientnet_lite0"]

if __name__ == "__main__":
    verb, rest = sys.argv[1:2], sys.argv[2:]
    if verb not in (["train"], ["eval"]):
        sys.exit(__doc__)
    sys.exit(main([*verb, *(PEER if verb == ["train"] else []), *rest]))
