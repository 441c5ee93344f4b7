import io

import pytest
import yaml

from hf_ctxseg.arguments import arguments_from_dict, parse_arguments, read_yaml, short_help

NEEDED = ["--data", "d", "--output_dir", "o", "--use_cpu", "true"]


def _parse(*flags):
    return parse_arguments([*NEEDED, *flags])[0]


def test_defaults_are_the_recipe():
    (model, data, training), given = parse_arguments(NEEDED)
    assert given == {"data": "d", "output_dir": "o", "use_cpu": True}
    assert (model.head, model.backbone, model.backbone_weights) == ("deeplabv3", "resnet50", None)
    assert (data.crop_size, data.scale, data.max_class_ratio) == ([320], [0.5, 2.0], 0.75)
    assert training.max_steps == 600
    assert training.lr_scheduler_type == "polynomial"
    assert training.lr_scheduler_kwargs == {"power": 0.9, "lr_end": 0.0}
    assert training.head_learning_rate_factor == 10
    assert training.report_to == []


def test_length_of_training_is_what_was_asked_for():
    assert _parse("--num_train_epochs", "7")[2].max_steps == -1
    assert _parse("--num_train_epochs", "7")[2].num_train_epochs == 7
    assert _parse("--max_steps", "20")[2].max_steps == 20


def test_flags_are_typed():
    flags = "--crop_size 33 44 --scale 0.7 1.5 --max_steps 5 --resume --no_channels_last --use_auxiliary_head false"
    model, data, training = _parse(*flags.split(), "--config_overrides", "atrous_rates=[3,6]", "hidden_size=8")
    assert data.crop_size == [33, 44] and data.scale == [0.7, 1.5]
    assert training.max_steps == 5 and training.resume and not training.channels_last
    assert model.use_auxiliary_head is False and model.config_overrides == ["atrous_rates=[3,6]", "hidden_size=8"]


def test_hyphens_and_equal_signs_do_as_well():
    (_, data, training), given = parse_arguments([*NEEDED, "--train-split=val", "--max-steps", "4"])
    assert data.train_split == "val" and training.max_steps == 4
    assert given["train_split"] == "val" and given["max_steps"] == 4


def test_schedule_can_be_chosen():
    training = _parse("--lr_scheduler_type", "cosine")[2]
    assert training.lr_scheduler_type == "cosine" and not training.lr_scheduler_kwargs
    training = _parse("--lr_scheduler_kwargs", '{"power": 2}')[2]
    assert training.lr_scheduler_kwargs == {"power": 2}


def test_yaml_gives_arguments_and_flags_override_them(tmp_path):
    content = {
        "data": "from_yaml",
        "output_dir": "o",
        "use_cpu": True,
        "crop_size": 64,
        "scale": [0.7, 1.5],
        "labels": ["a b", "c"],
        "learning_rate": 1e-3,
        "max_steps": 7,
        "ignore_index": -100,
        "lr_scheduler_kwargs": {"power": 1.0},
        "channels_last": False,
        "class_weights": [1, 2.5],
        "loss": "cross_entropy+0.5*lovasz",
        "eval_split": None,
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    arguments, given = parse_arguments(["--config", str(tmp_path / "a.yaml"), "--max_steps", "9", "--data", "flag"])
    _, data, training = arguments
    assert data.data == "flag" and training.max_steps == 9
    assert data.crop_size == [64] and data.scale == [0.7, 1.5]
    assert data.labels == "a b,c" and data.ignore_index == -100 and data.eval_split is None
    assert training.learning_rate == 1e-3 and training.lr_scheduler_kwargs == {"power": 1.0}
    assert training.channels_last is False
    assert training.class_weights == ["1", "2.5"] and training.loss == "cross_entropy+0.5*lovasz"
    assert set(given) == set(content) and given["max_steps"] == 9


def test_given_arguments_repeat_themselves(tmp_path):
    flags = "--crop_size 33 44 --learning_rate 3e-4 --resume --no_channels_last --max_steps 5 --eval_steps 0.5"
    first, given = parse_arguments([*NEEDED, *flags.split(), "--config_overrides", "hidden_size=8"])
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(given))
    second, again = parse_arguments(["--config", str(tmp_path / "a.yaml")])
    assert again == given
    assert first[0] == second[0] and first[1] == second[1]
    assert first[2].to_dict() == second[2].to_dict()


def test_keyword_arguments_are_the_flags():
    keywords = {"data": "d", "output_dir": "o", "use_cpu": True, "crop_size": 33, "scale": (0.5, 1.0), "max_steps": 5}
    _, data, training = arguments_from_dict(keywords)
    _, flag_data, flag_training = _parse("--crop_size", "33", "--scale", "0.5", "1.0", "--max_steps", "5")
    assert data.crop_size == flag_data.crop_size and tuple(data.scale) == tuple(flag_data.scale)
    assert training.to_dict() == flag_training.to_dict()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bakbone", "x"], "There is no flag 'bakbone': did you mean 'backbone'?"),
        (["--qqqqq", "x"], "There is no flag 'qqqqq'; see --help-all"),
        (["--max_steps", "many"], "max_steps.*invalid int value: 'many'; see ctxseg train --help"),
        (["--resume", "perhaps"], "resume"),
        (["--freeze_batch_norm", "head"], "choose from '?none'?, '?backbone'?, '?all'?"),
        (["--crop_size", "0"], r"crop_size is \[0\], but must be one or two whole numbers above 0"),
        (["--crop_size", "1", "2", "3"], r"crop_size is \[1, 2, 3\]"),
        (["--scale", "2", "1"], r"scale is \[2.0, 1.0\], but must be two numbers above 0, the smaller first"),
        (["--scale", "0", "1"], r"scale is \[0.0, 1.0\]"),
        (["--max_class_ratio", "1.5"], "max_class_ratio is 1.5, but must be above 0 and at most 1"),
        (["--image_size", "0"], "image_size is 0, but must be above 0"),
        (["--image_mean", "0.5"], r"image_mean is \[0.5\], but must be three numbers"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor is .*: give --label_smoothing instead"),
        (["--label_smoothing", "2"], "label_smoothing is 2.0, but must lie between 0 and 1"),
        (["--loss", "lovas"], "There is no loss 'lovas': did you mean 'lovasz'"),
        (["--class_weights", "median"], "class_weights is 'median', but must be none, median_frequency"),
        (["--loss", "dice", "--label_smoothing", "0.1"], "label_smoothing is of no effect on the loss dice"),
        (["--loss", "lovasz", "--class_weights", "1", "2"], "class_weights is of no effect on the loss lovasz"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint is not taken: --resume continues"),
        (["--push_to_hub"], "ctxseg push"),
        (["--report_to", "no_such_tracker"], "report_to names 'no_such_tracker', but this tracker is not installed"),
        (["--config"], "--config: expected one argument"),
        (["--config", "nowhere.yaml"], "no arguments file nowhere.yaml"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(flags, message, capsys):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _parse(*flags)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "output_dir is missing: name the run folder with --output_dir"),
        ({"output_dir": "o"}, "data is missing"),
        ({"data": "d", "output_dir": "o", "bakbone": "x"}, "There is no argument 'bakbone': did you mean 'backbone'"),
        ({"data": "d", "output_dir": "o", "freeze_batch_norm": "head"}, "freeze_batch_norm is 'head', but must be"),
        (
            {"data": "d", "output_dir": "o", "preset": "deeplabv3-aspp", "head": "deeplabv3"},
            "head is given beside preset, which brings its own: leave one of the two out",
        ),
        ({"data": "d", "output_dir": "o", "preset": "deeplabv3-aspp", "backbone": "resnet18"}, "backbone is given"),
        (
            {"data": "d", "output_dir": "o", "preset": "deeplabv3-aspp", "model_name_or_path": "m"},
            "preset is given beside model_name_or_path, whose checkpoint brings its own",
        ),
    ],
)
def test_wrong_keywords_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        arguments_from_dict(keywords)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stepss: 3", "There is no key 'max_stepss': did you mean 'max_steps'"),
        ("- a", "holds a list, but must hold lines of the form"),
        ("a: [1", "not readable as YAML"),
        ("3: 4", "There is no key '3'"),
    ],
)
def test_wrong_yaml_is_refused_with_its_name(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert "a.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_empty_yaml_gives_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "a.yaml") == {}


def test_short_help_names_what_is_ours():
    stream = io.StringIO()
    short_help(stream)
    lines = stream.getvalue().splitlines()
    for name in ("--head ", "--data ", "--resume ", "--freeze_batch_norm ", "--output_dir "):
        assert any(line.strip().startswith(name) and len(line.strip()) > len(name) + 10 for line in lines), name
    assert not any("remove_unused_columns" in line or "warmup" in line for line in lines)
