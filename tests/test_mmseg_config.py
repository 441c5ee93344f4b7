"""mmsegmentation's config: what a wrong or an unresolved one leads to, and what of it ours leaves out."""

import itertools

import pytest
import torch
from conversion_helpers import small_mmseg_config

from hf_ctxseg import DeepLabV3ForSemanticSegmentation
from hf_ctxseg.conversion_back import mmseg_model, to_mmseg
from hf_ctxseg.conversion_mmseg import from_mmseg
from hf_ctxseg.convert_mmseg_config import mmseg_classes, mmseg_preprocessing, parse_mmseg_config

GOOD = {"mean": [1.0, 2.0, 3.0], "std": [51, 102.0, 255.0]}


def preprocessing(backbone=None, test_cfg=None, **statistics):
    model = {"backbone": backbone or {}, "data_preprocessor": {**GOOD, **statistics}, "test_cfg": test_cfg}
    return mmseg_preprocessing({"model": model})


def test_statistics_are_of_one_finite_number_per_channel():
    fields, _, notes = preprocessing()
    assert fields["image_std"] == pytest.approx([0.2, 0.4, 1.0]) and notes == []
    four = [1.0, 2.0, 3.0, 4.0]
    assert len(preprocessing({"in_channels": 4}, mean=four, std=four)[0]["image_mean"]) == 4


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize(
    "values",
    [[1.0], [1.0] * 4, [1.0, float("inf"), 1.0], [1.0, float("nan"), 1.0], [10**400, 1, 1], [True, 1, 1], "123", 5],
)
def test_statistics_that_no_picture_can_be_scaled_by_are_refused(name, values):
    with pytest.raises(ValueError, match=rf"has the {name} .*must have a list of 3 finite numbers.*--peer_config"):
        preprocessing(**{name: values})


def test_values_that_name_each_other_stay_short_in_messages():
    names = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    doubled = "".join(f"{name} = [{before}, {before}]\n" for before, name in itertools.pairwise(names))
    for use in ("data_preprocessor = dict(mean=Z)", "test_cfg = dict(mode='slide', crop_size=Z, stride=Z)"):
        values = parse_mmseg_config(f"a = [1, 1]\n{doubled}model = dict(type='A')\n{use}")
        try:
            text = mmseg_preprocessing(values)[2][-1]
        except ValueError as error:
            text = str(error)
        assert len(text) < 1000


@pytest.mark.parametrize("lowest", [0, -1.0, 5e-324])
def test_deviations_must_be_above_0(lowest):
    with pytest.raises(ValueError, match=r"has the std .*3 finite numbers above 0"):
        preprocessing(std=[lowest, 1, 1])
    assert preprocessing(mean=[lowest, 1, 1])


@pytest.mark.parametrize(
    "palette",
    [
        [[300, -1, 3], [0, 0, 0]],
        [[1, 2], [3, 4]],
        [[1, 2, 3]],
        [[1.5, 2, 3], [0, 0, 0]],
        [[float("nan"), 2, 3], [0, 0, 0]],
        [["1", 2, 3], [0, 0, 0]],
        ["red", "blue"],
        [1, 2],
        {"a": [1, 2, 3]},
        "random",
    ],
)
def test_palettes_that_are_none_are_left_out(palette):
    assert mmseg_classes({"CLASSES": ["a", "b"], "PALETTE": palette}) == (["a", "b"], None)


def test_palettes_of_bytes_are_kept():
    found = mmseg_classes({"CLASSES": ["a", "b"], "PALETTE": ((0, 128, 255), [1.0, 2, 3])})
    assert found == (["a", "b"], [[0, 128, 255], [1, 2, 3]])


def test_scores_by_windows_are_noted():
    slide = {"mode": "slide", "crop_size": (513, 513), "stride": (342, 342)}
    assert preprocessing(test_cfg=slide)[2] == [
        "Scored there with windows of 513×513 at a stride of 342×342; ours looks at the whole picture unless asked "
        "for windows."
    ]
    wide = preprocessing(test_cfg={"mode": "slide", "crop_size": [512, 1024], "stride": [256, 768]})[2]
    assert "windows of 1024×512 at a stride of 768×256;" in wide[0]
    assert "with windows; ours" in preprocessing(test_cfg={"mode": "slide", "crop_size": "x"})[2][0]
    assert preprocessing(test_cfg={"mode": "whole"})[2] == []
    notes = mmseg_preprocessing({"model": {}, "test_cfg": slide})[2]
    assert [note.split()[0] for note in notes] == ["The", "Scored"]


@pytest.mark.parametrize(
    "model", ["dict(backbone=dict(depth=101))", "dict(backbone=dict(type='ResNet'), decode_head=dict(num_classes=4))"]
)
def test_a_config_that_builds_on_others_must_be_resolved(model):
    with pytest.raises(ValueError, match=r"builds on others \(_base_\).*give the resolved config"):
        parse_mmseg_config(f"_base_ = ['../x.py']\nmodel = {model}")
    with pytest.raises(ValueError, match=r"assigns no model of literals: give the resolved config"):
        parse_mmseg_config("_base_ = ['../x.py']")
    whole = "_base_ = []\nmodel = dict(backbone=dict(type='A'), decode_head=dict(type='B'))"
    assert parse_mmseg_config(whole)["model"]["decode_head"] == {"type": "B"}


@pytest.fixture(scope="module")
def theirs():
    config = small_mmseg_config(num_labels=2)
    tensors = DeepLabV3ForSemanticSegmentation(config).state_dict()
    return to_mmseg(config, tensors), mmseg_model(config, tensors)


def test_several_auxiliary_heads_are_left_out(theirs):
    tensors, model = theirs
    heads = [{"type": "FCNHead", "in_index": index} for index in (1, 2)]
    more = {f"auxiliary_head.{index}.conv_seg.weight": torch.ones(2, 4, 1, 1) for index in (0, 1)}
    config, found = from_mmseg({**tensors, **more}, {**model, "auxiliary_head": heads})
    expected = from_mmseg(tensors, model)[1]
    assert not config.use_auxiliary_head and sorted(found) == sorted(expected)


def test_one_channel_for_two_classes_is_refused(theirs):
    tensors, model = theirs
    one = {key: value[:1] if key.startswith("decode_head.conv_seg.") else value for key, value in tensors.items()}
    head = {**model["decode_head"], "num_classes": 2, "out_channels": 1, "threshold": 0.3}
    with pytest.raises(ValueError, match=r"out_channels=1, num_classes=2.*ours has one channel per class"):
        from_mmseg(one, {**model, "decode_head": head})


def test_configs_are_read_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    text = f"""
norm_cfg = dict(type='BN', momentum=-0.1)
custom = __import__('os').system('touch {mark}')
lr = 0.01 * 2
import os
os.system('touch {mark}')
model = dict(**dict(type='E'), backbone=dict(norm_cfg=norm_cfg, sizes=(1, 2)), flags={{'a': [None, True]}})
"""
    values = parse_mmseg_config(text)
    assert values["model"] == {
        "type": "E",
        "backbone": {"norm_cfg": {"type": "BN", "momentum": -0.1}, "sizes": (1, 2)},
        "flags": {"a": [None, True]},
    }
    assert set(values) == {"norm_cfg", "model"} and not mark.exists()
    for bad, message in (
        ("model = dict(depth=open('x').read())", "line 1 holds .* is no literal"),
        ("model = base.model", "is no literal"),
        ("model = dict(**[1])", "unpacks what is no dict"),
        ("model = {(1, 2): 3}", "neither text nor number"),
        ("model = 3", "assigns no model of literals"),
        ("_base_ = ['a.py']", "assigns no model"),
        ("model = dict(", "no Python source"),
        ("model = " + "[" * 5000, "no Python source"),
        ("x" * 3_000_000, "characters"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_mmseg_config(bad)


def test_classes_and_statistics_that_are_none_are_left_out_or_refused():
    assert mmseg_classes(None) == (None, None)
    assert mmseg_classes({"CLASSES": 3}) == (None, None)
    assert mmseg_classes({"CLASSES": ["a", "b\n"], "PALETTE": [[1, 2, 3]]}) == (["a", "b"], None)
    assert mmseg_classes({"CLASSES": ["a"], "PALETTE": ["blue"]}) == (["a"], None)
    with pytest.raises(ValueError, match="has the std None"):
        mmseg_preprocessing({"model": {"data_preprocessor": {"mean": [1, 2, 3]}}})
