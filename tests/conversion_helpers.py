"""What tests of `ctxseg convert` are made of: a picture, and a small network of mmsegmentation's form."""

import numpy as np
from PIL import Image

from hf_ctxseg import DeepLabV3Config


def write_photo(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (65, 70, 3), np.uint8)).save(path)
    return path


def small_mmseg_config(num_labels):
    return DeepLabV3Config(
        backbone="resnet18",
        variant="mmseg",
        output_stride=32,
        atrous_rates=[2, 3],
        absolute_rates=True,
        hidden_size=16,
        num_labels=num_labels,
    )
