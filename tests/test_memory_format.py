"""On a CPU every convolution of a whole model gets the channels last, in every path, and no weight is touched."""

import copy
import pickle
import warnings

import pytest
import torch
from model_matrix import Cell
from torch import nn

from hf_ctxseg import ASPP
from hf_ctxseg.memory_format import to_fast_format

CELLS = [
    Cell("deeplabv3", "torchvision", "test_resnet", 8, "auxiliary"),
    Cell("deeplabv3", "group", "test_byobnet", 16, "none"),
    Cell("deeplabv3plus", "paper", "test_efficientnet", 8, "none"),
    Cell("deeplabv3plus", "smp", "test_convnext", 16, "none"),
    Cell("deeplabv2", "classifiers", "mobilenetv2_035", 8, "none"),
]


def is_channels_last(x):
    """By its strides: both formats of one channel or one cell are contiguous."""
    return x.stride()[1] == 1 and x.stride()[3] == x.shape[1]


def watch(model):
    """Names of the convolutions that got a map in another format; maps of one cell have no format."""
    wrong, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def look(module, inputs, name=name):
                if inputs[0].shape[2:].numel() > 1 and not is_channels_last(inputs[0]):
                    wrong.append(name)

            hooks.append(module.register_forward_pre_hook(look))
    return wrong, hooks


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_convolution_gets_the_channels_last(cell, trains):
    model = cell.build().train(trains)
    wrong, _ = watch(model)
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    outputs = model(torch.randn(2, 3, 70, 99), labels=torch.zeros(2, 70, 99, dtype=torch.long))
    outputs.loss.backward()
    assert wrong == []
    assert {name: value.stride() for name, value in model.state_dict().items()} == strides


def test_pictures_of_one_channel_too():
    config = Cell("deeplabv3", "paper", "test_resnet", 16, "none").config()
    config.num_channels = 1
    model = Cell("deeplabv3", "paper", "test_resnet", 16, "none").build().__class__(config).eval()
    wrong, _ = watch(model)
    model(torch.randn(1, 1, 64, 97))
    assert wrong == []


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_atrous_convolution_chooses_and_copies_do_too(cell):
    model = cell.build()
    for version in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        convs = [module for module in version.modules() if isinstance(module, nn.Conv2d) and module.dilation[0] > 1]
        assert convs
        plain = [module for module in convs if type(module) is nn.Conv2d]
        assert plain == [] or cell.head == "deeplabv2"  # whose classifiers have weights of their own kind


def test_a_pyramid_alone_gets_the_channels_last_and_gives_the_same():
    torch.manual_seed(0)
    pyramid = ASPP(8, 6, [2, 6]).eval()
    x = torch.randn(2, 8, 9, 11)
    wrong, hooks = watch(pyramid)
    found = pyramid(x)
    assert wrong == []
    assert found.is_contiguous(memory_format=torch.channels_last)
    for hook in hooks:
        hook.remove()
    with torch.autocast("cpu", enabled=False):
        expected = pyramid.double()(x.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_other_devices_and_exports_keep_the_format():
    assert to_fast_format(torch.empty(1, 3, 4, 5, device="meta")).is_contiguous()
    program = torch.export.export(_Format(), (torch.randn(1, 3, 4, 5),))
    assert [node for node in program.graph.nodes if node.op == "call_function"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what the older ONNX export does
        assert torch.jit.trace(_Format(), torch.randn(1, 3, 4, 5))(torch.randn(1, 3, 4, 5)).is_contiguous()


class _Format(nn.Module):
    def forward(self, x):
        return to_fast_format(x)
