import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training_helpers import LINE, as_arguments, same_weights, trained, weights
from transformers import TrainerCallback

import hf_ctxseg
from hf_ctxseg import DeepLabV3ForSemanticSegmentation, report
from hf_ctxseg.ema import AVERAGE, WeightAverage
from hf_ctxseg.trainer import SegmentationTrainer

RECIPE = LINE | {"ema_decay": 0.5, "save_steps": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory):
    """A run folder, and the tensors after each step."""
    seen = []

    class Witness(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    run = tmp_path_factory.mktemp("ema") / "run"
    build = SegmentationTrainer.__init__
    with pytest.MonkeyPatch.context() as patch:

        def watched(self, *args, **kwargs):
            build(self, *args, **kwargs)
            self.add_callback(Witness)
            seen.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

        patch.setattr(SegmentationTrainer, "__init__", watched)
        hf_ctxseg.train(**as_arguments(data=data, output_dir=run, **RECIPE))
    return run, seen


def _formula(seen, decay):
    mean = {name: tensor.double() for name, tensor in seen[0].items()}
    for step, tensors in enumerate(seen[1:], start=1):
        share = min(decay, (1 + step) / (10 + step))
        for name, tensor in tensors.items():
            whole = not tensor.is_floating_point()
            mean[name] = tensor.double() if whole else share * mean[name] + (1 - share) * tensor.double()
    return mean


def test_saved_model_is_the_average_and_the_checkpoint_holds_both(averaged):
    run, seen = averaged
    assert len(seen) == 7
    expected, found = _formula(seen, 0.5), weights(run)
    last = load_file(run / "checkpoint-6" / "model.safetensors")
    assert found.keys() == expected.keys() == last.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].to(torch.float64), rtol=1e-5, atol=1e-6)
        assert torch.equal(last[name], seen[-1][name]), name
    moved = [name for name in found if not torch.equal(found[name], last[name])]
    assert any(name.endswith("running_var") for name in moved) and any(name.endswith("weight") for name in moved)


def test_scores_are_those_of_the_average(averaged, data):
    run, _ = averaged
    assert hf_ctxseg.evaluate(run, data)["evaluation"]["mean_iou"] == pytest.approx(
        json.loads((run / "metrics.json").read_text())["evaluation"]["mean_iou"], abs=1e-9
    )


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("place", [(SegmentationTrainer, "training_step", 6), (report, "plot_curves", 1)])
def test_s1_killed_run_ends_in_the_same_average(averaged, data, tmp_path, monkeypatch, place):
    whole, _ = averaged
    run, calls = tmp_path / "run", []
    owner, name, number = place
    real = getattr(owner, name)

    def killing(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            raise Stopped
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(owner, name, killing)
        hf_ctxseg.train(**as_arguments(data=data, output_dir=run, **RECIPE))
    hf_ctxseg.train(**as_arguments(data=data, output_dir=run, resume=True, **RECIPE))
    assert same_weights(run, whole)


def test_best_average_is_taken_at_the_end(data, tmp_path):
    recipe = RECIPE | {"save_total_limit": 2, "learning_rate": 1e-4, "max_steps": 9}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    hf_ctxseg.train(**as_arguments(data=data, output_dir=tmp_path / "run", **recipe, **best))
    state = json.loads((tmp_path / "run" / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 9, "the last step is the best: the test shows nothing"
    average = load_file(tmp_path / "run" / f"checkpoint-{state['best_global_step']}" / AVERAGE)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, average[name]), name


def test_without_it_nothing_is_written(data, tmp_path):
    hf_ctxseg.train(**as_arguments(data=data, output_dir=tmp_path / "run"))
    assert not list((tmp_path / "run").rglob(AVERAGE))


def test_average_of_a_model_in_another_memory_format_is_saved_and_loaded(tmp_path, tiny):
    torch.manual_seed(0)
    model = DeepLabV3ForSemanticSegmentation(tiny()).to(memory_format=torch.channels_last)
    average = WeightAverage(model, 0.9)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    average.update(model)
    average.save(tmp_path)
    with safe_open(tmp_path / AVERAGE, framework="pt") as file:
        assert file.metadata()["steps"] == "1"
    again = WeightAverage(model, 0.9)
    again.load(tmp_path)
    assert again.steps == 1 and all(torch.equal(again.tensors[name], average.tensors[name]) for name in again.tensors)
