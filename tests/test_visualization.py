import ast
import inspect
import math
import sys

import numpy as np
import pytest
from PIL import Image

from hf_ctxseg import plots, sheet, visualization
from hf_ctxseg.sheet import legend, shorten, text_line
from hf_ctxseg.visualization import (
    colorize,
    contact_sheet,
    default_palette,
    error_map,
    mask_to_image,
    overlay,
    plot_curves,
    plot_per_class,
    preview_grid,
    with_legend,
)

pytestmark = pytest.mark.figures
NAMES = ["sky", "road", "car"]
PALETTE = [(10, 20, 200), (200, 150, 20), (30, 160, 40)]


def halves(height, width, left=0, right=1):
    mask = np.full((height, width), left)
    mask[:, width // 2 :] = right
    return mask


def grey(height, width, value=100):
    return Image.new("RGB", (width, height), (value,) * 3)


def has_colour(picture, colour):
    return bool((np.asarray(picture.convert("RGB")) == colour).all(-1).any())


def test_default_palette_is_distinct_and_stable():
    palette = default_palette(400)
    assert len(set(palette)) == 400
    assert default_palette(150) == palette[:150]
    assert default_palette(1) == palette[:1]
    assert all(0 <= channel <= 255 and isinstance(channel, int) for colour in palette for channel in colour)
    # Neither like the black of ignored pixels nor like the white of paper and lines.
    assert all(60 < max(colour) and min(colour) < 245 for colour in palette)
    first = np.array(palette[:150], dtype=float)
    apart = np.linalg.norm(first[:, None] - first[None], axis=-1) + 1e9 * np.eye(150)
    assert apart.min() > 15
    assert len(default_palette(3000)) == 3000


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_colorize_looks_each_pixel_up(dtype):
    rng = np.random.default_rng(0)
    ignore_index = 255 if dtype == np.uint8 else -100
    mask = rng.choice([0, 1, 2, ignore_index], (6, 7)).astype(dtype)
    drawn = colorize(mask, PALETTE, ignore_index)
    assert drawn.dtype == np.uint8 and drawn.shape == (6, 7, 3)
    for y in range(6):
        for x in range(7):
            expected = (0, 0, 0) if mask[y, x] == ignore_index else PALETTE[mask[y, x]]
            assert tuple(drawn[y, x]) == expected


def test_values_without_a_colour_are_named():
    with pytest.raises(ValueError, match=r"holds 7 \(2 such pixels in all\).*classes 0 to 2 and 255 is ignored"):
        colorize(np.array([[7, 0, 7]]), PALETTE)
    with pytest.raises(ValueError, match="holds -100"):
        overlay(grey(1, 2), np.array([[-100, 0]]), PALETTE)
    with pytest.raises(ValueError, match=r"float64 of shape \(2, 2\)"):
        colorize(np.zeros((2, 2)), PALETTE)


def test_indexed_png_keeps_values_and_colours(tmp_path):
    mask = np.array([[0, 1, 2], [255, 2, 0]])
    mask_to_image(mask, PALETTE).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), mask)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), colorize(mask, PALETTE))


def test_more_than_256_classes_are_stored_in_16_bits(tmp_path):
    mask = np.array([[0, 299], [65535, 256]])
    mask_to_image(mask, default_palette(300)).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as picture:
        assert picture.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(picture), mask)
    with pytest.raises(ValueError, match=r"from -100 to 0.*stores 0 to 255"):
        mask_to_image(np.array([[-100, 0]]), PALETTE)


def test_overlay_blends_and_draws_one_line():
    mask = halves(200, 300)
    mask[:20] = 255
    drawn = np.asarray(overlay(grey(200, 300), mask, PALETTE, opacity=0.25)).astype(int)
    for place, colour in [((100, 10), PALETTE[0]), ((100, 290), PALETTE[1]), ((5, 5), (0, 0, 0))]:
        expected = [0.75 * 100 + 0.25 * channel for channel in colour]
        np.testing.assert_allclose(drawn[place], expected, atol=1)
    white = (drawn == 255).all(-1)
    assert white[100].nonzero()[0].tolist() == [150]
    assert white[:, 10].nonzero()[0].tolist() == [20]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "F"])
def test_overlay_takes_every_mode_and_tiny_pictures(mode):
    image = Image.new(mode, (5, 7))
    drawn = overlay(image, np.ones((7, 5), np.uint8), PALETTE, opacity=1.0)
    assert drawn.size == (5, 7) and drawn.mode == "RGB"
    assert (np.asarray(drawn) == PALETTE[1]).all()


def test_overlay_shows_wide_ranges_instead_of_white():
    ramp = np.linspace(0, 60000, 200 * 200).reshape(200, 200).astype(np.uint16)
    drawn = np.asarray(overlay(Image.fromarray(ramp), np.zeros((200, 200), int), PALETTE, opacity=0.0))
    assert drawn[0].max() < 10 and drawn[-1].min() > 245
    assert 120 < drawn[100].mean() < 136


def test_overlay_refuses_other_sizes_and_opacities():
    with pytest.raises(ValueError, match=r"5 x 7 pixels.*mask must have shape \(7, 5\), but it has \(5, 7\)"):
        overlay(Image.new("RGB", (5, 7)), np.zeros((5, 7), int), PALETTE)
    with pytest.raises(ValueError, match=r"opacity is 1\.5"):
        overlay(grey(5, 7), np.zeros((5, 7), int), PALETTE, opacity=1.5)


def test_error_map_marks_right_wrong_and_ignored():
    drawn = error_map(np.array([[1, 2, 0]]), np.array([[1, 1, 255]]), 255)
    right, wrong, ignored = drawn[0].astype(int)
    assert right.max() - right.min() == 0 and 0 < right[0] < 128
    assert wrong[0] > 200 and wrong[1:].max() < 80
    assert ignored.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="must agree"):
        error_map(np.zeros((1, 2), int), np.zeros((2, 1), int), 255)


@pytest.mark.parametrize(("height", "width"), [(7, 5), (64, 64), (500, 1), (1, 500), (1200, 1800)])
@pytest.mark.parametrize("names", [NAMES, ["Straße é", "a name " * 20, "two\nlines"]])
def test_legend_keeps_the_picture_and_lists_what_is_there(height, width, names):
    mask = np.zeros((height, width), int)
    mask.flat[0] = 2
    picture = Image.fromarray(colorize(mask, PALETTE))
    drawn = with_legend(picture, mask, names, PALETTE)
    factor = max(1, round(256 / max(height, width)))
    inside = np.asarray(drawn)[: height * factor, : width * factor]
    np.testing.assert_array_equal(inside[::factor, ::factor], np.asarray(picture))
    assert drawn.height > len(inside)
    strip = drawn.crop((0, len(inside), drawn.width, drawn.height))
    assert has_colour(strip, PALETTE[0]) and has_colour(strip, PALETTE[2]) and not has_colour(strip, PALETTE[1])
    assert (np.asarray(strip)[:, -3:] == 255).all(), "text runs over the right edge"


def test_legend_orders_by_area_with_shares(monkeypatch):
    seen = {}

    def record(entries, width, size):
        seen["entries"] = entries
        return legend(entries, width, size)

    monkeypatch.setattr("hf_ctxseg.visualization.legend", record)
    mask = np.full((100, 100), 1)
    mask[:20] = 255
    mask[20:30] = 2
    mask[99, :2] = 0
    with_legend(Image.fromarray(colorize(mask, PALETTE)), mask, NAMES, PALETTE)
    assert seen["entries"] == [
        ("road  70.0 %", PALETTE[1]),
        ("car  10.0 %", PALETTE[2]),
        ("sky  < 0.1 %", PALETTE[0]),
        ("ignored  20.0 %", (0, 0, 0)),
    ]


def test_legend_wants_as_many_names_as_colours():
    with pytest.raises(ValueError, match="2 class names, but 3 colours"):
        with_legend(grey(4, 4), np.zeros((4, 4), int), NAMES[:2], PALETTE)


def test_legend_letters_differ_beyond_ascii():
    # A font without these letters would draw the same empty box for each.
    drawn = {text: legend([(text, (0, 0, 0))], 60, 20).tobytes() for text in "éßдЖα"}
    assert len(set(drawn.values())) == 5


@pytest.mark.parametrize("count", [1, 2, 12, 31, 150])
def test_legend_columns_fit_the_width(count):
    strip = legend([(f"class {i}", PALETTE[0]) for i in range(count)], 900, 15)
    assert strip.width == 900
    line = 24
    assert strip.height >= math.ceil(count / 5) * line


def test_shorten_keeps_both_ends():
    assert shorten("short  name\n") == "short name"
    text = "beginning" + "x" * 100 + "end"
    assert len(shorten(text, 21)) == 21
    assert shorten(text, 21).startswith("beginning") and shorten(text, 21).endswith("end")
    strip = np.asarray(text_line("W" * 500, 200, 15))
    assert strip.shape[1] == 200 and (strip[:, -4:] == 255).all() and (strip < 100).any()


def test_preview_grid_sets_four_columns_a_row():
    truth, prediction = halves(200, 300), halves(200, 300, 0, 2)
    truth[:40] = 255
    one = preview_grid([(grey(200, 300, 77), truth, prediction)], NAMES, PALETTE)
    two = preview_grid([(grey(200, 300, 77), truth, prediction)] * 2, NAMES, PALETTE, title="step 600")
    assert one.width == two.width == 4 * 308 + 8
    assert two.height > one.height + 200
    pixels = np.asarray(one)
    top = int(((pixels == 77).all(-1).sum(1) > 200).argmax())
    middle = pixels[top + 120]
    assert [tuple(middle[x].tolist()) for x in (8 + 20, 316 + 20, 316 + 280, 624 + 280, 932 + 20)] == [
        (77, 77, 77),
        PALETTE[0],
        PALETTE[1],
        PALETTE[2],
        (96, 96, 96),
    ]
    assert tuple(middle[932 + 280]) == (230, 30, 40)
    assert pixels[top + 10, 316 + 20].tolist() == pixels[top + 10, 932 + 20].tolist() == [0, 0, 0]


def test_preview_grid_bounds_cells_and_mixes_sizes():
    rows = [(grey(*shape), halves(*shape), halves(*shape)) for shape in [(7, 5), (1500, 900), (300, 2000)]]
    drawn = preview_grid(rows, NAMES, PALETTE)
    assert drawn.width == 4 * 408 + 8
    assert drawn.height < 2 * 560 + 200 + 150
    with pytest.raises(ValueError, match="at least one row"):
        preview_grid([], NAMES, PALETTE)
    with pytest.raises(ValueError, match="its prediction must have shape"):
        preview_grid([(grey(4, 4), np.zeros((4, 4), int), np.zeros((4, 5), int))], NAMES, PALETTE)


def test_contact_sheet_is_two_wide_and_captions_stay_inside():
    rows = [(grey(300, 400), halves(300, 400), f"{'very_long_' * i * 10}{i}.png") for i in range(4)]
    drawn = contact_sheet(rows, NAMES, PALETTE)
    assert drawn.width == 2 * 408 + 8
    assert 2 * 300 < drawn.height < 2 * 300 + 200
    assert has_colour(drawn, PALETTE[0]) and not has_colour(drawn, PALETTE[2])
    assert (np.asarray(drawn)[:, -4:] == 255).all()
    assert contact_sheet(rows[:1], NAMES, PALETTE).width == 408 + 8
    with pytest.raises(ValueError, match="its label must have shape"):
        contact_sheet([(grey(4, 4), np.zeros((4, 5), int), "a.png")], NAMES, PALETTE)


HISTORY = [{"step": 10 * i, "loss": 3 / i, "learning_rate": 0.01 / i, "grad_norm": 1.0} for i in range(1, 5)]
EVALUATIONS = [{"step": 20, "eval_loss": 1.0, "eval_mean_iou": 0.3}, {"step": 40, "eval_mean_iou": math.nan}]


@pytest.mark.parametrize(
    ("history", "panels"),
    [
        (HISTORY + EVALUATIONS + [{"step": 40, "train_loss": 1.0, "train_runtime": 3.0}], 3),
        (HISTORY, 2),
        (HISTORY[:1], 2),
        ([{**entry, "learning_rate_backbone": 0.001} for entry in HISTORY], 2),
        (EVALUATIONS, 2),
        ([], 1),
    ],
)
def test_curves_have_a_panel_for_each_thing_logged(history, panels, tmp_path):
    plot_curves(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (880, pytest.approx(110 * (0.6 + 2.4 * panels), abs=1))
        assert has_colour(picture, (31, 119, 180)) == bool(history)


@pytest.mark.parametrize(
    ("names", "ious"),
    [
        (NAMES, [0.9, math.nan, 0.0]),
        (["only"], [math.nan]),
        (["costs $ and $x_", "Straße " * 30], [1.0, 0.5]),
        ([f"class {i}" for i in range(60)], [i / 60 for i in range(60)]),
    ],
)
def test_bars_are_as_long_as_the_scores(names, ious, tmp_path):
    plot_per_class(names, ious, tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        blue = (np.asarray(picture.convert("RGB")) == (0, 114, 178)).all(-1)
    runs = [int(row.sum()) for row in blue]
    bars = [run for run, before in zip(runs, [0, *runs], strict=False) if run and not before]
    expected = sorted((value for value in ious if value > 0), reverse=True)
    assert len(bars) == len(expected)
    for bar, value in zip(bars, expected, strict=True):
        assert bar == pytest.approx(bars[0] * value / expected[0], abs=3)


def test_bars_refuse_unequal_lists(tmp_path):
    with pytest.raises(ValueError, match="3 class names, but 1 values"):
        plot_per_class(NAMES, [0.1], tmp_path / "bars.png")


@pytest.mark.parametrize("count", [1, 3, 30])
def test_confusion_is_as_dark_as_its_share(count, tmp_path):
    matrix = np.zeros((count, count), int)
    matrix[:, -1] = 7  # every class is taken for the last one
    plots.plot_confusion([f"class {i} $_" for i in range(count)], matrix, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        dark = (np.asarray(picture.convert("RGB")) == (8, 48, 107)).all(-1)  # the end of matplotlib's Blues
    rows, columns = np.nonzero(dark)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height == pytest.approx(count * width, abs=2 + count)
    assert dark.sum() > (0.6 if count <= 25 else 0.95) * height * width  # the rest is what is written on it


def test_confusion_refuses_other_sizes(tmp_path):
    with pytest.raises(ValueError, match=r"3 class names, but a matrix of \(2, 2\)"):
        plots.plot_confusion(NAMES, np.eye(2), tmp_path / "confusion.png")


def test_plots_need_no_pyplot_and_import_matplotlib_late(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_curves(HISTORY, tmp_path / "curves.png")
    plot_per_class(NAMES, [0.1, 0.2, 0.3], tmp_path / "bars.png")
    for module in (plots, sheet, visualization):
        imports = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.Import)]
        froms = [node.module for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)]
        names = [alias.name for node in imports for alias in node.names] + froms
        assert names and not any(name.startswith("matplotlib") for name in names)
