import json
import math
from dataclasses import fields

import pytest
from transformers import AutoConfig, PreTrainedConfig

import hf_ctxseg
from hf_ctxseg import CtxSegConfig, DeepLabV3Config

NUMBERS = ("num_channels", "output_stride", "auxiliary_hidden_size")
BAD = {
    **{name: (0, -1, 1.5, "8", None, True, [8]) for name in NUMBERS},
    "hidden_size": (0, -1, 1.5, "8", True, [8]),
    "backbone": ("", None, 50),
    "backbone_kwargs": ([], "x", {"output_stride": 8}, {"pretrained": True}, {"in_chans": 1}),
    "norm_eps": (0, -1e-5, 2, "1e-5", math.nan, None),
    "norm_momentum": (0, -0.1, 1.1, None, math.nan),
    "classifier_dropout": (-0.1, 1.1, "0.1", math.nan, True),
    "auxiliary_dropout": (-0.1, 1.1, "0.1", math.nan, True, None),
    "align_corners": (0, 1, "true"),
    "use_auxiliary_head": (0, 1, "false", None),
    "auxiliary_loss_weight": (-1, math.inf, math.nan, None, "0.4"),
    "semantic_loss_ignore_index": (0, 1, 2.0, None, "255", True),
    "palette": (5, "red", [5], [[1, 2]], [[1, 2, 256]], [[1, 2, -1]], [[1, 2, 3.0]], [[True, 0, 0]], {0: [1, 2, 3]}),
    "atrous_rates": (6, None, "6", [0], [6, -1], [1.5], [True], ["6"]),
    "absolute_rates": (0, None, "no"),
    "separable": (1, None, "yes"),
    "use_image_pooling": (1, None, "yes"),
    "variant": ("smp", "papers", "", None, 1, ["paper"]),
    "pooling_window": (0, -1, 1.5, True, "513", [], [513], [513, 0], [513, 513.0], [1, 2, 3], [True, 1], {}),
    "pool_norm": ("layer", "", None, True, 1),
    "aspp_dropout": (-0.1, 1.1, "0.5", math.nan, True),
    "nonlocal_mode": ("gauss", "", True, 1, ["gaussian"]),
    "multi_grid": (4, "1", [0], [1, 2.0], [True], {}),
    "dilate_first_block": (0, 1, "true", None),
    "backbone_rates": (2, "conv1", ["conv1"], {"conv1": 0}, {"conv1": 1.5}, {"conv1": True}, {"conv1": "2"}),
    "backbone_nonlocal_stages": (8, "8", [0], [8.0], [True]),
    "backbone_nonlocal_mode": ("gauss", "", None, 1),
}


def own_fields(config_class):
    return {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}


def test_bad_values_are_tried_for_every_field():
    assert set(BAD) == own_fields(DeepLabV3Config)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_c2_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        DeepLabV3Config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classifier_dropout", 0),
        ("classifier_dropout", 1),
        ("norm_momentum", 1),
        ("auxiliary_loss_weight", 0),
        ("semantic_loss_ignore_index", -100),
        ("semantic_loss_ignore_index", 2),
        ("atrous_rates", []),
        ("atrous_rates", [1]),
        ("palette", [[0, 0, 0], [255, 255, 255]]),
        ("num_channels", 1),
        ("backbone_kwargs", {"drop_path_rate": 0.1}),
        ("aspp_dropout", 1),
        ("pooling_window", 1),
        ("pooling_window", [1, 2]),
    ],
)
def test_edge_of_the_range_is_allowed(name, value):
    assert getattr(DeepLabV3Config(**{name: value}), name) == value


def test_changed_values_are_checked_again():
    config = DeepLabV3Config()
    config.hidden_size = 0
    with pytest.raises(ValueError, match="hidden_size is 0"):
        config.check_values()


@pytest.mark.parametrize(
    ("key", "near"),
    [("ouput_stride", "output_stride"), ("atrous_rate", "atrous_rates"), ("num_label", "num_labels")],
)
def test_c1_misspelt_key_is_refused_with_the_nearest(key, near):
    with pytest.raises(ValueError, match=rf"no field '{key}': did you mean {near}\?"):
        DeepLabV3Config(**{key: 3})


def test_c1_unknown_key_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"no field 'qqqq'.*backbone, .*use_image_pooling"):
        DeepLabV3Config(qqqq=1)


def test_c1_unknown_key_in_a_file_is_refused(tmp_path):
    DeepLabV3Config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"aspp_rates": [6]}))
    with pytest.raises(ValueError, match=r"no field 'aspp_rates': did you mean atrous_rates\?"):
        AutoConfig.from_pretrained(tmp_path)


def _with_version(folder, version, **fields):
    DeepLabV3Config(hidden_size=32).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["ctxseg_version"] == hf_ctxseg.__version__
    if version is None:  # as files before there was the field
        del saved["ctxseg_version"]
    else:
        saved["ctxseg_version"] = version
    (folder / "config.json").write_text(json.dumps(saved | fields))


@pytest.mark.parametrize("version", ["99.0.0", "0.1.1", "0.2.0rc1"])
def test_c1_unknown_key_of_a_newer_version_is_left_out_with_a_warning(tmp_path, version, caplog):
    _with_version(tmp_path, version, aspp_gates=[6], deeper=True)
    config = AutoConfig.from_pretrained(tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"written by hf-ctxseg {version}" in warning and "aspp_gates, deeper" in warning
    assert config.hidden_size == 32 and not hasattr(config, "aspp_gates")
    config.save_pretrained(tmp_path)
    assert DeepLabV3Config.from_pretrained(tmp_path).to_json_string() == config.to_json_string()
    assert json.loads((tmp_path / "config.json").read_text())["ctxseg_version"] == hf_ctxseg.__version__


@pytest.mark.parametrize("version", [None, "0.0.9", "0.1.0", "", {}])
def test_c1_unknown_key_of_this_or_an_older_version_is_refused(tmp_path, version):
    _with_version(tmp_path, version, aspp_gates=[6])
    with pytest.raises(ValueError, match="no field 'aspp_gates'"):
        AutoConfig.from_pretrained(tmp_path)


def test_known_keys_of_a_newer_version_are_taken_in_silence(tmp_path, caplog):
    _with_version(tmp_path, "99.0.0")
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 32
    assert not caplog.records


def test_fields_of_a_head_belong_to_it():
    with pytest.raises(ValueError, match="CtxSegConfig has no field 'atrous_rates'"):
        CtxSegConfig(atrous_rates=[6])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"id2label": {0: "a", 2: "b"}}, r"id2label has the keys \[0, 2\]"),
        ({"id2label": {1: "a", 2: "b"}}, r"id2label has the keys \[1, 2\]"),
        ({"id2label": {-1: "a", 0: "b"}}, r"id2label has the keys \[-1, 0\]"),
        ({"id2label": {0: "a", "0": "b"}}, r"id2label has the keys \[0, 0\]"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": {"a": 0, "b": 1}}, "must be class indices"),
        ({"id2label": {0.5: "a"}}, "must be class indices"),
        ({"id2label": ["a", "b"]}, "must be a dict"),
        ({"id2label": {0: "a", 1: "a"}}, "a name of its own"),
        ({"id2label": {0: "a", 1: None}}, "a name of its own"),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "num_labels is 3, but id2label names 2"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "label2id .* contradicts"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0}}, "label2id .* contradicts"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"num_labels": -2}, "num_labels is -2"),
        ({"num_labels": "3"}, "num_labels is '3'"),
        ({"num_labels": None}, "num_labels is None"),
        ({"num_labels": 256}, "semantic_loss_ignore_index is 255.*LABEL_255"),
    ],
)
def test_l7_bad_classes_are_refused(names, text):
    with pytest.raises(ValueError, match=text):
        DeepLabV3Config(**names)


def test_l7_names_of_classes_are_completed():
    config = DeepLabV3Config(id2label={"1": "road", "0": "sky"})
    assert config.num_labels == 2
    assert config.id2label == {0: "sky", 1: "road"}
    assert config.label2id == {"sky": 0, "road": 1}
    assert DeepLabV3Config(label2id={"sky": 0, "road": 1}).id2label == {0: "sky", 1: "road"}
    assert DeepLabV3Config(num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert DeepLabV3Config(num_labels=1).id2label == {0: "LABEL_0"}


def test_json_round_trip(tmp_path):
    config = DeepLabV3Config(
        backbone="test_resnet",
        backbone_kwargs={"drop_path_rate": 0.1},
        output_stride=8,
        hidden_size=32,
        norm_eps=1e-3,
        norm_momentum=0.01,
        atrous_rates=(3, 6),
        absolute_rates=True,
        use_image_pooling=False,
        variant="mmseg",
        pooling_window=(513, 257),
        pool_norm="group",
        aspp_dropout=0.3,
        nonlocal_mode="gaussian",
        multi_grid=(1, 2),
        align_corners=True,
        use_auxiliary_head=True,
        semantic_loss_ignore_index=254,
        id2label={0: "sky", 1: "road"},
        palette=[[0, 0, 255], [90, 90, 90]],
    )
    config.save_pretrained(tmp_path)
    for loaded in (DeepLabV3Config.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is DeepLabV3Config
        for name in own_fields(DeepLabV3Config) | {"id2label", "label2id"}:
            assert getattr(loaded, name) == getattr(config, name), name
        assert loaded.to_json_string() == config.to_json_string()


def test_rates_as_a_tuple_equal_rates_as_a_list():
    assert DeepLabV3Config(atrous_rates=(6, 12)) == DeepLabV3Config(atrous_rates=[6, 12])
    assert DeepLabV3Config() == DeepLabV3Config(atrous_rates=[6, 12, 18])


def test_configs_do_not_share_their_defaults():
    first, second = DeepLabV3Config(), DeepLabV3Config()
    first.atrous_rates.append(24)
    assert second.atrous_rates == [6, 12, 18]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"num_labels": 2}, {0: "sky", 1: "road"}),
        ({"num_labels": 3}, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}),
        ({"id2label": {0: "x", 1: "y", 2: "z"}}, {0: "x", 1: "y", 2: "z"}),
        ({"num_labels": 3, "id2label": {0: "x", 1: "y", 2: "z"}}, {0: "x", 1: "y", 2: "z"}),
        ({"label2id": {"x": 0, "y": 1, "z": 2}}, {0: "x", 1: "y", 2: "z"}),
    ],
)
def test_classes_given_to_from_pretrained_replace_the_saved(tmp_path, given, names):
    DeepLabV3Config(id2label={0: "sky", 1: "road"}).save_pretrained(tmp_path)
    for config in (DeepLabV3Config.from_pretrained(tmp_path, **given), AutoConfig.from_pretrained(tmp_path, **given)):
        assert config.id2label == names
        assert config.label2id == {name: index for index, name in names.items()}
        assert config.num_labels == len(names)


def test_contradicting_classes_given_to_from_pretrained_are_refused(tmp_path):
    DeepLabV3Config(num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_labels is 4, but id2label names 3"):
        DeepLabV3Config.from_pretrained(tmp_path, num_labels=4, id2label={0: "x", 1: "y", 2: "z"})
    with pytest.raises(ValueError, match="num_labels is 0"):
        DeepLabV3Config.from_pretrained(tmp_path, num_labels=0)


@pytest.mark.parametrize(
    ("stride", "rates", "absolute", "effective"),
    [
        (16, [6, 12, 18], False, [6, 12, 18]),
        (8, [6, 12, 18], False, [12, 24, 36]),
        (32, [6, 12, 18], False, [3, 6, 9]),
        (32, [1], False, [1]),
        (8, [6, 12, 18], True, [6, 12, 18]),
        (8, [], False, []),
    ],
)
def test_rates_scale_with_the_stride(stride, rates, absolute, effective):
    config = DeepLabV3Config(output_stride=stride, atrous_rates=rates, absolute_rates=absolute)
    assert config.effective_rates == effective
