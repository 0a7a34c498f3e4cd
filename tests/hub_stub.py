"""A Hub on this machine: real HTTP for creating, pushing to and pulling from model repositories, and faults on demand.

It speaks as much of the protocol as `huggingface_hub` needs for models: weights travel by LFS, other files inside
the commit, and a commit counts as a whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "StubToken" * 4  # noqa: S105


@dataclass
class Fault:
    """What goes wrong at the next request whose `METHOD path` matches: an HTTP status, or a broken connection.

    Attributes:
        where: Regular expression.
        status: Status to answer with; `None` breaks the connection.
        after: Bytes of the request's body to read before breaking it; `None` reads all.
        times: How often it happens.
    """

    where: str
    status: int | None = None
    after: int | None = None
    times: int = 1


@dataclass
class Hub:
    """State of the Hub: repository -> branch -> file -> content, uploaded large files, and all that was asked."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    private: dict[str, str | None] = field(default_factory=dict)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo][branch]

    def sha(self, repo: str, branch: str) -> str:
        content = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.repos[repo][branch].items())
        return hashlib.sha1(json.dumps([repo, branch, content]).encode()).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a fresh Hub on a free port of 127.0.0.1 until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self._serve()

    do_PUT = do_GET = do_HEAD = do_POST

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        fault = next((fault for fault in self.hub.faults if re.search(fault.where, line)), None)
        if fault:
            fault.times -= 1
            if fault.times == 0:
                self.hub.faults.remove(fault)
            self._body(fault.after)
            if fault.status is None:
                self.close_connection = True
                self.connection.shutdown(2)
                return
            return self._answer({"error": f"The stub was told to answer {fault.status}."}, fault.status)
        body = self._body()
        for method, pattern, answer in _ROUTES:
            if (found := re.fullmatch(pattern, path)) and self.command in method:
                if "POST" in method and "validate" not in path and self.headers.get("Authorization") is None:
                    return self._answer({"error": "Invalid username or password."}, 401)
                return answer(self, body, *found.groups())
        return self._answer({"error": f"The stub does not know {line}."}, 404)

    def _body(self, limit: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length if limit is None else min(limit, length))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, value: object, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, **{"Content-Type": "application/json", **headers})

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repos:
            return self._answer({"error": "You already created this model repo", "url": self._page(repo)}, 409)
        self.hub.repos[repo] = {"main": {}}
        self.hub.private[repo] = asked.get("visibility", "private" if asked.get("private") else None)
        return self._answer({"url": self._page(repo)})

    def _page(self, repo: str) -> str:
        return f"{self.hub.url}/{repo}"

    def _info(self, _: bytes, repo: str) -> None:
        if repo not in self.hub.repos:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self._answer({"id": repo, "sha": self.hub.sha(repo, "main"), "siblings": [], "tags": []})

    def _tree(self, _: bytes, repo: str, revision: str) -> None:
        branches = self.hub.repos[repo]
        files = next(branches[branch] for branch in branches if revision in (branch, self.hub.sha(repo, branch)))
        oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        return self._answer([{"type": "file", "path": n, "size": len(files[n]), "oid": oids[n]} for n in files])

    def _branch(self, _: bytes, repo: str, branch: str) -> None:
        if branch in self.hub.repos[repo]:
            return self._answer({"error": "Reference already exists"}, 409)
        self.hub.repos[repo][branch] = dict(self.hub.files(repo))
        return self._answer({})

    def _preupload(self, body: bytes, repo: str, branch: str) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        return self._answer({"files": [
            {"path": n, "uploadMode": "lfs" if n.endswith(".safetensors") else "regular", "shouldIgnore": False}
            for n in names
        ]})  # fmt: skip

    def _large_files(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{entry['oid']}"}}
        return self._answer({"transfer": "basic", "objects": objects})

    def _blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        return self._answer({})

    def _commit(self, body: bytes, repo: str, branch: str) -> None:
        new = dict(self.hub.files(repo, branch))
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repos[repo][branch] = new
        sha = self.hub.sha(repo, branch)
        return self._answer({"commitOid": sha, "commitUrl": f"{self._page(repo)}/commit/{sha}", "success": True})

    def _file(self, _: bytes, repo: str, revision: str, name: str) -> None:
        branches = self.hub.repos.get(repo)
        if branches is None:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        branch = next((b for b in branches if revision in (b, self.hub.sha(repo, b))), None)
        if branch is None:
            return self._answer({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        sha = self.hub.sha(repo, branch)
        content = branches[branch].get(name)
        if content is None:
            return self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self._send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)

    def _valid(self, _: bytes) -> None:
        return self._answer({"warnings": [], "errors": []})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", _Handler._valid),
    ("GET", rf"/api/models/{_REPO}(?:/revision/main)?", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/tree/(.+)", _Handler._tree),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", _Handler._branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler._preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler._commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._large_files),
    ("PUT", r"/blobs/(\w+)", _Handler._blob),
    ("GET HEAD", r"/((?:[\w.-]+/)?[\w.-]+)/resolve/([^/]+)/(.+)", _Handler._file),
]
