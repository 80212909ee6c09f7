"""`gemify mcp`, which the SDK's own client starts as a process, and /mcp of `gemify serve`: both search and answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import tiny_models
from gemify import GemModel
from gemify.cli.main import app
from gemify.rag.pipeline import GemRag
from gemify.retrieval.index import GemIndex
from gemify.retrieval.rerank import rerank_index
from running_server import serving
from tiny_gems import make_gem

mcp = pytest.importorskip("mcp", reason="mcp is not installed: pip install 'gemify[mcp]'")
from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client  # noqa: E402

from gemify.serving.mcp_server import create_local_server  # noqa: E402

HANDSHAKE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}},
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_code(code: str, *, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mcp")
    make_gem(tiny_models.save(root / "base")).save_pretrained(root / "gem")
    (root / "docs").mkdir()
    (root / "docs" / "birds.md").write_text("# Owls\n\nOwls hunt at night.\n\n# Larks\n\nLarks sing at dawn.\n")
    (root / "docs" / "tides.txt").write_text("Tides follow the moon.\n")
    done = run("index", root / "docs", "-s", root / "store", "-m", root / "gem", "-q")
    assert done.exit_code == 0, done.stderr
    return root / "store"


async def test_a_client_searches_reads_lists_and_asks(store: Path) -> None:
    arguments = ["-m", "gemify", "mcp", "--store", str(store), "--max-new-tokens", "6", "-k", "2"]
    started = mcp.StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))
    async with mcp.Client(started) as client:
        assert client.server_info.name == "gemify"
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search", "read_passage", "list_documents", "ask"}
        assert all(tool.annotations.read_only_hint for tool in tools.values())

        async def call(name: str, **given: Any) -> Any:
            result = await client.call_tool(name, given)
            assert not result.is_error, result.content
            assert json.loads(result.content[0].text) == result.structured_content
            return result.structured_content

        found = (await call("search", query="owls", k=1, mode="fts"))["passages"]
        assert "Owls hunt at night." in found[0]["text"]
        assert found[0]["file"].endswith("birds.md")
        around = (await call("read_passage", id=found[0]["id"], before=3, after=3))["passages"]
        assert len(around) == 2
        assert around[0] == {**found[0], "score": 0.0}
        assert "Larks sing at dawn." in around[1]["text"]
        listed = await call("list_documents")
        names = [Path(document["file"]).name for document in listed["documents"]]
        assert (names, listed["total"]) == (["birds.md", "tides.txt"], 2)
        assert [d["passages"] for d in listed["documents"]] == [2, 1]
        assert (await call("list_documents", contains="TIDES", offset=1)) == {"documents": [], "total": 1}
        answered = await call("ask", question="When do owls hunt?")
        alone = run("ask", "When do owls hunt?", "-s", store, "--max-new-tokens", 6, "-k", 2, "--json")
        expected = json.loads(alone.stdout)
        assert answered["answer"] == expected["answer"]
        assert [s["text"] for s in answered["sources"]] == [s["text"] for s in expected["sources"]]

        for name, given, words in (
            ("search", {"query": " "}, "the query is empty"),
            ("search", {"query": "owls", "k": 0}, "greater than or equal to 1"),
            ("read_passage", {"id": "x' OR 1=1 --"}, "no passage"),
            ("read_passage", {"id": "x' OR '1'='1-0"}, "no passage"),
            ("ask", {"question": ""}, "no question given"),
        ):
            result = await client.call_tool(name, given)
            assert result.is_error
            assert words in result.content[0].text
        assert (await call("search", query="moon", k=1, mode="fts"))["passages"][0]["file"].endswith("tides.txt")


async def test_a_reranked_index_is_searched_read_and_listed(store: Path) -> None:
    gem = GemModel.from_pretrained(str(store.parent / "gem"))
    reranked = rerank_index(GemIndex.open(store, gem, create=False), "lm", gem)
    async with mcp.Client(create_local_server(GemRag(gem, reranked))) as client:
        found = (await client.call_tool("search", {"query": "owls", "k": 2})).structured_content["passages"]
        expected = reranked.search("owls", k=2)
        assert [p["id"] for p in found] == [p.id for p in expected]
        assert [p["score"] for p in found] == pytest.approx([p.score for p in expected], abs=1e-5)
        read = await client.call_tool("read_passage", {"id": found[0]["id"]})
        assert read.structured_content["passages"][0]["text"] == found[0]["text"]
        assert (await client.call_tool("list_documents", {})).structured_content["total"] == 2
        for rerank in ("none", "bi"):
            by_name = rerank_index(GemIndex.open(store, gem, create=False), rerank, gem)
            found = (await client.call_tool("search", {"query": "owls", "k": 2, "rerank": rerank})).structured_content
            assert [p["id"] for p in found["passages"]] == [p.id for p in by_name.search("owls", k=2)], rerank
            answered = (await client.call_tool("ask", {"question": "owls", "rerank": rerank})).structured_content
            expected_answer = GemRag(gem, by_name).ask("owls")
            assert answered["answer"] == expected_answer.text
            assert [p["id"] for p in answered["sources"]] == [p.id for p in expected_answer.passages]  # type: ignore[attr-defined]
        wrong = await client.call_tool("search", {"query": "owls", "rerank": "cross"})
        assert (wrong.is_error, "'none', 'bi' or 'lm'" in wrong.content[0].text) == (True, True)


def test_stdout_holds_the_protocol_alone(store: Path) -> None:
    """What a library prints goes to stderr; the end of stdin ends the command."""
    code = (
        "import sys; from gemify.cli import main, serve\n"
        "from gemify.rag.pipeline import GemRag\n"
        "before = GemRag.__init__\n"
        "def noisy(self, *given, **more):\n    print('loud'); before(self, *given, **more)\n"
        "GemRag.__init__ = noisy\n"
        f"sys.argv = ['gemify', 'mcp', '-s', {str(store)!r}]; main.main()"
    )
    done = run_code(code, stdin=json.dumps(HANDSHAKE) + "\n")
    assert done.returncode == 0, done.stderr
    assert "loud" in done.stderr
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert answer["result"]["serverInfo"]["name"] == "gemify"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-s", "missing"], "no store at"),
        (["-s", "STORE", "-m", "starterr"], "starterr"),
        (["-s", "STORE", "--order", "sideways"], "unknown order 'sideways'"),
    ],
)
def test_wrong_use_is_one_line(store: Path, arguments: list[str], words: str) -> None:
    done = run("mcp", *[str(store) if a == "STORE" else a for a in arguments])
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "")
    assert words in str(done.exception)  # of which `gemify.cli.main.main` makes one line


def test_a_missing_package_names_its_extra(store: Path) -> None:
    code = f"import sys; sys.modules['mcp'] = None; sys.argv = ['gemify', 'mcp', '-s', {str(store)!r}]\n"
    code += "from gemify.cli.main import main; main()"
    done = run_code(code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gemify: error: mcp is not installed: pip install 'gemify[mcp]'\n"


async def test_the_server_answers_clients_with_its_keys(store: Path) -> None:
    """/mcp searches and answers as /v1/search and `gemify.search` do, for the same keys and their limits."""
    gem = GemModel.from_pretrained(store.parent / "gem")
    index = GemIndex.open(store, gem, create=False)
    keys = {"ann": "secret-of-ann"}
    with serving(gem, index=index, keys=keys, tokens_per_minute=2000) as served:
        key = {"authorization": "Bearer secret-of-ann"}
        assert served.post("/mcp", HANDSHAKE).status_code == 401
        with served.http(headers=key) as http:
            assert http.get("/mcp").status_code == 405
            assert http.post("/mcp", json=[HANDSHAKE]).json()["error"]["code"] == "invalid_json"
            accepts = {"accept": "application/json, text/event-stream"}
            begun = http.post("/mcp", json=HANDSHAKE, headers=accepts).json()
            assert begun["result"]["serverInfo"]["name"] == "gemify"
            assert http.post("/mcp", json={**HANDSHAKE, "method": "none"}, headers=accepts).json()["error"]
        async with (
            create_mcp_http_client(headers=key) as http,
            mcp.Client(streamable_http_client(f"{served.url}/mcp", http_client=http)) as client,
        ):
            assert len((await client.list_tools()).tools) == 4
            found = (await client.call_tool("search", {"query": "owls", "k": 2})).structured_content["passages"]
            assert found == served.post("/v1/search", {"query": "owls", "k": 2}, **key).json()["data"]
            read = await client.call_tool("read_passage", {"id": found[0]["id"]})
            assert read.structured_content["passages"] == [{**found[0], "score": 0.0}]
            answered = (await client.call_tool("ask", {"question": "owls?"})).structured_content
            question = {"messages": [{"role": "user", "content": "owls?"}], "gemify": {"search": {}}}
            chat = served.post("/v1/chat/completions", {**question, "max_tokens": 256, "temperature": 0}, **key).json()
            assert answered["answer"] == chat["choices"][0]["message"]["content"]
            assert answered["sources"] == chat["gemify"]["sources"]
            refused = await client.call_tool("search", {"query": " "})
            assert (refused.is_error, "the query is empty" in refused.content[0].text) == (True, True)
            refused = await client.call_tool("ask", {"question": " "})
            assert (refused.is_error, "no question given" in refused.content[0].text) == (True, True)
            texts = [
                (await client.call_tool("search", {"query": "owls " * 500, "k": 1})).content[0].text for _ in range(20)
            ]
            assert "more than 2000 tokens a minute: wait" in texts[-1]


async def test_tools_take_the_name_of_a_store_and_how_to_rerank(store: Path, tmp_path: Path) -> None:
    gem = GemModel.from_pretrained(store.parent / "gem")
    (tmp_path / "sea.txt").write_text("Whales sing.\n")
    other = GemIndex.open(tmp_path / "sea", gem)
    other.add(tmp_path / "sea.txt")
    indexes = {"birds": GemIndex.open(store, gem, create=False), "sea": other}
    with serving(gem, index=indexes) as served:
        async with mcp.Client(streamable_http_client(f"{served.url}/mcp")) as client:
            for tool in (await client.list_tools()).tools:
                argument = tool.input_schema["properties"]["store"]
                assert (argument["enum"], argument["default"]) == (["birds", "sea"], "birds")

            async def call(name: str, **given: Any) -> Any:
                return await client.call_tool(name, given)

            for given in ({}, {"store": "birds"}, {"store": "sea"}, {"rerank": "lm"}, {"rerank": "bi"}):
                found = (await call("search", query="owls", k=2, **given)).structured_content["passages"]
                expected = served.post("/v1/search", {"query": "owls", "k": 2, **given}).json()["data"]
                assert [p["id"] for p in found] == [p["id"] for p in expected]
                assert [p["score"] for p in found] == pytest.approx([p["score"] for p in expected], abs=1e-5)
                asked = (await call("ask", question="owls?", **given)).structured_content
                body = {"messages": [{"role": "user", "content": "owls?"}], "max_tokens": 1}
                chat = served.post("/v1/chat/completions", body | {"gemify": {"search": given}}).json()
                assert [s["id"] for s in asked["sources"]] == [s["id"] for s in chat["gemify"]["sources"]]
            read = await call("read_passage", id=other.search("whales", k=1)[0].id, store="sea")
            assert read.structured_content["passages"][0]["text"] == "Whales sing."
            assert (await call("list_documents", store="sea")).structured_content["total"] == 1
            calls = {"search": {"query": "a"}, "ask": {"question": "a"}, "read_passage": {"id": "a-1"}}
            for name, given in {**calls, "list_documents": {}}.items():
                refused = await call(name, store="sky", **given)
                assert (refused.is_error, refused.content[0].text) == (
                    True,
                    f"Error executing tool {name}: no store 'sky': this server has 'birds', 'sea'",
                )
            shutil.rmtree(tmp_path / "sea")
            for name, given in {**calls, "list_documents": {}}.items():
                gone = await call(name, store="sea", **given)
                assert gone.is_error
                assert gone.content[0].text.endswith("the index cannot be read now: see the server's log")
