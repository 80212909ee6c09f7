"""One vLLM engine in a process of its own, in vLLM's own environment: reads a job from stdin, writes what it found.

A job: ``gem`` (or none: the plain base), ``base``, ``prompts`` and ``spelled`` (token ids, to
continue), ``texts`` (to embed).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "block_size": 32,
    "kv_cache_memory_bytes": 8_000_000,
}


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    job = json.loads(sys.stdin.read())
    from vllm import LLM, SamplingParams

    from gemify.integrations.vllm.offline import engine_options

    small: dict[str, Any] = {**SMALL, "kv_cache_memory_bytes": job["kv_cache"]}
    plain = {"model": job["base"], **small}
    llm = LLM(**(engine_options(job["gem"], job["base"], **small) if job["gem"] else plain))
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    def continued(rows: list[list[int]]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids in rows]
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]

    found: dict[str, Any] = {"before": continued(job["prompts"])}
    if job["gem"]:
        found |= embedded(llm, job, greedy)
        found["after"] = continued(job["prompts"])
    # Whoever spells the text and the special token in a prompt gets the base's, also where a block of the cache ends.
    found["spelled"] = continued(job["spelled"])
    json.dump(found, out)
    out.flush()
    os._exit(0)  # vLLM's threads need not be waited for


def embedded(llm: Any, job: dict[str, Any], greedy: Any) -> dict[str, Any]:
    """Vectors, alone and in one batch with prompts to continue; how much of the longest prompt was not run again."""
    from gemify.integrations.vllm.embedder import Embedder, stack_vectors
    from gemify.integrations.vllm.offline import embed

    vectors = embed(llm, job["texts"])
    embedder = Embedder.of(llm.llm_engine.vllm_config, llm.get_tokenizer())
    special = embedder.config.special_ids[0]
    keys, asked, sampling = embedder.requests([[*ids, special] for ids in job["prompts"]])
    chats = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = llm.generate(
        [p for pair in zip(chats, asked, strict=True) for p in pair],
        [s for one in sampling for s in (greedy, one)],
        use_tqdm=False,
    )
    rows = stack_vectors(llm.collective_rpc("gemify_take", args=(keys,)), keys)
    return {
        "vectors": vectors.tolist(),
        "mixed": [list(o.outputs[0].token_ids) for o in outputs[::2]],
        "of_prompts": rows.tolist(),
        "cached": [o.num_cached_tokens for o in outputs[1::2]],
        "again": embed(llm, job["texts"][:1], normalize_embeddings=True, truncate_dim=16).tolist(),
        "left": llm.collective_rpc("gemify_take", args=(keys,)),
    }


if __name__ == "__main__":
    main()
