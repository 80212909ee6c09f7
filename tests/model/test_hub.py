"""Uploading to the Hugging Face Hub and loading from there, against a local stand-in of its HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from gemify import GemModel
from gemify.model.config import CONFIG_FILE
from tiny_gems import make_gem, save_gem

TOKEN = "hf_of_the_test"
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repos with branches; each branch is a list of commits, each a whole set of files. Private ones want a token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, list[Files]]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []

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
        if not self.signed:
            return self.refuse(401, "Unauthorized")
        hub, path = self.server, self.path.split("?")[0]
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

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:/(revision|resolve|tree)/([^/]+)(?:/(.*))?)?", path)
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
            return self.answer(
                200,
                [
                    {"type": "file", "path": n, "size": len(f), "oid": hashlib.sha1(f).hexdigest()}
                    for n, f in files.items()
                ],
            )
        listed = [{"rfilename": n} for n in sorted(files)]
        return self.answer(
            200, {"id": repo, "sha": sha(files), "siblings": listed, "private": repo in hub.private, "tags": []}
        )

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_a_child(hub: Hub, home: Path, code: str, *arguments: object, token: str | None) -> Any:
    """What code prints as JSON in a process whose hub is the stand-in: the address is read at import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", _BEFORE + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


_BEFORE = """
import json, sys
from gemify import GemModel
def tried(work):
    try:
        return work()
    except ValueError as error:
        return str(error)
"""
_PUSH_AND_LOAD = """
one, other, base = sys.argv[1:]
def vector(**options):
    return GemModel.from_pretrained("me/my-gem", base=base, **options).encode("hello").tolist()
push = GemModel.from_pretrained(one).push_to_hub
address = push("me/my-gem", base_model="me/base", private=True)
GemModel.from_pretrained(other).push_to_hub("me/my-gem", base_model="me/base", revision="v2")
push("me/mine", base_model="me/base")
print(json.dumps([address, vector(), vector(revision="v2"), tried(lambda: vector(revision="v9"))]))
"""
_WITHOUT_TOKEN = """
gem = GemModel.from_pretrained(sys.argv[1])
print(json.dumps([
    tried(lambda: gem.push_to_hub("me/new", base_model="me/base")),
    tried(lambda: GemModel.from_pretrained("me/my-gem", base=sys.argv[2])),
]))
"""


def test_a_gem_goes_to_the_hub_and_comes_back(hub: Hub, base_dir: Path, tmp_path: Path) -> None:
    directory = save_gem(base_dir, tmp_path / "gem")
    other = make_gem(base_dir, seed=7)
    other.save_pretrained(tmp_path / "other")
    hub.repos["me/mine"] = {"main": [{"README.md": b"# Mine\n"}]}
    paths = (directory, tmp_path / "other", base_dir)
    address, vector, of_branch, wrong = in_a_child(hub, tmp_path / "home", _PUSH_AND_LOAD, *paths, token=TOKEN)
    assert address.startswith(f"{hub.url}/me/my-gem/commit/")
    assert hub.private == {"me/my-gem"}
    assert hub.messages == ["Upload GEM"] * 3
    files = hub.files("me/my-gem")
    assert files is not None
    assert {"adapter_model.safetensors", CONFIG_FILE, "modules.json", "README.md", "tokenizer.json"} <= set(files)
    assert json.loads(files[CONFIG_FILE])["base"] == "me/base"
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["base_model"] == "me/base"
    assert {"embeddings", "gemify"} <= set(card.data.tags or [])
    assert str(tmp_path) not in "".join(f.decode("latin-1") for f in files.values())
    mine = hub.files("me/mine")
    assert mine is not None
    assert mine["README.md"] == b"# Mine\n", "a card that is there is kept"
    for found, gem in ((vector, GemModel.from_pretrained(directory)), (of_branch, other)):
        assert torch.equal(torch.tensor(found), torch.as_tensor(gem.encode("hello")))
    assert wrong == "the Hugging Face repo me/my-gem has no revision v9"

    gone = in_a_child(hub, tmp_path / "other-home", _WITHOUT_TOKEN, directory, base_dir, token=None)
    assert gone[0].startswith("cannot upload to me/new: ")
    assert gone[1] == "me/my-gem is neither a directory nor a Hugging Face repo that can be reached"
    assert set(hub.repos) == {"me/my-gem", "me/mine"}


def test_a_base_of_this_machine_is_refused(base_dir: Path) -> None:
    with pytest.raises(ValueError, match="is a path of this machine, where nobody else finds it: give base_model"):
        make_gem(base_dir).push_to_hub("me/my-gem")
