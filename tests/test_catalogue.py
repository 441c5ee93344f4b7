import json
import sys

import pytest
import timm
import torch
from huggingface_hub import constants
from timm.models import register_model

from hf_ctxseg import (
    DeepLabV3Config,
    DeepLabV3Model,
    DeepLabV3PlusConfig,
    DeepLabV3PlusModel,
    catalogue,
    list_backbones,
)
from hf_ctxseg.catalogue import BackboneInfo, check_backbone, check_backbones

# One small member of each family, and the strides that are known of it.
FAMILIES = {
    "test_resnet": (8, 16, 32),
    "test_efficientnet": (8, 16, 32),
    "test_convnext": (8, 16, 32),
    "test_byobnet": (8, 16, 32),
    "resnet50": (8, 16, 32),
    "regnetx_002": (8, 16, 32),
    "mobilenetv3_small_050": (8, 16, 32),
    "vgg16": (32,),
    "densenet121": (32,),
    "swin_tiny_patch4_window7_224": (32,),
    "vit_tiny_patch16_224": (16,),
    "levit_128s": (),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder; every network is really checked."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ctxseg"


def _maps(model_class, config):
    with torch.device("meta"):
        model = model_class(config).eval()
    with torch.no_grad():
        return model, model(torch.zeros(1, 3, 131, 226, device="meta"), output_hidden_states=True)


def _check(found):
    """Whether what is listed of a network holds for the models that are built of it."""
    for stride in found.strides:
        model, output = _maps(DeepLabV3Model, DeepLabV3Config(backbone=found.name, output_stride=stride))
        shape = (found.channels, -(-131 // stride), -(-226 // stride))
        assert output.hidden_states[-1].shape[1:] == shape
        assert sum(parameter.numel() for parameter in model.backbone.parameters()) == found.parameters
    for stride in {8, 16, 32} - set(found.strides):
        with pytest.raises(ValueError, match=f"(cannot reach output_stride {stride} |no feature maps for pictures)"):
            DeepLabV3Model(DeepLabV3Config(backbone=found.name, output_stride=stride))
    if found.strides:
        config = DeepLabV3PlusConfig(backbone=found.name, output_stride=found.strides[-1])
        if found.low_level:
            _, output = _maps(DeepLabV3PlusModel, config)
            assert output.last_hidden_state.shape[2:] == (33, 57)
        else:
            with pytest.raises(ValueError, match="a feature map at stride 4"):
                DeepLabV3PlusModel(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_listed_can_be_built_and_run(name):
    found = check_backbone(name)
    assert found.strides == FAMILIES[name]
    assert bool(found.reason) == (not found.strides)
    _check(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models()[7::45])
def test_what_is_listed_can_be_built_and_run_all_over_timm(name):
    _check(check_backbone(name))


def test_lists_can_be_searched_by_name_and_stride():
    (found,) = list_backbones("resnet18")
    assert found == BackboneInfo("resnet18", (8, 16, 32), 512, 11176512, True)  # 11 689 512 with the classifier
    assert [found.name for found in list_backbones("test_[rc]*n*t", output_stride=8)] == [
        "test_convnext",
        "test_resnet",
    ]
    assert [found.name for found in list_backbones("vgg1[13]", output_stride=32)] == ["vgg11", "vgg13"]
    assert list_backbones("vgg11", output_stride=8) == []
    assert list_backbones("levit_128s") == []


def test_names_that_match_nothing_are_refused_with_near_ones():
    with pytest.raises(ValueError, match=r"no backbone 'resnet51': did you mean resnet.*Wildcards"):
        list_backbones("resnet51")
    with pytest.raises(ValueError, match=r"no backbone '\*mobilnet\*': did you mean .*mobilenet"):
        list_backbones("*mobilnet*")
    with pytest.raises(ValueError, match="output_stride is 0, but must be a whole number"):
        list_backbones("test_resnet", output_stride=0)


def test_what_was_found_is_kept(cache, monkeypatch):
    names = ["test_resnet", "levit_128s"]
    first = list(check_backbones(names))
    (file,) = cache.iterdir()
    assert timm.__version__ in file.name and set(json.loads(file.read_text())) == set(names)
    monkeypatch.setattr(catalogue, "check_backbone", lambda name: BackboneInfo(name, (1,)))
    assert list(check_backbones(names)) == first
    more = list(check_backbones(["test_convnext", *names]))
    assert more == [BackboneInfo("test_convnext", (1,)), *first]
    assert list(check_backbones(names[:1])) == first[:1] and len(json.loads(file.read_text())) == 3


def test_another_timm_or_torch_is_checked_anew(cache, monkeypatch):
    monkeypatch.setattr(catalogue, "check_backbone", lambda name: BackboneInfo(name, (1,)))
    list(check_backbones(["test_resnet"]))
    monkeypatch.setattr(catalogue, "check_backbone", lambda name: BackboneInfo(name, (2,)))
    for module in (timm, torch):
        monkeypatch.setattr(module, "__version__", "0.1")
        assert list(check_backbones(["test_resnet"])) == [BackboneInfo("test_resnet", (2,))]
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"test_resnet": {"strides": [8]}}', '{"test_resnet": 3}'])
def test_a_spoilt_cache_is_written_anew(cache, content):
    first = list(check_backbones(["test_resnet"]))
    (file,) = cache.iterdir()
    file.write_text(content)
    assert list(check_backbones(["test_resnet"])) == first
    assert json.loads(file.read_text())["test_resnet"]["channels"] == first[0].channels


def test_a_folder_that_cannot_be_written_to_does_no_harm(cache):
    cache.parent.write_text("a file where the folder should be")
    assert [found.name for found in check_backbones(["test_resnet"])] == ["test_resnet"]


def test_a_list_that_is_broken_off_goes_on_where_it_was(cache, monkeypatch):
    def check(name):
        if name == "resnet101":
            raise KeyboardInterrupt
        return BackboneInfo(name, (1,))

    monkeypatch.setattr(catalogue, "check_backbone", check)
    with pytest.raises(KeyboardInterrupt):
        list(check_backbones(["resnet18", "resnet34", "resnet101", "resnet152"]))
    (file,) = cache.iterdir()
    assert set(json.loads(file.read_text())) == {"resnet18", "resnet34"}


def test_a_long_list_is_kept_as_it_grows(cache, monkeypatch):
    monkeypatch.setattr(catalogue, "check_backbone", lambda name: BackboneInfo(name, (1,)))
    names = timm.list_models(module="resnet")
    running = check_backbones(names)
    for _ in range(51):
        next(running)
    (file,) = cache.iterdir()
    assert list(json.loads(file.read_text())) == names[:50]
    running.close()
    assert list(json.loads(file.read_text())) == names[:51]


def test_networks_of_the_users_own_are_checked_each_time(cache, monkeypatch):
    def net_of_ones_own(pretrained=False, **arguments):
        return timm.create_model("test_resnet", **{**arguments, "stem_type": "deep"})

    monkeypatch.setattr(sys.modules[__name__], "__all__", [], raising=False)
    register_model(net_of_ones_own)
    try:
        assert [found.strides for found in list_backbones("net_of_ones*")] == [(8, 16, 32)]
    finally:
        timm.models._registry._model_entrypoints.pop("net_of_ones_own")
        timm.models._registry._module_to_models.pop(__name__)
    assert not cache.exists()


@pytest.mark.slow
def test_several_processes_find_the_same():
    names = ["test_resnet", "test_convnext", "levit_128s", "test_byobnet"]
    together = list(check_backbones(names, processes=2))
    assert [found.name for found in together] == names
    assert together == [check_backbone(name) for name in names]
