"""An embed-corpus run in a process of its own, to be killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def embed(model: str, output: str, inputs: list[Path], tell: Connection) -> None:
    """Embed a corpus; says before and after every step that changes the disk that it takes it."""
    import torch

    from gemify import GemModel
    from gemify.io.directory import Directory
    from gemify.retrieval.bulk import executors, run

    def told(owner: Any, name: str) -> None:
        step = getattr(owner, name)

        def taken(*args: Any, **options: Any) -> Any:
            tell.send(name)
            result = step(*args, **options)
            tell.send(f"{name} done")
            return result

        setattr(owner, name, taken)

    torch.set_num_threads(1)
    told(executors, "write_part")
    told(Directory, "write_if_absent")
    told(run, "commit")
    told(run, "vacuum")
    run.embed_corpus(inputs, output, GemModel.from_pretrained(model), model_name=model, shard_rows=16)
