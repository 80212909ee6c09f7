"""uvicorn's private members that serving/server.py and serving/server.py use: what breaks is said here first."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

SAID = (
    "uvicorn {version} has changed what serving/server.py builds on: {what}. Adapt that file, run"
    " tests/serving/test_hostile.py, test_safety.py and test_process.py, then move the bound in pyproject.toml"
)


def test_the_installed_uvicorn_is_a_tested_one() -> None:
    serve = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (bounds,) = (re.findall(r"\d+\.\d+", entry) for entry in serve["serve"] if entry.startswith("uvicorn"))
    least, limit = (tuple(map(int, bound.split("."))) for bound in bounds)
    installed = tuple(map(int, version("uvicorn").split(".")[:2]))
    assert least <= installed < limit, SAID.format(version=version("uvicorn"), what="it is outside pyproject's bounds")


def test_the_members_that_are_used_exist() -> None:
    protocol = inspect.getsource(H11Protocol)
    cycle = inspect.getsource(RequestResponseCycle)
    server = inspect.getsource(uvicorn.Server)
    missing = [
        name
        for source, names in (
            (protocol, ["_unset_keepalive_if_required", "self.cycle", "self.conn", "self.transport", "self.loop"]),
            (protocol, ["def send_400_response(self, msg: str)", "def shutdown(self)", "def pause_writing(self)"]),
            (cycle, ["self.response_started", "self.response_complete", "self.keep_alive", "self.disconnected"]),
            (cycle, ["self.message_event"]),
            (server, ["self.servers", "self.server_state", "self.lifespan", "def handle_exit", "def capture_signals"]),
            (server, ["async def on_tick", "async def shutdown"]),
        )
        for name in names
        if name not in source
    ]
    assert not missing, SAID.format(version=version("uvicorn"), what=f"no {', '.join(missing)}")
