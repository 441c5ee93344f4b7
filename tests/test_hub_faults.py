"""Rows H1 to H4 and H6 of the reliability sheet: loading from a Hub on loopback that fails in every way.

One client process goes through all of it, for huggingface_hub reads its settings when it is imported.
"""

import json
import socket
import subprocess
import sys
import textwrap

import pytest
from hub_server import HubServer

from hf_ctxseg.hub_models import model_folder

LOADS = """
    import functools, json, os, socket, sys, time
    from pathlib import Path
    from huggingface_hub import constants
    from hf_ctxseg import hub_errors, hub_models, inference
    from hf_ctxseg.arguments import DataArguments, ModelArguments
    from hf_ctxseg.cli import main
    from hf_ctxseg.data_sources import load_tables
    from hf_ctxseg.model_building import build_model
    from hf_ctxseg.samples import ClassInfo

    dead, repos = sys.argv[1], json.loads(sys.argv[2])
    results = {}
    sleep, time.sleep = time.sleep, lambda seconds: sleep(seconds / 10)  # between attempts
    hub_models.HUB_SECONDS = 1.0
    hub_models.impatient = functools.partial(hub_errors.impatient, 1.0)
    hub_models.ask = functools.partial(hub_errors.ask, seconds=2.0)

    def attempt(label, call, *args, **kwargs):
        start = time.monotonic()
        try:
            result = {"value": str(call(*args, **kwargs))}
        except Exception as error:
            result = {"error": type(error).__name__, "text": str(error)}
        results[label] = {**result, "seconds": time.monotonic() - start}

    load = inference.load_run
    for label, name in repos.items():
        attempt(label, load, name)
    attempt("warm", load, "org/good")
    attempt("pinned", load, "org/good@" + os.environ["COMMIT"])
    os.environ["HF_TOKEN"] = "wrong"
    attempt("401", load, "org/good")
    os.environ["HF_TOKEN"] = "fake"
    classes = ClassInfo(("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), 255)
    build = lambda **fields: build_model(ModelArguments(**fields), DataArguments(), classes)
    attempt("train 404", build, model_name_or_path="org/none")
    attempt("train", build, model_name_or_path="org/good")
    attempt("data 404", load_tables, Path("org/none"), try_hub=True)
    attempt("timm 404", build, backbone="resnet18")
    attempt("cli", main, ["predict", "org/none", "picture.png", "--out", "out"])

    endpoint = constants.ENDPOINT
    constants.ENDPOINT = dead
    attempt("refused cold", load, "org/cold")
    attempt("refused warm", load, "org/good")
    attempt("timm refused", build, backbone="resnet18")
    attempt("data refused", load_tables, Path("org/cold"), try_hub=True)
    constants.ENDPOINT = "http://no-such-host.invalid"
    attempt("unknown host", load, "org/cold")
    look_up, socket.getaddrinfo = socket.getaddrinfo, lambda *args, **kwargs: sleep(60)
    constants.ENDPOINT = "http://slow-name-server.invalid"
    attempt("name server", load, "org/cold")
    socket.getaddrinfo, constants.ENDPOINT = look_up, endpoint

    constants.HF_HUB_OFFLINE = True
    attempt("offline warm", load, "org/good")
    attempt("offline cold", load, "org/cold")
    attempt("offline torn", load, "org/half")
    print(json.dumps(results))
"""


FAILURES = {
    "404": ("FileNotFoundError", "There is no folder org/none here, and no model of that name at http://127.0.0.1"),
    "404 revision": ("ValueError", "org/good has no revision 'nowhere': give a branch, tag or commit"),
    "404 file": ("FileNotFoundError", "org/nofile holds no preprocessor_config.json"),
    "gated": ("PermissionError", "org/gated is gated: ask for access on http://127.0.0.1"),
    "401": ("PermissionError", "does not accept this token: run `hf auth login`"),
    "403": ("PermissionError", "may not read org/f403 (fault made by the test): ask for access"),
    "500": ("ConnectionError", "answers 500 (fault made by the test): try again a little later"),
    "500 file": ("ConnectionError", "The Hub "),
    "429 file": ("ConnectionError", "429, too many requests"),
    "half": ("ConnectionError", "cannot be reached"),
    "silent": ("ConnectionError", "cannot be reached"),
    "stalled": ("ConnectionError", "cannot be reached"),
    "dropped": ("ConnectionError", "cannot be reached"),
    "page": ("ConnectionError", "(what answers there is not the Hub): check the network"),
    "foreign": ("ValueError", "org/foreign is no readable model: its type is 'evil', which is none of this package"),
    "escaping": ("ValueError", "leads out of its folder: get the model from a source that you trust"),
    "train 404": ("FileNotFoundError", "There is no folder org/none here, and no model"),
    "data 404": ("FileNotFoundError", "There is no folder org/none here, and no data set"),
    "timm 404": ("FileNotFoundError", "pretrained weights of 'resnet18' are not here"),
    "timm refused": ("ConnectionError", "--backbone_weights none for random ones"),
    "refused cold": ("ConnectionError", "check the network and HF_ENDPOINT"),
    "data refused": ("ConnectionError", "org/cold is neither a folder here nor in the cache"),
    "unknown host": ("ConnectionError", "cannot be reached at http://no-such-host.invalid"),
    "name server": ("ConnectionError", "no answer within 2 s"),
    "offline cold": ("ConnectionError", "org/cold is not in the cache, and HF_HUB_OFFLINE is set"),
    "offline torn": ("ConnectionError", "`hf download org/half`"),
}
ROWS = {
    "h2": ("404", "404 revision", "404 file", "gated", "401", "403", "train 404", "data 404", "timm 404"),
    "h3": ("offline cold", "offline torn"),
    "h4": ("foreign",),
    "h6": ("escaping",),
}
OF_ROW = {label: row for row, labels in ROWS.items() for label in labels}


@pytest.fixture(scope="module")
def loaded(run_folder, tmp_path_factory):
    """The Hub, the client's cache, and the outcome of each attempt."""
    home = tmp_path_factory.mktemp("loads")
    names = ("config.json", "preprocessor_config.json", "model.safetensors")
    files = {name: (run_folder / name).read_bytes() for name in names}
    code = f"open({str(home / 'code was run')!r}, 'w')\n".encode()
    entries = {"AutoConfig": "evil.Config", "AutoModelForSemanticSegmentation": "evil.Model"}
    ours = json.dumps(json.loads(files["config.json"]) | {"auto_map": entries}).encode()
    foreign = json.dumps({"model_type": "evil", "auto_map": entries}).encode()
    index = json.dumps({"weight_map": {"a": "../../../outside.safetensors"}}).encode()
    outside = {"model.safetensors.index.json": index, "model-/../../../outside.safetensors": b"x"}
    with HubServer() as hub:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        commit = hub.add("org/good", files)
        for name in ("cold", "f403", "e500", "file500", "file429", "half", "once", "silent", "stalled", "dropped"):
            hub.add(f"org/{name}", {**files, "name": name.encode()})
        hub.add("org/page", files)
        hub.add("org/nofile", {name: files[name] for name in ("config.json", "model.safetensors")})
        hub.add("org/gated", files, gated=True)
        hub.add("org/code", files | {"config.json": ours, "evil.py": code})
        hub.add("org/foreign", files | {"config.json": foreign, "evil.py": code})
        hub.add("org/escaping", {name: files[name] for name in names[:2]} | outside)
        weights = "GET /org/{}/resolve/.*/model.safetensors"
        hub.faults = {
            "GET /api/models/org/f403": 403,
            "GET /api/models/org/e500": 500,
            "HEAD /org/file500": 500,
            weights.format("file429"): 429,
            weights.format("half"): "half",
            weights.format("once"): ["half"],
            "GET /api/models/org/silent": "silent",
            "GET /api/models/org/page": "page",
            weights.format("stalled"): "silent",
            weights.format("dropped"): "drop",
        }
        repos = {"good": "org/good", "404": "org/none", "404 revision": "org/good@nowhere", "404 file": "org/nofile"}
        repos |= {"gated": "org/gated", "403": "org/f403", "500": "org/e500"}
        repos |= {"500 file": "org/file500", "429 file": "org/file429", "once": "org/once"}
        repos |= {name: f"org/{name}" for name in ("half", "silent", "stalled", "dropped", "page")}
        repos |= {name: f"org/{name}" for name in ("code", "foreign", "escaping")}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(LOADS), dead, json.dumps(repos)],
            env=hub.env(home / "hf") | {"COMMIT": commit},
            cwd=home,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        yield hub, home, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("label", FAILURES, ids=lambda label: f"{OF_ROW.get(label, 'h1')} {label}")
def test_h1_h2_what_cannot_be_loaded_is_said_soon_in_one_sentence_with_its_cure(loaded, label):
    kind, words = FAILURES[label]
    result = loaded[2][label]
    assert result.get("error") == kind, result
    assert words in result["text"]
    assert "\n" not in result["text"] and result["text"].endswith(".") and "  " not in result["text"]
    assert result["seconds"] < 10


def test_h1_a_hub_out_of_reach_is_named_with_the_way_round_it(loaded):
    for label in ("500", "silent", "refused cold", "unknown host", "name server"):
        assert "HF_HUB_OFFLINE=1" in loaded[2][label]["text"]


@pytest.mark.parametrize("label", ["good", "warm", "pinned", "once", "code", "train", "refused warm", "offline warm"])
def test_h1_h3_what_can_be_loaded_is(loaded, label):
    assert "DeepLabV3ForSemanticSegmentation" in loaded[2][label].get("value", ""), loaded[2][label]


def test_h1_no_partial_file_is_left_where_a_model_would_be_opened(loaded):
    hub, home, _, _ = loaded
    for name in ("half", "stalled", "dropped", "file429"):
        whole = set(hub.repos[f"org/{name}"].files.values())
        cached = home / f"hf/hub/models--org--{name}/snapshots"
        assert all(path.read_bytes() in whole for path in cached.rglob("*") if path.is_file())
        assert not list(cached.rglob("model.safetensors"))


def test_h3_the_copy_in_the_cache_is_said_to_be_one(loaded):
    assert "The Hub cannot be reached: org/good is opened as it lies in the cache." in loaded[3]


def test_names_that_are_none_are_said_to_be():
    with pytest.raises(ValueError, match=r"^org/name@ names no revision: give a branch, tag or commit after the @"):
        model_folder("org/name@")
    with pytest.raises(FileNotFoundError, match="There is no folder aaa"):
        model_folder("a" * 300)


def test_h4_code_in_a_repository_is_neither_fetched_nor_run(loaded):
    hub, home, _, _ = loaded
    assert not (home / "code was run").exists()
    assert not [line for line in hub.requests if line.endswith("evil.py")]
    assert not list((home / "hf").rglob("evil.py"))


def test_h6_a_repository_writes_nothing_outside_its_place_in_the_cache(loaded):
    _, home, _, _ = loaded
    assert not list(home.rglob("outside.safetensors"))
    assert {path.name for path in home.iterdir()} <= {"hf", "out"}


def test_h2_the_command_ends_with_code_2_and_one_line(loaded):
    _, _, results, stderr = loaded
    assert results["cli"]["value"] == "2"
    lines = [line for line in stderr.splitlines() if line.startswith("ctxseg predict: error:")]
    assert len(lines) == 1
