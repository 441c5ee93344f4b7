import math
import re
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tensor_recorder import TensorRecorder
from test_dense_loss import data, with_gradient
from torch.nn import functional as F

from hf_ctxseg import upsampled_cross_entropy, upsampling
from hf_ctxseg.losses import LOSSES, LossTerm, SegmentationLoss, parse_loss
from hf_ctxseg.pixel_losses import upsampled_focal, upsampled_ohem
from hf_ctxseg.region_losses import upsampled_dice, upsampled_lovasz


def valid_pixels(logits, labels, ignore_index=255, align_corners=False):
    """Upsampled logits (N, K) and labels (N,) of the valid pixels."""
    upsampled = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    valid = labels != ignore_index
    return upsampled.movedim(1, -1)[valid], labels[valid]


def plain_ohem(logits, labels, ignore_index=255, align_corners=False, class_weights=None, **mining):
    scores, targets = valid_pixels(logits, labels, ignore_index, align_corners)
    losses = F.cross_entropy(scores, targets, reduction="none")
    if "thresh" in mining:
        easiest = losses.sort(descending=True).values[: mining.get("min_kept", 0)][-1:].detach()
        kept = losses >= min([-math.log(mining["thresh"]), *easiest.tolist()])
    else:
        kept = losses >= losses.sort(descending=True).values[math.ceil(mining.get("top_k", 0.2) * len(losses)) - 1]
    weights = torch.ones_like(losses) if class_weights is None else class_weights[targets]
    return (losses * weights)[kept].sum() / weights[kept].sum()


def plain_focal(logits, labels, ignore_index=255, align_corners=False, class_weights=None, gamma=2.0, alpha=1.0):
    scores, targets = valid_pixels(logits, labels, ignore_index, align_corners)
    logs = scores.log_softmax(1).gather(1, targets[:, None])[:, 0]
    rest = (1 - logs.exp()).clamp(min=1e-30)  # of the power of 0 torch may give no derivative
    weights = torch.ones_like(logs) if class_weights is None else class_weights[targets]
    return (weights * -alpha * rest**gamma * logs).sum() / weights.sum()


def plain_dice(logits, labels, ignore_index=255, align_corners=False):
    scores, targets = valid_pixels(logits, labels, ignore_index, align_corners)
    losses = []
    for index in targets.unique():
        p, y = scores.softmax(1)[:, index], (targets == index).to(scores.dtype)
        losses.append(1 - 2 * (p * y).sum() / (p.sum() + y.sum()))
    return torch.stack(losses).mean()


def plain_lovasz(logits, labels, ignore_index=255, align_corners=False):
    scores, targets = valid_pixels(logits, labels, ignore_index, align_corners)
    losses = []
    for index in targets.unique():
        y = (targets == index).to(scores.dtype)
        errors, order = (y - scores.softmax(1)[:, index]).abs().sort(descending=True, stable=True)
        y = y[order]
        jaccard = 1 - (y.sum() - y.cumsum(0)) / (y.sum() + (1 - y).cumsum(0))
        losses.append((errors * jaccard.diff(prepend=jaccard.new_zeros(1))).sum())
    return torch.stack(losses).mean()


PLAIN = {
    upsampled_ohem: plain_ohem,
    upsampled_focal: plain_focal,
    upsampled_dice: plain_dice,
    upsampled_lovasz: plain_lovasz,
}
# Each loss with options that a property is tested over
VARIANTS = [
    (upsampled_ohem, {}),
    (upsampled_ohem, {"top_k": 0.7}),
    (upsampled_ohem, {"thresh": 0.3}),
    (upsampled_ohem, {"thresh": 0.1, "min_kept": 40}),
    (upsampled_focal, {}),
    (upsampled_focal, {"gamma": 0.5, "alpha": 0.25}),
    (upsampled_dice, {}),
    (upsampled_lovasz, {}),
]


def name(variant):
    return "-".join([variant[0].__name__.removeprefix("upsampled_"), *map(str, variant[1].values())])


def is_clear(logits, labels, ignore_index, align_corners, options):
    """Whether rounding cannot change which pixels are mined."""
    scores, targets = valid_pixels(logits, labels, ignore_index, align_corners)
    losses = F.cross_entropy(scores, targets, reduction="none").sort(descending=True).values
    if not len(losses):
        return True
    number = options.get("min_kept", 0) if "thresh" in options else math.ceil(options.get("top_k", 0.2) * len(losses))
    if number and number < len(losses) and losses[number - 1] - losses[number] < 1e-9:
        return False
    return "thresh" not in options or (losses + math.log(options["thresh"])).abs().min() > 1e-9


@settings(deadline=None, max_examples=250)
@given(
    variant=st.sampled_from(VARIANTS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    align_corners=st.booleans(),
    ignore_index=st.sampled_from([255, -100, 0]),
    is_weighted=st.booleans(),
    is_class_absent=st.booleans(),
    is_ignored=st.sampled_from([False, False, False, True]),
    block=st.sampled_from([1, 100, 900, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_it_is_the_formula(
    variant, shape, size, align_corners, ignore_index, is_weighted, is_class_absent, is_ignored, block, seed
):
    loss, options = variant
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = ignore_index
    if is_class_absent:
        labels[labels == shape[1] - 1] = ignore_index
    if is_ignored:
        labels[:] = ignore_index
    arguments = (labels, ignore_index, align_corners)
    if is_weighted and loss in (upsampled_ohem, upsampled_focal):
        arguments += (torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.1,)
    assume(loss is not upsampled_ohem or is_clear(logits, labels, ignore_index, align_corners, options))
    with mock.patch.object(upsampling, "CPU_BLOCK", block):
        found, gradient = with_gradient(partial(loss, **options), logits, *arguments)
        assert torch.equal(loss(logits, *arguments, **options), found)
    if not (labels != ignore_index).any():
        assert found == 0 and not gradient.any()
        return
    expected, expected_gradient = with_gradient(partial(PLAIN[loss], **options), logits, *arguments)
    if expected.isnan():  # no pixel is as hard as the threshold
        assert loss is upsampled_ohem and found == 0 and not gradient.any()
        return
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@pytest.mark.parametrize("classes", [1, 150])
def test_it_is_the_formula_with_few_and_with_many_classes(variant, classes):
    loss, options = variant
    logits, labels = data(classes=classes)
    found = with_gradient(partial(loss, **options), logits, labels, 255, dtype=torch.float64)
    if options == {"thresh": 0.3} and classes == 1:  # the one class is certain
        expected = (torch.zeros((), dtype=torch.float64), torch.zeros_like(logits, dtype=torch.float64))
    else:
        expected = with_gradient(partial(PLAIN[loss], **options), logits, labels, 255, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_it_is_what_the_switch_to_plain_formulas_computes(variant, monkeypatch):
    loss, options = variant
    logits, labels = data()
    found = with_gradient(partial(loss, **options), logits, labels, dtype=torch.float64)
    monkeypatch.setenv("CTXSEG_PLAIN", "1")
    with mock.patch.object(upsampling, "_RowMixture", side_effect=AssertionError("made blocks")):
        expected = with_gradient(partial(loss, **options), logits, labels, dtype=torch.float64)
        nothing = with_gradient(partial(loss, **options), logits, torch.full_like(labels, 255))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert nothing[0] == 0 and not nothing[1].any()


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_float32_is_no_less_exact_than_the_plain_formula(variant, scale):
    loss, options = variant
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 11, 17, 17, generator=generator) * scale
    labels = torch.randint(0, 11, (2, 129, 129), generator=generator)
    formula = partial(PLAIN[loss], **options)
    exact, exact_gradient = with_gradient(formula, logits, labels, dtype=torch.float64)
    with mock.patch.object(upsampling, "CPU_BLOCK", 30_000):
        ours, our_gradient = with_gradient(partial(loss, **options), logits, labels)
    theirs, their_gradient = with_gradient(formula, logits, labels)
    epsilon = torch.finfo(torch.float32).eps
    assert abs(ours - exact) <= 1.1 * abs(theirs - exact) + 4 * epsilon * exact
    error, their_error = ((gradient - exact_gradient).norm() for gradient in (our_gradient, their_gradient))
    assert error <= 1.1 * their_error + epsilon * exact_gradient.norm()


def test_lovasz_is_the_extension_of_the_jaccard_loss_of_sets():
    """The definition in section 2.2 of the paper, with sets of pixels and no cumulative sums."""
    logits, labels = data(classes=3)
    scores, targets = valid_pixels(logits[:, :, :2, :2].double(), labels[:, :4, :5])
    total, present = 0.0, targets.unique().tolist()
    for index in present:
        probabilities = scores.softmax(1)[:, index].tolist()
        members = {place for place, target in enumerate(targets.tolist()) if target == index}
        errors = {place: 1 - p if place in members else p for place, p in enumerate(probabilities)}
        wrong, before = set(), 0.0
        for place in sorted(errors, key=errors.get, reverse=True):
            wrong.add(place)
            jaccard = len(wrong) / len(members | wrong)  # mispredicted set over the union
            total += errors[place] * (jaccard - before) / len(present)
            before = jaccard
    found = upsampled_lovasz(logits[:, :, :2, :2].double(), labels[:, :4, :5])
    assert found.item() == pytest.approx(total, rel=1e-12)


def test_perfect_predictions_cost_nothing_and_wrong_ones_all():
    labels = torch.tensor([[[0, 0, 1, 2], [0, 2, 2, 255]]])
    right = torch.where(F.one_hot(labels.clamp(max=2), 3).movedim(3, 1) > 0, 60.0, 0.0)
    for loss in (upsampled_dice, upsampled_lovasz, upsampled_ohem, upsampled_focal):
        assert loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    for loss in (upsampled_dice, upsampled_lovasz):
        assert loss(right.roll(1, dims=1), labels).item() == pytest.approx(1, abs=1e-6)


def test_lovasz_of_hard_predictions_is_one_minus_the_mean_iou():
    generator = torch.Generator().manual_seed(0)
    labels, guess = torch.randint(0, 3, (2, 2, 20, 20), generator=generator)
    logits = 60.0 * F.one_hot(guess, 3).movedim(3, 1)
    iou = [((labels == k) & (guess == k)).sum() / ((labels == k) | (guess == k)).sum() for k in range(3)]
    assert upsampled_lovasz(logits, labels).item() == pytest.approx(1 - sum(iou).item() / 3, rel=1e-5)


def test_ohem_mines_valid_pixels_alone():
    logits, labels = torch.zeros(1, 2, 10, 10), torch.full((1, 10, 10), 255)
    labels[0, 0] = 0  # ten valid pixels
    logits[0, 0, 0] = torch.arange(10.0)
    losses = F.cross_entropy(logits[0, :, 0].T, labels[0, 0], reduction="none")
    assert upsampled_ohem(logits, labels, top_k=0.2).item() == pytest.approx(losses[:2].mean().item())
    kept = losses[losses.neg().exp() <= 0.95]
    assert 2 < len(kept) < 8
    assert upsampled_ohem(logits, labels, thresh=0.95).item() == pytest.approx(kept.mean().item())
    assert upsampled_ohem(logits, labels, thresh=0.1, min_kept=4).item() == pytest.approx(losses[:4].mean().item())
    assert upsampled_ohem(logits, labels, thresh=0.1, min_kept=99).item() == pytest.approx(losses.mean().item())
    assert upsampled_ohem(logits, labels, thresh=0.1) == 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_ohem_of_all_pixels_and_focal_without_focus_are_the_cross_entropy(label_smoothing):
    logits, labels = data()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    expected = with_gradient(upsampled_cross_entropy, logits, labels, 255, False, weights, label_smoothing)
    found = with_gradient(partial(upsampled_ohem, top_k=1), logits, labels, 255, False, weights, label_smoothing)
    torch.testing.assert_close(found, expected)
    if not label_smoothing:
        found = with_gradient(partial(upsampled_focal, gamma=0), logits, labels, 255, False, weights)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_gradient_of_focal_is_finite_where_a_pixel_is_certain(gamma):
    logits = torch.zeros(1, 2, 1, 2)
    logits[0, :, 0, 0] = torch.tensor([200.0, -200.0])
    loss, gradient = with_gradient(partial(upsampled_focal, gamma=gamma), logits, torch.tensor([[[0, 1]]]))
    assert loss.item() == pytest.approx(0.5 * 0.5**gamma * math.log(2), rel=1e-5)
    assert gradient.isfinite().all() and not gradient[0, :, 0, 0].any() and gradient[0, :, 0, 1].all()


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_overflow_shows(variant):
    logits, labels = data()
    logits[0, 1, 2, 2] = torch.nan
    loss, _ = with_gradient(partial(variant[0], **variant[1]), logits, labels)
    assert loss.isnan()


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_half_precision_and_autocast_are_summed_in_float32(variant):
    loss = partial(variant[0], **variant[1])
    logits, labels = data()
    expected = loss(logits.half().float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradient = with_gradient(loss, logits, labels, dtype=torch.float16)
    assert found.dtype == torch.float32 and gradient.dtype == torch.float16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("loss", [upsampled_dice, upsampled_focal, upsampled_lovasz, upsampled_ohem])
def test_no_tensor_of_the_upsampled_logits_is_made(loss):
    logits, labels = torch.randn(1, 60, 20, 20), torch.randint(0, 60, (1, 160, 160))
    with TensorRecorder() as recorder, mock.patch.object(upsampling, "CPU_BLOCK", 20_000):
        with_gradient(loss, logits, labels)
    assert recorder.largest <= 2 * 160 * 160  # peak and sum of the softmax in one


@pytest.mark.parametrize("loss", [upsampled_dice, upsampled_focal, upsampled_lovasz, upsampled_ohem])
def test_an_empty_batch_has_no_loss(loss):
    found, gradient = with_gradient(loss, torch.zeros(0, 4, 5, 6), torch.zeros(0, 9, 9, dtype=torch.long))
    assert found == 0 and gradient.shape == (0, 4, 5, 6)


@pytest.mark.parametrize("loss", [upsampled_dice, upsampled_focal, upsampled_lovasz, upsampled_ohem])
def test_l1_a_label_that_is_no_class_is_refused(loss):
    logits, labels = data()
    labels[0, 3, 5] = 4
    with pytest.raises(ValueError, match=r"1 labels are no class of 0 … 3 \(among them 4\)"):
        loss(logits, labels)


def test_sums_are_read():
    assert parse_loss("cross_entropy") == (LossTerm("cross_entropy"),)
    assert parse_loss(" cross_entropy+0.5*lovasz") == (LossTerm("cross_entropy"), LossTerm("lovasz", 0.5))
    assert parse_loss("1e-1 * ohem(thresh=0.7, min_kept=1e5) + dice()") == (
        LossTerm("ohem", 0.1, {"thresh": 0.7, "min_kept": 100000}),
        LossTerm("dice"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crossentropy", "There is no loss 'crossentropy': did you mean 'cross_entropy'?"),
        ("tversky", "There is no loss 'tversky': there are cross_entropy, ohem, dice, lovasz, focal."),
        ("dice+lovas", "There is no loss 'lovas': did you mean 'lovasz'?"),
        ("", "cannot be read from '' on: write a sum such as"),
        ("dice+", "cannot be read from '' on"),
        ("dice lovasz", "cannot be read from 'dice lovasz' on"),
        ("dice-lovasz", "There is no loss 'dice-lovasz'"),
        ("0.5dice", "There is no loss '0.5dice': did you mean 'dice'?"),
        ("1.2.3*dice", "has the factor '1.2.3', which is no number"),
        ("ohem(topk=0.2)", "The loss ohem has no option 'topk': did you mean 'top_k'?"),
        ("dice(smooth=1)", "The loss dice has no option 'smooth': it has none."),
        ("ohem(0.2)", "The loss ohem has no option '0.2': there are top_k, thresh, min_kept."),
        ("ohem(top_k=much)", "The loss ohem has 'top_k=much', but takes numbers, written top_k=0.5."),
        ("ohem(top_k)", "The loss ohem has 'top_k', but takes numbers"),
        ("ohem(top_k=True)", "but takes numbers"),
        ("ohem(top_k=2)", "top_k of ohem is 2, but must be above 0 and at most 1"),
        ("ohem(thresh=0)", "thresh of ohem is 0, but must be above 0"),
        ("ohem(top_k=0.2, thresh=0.7)", "leave one out"),
        ("ohem(min_kept=9)", "min_kept of ohem goes with thresh"),
        ("ohem(thresh=0.7, min_kept=0.5)", "min_kept of ohem is 0.5, but must be a whole number"),
        ("focal(gamma=-1)", "gamma of focal is -1, but must be a number from 0 on"),
        ("focal(alpha=1e999)", "alpha of focal is inf"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_loss(text)


def test_a_sum_is_the_sum_of_its_parts():
    logits, labels = data()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    terms = parse_loss("cross_entropy+0.5*lovasz+2*ohem(top_k=0.5)+3*focal(gamma=1)+dice")
    loss = SegmentationLoss(terms, class_weights=weights, label_smoothing=0.1)
    expected = (
        upsampled_cross_entropy(logits, labels, class_weights=weights, label_smoothing=0.1)
        + 0.5 * upsampled_lovasz(logits, labels)
        + 2 * upsampled_ohem(logits, labels, class_weights=weights, label_smoothing=0.1, top_k=0.5)
        + 3 * upsampled_focal(logits, labels, class_weights=weights, gamma=1)
        + upsampled_dice(logits, labels)
    )
    torch.testing.assert_close(loss(logits, labels), expected)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5, 3.0])])
@pytest.mark.parametrize("text", ["cross_entropy", "focal(gamma=1)", "cross_entropy+0.5*focal"])
def test_parts_divided_by_the_pixels_of_the_whole_add_up_to_the_loss_of_the_whole(text, weights):
    logits, labels = data()
    labels[1, 3:] = 255
    whole = SegmentationLoss(parse_loss(text), class_weights=weights)
    part = replace(whole, pixels=whole.count(labels))
    parts = sum(part(logits[i : i + 1], labels[i : i + 1]) for i in range(2))
    torch.testing.assert_close(parts, whole(logits, labels))
    mean = sum(whole(logits[i : i + 1], labels[i : i + 1]) for i in range(2)) / 2
    assert abs(mean - whole(logits, labels)) > 1e-3


def test_what_is_no_mean_over_pixels_is_not_divided():
    logits, labels = data()
    loss = SegmentationLoss(parse_loss("dice+lovasz"))
    assert torch.equal(replace(loss, pixels=torch.tensor(7.0))(logits, labels), loss(logits, labels))


@pytest.mark.parametrize("text", LOSSES)
def test_l2_all_pixels_ignored_gives_zero_with_zero_gradient(text):
    logits, labels = data()
    labels[:] = 255
    loss = SegmentationLoss(parse_loss(text), class_weights=torch.ones(4))
    for pixels in (None, torch.tensor(0.0), torch.tensor(9.0)):
        found, gradient = with_gradient(replace(loss, pixels=pixels), logits, labels)
        assert found == 0 and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks, where it goes on after ours
def test_sums_compile():
    torch.compiler.reset()
    logits, labels = data()
    loss = SegmentationLoss(parse_loss("cross_entropy+0.5*lovasz"), pixels=torch.tensor(400.0))
    compiled = torch.compile(lambda *tensors: loss(*tensors), backend="aot_eager")
    torch.testing.assert_close(with_gradient(compiled, logits, labels), with_gradient(loss, logits, labels))
