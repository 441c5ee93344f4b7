"""Tiny data sets of coloured shapes, and a training that takes a second."""

import io
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from hf_ctxseg import CtxSegImageProcessor, DeepLabV3Config, DeepLabV3ForSemanticSegmentation
from hf_ctxseg.cli import main
from hf_ctxseg.run_folder import save_model
from hf_ctxseg.visualization import default_palette

NAMES = ("ground", "disc", "box")
COLOURS = ((90, 120, 60), (200, 60, 50), (60, 80, 200))
TINY = {
    "backbone": "test_resnet",
    "backbone_weights": "none",
    "config_overrides": ["hidden_size=16"],
    "crop_size": [33],
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "preview_images": 1,
    "measure_cost": False,
    "dataloader_num_workers": 0,
    "use_cpu": True,
}


def scene(number, size=(48, 40)):
    """A picture (RGB) and its label map (P): a disc and a box on noisy ground, the first row ignored."""
    width, height = size
    draw = np.random.default_rng(number)
    label = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    row, column = draw.integers(12, height - 12), draw.integers(12, width - 12)
    label[(rows - row) ** 2 + (columns - column) ** 2 < 144] = 1
    top, left = draw.integers(0, height - 18), draw.integers(0, width - 18)
    label[top : top + 18, left : left + 18] = 2
    pixels = np.array(COLOURS, np.int16)[label] + draw.integers(-20, 21, (height, width, 3))
    label[0] = 255
    mask = Image.fromarray(label)
    # 256 colours, for Pillow would store value 255 in two bits otherwise
    mask.putpalette([channel for colour in COLOURS for channel in colour] + [0] * 3 * (256 - len(COLOURS)))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def make_data(root, names=NAMES, train=8, val=3):
    """Write a folder data set; the last validation picture has an odd size."""
    number = 0
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            size = (37, 51) if (split, index) == ("val", count - 1) else (48, 40)
            picture, mask = scene(number, size)
            picture.save(root / split / "images" / f"{index:03}.png")
            mask.save(root / split / "labels" / f"{index:03}.png")
            number += 1
    (root / "labels.txt").write_text("\n".join(names))
    return root


def flags(**arguments):
    """The tiny recipe as flags of `ctxseg train`, changed by `arguments`; None leaves one out."""
    tokens = []
    for name, value in {**TINY, **arguments}.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            tokens += [f"--{name}", *map(str, values)]
    return tokens


def as_arguments(**arguments):
    """The tiny recipe as keyword arguments of `hf_ctxseg.train`."""
    return {name: value for name, value in {**TINY, **arguments}.items() if value is not None}


_savefig = Figure.savefig  # before a test leaves figures blank

# Eight pictures in batches of two: six steps end in the middle of the second epoch, and so does checkpoint 5.
LINE = {
    "max_steps": 6,
    "save_steps": 5,
    "eval_steps": 3,
    "logging_steps": 1,
    "output_stride": 8,
    "learning_rate": 0.01,
    "use_auxiliary_head": True,
}


@cache
def trained(scratch):
    """Train once for all tests of a process: data folder, run folder, what was printed. `scratch` is its base."""
    root = Path(mkdtemp(dir=scratch))
    make_data(root / "data")
    printed = io.StringIO()
    with redirect_stdout(printed), patch.object(Figure, "savefig", _savefig):
        assert main(["train", *flags(data=root / "data", output_dir=root / "run", **LINE)]) == 0
    return root / "data", root / "run", printed.getvalue()


def random_run(folder, names=NAMES, **fields):
    """Save an untrained model whose classifier is made to predict every class somewhere."""
    torch.manual_seed(1)
    config = DeepLabV3Config(
        backbone="test_resnet",
        hidden_size=16,
        atrous_rates=[1],
        output_stride=8,
        id2label=dict(enumerate(names)),
        palette=[list(colour) for colour in default_palette(len(names))],
        **fields,
    )
    model = DeepLabV3ForSemanticSegmentation(config)
    processor = CtxSegImageProcessor.for_backbone(config.backbone)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    with torch.no_grad():
        logits = model.eval()(**processor(images=scene(0)[0], return_tensors="pt")).logits
        std, mean = torch.std_mean(logits, dim=(0, 2, 3))
        model.classifier.weight /= std.view(-1, 1, 1, 1)
        model.classifier.bias.copy_(-mean / std)
    folder.mkdir(parents=True)
    save_model(folder, model, processor)
    return folder


def weights(folder):
    """The tensors of a saved model."""
    return load_file(Path(folder) / "model.safetensors")


def run_silently(argv):
    """Run a verb in a process of its own, whose exit code becomes the command's."""
    multiprocessing.set_start_method("fork", force=True)  # of its data loaders, as where nobody chose another
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        sys.exit(main(argv))


def same_weights(one, other):
    """Whether two saved models are equal bit for bit."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
