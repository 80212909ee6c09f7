from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemify.paper.views import VIEW_KINDS, Views

texts = st.lists(st.integers(0, 50), min_size=1, max_size=40)


@given(texts, st.sampled_from(VIEW_KINDS), st.floats(0.0, 0.95), st.booleans(), st.integers())
def test_a_view_is_never_empty_and_keeps_the_order(
    text: list[int], kind: str, rate: float, both: bool, seed: int
) -> None:
    first, second = Views(kind, rate, both).of_text(text, Random(seed))  # type: ignore[arg-type]
    for view in (first, second):
        assert len(view.ids) == len(view.seen)
        assert any(view.seen)
        rest = iter(text)
        assert all(token in rest for token in view.ids)  # a subsequence
    if not both and kind != "halves":
        assert first.ids == tuple(text)
        assert all(first.seen)


def test_delete_drops_at_the_rate_and_mask_keeps_the_ids() -> None:
    text = list(range(10_000))
    _, deleted = Views("delete", 0.3).of_text(text, Random(0))
    assert len(deleted.ids) == pytest.approx(7000, abs=150)
    assert all(deleted.seen)
    _, masked = Views("mask", 0.3).of_text(text, Random(0))
    assert masked.ids == tuple(text)
    assert sum(masked.seen) == pytest.approx(7000, abs=150)


def test_halves_share_nothing_and_cover_the_text() -> None:
    for seed in range(20):
        first, second = Views("halves").of_text(list(range(9)), Random(seed))
        assert (*first.ids, *second.ids) == tuple(range(9))
        assert len(first.ids) >= 3
        assert len(second.ids) >= 3


def test_span_is_a_run() -> None:
    for seed in range(20):
        _, view = Views("span", 0.5).of_text(list(range(10)), Random(seed))
        assert len(view.ids) == 5
        assert view.ids == tuple(range(view.ids[0], view.ids[0] + 5))


def test_the_same_seed_gives_the_same_views() -> None:
    views = Views("delete", 0.5, both=True)
    assert views.of_text(list(range(30)), Random(4)) == views.of_text(list(range(30)), Random(4))


@given(texts, texts, st.sampled_from(VIEW_KINDS), st.booleans(), st.integers())
def test_the_views_of_a_pair_are_its_two_texts_less_what_is_dropped(
    anchor: list[int], positive: list[int], kind: str, both: bool, seed: int
) -> None:
    first, second = Views(kind, 0.3, both).of_pair(anchor, positive, Random(seed))  # type: ignore[arg-type]
    for view, text in ((first, anchor), (second, positive)):
        assert any(view.seen)
        rest = iter(text)
        assert all(token in rest for token in view.ids)  # a subsequence
    if not both:
        assert (first.ids, all(first.seen)) == (tuple(anchor), True)
    first, second = Views("delete", 0.0).of_pair(anchor, positive, Random(seed))
    assert (first.ids, second.ids) == (tuple(anchor), tuple(positive))


def test_a_pair_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Views().of_pair([1], [], Random(0))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_a_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="drop rate"):
        Views("delete", rate)


def test_an_unknown_way_and_an_empty_text_are_refused() -> None:
    with pytest.raises(ValueError, match="delete, mask, span, halves"):
        Views("shuffle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one token"):
        Views().of_text([], Random(0))
