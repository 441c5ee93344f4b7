"""smp's network trained by our code: the same crops as ours, its own mathematics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from training_helpers import flags, make_data
from transformers import AutoModelForSemanticSegmentation

from hf_ctxseg.cli import main
from hf_ctxseg.trainer import SegmentationTrainer
from scripts.benchmarks.smp_peer import SmpPeerConfig, SmpPeerForSemanticSegmentation


def _batches(data, run, head, monkeypatch):
    """Train two steps; give what the network was given."""
    seen = []
    compute = SegmentationTrainer.compute_loss

    def watch(trainer, model, inputs, *args, **kwargs):
        seen.append((inputs["pixel_values"].clone(), inputs["labels"].clone()))
        return compute(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SegmentationTrainer, "compute_loss", watch)
    arguments = flags(data=data, output_dir=run, head=head, backbone="resnet18", max_steps=2, crop_size=64)
    assert main(["train", *arguments]) == 0
    monkeypatch.undo()
    return seen


def test_sees_the_crops_that_ours_sees(tmp_path, monkeypatch):
    data = make_data(tmp_path / "data")
    ours = _batches(data, tmp_path / "ours", "deeplabv3plus", monkeypatch)
    theirs = _batches(data, tmp_path / "theirs", "smp_deeplabv3plus", monkeypatch)
    assert len(ours) == len(theirs) == 2
    assert not torch.equal(ours[0][0], ours[1][0])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    fields = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("ours", "theirs")]
    assert [sorted(part) for part in fields[0].values()] == [sorted(part) for part in fields[1].values()]
    reopened = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "theirs")
    assert isinstance(reopened, SmpPeerForSemanticSegmentation)


@pytest.mark.parametrize("size", [(64, 96), (50, 33)])
def test_is_smps_network_with_the_weights_of_our_backbone(size):
    torch.manual_seed(0)
    config = SmpPeerConfig(backbone="resnet18", num_labels=3)
    weights = smp.DeepLabV3Plus("tu-resnet18", encoder_weights=None).encoder.model.state_dict()
    model = SmpPeerForSemanticSegmentation.from_pretrained_backbone(config, weights).eval()
    peer = smp.DeepLabV3Plus("tu-resnet18", encoder_weights=None, classes=3).eval()
    peer.load_state_dict(model.peer.state_dict())
    peer.encoder.model.load_state_dict(weights)
    pixels = torch.randn(1, 3, *size)
    with torch.no_grad():
        padded = pixels
        if size == (50, 33):  # to 64 x 48, the last row and column repeated
            padded = pixels[:, :, [*range(50), *[49] * 14]][..., [*range(33), *[32] * 15]]
        expected = peer(padded)[..., : size[0], : size[1]]
        assert torch.equal(model(pixels).logits, expected)


@pytest.mark.parametrize("backbone", [["--backbone", "resnet18"], ["--backbone=resnet18"]])
def test_another_backbone_is_smps_too(tmp_path, backbone):
    script = Path(__file__).parents[2] / "scripts" / "train_peer.py"
    words = flags(data=make_data(tmp_path / "data"), output_dir=tmp_path / "run", backbone=None, head=None)
    command = [sys.executable, str(script), "train", *words, *backbone, "--dry_run", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "SmpPeerForSemanticSegmentation on resnet18" in done.stdout + done.stderr
