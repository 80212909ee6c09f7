"""The plugin of the command `llm`, by the real package: chat, conversations, embeddings and similar texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import children
from gemify import GemModel
from tiny_gems import save_gem

llm = pytest.importorskip("llm")
from gemify.integrations import llm as llm_plugin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:llm")


@pytest.fixture
def directory(base_dir: Path, tmp_path: Path) -> Path:
    return save_gem(base_dir, tmp_path / "my-gem")


@pytest.fixture
def registered(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, llm.Model]:
    monkeypatch.setenv(llm_plugin.MODELS_VARIABLE, f"{directory}, ")
    chats: dict[str, llm.Model] = {}
    llm_plugin.register_models(lambda model: chats.setdefault(model.model_id, model))
    return chats


def test_the_shipped_and_the_named_models_are_there(registered: dict[str, llm.Model]) -> None:
    assert set(registered) == {"gemify/starter", "gemify/starter-gated", "gemify/my-gem"}


def test_answers_are_the_models(registered: dict[str, llm.Model], directory: Path) -> None:
    gem = GemModel.from_pretrained(directory)
    options = {"temperature": 0, "max_tokens": 12}
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    conversation = registered["gemify/my-gem"].conversation()
    first = conversation.prompt("What is it?", system="Be brief.", stream=True, **options)
    pieces = list(first)
    assert "".join(pieces) == gem.chat(asked, max_new_tokens=12, do_sample=False)
    assert (first.usage().input, first.usage().output) == (gem.prefill_chat(asked).ids_BT.shape[1], 12)
    asked += [{"role": "assistant", "content": "".join(pieces)}, {"role": "user", "content": "And then?"}]
    second = conversation.prompt("And then?", stream=False, **options)
    assert second.text() == gem.chat(asked, max_new_tokens=12, do_sample=False)


def test_both_sides_share_one_model_and_its_vectors(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llm_plugin.MODELS_VARIABLE, str(directory))
    found: dict[str, llm.EmbeddingModel] = {}
    llm_plugin.register_embedding_models(lambda model: found.setdefault(model.model_id, model))
    vectors = list(found["gemify/my-gem"].embed_multi(["one text", "another"]))
    expected = llm_plugin.load_gem(str(directory)).encode(["one text", "another"])
    assert np.array_equal(np.array(vectors, np.float32), expected)


def test_wrong_settings_are_refused(registered: dict[str, llm.Model]) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        registered["gemify/my-gem"].prompt("x", max_tokens=0).text()


@pytest.fixture
def run_llm(directory: Path, tmp_path: Path) -> Callable[..., str]:
    from importlib.metadata import entry_points

    if not any(e.value == "gemify.integrations.llm" for e in entry_points(group="llm")):
        pytest.skip("gemify is not installed with this entry point: make setup")
    options = {"plugins": "gemify", llm_plugin.MODELS_VARIABLE: str(directory)}
    return partial(children.run_llm, tmp_path / "llm", **options)


def test_the_command(run_llm: Callable[..., str], directory: Path) -> None:
    gem = GemModel.from_pretrained(directory)
    said = run_llm("-m", "gemify/my-gem", "-o", "temperature", "0", "-o", "max_tokens", "8", "Hello there")
    greedy = gem.chat([{"role": "user", "content": "Hello there"}], max_new_tokens=8, do_sample=False)
    assert said.strip() == greedy.strip()
    vector = json.loads(run_llm("embed", "-m", "gemify/my-gem", "-c", "a text"))
    assert np.allclose(vector, gem.encode("a text"), atol=1e-6)
