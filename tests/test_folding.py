"""Folded copies give the same outputs with fewer layers, for any backbone, and leave the model as it was."""

import copy

import pytest
import torch
from model_matrix import ALL_FAMILIES, FIRST, HEADS, Cell
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_ctxseg import DeepLabV3Config, DeepLabV3ForSemanticSegmentation, fold_batch_norm

FAMILIES = ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext"]


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def shake(model):
    """Give every normalisation statistics and gains that a wrong fold would show."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def difference(folded, model, size=(70, 45)):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, expected = folded(x), model(x)
    return ((found.logits - expected.logits).abs().max() / expected.logits.abs().max()).item()


def build(family, **fields):
    torch.manual_seed(0)
    config = DeepLabV3Config(
        backbone=family, hidden_size=16, num_labels=3, id2label={i: str(i) for i in range(3)}, **fields
    )
    return shake(DeepLabV3ForSemanticSegmentation(config))


def test_within_inference_mode_and_without_values_that_are_not_finite():
    model = build("test_resnet")
    with torch.inference_mode():
        folded = fold_batch_norm(model)
    assert difference(folded, model) <= 1e-5
    model.classifier.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        fold_batch_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_copy_gives_the_same_and_the_model_stays(family):
    model = build(family, use_auxiliary_head=True)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    assert difference(folded, model) <= 1e-5
    assert norms(folded) == []
    assert set(folded.folded_batch_norms) == set(norms(model)) and norms(model)
    assert not folded.training and not any(parameter.requires_grad for parameter in folded.parameters())
    assert all(tensor.dtype is torch.float32 for tensor in folded.parameters())
    after = model.state_dict()
    assert list(after) == list(before) and all(map(torch.equal, after.values(), before.values()))
    assert model.folded_batch_norms is None


CELLS = [Cell(head, FIRST[head], family, None, "none") for family in ALL_FAMILIES for head in HEADS]


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.is_possible()], ids=str)
def test_every_head_on_every_family(cell):
    model = shake(cell.build())
    folded = fold_batch_norm(model)
    assert difference(folded, model) <= 1e-4
    # Pre-activation and dense networks normalise sums, RepVGG's skip path the map itself.
    rest = [name for name in norms(folded) if not name.endswith(".identity")]
    assert not rest or cell.family in ("resnetv2_50", "densenet121", "mobilevitv2_050"), rest


def test_what_cannot_be_folded_stays():
    class Awkward(nn.Module):
        """Gives a convolution's output to another beside the normalisation, and one after an operation in place."""

        def __init__(self):
            super().__init__()
            self.shared, self.changed, self.good = (nn.Conv2d(16, 16, 1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))

        def forward(self, x):
            y = self.shared(x)
            x = self.norms[0](y) + y
            x = self.norms[1](self.changed(x).relu_())
            x = self.norms[2](x + 1)
            return self.norms[3](self.good(x))

    model = build("test_resnet")
    model.dropout = shake(Awkward())
    folded = fold_batch_norm(model)
    assert norms(folded) == [f"dropout.norms.{index}" for index in range(3)]
    assert difference(folded, model) <= 1e-5


def test_a_weight_that_is_computed_stays_and_its_neighbours_fold():
    class Halved(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight / self.weight.abs().max(), self.bias)

    model = build("test_resnet")
    model.dropout = shake(
        nn.Sequential(Halved(16, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
    )
    folded = fold_batch_norm(model)
    assert norms(folded) == ["dropout.1"]
    assert difference(folded, model) <= 1e-5


def test_number_format_is_kept():
    model = build("test_resnet").bfloat16()
    folded = fold_batch_norm(model)
    assert {tensor.dtype for tensor in folded.parameters()} == {torch.bfloat16}
    x = torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = folded(x).logits.float(), model(x).logits.float()
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()


def test_training_saving_and_folding_again_are_refused(tmp_path):
    model = build("test_resnet")
    folded = fold_batch_norm(model)
    for part in (folded, folded.model):
        with pytest.raises(ValueError, match="Save the model that it was made from"):
            part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="folded copy already"):
        fold_batch_norm(folded)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        fold_batch_norm(model.train())
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert copy.deepcopy(folded).folded_batch_norms == folded.folded_batch_norms
