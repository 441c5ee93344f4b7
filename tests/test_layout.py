"""The shape of the package: what may import what, how long a file may be, what remote code export relies on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_ctxseg"
FILES = sorted(PACKAGE.glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

# What saved models consist of: each may import these modules of ours and no other.
MODEL_FILES = {
    "configuration_ctxseg": set(),
    "plain_formulas": set(),
    "winograd": set(),
    "fast_conv": {"plain_formulas", "winograd"},
    "memory_format": {"plain_formulas"},
    "layers": {"fast_conv"},
    "pairwise_relu": {"plain_formulas"},
    "nonlocal_ops": {"pairwise_relu", "plain_formulas"},
    "upsampling": {"plain_formulas"},
    "weight_files": set(),
    "picture_reading": set(),
    "permutohedral": set(),
    "crf": {"permutohedral"},
    "image_processing_ctxseg": {"crf", "picture_reading", "upsampling"},
    "dense_loss": {"plain_formulas", "upsampling"},
    "backbone_probe": set(),
    "backbone_edit": set(),
    "recomputation": {"backbone_edit"},
    "peer_backbones": set(),
    "tf_mobilenet": set(),
    "tf_xception": set(),
    "nonlocal_block": {"configuration_ctxseg", "layers", "nonlocal_ops"},
    "aspp": {"configuration_ctxseg", "layers", "memory_format"},
    "backbone": {
        "configuration_ctxseg",
        "layers",
        "fast_conv",
        "backbone_probe",
        "backbone_edit",
        "nonlocal_block",
        "peer_backbones",
        "tf_mobilenet",
        "tf_xception",
    },
    "modeling_ctxseg": {
        "configuration_ctxseg",
        "layers",
        "memory_format",
        "dense_loss",
        "backbone",
        "nonlocal_block",
        "recomputation",
        "weight_files",
    },
}
# Heads, which may import other heads too.
HEAD_FILES = {
    "configuration_ctxseg",
    "layers",
    "fast_conv",
    "aspp",
    "nonlocal_block",
    "backbone",
    "modeling_ctxseg",
}
# These stand on top; only what is beside or above them may import them.
ABOVE = {
    "cli": set(),
    "demo": {"cli"},
    "training": {"__init__", "cli", "demo"},
    "evaluation": {"__init__", "cli_inference"},
    "trainer": {"cli", "demo", "evaluation", "report", "training"},
    "report": {"evaluation", "training"},
    "scoring": {"cli_inference", "report", "trainer"},
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def relative_imports(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level]


def graph():
    return {path.stem: {node.module for node in relative_imports(path)} for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_are_of_the_form_that_remote_code_export_copies(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}"
            assert (PACKAGE / f"{node.module}.py").exists(), f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != "hf_ctxseg", f"line {node.lineno}"
        elif isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "hf_ctxseg" for alias in node.names), f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_reads_as_an_import_is_one(path):
    # The export finds imports by regular expression, in docstrings too.
    found = re.findall(r"^\s*(?:from|import)\s+\.(\S*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(found) == sorted(node.module for node in relative_imports(path))


def test_package_is_flat():
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []


def test_modeling_files_import_only_what_they_are_made_of():
    found = graph()
    heads = {name for name in found if name.startswith("modeling_")} - set(MODEL_FILES)
    assert "modeling_deeplabv3" in heads
    for name, imports in found.items():
        if name in MODEL_FILES:
            assert imports <= MODEL_FILES[name], name
        if name in heads:
            assert imports <= HEAD_FILES | heads, name


def test_nothing_imports_upwards():
    for name, imports in graph().items():
        for upper, allowed in ABOVE.items():
            assert upper not in imports or name in allowed, f"{name} imports {upper}"


def test_imports_have_no_circle():
    remaining = graph()
    remaining.pop("__init__")
    while remaining:
        free = {name for name, imports in remaining.items() if not imports & set(remaining)}
        assert free, f"a circle among {sorted(remaining)}"
        remaining = {name: imports for name, imports in remaining.items() if name not in free}


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: path.stem)
def test_files_and_functions_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    head = path.stem.startswith("modeling_") and path.stem not in MODEL_FILES
    assert lines <= (60 if path in SCRIPTS else 250 if head else 400)
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first, *_ = node.body
            described = ast.get_docstring(node) is not None
            docstring = first.end_lineno - first.lineno + 1 if described else 0
            assert node.end_lineno - node.lineno + 1 - docstring <= 50, node.name


def test_every_module_says_what_it_is():
    assert [path.stem for path in FILES if not ast.get_docstring(tree(path))] == []


def test_importing_the_package_is_light():
    program = """
import sys
sys.modules["sklearn"] = None  # transformers loads it where it is installed, as for our tests, and it may load pandas
import hf_ctxseg
from transformers import AutoModelForSemanticSegmentation
heavy = {"matplotlib", "datasets", "evaluate", "pandas", "pyarrow", "torch.utils.tensorboard"} & set(sys.modules)
lazy = {name for name in ("training", "trainer", "cli", "data", "metrics") if f"hf_ctxseg.{name}" in sys.modules}
known = hf_ctxseg.DeepLabV3Config in AutoModelForSemanticSegmentation._model_mapping
print(sorted(heavy), sorted(lazy), known)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "[] [] True"
