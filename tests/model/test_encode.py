"""Batches of `encode`: no mask where none is needed, little padding, tokenising beside computing, compiled layers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_models
from gemify import GemModel
from gemify.model import encode
from gemify.model.forward import MaskedBatch, length_groups, masked_pass
from gemify.model.tokenization import TextTokenizer
from gemify.paper.tokens import Row, build_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_a_batch_without_a_mask_equals_its_rows_alone(name: str) -> None:
    """Padding on the right is behind every real column: what a row gives alone, under a full mask, it gives here."""
    lm = tiny_models.build(name, "eager" if name in tiny_models.EAGER_ONLY else "sdpa")
    rows = [build_inputs(Row("split", tuple(range(10, 10 + n))), [5]) for n in (9, 17, 1, 12)]
    with torch.no_grad():
        together = masked_pass(lm, MaskedBatch.of(rows), body_only=True)
        for hidden_TD, row in zip(together, rows, strict=True):
            n = len(row.ids)
            alone = lm.get_decoder()(
                input_ids=torch.tensor([row.ids]),
                attention_mask=torch.ones(1, n, dtype=torch.long),
                position_ids=torch.tensor([row.positions]),
                use_cache=False,
            ).last_hidden_state[0]
            torch.testing.assert_close(hidden_TD[:n], alone, atol=2e-5, rtol=1e-4)


def computed(groups: Iterable[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    return [len(group) * max(1, *(lengths[i] for i in group)) for group in groups]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    budget=st.integers(1, 200),
    cost=st.sampled_from([0, 1, 12, 200]),
)
def test_no_other_groups_cost_less(lengths: list[int], budget: int, cost: int) -> None:
    """Against every way to cut the sorted rows."""
    groups = length_groups(lengths, max_tokens=budget, pass_overhead_tokens=cost)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    order, others = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        edges = [0, *(at for at, cut in enumerate(cuts, 1) if cut), len(order)]
        some = [order[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(g) == 1 or c <= budget for g, c in zip(some, computed(some, lengths), strict=True)):
            others.append(sum(computed(some, lengths)) + cost * len(some))
    assert sum(computed(groups, lengths)) + cost * len(groups) == min(others)


@given(lengths=st.lists(st.integers(16, 128), min_size=256, max_size=300))
def test_many_texts_have_little_padding(lengths: list[int]) -> None:
    assert sum(lengths) >= 0.95 * sum(computed(length_groups(lengths, max_tokens=8192), lengths))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text("abc ", max_size=12), min_size=1, max_size=12), pool=st.integers(1, 4))
def test_pools_keep_the_order(gem: GemModel, texts: list[str], pool: int) -> None:
    expected = np.stack([gem.encode(text) for text in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "POOL_SIZE", pool)
        np.testing.assert_allclose(gem.encode(texts), expected, rtol=1e-4, atol=5e-5)


def test_the_next_pool_is_tokenised_while_one_is_computed(gem: GemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch does not go on before the second pool has been tokenised, in another thread."""
    monkeypatch.setattr(encode, "POOL_SIZE", 2)
    tokenised: dict[str, threading.Event] = {"a": threading.Event(), "c": threading.Event(), "e": threading.Event()}
    plain = TextTokenizer.split

    def split(self: TextTokenizer, texts: Sequence[str], **options: Any) -> Any:
        ids = plain(self, texts, **options)
        tokenised[texts[0]].set()
        return ids

    monkeypatch.setattr(TextTokenizer, "split", split)
    waits = iter(["c", "e"])

    def first_of_a_pool(*_: object) -> None:
        if name := next(waits, None):
            assert tokenised[name].wait(30)

    handle = gem.lm.get_decoder().register_forward_pre_hook(first_of_a_pool)
    assert gem.encode(["a", "b", "c", "d", "e"]).shape[0] == 5
    handle.remove()


def test_a_failure_to_tokenise_reaches_the_caller(gem: GemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "POOL_SIZE", 1)
    plain = TextTokenizer.split

    def split(self: TextTokenizer, texts: Sequence[str], **options: Any) -> Any:
        if texts[0] == "bad":
            raise RuntimeError("no such text")
        return plain(self, texts, **options)

    monkeypatch.setattr(TextTokenizer, "split", split)
    with pytest.raises(RuntimeError, match="no such text"):
        gem.encode(["good", "fine", "bad"])
    assert not [t for t in threading.enumerate() if t.name.startswith("gemify-tokenise")]


def test_compiled_layers_serve_encode_alone(gem: GemModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all layers and lengths, the gate within it; without ``compile`` everything has its old bits."""
    texts = ["a cat", "a longer text about a cat", "x" * 40, "y" * 41]
    before, answer = gem.encode(texts), gem.generate("a cat", max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        plain = gem.lm(input_ids=torch.tensor([[7, 8, 9, 10]])).logits
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(encode, "COMPILE_OPTIONS", {"dynamic": True, "fullgraph": True, "backend": backend})
    np.testing.assert_allclose(gem.encode([*texts, "z" * 80], compile=True)[:4], before, atol=1e-5)
    seen = len(graphs)
    assert 1 <= seen <= 2  # the layers share theirs; a batch of one row may have its own
    np.testing.assert_allclose(gem.encode([*texts, "z" * 90, "a" * 9], compile=True)[:4], before, atol=1e-5)
    assert len(graphs) == seen  # other lengths need no other graph
    assert np.array_equal(gem.encode(texts), before)
    assert gem.generate("a cat", max_new_tokens=4, do_sample=False) == answer
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        assert torch.equal(gem.lm(input_ids=ids).logits, plain)  # no gate stays open
    assert len(graphs) == seen
    torch.compiler.reset()
