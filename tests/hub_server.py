"""A hub on this computer: what huggingface_hub asks of huggingface.co to make repositories, commit and download.

It speaks the paths and answers that huggingface_hub 1 and 2 expect, LFS included. Files are kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the server has and what it was asked."""

    tokens: dict[str, str] = field(default_factory=lambda: {"hf_write": "write", "hf_read": "read"})
    """Token → what it may do."""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    """Of all commits."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS: SHA-256 → content."""
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def commit(self, repo: str) -> str:
        """The id of its newest commit: it changes with every file."""
        text = json.dumps([[name, hashlib.sha256(data).hexdigest()] for name, data in self.repositories[repo].items()])
        return hashlib.sha1(text.encode()).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Start it; its address goes into HF_ENDPOINT before huggingface_hub is imported."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _may(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.hub.requests.append(f"POST {path}")
        may = self._may()
        if may != "write":
            self._answer(403 if may else 401, {"error": "Forbidden" if may else "Unauthorized"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            new = repo not in self.hub.repositories
            self.hub.repositories.setdefault(repo, {})
            if new and (asked.get("private") or asked.get("visibility") == "private"):
                self.hub.private.add(repo)
            self._answer(200 if new else 409, {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            address = f"{self.hub.address}/lfs"
            objects = [
                {**one, "actions": {"upload": {"href": f"{address}/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            repo = path.split("/api/models/")[1].split("/commit/")[0]
            for entry in map(json.loads, body.splitlines()):
                value, held = entry["value"], self.hub.repositories[repo]
                if entry["key"] == "header":
                    self.hub.messages.append(value["summary"])
                elif entry["key"] == "file":
                    assert value["encoding"] == "base64"
                    held[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    held[value["path"]] = self.hub.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del held[value["path"]]
            commit = self.hub.commit(repo)
            address = f"{self.hub.address}/{repo}/commit/{commit}"
            self._answer(200, {"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})
        else:
            self._answer(404, {"error": "not here"})

    def do_PUT(self) -> None:
        name, body = self.path.removeprefix("/lfs/"), self._body()
        self.hub.requests.append("PUT /lfs")
        assert hashlib.sha256(body).hexdigest() == name
        self.hub.objects[name] = body
        self._answer(200)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        is_api = path.startswith("/api/models/")
        repo = "/".join(path.removeprefix("/api/models/").lstrip("/").split("/")[:2])
        files = self.hub.repositories.get(repo)
        if files is None or (repo in self.hub.private and self._may() is None):
            self._answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        if repo in self.hub.gated:
            self._answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
            return
        commit = self.hub.commit(repo)
        if is_api and "/tree/" in path:
            digests = {name: hashlib.sha256(data).hexdigest()[:40] for name, data in files.items()}
            tree = [{"type": "file", "path": n, "size": len(files[n]), "oid": d} for n, d in digests.items()]
            self._answer(200, tree)
        elif is_api:
            siblings = [{"rfilename": name} for name in files]
            facts = {"siblings": siblings, "private": repo in self.hub.private}
            self._answer(200, {"id": repo, "modelId": repo, "sha": commit, **facts})
        else:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name not in files:
                self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
                return
            data = files[name]
            self._answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit)

    def do_HEAD(self) -> None:
        self.do_GET()
