"""Losses of the two ways (cache surgery, masked pass) against each other and against plain sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gemify.training.output_head as output_head
import tiny_models
from gemify import GemModel
from gemify.model.forward import MaskedBatch, masked_pass, special_pass, text_pass
from gemify.model.tokenization import TextTokenizer
from gemify.paper.objectives import info_nce, next_token_loss
from gemify.paper.tokens import build_inputs, raw_row, reconstruction_row, split_row
from gemify.paper.views import View, full_view
from gemify.training.batches import Batches
from gemify.training.examples import Source
from gemify.training.objective import MicroBatch, target_count
from gemify.training.recipe import Recipe
from tiny_gems import make_gem, make_objective

ROWS = [
    split_row(list(range(20, 32)), 5),
    reconstruction_row(list(range(40, 47)), end_ids=[2]),
    split_row(list(range(60, 63)), 2),
    split_row(list(range(70, 90)), 19),
]
VIEWS = [
    (full_view([20, 21, 22, 23, 24]), full_view([20, 22, 24])),
    (full_view([30, 31]), View((30, 31), (False, True))),
    (View((50, 51, 52, 53), (True, False, True, True)), View((50, 51, 52, 53), (False, True, True, True))),
]


def templated(gem: GemModel, template: str) -> list[tuple[View, View]]:
    """`VIEWS` as `Batches` lays them out."""
    tokenize = TextTokenizer(gem.tokenizer, frozenset(gem.special_ids), template)
    batches = Batches(Recipe.from_dict({"template": template}), Source("a-data-set"), tokenize, end_id=None)
    return [(batches.add_template(first), batches.add_template(second)) for first, second in VIEWS]


def batch(alpha: float, **options: Any) -> MicroBatch:
    targets = sum(target_count(r, frozen_base=True) for r in ROWS)
    return MicroBatch(alpha, list(ROWS), list(VIEWS), step_targets=targets, **options)


@pytest.mark.parametrize("template", ["{text}", 'say : "{text}" is:"'])
@pytest.mark.parametrize(("k", "pooling", "shared"), [(1, "mean", True), (3, "mean", True), (2, "concat", False)])
def test_cache_surgery_has_the_losses_and_gradients_of_the_masked_pass(
    base_dir: Path, k: int, pooling: Any, shared: bool, template: str
) -> None:
    gem = make_gem(base_dir, special_tokens=k, pooling=pooling, shared_position=shared)
    assert gem.adapter is not None
    trained = [*gem.adapter.lora_parameters(), gem.adapter.rows.rows_KD]
    frozen = make_objective(gem, frozen=True)
    views = templated(gem, template)
    surgery = frozen(replace(batch(0.5), views=views))
    surgery.total.backward()
    ours = [p.grad.clone() for p in trained if p.grad is not None]
    assert len(ours) == len(trained)
    for p in trained:
        p.grad = None

    masked = make_objective(gem, frozen=False)
    # the same targets by hand: the suffix only
    ntp = torch.zeros(())
    for row in ROWS:
        laid = build_inputs(row, gem.special_ids, shared_position=shared)
        logits = masked_pass(gem.lm, MaskedBatch.of([laid], shared_position=shared))[0]
        at = len(row.prefix) + k
        picked = logits[at - 1 : at - 1 + len(row.suffix)].log_softmax(-1)
        ntp = ntp - picked.gather(1, torch.tensor(row.suffix)[:, None]).sum()
    ntp = ntp / sum(len(r.suffix) for r in ROWS)
    contrastive = masked(MicroBatch(1.0, views=views)).contrastive
    torch.testing.assert_close(surgery.ntp, ntp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(surgery.contrastive, contrastive, atol=1e-5, rtol=1e-5)
    (0.5 * ntp + 0.5 * contrastive).backward()
    for mine, p in zip(ours, trained, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(mine, p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_trained_is_what_encode_gives(base_dir: Path, k: int) -> None:
    """A whole text's view, as a training step embeds it, has the vector that `encode` gives the text."""
    words = 'say : "{text}" is:"'
    gem = make_gem(base_dir, special_tokens=k, template=words)
    texts = ["a cat sat", "the dog"]
    recipe = Recipe.from_dict({"template": words, "special_tokens": k})
    batches = Batches(recipe, Source("a-data-set"), gem.text_tokenizer, end_id=None)
    views = [batches.add_template(full_view(gem.tokenizer(t)["input_ids"])) for t in texts]
    for embed in (make_objective(gem, frozen=True).embed, make_objective(gem, frozen=False).embed):
        torch.testing.assert_close(embed(views), torch.tensor(gem.encode(texts)), atol=1e-5, rtol=1e-5)


def test_grouping_changes_nothing(gem: GemModel) -> None:
    one = make_objective(gem, frozen=True, group_tokens=10_000, pass_overhead_tokens=10_000)(batch(0.5))
    many = make_objective(gem, frozen=True, group_tokens=12, pass_overhead_tokens=0)(batch(0.5))
    torch.testing.assert_close(one.total, many.total, atol=1e-5, rtol=1e-5)
    assert many.counts.padding < one.counts.padding


def test_eight_micro_batches_of_one_row_are_one_batch_of_eight(gem: GemModel) -> None:
    whole_batch = make_objective(gem, frozen=True)(batch(0.0)).total
    targets = sum(len(r.suffix) for r in ROWS)
    parts = [
        make_objective(gem, frozen=True)(MicroBatch(0.0, [row], step_targets=targets, micro_batches=len(ROWS))).total
        for row in ROWS
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole_batch, atol=1e-6, rtol=1e-6)


def test_raw_rows_and_all_tokens_count_when_the_base_is_trained(base_dir: Path) -> None:
    gem = GemModel.from_base(str(base_dir), tune="full")
    rows = [raw_row(list(range(20, 30))), split_row(list(range(40, 48)), 3)]
    targets = sum(target_count(r, frozen_base=False) for r in rows)
    assert targets == 9 + (2 + 5)
    loss = make_objective(gem, frozen=False)(MicroBatch(0.0, rows, step_targets=targets)).total
    expected = torch.zeros(())
    with torch.no_grad():
        raw = gem.lm(input_ids=torch.tensor([rows[0].prefix])).logits[0, :-1].log_softmax(-1)
        expected = expected - raw.gather(1, torch.tensor(rows[0].prefix[1:])[:, None]).sum()
        laid = build_inputs(rows[1], gem.special_ids)
        logits = masked_pass(gem.lm, MaskedBatch.of([laid]))[0].log_softmax(-1)
        for at, label in enumerate(laid.labels):
            if at and label >= 0:
                expected = expected - logits[at - 1, label]
    torch.testing.assert_close(loss, expected / targets, atol=1e-5, rtol=1e-5)


def test_contrast_is_over_the_other_rows(gem: GemModel) -> None:
    losses = make_objective(gem, frozen=True)(MicroBatch(1.0, views=list(VIEWS)))
    vectors = gem.encode([gem.tokenizer.decode(list(VIEWS[0][0].ids))])
    assert vectors.shape == (1, 32)
    assert losses.ntp is None
    embed = make_objective(gem, frozen=True).embed
    both = embed([v for pair in VIEWS for v in pair])
    torch.testing.assert_close(losses.total, info_nce(both[0::2], both[1::2], 20.0), atol=1e-5, rtol=1e-5)


def test_no_lm_head_in_the_contrastive_step(gem: GemModel) -> None:
    calls: list[int] = []
    made = make_objective(gem, frozen=True)
    handle = gem.lm.lm_head.register_forward_hook(lambda *_: calls.append(1))
    made(MicroBatch(1.0, views=list(VIEWS)))
    gem.encode(["a", "b"])
    assert calls == []
    make_objective(gem, frozen=True)(MicroBatch(0.0, list(ROWS)))
    assert calls
    handle.remove()


def test_a_frozen_base_stays_in_evaluation_mode(base_dir: Path) -> None:
    gem = GemModel.from_base(str(base_dir), adapter={"lora_dropout": 0.5})
    frozen = make_objective(gem, frozen=True).train()
    assert not gem.lm.model.layers[0].training
    assert gem.lm.model.layers[0].mlp.up_proj.lora_dropout["default"].training
    frozen.eval()
    assert not gem.lm.model.layers[0].mlp.up_proj.lora_dropout["default"].training


@pytest.mark.parametrize("tune", ["gated", "lora"])
def test_chunks_change_no_gradient_and_hold_less(base_dir: Path, tune: Any) -> None:
    """GradCache: the same gradients as the whole batch, dropout included; a chunk's activations at a time."""
    views = [(full_view(range(20 + i, 27 + i)), full_view(range(60 + i, 67 + i))) for i in range(12)]
    found: dict[int | None, tuple[list[torch.Tensor], int]] = {}
    for chunk in (None, 4):
        torch.manual_seed(5)
        gem = make_gem(base_dir, tune=tune, adapter={"lora_dropout": 0.2})
        assert gem.adapter is not None
        made = make_objective(gem, frozen=tune == "gated", group_tokens=4 * 8, contrastive_chunk_size=chunk).train()
        torch.manual_seed(6)
        held = Held()
        with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda t: t):
            loss = made(MicroBatch(1.0, views=views)).total
        loss.backward()
        trained = [*gem.adapter.lora_parameters(), gem.adapter.rows.rows_KD, made.temperature.t]
        found[chunk] = [p.grad.clone() for p in trained if p.grad is not None], held.elements
        assert len(found[chunk][0]) == len(trained)
    for ours, expected in zip(found[4][0], found[None][0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    assert found[4][1] < found[None][1] / 20


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (12, 1), (6, 4)])
def test_a_batch_of_one_group_is_embedded_once(base_dir: Path, chunk: int | None, passes: int) -> None:
    """Its activations are needed at once: to compute them again would hold no less. Two groups run twice each."""
    gem = make_gem(base_dir, tune="lora")
    made = make_objective(gem, frozen=False, pass_overhead_tokens=4096, contrastive_chunk_size=chunk).train()
    calls: list[int] = []
    gem.lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    views = [(full_view(range(20 + i, 27 + i)), full_view(range(60 + i, 67 + i))) for i in range(6)]
    made(MicroBatch(1.0, views=views)).total.backward()
    assert len(calls) == passes


class Held:
    """Counts the elements that wait for the way back."""

    def __init__(self) -> None:
        self.elements = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.elements += tensor.numel()
        return tensor


def test_chunks_of_any_size_are_the_same_batch(gem: GemModel) -> None:
    losses = [make_objective(gem, frozen=True, contrastive_chunk_size=n)(batch(1.0)).total for n in (None, 1, 2, 100)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], atol=1e-5, rtol=1e-4)


def test_an_anchor_of_several_pairs_runs_once(gem: GemModel) -> None:
    anchor = tuple(range(20, 30))
    views = [(full_view(anchor), full_view([40 + i, 41 + i, 42 + i])) for i in range(3)]
    made = make_objective(gem, frozen=True)
    losses = made(MicroBatch(1.0, views=views))
    assert losses.counts.tokens - losses.counts.padding == 10 + 3 * 3
    vectors = made.embed([v for pair in views for v in pair])
    torch.testing.assert_close(vectors[0], vectors[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vectors[1], made.embed([views[0][1]])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "cohere2", "gemma2"])
def test_the_head_at_targets_only_is_the_same_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and loss together, in chunks, where the model's head is plain; else (scaled, capped logits) its own."""
    lm = tiny_models.build(name, "eager" if name in tiny_models.EAGER_ONLY else "sdpa")
    plain = output_head.has_plain_head(lm)
    assert plain == (name in ("llama", "gpt2", "opt"))
    if not plain:
        return
    monkeypatch.setattr(output_head, "_CPU_CHUNK", 8)
    ids_BT = torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    hidden = lm.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    results = []
    for ours in (True, False):
        lm.zero_grad()
        if ours:
            loss = output_head.target_loss(lm, hidden, ids_BT[:, 1:].flatten())
        else:
            loss = next_token_loss(lm(input_ids=ids_BT).logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in lm.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for ours_g, theirs_g in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours_g, theirs_g, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "opt", "cohere2", "qwen2-window"])
def test_one_special_pass_trains_as_a_pass_of_each_text_does(name: str, tmp_path: Path) -> None:
    """Twenty steps with the texts' KV joined, against a text pass and a special pass of each view alone."""
    base = tiny_models.save(tmp_path / "base", name)
    curves = []
    for joined in (True, False):
        gem = make_gem(base, special_tokens=2)
        assert gem.adapter is not None
        gem.lm.double()  # twenty steps of large random weights multiply float32's rounding
        gem.adapter.double()
        made = make_objective(gem, frozen=True, group_tokens=64, pass_overhead_tokens=1)
        trained = [*gem.adapter.lora_parameters(), gem.adapter.rows.rows_KD]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        losses = []
        for step in range(20):
            views = [(full_view(range(20 + i, 27 + 2 * i + step % 5)), full_view(range(60, 64 + i))) for i in range(6)]
            states_ND = made.embed([v for pair in [*VIEWS, *views] for v in pair]) if joined else None
            if states_ND is None:
                states_ND = torch.cat([alone(gem, v) for pair in [*VIEWS, *views] for v in pair])
            loss = info_nce(states_ND[0::2], states_ND[1::2], 20.0)
            loss.backward()
            losses.append(torch.stack([loss.detach(), torch.stack([p.grad.norm() for p in trained]).norm()]))  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        curves.append(torch.stack(losses))
    torch.testing.assert_close(curves[0], curves[1], atol=1e-5, rtol=1e-5)


def alone(gem: GemModel, view: View) -> torch.Tensor:
    """A view's embedding from passes of its own, with the model's own cache (its sliding windows drop positions)."""
    ids_BT = torch.tensor([view.ids])
    with torch.no_grad():
        text = text_pass(gem.lm, ids_BT, torch.ones_like(ids_BT).bool())
    seen_BT = torch.tensor([view.seen])
    hidden_BKD = special_pass(gem.lm, text, gem.special_ids, seen_BT=seen_BT).hidden_BKD
    assert hidden_BKD is not None
    return hidden_BKD.mean(1)


def test_special_passes_are_few_and_bounded(gem: GemModel) -> None:
    """One pass forward for a batch whose KV fits ``group_tokens``, however many text passes it takes."""
    views = [(full_view(range(20, 24 + i)), full_view(range(60, 66 + 3 * i))) for i in range(6)]
    tokens = []
    gem.lm.model.layers[0].register_forward_hook(lambda _, args, __: tokens.append(tuple(args[0].shape[:2])))
    for group_tokens, specials in ((512, 1), (128, 2)):
        tokens.clear()
        made = make_objective(gem, frozen=True, group_tokens=group_tokens, pass_overhead_tokens=4)
        made(MicroBatch(1.0, views=views))
        assert sum(T == 1 for _, T in tokens) == specials
        assert sum(T > 1 for _, T in tokens) > 1
        assert sum(B for B, T in tokens if T == 1) == 12


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "qwen2-window"])
@pytest.mark.parametrize(("layer", "chunk"), [(None, None), (1, None), (None, 3)])
def test_cached_texts_train_as_texts_that_run(name: str, layer: int | None, chunk: int | None, tmp_path: Path) -> None:
    """Two epochs over the same views; in the second no token of a text runs."""
    gem = make_gem(tiny_models.save(tmp_path / "base", name), special_tokens=2, layer=layer)
    assert gem.adapter is not None
    trained = [*gem.adapter.lora_parameters(), gem.adapter.rows.rows_KD]
    ran: list[int] = []
    gem.lm.get_input_embeddings().register_forward_hook(lambda _, args, __: ran.append(args[0].shape[-1]))
    epochs = []
    for cached in (0, 10**9):
        options = {"text_cache_bytes": cached, "contrastive_chunk_size": chunk}
        made = make_objective(gem, frozen=True, group_tokens=64, pass_overhead_tokens=1, **options)
        for _ in range(2):
            ran.clear()
            losses = made(batch(1.0))
            losses.total.backward()
            epochs.append([losses.total.detach(), *(p.grad.clone() for p in trained if p.grad is not None)])
            for p in trained:
                p.grad = None
    for epoch in epochs[1:]:
        torch.testing.assert_close(epoch, epochs[0], atol=1e-5, rtol=1e-4)
    assert max(ran) == 2, "only the special tokens run"
    assert losses.counts.cached == sum(len(ids) for ids in {v.ids for pair in VIEWS for v in pair})


def test_a_text_cache_is_bounded_and_keeps_what_recurs(gem: GemModel) -> None:
    drawn = replace(full_view([30, 31, 32]), recurs=False)
    whole = full_view(range(20, 28))
    made = make_objective(gem, frozen=True, text_cache_bytes=10**9)
    made.embed([whole, drawn])
    cache = made.texts.cache
    assert cache is not None
    assert len(cache) == 1
    assert cache.get(whole.ids, None) is not None
    per_token = cache.nbytes // len(whole.ids)
    assert cache.nbytes == len(whole.ids) * per_token
    small = make_objective(gem, frozen=True, text_cache_bytes=12 * per_token)
    first = small.embed([full_view(range(20, 30)), full_view(range(40, 45))])
    again = small.embed([full_view(range(20, 30)), full_view(range(40, 45))])
    torch.testing.assert_close(first, again, atol=1e-5, rtol=1e-4)
    assert small.texts.cache is not None
    assert [len(small.texts.cache), small.texts.cache.nbytes] == [1, 10 * per_token]
