"""Compares a model in this process with what one that does not have the package makes of its export."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from hf_ctxseg.inference import predict_mask
from hf_ctxseg.registry import find_head

CLIENT = Path(__file__).with_name("remote_code_client.py")


def made(live, config):
    torch.manual_seed(0)
    return live(find_head(config.model_type.removeprefix("ctxseg_"))[2](config))


def open_without_package(models, picture, folder, hub):
    """What a process without the package finds in these models, folders or of this Hub."""
    folder.mkdir(exist_ok=True)
    picture.save(folder / "picture.png")
    done = subprocess.run(
        [sys.executable, CLIENT, folder / "picture.png", folder, *models],
        env=hub.env(folder / "home"),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["hidden"]
    return answer["found"]


def check(found, model, processor, picture):
    """Compare with the model as the package computes it, bit for bit."""
    assert "trust_remote_code=True" in found["refusal"]
    assert all(module.startswith("transformers_modules.") for module in found["modules"])
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(pixels).logits
        features = model.model(pixels).last_hidden_state
    assert found["logits"] == logits.double().sum().item()
    assert found["features"] == features.double().sum().item()
    mask = predict_mask(model, processor, picture)
    assert np.array_equal(found["mask"], mask) and len(np.unique(mask)) > 1
    names = model.config.id2label
    assert found["pipeline"] == {names[index]: int((mask == index).sum()) for index in np.unique(mask)}
    if model.config.output_stride == 16:
        config = copy.deepcopy(model.config)
        config.output_stride = 8
        finer = type(model)(config).eval()
        finer.load_state_dict(model.state_dict())
        with torch.inference_mode():
            assert found["stride 8"] == finer(pixels).logits.double().sum().item()
