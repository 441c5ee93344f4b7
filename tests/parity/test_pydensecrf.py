"""Against pydensecrf2, the original C++ code with a Python interface, on real photos.

It builds from source: CFLAGS=-O1 pip install --no-build-isolation pydensecrf2, with cython and numpy installed.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[2]))

from hf_ctxseg import DenseCRF
from scripts.pydensecrf_outputs import coarse_probabilities, infer

pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed: see the top of this file")

PHOTOS = Path(__file__).parents[3] / "shared" / "images" / "voc"
CLASSES = 21


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photos in shared")
@pytest.mark.parametrize("name", ["default", "deeplabv1", "deeplabv2", "deeplabv2-vgg", "krahenbuhl", "pydensecrf"])
@pytest.mark.parametrize("photo", ["labelme_2011_000003.jpg", "vainf_1.png", "vainf_23.png"])
def test_photos(photo, name):
    picture = np.array(Image.open(PHOTOS / photo).convert("RGB"))
    label = np.array(Image.open(PHOTOS / f"{Path(photo).stem}_mask.png"))
    probabilities = coarse_probabilities(np.where(label == 255, 0, label), CLASSES)
    crf = DenseCRF.preset(name)
    expected = torch.from_numpy(infer(probabilities.numpy(), picture, crf))
    found = crf(probabilities[None], torch.from_numpy(picture).permute(2, 0, 1)[None])[0]
    assert (found - expected).abs().max() < 1e-4
    assert (found.argmax(dim=0) == expected.argmax(dim=0)).float().mean() >= 0.999
    assert (expected.argmax(dim=0) != probabilities.argmax(dim=0)).float().mean() > 0.002


@pytest.mark.parametrize("low", [0, 250])
@pytest.mark.parametrize("spread", [1, 5, 255])
def test_pictures_of_noise(low, spread):
    generator = np.random.default_rng(spread)
    picture = np.clip(low + generator.integers(0, spread, (37, 41, 3)), 0, 255).astype(np.uint8)
    probabilities = coarse_probabilities(generator.integers(0, 5, (37, 41)), 5)
    crf = DenseCRF(iterations=2)  # more of them amplify rounding where nothing decides between the classes
    expected = torch.from_numpy(infer(probabilities.numpy(), picture, crf))
    found = crf(probabilities[None], torch.from_numpy(picture).permute(2, 0, 1)[None])[0]
    assert (found - expected).abs().max() < 1e-4
