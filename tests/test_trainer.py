import io
import math
from contextlib import redirect_stdout

import pytest
import torch
from PIL import Image
from torch import nn
from training_helpers import NAMES, as_arguments, make_data
from transformers import TrainerCallback, TrainerState

import hf_ctxseg
from hf_ctxseg import CtxSegImageProcessor, DeepLabV3Config, DeepLabV3ForSemanticSegmentation
from hf_ctxseg.arguments import CtxSegTrainingArguments
from hf_ctxseg.console import ConsoleCallback
from hf_ctxseg.samples import ClassInfo
from hf_ctxseg.trainer import SegmentationTrainer
from hf_ctxseg.visualization import default_palette
from hf_ctxseg.wording import duration

CLASSES = ClassInfo(NAMES, tuple(default_palette(3)))


class Crops(torch.utils.data.Dataset):
    """Random pictures of which every pixel has a class; remembers the epochs it was told."""

    def __init__(self, count=4):
        draw = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(count, 3, 33, 33, generator=draw)
        self.labels = torch.randint(0, 3, (count, 33, 33), generator=draw)
        self.told, self.epoch = [], None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.told.append(self.epoch)
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def _trainer(folder, dataset=None, fields=None, **arguments):
    torch.manual_seed(0)
    config = DeepLabV3Config(
        backbone="test_resnet",
        hidden_size=16,
        atrous_rates=[1],
        output_stride=8,
        classifier_dropout=0.0,
        id2label=dict(enumerate(NAMES)),
        **fields or {},
    )
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 0} | arguments
    training = CtxSegTrainingArguments(
        output_dir=str(folder), use_cpu=True, eval_strategy="no", save_strategy="no", **settings
    )
    model = DeepLabV3ForSemanticSegmentation(config)
    processor = CtxSegImageProcessor.for_backbone("test_resnet")
    return SegmentationTrainer(model, training, CLASSES, processor, train_dataset=dataset or Crops())


def test_each_parameter_is_in_the_group_it_belongs_to(tmp_path):
    trainer = _trainer(tmp_path, fields={"use_auxiliary_head": True}, learning_rate=1e-3, weight_decay=0.05)
    groups = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            assert parameter not in groups
            groups[parameter] = (group["lr"], group["weight_decay"])
    norms = {
        parameter
        for module in trainer.model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    }
    seen = set()
    for name, parameter in trainer.model.named_parameters():
        is_backbone = name.startswith("model.backbone.")
        plain = name.endswith(".bias") or parameter in norms
        expected = (1e-3 if is_backbone else 1e-2, 0.0 if plain else 0.05)
        assert groups[parameter] == pytest.approx(expected), name
        seen.add((is_backbone, plain))
    assert len(seen) == 4 and len(groups) == len(list(trainer.model.parameters()))


def test_factor_of_the_head_can_be_chosen(tmp_path):
    trainer = _trainer(tmp_path, learning_rate=1e-3, head_learning_rate_factor=1.0)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {1e-3}


class _Rates(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_learning_rates_follow_the_polynomial(tmp_path):
    trainer, rates = _trainer(tmp_path, learning_rate=1e-3, max_steps=5), _Rates()
    trainer.add_callback(rates)
    trainer.train()
    backbone = [1e-3 * (1 - step / 5) ** 0.9 for step in range(5)]
    for found, rate in zip(rates.rates, backbone, strict=True):
        assert found == pytest.approx([rate, rate, 10 * rate, 10 * rate], rel=1e-6)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.0] * 4, abs=1e-12)


@pytest.mark.parametrize("part", ["none", "backbone", "all"])
def test_frozen_norms_stay_as_loaded_and_the_others_move(tmp_path, part):
    trainer = _trainer(tmp_path, freeze_batch_norm=part, learning_rate=1e-2)
    model = trainer.model
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before = {name: {key: value.clone() for key, value in norm.state_dict().items()} for name, norm in norms.items()}
    kernel = model.backbone._backbone.conv1[0].weight.clone()
    trainer.train()
    frozen, moved = set(), set()
    for name, norm in norms.items():
        same = [torch.equal(value, before[name][key]) for key, value in norm.state_dict().items()]
        assert len(same) == 5 and len(set(same)) == 1, name  # weight, bias, mean, variance, count
        (frozen if same[0] else moved).add("backbone" if "backbone" in name else "head")
    expected = {"none": (set(), {"backbone", "head"}), "backbone": ({"backbone"}, {"head"})}
    assert (frozen, moved) == expected.get(part, ({"backbone", "head"}, set()))
    assert not torch.equal(model.backbone._backbone.conv1[0].weight, kernel)


def test_accumulated_gradients_equal_one_larger_batch(tmp_path):
    settings = {
        "freeze_batch_norm": "all",
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    found = []
    for number, shape in enumerate(({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2})):
        trainer = _trainer(tmp_path / str(number), **settings | shape)
        start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.train()
        moves = {key: value - start[key] for key, value in trainer.model.state_dict().items()}
        found.append((trainer.state.log_history[0]["loss"], moves))
    (loss, moves), (summed_loss, summed_moves) = found
    assert summed_loss == pytest.approx(loss, rel=1e-5)
    assert loss == pytest.approx(math.log(3), rel=0.2)
    assert max(move.abs().max() for move in moves.values()) > 1e-4
    for key, move in moves.items():
        torch.testing.assert_close(summed_moves[key], move, rtol=1e-3, atol=1e-6)


def test_data_set_knows_its_epoch_also_behind_a_wrapped_sampler(tmp_path, monkeypatch):
    from accelerate import data_loader

    # As with several processes: accelerate forgets the data set where the batch sampler is wrapped.
    monkeypatch.setattr(data_loader.DataLoaderShard, "set_epoch", lambda self, epoch: None)
    dataset = Crops()
    _trainer(tmp_path, dataset, max_steps=-1, num_train_epochs=3).train()
    assert dataset.told == [0] * 4 + [1] * 4 + [2] * 4


def test_train_loader_gives_stacked_crops(tmp_path):
    batch = next(iter(_trainer(tmp_path).get_train_dataloader()))
    assert batch["pixel_values"].shape == (2, 3, 33, 33) and batch["labels"].shape == (2, 33, 33)


def test_preview_reaches_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = make_data(tmp_path / "data")
    run = tmp_path / "run"
    hf_ctxseg.train(**as_arguments(data=data, output_dir=run, max_steps=2, report_to="tensorboard", logging_steps=1))
    (events,) = run.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events.parent), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in found.Images("previews")] == [1, 2]
    assert {"eval/mean_iou", "train/loss", "train/learning_rate"} <= set(found.Tags()["scalars"])
    with Image.open(run / "previews" / "step-000002.png") as picture:
        event = found.Images("previews")[-1]
        assert (event.width, event.height) == picture.size
        with Image.open(io.BytesIO(event.encoded_image_string)) as logged:
            assert logged.convert("RGB").tobytes() == picture.convert("RGB").tobytes()


def test_no_preview_where_none_is_wanted(tmp_path):
    data = make_data(tmp_path / "data")
    hf_ctxseg.train(**as_arguments(data=data, output_dir=tmp_path / "run", max_steps=1, preview_images=0))
    assert not (tmp_path / "run" / "previews").exists()


def _printed(step, **logs):
    callback, state = ConsoleCallback(CLASSES), TrainerState(global_step=step, max_steps=20)
    out = io.StringIO()
    with redirect_stdout(out):
        callback.on_log(None, state, None, logs=logs)
    return out.getvalue()


def test_console_lines():
    line = _printed(10, loss=0.51234, learning_rate=1e-4)
    assert line.startswith("step 10/20  loss 0.5123  lr 1.00e-04  ") and line.endswith(" left\n")
    scores = {"eval_mean_iou": 0.5, "eval_mean_accuracy": 0.6, "eval_overall_accuracy": 0.7, "eval_loss": 0.8}
    assert _printed(10, **scores) == (
        "step 10/20  evaluation: mIoU 0.5000  mean accuracy 0.6000  pixel accuracy 0.7000  loss 0.8000\n"
    )
    assert _printed(20, train_runtime=3.0) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "0.42 s"),
        (9.97, "10 s"),
        (12.34, "12 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (7380, "2 h 3 min"),
    ],
)
def test_durations_are_read_aloud(seconds, text):
    assert duration(seconds) == text
