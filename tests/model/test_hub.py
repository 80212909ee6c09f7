"""Uploading to the Hugging Face Hub and loading from there, against a local stand-in of its HTTP interface."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from gemify import GemModel
from gemify.model.config import CONFIG_FILE
from running_hub import TOKEN, Hub, in_a_child, running_hub, use_hub
from tiny_gems import make_gem, save_gem


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


_BEFORE = """
import json, sys
from gemify import GemModel
def tried(work):
    try:
        return work()
    except ValueError as error:
        return str(error)
"""
_PUSH_AND_LOAD = (
    _BEFORE
    + """
one, other, base = sys.argv[1:]
def vector(**options):
    return GemModel.from_pretrained("me/my-gem", base=base, **options).encode("hello").tolist()
push = GemModel.from_pretrained(one).push_to_hub
address = push("me/my-gem", base_model="me/base", private=True)
GemModel.from_pretrained(other).push_to_hub("me/my-gem", base_model="me/base", revision="v2")
push("me/mine", base_model="me/base")
print(json.dumps([address, vector(), vector(revision="v2"), tried(lambda: vector(revision="v9"))]))
"""
)
_WITHOUT_TOKEN = (
    _BEFORE
    + """
gem = GemModel.from_pretrained(sys.argv[1])
print(json.dumps([
    tried(lambda: gem.push_to_hub("me/new", base_model="me/base")),
    tried(lambda: GemModel.from_pretrained("me/my-gem", base=sys.argv[2])),
]))
"""
)


def test_a_gem_goes_to_the_hub_and_comes_back(hub: Hub, base_dir: Path, tmp_path: Path) -> None:
    directory = save_gem(base_dir, tmp_path / "gem")
    other = make_gem(base_dir, seed=7)
    other.save_pretrained(tmp_path / "other")
    hub.repos["me/mine"] = {"main": [{"README.md": b"# Mine\n"}]}
    paths = (directory, tmp_path / "other", base_dir)
    address, vector, of_branch, wrong = in_a_child(hub, tmp_path / "home", _PUSH_AND_LOAD, *paths, token=TOKEN)
    assert address.startswith(f"{hub.url}/me/my-gem/commit/")
    assert hub.private == {"me/my-gem"}
    assert hub.messages == ["Upload GEM"] * 3
    files = hub.files("me/my-gem")
    assert files is not None
    assert {"adapter_model.safetensors", CONFIG_FILE, "modules.json", "README.md", "tokenizer.json"} <= set(files)
    assert json.loads(files[CONFIG_FILE])["base"] == "me/base"
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["base_model"] == "me/base"
    assert {"embeddings", "gemify"} <= set(card.data.tags or [])
    assert str(tmp_path) not in "".join(f.decode("latin-1") for f in files.values())
    mine = hub.files("me/mine")
    assert mine is not None
    assert mine["README.md"] == b"# Mine\n", "a card that is there is kept"
    for found, gem in ((vector, GemModel.from_pretrained(directory)), (of_branch, other)):
        assert torch.equal(torch.tensor(found), torch.as_tensor(gem.encode("hello")))
    assert wrong == "the Hugging Face repo me/my-gem has no revision v9"

    gone = in_a_child(hub, tmp_path / "other-home", _WITHOUT_TOKEN, directory, base_dir, token=None)
    assert gone[0].startswith("cannot upload to me/new: ")
    assert gone[1] == "me/my-gem is neither a directory nor a Hugging Face repo that can be reached"
    assert set(hub.repos) == {"me/my-gem", "me/mine"}


def test_gems_go_into_a_collection(hub: Hub, base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        gem = make_gem(base_dir, seed=len(name))
        gem.config = dataclasses.replace(gem.config, base="me/base")
        gem.save_pretrained(tmp_path / name)
    (tmp_path / "two" / "README.md").write_text("# Measured\n")
    use_hub(monkeypatch, hub, tmp_path / "home", token=TOKEN)
    load = GemModel.from_pretrained
    monkeypatch.setattr(GemModel, "from_pretrained", lambda path: load(path, base=base_dir))
    main = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "publish_collection.py"))["main"]
    arguments = ("me", "My GEMs", str(tmp_path / "one"), str(tmp_path / "two"))
    addresses = [main(*arguments), main(*arguments)]
    ((slug, items),) = hub.collections.items()
    assert addresses == [f"{hub.url}/collections/{slug}"] * 2
    assert items == ["me/one", "me/two"]
    cards = [hub.files(repo)["README.md"] for repo in items]  # type: ignore[index]
    assert b"# me/one" in cards[0]
    assert cards[1] == b"# Measured\n"


def test_a_base_of_this_machine_is_refused(base_dir: Path) -> None:
    with pytest.raises(ValueError, match="is a path of this machine, where nobody else finds it: give base_model"):
        make_gem(base_dir).push_to_hub("me/my-gem")
