import json
import os
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from hf_ctxseg import DenseCRF, cli, predict
from hf_ctxseg.inference import Predictor
from hf_ctxseg.prediction_files import FileOptions, find_pictures, predict_files, save_png


@pytest.fixture(scope="module")
def predictor(run_folder):
    return Predictor(run_folder)


def saved(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def run(*arguments):
    return cli.main(["predict", *map(str, arguments)])


def test_patterns_keep_the_structure_below_their_fixed_part(picture, tmp_path):
    for name in ("in/a/1.png", "in/b/2.png", "in/b/notes.txt", "in/3.jpg"):
        saved(picture, (tmp_path / name).with_suffix(".png")).rename(tmp_path / name)
    found = list(find_pictures([tmp_path / "in/**/*.png"]))
    assert [str(name) for _, name in found] == ["a/1.png", "b/2.png"]
    assert [path for path, _ in find_pictures([str(tmp_path / "in/?.jpg")])] == [tmp_path / "in/3.jpg"]
    with pytest.raises(ValueError, match=r"\*\.tif holds no picture"):
        list(find_pictures([tmp_path / "*.tif"]))


def test_results_are_not_written_among_the_pictures(predictor, picture, tmp_path):
    saved(picture, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"results would lie among them: give another --out"):
        predict_files(predictor, [tmp_path], tmp_path)
    predict_files(predictor, [tmp_path], tmp_path / "out")
    again = predict_files(predictor, [tmp_path], tmp_path / "out")  # its own results, below the pictures, are left out
    assert [result.source.name for result in again.done] == ["a.png"] and not again.failed


def test_pictures_among_the_results_are_told_apart_from_none(picture, tmp_path):
    saved(picture, tmp_path / "photos/a.png")
    for item in (tmp_path / "photos", tmp_path / "photos/*.png"):
        with pytest.raises(ValueError, match=r"lie in the folder of the results, .*: give another --out"):
            list(find_pictures([item], tmp_path))


@pytest.mark.parametrize(
    ("out", "summary", "message"),
    [
        ("file", "s.json", "file cannot be written (File exists)"),
        ("file/below", "s.json", "below cannot be written (Not a directory)"),
        ("out", "file/s.json", "file cannot be written (File exists)"),
        ("out", ".", "is a folder: give a file"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_at_once(
    run_folder, picture, tmp_path, monkeypatch, capsys, out, summary, message
):
    path = saved(picture, tmp_path / "a.png")
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Predictor, "__call__", lambda *arguments, **options: pytest.fail("hours were spent"))
    assert run(run_folder, path, "--out", tmp_path / out, "--json", tmp_path / summary) == 2
    assert message in capsys.readouterr().err


def test_sigterm_leaves_no_half_file(run_folder, picture, tmp_path, monkeypatch):
    path, out = saved(picture, tmp_path / "a.png"), tmp_path / "out"
    present = []

    def terminated(*arguments, **options):
        present.extend(each.name for each in out.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *arguments: pytest.fail("not handled"))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(Predictor, "__call__", terminated)
        with pytest.raises(SystemExit) as ended:
            run(run_folder, path, "--out", out, "--probabilities")
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert len(present) == 1 and present[0].endswith(".partial") and list(out.iterdir()) == []


def test_a_device_that_is_not_there_is_one_sentence(run_folder, picture, tmp_path, capsys):
    path = saved(picture, tmp_path / "a.png")
    assert run(run_folder, path, "--out", tmp_path / "out", "--device", "gpu") == 2
    assert "device 'gpu' cannot be used (" in capsys.readouterr().err


def test_probabilities_go_to_one_place(predictor, picture):
    with pytest.raises(ValueError, match="leave out probabilities, or the sink"):
        predictor(picture, probabilities=True, sink=lambda rows, values: None)


def test_only_own_files_are_replaced(predictor, picture, tmp_path):
    path = saved(picture, tmp_path / "in/a.png")
    truth = saved(Image.new("L", (3, 3), 7), tmp_path / "out/a_mask.png")
    results = predict_files(predictor, [path], tmp_path / "out")
    assert results.done == [] and "ctxseg predict did not write it" in results.failed[path]
    with Image.open(truth) as kept:
        assert kept.size == (3, 3)
    assert not (tmp_path / "out/a_overlay.png").exists()
    for options in (FileOptions(overwrite=True), FileOptions(), FileOptions(probabilities=True)):
        assert predict_files(predictor, [path], tmp_path / "out", options).failed == {}
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "a_mask.png",
        "a_overlay.png",
        "a_probabilities.npy",
    ]


def test_no_result_leaves_its_folder(predictor, picture, tmp_path):
    saved(picture, tmp_path / "in/deep/a.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/deep").symlink_to(tmp_path / "elsewhere")
    results = predict_files(predictor, [tmp_path / "in"], tmp_path / "out")
    assert results.done == []
    assert "would be written outside of" in next(iter(results.failed.values()))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_torn_file_is_never_seen(picture, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(picture, path)
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda self, stream, *rest, **more: stream.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_png(picture, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_batches_give_the_same_masks(predictor, picture, tmp_path):
    for number in range(3):
        saved(picture.rotate(90 * number, expand=number == 1), tmp_path / f"in/{number}.png")
    saved(picture.rotate(180), tmp_path / "in/1b.png")
    for size in (1, 3):
        results = predict_files(predictor, [tmp_path / "in"], tmp_path / str(size), FileOptions(batch_size=size))
        assert len(results.done) == 4
    for path in sorted((tmp_path / "1").glob("*_mask.png")):
        with Image.open(path) as one, Image.open(tmp_path / "3" / path.name) as several:
            assert (np.asarray(one) == np.asarray(several)).mean() > 0.999


def test_the_summary_lists_classes_files_and_errors(run_folder, predictor, picture, tmp_path, capsys):
    good = saved(picture, tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(b"")
    summary = tmp_path / "s/summary.json"
    options = ["--json", summary, "--no_overlay", "--probabilities", "--crf", "default"]
    assert run(run_folder, tmp_path / "in", "--out", tmp_path / "out", *options) == 1
    printed = capsys.readouterr()
    assert printed.out.split() == [str(tmp_path / "out/a_mask.png")] and "1 of 2 pictures" in printed.err
    found = json.loads(summary.read_text())
    (entry,), (error,) = found["pictures"], found["errors"]
    expected = predict(run_folder, good, crf=DenseCRF(), probabilities=True)
    assert (entry["width"], entry["height"], entry["path"]) == (61, 45, str(good))
    assert {name: each["pixels"] for name, each in entry["classes"].items()} == expected.pixels
    assert {name: each["share"] for name, each in entry["classes"].items()} == expected.areas
    assert sum(each["pixels"] for each in entry["classes"].values()) == 45 * 61
    assert set(entry["files"]) == {"mask", "probabilities"} and entry["seconds"] > 0
    assert error["path"] == str(tmp_path / "in/b.png") and found["crf"]["iterations"] == 10
    chances = np.load(tmp_path / "out/a_probabilities.npy")
    assert np.array_equal(chances, expected.probabilities)
    assert not np.array_equal(expected.mask, predictor(good).mask)


def test_probabilities_are_those_of_the_softmax(predictor, picture):
    import torch
    from torch.nn import functional as F

    pixels = predictor.processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = F.interpolate(predictor.model(pixels).logits, (45, 61), mode="bilinear")
    expected = logits.softmax(1)[0].permute(1, 2, 0).numpy()
    found = predictor(picture, probabilities=True)
    assert found.probabilities.shape == (45, 61, 3) and found.probabilities.dtype == np.float16
    assert np.abs(found.probabilities - expected).max() < 1e-3
    assert np.array_equal(found.mask, predictor(picture).mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "much"], "'much' is no amount of memory"),
        (["--crf", "nonsense"], "no CRF preset 'nonsense'"),
        (["--batch_size", "0"], "batch_size is 0"),
    ],
)
def test_wrong_options_are_one_sentence(run_folder, picture, tmp_path, capsys, options, message):
    path = saved(picture, tmp_path / "a.png")
    assert run(run_folder, path, "--out", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_crf_that_does_not_fit_is_refused(run_folder, picture):
    with pytest.raises(ValueError, match=r"The CRF takes about .* for 61 x 45 pixels at once, .* allow more"):
        predict(run_folder, picture, crf="deeplabv2", memory=100_000)


def test_a_video_without_its_reader_is_one_sentence(predictor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"video")
    results = predict_files(predictor, [path], tmp_path / "out")
    assert 'pip install "hf-ctxseg[video]"' in results.failed[path]


def test_a_video_is_segmented_frame_by_frame(run_folder, predictor, picture, tmp_path, capsys):
    av = pytest.importorskip("av", reason="PyAV, of the extra `video`, is not installed")
    pictures = [picture.rotate(180 * (number % 2)).resize((62, 46)) for number in range(4)]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=5, width=62, height=46)
        stream.pix_fmt = "bgr0"
        for each in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(each)))
        container.mux(stream.encode(None))
    summary = tmp_path / "s.json"
    assert run(run_folder, tmp_path / "a.mkv", "--out", tmp_path / "out", "--frames", "--json", summary) == 0
    masks = sorted((tmp_path / "out/a_masks").iterdir())
    assert [path.name for path in masks] == [f"{number:06d}.png" for number in range(4)]
    for path, each in zip(masks, pictures, strict=True):
        with Image.open(path) as mask:
            assert np.array_equal(np.asarray(mask), predictor(each).mask)
    with av.open(str(tmp_path / "out/a_overlay.mp4")) as written:
        frames = list(written.decode(video=0))
        assert len(frames) == 4 and frames[0].height > 46
        assert [round(float(frame.pts * frame.time_base), 2) for frame in frames] == [0, 0.2, 0.4, 0.6]
    (entry,) = json.loads(summary.read_text())["pictures"]
    assert entry["frames"] == 4
    assert sum(each["pixels"] for each in entry["classes"].values()) == 4 * 62 * 46
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "out/a_overlay.mp4").read_bytes()[:500])
    assert run(run_folder, tmp_path / "torn.mp4", "--out", tmp_path / "out") == 1
    assert "not a readable video" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("torn*")) and not list((tmp_path / "out").glob(".*"))


def test_a_data_set_is_written_as_parquet(run_folder, predictor, picture, tmp_path, capsys):
    import datasets

    data = datasets.Dataset.from_dict({"image": [picture]}, features=datasets.Features({"image": datasets.Image()}))
    data.to_parquet(tmp_path / "data.parquet")
    assert run(run_folder, tmp_path / "data.parquet", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out/mask-00000-of-00001.parquet")]
    (row,) = datasets.Dataset.from_parquet(str(tmp_path / "out/mask-00000-of-00001.parquet"), cache_dir=tmp_path)
    assert np.array_equal(np.asarray(row["mask"]), predictor(picture).mask)
    for flags, said in (
        (["--frames"], "--frames is for pictures and videos"),
        (["--batch_size", "2"], "batch_size is 1 there and 2 here"),
    ):
        assert run(run_folder, tmp_path / "data.parquet", "--out", tmp_path / "out", *flags) == 2
        assert said in capsys.readouterr().err
