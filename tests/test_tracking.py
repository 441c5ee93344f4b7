import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from training_helpers import LINE, NAMES, as_arguments, trained
from transformers.integrations.integration_utils import TrackioCallback

import hf_ctxseg
from hf_ctxseg.tracking import class_scores, track_evaluation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())[0]


def test_scores_of_absent_classes_are_left_out():
    scores = {"per_category_iou": [0.5, math.nan], "per_category_accuracy": [1.0, math.nan]}
    named = class_scores(scores, ("sky", "traffic light"))
    assert list(named) == [
        "eval/iou/sky",
        "eval/iou/traffic light",
        "eval/accuracy/sky",
        "eval/accuracy/traffic light",
    ]
    logged = []
    callback = TrackioCallback.__new__(TrackioCallback)
    callback._initialized, callback._trackio = True, SimpleNamespace(log=logged.append)
    track_evaluation([callback], 7, named, None)
    assert logged == [{"eval/iou/sky": 0.5, "eval/accuracy/sky": 1.0, "train/global_step": 7}]


def test_tensorboard_gets_scores_by_class_and_previews(data, tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    run = tmp_path / "run"
    result = hf_ctxseg.train(**as_arguments(data=data, output_dir=run, report_to="tensorboard", **LINE))
    (folder,) = (run / "runs").iterdir()
    events = reader.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert {"train/loss", "train/learning_rate", "eval/mean_iou"} <= set(events.Tags()["scalars"])
    for measure in ("iou", "accuracy"):
        for name in NAMES:
            points = events.Scalars(f"eval/{measure}/{name}")
            assert [point.step for point in points] == [3, 6]
            found = result.metrics["evaluation"][f"per_category_{measure}"][name]
            assert points[-1].value == pytest.approx(found, abs=1e-6)
    pictures = events.Images("previews")
    assert [picture.step for picture in pictures] == [3, 6]
    preview = np.asarray(Image.open(run / "previews" / "step-000006.png"))
    assert (pictures[-1].height, pictures[-1].width) == preview.shape[:2]


def test_trackio_gets_scores_by_class_and_previews(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    run = tmp_path / "run"
    result = hf_ctxseg.train(
        **as_arguments(data=data, output_dir=run, report_to="trackio", run_name="shapes", project="tests", **LINE)
    )
    logged = storage.get_logs("tests", "shapes")
    scored = [entry for entry in logged if "eval/iou/disc" in entry]
    assert [entry["train/global_step"] for entry in scored] == [3, 6]
    assert any("eval/mean_iou" in entry for entry in logged)
    scores = result.metrics["evaluation"]["per_category_iou"]
    for name in NAMES:
        assert scored[-1][f"eval/iou/{name}"] == pytest.approx(scores[name], abs=1e-9)
    assert scored[-1]["previews"]["_type"] == "trackio.image"
    assert list((tmp_path / "trackio").rglob("*.png"))
