"""OpenMP's threads are let go of, and made again: in a process of its own, where no other thread comes or goes."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHILD = """
import os
import torch
from gemify.engine.worker import release_threads

def kept():
    torch.exp(torch.randn(4_000_000))
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
a = torch.randn(512, 512)
expected = a @ a
many = kept()
print("released" if release_threads() else "another library")
few = len(os.listdir("/proc/self/task"))
assert few == many - 2, (few, many)
assert kept() == many
assert release_threads()
torch.testing.assert_close(a @ a, expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is what Linux builds of torch bring")
def test_threads_are_let_go_of_and_made_again() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, timeout=120)
    if done.stdout.strip() == "another library":
        pytest.skip("this build of torch brings another OpenMP library")
    assert done.returncode == 0, done.stderr
