"""A server of /v1/embeddings alone, for any sentence-transformers model: the second server of a two-server stack.

``python -m gemify.bench.encoder_server --encoder PATH --port N``. What waits is encoded together, as embedding servers
do. For comparisons on this machine, nothing else: no keys, no limits.
"""

from __future__ import annotations

import argparse
import queue
import threading
from concurrent.futures import Future
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from gemify.evaluation.models import EvalSettings, load_encoder

_MOST = 64  # texts encoded together


class Wish(BaseModel):
    """A request: one text or several."""

    input: str | list[str]


def create_app(encoder: Any) -> FastAPI:
    """``encoder``: a SentenceTransformer."""
    app = FastAPI()
    asked: queue.Queue[tuple[list[str], Future[Any]]] = queue.Queue()

    def work() -> None:
        while True:
            some = [asked.get()]
            while len(some) < _MOST and not asked.empty():
                some.append(asked.get())
            texts = [text for listed, _ in some for text in listed]
            try:
                vectors = encoder.encode(texts, batch_size=_MOST, normalize_embeddings=True, show_progress_bar=False)
            except Exception as error:
                for _, answer in some:
                    answer.set_exception(error)
                continue
            at = 0
            for listed, answer in some:
                answer.set_result(vectors[at : at + len(listed)])
                at += len(listed)

    threading.Thread(target=work, daemon=True).start()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/embeddings")
    def embeddings(wish: Wish) -> dict[str, Any]:
        texts = [wish.input] if isinstance(wish.input, str) else wish.input
        answer: Future[Any] = Future()
        asked.put((texts, answer))
        data = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(answer.result())]
        tokens = sum(len(ids) for ids in encoder.tokenizer(texts)["input_ids"])
        return {"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    encoder = load_encoder(given.encoder, EvalSettings(given.dtype), None)
    uvicorn.run(create_app(encoder), host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
