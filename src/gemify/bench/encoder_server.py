"""A server of /v1/embeddings for a sentence-transformers model: the second server of `gemify bench serve`.

``python -m gemify.bench.encoder_server --encoder PATH --port N``. Waiting requests are encoded together, as embedding
servers do. It has no keys and no limits: use it for comparisons on this machine only.
"""

from __future__ import annotations

import argparse
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from gemify.evaluation.models import EvalSettings, load_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_BATCH_SIZE = 64


class EmbeddingRequest(BaseModel):
    """A request: one text or several."""

    input: str | list[str]


def create_app(encoder: SentenceTransformer) -> FastAPI:
    """The app that serves an encoder."""
    app = FastAPI()
    waiting: queue.Queue[tuple[list[str], Future[Any]]] = queue.Queue()

    def work() -> None:
        while True:
            batch = [waiting.get()]
            while len(batch) < _BATCH_SIZE and not waiting.empty():
                batch.append(waiting.get())
            texts = [text for listed, _ in batch for text in listed]
            try:
                vectors = encoder.encode(
                    texts, batch_size=_BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False
                )
                lengths = [len(ids) for ids in encoder.tokenizer(texts)["input_ids"]]  # may not run beside encode
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(error)
                continue
            at = 0
            for listed, answer in batch:
                answer.set_result((vectors[at : at + len(listed)], sum(lengths[at : at + len(listed)])))
                at += len(listed)

    threading.Thread(target=work, daemon=True).start()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/embeddings")
    def embeddings(request: EmbeddingRequest) -> dict[str, Any]:
        texts = [request.input] if isinstance(request.input, str) else request.input
        answer: Future[Any] = Future()
        waiting.put((texts, answer))
        vectors, tokens = answer.result()
        data = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(vectors)]
        return {"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    return app


def main() -> None:
    """Load the encoder and serve it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    encoder = load_encoder(arguments.encoder, EvalSettings(arguments.dtype), None)
    uvicorn.run(create_app(encoder), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
