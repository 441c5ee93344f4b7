"""Turns the values or colours that a data set stores into class indices.

Data sets number their classes as they like: from 1, with gaps, several numbers for one class, or in colours. A label
map is translated when it is read, so that everything after it sees classes 0 to K - 1 and the ignored value alone.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from .samples import Label, read_label

Stored = int | tuple[int, int, int]


class LabelMap:
    """What is stored for each class.

    Args:
        stored: For each class its values, or its colours (red, green, blue).
        void: Values or colours that become `ignore_index`, as ignore_index itself does among values; None: all that
            `stored` does not list.
        ignore_index: What pixels without a class become.

    Raises:
        ValueError: If values and colours are mixed, or something is listed twice.
    """

    def __init__(self, stored: Sequence[Sequence[Stored]], void: Sequence[Stored] | None, ignore_index: int) -> None:
        pairs = [(item, index) for index, items in enumerate(stored) for item in items]
        pairs += [(item, ignore_index) for item in void or ()]
        self.is_colours = any(isinstance(item, tuple) for item, _ in pairs)
        if not self.is_colours and ignore_index not in (item for item, _ in pairs):
            pairs.append((ignore_index, ignore_index))
        codes = [self._code(item) for item, _ in pairs]
        twice = sorted({code for code in codes if codes.count(code) > 1})
        if twice:
            raise ValueError(f"{self._named(twice[0])} is stored for more than one class: list it once.")
        order = np.argsort(codes)
        self._codes = np.array(codes, np.int64)[order]
        targets = [target for _, target in pairs]
        fits = 0 <= min(targets) and max(targets) <= 255
        self._targets = np.array(targets, np.uint8 if fits and 0 <= ignore_index <= 255 else np.int32)[order]
        self._void = ignore_index if void is None else None

    def _code(self, item: Stored) -> int:
        if isinstance(item, tuple) != self.is_colours:
            raise ValueError(f"{item} stands among {'colours' if self.is_colours else 'values'}: list one kind alone.")
        return (item[0] << 16 | item[1] << 8 | item[2]) if isinstance(item, tuple) else item

    def _named(self, code: int) -> str:
        return f"colour ({code >> 16}, {code >> 8 & 255}, {code & 255})" if self.is_colours else f"value {code}"

    def __call__(self, image: Image.Image, name: str) -> Label:
        """Translate a picture.

        Args:
            image: A label map as it is stored.
            name: What messages call it.

        Returns:
            (H, W) array of class indices and ignore_index.

        Raises:
            ValueError: If it is no label map, or holds what is not listed.
        """
        codes: npt.NDArray[np.int64]
        if self.is_colours:
            red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int64), -1, 0)
            codes = red << 16 | green << 8 | blue
        else:
            codes = read_label(image, name).astype(np.int64)
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        label: Label = self._targets[places]
        strange = self._codes[places] != codes
        if strange.any():
            if self._void is None:
                found, pixels = np.unique(codes[strange], return_counts=True)
                listed = ", ".join(
                    f"{self._named(code)} ({count} pixel{'s' * (count != 1)})"
                    for code, count in zip(found[:3].tolist(), pixels[:3].tolist(), strict=True)
                )
                more = f" and {len(found) - 3} more" if len(found) > 3 else ""
                raise ValueError(
                    f"{name} holds {listed}{more}, which the recipe lists neither for a class nor as void"
                )
            label[strange] = self._void
        return label
