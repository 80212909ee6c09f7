"""Figures for docs/engines.md: what it saves to embed a text that a chat has run already, in one vLLM engine.

PYTHON_OF_VLLM tests/integrations/vllm_figures.py starter BASE --words 600
"""

from __future__ import annotations

import argparse
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gem")
    parser.add_argument("base")
    parser.add_argument("--words", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from gemify.integrations.vllm_embedder import Embedder
    from gemify.integrations.vllm_offline import embed, engine_options

    more = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4, "max_model_len": 2048, "block_size": 32}
    llm = LLM(**engine_options(given.gem, given.base, kv_cache_memory_bytes=300_000_000, **more))
    embed(llm, ["warm"])
    embedder = Embedder.of(llm.llm_engine.vllm_config, llm.get_tokenizer())
    special = embedder.config.special_ids[0]
    one = SamplingParams(temperature=0.0, max_tokens=1)
    took: dict[str, list[float]] = {"fresh": [], "chat": [], "after the chat": []}
    tokens = 0

    def timed(name: str, prompts: list[list[int]], sampling: object = one) -> None:
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        took[name].append(time.perf_counter() - begin)

    for number in range(given.rounds):
        texts = [" ".join(f"{word} {number} {kind}" for word in range(given.words)) for kind in ("a", "b")]
        fresh, known = (ids[:1500] for ids in embedder.texts.plain(texts))
        tokens = len(known)
        timed("fresh", [[*fresh, special]], embedder.requests([fresh])[2])
        timed("chat", [known])
        timed("after the chat", [[*known, special]], embedder.requests([known])[2])
    for name, seconds in took.items():
        print(f"{name}: {1000 * statistics.median(seconds):.0f} ms, {tokens} tokens")


if __name__ == "__main__":
    main()
