"""Pictures per second and the share of waiting, against data sets of known slowness."""

import time

import pytest
from training_helpers import as_arguments, make_data
from transformers import TrainerState

import hf_ctxseg
from hf_ctxseg.throughput import Throughput


def _turn(throughput, monkeypatch, waits, works):
    """Steps of 4 pictures that wait and work for the seconds given, by a clock that only these move."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for wait, work in zip(waits, works, strict=True):
        with throughput.waiting():
            now[0] += wait
        throughput.count(4)
        now[0] += 100.0  # evaluation, saving: between steps
        throughput.on_step_begin(None, TrainerState(), None)
        now[0] += work
        throughput.on_step_end(None, TrainerState(), None)


def test_rates_by_a_made_up_clock(monkeypatch):
    throughput = Throughput()
    assert throughput.since_log() == throughput.in_all() == {}
    _turn(throughput, monkeypatch, [1.0, 3.0], [2.0, 2.0])
    assert throughput.since_log() == {"images_per_second": 1.0, "data_wait_share": 0.5}
    _turn(throughput, monkeypatch, [0.0], [2.0])
    assert throughput.since_log() == {"images_per_second": 2.0, "data_wait_share": 0.0}
    assert throughput.since_log() == {}
    assert throughput.in_all() == {"images_per_second": 1.2, "data_wait_share": 0.4}


@pytest.mark.parametrize("workers", [0, 1])
def test_slow_pictures_are_seen_as_waiting(tmp_path, monkeypatch, workers, capsys):
    data = make_data(tmp_path / "data")

    def slow(self, index, read=hf_ctxseg.data.TrainingDataset.__getitem__):
        time.sleep(0.2)
        return read(self, index)

    monkeypatch.setattr(hf_ctxseg.data.TrainingDataset, "__getitem__", slow)
    settings = as_arguments(data=data, output_dir=tmp_path / "run", max_steps=3, logging_steps=1, eval_strategy="no")
    result = hf_ctxseg.train(**settings | {"dataloader_num_workers": workers})
    training = result.metrics["training"]
    # 6 pictures (and what is read ahead) at 0.2 s each
    assert training["images_per_second"] <= 5.1 and training["data_wait_share"] > 0.3
    assert "images/s (" in capsys.readouterr().out
