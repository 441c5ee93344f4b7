"""`ctxseg models`, and heads of the user's own."""

import csv
import json
import re
import subprocess
import sys

import pytest
from cli_helpers import Terminal, exit_code
from huggingface_hub import constants
from transformers import AutoConfig

from hf_ctxseg import preset
from hf_ctxseg.cli import main


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))


def test_heads_and_presets_are_listed(capsys):
    found = {}
    for report in ("table", "csv", "json"):
        assert exit_code("models", "--report", report) == 0
        found[report] = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(found["json"])}
    assert {"deeplabv2", "deeplabv3", "deeplabv3plus", "nonlocal"} <= set(rows)
    assert rows["deeplabv3plus-xception65"] == {
        "name": "deeplabv3plus-xception65",
        "head": "deeplabv3plus",
        "backbone": "xception65",
        "output_stride": 16,
        "reported": "arXiv 1802.02611, section 4.3, VOC 2012",
    }
    assert [row["name"] for row in csv.DictReader(found["csv"].splitlines())] == list(rows)
    lines = found["table"].splitlines()
    assert [line.split()[0] for line in lines[1 : len(rows) + 1]] == list(rows)
    assert any("ctxseg train --preset NAME" in line for line in lines)


def test_a_preset_is_shown_as_a_config(capsys):
    assert exit_code("models", "deeplabv3-mobilenetv2") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("deeplabv3-mobilenetv2: DeepLabV3ForSemanticSegmentation, 2.1 M parameters with 2 ")
    assert "arXiv 1801.04381" in printed.err
    config = AutoConfig.for_model(**json.loads(printed.out))
    assert config.to_dict() == preset("deeplabv3-mobilenetv2").to_dict()
    assert exit_code("models", "deeplabv3-mobilenet") == 2
    assert "did you mean deeplabv3-mobilenetv2" in capsys.readouterr().err


def test_backbones_are_listed_with_what_they_reach(no_cache, capsys):
    assert exit_code("models", "--backbones", "vgg1[13]", "--report", "csv") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["name"], row["strides"], row["channels"], row["low_level"]) for row in rows] == [
        ("vgg11", "32", "512", "True"),
        ("vgg13", "32", "512", "True"),
    ]
    assert int(rows[0]["parameters"]) == 9220480  # the convolutions of VGG-11
    assert exit_code("models", "--backbones", "test_[rv]*t", "--output_stride", "8") == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["name", "test_resnet"]
    assert printed.out.splitlines()[1].split() == ["test_resnet", "8", "16", "32", "96", "0.4", "yes"]
    assert printed.err.splitlines() == ["1 of 2 networks do not reach output stride 8."]


def test_backbones_of_no_use_are_counted_or_listed_with_the_reason(no_cache, capsys):
    assert exit_code("models", "--backbones", "levit_128*") == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert printed.err == "2 of 2 networks give no maps for pictures of any size: --all lists them with the reason.\n"
    assert exit_code("models", "--backbones", "levit_128*", "--all") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 2 and all(len(line.partition(" none: ")[2]) > 10 for line in lines)
    assert exit_code("models", "--backbones", "levit_128*", "--all", "--report", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["strides"] for row in rows] == [[], []] and all(row["reason"] for row in rows)


def test_wrong_questions_about_models_are_refused(no_cache, capsys):
    for arguments, message in [
        (["--backbones", "resnet51"], "timm 1.* has no backbone 'resnet51': did you mean resnet"),
        (["--backbones", "resnet18", "--output_stride", "0"], "output_stride is 0, but must be a whole number"),
        (["--output_stride", "8"], "--output_stride and --all choose among --backbones"),
        (["deeplabv3", "--backbones"], "the configuration of deeplabv3 is printed alone"),
    ]:
        assert exit_code("models", *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and re.search(message, printed.err)


def test_how_far_the_list_is_shows_on_a_terminal(no_cache, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert exit_code("models", "--backbones", "vgg1[13]") == 0
    assert sys.stderr.getvalue() == "\r\033[K1 of 2 checked\r\033[K"


HEAD = """
from hf_ctxseg import ASPP, CtxSegConfig, CtxSegForSemanticSegmentation, CtxSegModel, register
from hf_ctxseg.modeling_ctxseg import ContextHead

class OwnConfig(CtxSegConfig):
    model_type = "ctxseg_own"

class OwnHead(ContextHead):
    def __init__(self, config, channels, reductions):
        super().__init__(config, config.hidden_size)
        self.aspp = ASPP(channels[-1], config.hidden_size, (1, 2))
    def forward(self, features):
        return self.aspp(features[-1])

class OwnModel(CtxSegModel):
    config_class, head_class = OwnConfig, OwnHead

class OwnForSemanticSegmentation(CtxSegForSemanticSegmentation):
    config_class, model_class = OwnConfig, OwnModel

register(OwnConfig, OwnModel, OwnForSemanticSegmentation)
"""


def test_a_head_of_the_users_own_is_known_to_the_command(tmp_path):
    (tmp_path / "own_head.py").write_text(HEAD)
    command = [sys.executable, "-m", "hf_ctxseg.cli", "--import", "own_head", "models", "--report", "csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("own,own,")]


@pytest.mark.parametrize("module", [["no_such_head"], []])
def test_a_module_that_is_not_there_is_named(module, capsys):
    assert main(["--import", *module]) == 2
    assert "--import takes the name of a Python module: " in capsys.readouterr().err
