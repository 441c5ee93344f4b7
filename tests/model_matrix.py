"""The matrix of heads, backbone families and strides, and a small set of its cells that has every pair."""

from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import torch

from hf_ctxseg import MODELS
from hf_ctxseg.registry import find_head, head_name


class Family(NamedTuple):
    """A timm network: its native stride, whether it dilates to 16 and 8, how it is made small."""

    native: int = 32
    dilates: bool = True
    kwargs: dict | None = None
    low_level: bool = True  # whether it has a map at stride 4


SMALL = {"layers": (1, 1, 2, 2), "channels": (16, 24, 32, 40)}
FAMILIES = {
    "test_resnet": Family(),
    "test_efficientnet": Family(),
    "test_convnext": Family(),
    "test_byobnet": Family(),
    "test_nfnet": Family(),
    "test_vit": Family(native=16, dilates=False, low_level=False),
    "regnetx_002": Family(),
    "mobilenetv2_035": Family(),
    "mobilenetv3_small_050": Family(),
    "resnet18": Family(kwargs=SMALL),
    "resnetv2_50": Family(kwargs={"layers": (1, 1, 2, 2), "channels": (16, 32, 48, 64), "stem_chs": 16}),
    "swin_tiny_patch4_window7_224": Family(
        dilates=False, kwargs={"embed_dim": 24, "depths": (1, 1, 1, 1), "window_size": 4}
    ),
    "densenet121": Family(dilates=False, kwargs={"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
}
LARGER_FAMILIES = {
    "hrnet_w18_small": Family(dilates=False),
    "mobileone_s0": Family(),
    "mobilevitv2_050": Family(),
    "repvgg_a0": Family(),
    "res2net50_26w_4s": Family(kwargs={"layers": (1, 1, 2, 2)}),
    "resnest14d": Family(kwargs={"channels": (16, 24, 32, 40)}),
    "vgg11": Family(dilates=False),
    "xception41": Family(),
}
ALL_FAMILIES = FAMILIES | LARGER_FAMILIES

# Forms of each head; one registered without an entry here is tried with its defaults.
VARIANTS = {
    "deeplabv2": {
        "classifiers": {"atrous_rates": [2, 4]},
        "largefov": {"atrous_rates": [12], "branch_channels": 12},
        "branches": {"branch_channels": 12},
        "scales": {"atrous_rates": [2, 4], "input_scales": [1.0, 1.25]},
    },
    "deeplabv3": {
        "paper": {},
        "mmseg": {"variant": "mmseg", "nonlocal_mode": "embedded_gaussian"},
        "torchvision": {"variant": "torchvision", "nonlocal_mode": "concatenation"},
        "plain": {"variant": "plain", "use_image_pooling": False},
        "group": {"pool_norm": "group", "pooling_window": [24, 32], "nonlocal_mode": "dot_product"},
    },
    "deeplabv3plus": {
        "paper": {},
        "mmseg": {"variant": "mmseg", "nonlocal_mode": "gaussian"},
        "smp": {"variant": "smp"},
        "dense": {"separable": False, "pool_norm": "none", "nonlocal_mode": "dot_product"},
    },
    "nonlocal": {
        "embedded": {},
        "gaussian": {"nonlocal_mode": "gaussian", "sub_sample": True},
        "dot": {"nonlocal_mode": "dot_product", "concat_input": False, "reduction": 1},
        "concatenation": {"nonlocal_mode": "concatenation", "zeros_init": False},
    },
}
RESIDUAL = ("resnet18", "resnetv2_50", "res2net50_26w_4s")  # two blocks in each of their last two stages here
EXTRAS = {
    "none": {},
    "auxiliary": {"use_auxiliary_head": True},
    "align": {"align_corners": True, "use_auxiliary_head": True, "dilate_first_block": True},
    "grid": {"multi_grid": [1, 2], "dilate_first_block": True},
    "blocks": {"backbone_nonlocal_stages": [16], "backbone_nonlocal_mode": "gaussian"},
}
SIZES = [(45, 61), (33, 33), (130, 35), (64, 97), (35, 96)]


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix; stride None is the network's native one."""

    head: str
    variant: str
    family: str
    stride: int | None
    extra: str

    def __str__(self):
        return "-".join(map(str, (self.head, self.variant, self.family, self.stride or "native", self.extra)))

    @property
    def size(self):
        return SIZES[sum(map(ord, str(self))) % len(SIZES)]

    def config(self):
        """The configuration, narrow so that a step takes milliseconds."""
        config_class = find_head(self.head)[0]
        family = ALL_FAMILIES[self.family]
        fields = {
            "backbone": self.family,
            "backbone_kwargs": family.kwargs,
            "output_stride": self.stride or family.native,
            "hidden_size": 16,
            "auxiliary_hidden_size": 8,
            "num_labels": 3,
        }
        return config_class(**fields | VARIANTS.get(self.head, {}).get(self.variant, {}) | EXTRAS[self.extra])

    def build(self, seed=0):
        """A segmentation model in which every parameter matters: no scale is zero, no weights of a block are tiny."""
        torch.manual_seed(seed)
        model = find_head(self.head)[2](self.config())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.amin() == parameter.amax():
                    parameter += 0.1 * torch.randn_like(parameter)
                elif "nonlocal_block" in name:
                    parameter.normal_(std=0.3)
        return model

    def is_possible(self):
        """Whether the family reaches the stride, has the maps and the blocks that are asked for."""
        family = ALL_FAMILIES[self.family]
        return (
            (self.stride is None or family.dilates)
            and (self.extra not in ("grid", "blocks") or self.family in RESIDUAL)
            and (family.low_level or find_head(self.head)[0].low_level_reduction is None)
        )

    def pairs(self):
        """The pairs of choices that this cell has; a variant of a head is paired with the strides only."""
        head, variant = ("head", self.head), ("variant", self.head, self.variant)
        rest = [("family", self.family), ("stride", self.stride), ("extra", self.extra)]
        return frozenset([*combinations([head, *rest], 2), (variant, rest[1])])


def cells(families, strides=(8, 16, None), extras=EXTRAS):
    """Every possible cell of these families."""
    forms = [(name, form) for name in HEADS for form in VARIANTS.get(name, {"defaults": {}})]
    every = (Cell(*form, *rest) for form, *rest in product(forms, families, strides, extras))
    return [cell for cell in every if cell.is_possible()]


def covering(rows):
    """Few of the cells that together have every pair of choices which any cell has: the best one, again and again."""
    pairs = {row: row.pairs() for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


HEADS = [head_name(classes[0]) for classes in MODELS]
FIRST = {name: next(iter(VARIANTS.get(name, ["defaults"]))) for name in HEADS}
PAIRWISE = covering(cells(FAMILIES))
