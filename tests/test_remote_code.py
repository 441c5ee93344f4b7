"""Row H5 of the reliability sheet: a model with its code beside it opens where the package is not installed."""

import ast
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hub_server import HubServer
from model_matrix import VARIANTS
from PIL import Image
from remote_code_helpers import check, made, open_without_package
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation

import hf_ctxseg
from hf_ctxseg import (
    MODELS,
    CtxSegImageProcessor,
    DeepLabV3Config,
    DeepLabV3ForSemanticSegmentation,
    DeepLabV3Model,
    fold_batch_norm,
)
from hf_ctxseg.arguments import DataArguments, ModelArguments
from hf_ctxseg.doctor import examine
from hf_ctxseg.model_building import build_model
from hf_ctxseg.registry import find_head, head_name
from hf_ctxseg.remote_code import auto_maps, code_files, export_remote_code
from hf_ctxseg.samples import ClassInfo

PACKAGE = Path(hf_ctxseg.__file__).parent
CLASSES = ClassInfo(("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), 255)
HEADS = [head_name(classes[0]) for classes in MODELS]


def test_h5_an_export_opens_without_the_package_and_gives_the_same_mask(tiny, live, picture, tmp_path):
    model = made(live, tiny(backbone="test_resnet", atrous_rates=[1, 2]))
    processor = CtxSegImageProcessor.for_backbone("test_resnet")
    export_remote_code(model, tmp_path / "out", processor)
    with HubServer() as hub:
        (found,) = open_without_package([tmp_path / "out"], picture, tmp_path / "client", hub)
    check(found, model, processor, picture)

    # with the package, its own classes come first, asked or not; what they save names no code
    for options in ({}, {"trust_remote_code": True}):
        opened = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out", **options)
        opened_processor = AutoImageProcessor.from_pretrained(tmp_path / "out", **options)
        assert type(opened) is DeepLabV3ForSemanticSegmentation and type(opened_processor) is CtxSegImageProcessor
        opened.save_pretrained(tmp_path / "plain")
        opened_processor.save_pretrained(tmp_path / "plain")
        for name in ("config.json", "preprocessor_config.json"):
            assert "auto_map" not in json.loads((tmp_path / "plain" / name).read_text())
    assert not list((tmp_path / "plain").glob("*.py"))

    # what the process without the package saved has all code with it
    again = tmp_path / "client/again0"
    assert {path.name for path in again.glob("*.py")} == set(code_files("ctxseg_deeplabv3"))
    for name, entries in auto_maps("ctxseg_deeplabv3").items():
        assert json.loads((again / name).read_text())["auto_map"] == entries


@pytest.mark.slow
def test_h5_every_head_and_form_opens_without_the_package(live, picture, tmp_path):
    picture = picture.resize((70, 67))
    forms = [(head, form) for head in HEADS for form in VARIANTS.get(head, {"defaults": {}}).values()]
    fields = {"num_labels": 3, "hidden_size": 16, "auxiliary_hidden_size": 8, "backbone": "test_resnet"}
    configs = [find_head(head)[0](**fields | form) for head, form in forms]
    blocks = {"backbone": "resnet18", "backbone_nonlocal_stages": [16], "use_auxiliary_head": True}
    small = {"backbone_kwargs": {"layers": [1, 1, 2, 2], "channels": [16, 24, 32, 40]}}
    configs.append(DeepLabV3Config(**fields | blocks | small, multi_grid=[1, 2], output_stride=8))
    configs += [DeepLabV3Config(**fields | {"backbone": name}) for name in ("resnet18d_mmseg", "mobilenetv2_100_smp")]
    models = [made(live, config) for config in configs]
    processor = CtxSegImageProcessor()
    for index, model in enumerate(models):
        export_remote_code(model, tmp_path / f"model{index}", processor)
    folders = [tmp_path / f"model{index}" for index in range(len(models))]
    with HubServer() as hub:
        found = open_without_package(folders, picture, tmp_path / "client", hub)
    for item, model in zip(found, models, strict=True):
        check(item, model, CtxSegImageProcessor(align_corners=False), picture)


def test_h5_the_code_is_what_the_modules_import():
    for config_class, _, _ in MODELS:
        files = code_files(config_class.model_type)
        needed = {
            entry.partition(".")[0] for maps in auto_maps(config_class.model_type).values() for entry in maps.values()
        }
        for name, source in files.items():
            assert source.endswith((PACKAGE / name).read_bytes())
            first = source.decode().splitlines()[0]
            assert first.startswith("# ") and version("hf-ctxseg") in first and "Apache-2.0" in first
            needed |= {
                node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level
            }
        assert {f"{module}.py" for module in needed} == set(files)
        assert {"peer_backbones.py", "tf_mobilenet.py", "tf_xception.py"} <= set(files)
        assert not {"training.py", "cli.py", "data.py", "registry.py", "__init__.py"} & set(files)


def test_h5_the_code_needs_no_package_that_transformers_would_ask_for():
    # transformers refuses to run code with an import that it cannot find, wherever in the file it stands
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "timm", "transformers", "safetensors", "numpy", "PIL"}
    for config_class, _, _ in MODELS:
        for name, source in code_files(config_class.model_type).items():
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Import):
                    assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, name
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    assert node.module.partition(".")[0] in allowed | {"typing_extensions"}, name


def test_h5_a_folder_is_exported_with_its_files(run_folder, tmp_path):
    run_folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    (run_folder / "training_args.bin").write_bytes(b"secret")
    (run_folder / "model_old.safetensors").write_bytes(b"another model")
    written = export_remote_code(run_folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in written} | {"config.json", "preprocessor_config.json", "model.safetensors"}
    before = json.loads((run_folder / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after == before | {"auto_map": auto_maps("ctxseg_deeplabv3")["config.json"]}
    assert (tmp_path / "out/model.safetensors").read_bytes() == (run_folder / "model.safetensors").read_bytes()


def test_h5_what_cannot_be_exported_is_refused(run_folder, tiny, live, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not empty, and nothing in it is overwritten"):
        export_remote_code(run_folder, run_folder)
    with pytest.raises(FileNotFoundError, match=r"There is no config\.json in"):
        export_remote_code(tmp_path / "nowhere", tmp_path / "out")
    shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"There is no model\.safetensors in"):
        export_remote_code(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="model type is 'bert', but code can be exported for ctxseg_deeplabv2"):
        code_files("bert")
    with pytest.raises(ValueError, match=r"batch normalisations are folded.* Save the model that it was made from"):
        export_remote_code(fold_batch_norm(made(live, tiny())), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    # a head from outside the package: its code lies we do not know where
    monkeypatch.setattr("hf_ctxseg.remote_code.MODELS", [*MODELS, _outside_head()])
    with pytest.raises(ValueError, match=r"head 'psp' comes from the module 'my_head', outside the package"):
        code_files("ctxseg_psp")


def _outside_head():
    config = type("PSPConfig", (DeepLabV3Config,), {"model_type": "ctxseg_psp", "__module__": "my_head"})
    return config, DeepLabV3Model, DeepLabV3ForSemanticSegmentation


def test_h5_code_found_on_the_hub_is_not_run_unasked(tiny, live, tmp_path):
    folder = tmp_path / "run"
    export_remote_code(made(live, tiny()), folder)
    marker = tmp_path / "was run"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'w')\n")
    assert type(AutoConfig.from_pretrained(folder)) is DeepLabV3Config
    hf_ctxseg.predict(folder, Image.new("RGB", (40, 33)))
    assert not marker.exists()


def test_h4_code_beside_an_image_processor_is_not_even_asked_about(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question="": pytest.fail("transformers asks whether to run code"))
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    marker = tmp_path / "was run"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    entries = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        build_model(ModelArguments(model_name_or_path=str(folder)), DataArguments(), CLASSES)
    assert "fail" in {finding.verdict for finding in examine(folder) if finding.subject == "processor"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    assert "fail" in {finding.verdict for finding in examine(folder) if finding.subject == "config.json"}
    assert not marker.exists()
