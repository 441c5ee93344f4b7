import copy
import pickle

import pytest
import timm
import torch
import torchvision
from backbone_helpers import backbone
from torch import nn

from hf_ctxseg import DeepLabV3Config, DeepLabV3ForSemanticSegmentation
from hf_ctxseg.backbone import DilatedBackbone, reachable_strides
from hf_ctxseg.nonlocal_block import NonLocal2d

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
