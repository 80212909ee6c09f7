"""What tests run in a process of its own: an index run that is killed, and reading without permission."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def index(model: str, store: str, corpus: str, tell: Connection) -> None:
    """Index a corpus; says before and after every step of writing to the store that it takes it."""
    import torch

    from gemify import GemModel
    from gemify.rag.index import GemIndex
    from gemify.rag.store import Store

    def told(name: str) -> None:
        step = getattr(Store, name)

        def taken(self: Store, *args: Any) -> Any:
            tell.send(f"{name}")
            result = step(self, *args)
            tell.send(f"{name} done")
            return result

        setattr(Store, name, taken)

    torch.set_num_threads(1)
    for name in ("append", "record", "forget", "finish"):
        told(name)
    gem = GemModel.from_pretrained(model)
    GemIndex.open(store, gem, tokens=48, overlap=8).add(corpus, commit_tokens=300)


def read_as_nobody(root: str, tell: Connection) -> None:
    """Look for files as a user who may do little."""
    from gemify.rag.reading import Columns, find_files, read_file

    "".encode("utf-8-sig")  # a codec is loaded when first used, from where a nobody may not read
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    found = find_files([root])
    read: dict[str, str] = {}
    for path in found.files:
        try:
            read[path.name] = "".join(s.text for s in read_file(path, Columns()))  # type: ignore[union-attr]
        except ValueError as error:
            read[path.name] = f"error: {error}"
    gone = found.is_gone(Path(root) / "locked" / "inside.txt"), found.is_gone(Path(root) / "never.txt")
    tell.send((read, [(s.path, s.reason) for s in found.skipped], gone))
