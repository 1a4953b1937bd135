"""A Hugging Face Hub on this machine: the few addresses that an upload asks for."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.http_server import serving

TOKEN, READ_ONLY = "hf_made_up", "hf_read_only"


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        address: of the server.
        private: by repository, whether it is private.
        files: by repository, the files of its last commit.
        commits: number of commits.
        fault: answer a commit with this status and message.
    """

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: int = 0
    fault: tuple[int, str] | None = None
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    paths: list[str] = field(default_factory=list)

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        """Variables under which huggingface_hub uses this server, and its plain protocol."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def hub_server() -> Iterator[Hub]:
    """An empty Hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def do_PUT(self) -> None:
            self.do_POST()

        def _answer(self, body: bytes) -> None:
            path = self.path.partition("?")[0]
            hub.paths.append(path)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer = 200, {}
            if token not in (TOKEN, READ_ONLY) and not path.startswith("/lfs/"):
                status, answer = 401, {"error": "Invalid credentials"}
            elif token == READ_ONLY and self.command == "POST":
                status, answer = 403, {"error": "Forbidden"}
            elif path.startswith("/lfs/"):
                hub.large[path.rpartition("/")[2]] = body
            else:
                status, answer = _answer(hub, path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with serving(Handler) as hub.address:
        yield hub


def _answer(hub: Hub, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and content of the answer to a request with a valid token."""
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in hub.private
        hub.private.setdefault(name, asked.get("visibility") == "private")
        return 409 if there else 200, {"url": f"{hub.address}/{name}", "id": name}
    if path == "/api/validate-yaml":
        assert json.loads(body)["content"].startswith("---\n")
        return 200, {"warnings": [], "errors": []}
    if path.endswith(".git/info/lfs/objects/batch"):
        objects = [
            {**one, "actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}
    name = "/".join(path.split("/")[3:5])  # /api/models/OWNER/NAME/…
    if name not in hub.private:
        return 404, {"error": "Repository not found"}
    if path.endswith("/preupload/main"):
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        return 200, {"files": files}
    if path.endswith("/commit/main"):
        if hub.fault is not None:
            return hub.fault[0], {"error": hub.fault[1]}
        files = {}
        for line in body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        hub.files[name] = files
        hub.commits += 1
        return 200, {"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1" * 40}
    return 200, {"_id": "1", "id": name, "private": hub.private[name], "siblings": [], "tags": []}
