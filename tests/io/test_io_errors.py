"""One line of an error, and vectors of length 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemify.io.tables import first_line
from gemify.io.vectors import normalize
from gemify.model.base import parse_dtype


def test_the_first_line_of_an_error_or_the_name_of_its_type() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line("a\nb") == "a"


def test_vectors_of_length_one_and_zeros_that_stay() -> None:
    vectors = normalize([[3, 4], [0, 0]])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.array([[0.6, 0.8], [0, 0]], dtype=np.float32))
    assert normalize([3.0, 4.0], dtype=np.float64).dtype == np.float64


def test_dtypes_by_name() -> None:
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int8': choose one of float32, bfloat16, float16"):
        parse_dtype("int8")
