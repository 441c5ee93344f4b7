"""The code of a model beside its weights, for readers that do not have the package.

`transformers` runs such code only with `trust_remote_code=True`; where the package is installed, the package's own
classes are used. What has to travel is read from the imports of the modules themselves. `register_for_auto_class`, the
stock way, enters only the class that is saved into `auto_map`; here all four entries are made.
"""

import ast
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .image_processing_ctxseg import CtxSegImageProcessor
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .new_folder import checked_target, new_folder
from .publishable import read_json, weight_files
from .registry import MODELS, head_name

_PACKAGE = Path(__file__).parent


def export_remote_code(
    model: str | Path | CtxSegForSemanticSegmentation,
    output_dir: str | Path,
    processor: CtxSegImageProcessor | None = None,
) -> list[Path]:
    """Write a model with the code that it needs: the folder opens without the package, with `trust_remote_code=True`.

    Args:
        model: A folder with a saved model and its image processor, or a model.
        output_dir: A new or empty folder.
        processor: The image processor of a model object; by default one that normalises as its backbone was
            pretrained.

    Returns:
        The files of code.

    Raises:
        FileNotFoundError: The folder holds no model or no image processor.
        ValueError: Its weights are not whole, its head comes from outside the package, its batch normalisations are
            folded, or the output folder holds something.
    """
    target = checked_target(output_dir)
    with new_folder(target) as folder:
        if isinstance(model, (str, Path)):
            configs = ("config.json", "preprocessor_config.json")
            for name in configs:
                read_json(Path(model) / name)  # tells what is missing
            for name in (*configs, *weight_files(Path(model))):
                shutil.copyfile(Path(model) / name, folder / name)
        else:
            model.save_pretrained(folder)
            own = {"align_corners": model.config.align_corners}
            (processor or CtxSegImageProcessor.for_backbone(model.config.backbone, **own)).save_pretrained(folder)
        model_type = read_json(folder / "config.json").get("model_type")
        for name, entries in auto_maps(model_type).items():
            content = read_json(folder / name) | {"auto_map": entries}
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files = code_files(model_type)
        for name, source in files.items():
            (folder / name).write_bytes(source)
    return [Path(output_dir) / name for name in files]


def code_files(model_type: Any) -> dict[str, bytes]:
    """The modules that a model of this type and its image processor consist of, each by its file name.

    Each begins with a line that names the package, its version and its licence.

    Raises:
        ValueError: There is no such type, or its head comes from outside the package.
    """
    modules = {Path(entry.partition(".")[0]) for maps in auto_maps(model_type).values() for entry in maps.values()}
    release = version("hf-ctxseg")
    header = f"# From hf-ctxseg {release}, licensed under Apache-2.0; `pip install hf-ctxseg` has it, too.\n"
    return {f"{name}.py": header.encode() + _source(name) for name in sorted(_closure(map(str, modules)))}


def auto_maps(model_type: Any) -> dict[str, dict[str, str]]:
    """The `auto_map` of `config.json` and of `preprocessor_config.json` for a model with code beside it.

    Raises:
        ValueError: There is no such type, or its head comes from outside the package.
    """
    found = next((classes for classes in MODELS if classes[0].model_type == model_type), None)
    if found is None:
        known = ", ".join(classes[0].model_type for classes in MODELS)
        raise ValueError(f"The model type is {model_type!r}, but code can be exported for {known} only.")
    for part in found:
        if part.__module__.rpartition(".")[0] != __package__:
            raise ValueError(
                f"The head {head_name(found[0])!r} comes from the module {part.__module__!r}, outside the package, "
                "and its code cannot be exported: publish without code and let readers import that module."
            )
    config, model, segmentation = (f"{part.__module__.rpartition('.')[2]}.{part.__name__}" for part in found)
    processor = f"{CtxSegImageProcessor.__module__.rpartition('.')[2]}.{CtxSegImageProcessor.__name__}"
    return {
        "config.json": {
            "AutoConfig": config,
            "AutoModel": model,
            "AutoModelForSemanticSegmentation": segmentation,
            "AutoImageProcessor": processor,
        },
        "preprocessor_config.json": {"AutoImageProcessor": processor},
    }


def _closure(names: Any) -> set[str]:
    """These modules of the package and all that they import from it, directly or not."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        imported = (node for node in ast.walk(ast.parse(_source(name))) if isinstance(node, ast.ImportFrom))
        waiting |= {str(node.module) for node in imported if node.level} - found
    return found


def _source(name: str) -> bytes:
    return (_PACKAGE / f"{name}.py").read_bytes()
