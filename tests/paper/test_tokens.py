from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemify.paper.tokens import (
    IGNORED,
    Segment,
    build_inputs,
    random_split,
    raw_row,
    reconstruction_row,
    soft_prompt_row,
    split_row,
    summary_row,
)

SPECIALS = [900, 901, 902]


def test_the_five_kinds_of_rows() -> None:
    text = [1, 2, 3, 4]
    assert build_inputs(raw_row(text), SPECIALS).ids == text
    assert build_inputs(split_row(text, 1), SPECIALS).ids == [1, *SPECIALS, 2, 3, 4]
    assert build_inputs(reconstruction_row(text), SPECIALS).ids == [*text, *SPECIALS, *text]
    assert build_inputs(reconstruction_row([2, 3], bos_ids=[1], end_ids=[4]), [9]).ids == [1, 2, 3, 9, 2, 3, 4]
    assert build_inputs(summary_row([1, 2], [3]), SPECIALS).ids == [1, 2, *SPECIALS, 3]
    assert build_inputs(soft_prompt_row([1], [2]), [9]).ids == [1, 9, 2]


@given(st.lists(st.integers(0, 99), min_size=2, max_size=12), st.integers(1, 5), st.booleans(), st.integers())
def test_columns_of_any_split(text: list[int], k: int, shared: bool, seed: int) -> None:
    special = list(range(900, 900 + k))
    at = random_split(len(text), Random(seed))
    laid = build_inputs(split_row(text, at), special, shared_position=shared)
    n = len(laid.ids)
    assert n == len(laid.segments) == len(laid.positions) == len(laid.labels) == len(text) + k
    for token, segment, label in zip(laid.ids, laid.segments, laid.labels, strict=True):
        assert (segment == Segment.SPECIAL) == (token >= 900)
        assert label == (IGNORED if token >= 900 else token)
    assert laid.positions[:at] == list(range(at))
    assert laid.positions[at : at + k] == ([at] * k if shared else list(range(at, at + k)))
    start = at + (1 if shared else k)
    assert laid.positions[at + k :] == list(range(start, start + len(text) - at))


def test_first_suffix_token_is_a_target_and_specials_are_not() -> None:
    laid = build_inputs(split_row([1, 2, 3], 2), SPECIALS)
    assert laid.labels == [1, 2, IGNORED, IGNORED, IGNORED, 3]


@pytest.mark.parametrize("at", [0, 3, 4, -1])
def test_split_outside_the_text_is_refused(at: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.2"):
        split_row([1, 2, 3], at)
