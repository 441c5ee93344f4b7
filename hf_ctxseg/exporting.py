"""Models as files for other runtimes: ONNX, and `torch.export`'s `.pt2`.

A file is compared in its own runtime with the model that it was made from, at other sizes and numbers of pictures
than it was traced with, before it takes its name. Metadata in it say what goes in and what comes out.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .aspp import ASPP
from .folding import fold_batch_norm
from .image_processing_ctxseg import CtxSegImageProcessor
from .inference import Predictor
from .modeling_ctxseg import CtxSegForSemanticSegmentation
from .new_folder import to_disk
from .same_padding import patch_same_padding
from .upsampling import upsample

Shape = tuple[int, int, int]  # pictures, height, width
Runner = Callable[[torch.Tensor], torch.Tensor]

METADATA_FILE = "ctxseg.json"  # within a .pt2 file
_TOLERANCE = 1e-4  # of the largest logit
# No map of the usual strides, halved by a non-local block or a smaller scale, is of length 1, which torch.export takes
# for a case of its own.
_TRACED: Shape = (2, 193, 257)
_OTHERS: tuple[Shape, ...] = ((1, 226, 178), (3, 161, 290))


class ExportError(RuntimeError):
    """A model that cannot be exported as asked, or whose file gave other results than the model."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Args:
        path: The file.
        metadata: What the file says of itself: input, output, classes, palette and normalisation, as text or JSON.
        checks: One sentence for each comparison with the model.
    """

    path: Path
    metadata: dict[str, str]
    checks: tuple[str, ...]


def export(
    model: str | Path | CtxSegForSemanticSegmentation,
    output: str | Path,
    processor: CtxSegImageProcessor | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    mask: bool = False,
    uint8: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write a model as ONNX or as a program of `torch.export`, and compare the file with the model in its runtime.

    Args:
        model: A run folder, the name of a model on the Hub, or a segmentation model of this package.
        output: A new file, `.onnx` or `.pt2`.
        processor: The image processor; by default the model's own.
        height: Height of the pictures; with `width`, the file takes one picture of this size and no other. None: any
            number of pictures of any size above about 50 pixels.
        width: Width of the pictures.
        mask: Whether the file gives class indices (B, H, W) of the pictures' size, uint8 (int32 above 256 classes);
            else logits (B, K, h, w) at the network's stride, float32.
        uint8: Whether the file takes RGB pictures as they are, uint8 (B, H, W, 3), and normalises them itself; else
            `pixel_values` of the image processor, float32 (B, C, H, W).
        opset: ONNX opset; None: the exporter's own choice.

    Returns:
        The path, the metadata, and what was compared.

    Raises:
        ValueError: If the model cannot be read, an option does not fit, or the file exists.
        ImportError: If packages for ONNX are missing.
        ExportError: If the model cannot be exported so, or the file gives other results; no file is left.
    """
    output = _checked_output(Path(output), opset)
    if (height is None) != (width is None) or (height is not None and min(height, width or 0) < 1):
        raise ValueError(f"height is {height} and width is {width}: give both, 1 or more, or neither for any size.")
    opened = Predictor(model, processor, None if isinstance(model, nn.Module) else "cpu")
    reference = copy.deepcopy(opened.model).to("cpu", torch.float32).eval()
    channels = reference.config.num_channels
    if uint8 and channels != 3:
        raise ValueError(f"uint8 takes RGB pictures, but the model takes {channels} channels: leave it out.")
    if height is None:
        _check_any_size(reference)
    for module in reference.modules():
        if isinstance(module, ASPP):
            module.warned_about_rates = True  # of the small pictures here
    program = _Program(reference, opened.processor, mask, uint8).eval()
    metadata = _metadata(program, opened, height, width)
    shapes = (_TRACED, *_OTHERS) if height is None or width is None else ((1, height, width),)
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{output.stem}-", suffix=output.suffix, dir=output.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        exported = _trace(program, shapes)
        if output.suffix == ".onnx":
            _write_onnx(exported, partial, metadata, program.names, len(shapes) > 1, opset)
        else:
            _write_pt2(exported, partial, metadata)
        run = _open(partial)
        checks = tuple(_check(run, reference, program, shape, dynamic=len(shapes) > 1) for shape in shapes)
        to_disk(partial)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(output, metadata, checks)


def _checked_output(output: Path, opset: int | None) -> Path:
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{output} must end in .onnx or, for torch.export, in .pt2: choose such a name.")
    if output.exists():
        raise ValueError(f"{output} exists, and nothing is overwritten: remove it or choose another name.")
    if output.suffix == ".pt2":
        if opset is not None:
            raise ValueError("opset concerns ONNX alone: leave it out, or write a file that ends in .onnx.")
        return output
    if opset is not None and opset < 18:
        raise ValueError(f"opset is {opset}, but must be 18 or more, which the exporter writes.")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX needs the package {error.name}, which is not installed: pip install 'hf-ctxseg[export]'."
        ) from error
    return output


def _check_any_size(model: nn.Module) -> None:
    """Refuse attention in windows (Swin and its kin), whose lengths torch.export reasons about without end."""
    kinds = {type(module).__name__ for module in model.modules() if getattr(module, "window_size", None)}
    if kinds:
        raise ExportError(
            f"The network looks at pictures by windows ({', '.join(sorted(kinds))}), so a file takes one size only: "
            "give height and width."
        )


class _Program(nn.Module):
    """What is exported: the network and, where asked, what comes before and after it."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: CtxSegForSemanticSegmentation, processor: CtxSegImageProcessor, mask: bool, uint8: bool
    ) -> None:
        super().__init__()
        self.network = model if model.folded_batch_norms is not None else fold_batch_norm(model)
        self.network.to(memory_format=torch.contiguous_format)
        self.processor = processor
        self.mask, self.uint8 = mask, uint8
        self.mask_type = torch.uint8 if model.config.num_labels <= 256 else torch.int32
        mean, std = _mean_and_std(processor)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])  # (3, 1, 1)
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    @property
    def names(self) -> tuple[str, str]:
        """Names of input and output."""
        return "pictures" if self.uint8 else "pixel_values", "mask" if self.mask else "logits"

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Give mask or logits of pictures or `pixel_values`."""
        pixels = pictures
        if self.uint8:
            pixels = (pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (B, 3, H, W)
        logits: torch.Tensor = self.network(pixel_values=pixels).logits
        if not self.mask:
            return logits
        scores = upsample(logits, (pixels.shape[2], pixels.shape[3]), self.processor.align_corners)  # (B, K, H, W)
        return scores.argmax(dim=1).to(self.mask_type)


def _mean_and_std(processor: CtxSegImageProcessor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of values 0 to 255, with which the processor gives its `pixel_values`."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return [value / scale for value in mean], [value / scale for value in std]


def _metadata(program: _Program, opened: Predictor, height: int | None, width: int | None) -> dict[str, str]:
    config, processor = opened.model.config, opened.processor
    batch, rows, columns = ("batch", "height", "width") if height is None else ("1", str(height), str(width))
    if program.uint8:
        given = f"pictures: uint8 ({batch}, {rows}, {columns}, 3), RGB, 0 to 255"
    else:
        given = f"pixel_values: float32 ({batch}, {config.num_channels}, {rows}, {columns}), RGB, "
        given += "(picture - mean) / std of pictures of 0 to 255"
    mean, std = _mean_and_std(processor)
    kind = str(program.mask_type).removeprefix("torch.")
    if program.mask:
        result = f"mask: {kind} ({batch}, {rows}, {columns}), class indices"
    else:
        result = f"logits: float32 ({batch}, {config.num_labels}, h, w) at stride {config.output_stride}: resize them "
        result += f"bilinearly to the picture's size (align_corners={processor.align_corners}), then take the arg-max"
    return {
        "input": given,
        "output": result,
        "classes": json.dumps(opened.names, ensure_ascii=False),
        "palette": json.dumps(opened.palette),
        "mean": json.dumps([round(value, 6) for value in mean]),
        "std": json.dumps([round(value, 6) for value in std]),
        "resize_first": json.dumps(dict(processor.size) if processor.do_resize and processor.size else None),
        "model_type": config.model_type,
        "hf_ctxseg_version": version("hf-ctxseg"),
    }


def _trace(program: _Program, shapes: Sequence[Shape]) -> torch.export.ExportedProgram:
    given = _pictures(program, shapes[0])
    axes = dict.fromkeys((0, 1, 2) if program.uint8 else (0, 2, 3), torch.export.Dim.AUTO)
    try:
        with torch.no_grad(), patch_same_padding():
            exported = torch.export.export(program, (given,), dynamic_shapes=(axes,) if len(shapes) > 1 else None)
    except Exception as error:  # torch raises errors of many kinds
        raise ExportError(
            f"torch.export cannot export the model: {_first_line(error)}{_hint(len(shapes) > 1)}"
        ) from error
    return exported


def _hint(dynamic: bool) -> str:
    return " Some networks take one size only: give height and width." if dynamic else ""


def _write_onnx(
    exported: torch.export.ExportedProgram,
    path: Path,
    metadata: dict[str, str],
    names: tuple[str, str],
    dynamic: bool,
    opset: int | None,
) -> None:
    import onnx

    axes = dict(zip((0, 1, 2) if names[0] == "pictures" else (0, 2, 3), ("batch", "height", "width"), strict=True))
    try:
        written: Any = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=(axes,) if dynamic else None,
        )
        model = written.model_proto
    except Exception as error:  # errors of many kinds, here too
        raise ExportError(f"The ONNX exporter cannot write the model: {_first_line(error)}") from error
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        node.ClearField("metadata_props")  # stack traces, with the folders of this machine
        node.ClearField("doc_string")
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _write_pt2(exported: torch.export.ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)
    try:
        torch.export.save(exported, path, extra_files={METADATA_FILE: json.dumps(metadata, ensure_ascii=False)})
    except Exception as error:  # errors of many kinds, here too
        raise ExportError(f"torch.export cannot write the model: {_first_line(error)}") from error


def _open(path: Path) -> Runner:
    try:
        return _run_onnx(path) if path.suffix == ".onnx" else _run_pt2(path)
    except Exception as error:  # a runtime's own kinds
        raise ExportError(f"The file cannot be opened in its runtime: {_first_line(error)}") from error


def _run_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


def _run_pt2(path: Path) -> Runner:
    module: Runner = torch.export.load(path).module()
    return module


def _pictures(program: _Program, shape: Shape) -> torch.Tensor:
    """Blobs with noise: uint8 (B, H, W, 3), or float32 (B, C, H, W)."""
    count, height, width = shape
    generator = torch.Generator().manual_seed(height)
    channels = program.network.config.num_channels
    blobs = torch.randn(count, channels, height // 32 + 2, width // 32 + 2, generator=generator)
    values = F.interpolate(blobs, (height, width), mode="bilinear")
    values += 0.3 * torch.randn(values.shape, generator=generator)
    if not program.uint8:
        return values
    return (values * 60 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def _check(
    run: Runner, reference: CtxSegForSemanticSegmentation, program: _Program, shape: Shape, *, dynamic: bool
) -> str:
    """Compare a file with the model, image processor included; give a sentence or raise `ExportError`."""
    count, height, width = shape
    where = f"{count} × {reference.config.num_channels} × {height} × {width}"
    given = pixels = _pictures(program, shape)
    if program.uint8:
        pixels = program.processor(
            images=list(given.numpy()), do_resize=False, input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"]
    logits = reference(pixels).logits
    try:
        found = run(given)
    except Exception as error:  # a runtime's own kinds
        raise ExportError(f"The file does not run for {where}: {_first_line(error)}{_hint(dynamic)}") from error
    expected = upsample(logits, (height, width), program.processor.align_corners) if program.mask else logits
    wanted = expected[:, 0] if program.mask else expected
    if found.shape != wanted.shape or (program.mask and int(found.max()) >= expected.shape[1]):
        raise ExportError(
            f"The file gives {program.names[1]} {tuple(found.shape)} up to {found.max()} for {where}, but the model "
            f"{tuple(wanted.shape)}.{_hint(dynamic)}"
        )
    scale = float(logits.abs().max()) or 1.0
    if program.mask:
        best = expected.max(dim=1)
        chosen = expected.gather(1, found[:, None].long())[:, 0]
        difference = float((best.values - chosen).max()) / 2 / scale  # each of the two logits may be off by this
        told = f"the masks agree on {float((found == best.indices).double().mean()):.4%} of the pixels"
    else:
        difference = float((found - expected).abs().max()) / scale
        told = f"largest difference {difference:.1e} of the largest logit"
    if not difference <= _TOLERANCE:
        raise ExportError(f"The file gives other results than the model for {where}: {told}. It was removed.")
    return f"{where}: {told}"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip(' .') if lines else 'no reason given'}."
