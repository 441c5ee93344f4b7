"""Masks of data sets as parquet shards: what they hold, who writes them, and what is left when a process dies."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_hub import data_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from killed_prediction import MOMENTS, predict_and_die
from PIL import Image

from hf_ctxseg import MeanIoU, predict_dataset
from hf_ctxseg.crf import DenseCRF
from hf_ctxseg.dataset_prediction import shards_of_process
from hf_ctxseg.dataset_rows import is_dataset, open_rows
from hf_ctxseg.inference import Predictor

COUNT, BROKEN = 11, 4
ROOT = Path(__file__).parents[1]


def _png(picture):
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _pictures():
    rng = np.random.default_rng(0)
    blobs = (Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)) for _ in range(COUNT))
    return [picture.resize((40 + i % 3, 33)) for i, picture in enumerate(blobs)]


@pytest.fixture(scope="module")
def pictures():
    return _pictures()


@pytest.fixture(scope="module", autouse=True)
def no_cache(tmp_path_factory):
    """Nothing is written to the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.delenv("RANK", raising=False)
        patch.delenv("WORLD_SIZE", raising=False)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def table(pictures):
    """Pictures, one of them broken, with label maps, a text, and a column that has the name of one of ours."""
    rng = np.random.default_rng(1)
    cells = [{"bytes": _png(picture), "path": f"/somewhere/{i}.png"} for i, picture in enumerate(pictures)]
    cells[BROKEN] = {"bytes": b"no picture", "path": None}
    labels = [rng.integers(0, 3, (picture.height, picture.width), np.uint8) for picture in pictures]
    columns = {
        "image": cells,
        "label": [{"bytes": _png(Image.fromarray(label)), "path": None} for label in labels],
        "city": [f"city {i}" for i in range(COUNT)],
        "width": [7] * COUNT,
    }
    image, text, number = datasets.Image(), datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features({"image": image, "label": image, "city": text, "width": number})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def parquet(table, tmp_path_factory):
    """Two files with row groups of three."""
    folder = tmp_path_factory.mktemp("parquet")
    for i, rows in enumerate((range(5), range(5, COUNT))):
        table.select(rows).to_parquet(folder / f"test-{i:05d}-of-00002.parquet", batch_size=3)
    return folder


@pytest.fixture(scope="module")
def predictor(run_folder):
    return Predictor(run_folder)


@pytest.fixture(scope="module")
def masks(predictor, pictures):
    return [predictor(picture).mask for picture in pictures]


@pytest.fixture(scope="module")
def whole(predictor, parquet, tmp_path_factory):
    """What an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    lines = []
    result = predict_dataset(predictor, parquet, folder, shard_size=3, say=lines.append)
    return folder, result, lines


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _load(folder):
    return datasets.load_dataset(str(folder), split="test")


def _is_right(row, i, masks):
    if i == BROKEN:
        empty = [row[name] for name in ("mask", "class_pixels", "width", "height")]
        return empty == [None] * 4 and "cannot be read: it is no picture" in row["error"]
    mask = np.asarray(row["mask"])
    right = (mask == masks[i]).all() and (row["height"], row["width"]) == mask.shape == masks[i].shape
    return right and row["class_pixels"] == [(masks[i] == k).sum() for k in range(3)] and row["error"] is None


def test_shards_hold_mask_areas_size_error_and_what_is_kept(whole, masks, predictor):
    folder, result, lines = whole
    names = [f"mask-{i:05d}-of-00004.parquet" for i in range(4)]
    assert sorted(_files(folder)) == ["README.md", "manifest.json", *names, "summary.json"]
    assert [path.name for path in result.written] == names
    assert result.complete and result.exit_code == 1
    assert result.failed == ["row 4 (image) cannot be read: it is no picture of a known format"]
    loaded = _load(folder)
    assert list(loaded.features) == ["row", "city", "mask", "class_pixels", "width", "height", "error"]
    assert isinstance(loaded.features["mask"], datasets.Image)
    assert loaded["row"] == list(range(COUNT)) and loaded["city"] == [f"city {i}" for i in range(COUNT)]
    assert all(_is_right(row, i, masks) for i, row in enumerate(loaded))
    assert loaded[0]["mask"].mode == "P" and loaded[0]["mask"].getpalette()[3:6] == list(predictor.palette[1])
    assert lines[0] == "Shards: 4; process 1 of 1 makes 4."
    assert lines[-1].startswith(f"{names[-1]} written: 11 of 11 pictures, ")


def test_summary_readme_and_manifest_tell_origin_and_totals(whole, masks, run_folder, parquet):
    folder, _, _ = whole
    summary = json.loads((folder / "summary.json").read_text())
    totals = [sum(int((mask == k).sum()) for i, mask in enumerate(masks) if i != BROKEN) for k in range(3)]
    assert summary["pixels"] == dict(zip(("ground", "disc", "box"), totals, strict=True))
    assert summary["rows"] == COUNT
    assert [(entry["shard"], entry["row"]) for entry in summary["failed"]] == [("mask-00001-of-00004.parquet", BROKEN)]
    readme = (folder / "README.md").read_text()
    assert f"| 1 | disc | {totals[1] / sum(totals):.2%} |" in readme and "1 of the pictures" in readme
    manifest = (folder / "manifest.json").read_text()
    assert json.loads(manifest)["data"] | {"fingerprint": ""} == {
        "name": parquet.name, "split": "test", "rows": COUNT, "fingerprint": "",
    }  # fmt: skip
    assert json.loads(manifest)["model"]["name"] == run_folder.name
    for text in (readme, manifest):
        assert str(run_folder.parent) not in text and str(parquet.parent) not in text


def test_what_is_kept_can_be_scored(predictor, table, masks, tmp_path):
    rows = table.select(i for i in range(COUNT) if i != BROKEN)
    result = predict_dataset(predictor, rows, tmp_path / "out", split="test", keep_columns=["label"], say=str)
    assert result.exit_code == 0 and result.failed == []
    loaded, metric, expected = _load(tmp_path / "out"), MeanIoU(num_labels=3), MeanIoU(num_labels=3)
    for row in loaded:
        metric.add(prediction=np.asarray(row["mask"]), reference=np.asarray(row["label"]))
    for mask, row in zip((mask for i, mask in enumerate(masks) if i != BROKEN), rows, strict=True):
        expected.add(prediction=mask, reference=np.asarray(row["label"]))
    assert metric.compute()["mean_iou"] == expected.compute()["mean_iou"] > 0


@pytest.mark.parametrize("kind", ["file", "glob", "table", "disk", "mapping"])
def test_every_kind_of_data_gives_the_same_masks(kind, predictor, table, parquet, masks, tmp_path):
    if kind == "disk":
        datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "disk")
    if kind == "file":
        table.to_parquet(tmp_path / "one.parquet")
    data = {
        "file": tmp_path / "one.parquet",
        "glob": str(parquet / "test-*.parquet"),
        "table": table,
        "disk": tmp_path / "disk",
        "mapping": datasets.DatasetDict({"train": table.select([0]), "test": table}),
    }[kind]
    result = predict_dataset(predictor, data, tmp_path / "out", split="test", shard_size=6, say=str)
    assert len(result.written) == 2 and len(result.failed) == 1
    rows = _load(tmp_path / "out")  # its split "test"
    assert all(_is_right(row, i, masks) for i, row in enumerate(rows)) and len(rows) == COUNT


def test_batches_of_one_size_give_the_same_masks(predictor, table, masks, tmp_path, monkeypatch):
    sizes = []

    def several(self, pictures, real=Predictor.several):
        sizes.append({picture.size for picture in pictures})
        return real(self, pictures)

    monkeypatch.setattr(Predictor, "several", several)
    order = sorted(range(COUNT), key=lambda i: (i % 3, i))  # as the widths go
    result = predict_dataset(predictor, table.select(order), tmp_path / "out", split="test", batch_size=3, say=str)
    assert all(_is_right(row, i, masks) for i, row in zip(order, _load(tmp_path / "out"), strict=True))
    assert len(sizes) == 3 and all(len(size) == 1 for size in sizes) and len(result.failed) == 1


def test_a_stream_gives_a_file_for_each_of_its_shards(predictor, table, masks, tmp_path):
    stream = table.to_iterable_dataset(num_shards=3)
    result = predict_dataset(predictor, stream, tmp_path / "out", shard_size=2, say=str)
    assert [path.name for path in result.written] == [f"mask-{i:05d}-of-00003.parquet" for i in range(3)]
    assert result.failed == ["shard 1, row 0 (image) cannot be read: it is no picture of a known format"]
    tables = [pq.read_table(path) for path in result.written]
    rows = datasets.Dataset(pa.concat_tables(tables))
    assert rows["row"] == [*range(4), *range(4), *range(3)]
    assert all(_is_right(row, i, masks) for i, row in enumerate(rows)) and len(rows) == COUNT


@given(st.integers(0, 300), st.integers(1, 70))
def test_each_shard_falls_to_one_process(total, processes):
    parts = [shards_of_process(total, rank, processes) for rank in range(processes)]
    assert [index for part in parts for index in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=4),
    st.integers(1, 50),
    st.lists(st.integers(0, 1000), max_size=6),
)
def test_shards_of_parquet_are_its_rows_in_whatever_order_they_are_read(tmp_path_factory, files, size, order):
    folder, number = tmp_path_factory.mktemp("files"), 0
    for index, groups in enumerate(files):
        schema = pa.schema([("image", pa.binary()), ("number", pa.int64())])
        with pq.ParquetWriter(folder / f"a-{index}.parquet", schema) as writer:
            for count in groups:
                numbers = list(range(number, number + count))
                writer.write_table(pa.table([[b"x"] * count, numbers], schema=schema))
                number += count
    source = open_rows(folder, None, "image", None)
    shards = source.shards(size)
    picked = [*shards, *(shards[i % len(shards)] for i in order if shards)]
    for shard in picked:
        rows = [(place, row["number"][0].as_py()) for place, row in source.read(shard)]
        assert rows == [(i, i) for i in range(shard.start, min(shard.start + size, number))]
    assert sum(shard.count for shard in shards) == number == source.count


def test_processes_share_the_work_and_the_last_one_finishes_it(predictor, parquet, whole, tmp_path, monkeypatch):
    results = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        results.append(predict_dataset(predictor, parquet, tmp_path / "out", shard_size=3, say=str))
    assert [len(result.written) for result in results] == [2, 1, 1]
    # torchrun would stop the others if the one with the broken picture gave 1 before they are ready
    assert [(result.complete, result.exit_code) for result in results] == [(False, 0), (False, 0), (True, 1)]
    assert _files(tmp_path / "out") == _files(whole[0])


def test_more_processes_than_shards(predictor, parquet, whole, tmp_path):
    lines = []
    for rank in range(6):
        predict_dataset(predictor, parquet, tmp_path / "out", shard_size=3, rank=rank, world_size=6, say=lines.append)
    assert "Shards: 4; process 1 of 6 makes 0: lower --shard_size to give each process some." in lines
    assert _files(tmp_path / "out") == _files(whole[0])


def test_what_is_there_is_not_made_again_and_what_is_damaged_is(predictor, parquet, whole, tmp_path):
    folder = tmp_path / "out"
    made = lambda: predict_dataset(predictor, parquet, folder, shard_size=3, say=str)  # noqa: E731
    made()
    again = made()
    assert again.written == [] and again.exit_code == 1 and len(again.failed) == 1
    torn = folder / "mask-00002-of-00004.parquet"
    torn.write_bytes(torn.read_bytes()[:-50])
    (folder / "README.md").unlink()
    (folder / "mask-00003-of-00004.parquet.0123abcd.partial").write_bytes(b"of a killed process")
    (folder / "film.partial").write_bytes(b"of the user")
    assert made().written == [torn]
    assert _files(folder) == {**_files(whole[0]), "film.partial": b"of the user"}


@pytest.fixture(scope="module")
def context():
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["hf_ctxseg.dataset_prediction", "datasets", "pyarrow.parquet", "timm"])
    return made


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(context, predictor, run_folder, parquet, whole, tmp_path):
    folder = tmp_path / "out"
    for moment in MOMENTS:
        process = context.Process(target=predict_and_die, args=(run_folder, parquet, folder, moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    assert len(list(folder.glob("*.parquet"))) == 4 and not (folder / "README.md").exists()
    assert list(folder.glob("*.partial"))
    result = predict_dataset(predictor, parquet, folder, shard_size=3, say=str)
    assert result.complete and result.written == []
    assert _files(folder) == _files(whole[0])


def test_an_interrupted_run_says_how_to_go_on(predictor, parquet, tmp_path, monkeypatch):
    calls = iter(range(100))

    def segment(self, image, real=Predictor.__call__):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return real(self, image)

    monkeypatch.setattr(Predictor, "__call__", segment)
    with pytest.raises(KeyboardInterrupt, match="1 of 4 shards are written; the same command continues"):
        predict_dataset(predictor, parquet, tmp_path / "out", shard_size=3, say=str)
    assert sorted(_files(tmp_path / "out")) == ["manifest.json", "mask-00000-of-00004.parquet"]


def test_a_full_disk_leaves_whole_shards_alone(predictor, parquet, tmp_path, monkeypatch):
    calls = iter(range(100))

    def sync(descriptor, real=os.fsync):
        if next(calls) == 3:  # after manifest, first shard and its folder
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="No space left"):
        predict_dataset(predictor, parquet, tmp_path / "out", shard_size=3, say=str)
    assert not list((tmp_path / "out").glob("*.partial"))
    assert all(pq.read_metadata(path).num_rows == 3 for path in (tmp_path / "out").glob("*.parquet"))


def test_other_weights_data_and_settings_are_refused(predictor, run_folder, table, parquet, whole, tmp_path):
    def refused(words, model=predictor, data=parquet, **options):
        before = _files(whole[0])
        with pytest.raises(ValueError, match=rf"holds masks of another origin: .*{words}.*choose another folder"):
            predict_dataset(model, data, whole[0], **{"shard_size": 3, "say": str, **options})
        assert _files(whole[0]) == before

    other = Predictor(run_folder)
    bias = next(value for name, value in other.model.named_parameters() if name.endswith("classifier.bias"))
    bias.data[0] += 1e-3
    refused("model weights_sha256 is", model=other)
    refused(r'settings views is {"window": null.*"flip": true', model=Predictor(run_folder, flip=True))
    other = Predictor(run_folder)
    other.crf = DenseCRF()
    refused(r'settings crf is null there and {"iterations": 10', model=other)
    refused("settings shard_size is 3 there and 4 here", shard_size=4)
    refused(r'settings keep_columns is \["city"\] there and \[\] here', keep_columns=[])
    changed = tmp_path / parquet.name
    changed.mkdir()
    for i, path in enumerate(sorted(parquet.iterdir())):
        rows = datasets.Dataset(pq.read_table(path))
        shuffled = rows.select(range(len(rows))[::-1]) if i else rows
        shuffled.to_parquet(changed / path.name, batch_size=3)
    refused("data fingerprint is", data=changed)
    refused("data fingerprint is", data=table, split="test")


@pytest.mark.parametrize("name", ["mask-00000-of-00001.parquet", "README.md", "summary.json"])
def test_files_of_other_origin_are_not_replaced(name, predictor, parquet, tmp_path):
    (tmp_path / name).write_bytes(b"of the user")
    with pytest.raises(ValueError, match=rf"holds {name}, but no manifest.json of it: choose another folder"):
        predict_dataset(predictor, parquet, tmp_path, say=str)
    assert _files(tmp_path) == {name: b"of the user"}


def test_a_file_is_no_folder(predictor, parquet, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        predict_dataset(predictor, parquet, tmp_path / "file", say=str)


def test_what_cannot_be_used_is_named(predictor, table, parquet, tmp_path):
    def refused(words, data=parquet, kind=ValueError, **options):
        with pytest.raises(kind, match=words):
            predict_dataset(predictor, data, tmp_path / "out", **{"say": str, **options})
        assert not (tmp_path / "out").exists()

    refused("shard_size is 0, but must be 1 row or more", shard_size=0)
    refused("batch_size is 0, but must be 1 picture", batch_size=0)
    refused("RANK is 3 of WORLD_SIZE 3, .* start at 0", rank=3, world_size=3)
    refused(r"--split is 'tset' \(did you mean 'test'\?\)", split="tset")
    refused("splits a, b: choose one with --split", data=datasets.DatasetDict({"a": table, "b": table}))
    refused(r"--image_column is 'imag' \(did you mean 'image'\?\)", image_column="imag")
    refused(r"--keep_columns names 'town', but the columns are image, label, city", keep_columns=["town"])
    refused("--keep_columns names width, but the result has columns of its own", keep_columns=["width"])
    refused("Name the right column with --image_column", data=table.remove_columns(["image", "label"]))
    refused("holds no row", data=table.select([]))
    refused("The data is a list", data=[1])
    refused("There is no parquet file", data=tmp_path / "no.parquet", kind=FileNotFoundError)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 no")
    refused("torn.parquet cannot be read as a table", data=tmp_path / "torn.parquet")
    (tmp_path / "empty").mkdir()
    refused("holds neither parquet files nor", data=tmp_path / "empty")


def test_the_number_of_a_process_must_be_one(predictor, parquet, tmp_path, monkeypatch):
    for text in ("first", "-1", "--1"):
        monkeypatch.setenv("RANK", text)
        with pytest.raises(ValueError, match=f"RANK is '{text}', but must be a whole number"):
            predict_dataset(predictor, parquet, tmp_path / "out", say=str)


def test_files_of_another_table_are_named(predictor, parquet, tmp_path):
    for path in parquet.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    second = tmp_path / "test-00001-of-00002.parquet"
    table = pq.read_table(second).drop_columns("city")
    pq.write_table(table, second)
    with pytest.raises(ValueError, match=r"test-00001-of-00002.parquet has no column 'city', but test-00000-of-00002"):
        predict_dataset(predictor, tmp_path, tmp_path / "out", say=str)
    pq.write_table(table.append_column("city", pa.array(range(len(table)))), second)
    with pytest.raises(ValueError, match=r"00001-of-00002.parquet holds 'city' as int64, but .* as string: .*--keep_"):
        predict_dataset(predictor, tmp_path, tmp_path / "out", say=str)
    assert predict_dataset(predictor, tmp_path, tmp_path / "out", keep_columns=[], say=str).complete


def test_kept_pictures_travel_with_the_masks_and_without_paths(predictor, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    cells = [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset(pa.table([cells], schema=features.arrow_schema))
    result = predict_dataset(predictor, rows, tmp_path / "out", keep_columns=["image"], say=str)
    assert result.failed == ["row 1 (image) cannot be read: No such file or directory"]
    kept = pq.read_table(result.written[0])["image"].to_pylist()
    assert kept == [{"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}, None]


def test_few_rows_are_held_at_a_time(predictor, pictures, tmp_path, monkeypatch):
    data, read, most = _png(pictures[0]), 0, 0

    def rows():
        nonlocal read
        for _ in range(150):
            read += 1
            yield {"image": {"bytes": data, "path": None}}

    done = iter(range(1000))
    prediction = predictor(pictures[0])

    def segment(self, image):
        nonlocal most
        most = max(most, read - next(done))
        return prediction

    monkeypatch.setattr(Predictor, "__call__", segment)
    stream = datasets.IterableDataset.from_generator(rows, features=datasets.Features({"image": datasets.Image()}))
    read = -1  # the fingerprint reads a row
    result = predict_dataset(predictor, stream, tmp_path / "out", say=str)
    assert pq.read_metadata(result.written[0]).num_rows == 150
    assert most <= 60


@pytest.mark.parametrize(
    ("text", "means"),
    [
        *[("org/name", True), ("beans", True), ("a/b.jpg", False), ("photos/*.jpg", False), ("/no/where", False)],
        ("photos/holiday.mp4", False),
    ],
)
def test_what_means_a_data_set(text, means, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert is_dataset(text) is means


def test_folders_that_mean_a_data_set(parquet, table, tmp_path):
    table.save_to_disk(tmp_path / "disk")
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert is_dataset(str(parquet)) and is_dataset(str(parquet / "*.parquet")) and is_dataset(str(tmp_path / "disk"))
    assert not is_dataset(str(tmp_path)) and not is_dataset(str(tmp_path / "photo.jpg"))


@pytest.mark.slow
def test_two_processes_of_torchrun(parquet, run_folder, whole, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom hf_ctxseg import predict_dataset\n"
        "sys.exit(predict_dataset(*sys.argv[1:4], shard_size=3).exit_code)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    arguments = [str(run_folder), str(parquet), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr  # a row failed
    for rank in (1, 2):
        assert f"Shards: 4; process {rank} of 2 makes 2." in done.stdout
    written = re.findall(r"(mask-\d+-of-00004.parquet) written", done.stdout)
    assert sorted(written) == [f"mask-{i:05d}-of-00004.parquet" for i in range(4)]
    assert _files(tmp_path / "out") == _files(whole[0])


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_read_where_it_lies(parquet, run_folder, whole, tmp_path):
    files = {f"data/{path.name}": path.read_bytes() for path in parquet.iterdir()}
    files["data/train-00000-of-00001.parquet"] = b"of no concern"
    program = (
        "import sys; from hf_ctxseg import predict_dataset\n"
        "predict_dataset(sys.argv[1], 'org/streets', sys.argv[2], split='test', shard_size=3)"
    )
    with data_hub() as hub:
        hub.add("org/streets", {"README.md": b"# Streets", **files})
        environment = hub.env(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, str(run_folder), str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert not [line for line in hub.requests if "train-00000" in line]
    assert not list((tmp_path / "home").rglob("*.parquet")) and not list((tmp_path / "home").rglob("*.arrow"))
    found, expected = _files(tmp_path / "out"), _files(whole[0])
    for name in expected:
        assert name in ("README.md", "manifest.json") or found[name] == expected[name]
    assert "org/streets" in found["README.md"].decode()
