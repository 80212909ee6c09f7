"""The GEM mask inside transformers, on tiny models of many architectures.

Oracles: a plain forward of the same rows (raw rows must not differ by a bit), a changed prefix (nothing may leak), and
the two-pass computation with a cropped KV cache, which uses no mask of ours.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

import tiny_models
from gemify import GemModel
from gemify.model.attention import MaskNotUsedError, gem_mask, require_maskable
from gemify.model.forward import MaskedBatch, masked_pass, positions_of, special_pass, suffix_pass, text_pass
from gemify.model.kv_cache import CACHE_NAME, cache_argument, output_cache
from gemify.paper.tokens import Row, RowInputs, Segment, build_inputs, raw_row, split_row

KERNELS = [
    (name, kernel)
    for name in tiny_models.ARCHITECTURES
    for kernel in ("sdpa", "eager")
    if not (kernel == "sdpa" and name in tiny_models.EAGER_ONLY)
]
ROWS = [
    split_row(list(range(20, 34)), 9),  # a prefix longer than the sliding windows
    raw_row(list(range(40, 54))),
    split_row(list(range(60, 69)), 4),
]


def padded(rows: list[RowInputs], side: str) -> MaskedBatch:
    batch = MaskedBatch.of(rows)
    if side == "right":
        return batch
    width = batch.ids_BT.shape[1]

    def left(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[fill] * (width - len(r.ids)) + [int(v) for v in getattr(r, name)] for r in rows])

    return MaskedBatch(left("ids", 0), left("segments", 0), left("positions", 0), left("labels", -100))


def real(batch: MaskedBatch, row: int) -> torch.Tensor:
    return batch.segments_BT[row] != Segment.PAD


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(("name", "kernel"), KERNELS)
@torch.no_grad()
def test_mask_is_exact(name: str, kernel: str, k: int, side: str) -> None:
    lm = tiny_models.build(name, kernel)
    special = list(range(3, 3 + k))
    batch = padded([build_inputs(r, special) for r in ROWS], side)
    logits = masked_pass(lm, batch)

    # raw row: the same bits as in a plain forward of the same batch
    plain = lm(
        input_ids=batch.ids_BT,
        attention_mask=(batch.segments_BT != Segment.PAD).long(),
        position_ids=positions_of(batch.segments_BT != Segment.PAD),
        use_cache=False,
    ).logits
    assert torch.equal(logits[1][real(batch, 1)], plain[1][real(batch, 1)])

    # leak: cut the special tokens off from the prefix too; then a changed prefix changes nothing in the suffix
    hidden = batch.segments_BT.masked_fill((batch.segments_BT == Segment.TEXT), int(Segment.HIDDEN))
    cut = MaskedBatch(batch.ids_BT, hidden, batch.positions_BT, batch.labels_BT)
    changed_ids = torch.where(hidden == Segment.HIDDEN, batch.ids_BT + 100, batch.ids_BT)
    changed = MaskedBatch(changed_ids, hidden, batch.positions_BT, batch.labels_BT)
    suffix = batch.segments_BT == Segment.SUFFIX
    assert suffix.any()
    # the text decides how many tokens an expert gets at a time, and with it the last bit of its products on some CPUs
    routed = any("experts" in name for name in vars(lm.config))
    torch.testing.assert_close(
        masked_pass(lm, cut)[suffix], masked_pass(lm, changed)[suffix], rtol=0, atol=1e-6 if routed else 0
    )
    # ... and with the special tokens in place it does matter (the test above is not empty)
    within = torch.where(batch.segments_BT == Segment.TEXT, batch.ids_BT + 100, batch.ids_BT)
    other = masked_pass(lm, MaskedBatch(within, batch.segments_BT, batch.positions_BT, batch.labels_BT))
    assert not torch.equal(other[suffix], logits[suffix])

    # two passes with a cropped cache, no mask
    for at in (0, 2):
        row, mine = ROWS[at], logits[at][real(batch, at)]
        m = len(row.prefix)
        at_special, after = two_passes(lm, row, special)
        torch.testing.assert_close(mine[m + k - 1], at_special, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine[m + k :], after, atol=1e-5, rtol=1e-5)


def two_passes(lm: PreTrainedModel, row: Row, special: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the last special token and at the suffix; every special token in a request of its own."""
    prefix = torch.tensor([row.prefix])
    m = prefix.shape[1]
    requests = []
    for token in special:
        out = lm(input_ids=torch.tensor([[*row.prefix, token]]), use_cache=True)
        requests.append(out)
    cache = output_cache(requests[0])
    tails = [
        (
            torch.cat([output_cache(r).layers[i].keys[..., -1:, :] for r in requests], dim=-2),
            torch.cat([output_cache(r).layers[i].values[..., -1:, :] for r in requests], dim=-2),
        )
        for i in range(len(cache.layers))
    ]
    fresh = type(cache)(config=lm.config)
    for index, (keys, values) in enumerate(tails):
        fresh.update(keys, values, index)
    n = len(row.suffix)
    after = lm(
        input_ids=torch.tensor([row.suffix]),
        attention_mask=torch.ones(1, len(special) + n, dtype=torch.long),
        position_ids=torch.arange(m + 1, m + 1 + n)[None],
        **cache_argument(fresh),
    ).logits[0]
    return requests[-1].logits[0, -1], after


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2", "cohere2"])
@torch.no_grad()
def test_cache_surgery_equals_the_masked_pass(name: str, k: int, shared: bool) -> None:
    """passes.py in a left-padded batch of unequal texts against one masked row alone."""
    lm = tiny_models.build(name)
    special = list(range(3, 3 + k))
    rows = [ROWS[0], ROWS[2]]
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    for at, row in enumerate(rows):
        ids[at, 9 - len(row.prefix) :] = torch.tensor(row.prefix)
        mask[at, 9 - len(row.prefix) :] = True
    text = text_pass(lm, ids, mask)
    before = [layer.keys.clone() for layer in text.cache.layers]
    specials = special_pass(lm, text, special, shared_position=shared, with_logits=True)
    suffix = torch.tensor([list(rows[0].suffix), list(rows[1].suffix)])
    after = suffix_pass(lm, specials, suffix, torch.ones_like(suffix, dtype=torch.bool))
    for at, row in enumerate(rows):
        alone = masked_pass(
            lm, MaskedBatch.of([build_inputs(row, special, shared_position=shared)], shared_position=shared)
        )[0]
        m = len(row.prefix)
        torch.testing.assert_close(specials.logits_BV[at], alone[m + k - 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after[at], alone[m + k :], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, text.cache.layers, strict=True))


@torch.no_grad()
def test_packed_rows_equal_rows_alone() -> None:
    """Two rows in one sequence (no 2-D mask, restarting positions), as transformers packs them."""
    lm = tiny_models.build("llama")
    one, two = (
        build_inputs(ROWS[0], [3, 4], shared_position=False),
        build_inputs(ROWS[2], [3, 4], shared_position=False),
    )
    segments = torch.tensor([[int(s) for s in one.segments + two.segments]])
    with gem_mask(segments):
        packed = lm(
            input_ids=torch.tensor([one.ids + two.ids]),
            position_ids=torch.tensor([one.positions + two.positions]),
            use_cache=False,
        ).logits[0]
    alone = [masked_pass(lm, MaskedBatch.of([c]))[0] for c in (one, two)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_no_gradient_reaches_the_prefix_past_the_special_token() -> None:
    lm = tiny_models.build("llama")
    laid = build_inputs(split_row(list(range(20, 30)), 5), [3])
    table = lm.get_input_embeddings()
    for hide, expected_zero in ((True, True), (False, False)):
        segments = [int(Segment.HIDDEN) if hide and s == Segment.TEXT else int(s) for s in laid.segments]
        seen = table(torch.tensor([laid.ids])).detach().requires_grad_()
        with gem_mask(torch.tensor([segments])):
            logits = lm(
                inputs_embeds=seen,
                position_ids=torch.tensor([laid.positions]),
                attention_mask=torch.ones(1, 11, dtype=torch.long),
                use_cache=False,
            ).logits
        logits[0, 6:].square().sum().backward()
        assert seen.grad is not None
        assert bool((seen.grad[0, :5] == 0).all()) is expected_zero


@pytest.mark.parametrize("name", sorted(tiny_models.HYBRIDS))
def test_hybrids_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be made a GEM"):
        require_maskable(tiny_models.build(name, "eager"))


@pytest.mark.parametrize("name", sorted(tiny_models.ARCHITECTURES))
def test_attention_only_models_are_accepted(name: str) -> None:
    lm = tiny_models.build(name, "eager").train()
    require_maskable(lm)  # raises if it refuses
    assert lm.training  # and leaves the model as it was


def test_flash_attention_is_refused(base_dir: Path, tmp_path: Path) -> None:
    GemModel.from_base(str(base_dir)).save_pretrained(saved := tmp_path / "gem")
    lm = tiny_models.build("llama")
    lm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*sdpa"):
        require_maskable(lm)
    for load in (GemModel.from_base, GemModel.from_pretrained):
        with pytest.raises(ValueError, match=r"flash_attention_2.*sdpa"):
            load(str(base_dir if load == GemModel.from_base else saved), attn_implementation="flash_attention_2")


def test_a_mask_that_reaches_no_layer_is_an_error() -> None:
    lm = tiny_models.build("llama")
    ready_made = torch.ones(1, 1, 4, 4, dtype=torch.bool)  # transformers takes a 4-D mask as it is
    with pytest.raises(MaskNotUsedError), torch.no_grad(), gem_mask(torch.ones(1, 4, dtype=torch.long)):
        lm(input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=ready_made, use_cache=False)


@pytest.mark.parametrize("k", [1, 3])
@torch.no_grad()
def test_flex_attention_has_the_mask(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled block mask and kernel, traced but not built as machine code: the same logits as sdpa's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    batch = MaskedBatch.of([build_inputs(r, list(range(3, 3 + k))) for r in ROWS])
    expected = masked_pass(tiny_models.build("llama", "sdpa"), batch)
    flex = tiny_models.build("llama", "flex_attention")
    require_maskable(flex)
    torch.testing.assert_close(masked_pass(flex, batch)[real_columns(batch)], expected[real_columns(batch)])


def test_a_block_mask_of_a_long_row_holds_no_square_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 tokens, the mask as transformers makes it: its memory, and that its blocks are those of the GEM rule."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    L, at, k, side = 8192, 5000, 3, 128
    segments = [Segment.TEXT] * at + [Segment.SPECIAL] * k + [Segment.SUFFIX] * (L - at - k)
    lm = tiny_models.build("llama", "flex_attention")
    embedded = torch.zeros(1, L, lm.config.hidden_size)
    with gem_mask(torch.tensor([segments])):
        made = create_causal_mask(lm.config, embedded, attention_mask=None, **{CACHE_NAME: None})
    assert L < sum(t.numel() * t.element_size() for t in tensors_in(made)) < L * L / 50
    column = torch.arange(L)
    text, special = column < at, (column >= at) & (column < at + k)
    seen = column[None] <= column[:, None]
    seen &= (text[None] & (text | special)[:, None]) | (special[None] & ~text[:, None]) | (column[None] >= at + k)
    seen &= ~(special[None] & special[:, None]) | (column[None] == column[:, None])
    blocks = seen.view(L // side, side, L // side, side)
    assert (side, side) == made.BLOCK_SIZE
    assert torch.equal(made.to_dense()[0, 0].bool(), blocks.any(3).any(1))


def tensors_in(made: object, known: set[int] | None = None) -> list[torch.Tensor]:
    """The tensors that an object keeps alive by its attributes, and its functions by their closures."""
    known = set() if known is None else known
    if id(made) in known or isinstance(made, type):
        return []
    known.add(id(made))
    if isinstance(made, torch.Tensor):
        return [made]
    inside = [cell.cell_contents for cell in getattr(made, "__closure__", None) or ()]
    inside += list(made) if isinstance(made, tuple | list) else list(getattr(made, "__dict__", {}).values())
    return [tensor for part in inside for tensor in tensors_in(part, known)]


def real_columns(batch: MaskedBatch) -> torch.Tensor:
    return batch.segments_BT != Segment.PAD
