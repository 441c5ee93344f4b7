"""With CTXSEG_PLAIN set nothing but the formulas as written runs, and the results are the same."""

from unittest import mock

import pytest
import torch
from model_matrix import Cell

from hf_ctxseg import dense_loss, fast_conv, nonlocal_ops, upsampled_argmax, upsampling

FAST = [
    *((fast_conv, name) for name in ("_convolve", "_TapByTap", "_RowByRow", "_InTiles")),
    *((nonlocal_ops, name) for name in ("_softmax", "_dot_product", "_concatenation")),
    (dense_loss, "upsampled_blocks"),
    (upsampling, "upsampled_blocks"),
]


def results(cell, mode):
    config = cell.config()
    if hasattr(config, "nonlocal_mode"):
        config.nonlocal_mode = mode
    torch.manual_seed(0)
    model = type(cell.build())(config).eval()
    output = model(torch.randn(2, 3, 66, 97, generator=torch.Generator().manual_seed(1)))
    labels = torch.arange(66 * 97).view(1, 66, 97).expand(2, -1, -1) % config.num_labels
    loss = model._loss(output.logits, labels)
    loss.backward()
    gradient = next(model.parameters()).grad
    return output.logits, loss, gradient, upsampled_argmax(output.logits, (66, 97))


@pytest.mark.parametrize(
    ("cell", "mode"),
    [
        (Cell("deeplabv3plus", "paper", "test_efficientnet", 8, "none"), None),
        (Cell("nonlocal", "embedded_gaussian", "test_resnet", 8, "none"), "embedded_gaussian"),
        (Cell("nonlocal", "embedded_gaussian", "test_resnet", 8, "none"), "concatenation"),
        (Cell("nonlocal", "embedded_gaussian", "test_resnet", 8, "none"), "dot_product"),
    ],
    ids=str,
)
def test_the_plain_formulas_alone_run_and_agree(cell, mode, monkeypatch):
    expected = results(cell, mode)
    monkeypatch.setenv("CTXSEG_PLAIN", "1")
    with mock.patch.multiple(nonlocal_ops, _PAIRS=0, _SORTED_FROM=0):
        patches = [mock.patch.object(module, name, side_effect=AssertionError(name)) for module, name in FAST]
        for patch in patches:
            patch.start()
        try:
            found = results(cell, mode)
        finally:
            mock.patch.stopall()
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (found[3] == expected[3]).float().mean() > 0.999
    monkeypatch.setenv("CTXSEG_PLAIN", "0")
    with mock.patch.object(upsampling, "upsampled_blocks", side_effect=RuntimeError("taken")):
        with pytest.raises(RuntimeError, match="taken"):
            upsampled_argmax(expected[0], (66, 97))
