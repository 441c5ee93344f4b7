"""Which parameter learns at which rate.

The head, new where the backbone is pretrained, learns faster (DeepLab v2, arXiv 1606.00915, section 4.1.1: ten times);
`layer_decay` slows the backbone's early stages (Bao et al., "BEiT", arXiv 2106.08254, by layer).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .arguments import CtxSegTrainingArguments
from .backbone import DilatedBackbone
from .modeling_ctxseg import CtxSegForSemanticSegmentation


def parameter_groups(model: CtxSegForSemanticSegmentation, arguments: CtxSegTrainingArguments) -> list[dict[str, Any]]:
    """Give the optimizer's groups: backbone and the rest at its multiple of the rate, with and without weight decay.

    With `layer_decay` d below 1 the backbone has groups by stage: its last learns at the full rate, each one before at
    d times that of the next.
    """
    stages = backbone_stages(model.backbone) if arguments.layer_decay < 1 else {}
    last = max(stages.values(), default=0)
    prefix = next((name for name, module in model.named_modules() if module is model.backbone), "")
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = not name.startswith(f"{prefix}.")
            stage = last if is_head else stages.get(name.removeprefix(f"{prefix}."), last)
            # Norms' gains and all biases are vectors; what is left are kernels.
            groups.setdefault((is_head, stage, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": (
                arguments.learning_rate
                * (arguments.head_learning_rate_factor if is_head else 1.0)
                * arguments.layer_decay ** (last - stage)
            ),
            "weight_decay": arguments.weight_decay if decays else 0.0,
        }
        for (is_head, stage, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def backbone_stages(backbone: DilatedBackbone) -> Mapping[str, int]:
    """The stage of each parameter, from 0: that of the map which it is the first to contribute to.

    Modules are taken in the order of the network, which is that of their use.
    """
    levels = [level["module"].replace(".", "_") + "_" for level in backbone._backbone.feature_info.info]
    stages, reached = {}, -1
    for name, module in backbone.named_modules():
        plain = name.removeprefix("_backbone.").removeprefix("model.").replace(".", "_") + "_"
        found = next((stage for stage, level in enumerate(levels) if plain.startswith(level)), None)
        reached = reached if found is None else found
        for own, _ in module.named_parameters(name, recurse=False):
            stages[own] = min(reached + 1, len(levels) - 1) if found is None else found
    return stages
