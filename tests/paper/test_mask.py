import doctest

import torch
from hypothesis import given
from hypothesis import strategies as st

import gemify.paper.mask
from gemify.paper.mask import LETTERS, dense_mask, draw
from gemify.paper.tokens import Segment


def test_drawn_tables_are_what_is_computed() -> None:
    result = doctest.testmod(gemify.paper.mask)
    assert result.attempted >= 2
    assert result.failed == 0


rows = st.builds(
    lambda pad, m, k, n, hidden: (
        ["_"] * pad + [("h" if i in hidden else "p") for i in range(m)] + ["s"] * k + ["x"] * n
    ),
    st.integers(0, 3),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(0, 6),
    st.sets(st.integers(0, 7)),
)


@given(rows)
def test_rule_holds_for_every_pair_of_columns(letters: list[str]) -> None:
    """The predicate against a spelled-out reading of the paper's three sentences."""
    seen = dense_mask(torch.tensor([[int(LETTERS[c]) for c in letters]]))[0]
    for q, a in enumerate(letters):
        for k, b in enumerate(letters):
            expected = k <= q and b != "_"
            if a == "s":
                expected = expected and (b == "p" or k == q)
            elif a == "x":
                expected = expected and b in "sx"
            assert bool(seen[q, k]) == expected or a == "_", (q, k, a, b)


@given(rows)
def test_every_real_column_sees_itself(letters: list[str]) -> None:
    seen = dense_mask(torch.tensor([[int(LETTERS[c]) for c in letters]]))[0]
    for i, letter in enumerate(letters):
        assert letter == "_" or bool(seen[i, i])


def test_raw_rows_are_plain_causal() -> None:
    seen = dense_mask(torch.full((1, 6), int(Segment.TEXT)))[0]
    assert torch.equal(seen, torch.ones(6, 6, dtype=torch.bool).tril())
    assert draw("pp").count("#") == 3
