"""One step of training on crops with very unequal numbers of valid pixels; as a program, one process of several."""

import json
import sys
from pathlib import Path

import torch

from hf_ctxseg import (
    CtxSegImageProcessor,
    DeepLabV2Config,
    DeepLabV2ForSemanticSegmentation,
    DeepLabV3Config,
    DeepLabV3ForSemanticSegmentation,
)
from hf_ctxseg.arguments import CtxSegTrainingArguments
from hf_ctxseg.samples import ClassInfo
from hf_ctxseg.trainer import SegmentationTrainer
from hf_ctxseg.visualization import default_palette

NAMES = ("ground", "disc", "box")


class UnequalCrops(torch.utils.data.Dataset):
    """Eight random crops; the first is ignored whole, the last nowhere, and class 2 is ever rarer."""

    def __init__(self):
        draw = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(8, 3, 33, 33, generator=draw)
        self.labels = torch.randint(0, 2, (8, 33, 33), generator=draw)
        for index, label in enumerate(self.labels):
            label[:, 3 * index :: 2] = 2
            label[33 * index // 7 :] = 255

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def one_step(folder, several_scales=False, class_weights=None, **arguments):
    """Make a step of plain gradient descent; give the logged loss and how far each tensor moved."""
    torch.manual_seed(0)
    fields = {"output_stride": 8, "id2label": dict(enumerate(NAMES)), "use_auxiliary_head": True}
    fields |= {"classifier_dropout": 0.0, "auxiliary_dropout": 0.0}
    if several_scales:
        config = DeepLabV2Config(backbone="test_resnet", atrous_rates=[1, 2], input_scales=[0.5, 1.0], **fields)
        model = DeepLabV2ForSemanticSegmentation(config)
    else:
        config = DeepLabV3Config(backbone="test_resnet", hidden_size=16, atrous_rates=[1], **fields)
        model = DeepLabV3ForSemanticSegmentation(config)
    training = CtxSegTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        eval_strategy="no",
        save_strategy="no",
        dataloader_num_workers=0,
        freeze_batch_norm="all",
        max_steps=1,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        weight_decay=0.0,
        max_grad_norm=0.0,
        **arguments,
    )
    classes = ClassInfo(NAMES, tuple(default_palette(3)))
    processor = CtxSegImageProcessor.for_backbone("test_resnet")
    dataset = UnequalCrops()
    trainer = SegmentationTrainer(model, training, classes, processor, dataset, class_weights=class_weights)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    moves = {key: value - start[key] for key, value in model.state_dict().items()}
    return trainer.state.log_history[0]["loss"], moves


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found = one_step(target.parent, **json.loads(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        torch.save(found, target)
    torch.distributed.destroy_process_group()
