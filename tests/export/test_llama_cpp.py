"""llama.cpp on an exported GEM: chat and embeddings from one server. Needs llama.cpp's converters and xllamacpp.

`pip install xllamacpp sentencepiece`, and GEMIFY_LLAMA_CPP: a checkout of llama.cpp (nothing of it needs compiling).
Then `pytest -m long tests/engines`: two minutes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from gemify import GemModel
from gemify.model.base import STARTER_PACKAGE
from gemify.model.export import export

LLAMA_CPP = Path(os.environ.get("GEMIFY_LLAMA_CPP", "no-such-directory"))
MISSING = [name for name in ("xllamacpp", "sentencepiece", STARTER_PACKAGE) if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.real,
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(
        not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(), reason="GEMIFY_LLAMA_CPP is no checkout of llama.cpp"
    ),
]

SPECIAL = "<repo_name>"
TEXTS = [
    "A man is playing a guitar on the stage.",
    "Someone plays an instrument.",
    "The stock market fell sharply on Monday.",
    "x",
    "The committee voted to postpone the decision until the spring. " * 6,
]
QUESTIONS = ["What is the capital of France?", "Name a colour.", "What is two plus three?"]


class Converted(NamedTuple):
    """GGUF files of an exported GEM, and what the library says."""

    model: Path
    adapter: Path | None
    vectors: np.ndarray
    answers: list[str]


def converted(gem: GemModel, directory: Path) -> Converted:
    vectors = gem.encode(TEXTS)
    answers = [
        gem.chat([{"role": "user", "content": question}], max_new_tokens=16, do_sample=False) for question in QUESTIONS
    ]
    written = export(gem, directory / "out")
    model = directory / "model.gguf"
    run("convert_hf_to_gguf.py", written.directory, "--outfile", model)
    adapter = None
    if written.adapters:
        adapter = directory / "adapter.gguf"
        source = written.directory / written.adapters[0]
        run("convert_lora_to_gguf.py", "--base", written.directory, source, "--outfile", adapter)
    return Converted(model, adapter, vectors, answers)


def run(script: str, *arguments: Any) -> None:
    command = [sys.executable, str(LLAMA_CPP / script), "--outtype", "f16", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(LLAMA_CPP / "gguf-py")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The starter with a trained special token and nothing else (``tokens``): weights that any engine can run."""
    gem = GemModel.from_base("starter", tune="tokens")
    assert gem.adapter is not None
    with torch.no_grad():
        rows_KD = gem.adapter.rows.rows_KD
        rows_KD.copy_(torch.randn(rows_KD.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return converted(gem, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return converted(GemModel.from_pretrained("starter-gated"), tmp_path_factory.mktemp("gated"))


class Server:
    """llama.cpp's own HTTP server, in this process."""

    def __init__(self, files: Converted, *, pooling: str, slots: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(files.model)
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_parallel = 2048 * slots, 2048, 2048, slots
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.embedding, settings.warmup, settings.verbosity = True, False, 0
        settings.port, settings.hostnames = 0, ["127.0.0.1"]
        settings.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
        if files.adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(files.adapter), 1.0)]
        self.server = xllamacpp.Server(settings)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def chat(self, question: str) -> str:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
        return str(self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def embed(self, text: str) -> list[float]:
        return list(self.post("/v1/embeddings", {"input": text + SPECIAL})["data"][0]["embedding"])

    def embed_gated(self, text: str) -> list[float]:
        """The special token twice, its first state: llama.cpp's adapter acts from the token before the last one on."""
        return list(self.post("/embeddings", {"content": text + SPECIAL + SPECIAL})[0]["embedding"][-2])

    def mixed(self, embed: Any) -> tuple[np.ndarray, list[str]]:
        """Embeddings and chats from four clients at once."""
        with ThreadPoolExecutor(4) as pool:
            vectors = [pool.submit(embed, text) for text in TEXTS]
            answers = [pool.submit(self.chat, question) for question in QUESTIONS]
            again = [pool.submit(embed, text) for text in TEXTS]
            first, second = (np.array([f.result() for f in each]) for each in (vectors, again))
            np.testing.assert_allclose(first, second, atol=1e-3)
            return first, [f.result() for f in answers]


@pytest.fixture(scope="module")
def plain_server(plain: Converted) -> Server:
    return Server(plain, pooling="last", slots=4)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_both_routes_at_once(plain: Converted, plain_server: Server) -> None:
    vectors, answers = plain_server.mixed(plain_server.embed)
    assert cosines(vectors, plain.vectors).min() > 0.9999
    assert answers == plain.answers


def test_the_file_names_its_special_token(plain: Converted) -> None:
    tags = GGUFReader(plain.model).fields["general.tags"].contents()
    assert f"special-token:{SPECIAL}" in tags


def test_a_gated_gem_with_one_slot(gated: Converted) -> None:
    server = Server(gated, pooling="none", slots=1)
    vectors, answers = server.mixed(server.embed_gated)
    assert cosines(vectors, gated.vectors).min() > 0.9999
    assert answers == gated.answers
    with pytest.raises(urllib.error.HTTPError, match="400"):  # OpenAI's route wants one vector a text
        server.embed(TEXTS[0])


def test_a_gated_gem_pooled_by_llama_cpp_is_another_vector(gated: Converted) -> None:
    """A fault of theirs that docs/how-to/engines.md warns of. Once this fails, the plain route serves gated GEMs."""
    server = Server(gated, pooling="last", slots=1)
    assert cosines(np.array([server.embed(text) for text in TEXTS]), gated.vectors).max() < 0.9999
