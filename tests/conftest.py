"""What the tests share: no network, one thread per process, tiny models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that forgets its own Hub fails at once instead of waiting
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from hf_ctxseg import (
    CtxSegForSemanticSegmentation,
    CtxSegImageProcessor,
    DeepLabV3Config,
    DeepLabV3ForSemanticSegmentation,
)

torch.set_num_threads(1)  # pytest-xdist runs a process per core


@pytest.fixture(autouse=True)
def forget_warnings():
    """Let each test see warnings that are given once per process."""
    logging.get_logger(__name__).warning_once.__func__.cache_clear()


@pytest.fixture(autouse=True)
def quick_figures(request, monkeypatch):
    """Leave figures blank, whose drawing takes half the time of a tiny training, but in tests marked `figures`."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Image.new("L", (8, 8)).save(path))


@pytest.fixture(scope="session")
def live():
    """Give a freshly built model statistics and weights that matter: a map of its classes is not constant."""

    def enliven(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in model.named_parameters():
            if "classifier" in name:
                parameter.data.normal_(std=0.5, generator=generator)
        model.eval()
        if isinstance(model, CtxSegForSemanticSegmentation):  # no class wins everywhere
            blobs = F.interpolate(torch.randn(8, 3, 5, 6, generator=generator), (48, 64), mode="bilinear")
            with torch.no_grad():
                bias = next(layer.bias for layer in model.classifier.modules() if isinstance(layer, nn.Conv2d))
                bias -= model(blobs).logits.mean(dim=(0, 2, 3))
        return model

    return enliven


@pytest.fixture(scope="session")
def tiny(live):
    """Make the configuration of a model that runs in milliseconds."""

    def config(config_class=DeepLabV3Config, **fields):
        defaults = {"backbone": "test_efficientnet", "hidden_size": 16, "auxiliary_hidden_size": 8, "num_labels": 3}
        if "id2label" in fields:
            defaults.pop("num_labels")
        return config_class(**(defaults | fields))

    return config


@pytest.fixture(scope="session")
def run_folder(tiny, live, tmp_path_factory):
    """A saved model with three named classes, colours, and its image processor."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    palette = [[10, 20, 30], [200, 0, 0], [0, 200, 0]]
    config = tiny(id2label={0: "ground", 1: "disc", 2: "box"}, palette=palette, output_stride=8)
    live(DeepLabV3ForSemanticSegmentation(config)).save_pretrained(folder)
    CtxSegImageProcessor.for_backbone(config.backbone).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture():
    """A picture of odd size, coarse blobs with noise."""
    rng = np.random.default_rng(0)
    blobs = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((61, 45)))
    return Image.fromarray((blobs * 0.8 + rng.integers(0, 50, blobs.shape)).astype(np.uint8))
