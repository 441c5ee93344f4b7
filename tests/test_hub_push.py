"""Rows H5 to H8 of the reliability sheet: pushing to a Hub on loopback that fails, with code and without."""

import base64
import functools
import getpass
import json
import os
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import hub_server
import pytest
from hub_server import Commit, HubServer
from huggingface_hub import HfApi, close_session, constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from huggingface_hub.utils._runtime import is_xet_available
from remote_code_helpers import check, made, open_without_package

from hf_ctxseg import CtxSegImageProcessor, hub_errors, publishing
from hf_ctxseg.cli import main
from hf_ctxseg.remote_code import auto_maps, code_files

# huggingface_hub's own way of sending files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process pushes to; no pauses between attempts."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    close_session()
    with HubServer(token=TOKEN) as server:
        monkeypatch.setattr(publishing, "HfApi", functools.partial(HfApi, endpoint=server.url))
        yield server
        close_session()


@pytest.fixture
def run(tiny, live, tmp_path):
    folder = tmp_path / "run"
    model = made(live, tiny(backbone="test_resnet", atrous_rates=[1, 2], id2label={0: "sky", 1: "road", 2: "car"}))
    model.save_pretrained(folder)
    CtxSegImageProcessor.for_backbone("test_resnet").save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps({"training": {"steps": 3}, "evaluation": {"mean_iou": 0.5}}))
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uploads(repo):
    return [commit for commit in repo.commits if commit.message != "initial commit"]


REQUESTS = {
    "user": "GET /api/whoami-v2",
    "look": "GET /api/models/org/name",
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "files": "/preupload/",
    "large files": "/info/lfs/objects/batch",
    "upload": "PUT /large-files",
    "commit": "/commit/main",
}
FAULTS = [(request, fault) for request in REQUESTS for fault in (500, "drop", "deaf", 403)]
FAULTS += [("user", "page")]


@pytest.mark.parametrize(("request_", "fault"), FAULTS)
def test_h7_a_push_interrupted_in_any_request_is_repeated_to_one_commit(hub, run, monkeypatch, request_, fault):
    monkeypatch.setattr(hub_errors, "ATTEMPTS", 1)
    before = contents(run)
    hub.faults[REQUESTS[request_]] = [fault]
    start = time.monotonic()
    with pytest.raises((PermissionError, ConnectionError, ValueError)) as caught:
        publishing.push(run, "org/name")
    assert time.monotonic() - start < 10
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and re.search(r": [a-z]", text)
    assert caught.type is (PermissionError if fault == 403 else ConnectionError)
    assert contents(run) == before
    landed = [request_, fault] == ["commit", "deaf"]  # done, but the answer was lost
    assert len(uploads(hub.repos["org/name"]) if "org/name" in hub.repos else []) == landed

    url = publishing.push(run, "org/name")
    (commit,) = uploads(hub.repos["org/name"])
    assert url.endswith(commit.oid)
    assert commit.files[WEIGHTS] == (run / WEIGHTS).read_bytes()
    assert contents(run) == before


def test_h7_nothing_is_committed_over_what_came_in_between(hub, run):
    publishing.push(run, "org/name")
    repo = hub.repos["org/name"]
    (run / "metrics.json").write_text("{}")
    theirs = Commit("theirs", {**repo.files, "notes.txt": b"x"})
    with pytest.raises(ValueError, match=r"org/name was changed in the meantime .* push again\."):
        publishing.push(run, "org/name", confirm=lambda text: not repo.commits.append(theirs))
    assert repo.commits[-1] is theirs
    publishing.push(run, "org/name")
    assert repo.files["notes.txt"] == b"x" and repo.files["metrics.json"] == b"{}\n"


def test_h1_a_hub_that_falls_silent_is_given_up_soon(hub, run, monkeypatch):
    monkeypatch.setattr(publishing, "impatient", functools.partial(hub_errors.impatient, 0.3))
    hub.faults["/preupload/"] = "silent"
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        publishing.push(run, "org/name")
    assert time.monotonic() - start < 5


def test_h1_a_dead_host_for_large_files_is_given_up_soon(hub, run, monkeypatch):
    def to_nowhere(handler, body, query, repo):
        upload = {"upload": {"href": f"{nowhere}/large-files/1"}}
        handler._json({"transfer": "basic", "objects": [item | {"actions": upload} for item in asked(body)]})

    def asked(body):
        return json.loads(body)["objects"]

    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(hub_server._Handler, "lfs_batch", to_nowhere)
    with pytest.raises(ConnectionError, match=r"PUT 127\.0\.0\.1/large-files/1 failed again"):
        publishing.push(run, "org/name")
    assert sum(pauses) < 10
    assert not uploads(hub.repos["org/name"])


def test_h1_files_go_by_http_whose_requests_are_limited_and_settings_come_back():
    factory, hooks = _http._GLOBAL_CLIENT_FACTORY, [*get_session().event_hooks["request"]]
    with pytest.raises(KeyError), hub_errors.impatient():
        assert not is_xet_available()
        close_session()  # as huggingface_hub does after a refused connection
        assert len(get_session().event_hooks["request"]) == len(hooks) + 1
        raise KeyError
    assert _http._GLOBAL_CLIENT_FACTORY is factory
    assert len(get_session().event_hooks["request"]) == len(hooks)


def test_h1_words_of_the_hub_on_several_lines_make_one_sentence():
    response = SimpleNamespace(headers={}, request=None, status_code=500)
    error = HfHubHTTPError("", response=response, server_message="not today\nnor tomorrow\n")
    for told in (hub_errors.hub_error(error, "org/name"), hub_errors.push_error(error, "org/name", None, "")):
        assert "answers 500 (not today nor tomorrow): " in str(told)


def named_commit(repo):
    return re.search(r'revision="([0-9a-f]{40})"', repo.files["README.md"].decode())[1]


def test_h5_code_goes_up_when_asked_and_the_card_names_its_commit(hub, run):
    listings = []
    publishing.push(run, "org/plain")
    assert not [name for name in hub.repos["org/plain"].files if name.endswith(".py")]
    assert "trust_remote_code" not in hub.repos["org/plain"].files["README.md"].decode()

    publishing.push(run, "org/name", with_code=True, confirm=lambda text: listings.append(text) or True)
    repo = hub.repos["org/name"]
    code = code_files("ctxseg_deeplabv3")
    assert {name: repo.files[name] for name in code} == code
    assert all(f"  {name} " in listings[0] for name in code)
    for name, entries in auto_maps("ctxseg_deeplabv3").items():
        assert json.loads(repo.files[name])["auto_map"] == entries
    first, second = uploads(repo)
    assert named_commit(repo) == first.oid and "trust_remote_code=True" in second.files["README.md"].decode()
    assert {name for name in second.files if second.files[name] != first.files.get(name)} == {"README.md"}

    url = publishing.push(run, "org/name", with_code=True)
    assert len(uploads(repo)) == 2 and url.endswith(second.oid)


@pytest.mark.slow
def test_h5_a_pushed_model_opens_from_the_hub_without_the_package(hub, run, live, tiny, picture, tmp_path):
    publishing.push(run, "org/name", with_code=True)
    model = made(live, tiny(backbone="test_resnet", atrous_rates=[1, 2], id2label={0: "sky", 1: "road", 2: "car"}))
    pinned = f"org/name@{named_commit(hub.repos['org/name'])}"
    (found,) = open_without_package([pinned], picture, tmp_path / "client", hub)
    check(found, model, CtxSegImageProcessor.for_backbone("test_resnet"), picture)


def test_h5_h7_a_push_with_code_that_broke_off_between_its_commits_names_the_right_one(hub, run, monkeypatch):
    monkeypatch.setattr(hub_errors, "ATTEMPTS", 1)
    publishing.push(run, "org/name", with_code=True)
    repo = hub.repos["org/name"]
    (run / "metrics.json").write_text(json.dumps({"evaluation": {"mean_iou": 0.6}}))
    hub.faults["/commit/main"] = ["", 500]
    with pytest.raises(ConnectionError, match="answers 500"):
        publishing.push(run, "org/name", with_code=True)
    changed = repo.commits[-1]
    assert len(uploads(repo)) == 3 and named_commit(repo) != changed.oid
    publishing.push(run, "org/name", with_code=True)
    assert len(uploads(repo)) == 4 and named_commit(repo) == changed.oid
    publishing.push(run, "org/name", with_code=True)
    assert len(uploads(repo)) == 4


def test_h5_code_of_a_head_from_elsewhere_or_for_a_pull_request_is_refused(hub, run):
    config = json.loads((run / "config.json").read_text())
    with pytest.raises(ValueError, match="A pull request has no commit yet"):
        publishing.push(run, "org/name", with_code=True, create_pr=True)
    (run / "config.json").write_text(json.dumps(config | {"model_type": "ctxseg_other"}))
    with pytest.raises(ValueError, match="model type is 'ctxseg_other'"):
        publishing.push(run, "org/name", with_code=True)
    assert not hub.requests


@pytest.mark.parametrize("name", ["LICENSE", "previews", "metrics.json", WEIGHTS])
def test_h6_a_link_that_leads_out_of_the_run_folder_is_not_followed(run, tmp_path, name):
    (tmp_path / "outside").mkdir()
    for file in ("LICENSE", "step-1.png", "metrics.json", WEIGHTS):
        (tmp_path / "outside" / file).write_bytes((run / file).read_bytes() if (run / file).is_file() else b"x")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "outside" / ("" if name == "previews" else name))
    with pytest.raises(ValueError, match=f"{name}.* is a link that leads out of the folder: put the file itself"):
        publishing.plan_push(run)


def test_h6_a_link_within_the_run_folder_is_followed(run, tmp_path):
    (run / WEIGHTS).rename(run / "best.safetensors")
    (run / WEIGHTS).symlink_to("best.safetensors")
    (tmp_path / "link").symlink_to(run)
    assert [file.size for file in publishing.plan_push(tmp_path / "link") if file.path == WEIGHTS] > [1000]


def test_the_end_of_the_input_is_a_no(hub, run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", _end_of_input)
    assert main(["push", str(run), "org/name"]) == 0
    assert "Nothing was uploaded." in capsys.readouterr().out and not hub.repos


def _end_of_input(question):
    raise EOFError


def test_all_models_of_a_folder_are_pushed_past_one_that_fails(hub, run, tmp_path, capsys):
    zoo = tmp_path / "zoo"
    for name in ("a", "b", "c"):
        (zoo / name).mkdir(parents=True)
        for path in run.iterdir():
            (zoo / name / path.name).write_bytes(path.read_bytes())
    (zoo / "b" / WEIGHTS).write_bytes(b"torn")
    (zoo / "images").mkdir()
    assert main(["push", "--all", str(zoo), "org", "--yes"]) == 1
    output = capsys.readouterr()
    assert set(hub.repos) == {"org/a", "org/c"}
    assert f"a: {hub.url}/org/a/commit/" in output.out and "ctxseg push: b: " in output.err
    assert main(["push", "--all", str(zoo), "org/name", "--yes"]) == 2
    assert main(["push", "--all", str(zoo / "images"), "org", "--yes"]) == 2
    assert "names one repository" in capsys.readouterr().err


def test_h8_no_uploaded_byte_tells_who_or_where(hub, run, tmp_path, monkeypatch):
    home, user, host = "/home/mallory_q7", "mallory_q7", "workhorse-q7"
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    places = {"source": f"{home}/data/camvid", "classes": ["sky", "road", "car"]}
    training = {"command": f"ctxseg train --data {home}/data --output_dir {tmp_path}/run --hub_token {TOKEN}"}
    training |= {"init_from": f"{home}/runs/old", "device": "cpu", "steps": 3}
    conversion = {"source": f"{home}/x.pth", "format": "smp", "sha256": "0", "comparison": f"see {tmp_path}/a"}
    facts = {"data": places, "training": training, "conversion": {**conversion, "notes": [f"from {os.getcwd()}/b"]}}
    (run / "metrics.json").write_text(json.dumps(facts | {"evaluation": {"mean_iou": 0.5}}))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"_name_or_path": f"{home}/runs/a"}))
    (run / "training_args.bin").write_bytes(f"{user} {host} {TOKEN}".encode())
    publishing.push(run, "org/name", with_code=True)
    sent = [*hub.repos["org/name"].files.values(), *hub.large_files.values(), *hub.bodies]
    sent += [
        base64.b64decode(json.loads(line)["value"]["content"])
        for body in hub.bodies
        for line in body.splitlines()
        if line.startswith(b'{"key": "file"')
    ]
    assert len(sent) > 60
    for secret in (TOKEN, home, user, host, str(tmp_path), os.getcwd(), str(Path(publishing.__file__).parent)):
        assert not [data for data in sent if secret.encode() in data], secret
