"""`gemify serve` as a process: what it refuses, how it starts, and how it ends."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from running_server import tiny_gem
from typer.testing import CliRunner

import gemify.cli.serve
from gemify.cli.main import app
from gemify.serving.auth import ENVIRONMENT
from gemify.serving.settings import ServerSettings

SECRET = "the secret prompt of a client"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_gem(root).save_pretrained(root / "my-gem")
    return root / "my-gem"


class Child:
    """A server in a process of its own, and what it says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines, self.url = process, [], ""
        self._said = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        with self._said:
            self.lines.append("the end")
            self._said.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        with self._said:
            while True:
                for line in self.lines:
                    if found := re.search(pattern, line):
                        return found
                assert "the end" not in self.lines, self.lines
                assert self._said.wait(120), self.lines

    def records(self) -> list[dict[str, Any]]:
        """The log's lines, each of them JSON."""
        self.wait_for("the end")
        return [json.loads(line) for line in self.lines[:-1] if line.startswith("{")]


@contextmanager
def child(model: Path, *arguments: object, **environment: str) -> Iterator[Child]:
    command = [sys.executable, "-m", "gemify", "serve", "--model", str(model), "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )
    running = Child(process)
    try:
        running.url = running.wait_for(r"http://127\.0\.0\.1:\d+")[0]
        running.wait_for('"message": "ready"')
        yield running
    finally:
        process.kill()
        process.wait(60)


def ask(url: str, number: int, *, stream: bool) -> str:
    """One answer of 80 letters; how it ended. Nothing can be lost but what was never accepted."""
    body = {"messages": [{"role": "user", "content": f"{SECRET} {number}"}], "max_tokens": 80, "stream": stream}
    body |= {"logit_bias": {"40": 100}}
    headers = {"authorization": "Bearer key-of-the-test"}
    try:
        with (
            httpx.Client(timeout=120) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response,
        ):
            text = response.read().decode()
    except httpx.ConnectError:
        return "not accepted"
    if response.status_code != 200:
        return f"{response.status_code} {text}"
    if stream:
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        done = text.rstrip().endswith("data: [DONE]")
    else:
        said, done = json.loads(text)["choices"][0]["message"]["content"], True
    return "complete" if done and len(said) == 80 else f"lost: {text[-200:]}"


def test_sigterm_under_load_loses_nothing_and_logs_no_prompt(model: Path) -> None:
    with child(model, **{ENVIRONMENT: "tester: key-of-the-test"}) as server:
        ended: list[str] = []
        signalled = threading.Event()

        def client(number: int) -> None:
            for round_ in range(1000):
                ended.append(ask(server.url, round_, stream=number % 2 == 0))
                if ended[-1] == "not accepted":
                    return

        clients = [threading.Thread(target=client, args=(n,)) for n in range(12)]
        for thread in clients:
            thread.start()
        while len(ended) < 12:
            signalled.wait(0.01)
        server.process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join(120)
        assert server.process.wait(120) == 0
        assert set(ended) == {"complete", "not accepted"}, ended
        assert ended.count("not accepted") == 12
        assert ended.count("complete") >= 12
        records = server.records()
        requests = [r for r in records if r["message"] == "request" and r["route"] == "/v1/chat/completions"]
        assert len(requests) == ended.count("complete")
        assert {r["key"] for r in requests} == {"tester"}
        for record in requests:
            assert record["status"] == 200
            assert record["completion_tokens"] == 80
            assert record["prompt_tokens"] > 20
            assert record["ms"] > 0
            assert record["request"].startswith("req-")
        said = "\n".join(server.lines)
        assert SECRET not in said
        assert "key-of-the-test" not in said
        assert "Traceback" not in said


def test_drained_ready_says_no_and_a_second_signal_ends_at_once(model: Path) -> None:
    with child(model, "--drain-seconds", 600, "--served-model-name", "mine", "--log-prompts") as server:
        assert httpx.get(f"{server.url}/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/ready").status_code == 200:
            pass
        assert httpx.get(f"{server.url}/ready").json() == {"status": "stopping"}
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": SECRET, "model": "mine"})
        assert answer.status_code == 200  # until the proxy has seen it
        server.wait_for(SECRET)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["serve", *(str(a) for a in arguments)])
    error = "" if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    return done.exit_code, error


def test_a_killed_server_starts_again_at_the_same_port(model: Path) -> None:
    """In the middle of answers: nothing is left that would need a repair."""
    with child(model) as first:
        port = first.url.rpartition(":")[2]
        wish = {"prompt": "a", "max_tokens": 400, "logit_bias": {"40": 100}, "stream": True}
        with httpx.stream("POST", f"{first.url}/v1/completions", json=wish, timeout=60) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            first.process.send_signal(signal.SIGKILL)
            assert first.process.wait(60) == -signal.SIGKILL
            with pytest.raises(httpx.HTTPError):
                list(pieces)
    with child(model, "--port", port) as again:
        assert again.url.endswith(f":{port}")
        assert ask(again.url, 1, stream=False) == "complete"


def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    (tmp_path / "keys").write_text("# none\n")
    (tmp_path / "short").write_text("ann: abc\n")
    (tmp_path / "twice").write_text("ann: a-long-secret\nbob: a-long-secret\n")
    (tmp_path / "odd.yaml").write_text("prot: 80\n")
    (tmp_path / "wrong.yaml").write_text("port: eighty\n")
    (tmp_path / "list.yaml").write_text("- port\n")
    (tmp_path / "broken.yaml").write_text("port: [\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, words in (
            (["--port", port], f"cannot listen at 127.0.0.1:{port}: address already in use; choose another --port"),
            (["--host", "0.0.0.0"], "there are no API keys: give --api-keys FILE"),
            (["--host", "::"], "there are no API keys"),
            (["--host", "no.such.host.invalid", "--allow-no-key"], "no such address"),
            (["--api-keys", tmp_path / "none"], "No such file"),
            (["--api-keys", tmp_path / "keys"], "holds no API key"),
            (["--api-keys", tmp_path / "short"], "at least 8"),
            (["--api-keys", tmp_path / "twice"], "given twice"),
            (["--config", tmp_path / "odd.yaml"], "unknown setting 'prot'"),
            (["--config", tmp_path / "wrong.yaml"], "port must be int, got 'eighty'"),
            (["--config", tmp_path / "list.yaml"], "must hold settings"),
            (["--config", tmp_path / "broken.yaml"], "is not YAML"),
            (["--timeout", "0"], "timeout must be at least"),
            (["--cors-origin", "example.com"], "starts with http"),
            (["--port", 0, "--model", tmp_path / "none"], "no such GEM directory"),
        ):
            code, error = run(*arguments)
            assert code == 1, arguments
            assert words in error, error
            assert "\n" not in error
    assert run("--port", "70000")[0] == 2
    assert run("--max-num-seqs", "0")[0] == 2
    assert run("--frobnicate")[0] == 2


def test_flags_beat_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "port: 9\nmax-num-seqs: 4\ncors_origins: [https://a.example]\napi-keys: keys.txt\n"
    )
    values = ServerSettings.from_yaml(tmp_path / "a.yaml")
    settings = ServerSettings.of({**values, "port": 10}, source="test")
    assert (settings.port, settings.max_num_seqs, settings.cors_origins) == (10, 4, ("https://a.example",))
    assert settings.api_keys == Path("keys.txt")
    assert settings.is_local
    assert not ServerSettings(host="0.0.0.0").is_local
    assert not ServerSettings(host="example.com").is_local
    assert ServerSettings(host="::1").is_local


def test_the_documentation_names_every_option() -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text()
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    flags = {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)", rows)}
    others = set(re.findall(r"`(\w+)`\*", rows))
    fields = set(vars(ServerSettings()))
    verb = inspect.signature(gemify.cli.serve.serve).parameters
    assert flags - {"cors_origin", "config"} == (set(verb) & fields) - {"allow_no_key"}
    assert flags | others | {"cors_origins", "allow_no_key"} == fields | {"cors_origin"}
    defaults = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert defaults is not None
    assert ServerSettings.of({k.replace("-", "_"): v for k, v in yaml.safe_load(defaults[1]).items()}, source="docs")
