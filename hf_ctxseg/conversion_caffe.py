"""The authors' DeepLab v2 on ResNet-101, in the names of its port to PyTorch, under our names.

The weights were trained in Caffe (arXiv 1606.00915) and are spread as state dicts of kazuto1011/deeplab-pytorch, which
also trains such models. What differs from other ResNets is in the network `resnet101_caffe`; every block of a dilated
stage has the stage's rate. Pictures come in as blue, green, red, less a mean, in the range 0 to 255: the channels of
the first convolution are turned, so that ours takes red, green, blue.
"""

from collections.abc import Sequence

from .conversion import BACKBONE, Conversion, Tensors, checked, rename, require
from .modeling_deeplabv2 import DeepLabV2Config
from .peer_backbones import CAFFE_MEAN

_NAME = "DeepLab v2 of Caffe"
_WRAPPERS = ("base.", "scale.")  # of the port's multi-scale module, in its present and in older releases
_BLOCKS = {(3, 4, 6, 3): "resnet50_caffe", (3, 4, 23, 3): "resnet101_caffe"}
_LAYERS = {"reduce": "1", "conv3x3": "2", "increase": "3"}


def from_caffe_deeplabv2(
    state_dict: Tensors,
    *,
    atrous_rates: Sequence[int] = (6, 12, 18, 24),
    input_scales: Sequence[float] | None = None,
) -> Conversion:
    """Convert `DeepLabV2_ResNet101_MSC`, or the network within it.

    Args:
        state_dict: The port's tensors.
        atrous_rates: Rates of the classifiers, which the tensors do not tell; ASPP-S has (3, 6, 9, 12) in the port.
        input_scales: Scales at which the network sees the picture; None: (0.5, 0.75, 1) where the tensors lie within
            the multi-scale module, else 1 alone.

    Raises:
        ValueError: If the tensors are not those of such a network, with the list.
    """
    wrapper = next((name for name in _WRAPPERS if any(key.startswith(name) for key in state_dict)), "")
    stem = f"{wrapper}layer1.conv1.conv"
    first = require(state_dict, f"{stem}.weight", _NAME)
    backbone, blocks = _network(state_dict, wrapper)
    rates = list(atrous_rates)
    modules = {stem: f"{BACKBONE}.conv1", f"{wrapper}layer1.conv1.bn": f"{BACKBONE}.bn1"}
    for branch in range(len(rates)):
        for theirs in (f"aspp.c{branch}", f"aspp.stages.c{branch}"):
            modules[f"{wrapper}{theirs}"] = f"classifier.branches.{branch}"
    for stage, depth in enumerate(blocks, start=1):
        for block in range(depth):
            theirs, ours = f"{wrapper}layer{stage + 1}.block{block + 1}", f"{BACKBONE}.layer{stage}.{block}"
            for layer, number in _LAYERS.items():
                modules |= {
                    f"{theirs}.{layer}.conv": f"{ours}.conv{number}",
                    f"{theirs}.{layer}.bn": f"{ours}.bn{number}",
                }
            for layer in ("shortcut", "proj"):
                modules |= {
                    f"{theirs}.{layer}.conv": f"{ours}.downsample.0",
                    f"{theirs}.{layer}.bn": f"{ours}.downsample.1",
                }
    tensors = rename({**state_dict, f"{stem}.weight": first.flip(1)}, modules, _NAME)
    scales = input_scales or ((0.5, 0.75, 1.0) if wrapper else (1.0,))
    config = DeepLabV2Config(
        backbone=backbone,
        output_stride=8,
        dilate_first_block=True,
        atrous_rates=rates,
        input_scales=list(scales),
        num_labels=require(tensors, "classifier.branches.0.bias", _NAME).shape[0],
        align_corners=False,
    )
    config, tensors = checked(config, tensors, _NAME)
    return Conversion(config, tensors, _preprocessing(), _notes(rates, scales))


def _network(tensors: Tensors, wrapper: str) -> tuple[str, tuple[int, ...]]:
    """The backbone's name and the blocks of its stages."""
    names = {tuple(key.removeprefix(wrapper).split(".")[:2]) for key in tensors}
    found = tuple(
        sum(name[0] == f"layer{stage}" and name[-1].startswith("block") for name in names) for stage in (2, 3, 4, 5)
    )
    if found not in _BLOCKS:
        known = ", ".join(f"{name} {list(blocks)}" for blocks, name in _BLOCKS.items())
        raise ValueError(f"{_NAME} must have blocks as in {known}, but it has {list(found)}: give its state dict.")
    return _BLOCKS[found], found


def _preprocessing() -> dict[str, list[float]]:
    """Subtract the mean from values of 0 to 255: in terms of values of 0 to 1, divide by 1/255 afterwards."""
    return {"image_mean": [mean / 255 for mean in CAFFE_MEAN], "image_std": [1 / 255] * 3}


def _notes(rates: Sequence[int], scales: Sequence[float]) -> list[str]:
    return [
        "The first convolution took blue, green, red; its channels were turned, so that it takes red, green, blue.",
        f"The tensors do not tell the atrous rates ({', '.join(map(str, rates))}) nor the scales of the input "
        f"({', '.join(f'{scale:g}' for scale in scales)}), whose element-wise maximum counts: both are those of the "
        "published configuration, or as given.",
        "The published scores were reached with a dense CRF after the network, which is no part of the weights.",
    ]
