import json
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from hf_ctxseg import CtxSegImageProcessor, DeepLabV3Config, DeepLabV3ForSemanticSegmentation
from hf_ctxseg.model_card import render_card
from hf_ctxseg.publishable import public_text
from hf_ctxseg.publishing import plan_push, push

SHOWN = {"README.md", "config.json", "preprocessor_config.json", "metrics.json", "model.safetensors", "per_class.csv"}
PICTURES = {"curves.png", "per_class.png", "previews/step-000600.png"}


def make_run(folder: Path) -> Path:
    config = DeepLabV3Config(backbone="test_resnet", hidden_size=16, id2label={0: "sky", 1: "road", 2: "car"})
    torch.manual_seed(0)
    DeepLabV3ForSemanticSegmentation(config).save_pretrained(folder)
    CtxSegImageProcessor().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": "/home/alice/runs/a", "auto_map": {"AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    training = {"command": "ctxseg train --data /home/alice/camvid", "steps": 600, "init_from": "/home/alice/old"}
    metrics = {"data": {"source": "/home/alice/camvid"}, "training": training, "evaluation": {"mean_iou": 0.5}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    names = ["previews/step-000300.png", *PICTURES, "per_class.csv", "contact_sheet.png", "args.yaml"]
    for name in [*names, "training_args.bin", "checkpoint-600/optimizer.pt", "checkpoint-600/model.safetensors"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(f"alice {name}".encode())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


PUSHES = """
    import functools, json, sys, time
    from hf_ctxseg import publishing
    from huggingface_hub import HfApi

    run, later, dead, silent = sys.argv[1:]
    results, listings = {}, []
    publishing.HUB_SECONDS, publishing.ask = 2.0, functools.partial(publishing.ask, seconds=4.0)

    def attempt(label, *args, endpoint=None, **kwargs):
        publishing.HfApi = functools.partial(HfApi, endpoint=endpoint)
        start = time.monotonic()
        try:
            result = {"url": publishing.push(*args, **kwargs)}
        except Exception as error:
            result = {"error": type(error).__name__, "text": str(error), "cause": error.__cause__ is not None}
        results[label] = {**result, "seconds": time.monotonic() - start}

    attempt("refused file", run, "org/refused")
    attempt("first", run, "org/name", confirm=lambda text: listings.append(text) or True)
    attempt("again", run, "org/name")
    attempt("later", later, "org/name", confirm=lambda text: listings.append(text) or True)
    attempt("declined", run, "org/declined", confirm=lambda text: False)
    attempt("private", run, "org/plain", private=True, include_pictures=False)
    attempt("pull request", run, "org/plain", create_pr=True, commit_message="Add pictures")
    attempt("short", run, "short")
    attempt("public", run, "org/name", private=True)
    attempt("401", run, "org/fault", token="wrong")
    attempt("403", run, "stranger/fault")
    attempt("404 branch", run, "org/name", revision="nowhere")
    attempt("404 repository", run, "org/fault", revision="nowhere")
    attempt("404 pull request", run, "org/fault", create_pr=True)
    attempt("dead", run, "org/fault", endpoint=dead)
    attempt("silent", run, "org/fault", endpoint=silent)
    attempt("500", run, "org/fault500")
    attempt("torn", run, "org/torn")
    attempt("retried", run, "org/torn")
    print(json.dumps({"results": results, "listings": listings}))
"""


@pytest.fixture(scope="module")
def pushed(run, tmp_path_factory):
    """The Hub and the outcome of each push, all made by one client in a process of its own."""
    home = tmp_path_factory.mktemp("pushes")
    later = Path(shutil.copytree(run, home / "later"))
    (later / "previews/step-000900.png").write_bytes(b"newer")
    (later / "curves.png").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with HubServer() as hub, socket.create_server(("127.0.0.1", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        hub.faults["PUT /large-files"] = [403]
        hub.faults["POST /api/models/org/torn/commit"] = [502]
        hub.faults["GET /api/models/org/fault500"] = [500]
        command = [sys.executable, "-c", textwrap.dedent(PUSHES), str(run), str(later), dead]
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run([*command, silent_url], env=hub.env(home / "hf"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        yield hub, json.loads(done.stdout.splitlines()[-1])


def messages(repo):
    return [commit.message for commit in repo.commits]


def test_push_uploads_what_is_listed_and_nothing_else(pushed, run):
    hub, outcome = pushed
    first = hub.repos["org/name"].commits[1]
    assert set(first.files) - {".gitattributes"} == SHOWN | PICTURES
    assert {file.path: file.size for file in plan_push(run, repo_id="org/name")} == {
        path: len(data) for path, data in first.files.items() if path != ".gitattributes"
    }
    assert first.files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert first.files["README.md"].decode() == render_card(run, repo_id="org/name")
    listing = outcome["listings"][0]
    assert "org/name, a new public repository" in listing
    assert all(f"  {path} " in listing for path in SHOWN | PICTURES)
    assert outcome["results"]["first"]["url"] == f"{hub.url}/org/name/commit/{first.oid}"


def test_what_is_uploaded_holds_no_local_path_and_no_code_entry(pushed):
    hub, _ = pushed
    files = hub.repos["org/name"].files
    for path in ("README.md", "config.json", "preprocessor_config.json", "metrics.json"):
        assert b"alice" not in files[path] and b"/home" not in files[path]
    config = json.loads(files["config.json"])
    assert not {"auto_map", "_name_or_path"} & set(config)
    assert config["id2label"] == {"0": "sky", "1": "road", "2": "car"}
    assert json.loads(files["metrics.json"])["training"]["init_from"] == "old"


def test_a_second_push_changes_nothing_and_a_later_run_replaces_in_one_commit(pushed):
    hub, outcome = pushed
    repo = hub.repos["org/name"]
    assert len(repo.commits) == 3  # made, first push, push of the later run
    assert outcome["results"]["again"]["url"].endswith(repo.commits[1].oid)
    kept = {"per_class.png", "previews/step-000900.png", ".gitattributes"}
    assert set(repo.files) == SHOWN | kept
    assert "Removed there" in outcome["listings"][1] and "previews/step-000600.png" in outcome["listings"][1]


def test_push_without_pictures_to_a_private_repository_then_a_pull_request(pushed):
    hub, outcome = pushed
    repo = hub.repos["org/plain"]
    assert repo.private and not hub.repos["org/name"].private
    assert set(repo.files) == SHOWN | {".gitattributes"}
    assert not re.search(r"\]\(\S+\.png\)", repo.files["README.md"].decode())
    assert len(repo.commits) == 2
    assert repo.branches["refs/pr/1"][-1].message == "Add pictures"
    assert set(repo.branches["refs/pr/1"][-1].files) == SHOWN | PICTURES | {".gitattributes"}
    assert outcome["results"]["pull request"]["url"] == f"{hub.url}/org/plain/discussions/1"


def test_a_name_without_namespace_goes_to_the_user(pushed):
    hub, _ = pushed
    assert 'model="tester/short"' in hub.repos["tester/short"].files["README.md"].decode()


def test_declining_uploads_nothing(pushed):
    hub, outcome = pushed
    assert outcome["results"]["declined"]["url"] == ""
    assert "org/declined" not in hub.repos


@pytest.mark.parametrize(
    ("label", "kind", "words"),
    [
        ("401", "PermissionError", "does not accept this token: run `hf auth login`"),
        ("403", "PermissionError", "may not write to stranger/fault"),
        ("404 branch", "ValueError", "org/name has no branch 'nowhere'"),
        ("404 repository", "ValueError", "no repository org/fault"),
        ("404 pull request", "ValueError", "no repository org/fault"),
        ("dead", "ConnectionError", "cannot be reached at http://127.0.0.1:"),
        ("silent", "ConnectionError", "cannot be reached at http://127.0.0.1:"),
        ("500", "ConnectionError", "answers 500"),
        ("public", "ValueError", "org/name exists and is public"),
    ],
)
def test_a_push_that_cannot_work_says_why_and_leaves_nothing(pushed, label, kind, words):
    hub, outcome = pushed
    result = outcome["results"][label]
    assert result["error"] == kind
    assert words in result["text"] and "\n" not in result["text"]
    assert result["seconds"] < 5
    assert result["cause"] == (label != "public")
    assert not any("fault" in name for name in hub.repos)


def test_a_push_that_breaks_off_leaves_no_files_and_can_be_repeated(pushed):
    hub, outcome = pushed
    refused, torn = outcome["results"]["refused file"], outcome["results"]["torn"]
    assert refused["error"] == "PermissionError" and "may not write to org/refused" in refused["text"]
    assert set(hub.repos["org/refused"].files) == {".gitattributes"}
    assert torn["error"] == "ConnectionError" and "answers 502" in torn["text"]
    assert outcome["results"]["retried"]["url"]
    assert messages(hub.repos["org/torn"]) == ["initial commit", "Upload model with hf_ctxseg"]
    assert set(hub.repos["org/torn"].files) == SHOWN | PICTURES | {".gitattributes"}


def code_of_the_card(hub):
    card = hub.repos["org/name"].files["README.md"].decode()
    return "\n".join(part.split("```")[0] for part in card.split("```python\n")[1:])


def test_the_card_s_code_is_whole_and_names_the_repository(pushed):
    code = code_of_the_card(pushed[0])
    compile(code, "card", "exec")
    assert code.count('"org/name"') == 2


@pytest.mark.slow
def test_the_card_s_code_runs_in_a_fresh_process_and_loads_equal_weights(pushed, run, tmp_path):
    hub, _ = pushed
    code = code_of_the_card(hub)
    code = f"""
from PIL import Image
Image.effect_noise((40, 30), 90).convert("RGB").save("photo.jpg")
{code}
import sys
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained("org/name")
assert type(model) is hf_ctxseg.DeepLabV3ForSemanticSegmentation
expected, state = load_file(sys.argv[1]), model.state_dict()
assert expected.keys() == state.keys() and all(expected[key].equal(state[key]) for key in expected)
assert type(AutoImageProcessor.from_pretrained("org/name")) is hf_ctxseg.CtxSegImageProcessor
assert {{found["label"] for found in segment("photo.jpg")}} <= {{"sky", "road", "car"}}
print("loaded")
"""
    command = [sys.executable, "-c", code, str(run / "model.safetensors")]
    done = subprocess.run(command, env=hub.env(tmp_path / "hf"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded\n") and "(40, 30)" in done.stdout


def test_the_weights_must_be_finite(copy):
    state = load_file(copy / "model.safetensors")
    names = [key for key, value in state.items() if value.is_floating_point()][:2]
    state[names[0]].view(-1)[0] = float("nan")
    state[names[1]].view(-1)[-1] = float("-inf")
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinity") as caught:
        plan_push(copy)
    assert names[0] in str(caught.value) and names[1] in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no {name} in"):
        plan_push(copy)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", b"[]", "holds a list, not a JSON object"),
        ("config.json", b"{}", "does not name a model_type and architectures"),
        ("config.json", b'{"model_type": "bert", "architectures": ["B"]}', "type 'bert', which is none of ours"),
        ("model.safetensors", b"", "not a whole safetensors file"),
        ("model.safetensors", b"\xff" * 100, "not a whole safetensors file"),
        ("model.safetensors", None, "not a whole safetensors file"),
    ],
)
def test_a_broken_file_is_refused(copy, name, content, words):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(ValueError, match=words):
        plan_push(copy)


def shard(folder, names):
    """Replace the weights by one shard a name and an index that lists them."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    weight_map = {key: names[index % len(names)] for index, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key] for key in keys if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("content", [{"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}, {}])
def test_an_index_without_names_of_shards_is_refused(copy, content):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is no index of shards|names the shard 1"):
        plan_push(copy)


def test_weights_that_no_model_would_open_with_are_refused(copy):
    state = {key: value.to(torch.int32) for key, value in load_file(copy / "model.safetensors").items()}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights that are no floating-point numbers"):
        plan_push(copy)


def test_only_the_samples_that_were_written_go_up(copy):
    (copy / "samples").mkdir()
    for name in ("1", "2", "my holiday", "a\nb"):
        (copy / f"samples/{name}.jpg").write_bytes(b"x")
    assert {file.path for file in plan_push(copy)} == SHOWN | PICTURES | {"samples/1.jpg", "samples/2.jpg"}


def test_h8_the_home_folder_of_a_name_with_a_space_is_cut_whole(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/mallory q7"))
    assert public_text("from /home/mallory q7/data/x, then /tmp/y") == "from x, then y"
    assert "mallory" not in public_text("from /home/mallory q7") + public_text("/home/mallory q7")
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert public_text("1/2 of /tmp/y") == "1/2 of y"


def test_the_card_names_the_model_started_from_without_its_revision(copy):
    facts = {"training": {"init_from": "org/start@v1"}, "model": {"backbone_weights": "timm/resnet18.a1_in1k"}}
    (copy / "metrics.json").write_text(json.dumps(facts))
    assert "\nbase_model: org/start\n" in render_card(copy)


def test_shards_go_up_with_their_index(copy):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shard(copy, names)
    paths = {file.path for file in plan_push(copy)}
    assert paths == SHOWN - {"model.safetensors"} | PICTURES | {*names, "model.safetensors.index.json"}
    (copy / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names the shard {names[1]}, which is not there"):
        plan_push(copy)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "other.bin"])
def test_a_shard_outside_the_folder_is_refused(copy, name):
    shard(copy, [name])
    with pytest.raises(ValueError, match="names the shard"):
        plan_push(copy)


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-dash", "org/", "a..b", ""])
def test_a_bad_repository_name_is_refused_before_anything_else(tmp_path, name):
    with pytest.raises(ValueError, match="is not a name for a repository"):
        push(tmp_path / "nothing", name)


def test_pushing_without_being_logged_in(run, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ctxseg.publishing.get_token", lambda: None)
    with pytest.raises(PermissionError, match="hf auth login"):
        push(run, "org/name")
