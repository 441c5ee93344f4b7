"""What models train on and are scored on: augmented crops, whole pictures, and how each becomes tensors."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from .augmentation import resize_pair
from .picture_cache import PictureCache
from .samples import Label, Samples, read_pair

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[torch.Tensor, torch.Tensor]]


class CropMaker:
    """Turns a picture and its label map into an augmented sample, by draws that depend on a key alone.

    Args:
        transform: Augmentation of (`tv_tensors.Image`, `tv_tensors.Mask`), all of one size afterwards.
        image_processor: Rescales and normalises; called with `do_resize=False`.
        longest_edge: If given, image and label are first scaled so that the longer edge has this many pixels, as the
            image processor does in evaluation.
    """

    def __init__(
        self,
        transform: Transform,
        image_processor: Callable[..., Mapping[str, torch.Tensor]],
        longest_edge: int | None = None,
    ) -> None:
        if longest_edge is not None and longest_edge < 1:
            raise ValueError(f"longest_edge is {longest_edge}, but it must be at least 1.")
        self.transform = transform
        self.image_processor = image_processor
        self.longest_edge = longest_edge

    def prepare(self, picture: Image.Image, label: Label) -> tuple[torch.Tensor, torch.Tensor]:
        """What is the same in every epoch: uint8 (3, H, W) and labels (H, W), scaled to the longest edge."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, H, W)
        image, mask = tv_tensors.Image(pixels), tv_tensors.Mask(torch.from_numpy(label.copy()))
        if self.longest_edge is not None:
            image, mask = resize_pair(image, mask, _fit(label.shape, self.longest_edge))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)

    def draw(self, image: torch.Tensor, mask: torch.Tensor, key: str) -> dict[str, torch.Tensor]:
        """Augment what `prepare` gives: pixel_values float (3, h, w), labels int64 (h, w)."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: in the main process it would reset the accelerator's generators too
            seed = int.from_bytes(blake2b(key.encode(), digest_size=7).digest(), "big")
            torch.default_generator.manual_seed(seed)
            drawn, drawn_mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        batch = self.image_processor(
            images=drawn.as_subclass(torch.Tensor),
            segmentation_maps=drawn_mask.numpy(),
            do_resize=False,
            return_tensors="pt",
        )
        return {"pixel_values": batch["pixel_values"][0], "labels": batch["labels"][0].to(torch.int64)}


def _fit(size: tuple[int, ...], longest_edge: int) -> tuple[int, int]:
    height, width = (max(1, round(edge * longest_edge / max(size))) for edge in size)
    return height, width


class TrainingDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Augmented samples whose random draws depend on (seed, epoch, index) alone.

    A run resumed in the middle of an epoch, or with another number of workers, therefore sees the same pictures.

    Args:
        samples: Images with labels.
        transform: Augmentation, as for `CropMaker`.
        image_processor: As for `CropMaker`.
        seed: Seed of the draws.
        longest_edge: As for `CropMaker`.
        cache_bytes: Budget for decoded pictures kept in memory, filled right away; 0 keeps none.

    Shape:
        pixel_values float (3, h, w), labels int64 (h, w); and the sample's name, for messages.
    """

    def __init__(
        self,
        samples: Samples,
        transform: Transform,
        image_processor: Callable[..., Mapping[str, torch.Tensor]],
        seed: int,
        longest_edge: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.samples = samples
        self.crops = CropMaker(transform, image_processor, longest_edge)
        self.seed = seed
        self.cache = PictureCache(len(samples), self._prepared, cache_bytes) if cache_bytes else None
        # Shared memory: workers that outlive an epoch must see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn from now on; accelerate's data loaders call it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def _prepared(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.crops.prepare(*read_pair(self.samples, index))

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.cache.get(index) if self.cache is not None else None
        image, mask = found or self._prepared(index)
        key = f"{self.seed}/{int(self._epoch)}/{index}"
        return {**self.crops.draw(image, mask, key), "name": self.samples.name(index)}


class EvaluationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Whole images as the image processor makes them, with their labels untouched.

    Args:
        samples: Images with labels.
        image_processor: Called with its own settings, its resize included.

    Shape:
        pixel_values float (3, h, w), labels int64 (H, W) of the size the label was stored with.
    """

    def __init__(self, samples: Samples, image_processor: Callable[..., Mapping[str, torch.Tensor]]) -> None:
        self.samples = samples
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = read_pair(self.samples, index)
        pixel_values = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"index": index, "pixel_values": pixel_values, "labels": torch.from_numpy(label.astype(np.int64))}


def collate_evaluation(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collect evaluation samples whose sizes may differ: index (B,), and lists of pixel_values and labels."""
    return {
        "index": torch.tensor([sample["index"] for sample in batch]),
        "pixel_values": [sample["pixel_values"] for sample in batch],
        "labels": [sample["labels"] for sample in batch],
    }
