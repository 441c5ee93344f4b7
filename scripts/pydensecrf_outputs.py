"""Write what pydensecrf gives for generated scenes, which `tests/test_crf.py` compares `DenseCRF` with.

pip install cython numpy "setuptools>=77" && CFLAGS=-O1 pip install --no-build-isolation pydensecrf2
python scripts/pydensecrf_outputs.py tests/fixtures/pydensecrf.npz

Scenes and probabilities are stored with the results, so that another drawing of the scenes changes nothing.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

# Python looks into the folder of this file first, where evaluate.py would hide the library of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from hf_ctxseg.crf import DenseCRF  # noqa: E402
from hf_ctxseg.demo_scenes import CLASSES, render_scene  # noqa: E402

SIZES = ((48, 57), (67, 70))
NAMES = ("default", "deeplabv1", "deeplabv2", "pydensecrf")


def infer(probabilities: np.ndarray, picture: np.ndarray, crf: DenseCRF) -> np.ndarray:
    """Run pydensecrf on probabilities (K, H, W), float32, and a picture (H, W, 3): probabilities again."""
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    classes, height, width = probabilities.shape
    peer = DenseCRF2D(width, height, classes)
    peer.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probabilities)))
    peer.addPairwiseGaussian(sxy=crf.gaussian_std, compat=crf.gaussian_weight)
    peer.addPairwiseBilateral(
        sxy=crf.bilateral_std_xy, srgb=crf.bilateral_std_rgb, rgbim=picture.copy(), compat=crf.bilateral_weight
    )
    return np.array(peer.inference(crf.iterations)).reshape(probabilities.shape)


def coarse_probabilities(label: np.ndarray, classes: int) -> torch.Tensor:
    """Give what a network of stride 8 could say of a label (H, W): probabilities (K, H, W), blurred and unsure."""
    scores = F.one_hot(torch.from_numpy(label).long(), classes).permute(2, 0, 1).float()[None]  # (1, K, H, W)
    size = tuple(-(-edge // 8) for edge in label.shape)
    return F.interpolate(6 * F.interpolate(scores, size, mode="area"), label.shape, mode="bilinear")[0].softmax(dim=0)


if __name__ == "__main__":
    stored = {}
    for seed, size in enumerate(SIZES):
        picture, label = render_scene(seed, size)
        halved = coarse_probabilities(label, len(CLASSES)).half()
        stored |= {f"picture_{seed}": picture, f"probabilities_{seed}": halved.numpy()}
        for name in NAMES:
            refined = infer(halved.float().numpy(), picture, DenseCRF.preset(name))
            stored[f"{name}_{seed}"] = np.rint(refined * 65535).astype(np.uint16)
    np.savez_compressed(sys.argv[1], **stored)
