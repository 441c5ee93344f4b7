"""The operators by themselves, against the plain formulas that peers compute."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch.nn import functional as F

from hf_ctxseg import ASPP, DenseCRF, upsampled_argmax, upsampled_cross_entropy
from hf_ctxseg.conversion import aspp_modules, rename
from hf_ctxseg.demo_scenes import render_scene
from hf_ctxseg.metrics import MeanIoU
from hf_ctxseg.nonlocal_ops import nonlocal_attention

from ..pydensecrf_outputs import coarse_probabilities, infer
from .measuring import Case, Side, Step, Target

Tensors = list[torch.Tensor]
Size = tuple[int, int]

WIDTH = 256  # D, channels of theta, phi and g; theta and phi have twice as many in gaussian mode

_NONLOCAL_TARGETS = {
    ("concatenation", False, 1089): Target("concatenation, N = 1089, forward, literal form", 300, 300),
    ("concatenation", True, 8192): Target("concatenation, N = 8192, training, split form", 15, 10),
    ("dot_product", True, 4096): Target("dot product, N = 4096, training", 10, 5),
    ("embedded_gaussian", True, 4096): Target("embedded gaussian, N = 4096, training", 1.0, 6),
}


def cases(full: bool, quick: bool) -> Iterator[Case]:
    """Give the cases of the operators; `quick` is for a look at whether everything runs."""
    for mode in ("concatenation", "dot_product", "embedded_gaussian", "gaussian"):
        for training in (False, True):
            for n in (16, 100) if quick else (512, 1089, 2048, 4096, 8192, 16384) if full else (1089, 4096, 8192):
                if full or quick or training or (mode, n) == ("concatenation", 1089):
                    yield _nonlocal_case(mode, training, n)
    sizes = [(32, 64)] if quick else [(256, 256), (512, 512), (1024, 1024), (1024, 2048)]
    for classes in (21, 150):
        for size in sizes:
            yield _loss_case(classes, size)
            yield _argmax_case(classes, size)
    for training in (False, True):
        yield _aspp_case(training, *((16, 5) if quick else (2048, 33)))
    for images in (1, 4) if quick else (2, 16):
        yield _evaluation_case(images, (32, 32) if quick else (512, 512))
    if find_spec("pydensecrf"):  # from source, by hand: see scripts/pydensecrf_outputs.py
        yield _crf_case((33, 40) if quick else (513, 513))


def _nonlocal_case(mode: str, training: bool, n: int) -> Case:
    what = "training" if training else "forward"
    pairs = 4 * n * n  # bytes of one matrix of pairs
    forms: dict[str, tuple[Callable[..., torch.Tensor], int]]
    if mode == "concatenation":
        forms = {"split form": (_split, pairs * (4 if training else 2))}
        literal = {"literal form": (_literal, pairs * WIDTH * (8 if training else 4))}
        forms = forms if training else literal | forms
    else:
        forms = {
            "plain formula": (_dot_product if mode == "dot_product" else _softmax, pairs * (4 if training else 2))
        }
    sides = [Side("ours", partial(_make_nonlocal, None, mode, n, training))]
    for name, (form, needs) in forms.items():
        # Peers write the literal form; the split one stands beside, as a better form they could have.
        shipped = not (name == "split form" and "literal form" in forms)
        sides.append(Side(name, partial(_make_nonlocal, form, mode, n, training), needs, shipped))
    target = _NONLOCAL_TARGETS.get((mode, training, n))
    return Case(f"non-local {mode} {what} N={n}", f"{mode.replace('_', ' ')}, {what}", n, tuple(sides), target)


def _make_nonlocal(
    form: Callable[..., torch.Tensor] | None, mode: str, n: int, training: bool, device: torch.device
) -> Step:
    generator = torch.Generator().manual_seed(0)
    width = 2 * WIDTH if mode == "gaussian" else WIDTH
    # Channel by channel in memory, as convolutions give them.
    maps = [torch.randn(1, channels, n, generator=generator) / 2 for channels in (width, width, WIDTH)]
    inputs = [values.transpose(1, 2).to(device).requires_grad_(training) for values in maps]
    projection = (torch.randn(2 * width, generator=generator) / 10).to(device).requires_grad_(training)
    upstream = torch.randn(1, n, WIDTH, generator=generator).to(device)
    scale = 1.0 if mode == "gaussian" else width**-0.5
    given = projection if mode == "concatenation" else None

    def forward() -> torch.Tensor:
        return form(*inputs, scale, projection) if form else nonlocal_attention(*inputs, mode, scale, given)

    if mode == "concatenation":
        inputs_and_weights = [*inputs, projection]
    else:
        inputs_and_weights = inputs
    return _trained(forward, inputs_and_weights, upstream) if training else _untrained(forward)


def _literal(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, scale: float, projection: torch.Tensor
) -> torch.Tensor:
    """The formula as the paper and mmcv write it: a 1×1 convolution over all pairs, (2 D, N, N) large."""
    queries = theta.mT.unsqueeze(3).expand(-1, -1, -1, phi.shape[1])
    keys = phi.mT.unsqueeze(2).expand(-1, -1, theta.shape[1], -1)
    pairs = torch.cat([queries, keys], dim=1)  # (B, 2 D, Q, K)
    weights = F.relu(F.conv2d(pairs, projection.view(1, -1, 1, 1)))  # (B, 1, Q, K)
    return weights[:, 0] / phi.shape[1] @ g


def _split(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, scale: float, projection: torch.Tensor
) -> torch.Tensor:
    queries, keys = theta @ projection[: theta.shape[2]], phi @ projection[theta.shape[2] :]
    return F.relu(queries.unsqueeze(2) + keys.unsqueeze(1)) / phi.shape[1] @ g


def _dot_product(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, *_: object) -> torch.Tensor:
    return theta @ phi.mT / phi.shape[1] @ g


def _softmax(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, scale: float, *_: object) -> torch.Tensor:
    return (theta @ phi.mT * scale).softmax(dim=-1) @ g


def _loss_case(classes: int, size: Size) -> Case:
    sides = [Side(name, partial(_make_loss, name == "ours", classes, size)) for name in ("ours", "plain formula")]
    target = Target("loss + backward, K = 150, 1024×1024", 4, 8) if (classes, size) == (150, (1024, 1024)) else None
    name = f"loss and backward K={classes} {size[0]}x{size[1]}"
    return Case(name, f"loss + backward, {classes} classes", size[0] * size[1], tuple(sides), target)


def _make_loss(ours: bool, classes: int, size: Size, device: torch.device) -> Step:
    logits = _small_logits(classes, size, device).requires_grad_()
    labels = torch.randint(0, classes, (1, *size), generator=torch.Generator().manual_seed(1))
    labels[:, : size[0] // 16] = 255
    labels = labels.to(device)

    def step() -> Tensors:
        if ours:
            loss = upsampled_cross_entropy(logits, labels, ignore_index=255)
        else:
            upsampled = F.interpolate(logits, size, mode="bilinear")
            loss = F.cross_entropy(upsampled, labels, ignore_index=255)
        return [loss, *torch.autograd.grad(loss, logits)]

    return step


def _argmax_case(classes: int, size: Size) -> Case:
    sides = [Side(name, partial(_make_argmax, name == "ours", classes, size)) for name in ("ours", "plain formula")]
    target = Target("arg-max, K = 150, 1024×2048", 2, 20) if (classes, size) == (150, (1024, 2048)) else None
    name = f"arg-max K={classes} {size[0]}x{size[1]}"
    return Case(name, f"arg-max, {classes} classes", size[0] * size[1], tuple(sides), target)


def _make_argmax(ours: bool, classes: int, size: Size, device: torch.device) -> Step:
    logits = _small_logits(classes, size, device)
    if ours:
        return lambda: [upsampled_argmax(logits, size)]
    return _untrained(lambda: F.interpolate(logits, size, mode="bilinear").argmax(dim=1))


def _small_logits(classes: int, size: Size, device: torch.device) -> torch.Tensor:
    shape = (1, classes, size[0] // 8, size[1] // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _aspp_case(training: bool, channels: int, size: int) -> Case:
    what = "training" if training else "inference"
    make = partial(_make_aspp, channels, size, training)
    sides = (
        Side("ours", partial(make, "ours")),
        Side("torchvision", partial(make, "contiguous")),
        Side("torchvision, channels last", partial(make, "channels last"), shipped=False),
    )
    target = Target(f"ASPP head, {channels} channels, {size}×{size}, {what}", 1.4 if training else 2, 1)
    name = f"ASPP {what} {channels} channels {size}x{size}"
    return Case(name, f"ASPP, {what}", size * size, sides, None if channels < 2048 else target)


def _make_aspp(channels: int, size: int, training: bool, form: str, device: torch.device) -> Step:
    from torchvision.models.segmentation.deeplabv3 import ASPP as TorchvisionASPP

    torch.manual_seed(0)
    rates = [12, 24, 36]
    peer = TorchvisionASPP(channels, rates, WIDTH)
    module: torch.nn.Module = peer
    if form == "ours":
        module = ASPP(channels, WIDTH, rates)
        theirs = {f"peer.{key}": value for key, value in peer.state_dict().items()}
        tensors = rename(theirs, aspp_modules("peer", "own", len(rates)), "torchvision's ASPP")
        module.load_state_dict({key.removeprefix("own."): value for key, value in tensors.items()})
        module.warned_about_rates = True  # these rates are what is measured
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 if training else 1, channels, size, size, generator=generator)
    if form != "contiguous":  # our models hand their maps on so
        x = x.contiguous(memory_format=torch.channels_last)
    if form == "channels last":
        module = module.to(memory_format=torch.channels_last)
    without_dropout(module.train(training)).to(device)
    x = x.to(device).requires_grad_(training)
    if not training:
        return _untrained(lambda: module(x))
    upstream = torch.randn(2, WIDTH, size, size, generator=generator).to(device)

    def step() -> Tensors:
        y = module(x)
        return [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream)[:1]]

    return step


def _evaluation_case(images: int, size: Size) -> Case:
    sides = (
        Side("ours", partial(_make_evaluation, True, images, size)),
        Side("arithmetic of evaluate's mean_iou", partial(_make_evaluation, False, images, size)),
    )
    target = Target(f"evaluation, {images} images of {size[0]}×{size[1]}, K = 150", 4) if images == 16 else None
    return Case(f"evaluation {images} images", "evaluation, 150 classes", images, sides, target, devices=("cpu",))


def _make_evaluation(ours: bool, images: int, size: Size, device: torch.device) -> Step:
    generator = torch.Generator().manual_seed(0)
    reference, other = torch.randint(0, 150, (2, *size), generator=generator)
    prediction = torch.where(torch.rand(size, generator=generator) < 0.8, reference, other)  # a fair model's
    reference[: size[0] // 16] = 255

    def streamed() -> Tensors:
        metric = MeanIoU(num_labels=150, ignore_index=255)
        for _ in range(images):  # a loader gives one new picture after another
            metric.add(prediction=prediction.clone(), reference=reference.clone())
        return [torch.tensor(metric.compute()["per_category_iou"])]

    def collected() -> Tensors:
        pairs = [(prediction.clone().numpy(), reference.clone().numpy()) for _ in range(images)]
        return [torch.from_numpy(_iou_of_histograms(pairs)).float()]

    return streamed if ours else collected


def _iou_of_histograms(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """IoU of each class from three histograms per picture, as the `mean_iou` of `evaluate` counts."""
    totals = np.zeros((3, 150))
    for prediction, reference in pairs:
        counted = reference != 255
        prediction, reference = prediction[counted], reference[counted]
        for row, values in enumerate((prediction[prediction == reference], prediction, reference)):
            totals[row] += np.histogram(values, bins=150, range=(0, 149))[0]
    return totals[0] / (totals[1] + totals[2] - totals[0])


def _crf_case(size: Size) -> Case:
    sides = tuple(Side(name, partial(_make_crf, name == "ours", size)) for name in ("ours", "pydensecrf2"))
    name = f"dense CRF 10 iterations K=21 {size[0]}x{size[1]}"
    return Case(name, "dense CRF, 21 classes", size[0] * size[1], sides, devices=("cpu",))


def _make_crf(ours: bool, size: Size, device: torch.device) -> Step:
    picture, label = render_scene(0, size)
    probabilities = coarse_probabilities(label, 21)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    if ours:
        return lambda: [DenseCRF()(probabilities[None], pixels)[0]]
    return lambda: [torch.from_numpy(infer(probabilities.numpy(), picture, DenseCRF()))]


def without_dropout(module: torch.nn.Module) -> torch.nn.Module:
    """Switch dropout off, so that results can be compared."""
    for part in module.modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.p = 0.0
    return module


def _untrained(forward: Callable[[], torch.Tensor]) -> Step:
    def step() -> Tensors:
        with torch.no_grad():
            return [forward()]

    return step


def _trained(forward: Callable[[], torch.Tensor], inputs: Tensors, upstream: torch.Tensor) -> Step:
    def step() -> Tensors:
        y = forward()
        return [y, *torch.autograd.grad(y, inputs, upstream)]

    return step
