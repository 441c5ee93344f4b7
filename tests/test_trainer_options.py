import json

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import SyncBatchNormAct
from torch import nn
from training_helpers import LINE, as_arguments, same_weights, trained, weights
from transformers import TrainerCallback

import hf_ctxseg
from hf_ctxseg import DeepLabV3Config, DeepLabV3ForSemanticSegmentation, recomputation
from hf_ctxseg.arguments import CtxSegTrainingArguments
from hf_ctxseg.batch_norms import synchronise_norms
from hf_ctxseg.early_stopping import has_converged
from hf_ctxseg.learning_rates import parameter_groups
from hf_ctxseg.model_building import at_output_stride
from hf_ctxseg.trainer import SegmentationTrainer


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    return trained(tmp_path_factory.getbasetemp())[:2]


def _options(**given):
    return CtxSegTrainingArguments(output_dir="unused", use_cpu=True, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ema_decay": 1.0}, r"ema_decay is 1.0, .*0\.999"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"sync_batch_norm": True}, "CUDA devices only.*on cpu"),
        ({"early_stopping_patience": 0}, "at least 1"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "needs scores and checkpoints"),
    ],
)
def test_options_out_of_range_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        _options(**given)


def test_early_stopping_needs_pictures_to_score(line, tmp_path):
    with pytest.raises(ValueError, match="needs pictures to score"):
        hf_ctxseg.train(
            **as_arguments(
                data=line[0] / "train", output_dir=tmp_path / "run", labels="a,b,c", eval_fraction=0.0,
                early_stopping_patience=1,
            )
        )  # fmt: skip


def test_weights_split_over_processes_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"FSDP splits the weights.*DistributedDataParallel"):
        _options(fsdp="full_shard")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    with pytest.raises(ValueError, match="FSDP splits the weights"):
        _options()


# Learning rates


def test_each_stage_of_the_backbone_learns_slower_than_the_next():
    config = DeepLabV3Config(backbone="test_resnet", hidden_size=16, num_labels=3)
    model = DeepLabV3ForSemanticSegmentation(config)
    options = _options(learning_rate=1e-3, layer_decay=0.5, weight_decay=0.1)
    rates = {}
    for group in parameter_groups(model, options):
        assert group["weight_decay"] in (0.0, 0.1)
        rates |= dict.fromkeys(group["params"], group["lr"])
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        layers = {"conv1.": 1 / 16, "bn1.": 1 / 16, "layer1.": 1 / 8, "layer2.": 1 / 4, "layer3.": 1 / 2, "layer4.": 1}
        inner = name.removeprefix("model.backbone._backbone.")
        factor = 10 if inner == name else next(layers[key] for key in layers if inner.startswith(key))
        assert rates[parameter] == pytest.approx(1e-3 * factor), name


class _Rates(TrainerCallback):
    seen: list

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("warmup", [3, 0.25])
def test_rate_warms_up_then_falls_by_the_polynomial_to_zero(line, tmp_path, monkeypatch, warmup):
    _Rates.seen = []
    build = SegmentationTrainer.__init__

    def watched(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.add_callback(_Rates)

    monkeypatch.setattr(SegmentationTrainer, "__init__", watched)
    recipe = {"max_steps": 12, "warmup_steps": warmup, "learning_rate": 1e-3, "eval_strategy": "no"}
    hf_ctxseg.train(**as_arguments(data=line[0], output_dir=tmp_path / "run", save_strategy="no", **recipe))
    expected = [1e-3 * step / 3 for step in range(3)] + [1e-3 * (1 - step / 9) ** 0.9 for step in range(10)]
    assert _Rates.seen == pytest.approx(expected, rel=1e-6, abs=1e-12)


# Early stopping


def _log(*scores):
    return [entry for score in scores for entry in ({"loss": 1.0}, {"eval_mean_iou": score})]


def test_patience_counts_scores_without_a_better_one():
    assert not has_converged(_log(0.1, 0.2, 0.1), 2)
    assert has_converged(_log(0.1, 0.2, 0.1, 0.2), 2)
    assert not has_converged(_log(0.1, 0.2, 0.1, 0.3), 2)
    assert not has_converged(_log(0.3, 0.1), 2)
    assert not has_converged(_log(0.3, 0.1, 0.1, 0.1), None)


def _scored(monkeypatch, scores):
    """Have evaluations find these mean IoUs, one after the other."""
    real = SegmentationTrainer.evaluation_loop

    def loop(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.metrics["eval_mean_iou"] = scores[self.state.global_step - 1]
        return output

    monkeypatch.setattr(SegmentationTrainer, "evaluation_loop", loop)


STOPPING = {"max_steps": 8, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2, "save_total_limit": 2}


def test_training_stops_and_takes_its_best_model_also_when_it_is_continued(line, tmp_path, monkeypatch):
    _scored(monkeypatch, [0.1, 0.5, 0.4, 0.3, 0.2, 0.9, 0.9, 0.9])
    run = tmp_path / "run"
    result = hf_ctxseg.train(**as_arguments(data=line[0], output_dir=run, **STOPPING))
    assert result.metrics["training"]["steps"] == 4
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    best = load_file(run / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in result.model.state_dict().items())

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    again = tmp_path / "again"
    for place in ((SegmentationTrainer, "_load_best_model"), (hf_ctxseg.report, "plot_curves")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(*place, kill)
            hf_ctxseg.train(**as_arguments(data=line[0], output_dir=again, resume=again.exists(), **STOPPING))
    hf_ctxseg.train(**as_arguments(data=line[0], output_dir=again, resume=True, **STOPPING))
    assert same_weights(again, run)


# Output stride of evaluation


def test_scores_are_those_of_the_model_at_the_other_stride(line, tmp_path):
    run = tmp_path / "run"
    recipe = LINE | {"output_stride": 16, "eval_output_stride": 8}
    hf_ctxseg.train(**as_arguments(data=line[0], output_dir=run, **recipe))
    assert json.loads((run / "config.json").read_text())["output_stride"] == 16
    evaluation = json.loads((run / "metrics.json").read_text())["evaluation"]
    assert "output stride 8 (the model as saved: 16)" in evaluation["protocol"]
    assert evaluation["settings"]["output_stride"] == 8
    other = DeepLabV3ForSemanticSegmentation.from_pretrained(run, output_stride=8)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_bytes((run / "preprocessor_config.json").read_bytes())
    found = {}
    for folder in (run, tmp_path / "other"):
        found[folder.name] = hf_ctxseg.evaluate(folder, line[0])["evaluation"]["loss"]
    assert evaluation["loss"] == pytest.approx(found["other"], rel=1e-6)
    assert evaluation["loss"] != pytest.approx(found["run"], rel=1e-3)


def test_twin_at_another_stride_scales_the_rates_and_draws_no_numbers():
    config = DeepLabV3Config(backbone="test_resnet", hidden_size=16, num_labels=3, output_stride=16)
    model = DeepLabV3ForSemanticSegmentation(config)
    state = torch.get_rng_state()
    twin = at_output_stride(model, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.config.effective_rates == [12, 24, 36] and config.output_stride == 16
    assert twin.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="cannot reach output_stride 12"):
        at_output_stride(model, 12)


# Memory and normalisation


def test_recomputation_ends_in_the_same_weights(line, tmp_path, monkeypatch):
    data, whole = line
    counts, real = [], recomputation._statistics_kept
    monkeypatch.setattr(recomputation, "_statistics_kept", lambda block: counts.append(block) or real(block))
    run = tmp_path / "run"
    hf_ctxseg.train(**as_arguments(data=data, output_dir=run, gradient_checkpointing=True, **LINE))
    assert len(counts) >= 6 * LINE["max_steps"]
    assert same_weights(run, whole)


def test_synchronised_norms_keep_names_tensors_and_activations(tiny, live, monkeypatch):
    with pytest.raises(ValueError, match="there is one only"):
        synchronise_norms(nn.Sequential())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    torch.manual_seed(0)
    model = live(DeepLabV3ForSemanticSegmentation(tiny(backbone="test_efficientnet")))
    pixels, before = torch.randn(1, 3, 40, 33), dict(model.state_dict())
    with torch.no_grad():
        expected = model(pixels).logits
    synchronise_norms(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert any(isinstance(norm, SyncBatchNormAct) for norm in norms)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, expected)


@pytest.mark.slow
def test_compiled_training_ends_near_the_same_weights(line, tmp_path):
    torch._dynamo.reset()
    found, still = {}, ["hidden_size=16", "classifier_dropout=0", "auxiliary_dropout=0"]  # compiled code draws others
    for name in ("plain", "compiled"):
        recipe = LINE | {"optim": "sgd", "learning_rate": 1e-3, "config_overrides": still}
        recipe |= {"torch_compile": name == "compiled"}
        hf_ctxseg.train(**as_arguments(data=line[0], output_dir=tmp_path / name, **recipe))
        found[name] = weights(tmp_path / name)
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (name == "compiled")
    assert found["plain"].keys() == found["compiled"].keys()
    for name, tensor in found["compiled"].items():
        torch.testing.assert_close(tensor, found["plain"][name], rtol=1e-3, atol=1e-4)
