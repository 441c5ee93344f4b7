from collections import namedtuple
from importlib.metadata import version

import pytest
import torch
from huggingface_hub import constants

from hf_ctxseg import environment
from hf_ctxseg.cli import main
from hf_ctxseg.environment import examine_environment

Usage = namedtuple("Usage", "total used free")


def _found():
    return {item.subject: item for item in examine_environment()}


def test_versions_device_cache_and_disk_are_told(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(environment, "get_token", lambda: None)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name in ("torch", "transformers", "timm", "pillow"):
        assert f"{name} {version(name)}" in said
    assert f"hf-ctxseg      {version('hf-ctxseg')}" in said
    assert f"{tmp_path / 'not' / 'yet'} (made when needed)" in said and "no token" in said
    assert f"{torch.get_num_threads()} threads" in said and "GiB free" in said
    assert not (tmp_path / "not").exists()


def test_requirements_that_are_not_met_fail_with_what_to_type(monkeypatch, capsys):
    asked = ["timm>=999", "no-such-package>=1.2", "pillow>=1", "torch>=999; python_version < '3'"]
    monkeypatch.setattr(environment, "requires", lambda name: [*asked, 'tflite>=999; extra == "convert"'])
    assert main(["doctor"]) == 1
    found = _found()
    assert found["timm"].verdict == found["no-such-package"].verdict == "fail"
    assert found["timm"].text == f"{version('timm')}; needed is >=999: pip install 'timm>=999'"
    assert found["no-such-package"].text.startswith("not installed; needed is >=1.2")
    assert found["packages"].text == f"pillow {version('pillow')}"
    assert found["extra convert"] == ("note", "extra convert", "without tflite>=999: pip install 'hf-ctxseg[convert]'")


def test_offline_scarce_and_locked_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(environment.os, "access", lambda folder, mode: False)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: Usage(1, 1, 2**30))
    found = _found()
    assert found["Hub"].verdict == "note" and "HF_HUB_OFFLINE" in found["Hub"].text
    assert found["cache"].verdict == "fail" and "set HF_HOME" in found["cache"].text
    assert found["disk here"].verdict == "note" and found["disk here"].text.startswith("1.0 GiB free: ")


@pytest.mark.parametrize(
    ("able", "words"),
    [
        ({"amx_bf16": True, "avx2": True}, "bf16 by amx_bf16"),
        ({"avx2": True}, "no instructions for bf16"),
        ({}, "no "),
    ],
)
def test_what_a_processor_can_is_told(monkeypatch, able, words):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert words in _found()["CPU"].text
