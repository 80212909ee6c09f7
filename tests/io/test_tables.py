"""Markdown tables."""

from __future__ import annotations

import pytest

from gemify.io.tables import escape_markdown, format_number, markdown_table


def test_a_table_is_githubs() -> None:
    expected = "| a | b |\n|---|---|\n| 1 | 2 |\n| x\\|y | two lines |"
    assert markdown_table(["a", "b"], [["1", "2"], ["x|y", "two\nlines"]]) == expected
    assert markdown_table(["a", "b", "c"], [], numeric=True) == "| a | b | c |\n|---|--:|--:|"
    assert r"| a\|b |" in markdown_table(["a"], [[escape_markdown("a|b")]])
    with pytest.raises(ValueError, match="a table of 2 columns got a row of 1 cells"):
        markdown_table(["a", "b"], [["1"]])


def test_text_is_shown_literally() -> None:
    assert escape_markdown("a|b\n*c* snake_case _d_ <e>") == r"a\|b \*c\* snake_case \_d\_ &lt;e&gt;"


def test_numbers_as_cells() -> None:
    assert [format_number(v) for v in (1, 2.345, None, "cpu", True, float("nan"))] == [
        "1.00",
        "2.35",
        "–",
        "cpu",
        "True",
        "not finite",
    ]
