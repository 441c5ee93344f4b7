import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, metadata, packages_distributions, requires, version
from pathlib import Path

import pytest

import hf_ctxseg

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_ctxseg"


def normal(name):
    """A distribution's name as an index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def imported():
    """What the package imports from outside: name of each import -> the distributions that may hold it."""
    known = packages_distributions()  # until Python 3.11 it leaves some out, which are named as their import is
    return {name: {normal(one) for one in known.get(name, [name])} for name in imported_packages()}


def imported_packages():
    found = set()
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            found |= {module.partition(".")[0] for module in modules}
    return found - {*sys.stdlib_module_names, "hf_ctxseg"}


def declared():
    return {normal(re.match(r"[\w.-]+", requirement)[0]): requirement for requirement in requires("hf-ctxseg")}


def test_every_import_is_declared(imported):
    assert {"torch", "yaml", "PIL"} <= imported.keys()
    # Peers, with which `ctxseg convert --verify` compares where they are installed.
    peers = {"ai_edge_litert", "mmseg", "segmentation_models_pytorch"}
    missing = {name for name, distributions in imported.items() if not distributions & declared().keys()} - peers
    assert not missing, f"imported, but not among the dependencies in pyproject.toml: {missing}"


def test_every_dependency_is_needed(imported):
    assert not declared().keys() - set().union(*imported.values())


def test_dependencies_state_a_lowest_version_and_no_highest():
    for requirement in requires("hf-ctxseg"):
        assert re.fullmatch(r"[\w.-]+>=[\d.]+", requirement.partition(";")[0].strip()), requirement


def test_version_has_one_source():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert hf_ctxseg.__version__ == version("hf-ctxseg") == stated[1]
    for path in PACKAGE.glob("*.py"):
        repeated = path.read_text(encoding="utf-8").count(stated[1])
        # A configuration says it too, where the package is not installed; test_configuration holds the two equal.
        assert repeated == (path.stem == "configuration_ctxseg"), path


def test_license_is_apache_2():
    assert metadata("hf-ctxseg")["License-Expression"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004\s", text)
    assert "END OF TERMS AND CONDITIONS" in text


def test_command_shows_its_verbs(monkeypatch, capsys):
    (command,) = entry_points(group="console_scripts", name="ctxseg")
    monkeypatch.setattr(sys, "argv", ["ctxseg", "--help"])
    assert command.load()() == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for verb in ("train", "eval", "predict", "push", "demo"):
        assert re.search(rf"^  {verb} ", printed.out, re.MULTILINE), verb


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("hf_ctxseg", "tests", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"hf_ctxseg-{version('hf-ctxseg')}.dist-info"
    modules = {f"hf_ctxseg/{path.name}" for path in PACKAGE.glob("*.py")}
    modules |= {f"hf_ctxseg/recipes/{path.name}" for path in (PACKAGE / "recipes").glob("*.yaml")}
    assert {name for name in names if not name.startswith(info)} == modules | {
        "hf_ctxseg/py.typed",
        "hf_ctxseg/model_card_template.md",
    }
    assert f"{info}/licenses/LICENSE" in names


def test_floors_are_the_lowest_versions_allowed(tmp_path):
    script = ROOT / "scripts" / "floor_requirements.py"
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=True)
    pins = dict(line.split("==", 1) for line in done.stdout.splitlines() if "python_version" not in line)
    lows = dict(requirement.partition(";")[0].split(">=") for requirement in requires("hf-ctxseg"))
    lows.pop("numpy")  # two lines, told apart by the Python version
    assert {normal(name): pin for name, pin in pins.items()} == {
        normal(name): low.strip() for name, low in lows.items()
    }


@pytest.mark.parametrize("requirement", ["torch", "torch>=2,<3.0,>=1", "torch==2.11"])
def test_floor_needs_a_lowest_version(requirement, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\ndependencies = ["{requirement}"]\n[project.optional-dependencies]\ndemo = []\n'
    )
    script = ROOT / "scripts" / "floor_requirements.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert requirement in done.stderr
