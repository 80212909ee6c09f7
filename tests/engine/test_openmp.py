"""OpenMP's threads are let go of, and made again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gemify.engine.openmp import release_threads


def kept() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is what Linux builds of torch bring")
def test_threads_are_let_go_of_and_made_again() -> None:
    before = torch.get_num_threads()
    a = torch.randn(512, 512)
    expected = a @ a
    try:
        torch.set_num_threads(3)
        torch.exp(torch.randn(4_000_000))
        if not release_threads():
            pytest.skip("this build of torch brings another OpenMP library")
        without = kept()
        torch.exp(torch.randn(4_000_000))
        assert kept() == without + 2
        assert release_threads()
        assert kept() == without
        torch.testing.assert_close(a @ a, expected)
    finally:
        torch.set_num_threads(before)
