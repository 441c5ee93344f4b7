"""The loopback Hub with data sets: the same repositories under the addresses that `datasets` asks for."""

import json

from hub_server import HubServer, _Handler, blob_id


class _DataHandler(_Handler):
    routes = (
        *_Handler.routes,
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info"),
    )

    def handle_request(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        super().handle_request()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def paths_info(self, body: bytes, query: dict, repo: str, rev: str) -> None:
        files = self._history(repo, rev)[-1].files
        found = []
        for path in json.loads(body)["paths"]:
            if path in files:
                found.append(
                    {"type": "file", "path": path, "size": len(files[path]), "oid": blob_id(path, files[path])}
                )
            elif any(name.startswith(f"{path}/") for name in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self._json(found)


def data_hub() -> HubServer:
    """Make a Hub that knows data sets."""
    hub = HubServer()
    hub._server.RequestHandlerClass = type("Handler", (_DataHandler,), {"hub": hub})
    return hub
