"""A small Hub on loopback, good enough for the real huggingface_hub client (1.x and 2.x) to push to and load from.

    with HubServer() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path), check=True)
        assert "config.json" in hub.repos["org/name"].files

The client reads HF_ENDPOINT when it is imported, so clients run in a process of their own with `hub.env(tmp)`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]

    @property
    def oid(self) -> str:
        content = repr((self.message, sorted(self.files.items()))).encode()
        return hashlib.sha1(content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    gated: bool = False

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files


class HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message or code}


class HubServer:
    """Args:
    token: The only token that is accepted; it belongs to the user `tester`.
    namespaces: Where that user may write.

    `repos` holds what was pushed, `requests` every request as `METHOD /path`, and `faults` maps a pattern of these to
    what the server shall do instead, a list of it for once each: answer with a status, say nothing ("silent"), hang up
    ("drop"), do what was asked and hang up ("deaf"), answer with the log-in page of a network ("page"), or send no
    file beyond its half ("half").
    """

    def __init__(self, token: str = "fake", namespaces: tuple[str, ...] = ("tester", "org")):
        self.token, self.namespaces = token, namespaces
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, int | str | list[int | str]] = {}
        self.bodies: list[bytes] = []
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def add(self, name: str, files: dict[str, bytes], **facts: bool) -> str:
        """Put a repository there; gives its commit."""
        self.repos[name] = Repo(**facts, branches={"main": [Commit("first", files)]})
        return self.repos[name].commits[-1].oid

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}


def is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".png")) or size > 1_000_000


def blob_id(path: str, data: bytes) -> str:
    """What the Hub calls a file's oid: SHA-256 of a large file, git's SHA-1 of any other."""
    if is_large(path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    fault = ""
    half = 0
    protocol_version = "HTTP/1.1"
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<rev>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("GET", r"/api/datasets/(?P<repo>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/large-files/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def log_message(self, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        body, url = self._read_body(), urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        self.hub.requests.append(line)
        self.hub.bodies.append(body)
        try:
            self.fault = self._next_fault(line)
            if self.fault in ("silent", "drop"):
                self.hub.closing.wait(60 if self.fault == "silent" else 0)
                self.close_connection = True
                return
            for methods, pattern, name in self.routes:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods.split("|"):
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(body, parse_qs(url.query), **groups)
                    return
            raise HubError(404, message=f"this test server does not know {line}")
        except HubError as error:
            self._send(error.status, b"{}", error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _next_fault(self, line: str) -> str:
        for part, faults in self.hub.faults.items():
            if re.search(part, line) and faults:
                fault = faults.pop(0) if isinstance(faults, list) else faults
                if isinstance(fault, int):
                    raise HubError(fault, message="fault made by the test")
                return fault
        return ""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault == "deaf":
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.fault == "half":
            data = data[: max(0, self.half)]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, content: object) -> None:
        if self.fault == "page":
            self._send(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
            return
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _logged_in(self, required: bool = True) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, message="Invalid credentials in Authorization header")
        if required and given is None:
            raise HubError(401, message="Invalid username or password.")
        return given is not None

    def _may_write(self, repo: str) -> None:
        self._logged_in()
        if repo.partition("/")[0] not in self.hub.namespaces:
            raise HubError(403, message=f"You do not have the right to write to {repo}")

    def _history(self, repo: str, rev: str) -> list[Commit]:
        """The commits that lead to a branch or an oid."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self._logged_in(required=False)):
            raise HubError(404, "RepoNotFound", "Repository not found")
        self._logged_in(required=False)
        if found.gated and "/api/" not in self.path:
            raise HubError(403, "GatedRepo", "Access to this model is restricted")
        for branch, commits in found.branches.items():
            for index, commit in enumerate(commits):
                if commit.oid == rev or (branch == rev and index == len(commits) - 1):
                    return commits[: index + 1]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")

    def whoami(self, body: bytes, query: dict) -> None:
        self._logged_in()
        self._json({"type": "user", "name": "tester", "orgs": [{"name": name} for name in self.hub.namespaces]})

    def create(self, body: bytes, query: dict) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        self._may_write(repo)
        if repo in self.hub.repos:
            raise HubError(409, message="You already created this model repo")
        private = asked.get("private") or asked.get("visibility") == "private"
        first = Commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.hub.repos[repo] = Repo(bool(private), {"main": [first]})
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate_yaml(self, body: bytes, query: dict) -> None:
        if not json.loads(body)["content"].startswith("---\n"):
            raise HubError(400, message="no YAML header")
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, query: dict, repo: str, rev: str) -> None:
        if "create_pr" not in query:
            self._may_write(repo)
        files = self._history(repo, rev)[-1].files
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if is_large(path, asked["size"]) else "regular"
            oid = blob_id(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, body: bytes, query: dict, repo: str) -> None:
        self._logged_in()
        objects = []
        for asked in json.loads(body)["objects"]:
            known = asked["oid"] in self.hub.large_files
            upload = {"upload": {"href": f"{self.hub.url}/large-files/{asked['oid']}"}}
            objects.append({**asked, **({} if known else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, query: dict, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message="the content does not have this SHA-256")
        self.hub.large_files[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, query: dict, repo: str, rev: str) -> None:
        if "create_pr" not in query:
            self._may_write(repo)
        history = self._history(repo, rev)
        files, message = dict(history[-1].files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, history[-1].oid):
                    raise HubError(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.large_files:
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise HubError(400, message=f"cannot {key} {value.get('path')}")
        new = Commit(message, files)
        answer = {"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{new.oid}", "commitOid": new.oid}
        branches = self.hub.repos[repo].branches
        if "create_pr" in query:
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            rev, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.hub.url}/{repo}/discussions/{number}"
        branches[rev] = [*history, new]
        self._json(answer)

    def info(self, body: bytes, query: dict, repo: str, rev: str = "main") -> None:
        head = self._history(repo, rev)[-1]
        siblings = [{"rfilename": path} for path in sorted(head.files)]
        if "blobs" in query:
            for sibling in siblings:
                data = head.files[sibling["rfilename"]]
                sibling |= {"blobId": blob_id(sibling["rfilename"], data), "size": len(data)}
        facts = {"id": repo, "modelId": repo, "sha": head.oid, "tags": [], "downloads": 0, "likes": 0}
        self._json({**facts, "private": self.hub.repos[repo].private, "siblings": siblings})

    def tree(self, body: bytes, query: dict, repo: str, rev: str, path: str = "") -> None:
        prefix = f"{path.rstrip('/')}/" if path else ""
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict] = {}
        for name, data in sorted(self._history(repo, rev)[-1].files.items()):
            if not name.startswith(prefix):
                continue
            folder, slash, _ = name.removeprefix(prefix).partition("/")
            if slash and not recursive:
                entries[prefix + folder] = {"type": "directory", "path": prefix + folder, "oid": "0" * 40, "size": 0}
                continue
            oid = blob_id(name, data)
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": oid}
            if is_large(name, len(data)):
                entries[name]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        if prefix and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        self._json(list(entries.values()))

    def resolve(self, body: bytes, query: dict, repo: str, rev: str, path: str) -> None:
        head = self._history(repo, rev)[-1]
        if path not in head.files:
            error = HubError(404, "EntryNotFound", "Entry not found")
            error.headers["X-Repo-Commit"] = head.oid
            raise error
        data = head.files[path]
        tag = f'"{blob_id(path, data)}"'
        headers = {"X-Repo-Commit": head.oid, "ETag": tag, "Accept-Ranges": "bytes"}
        if is_large(path, len(data)):
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(data))}
        self.half = len(data) // 2
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, data, headers)
            return
        start, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        self.half -= start
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        self._send(206, data[start : last + 1], headers)
