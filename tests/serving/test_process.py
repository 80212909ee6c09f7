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
from typer.testing import CliRunner

import gemify.cli.serve
from gemify.cli.main import app
from gemify.serving.settings import KEYS_VARIABLE, ServerSettings, variable_name
from running_server import tiny_gem

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
    with child(model, **{KEYS_VARIABLE: "tester: key-of-the-test"}) as server:
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
        params = {"prompt": "a", "max_tokens": 400, "logit_bias": {"40": 100}, "stream": True}
        with httpx.stream("POST", f"{first.url}/v1/completions", json=params, timeout=60) as answer:
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
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
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
            (["--config", tmp_path / "odd.yaml"], "odd.yaml: unknown option 'prot': choose from model, base"),
            (
                ["--config", tmp_path / "wrong.yaml"],
                "wrong.yaml: port must be a valid integer, unable to parse string as an integer, got 'eighty'",
            ),
            (["--config", tmp_path / "list.yaml"], "must hold options"),
            (["--config", tmp_path / "broken.yaml"], "is not YAML"),
            (["--timeout", "0"], "--timeout must be greater than or equal to 0.001, got '0.0'"),
            (
                ["--cors-origin", "example.com"],
                "--cors-origin: a CORS origin is * or starts with http:// or https://, got 'example.com'",
            ),
            (["--port", 0, "--model", tmp_path / "none"], "no such GEM directory"),
        ):
            code, error = run(*arguments)
            assert code == 1, arguments
            assert words in error, error
            assert "\n" not in error
    assert run("--port", "70000")[0] == 2
    assert run("--max-num-seqs", "0")[0] == 2
    assert run("--frobnicate")[0] == 2


def test_flags_beat_the_environment_and_that_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "port: 9\nmax-num-seqs: 4\ncors_origins: [https://a.example]\napi-keys: keys.txt\nbody_timeout: 2\nstore: s\n"
    )
    monkeypatch.setenv("GEMIFY_PORT", "11")
    monkeypatch.setenv("GEMIFY_STORE", "t")
    monkeypatch.setenv("GEMIFY_LOG_PROMPTS", "true")
    monkeypatch.setenv("GEMIFY_DTYPE", "")  # as if it were not set
    monkeypatch.setenv(KEYS_VARIABLE, "ann: a-long-secret")  # keys, not the option of that name
    settings = ServerSettings.load({"port": 10}, file)
    assert (settings.port, settings.max_num_seqs, settings.cors_origins) == (10, 4, ("https://a.example",))
    assert (settings.store, settings.log_prompts, settings.dtype, settings.body_timeout) == (("t",), True, None, 2.0)
    assert settings.api_keys == Path("keys.txt")
    monkeypatch.setenv("GEMIFY_API_KEYS_FILE", "others.txt")
    monkeypatch.setenv("GEMIFY_CORS_ORIGINS", "https://a.example, https://b.example")
    settings = ServerSettings.load({}, file)
    assert (settings.port, settings.api_keys) == (11, Path("others.txt"))
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert ServerSettings() == ServerSettings.model_construct(), "built directly, it reads no environment"
    monkeypatch.setenv("GEMIFY_PORT", "eighty")
    with pytest.raises(ValueError, match=r"^GEMIFY_PORT must be a valid integer, .*, got 'eighty'$"):
        ServerSettings.load({})
    assert ServerSettings.load({"port": 10}).port == 10


def test_every_option_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "cors_origins": "*",
        "max_bodies_bytes": str(300 << 20),
        "host": "::1",
        "stop_timeout": "7.5",
        "root_path": "/64",
        "truncate": "mean",
    }
    for name, field in ServerSettings.model_fields.items():
        value = given.get(name, "1" if field.annotation is bool or "1" in str(field.annotation) else "64")
        monkeypatch.setenv(variable_name(name), value)
    settings = ServerSettings.load({})
    assert [name for name, value in settings if value == ServerSettings.model_fields[name].default] == ["max_prompts"]


@pytest.mark.parametrize(
    "line", ["port: true", "port: 1.5", "model: 5", "timeout: soon", "allow_no_key: 7", "host: ''"]
)
def test_a_file_says_what_it_means(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.yaml").write_text(line)
    with pytest.raises(ValueError, match=rf"a.yaml: {line.partition(':')[0]}\b.*, got ") as raised:
        ServerSettings.load({}, tmp_path / "a.yaml")
    assert "\n" not in str(raised.value)


def test_only_this_machine_reaches_a_local_address() -> None:
    assert ServerSettings().is_local
    assert ServerSettings(host="::1").is_local
    assert not ServerSettings(host="0.0.0.0").is_local
    assert not ServerSettings(host="example.com").is_local


def test_the_documentation_names_every_option_with_its_variable(tmp_path: Path) -> None:
    """`test_docs.py` compares the defaults."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "serve.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if re.match(r"\| `(--)?\w.*GEMIFY_", line)]
    stated = {first.strip().strip("`*"): second.strip().strip("`") for first, second in rows}
    verb = inspect.signature(gemify.cli.serve.serve).parameters
    expected = {}
    for name in ServerSettings.model_fields:
        flag = {"cors_origins": "cors_origin"}.get(name, name)
        expected["--" + flag.replace("_", "-") if flag in verb else name] = variable_name(name)
    assert stated == expected
    assert set(verb) - {"config", "cors_origin"} <= set(ServerSettings.model_fields)
    example = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert example is not None
    (tmp_path / "serve.yaml").write_text(example[1])
    assert ServerSettings.load({}, tmp_path / "serve.yaml").host == "0.0.0.0"
