import copy

import pytest
import torch
from model_matrix import ALL_FAMILIES

from hf_ctxseg import DeepLabV3Config, DeepLabV3ForSemanticSegmentation
from hf_ctxseg.nonlocal_block import NonLocal2d
from hf_ctxseg.recomputation import RecomputedBlock
from hf_ctxseg.registry import find_head

FAST = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "densenet121"]


def _enable(model, **options):
    # The first of the two names is that of newer versions of transformers.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(**options)
    return model


def _is_enabled(model):
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing")


def _step(model, seed=1):
    """Loss, gradients, buffers and the bytes that wait for the gradient, of one step."""
    torch.manual_seed(0)
    pixels, labels = torch.randn(2, 3, 66, 52), torch.randint(0, 3, (2, 66, 52))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(seed)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(pixel_values=pixels, labels=labels).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, gradients, dict(model.named_buffers()), sum(kept[key] for key in kept if key not in own)


def _model(backbone="test_resnet", head="deeplabv3", **fields):
    family = ALL_FAMILIES[backbone]
    config_class, _, model_class = find_head(head)
    fields = {"output_stride": 8 if family.dilates else family.native, "use_auxiliary_head": True, **fields}
    torch.manual_seed(0)
    config = config_class(
        backbone=backbone,
        backbone_kwargs=family.kwargs,
        hidden_size=16,
        num_labels=3,
        classifier_dropout=0.5,
        **fields,
    )
    return model_class(config).train()


def _check_equal(plain, share):
    """Compare a step with one that recomputes, which keeps less than `share` of the bytes."""
    recomputing = _enable(copy.deepcopy(plain))
    assert plain.state_dict().keys() == recomputing.state_dict().keys()
    loss, gradients, buffers, kept = _step(plain)
    same_loss, same_gradients, same_buffers, less = _step(recomputing)
    assert torch.equal(loss, same_loss)
    for name, gradient in gradients.items():
        if gradient is None:  # of layers that the chosen maps do not need
            assert same_gradients[name] is None, name
        else:
            assert torch.equal(gradient, same_gradients[name]), name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, same_buffers[name]), name
    assert less < share * kept


@pytest.mark.parametrize(
    "backbone",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ALL_FAMILIES if name != "vgg11"],
)
def test_a_step_is_the_same_bit_for_bit_and_keeps_less(backbone):
    _check_equal(_model(backbone), 0.7)


HEADS = {
    "deeplabv2": {"branch_channels": 12},
    "deeplabv3": {"nonlocal_mode": "dot_product"},
    "deeplabv3plus": {},
    "nonlocal": {"nonlocal_mode": "gaussian"},
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_recompute_too(head):
    plain = _model(head=head, **HEADS[head])
    model = _enable(copy.deepcopy(plain))
    parts = [*model.model.decode_head.modules(), *model.classifier.modules()]
    assert any(isinstance(module, RecomputedBlock) for module in parts)
    _check_equal(plain, 0.7)


def test_blocks_between_stages_recompute_although_a_hook_calls_them():
    plain = _model("resnet18", backbone_nonlocal_stages=[16])
    for block in (module for module in plain.modules() if isinstance(module, NonLocal2d)):
        (block.conv_out if block.norm is None else block.norm).weight.data.normal_()  # zero makes it the identity
    model = _enable(copy.deepcopy(plain))
    inner = [module for module in model.backbone.modules() if isinstance(module, NonLocal2d)]
    assert inner and all(isinstance(module, RecomputedBlock) for module in inner)
    _check_equal(plain, 0.8)


def test_it_can_be_turned_off_for_every_second_block_and_wholly():
    model = _model()
    kinds = [type(module) for module in model.modules()]
    count = sum(isinstance(module, RecomputedBlock) for module in _enable(model).modules())
    assert _is_enabled(model)
    if hasattr(model, "activation_checkpointing_enable"):
        _enable(model, every_n_layers=2)
        assert sum(isinstance(module, RecomputedBlock) for module in model.modules()) == (count + 1) // 2
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert [type(module) for module in model.modules()] == kinds
    assert not _is_enabled(model)


def test_evaluation_computes_once():
    model = _enable(_model()).eval()
    pixels = torch.randn(1, 3, 33, 33)
    plain = _model().eval()
    calls = []
    model.model.decode_head.aspp.register_forward_pre_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, plain(pixels).logits)
    assert len(calls) == 1


def test_base_model_recomputes():
    model = _model()
    _enable(model.model)
    assert sum(isinstance(module, RecomputedBlock) for module in model.model.modules()) >= 5
    assert not isinstance(model.auxiliary_head, RecomputedBlock)


def test_network_without_blocks_is_refused():
    match = r"vgg11.*no blocks.*without --gradient_checkpointing"
    with torch.device("meta"), pytest.raises(ValueError, match=match):
        _enable(DeepLabV3ForSemanticSegmentation(DeepLabV3Config(backbone="vgg11", output_stride=32)))
