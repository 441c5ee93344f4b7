"""Losses by name, and weighted sums of them: `cross_entropy`, `ohem(top_k=0.2)`, `cross_entropy + 0.5*lovasz`.

Cross-entropy, ohem and focal are sums over pixels divided by the (weighted) number of valid ones. Training that splits
a batch over steps or processes has to divide by the number of the whole batch, since the mean of the parts' means
gives a pixel more weight the fewer valid ones there are around it. Dice and Lovász look at all pixels of a part
together: of these the mean of the parts is taken, and ohem mines each part by itself.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .dense_loss import upsampled_cross_entropy
from .pixel_losses import upsampled_focal, upsampled_ohem
from .region_losses import upsampled_dice, upsampled_lovasz

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": upsampled_cross_entropy,
    "ohem": upsampled_ohem,
    "dice": upsampled_dice,
    "lovasz": upsampled_lovasz,
    "focal": upsampled_focal,
}
_ACCEPTED = {name: inspect.signature(loss).parameters for name, loss in LOSSES.items()}
# What may stand in brackets; the rest is the same for all terms of a sum.
_OPTIONS = {
    name: [option for option, value in accepted.items() if value.kind is inspect.Parameter.KEYWORD_ONLY]
    for name, accepted in _ACCEPTED.items()
}
_TERM = re.compile(r"\s*(?:([\d.]+(?:[eE][+-]?\d+)?)\s*\*)?\s*([^\s()+*]+)\s*(?:\(([^()]*)\))?\s*")
_USUAL = "such as cross_entropy, ohem(top_k=0.2) or cross_entropy+0.5*lovasz"


@dataclass(frozen=True)
class LossTerm:
    """One loss of a sum.

    Args:
        name: A key of `LOSSES`.
        factor: What it is multiplied by.
        options: Its own arguments.
    """

    name: str
    factor: float = 1.0
    options: dict[str, float] = field(default_factory=dict)

    def accepts(self, argument: str) -> bool:
        """Whether the loss takes an argument, for example class_weights."""
        return argument in _ACCEPTED[self.name]


def parse_loss(text: str) -> tuple[LossTerm, ...]:
    """Read a sum of losses, such as `cross_entropy+0.5*lovasz` or `ohem(thresh=0.7, min_kept=100000)`.

    Raises:
        ValueError: If the text is no such sum, or a name, an option or its value is wrong.
    """
    terms, place = [], 0
    while True:
        found = _TERM.match(text, place)
        if found is None or text[found.end() : found.end() + 1] not in ("", "+"):
            raise ValueError(f"loss is {text!r}, which cannot be read from {text[place:]!r} on: write a sum {_USUAL}.")
        terms.append(_term(*found.groups()))
        place = found.end() + 1
        if place > len(text):
            return tuple(terms)


def _term(factor: str | None, name: str, options: str | None) -> LossTerm:
    if name not in LOSSES:
        raise ValueError(f"There is no loss {name!r}: {_nearest(name, list(LOSSES))}")
    try:
        weight = float(factor or 1)
    except ValueError:
        raise ValueError(f"loss has the factor {factor!r}, which is no number: write a sum {_USUAL}.") from None
    values = {}
    for item in (options or "").split(",") if (options or "").strip() else []:
        option, equals, value = (part.strip() for part in item.partition("="))
        if option not in _OPTIONS[name]:
            raise ValueError(f"The loss {name} has no option {option!r}: {_nearest(option, _OPTIONS[name])}")
        try:
            values[option] = ast.literal_eval(value)
            valid = isinstance(values[option], int | float) and not isinstance(values[option], bool)
        except (ValueError, SyntaxError):
            valid = False
        if not equals or not valid:
            raise ValueError(f"The loss {name} has {item.strip()!r}, but takes numbers, written {option}=0.5.")
    term = LossTerm(name, weight, values)
    LOSSES[name](torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), **values)  # checks the values
    return term


def _nearest(name: str, allowed: list[str]) -> str:
    if not allowed:
        return "it has none."
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(allowed)}."


@dataclass(frozen=True)
class SegmentationLoss:
    """A sum of losses, called with logits (B, K, h, w) and labels (B, H, W); it gives a float32 scalar.

    Args:
        terms: What `parse_loss` gives.
        ignore_index: Label value without a class.
        align_corners: How the logits are upsampled to the labels' size.
        class_weights: Weight of each class, (K,), in the losses that are means over pixels; None: 1 for all.
        label_smoothing: Share of the target that is spread over all classes, in cross_entropy and ohem.
        pixels: What sums over pixels are divided by, as `count` counts; None: the pixels of the labels given.
    """

    terms: tuple[LossTerm, ...]
    ignore_index: int = 255
    align_corners: bool = False
    class_weights: torch.Tensor | None = None
    label_smoothing: float = 0.0
    pixels: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Give the loss; 0 with zero gradient where no pixel is valid."""
        share: torch.Tensor | float = 1.0
        if self.pixels is not None:
            pixels = self.pixels.to(labels.device)
            share = torch.where(pixels > 0, self.count(labels) / pixels, 0)
        losses = [
            term.factor * self._value(term, logits, labels) * (share if term.accepts("class_weights") else 1.0)
            for term in self.terms
        ]
        return torch.stack(losses).sum()

    def _value(self, term: LossTerm, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shared = {"class_weights": self.class_weights, "label_smoothing": self.label_smoothing}
        options = {name: value for name, value in shared.items() if term.accepts(name)} | term.options
        loss = LOSSES[term.name]
        if term.name != "cross_entropy":  # how many pixels they look at depends on the values
            loss = torch.compiler.disable(loss)  # type: ignore[no-untyped-call]
        return loss(logits, labels, self.ignore_index, self.align_corners, **options)

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """Valid pixels, or with class weights the sum of their weights: what a mean over them divides by."""
        valid = labels != self.ignore_index
        if self.class_weights is None:
            return valid.sum()
        weights = self.class_weights.to(labels.device)
        return torch.where(valid, weights[labels.long().clamp(0, len(weights) - 1)], 0).sum()
