import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from hf_ctxseg import CtxSegImageProcessor, DeepLabV3ForSemanticSegmentation, prediction, tiling
from hf_ctxseg.inference import Predictor
from hf_ctxseg.prediction_files import FileOptions, predict_files
from hf_ctxseg.tiling import Source, picture_source, scaled_source, tiled_blocks
from hf_ctxseg.views import Views, probability_blocks, view_maps

STRIDE = 4


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 5, 5, STRIDE, 2)
    return lambda pixels: 3 * layer(pixels).detach()


def large_picture(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height // 12 + 1, width // 12 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(4, 70)),  # F.interpolate is wrong for a width of 1
    window=st.integers(8, 40),
    overlap=st.floats(0, 0.8),
    scales=st.sampled_from([(1.0,), (0.7,), (0.5, 1.0, 1.6)]),
    flip=st.booleans(),
    align_corners=st.booleans(),
)
def test_blocks_from_the_top_down_are_those_of_all_logits(network, size, window, overlap, scales, flip, align_corners):
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    views = Views(window, overlap, scales=scales, flip=flip)
    source = Source(size, lambda rows, columns: pixels[..., rows, columns])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "CPU_BLOCK", 1 << 10)  # several blocks
        blocks = list(tiled_blocks(network, source, views, size, output_stride=STRIDE, align_corners=align_corners))
    maps = view_maps(network, pixels, views, STRIDE)
    if views.is_single:
        expected = F.interpolate(maps[0], size, mode="bilinear", align_corners=align_corners).permute(2, 0, 1, 3)
    else:
        expected = torch.cat([values.clone() for _, _, values in probability_blocks(maps, size, align_corners)])
    assert [rows.start for rows, _ in blocks] == [0, *(rows.stop for rows, _ in blocks[:-1])]
    torch.testing.assert_close(torch.cat([values for _, values in blocks]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scales", [(9.0,), (16.0, 1.0)])
def test_rows_of_logits_between_those_of_a_small_picture_are_skipped(network, monkeypatch, scales):
    monkeypatch.setattr(tiling, "CPU_BLOCK", 300)
    pixels = torch.randn(1, 3, 21, 17, generator=torch.Generator().manual_seed(0))
    source, views = Source((21, 17), lambda rows, columns: pixels[..., rows, columns]), Views(96, scales=scales)
    found = torch.cat([values for _, values in tiled_blocks(network, source, views, (21, 17), output_stride=STRIDE)])
    maps = [F.interpolate(logits, (21, 17), mode="bilinear") for logits in view_maps(network, pixels, views, STRIDE)]
    expected = maps[0] if views.is_single else sum(each.softmax(dim=1) for each in maps) / len(maps)
    torch.testing.assert_close(found.permute(1, 2, 0, 3), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [0.3, 0.75, 1.7])
def test_windows_of_a_scaled_picture_are_cut_from_the_scaled_whole(scale):
    pixels = torch.randn(1, 3, 61, 83, generator=torch.Generator().manual_seed(0))
    source = scaled_source(Source((61, 83), lambda rows, columns: pixels[..., rows, columns]), scale)
    whole = F.interpolate(pixels, source.size, mode="bilinear", antialias=True)
    for rows, columns in ((slice(0, 9), slice(3, 20)), (slice(7, source.size[0]), slice(11, source.size[1]))):
        torch.testing.assert_close(source.read(rows, columns), whole[..., rows, columns], rtol=1e-4, atol=1e-4)


def test_windows_are_read_through_the_processor():
    picture = large_picture(50, 40)
    processor = CtxSegImageProcessor(image_mean=[0.1, 0.2, 0.3])
    source = picture_source(picture, processor)
    whole = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert source.size == (40, 50)
    assert torch.equal(source.read(slice(3, 17), slice(20, 50)), whole[:, :, 3:17, 20:50])
    small = CtxSegImageProcessor(do_resize=True, size={"height": 24, "width": 32})
    assert picture_source(picture, small).size == (24, 32)


def test_progress_counts_every_window(network):
    pixels = torch.zeros(1, 3, 40, 60)
    seen = []
    source = Source((40, 60), lambda rows, columns: pixels[..., rows, columns])
    views = Views(window=16, overlap=0, scales=(0.5, 1), flip=True)
    list(tiled_blocks(network, source, views, (40, 60), output_stride=4, progress=lambda *pair: seen.append(pair)))
    assert {total for _, total in seen} == {2 * (2 * 2 + 3 * 4)}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_i7_windows_agree_with_the_whole_without_image_pooling(tiny, live):
    torch.manual_seed(0)
    config = tiny(use_image_pooling=False, atrous_rates=(1, 2, 3), output_stride=8)
    model = live(DeepLabV3ForSemanticSegmentation(config))
    picture = large_picture(160, 140)
    whole, tiled = (Predictor(model, window=window)(picture) for window in (None, 128))
    assert whole.how == "whole" and tiled.how == "windows of 128 pixels, 50% overlap"
    assert len(np.unique(whole.mask)) == 3
    assert (whole.mask == tiled.mask).mean() >= 0.95  # untrained, with classes close to each other


def test_i7_a_picture_that_does_not_fit_is_segmented_by_windows(run_folder):
    picture = large_picture(900, 800)
    predictor = Predictor(run_folder, memory="40MiB", progress=lambda done, total: None)
    plan = predictor.plan(picture)
    assert plan.views.window in (64, 128, 256, 512)
    assert "would take about" in plan.reason and "40.0 MiB" in plan.reason
    assert predictor.plan(picture.resize((60, 50))).views.window is None
    found = predictor(picture)
    assert found.mask.shape == (800, 900) and found.mask.dtype == np.uint8
    fixed = Predictor(run_folder, window=plan.views.window)(picture)
    assert np.array_equal(found.mask, fixed.mask)


def test_scales_count_in_what_is_small(run_folder):
    picture = large_picture(1024, 1024)
    assert Predictor(run_folder, scales=(0.5, 2)).plan(picture).views.window is None
    assert Predictor(run_folder, scales=(0.5, 8)).plan(picture).views.window is not None  # 64 megapixels


def test_a_batch_stays_within_the_memory(run_folder, monkeypatch):
    pictures = [large_picture(96, 80)] * 3
    looked_at = []
    for memory in ("2MiB", "20MiB", None):
        predictor = Predictor(run_folder, memory=memory)
        assert predictor.plan(pictures[0]).views.window is None
        handles = predictor.model.register_forward_pre_hook(lambda model, inputs: looked_at.append(len(inputs[0])))
        masks = [found.mask for found in predictor.several(pictures)]
        handles.remove()
        assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert looked_at == [1, 1, 1, 3, 3]


def test_too_little_memory_is_refused(run_folder):
    with pytest.raises(ValueError, match=r"memory is 100\.0 KiB, but a window of 64 pixels takes .*B: give more"):
        Predictor(run_folder, memory="100KiB")(large_picture(200, 200))


PROGRAM = """
import resource, sys
from hf_ctxseg.inference import Predictor
from hf_ctxseg.prediction_files import predict_files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = predict_files(Predictor(sys.argv[1]), [sys.argv[2]], sys.argv[3])
assert not results.failed, results.failed
print(before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_i7_144_megapixels_take_less_than_4_gib(run_folder, tmp_path):
    path = tmp_path / "huge.png"
    large_picture(12_000, 12_000).save(path, compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run_folder), str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 4096
    header = (tmp_path / "out/huge_mask.png").read_bytes()[:33]  # Pillow warns of so many pixels
    assert struct.unpack(">IIBB", header[16:26]) == (12_000, 12_000, 8, 3)  # indexed
    with Image.open(tmp_path / "out/huge_overlay.png") as shown:
        assert max(shown.size) <= 5000


def test_overlays_of_large_pictures_are_scaled_down(monkeypatch, run_folder):
    monkeypatch.setattr(prediction, "_LARGE", 100 * 100)
    monkeypatch.setattr(prediction, "_LARGE_EDGE", 300)
    found = Predictor(run_folder)(large_picture(600, 400))
    assert found.is_large
    assert found.overlay.width >= 300 and found.overlay.width < 600
    assert found.pixels == {name: int((found.mask == found.names.index(name)).sum()) for name in found.pixels}


def test_i7_files_of_a_picture_by_windows(run_folder, tmp_path):
    large_picture(300, 200).save(tmp_path / "a.png")
    notes = []
    predictor = Predictor(run_folder, memory="3MiB", progress=lambda done, total: None)
    results = predict_files(
        predictor, [tmp_path / "a.png"], tmp_path / "out", FileOptions(probabilities=True), note=notes.append
    )
    assert results.failed == {}
    assert len(notes) == 1 and "300 x 200 pixels, windows of" in notes[0]
    chances = np.load(tmp_path / "out/a_probabilities.npy", mmap_mode="r")
    assert chances.dtype == np.float16 and chances.shape == (200, 300, 3)
    assert np.abs(chances.astype(np.float32).sum(-1) - 1).max() < 2e-3
    with Image.open(tmp_path / "out/a_mask.png") as mask:
        assert (chances.argmax(-1) == np.asarray(mask)).mean() > 0.99
