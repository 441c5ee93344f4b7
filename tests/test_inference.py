import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSemanticSegmentation

import hf_ctxseg
from hf_ctxseg import CtxSegImageProcessor, Prediction, predict
from hf_ctxseg.inference import Predictor, load_run
from hf_ctxseg.prediction_files import find_pictures, predict_files

NAMES = ("ground", "disc", "box")
PALETTE = [[10, 20, 30], [200, 0, 0], [0, 200, 0]]


@pytest.fixture(scope="module")
def model(run_folder):
    return AutoModelForSemanticSegmentation.from_pretrained(run_folder)


@pytest.fixture(scope="module")
def expected(model, picture):
    """The mask by the formulas: normalise, forward, upsample, arg-max."""
    pixels = torch.from_numpy(np.asarray(picture) / 255.0).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.inference_mode():
        logits = model(((pixels - mean) / std)[None]).logits
        return F.interpolate(logits, (45, 61), mode="bilinear")[0].argmax(0).numpy()


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def test_the_mask_is_that_of_the_formulas(run_folder, picture, expected):
    found = predict(run_folder, picture)
    assert isinstance(found, Prediction)
    assert len(np.unique(expected)) == 3
    assert found.mask.shape == (45, 61)
    assert np.array_equal(found.mask, expected)
    assert found.names == NAMES


def test_models_and_pictures_in_every_form(run_folder, model, picture, expected, tmp_path):
    path = save(picture, tmp_path / "ä b.png")
    array = np.asarray(picture)
    for which in (str(run_folder), run_folder, model):
        assert np.array_equal(predict(which, picture).mask, expected)
    predictor = Predictor(model)
    forms = {
        "path": path,
        "text": str(path),
        "array": array,
        "channels first": array.transpose(2, 0, 1),
        "float": array / 255,
        "uint16": array.astype(np.uint16) * 257,
        "alpha": picture.convert("RGBA"),
    }
    for name, image in forms.items():
        found = predictor(image)
        assert np.array_equal(found.mask, expected), name
        assert np.array_equal(np.asarray(found.picture), array), name


def test_grey_arrays_equal_grey_pictures(model, picture):
    grey = picture.convert("L")
    assert np.array_equal(predict(model, np.asarray(grey)).mask, predict(model, grey).mask)


def test_rotated_pictures_give_upright_masks(model, picture, expected, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    for image in (path, Image.open(path)):
        assert np.array_equal(predict(model, image).mask, expected)


def test_views_average_probabilities_at_the_picture_s_size(run_folder, model, picture):
    processor = Predictor(model).processor
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    chances = []
    for scale in (1, 1.5):
        scaled = F.interpolate(pixels, (int(45 * scale + 0.5), int(61 * scale + 0.5)), mode="bilinear", antialias=True)
        with torch.inference_mode():
            for mirror in (False, True):
                logits = model(scaled.flip(-1) if mirror else scaled).logits
                upsampled = F.interpolate(logits, (45, 61), mode="bilinear").softmax(1)[0]
                chances.append(upsampled.flip(-1) if mirror else upsampled)
    found = predict(run_folder, picture, scales=(1, 1.5), flip=True)
    assert np.array_equal(found.mask, torch.stack(chances).mean(0).argmax(0).numpy())
    assert not np.array_equal(found.mask, predict(model, picture).mask)


def test_a_window_that_covers_the_picture_changes_nothing(model, picture, expected):
    assert np.array_equal(predict(model, picture, window=64).mask, expected)
    small = predict(model, picture, window=24).mask
    assert small.shape == expected.shape and not np.array_equal(small, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window is 0"), ({"scales": [0.0]}, "scales are"), ({"overlap": -1}, "overlap is -1")],
)
def test_views_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Predictor(model, **options)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 50), (70, 33)])
def test_pictures_of_any_size(model, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    found = predict(model, image)
    assert found.mask.shape == size
    assert found.overlay.width >= size[1] and found.mask_image.size == size[::-1]


def test_areas_are_shares_of_the_picture(run_folder, picture, expected):
    areas = predict(run_folder, picture).areas
    assert areas == {NAMES[index]: pytest.approx((expected == index).mean()) for index in np.unique(expected)}
    assert sum(areas.values()) == pytest.approx(1)
    assert list(areas.values()) == sorted(areas.values(), reverse=True)


def test_areas_leave_out_absent_classes():
    mask = np.array([[2, 2, 0, 2]])
    found = Prediction(mask, NAMES, tuple(map(tuple, PALETTE)), Image.new("RGB", (4, 1)))
    assert found.areas == {"box": 0.75, "ground": 0.25}


def test_overlay_shows_the_picture_in_the_colours_and_a_legend_below(run_folder, picture, expected):
    drawn = np.asarray(predict(run_folder, picture).overlay).astype(int)
    factor = round(256 / 61)  # small pictures are enlarged, so that the legend can be read
    assert drawn.shape[0] > 45 * factor and drawn.shape[1] >= 61 * factor
    left = (drawn.shape[1] - 61 * factor) // 2
    shown = drawn[: 45 * factor : factor, left : left + 61 * factor : factor]
    mixed = 0.45 * np.asarray(picture) + 0.55 * np.array(PALETTE)[expected]
    assert np.abs(shown - mixed).max() <= 1


def test_mask_picture_holds_indices_and_colours(run_folder, picture, expected, tmp_path):
    path = tmp_path / "mask.png"
    predict(run_folder, picture).mask_image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == "P"
        assert np.array_equal(np.asarray(stored), expected)
        assert np.array_equal(np.asarray(stored.convert("RGB")), np.array(PALETTE)[expected])


def test_palette_of_another_number_of_classes_is_not_used(run_folder, picture):
    model = AutoModelForSemanticSegmentation.from_pretrained(
        run_folder, num_labels=5, ignore_mismatched_sizes=True
    ).eval()
    predictor = Predictor(model)
    assert len(predictor.palette) == 5 == len(set(predictor.palette))
    assert predictor(picture).names == tuple(f"LABEL_{index}" for index in range(5))


def test_a_model_object_keeps_its_mode_and_gives_the_same_mask(run_folder, picture, expected):
    model = AutoModelForSemanticSegmentation.from_pretrained(run_folder).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert np.array_equal(predict(model, picture).mask, expected)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_processor_can_be_given(model, picture, expected):
    flat = CtxSegImageProcessor(image_mean=[0.5] * 3, image_std=[10.0] * 3)
    assert not np.array_equal(predict(model, picture, processor=flat).mask, expected)


def outcome(results):
    return [result.shown for result in results.done], list(results.failed.values())


def test_files_give_masks_and_overlays(run_folder, picture, expected, tmp_path):
    save(picture, tmp_path / "in/a.png")
    save(picture.rotate(180), tmp_path / "in/deep/er/b.TIF")
    (tmp_path / "in/notes.txt").write_text("no picture")
    (tmp_path / "in/folder.png").mkdir()
    written, failed = outcome(predict_files(Predictor(run_folder), [tmp_path / "in"], tmp_path / "out"))
    assert failed == []
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert names == {"a_mask.png", "a_overlay.png", "deep/er/b_mask.png", "deep/er/b_overlay.png"}
    assert written == [tmp_path / "out/a_overlay.png", tmp_path / "out/deep/er/b_overlay.png"]
    with Image.open(tmp_path / "out/a_mask.png") as mask:
        assert np.array_equal(np.asarray(mask), expected)
    with Image.open(written[0]) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(predict(run_folder, picture).overlay))


def test_a_bad_file_does_not_stop_the_others(run_folder, picture, tmp_path):
    save(picture, tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:300])
    (tmp_path / "in/c.jpg").write_bytes(b"")
    Image.fromarray(np.full((5, 5), np.nan, np.float32)).save(tmp_path / "in/d.tif")
    (tmp_path / "in/e.png").symlink_to(tmp_path / "nowhere.png")
    save(picture, tmp_path / "in/f.png")
    written, failed = outcome(predict_files(Predictor(run_folder), [tmp_path / "in"], tmp_path / "out"))
    assert [path.name for path in written] == ["a_overlay.png", "f_overlay.png"]
    assert len(failed) == 4
    for name, sentence in zip(("b.png", "c.jpg", "d.tif", "e.png"), failed, strict=True):
        assert str(tmp_path / "in" / name) in sentence and "\n" not in sentence
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_pictures_of_one_name_do_not_overwrite_each_other(run_folder, tmp_path):
    colours = {"a.jpg": "red", "a.png": "green", "a.bmp": "blue", "a_png.png": "white", "a_png_2.png": "black"}
    for name, colour in colours.items():
        save(Image.new("RGB", (8, 8), colour), tmp_path / "in" / name)
    written, failed = outcome(predict_files(Predictor(run_folder), [tmp_path / "in"], tmp_path / "out"))
    assert failed == []
    assert len(written) == len(set(written)) == len(list((tmp_path / "out").glob("*_mask.png"))) == 5
    assert written[0].name == "a_overlay.png"
    files = [save(Image.new("RGB", (8, 8), "red"), tmp_path / folder / "a.png") for folder in "xyz"]
    written, _ = outcome(predict_files(Predictor(run_folder), files, tmp_path / "out2"))
    assert [path.name for path in written] == ["a_overlay.png", "a_png_overlay.png", "a_png_2_overlay.png"]
    assert all(path.exists() for path in written)


def test_missing_inputs_are_named_before_anything_is_done(run_folder, picture, tmp_path):
    good = save(picture, tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"no picture or folder .*b\.png"):
        predict_files(Predictor(run_folder), [good, tmp_path / "b.png"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no picture \(\.bmp, "):
        list(find_pictures([tmp_path / "empty"]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match=r"no picture .*b\.png"):
        predict(run_folder, tmp_path / "b.png")


def one_sentence(name, match):
    with pytest.raises(ValueError, match=match) as caught:
        load_run(name)
    assert str(name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere/run", "org/no-such-model", "./missing"])
def test_unknown_models_are_one_sentence(name):
    with pytest.raises((ConnectionError, FileNotFoundError), match=f"(There is no folder )?{name}") as caught:
        load_run(name)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_unfinished_or_foreign_folders_are_one_sentence(run_folder, tmp_path):
    def copy(name):
        return shutil.copytree(run_folder, tmp_path / name)

    (tmp_path / "empty").mkdir()
    one_sentence(tmp_path / "empty", "empty (holds no finished model|is no readable model)")
    (copy("no weights") / "model.safetensors").unlink()
    one_sentence(tmp_path / "no weights", "holds no finished model")
    (copy("no processor") / "preprocessor_config.json").unlink()
    one_sentence(tmp_path / "no processor", "holds no finished model")
    torn = copy("torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    one_sentence(tmp_path / "torn", "is no readable model")
    config = copy("foreign") / "config.json"
    for content in (
        {"model_type": "bert"},
        {"model_type": "nonsense"},
        {"model_type": "ctxseg_deeplabv3", "rates": 1},
    ):
        config.write_text(json.dumps(content))
        one_sentence(tmp_path / "foreign", "is no readable model")
    config.write_text("{")
    one_sentence(tmp_path / "foreign", "not a valid JSON")


def test_a_model_without_classifier_is_refused(run_folder, tmp_path):
    AutoModel.from_pretrained(run_folder).save_pretrained(tmp_path)
    CtxSegImageProcessor().save_pretrained(tmp_path)
    one_sentence(tmp_path, r"lacks 2 tensors \(first: classifier\.bias, classifier\.weight\)")


def test_pickled_weights_are_not_opened(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    weights = load_run(run_folder)[0].state_dict()
    (tmp_path / "run/model.safetensors").unlink()
    torch.save(weights, tmp_path / "run/pytorch_model.bin")
    one_sentence(tmp_path / "run", "holds no finished model")


def test_predict_is_public():
    assert hf_ctxseg.predict is predict
