"""Whole models against torchvision, smp and mmsegmentation, with the weights of theirs converted to ours.

Peers get random weights, and statistics of a batch. Outputs are the logits at the size of the picture on both sides;
a training step is forward, loss, backward and optimizer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModelForSemanticSegmentation

from hf_ctxseg import NonLocalConfig
from hf_ctxseg.configuration_ctxseg import CtxSegConfig
from hf_ctxseg.conversion_mmseg import from_mmseg
from hf_ctxseg.conversion_smp import from_smp
from hf_ctxseg.conversion_torchvision import from_torchvision
from hf_ctxseg.folding import fold_batch_norm
from hf_ctxseg.nonlocal_ops import MODES
from hf_ctxseg.registry import find_head, head_name

from .measuring import Case, Side, Step, Target
from .operators import without_dropout

Size = tuple[int, int]
Converted = tuple[CtxSegConfig, dict[str, torch.Tensor]]

_AUXILIARY_WEIGHT = 0.4  # of the auxiliary loss, on both sides
_BN = {"type": "BN", "requires_grad": True}


@dataclass(frozen=True)
class Peer:
    """A network of another library: how it is made, how it is converted, and how it gives logits at full size."""

    library: str
    module: str
    make: Callable[[int, bool], nn.Module]
    convert: Callable[[nn.Module], Converted]
    logits: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    train_logits: Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, ...]] | None = None

    @property
    def installed(self) -> bool:
        """Whether the library is there."""
        return find_spec(self.module) is not None


def _make_torchvision(classes: int, training: bool) -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=classes, aux_loss=training)


def _make_smp(kind: str, stride: int, classes: int, training: bool) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, kind)("resnet50", encoder_weights=None, encoder_output_stride=stride, classes=classes)


def _convert_smp(stride: int, peer: nn.Module) -> Converted:
    return from_smp(peer.state_dict(), "resnet50", encoder_output_stride=stride)


def _mmseg_config(head: Mapping[str, Any]) -> dict[str, Any]:
    """A model of mmsegmentation's own configuration files: ResNetV1c-50 at stride 8, a head of 512 channels."""
    backbone = {"type": "ResNetV1c", "depth": 50, "num_stages": 4, "out_indices": (0, 1, 2, 3), "style": "pytorch"}
    backbone |= {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "norm_cfg": _BN, "contract_dilation": True}
    shared = {"in_channels": 2048, "in_index": 3, "channels": 512, "dropout_ratio": 0.1, "norm_cfg": _BN}
    return {"backbone": backbone, "decode_head": {**shared, "align_corners": False, **head}}


def _make_mmseg(head: Mapping[str, Any], classes: int, training: bool) -> nn.Module:
    from mmseg.models.segmentors import EncoderDecoder

    config = _mmseg_config(head)
    decode_head = {**config["decode_head"], "num_classes": classes}
    return EncoderDecoder(backbone=config["backbone"], decode_head=decode_head, test_cfg={"mode": "whole"})


def _convert_mmseg(head: Mapping[str, Any], peer: nn.Module) -> Converted:
    return from_mmseg(peer.state_dict(), _mmseg_config(head))


def _mmseg_logits(peer: Any, x: torch.Tensor) -> torch.Tensor:
    return peer.encode_decode(x, [{"img_shape": tuple(x.shape[-2:])}])


def _smp(kind: str, stride: int) -> Peer:
    convert = partial(_convert_smp, stride)
    make = partial(_make_smp, kind, stride)
    return Peer("smp", "segmentation_models_pytorch", make, convert, _call, _call_for_training)


def _mmseg(**head: Any) -> Peer:
    return Peer("mmseg", "mmseg", partial(_make_mmseg, head), partial(_convert_mmseg, head), _mmseg_logits)


def _call(peer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return peer(x)


def _call_for_training(peer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (peer(x),)


def _torchvision_logits(peer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return peer(x)["out"]


def _torchvision_train_logits(peer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    outputs = peer(x)
    return outputs["out"], outputs["aux"]


def _convert_torchvision(peer: nn.Module) -> Converted:
    return from_torchvision(peer.state_dict())


PEERS = {
    "DeepLabV3-R50 s8 torchvision": Peer(
        "torchvision",
        "torchvision",
        _make_torchvision,
        _convert_torchvision,
        _torchvision_logits,
        _torchvision_train_logits,
    ),
    "DeepLabV3-R50 s8 smp": _smp("DeepLabV3", 8),
    "DeepLabV3+-R50 s8 smp": _smp("DeepLabV3Plus", 8),
    "DeepLabV3+-R50 s16 smp": _smp("DeepLabV3Plus", 16),
    "DeepLabV3-R50c s8 mmseg": _mmseg(type="ASPPHead", dilations=(1, 12, 24, 36)),
    "DeepLabV3+-R50c s8 mmseg": _mmseg(
        type="DepthwiseSeparableASPPHead", dilations=(1, 12, 24, 36), c1_in_channels=256, c1_channels=48
    ),
    "NL-R50c s8 mmseg": _mmseg(type="NLHead", mode="embedded_gaussian", reduction=2, use_scale=True),
}
# Ratios of inference at 512×512 with 21 classes: time, memory.
_INFERENCE_TARGETS = {
    "DeepLabV3-R50 s8 torchvision": (1.2, 1.1),
    "DeepLabV3-R50 s8 smp": (1.2, 1.1),
    "DeepLabV3+-R50 s8 smp": (1.2, 1.0),
    "DeepLabV3+-R50 s16 smp": (1.1, 1.0),
    "DeepLabV3-R50c s8 mmseg": (1.2, 1.1),
    "DeepLabV3+-R50c s8 mmseg": (1.3, 1.1),
    "NL-R50c s8 mmseg": (1.3, 1.1),
}
_TRAINED = ("DeepLabV3-R50 s8 torchvision", "DeepLabV3-R50 s8 smp")


def cases(full: bool, quick: bool) -> Iterator[Case]:
    """Give the cases of whole models whose peer is installed; by default those that have a target."""
    peers = {name: peer for name, peer in PEERS.items() if peer.installed}
    if quick:
        peers = {name: peer for name, peer in peers.items() if peer.library == "torchvision"}
    sizes = [(64, 64)] if quick else [(512, 512), (512, 1024), (1024, 2048)] if full else [(512, 512)]
    for name, peer in peers.items():
        for classes in (21, 150) if full else (21,):
            for size in sizes:
                yield _inference_case(name, peer.library, classes, size)
    trained = [name for name in _TRAINED if name in peers]
    for name in trained:
        if not quick and (which("c++") or which("g++") or which("clang++")):  # torch.compile needs one on a CPU
            yield _compiled_case(name, peers[name].library)
        for side in (64,) if quick else (256, 512) if full else (256,):
            yield _training_case(name, peers[name].library, 150, (side, side))
    yield _nonlocal_case((64, 64) if quick else (1024, 2048))


def _inference_case(name: str, library: str, classes: int, size: Size) -> Case:
    make = partial(_make_inference, name, classes, size)
    sides = (
        Side("ours", partial(make, "ours")),
        Side("ours, folded", partial(make, "folded")),
        Side(library, partial(make, "shipped")),
        Side(f"{library}, channels last", partial(make, "channels last"), shipped=False),
    )
    target = None
    if classes == 21 and size == (512, 512):
        target = Target(f"{name}, 512×512, inference", *_INFERENCE_TARGETS[name])
    pixels = size[0] * size[1]
    title = f"{name} inference K={classes} {size[0]}x{size[1]}"
    return Case(title, f"{name}, {classes} classes", pixels, sides, target)


def _compiled_case(name: str, library: str) -> Case:
    make = partial(_make_inference, name, 21, (512, 512))
    sides = (
        Side("ours, folded and compiled", partial(make, "compiled"), peak=False),
        Side(library, partial(make, "shipped"), peak=False),
        *(
            Side(f"{library}, {form}", partial(make, form), shipped=False, peak=False)
            for form in ("shipped, compiled", "channels last, compiled")
        ),
    )
    target = Target(f"{name}, 512×512, inference, torch.compile", 1.3)
    return Case(f"{name} compiled", f"{name}, compiled", 512 * 512, sides, target)


def _training_case(name: str, library: str, classes: int, size: Size) -> Case:
    make = partial(_make_training, name, classes, size)
    sides = (
        Side("ours", partial(make, "ours")),
        Side(library, partial(make, "shipped")),
        Side(f"{library}, channels last", partial(make, "channels last"), shipped=False),
    )
    target = Target(f"{name}, training step, batch 2, K = {classes}, {size[0]}×{size[1]}", 1.15, 1.2)
    title = f"{name} training K={classes} {size[0]}x{size[1]}"
    group = f"{name}, training step"
    return Case(title, group, size[0] * size[1], sides, target, with_weights=True, steps=2)


def _nonlocal_case(size: Size) -> Case:
    make = partial(_make_nonlocal_network, size)
    sides = [Side(f"ours, {mode.replace('_', ' ')}", partial(make, mode)) for mode in MODES]
    sides.append(Side("its backbone alone", partial(make, None)))
    # 25 % more than the backbone is a ratio of 1 / 1.25.
    target = Target(f"Non-local R50 s8, {size[0]}×{size[1]}: the head adds at most 25 %", None, 0.8)
    title = f"Non-local network {size[0]}x{size[1]}"
    return Case(title, "Non-local network", size[0] * size[1], tuple(sides), target, timed=False, with_weights=True)


def _make_inference(name: str, classes: int, size: Size, form: str, device: torch.device) -> Step:
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    peer = PEERS[name]
    model = _with_statistics(peer.make(classes, False)).eval()
    if form.startswith(("shipped", "channels last")):
        model = model.to(device)
        if form.startswith("channels last"):
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        logits = partial(peer.logits, model)
        return _step(partial(torch.compile(logits) if form.endswith("compiled") else logits, x))
    own = _converted(peer.convert(model)).to(device)
    if form != "ours":
        own = fold_batch_norm(own)
    corners = own.config.align_corners
    run = torch.compile(own) if form == "compiled" else own
    return _step(lambda: F.interpolate(run(x).logits, size, mode="bilinear", align_corners=corners))


def _make_training(name: str, classes: int, size: Size, form: str, device: torch.device) -> Step:
    peer = PEERS[name]
    assert peer.train_logits is not None
    model = without_dropout(_with_statistics(peer.make(classes, True)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator).to(device)
    labels = torch.randint(0, classes, (2, *size), generator=generator).to(device)
    if form == "ours":
        converted = peer.convert(model)
        converted[0].auxiliary_loss_weight = _AUXILIARY_WEIGHT
        model = without_dropout(_converted(converted))
    elif form == "channels last":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    model.train().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss_of_peer() -> torch.Tensor:
        main, *auxiliary = [
            F.cross_entropy(logits, labels, ignore_index=255) for logits in peer.train_logits(model, x)
        ]
        return main + _AUXILIARY_WEIGHT * sum(auxiliary)

    def step() -> list[torch.Tensor]:
        loss = model(x, labels=labels).loss if form == "ours" else loss_of_peer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return step


def _make_nonlocal_network(size: Size, mode: str | None, device: torch.device) -> Step:
    config = NonLocalConfig(
        backbone="resnet50", output_stride=8, nonlocal_mode=mode or "embedded_gaussian", num_labels=21
    )
    model = AutoModelForSemanticSegmentation.from_config(config).eval().to(device)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    return _step(lambda: model(x).logits if mode else model.backbone(x)[-1])


def _converted(converted: Converted) -> nn.Module:
    config, tensors = converted
    model_class = find_head(head_name(type(config)))[2]
    return model_class.from_pretrained(None, config=config, state_dict=tensors).eval()


def _with_statistics(peer: nn.Module) -> nn.Module:
    """Draw weights, and give each normalisation the statistics of a batch, so that no layer saturates."""
    torch.manual_seed(0)  # of dropout
    generator = torch.Generator().manual_seed(0)
    for part in peer.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    norms = [part for part in peer.modules() if isinstance(part, _BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        peer.train()(torch.randn(2, 3, 64, 64, generator=generator))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.3)  # that of two pooled values says little
    return peer


def _step(forward: Callable[[], torch.Tensor]) -> Step:
    def step() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [forward()]

    return step
