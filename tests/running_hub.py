"""A stand-in of the Hugging Face Hub on this machine: repos of models and of data sets, commits, collections."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest

TOKEN = "hf_of_the_test"
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repos with branches; each branch is a list of commits, each a whole set of files. Private ones want a token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, list[Files]]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.collections: dict[str, list[str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str = "main") -> Files | None:
        """The files of a branch, or of a commit."""
        branches = self.repos[repo]
        if revision in branches:
            return branches[revision][-1]
        return next((files for commits in branches.values() for files in commits if sha(files) == revision), None)


def sha(files: Files) -> str:
    """A commit's name."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def listing(files: Files) -> list[dict[str, Any]]:
    """Files as the hub lists them."""
    return [
        {"type": "file", "path": name, "size": len(file), "oid": hashlib.sha1(file).hexdigest()}
        for name, file in files.items()
    ]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    @property
    def signed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.split("?")[0]
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            names = parse_qs(body.decode())["paths"]
            return self.answer(200, listing({n: f for n, f in hub.repos[match[1]][match[2]][-1].items() if n in names}))
        if not self.signed:
            return self.refuse(401, "Unauthorized")
        if path.startswith("/api/collections"):
            return self.collect(path, json.loads(body))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in hub.repos:
                return self.answer(409, {"url": f"{hub.url}/{repo}"})
            hub.repos[repo] = {"main": [{}]}
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(repo)
            return self.answer(200, {"url": f"{hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        assert match, path
        repo, what, branch = match.groups()
        if what == "branch":
            if branch in hub.repos[repo]:
                return self.refuse(409, "Conflict")
            hub.repos[repo][branch] = [dict(hub.repos[repo]["main"][-1])]
            return self.answer(200, {})
        if what == "preupload":
            names = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            return self.answer(200, {"files": modes})
        files = dict(hub.repos[repo][branch][-1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                hub.messages.append(line["value"]["summary"])
            elif line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        hub.repos[repo][branch].append(files)
        return self.answer(
            200, {"commitUrl": f"{hub.url}/{repo}/commit/{sha(files)}", "commitOid": sha(files), "success": True}
        )

    def collect(self, path: str, asked: Any) -> None:
        """Make a collection, or add to one."""
        slug = path.removeprefix("/api/collections").removesuffix("/items").strip("/")
        if not slug:
            slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-64f9a55bb3115b4f513ec026"
            self.server.collections.setdefault(slug, [])
        elif asked["item"]["id"] in self.server.collections[slug]:
            return self.answer(409, {"error": "exists"})
        else:
            self.server.collections[slug].append(asked["item"]["id"])
        self.answer(200, self.collection(slug))

    @staticmethod
    def collection(slug: str) -> dict[str, Any]:
        dated = {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": False, "theme": "blue"}
        return {"slug": slug, "title": slug, "owner": {"name": "me"}, "items": [], "upvotes": 0} | dated

    def do_GET(self) -> None:
        hub, path = self.server, unquote(self.path.split("?")[0])
        if path.startswith("/api/collections/"):
            return self.answer(200, self.collection(path.removeprefix("/api/collections/")))
        kind = r"(?:/api/models|/api/datasets|/datasets)?"
        match = re.fullmatch(kind + r"/([^/]+/[^/]+?)(?:/(revision|resolve|tree)/([^/]+)(?:/(.*))?)?", path)
        if match is None or match[1] not in hub.repos or (match[1] in hub.private and not self.signed):
            return self.refuse(404, "RepoNotFound")
        repo, what, revision, name = match.groups()
        files = hub.files(repo, revision or "main")
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if what == "resolve":
            if name not in files:
                return self.refuse(404, "EntryNotFound")
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha(files))
        if what == "tree":
            inside = {n: f for n, f in files.items() if not name or n.startswith(f"{name}/")}
            return self.answer(200, listing(inside)) if inside else self.refuse(404, "EntryNotFound")
        listed = [{"rfilename": n} for n in sorted(files)]
        return self.answer(
            200, {"id": repo, "sha": sha(files), "siblings": listed, "private": repo in hub.private, "tags": []}
        )

    do_HEAD = do_GET


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def in_a_child(hub: Hub, home: Path, code: str, *arguments: object, token: str | None) -> Any:
    """What code prints as JSON in a process whose hub is the stand-in: the address is read at import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def use_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path, *, token: str | None = None) -> None:
    """Let this process take the stand-in for the hub, as HF_ENDPOINT does when it is set before the import."""
    resolve = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": resolve, "HF_HUB_DISABLE_XET": True}
    values |= {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(home / "hub")}
    for name, value in values.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    values = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": home / "datasets"}
    values |= {"HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"}
    for name, value in values.items():
        monkeypatch.setattr(f"datasets.config.{name}", value)
    monkeypatch.setenv("HF_TOKEN", token or "")
