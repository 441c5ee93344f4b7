"""The weight files of a model's folder, checked before they are opened.

transformers follows an index of shards wherever it points, pickles included, and casts whatever a file holds to the
type of the parameter: a file of integers opens as a model.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_FLOATS = {"F16", "BF16", "F32", "F64"}


def check_weight_files(folder: str | Path, variant: str | None = None) -> None:
    """Check the safetensors files that a folder's model consists of.

    Args:
        folder: The folder. What is none, the name of a model on the Hub, is left to transformers.
        variant: As in `from_pretrained`.

    Raises:
        ValueError: If a file is not whole, holds weights that are no floating-point numbers, or an index names a shard
            that is not a safetensors file beside it.
    """
    folder = Path(folder)
    stem = f"model.{variant}" if variant else "model"
    index = folder / f"{stem}.safetensors.index.json"
    if (file := folder / f"{stem}.safetensors").is_file():
        _check_file(file)
    elif index.is_file():
        for name in _shards(index):
            if (folder / name).is_file():  # else transformers tells what is missing
                _check_file(folder / name)


def _shards(index: Path) -> list[str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        names = set(content["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}): save or download the model again.") from error
    for name in names:
        plain = isinstance(name, str) and not set("/\\:") & set(name) and name.endswith(".safetensors")
        if not plain:
            raise ValueError(
                f"{index} names the shard {name!r}, but only safetensors files beside it are opened: get the model "
                "from a source that you trust."
            )
    return sorted(names)


def _check_file(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            kinds = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}
    except SafetensorError as error:
        raise not_whole(file, error) from error
    odd = [f"{key} ({kind})" for key, kind in kinds.items() if kind not in _FLOATS and not _counts(key)]
    if odd:
        listed = ", ".join([*odd[:5], *(["…"] if odd[5:] else [])])
        raise ValueError(f"{file} holds weights that are no floating-point numbers: {listed}. Save the model again.")


def not_whole(name: object, error: SafetensorError) -> ValueError:
    """The error for weights of which a file is torn; `name` is the file, or the model on the Hub."""
    return ValueError(f"{name} is not a whole safetensors file ({error}): save or download the model again.")


def _counts(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"
