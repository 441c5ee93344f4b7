"""Fully connected conditional random field after a network: masks that follow the edges of the picture.

Krähenbühl and Koltun (arXiv 1210.5644), as DeepLab v1 (arXiv 1412.7062) and v2 (arXiv 1606.00915) use it: every pixel
is tied to every other by a kernel of their distance, and by one of their distance and colours. Filtering is that of
the permutohedral lattice: the results are those of the authors' C++ code, which pydensecrf wraps, without a compiler.
"""

import math
from dataclasses import dataclass, fields

import torch
from typing_extensions import Self

from .permutohedral import PermutohedralLattice

# Values of `DenseCRF` other than its defaults, by the name that `DenseCRF.preset` takes.
PRESETS: dict[str, dict[str, float]] = {
    "default": {},
    # DeepLab-LargeFOV and -MSc-LargeFOV on VOC: `run_densecrf.sh` of the authors' release (the paper gives the ranges
    # of the search: weight 5 to 10, 50 to 100 pixels, 3 to 10 grey values)
    "deeplabv1": {"bilateral_weight": 4, "bilateral_std_xy": 49, "bilateral_std_rgb": 5},
    # DeepLab v2 on VOC, ResNet-101 and VGG-16: settings of the released models, the first of them also those of
    # kazuto1011/deeplab-pytorch for VOC and COCO-Stuff
    "deeplabv2": {"gaussian_std": 1, "bilateral_weight": 4, "bilateral_std_xy": 67, "bilateral_std_rgb": 3},
    "deeplabv2-vgg": {
        "gaussian_weight": 2,
        "gaussian_std": 2,
        "bilateral_weight": 4,
        "bilateral_std_xy": 65,
        "bilateral_std_rgb": 3,
    },
    # the examples of Krähenbühl and Koltun's code and of pydensecrf's README
    "krahenbuhl": {"bilateral_weight": 10, "bilateral_std_xy": 60, "bilateral_std_rgb": 20},
    "pydensecrf": {"bilateral_weight": 10, "bilateral_std_xy": 80, "bilateral_std_rgb": 13},
    # for networks whose masks are fine already: the best of seven on five training pictures of CamVid, 480×360
    "light": {"gaussian_weight": 0, "bilateral_weight": 2, "bilateral_std_xy": 20, "bilateral_std_rgb": 5},
}
_LEAST = 1e-5  # probabilities below count as this, as in pydensecrf's unary_from_softmax
_TOLERANCE = 0.01  # of the sum of probabilities; half precision rounds it by less


@dataclass(frozen=True)
class DenseCRF:
    """Fully connected CRF with Potts potentials, solved by mean field; its kernels are normalised symmetrically.

    Which parameters help depends on model and data: search them on pictures that are not those of the report. The
    work is linear in pixels, classes and iterations; it takes memory for about seven float32 maps of all classes at
    the picture's size, and 700 bytes per pixel for the lattices.

    Args:
        iterations: Steps of mean field.
        gaussian_weight: Weight of the kernel of distance.
        gaussian_std: Its standard deviation, in pixels.
        bilateral_weight: Weight of the kernel of distance and colours.
        bilateral_std_xy: Its standard deviation of distance, in pixels.
        bilateral_std_rgb: Its standard deviation of each colour, in values of 0 … 255.

    Raises:
        ValueError: If one of them is out of range.
    """

    iterations: int = 10
    gaussian_weight: float = 3
    gaussian_std: float = 3
    bilateral_weight: float = 5
    bilateral_std_xy: float = 60
    bilateral_std_rgb: float = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if "std" in field.name and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} is {value}, but must be a number above 0.")
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} is {value}, but must be a number from 0 on.")
        if self.iterations != int(self.iterations):
            raise ValueError(f"iterations is {self.iterations}, but must be a whole number.")

    @classmethod
    def preset(cls, name: str) -> Self:
        """Give the CRF of a system, with its published parameters.

        Args:
            name: "deeplabv1" (LargeFOV), "deeplabv2" (ResNet-101), "deeplabv2-vgg", "krahenbuhl" or "pydensecrf" (the
                examples of these two codes), "light" (for masks that are fine already), or "default".

        Raises:
            ValueError: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no CRF preset {name!r}: give one of {', '.join(PRESETS)}, or a DenseCRF(…).")
        return cls(**PRESETS[name])  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, probabilities: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Refine the probabilities of a batch; nothing is recorded for autograd.

        Args:
            probabilities: Softmax of the logits, upsampled to the pictures' size; those below 1e-5 count as 1e-5.
            images: The pictures in RGB.

        Returns:
            Probabilities of the same shape, float32.

        Shape:
            probabilities: (B, K, H, W), of any floating-point type
            images: (B, 3, H, W), uint8

        Raises:
            ValueError: If shapes or types are others, the probabilities are not finite or do not sum to 1, or the
                standard deviations are too small for the pictures' size.
        """
        _check(probabilities, images)
        height, width = images.shape[-2:]
        rows, columns = (torch.arange(edge, device=probabilities.device) for edge in (height, width))
        places = torch.cartesian_prod(rows, columns).view(-1, 2).flip(1).float()  # (N, 2), x first
        flat = None
        if self.gaussian_weight and self.iterations:
            flat = PermutohedralLattice(places / self.gaussian_std)
        refined = torch.empty_like(probabilities, dtype=torch.float32)
        for index, picture in enumerate(images.to(probabilities.device)):
            kernels = [] if flat is None else [(self.gaussian_weight, flat)]
            if self.bilateral_weight and self.iterations:
                colours = picture.flatten(1).T.float()  # (N, 3)
                points = torch.cat([places / self.bilateral_std_xy, colours / self.bilateral_std_rgb], dim=1)
                kernels.append((self.bilateral_weight, PermutohedralLattice(points)))
            own = probabilities[index].flatten(1).T.contiguous()  # (N, K)
            unary = own.float().clamp(_LEAST, 1).log_()  # minus the energy
            refined[index] = self._mean_field(unary, kernels).T.view(-1, height, width)
        return refined

    def _mean_field(self, unary: torch.Tensor, kernels: list[tuple[float, PermutohedralLattice]]) -> torch.Tensor:
        belief, scores = unary.softmax(dim=1), torch.empty_like(unary)
        for _ in range(int(self.iterations)):
            scores.copy_(unary)
            for weight, lattice in kernels:
                scores.add_(lattice.filter(belief), alpha=weight)
            torch.softmax(scores, dim=1, out=belief)
        return belief  # (N, K)


def as_crf(crf: DenseCRF | str) -> DenseCRF:
    """Give a CRF, or that of a preset's name.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(crf, str):
        return DenseCRF.preset(crf)
    if not isinstance(crf, DenseCRF):
        raise ValueError(f"crf is a {type(crf).__name__}, but must be a DenseCRF or one of {', '.join(PRESETS)}.")
    return crf


def _check(probabilities: torch.Tensor, images: torch.Tensor) -> None:
    if probabilities.ndim != 4 or not probabilities.is_floating_point() or not probabilities.numel():
        raise ValueError(
            f"The probabilities are a {probabilities.dtype} tensor {tuple(probabilities.shape)}: give a "
            "floating-point one (B, K, H, W) that is not empty."
        )
    batch, _, height, width = probabilities.shape
    if images.dtype != torch.uint8 or tuple(images.shape) != (batch, 3, height, width):
        raise ValueError(
            f"The pictures are a {images.dtype} tensor {tuple(images.shape)}: give them in RGB, uint8, at the size of "
            f"the probabilities, ({batch}, 3, {height}, {width})."
        )
    total = probabilities.sum(dim=1, dtype=torch.float32)
    least, error = float(probabilities.amin()), float(total.sub_(1).abs_().max())
    if not (least >= 0 and error <= _TOLERANCE):  # also where they are not finite
        raise ValueError(
            f"The probabilities start at {least:g}, and their sums over the classes are up to {error:g} off 1: give "
            "finite ones from 0 on that sum to 1, of logits logits.softmax(dim=1)."
        )
