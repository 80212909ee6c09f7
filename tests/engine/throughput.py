"""Tokens a second of many answers: transformers one by one, its padded batch, its continuous batching, the engine.

``python tests/engine/throughput.py [float32|bfloat16] [answers] [tokens]``, with the starter model, greedily; each way
twice, in turn. Not a test: figures for docs/log/.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_client import running
from gemify import GemModel
from gemify.bench.serve import traffic
from gemify.engine.sampling import SamplingParams
from gemify.model.chat_template import ChatTemplate
from gemify.model.forward import left_pad


def main(dtype: str = "float32", answers: str = "16", tokens: str = "48") -> None:
    gem = GemModel.from_pretrained("starter-gated", dtype=getattr(torch, dtype))
    lm, count, new = gem.lm, int(answers), int(tokens)
    chat = ChatTemplate(gem.tokenizer)
    prompts = [list(chat.apply([{"role": "user", "content": r.texts[0]}])) for r in traffic(count, chats=1.0)]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 2}
    never = SamplingParams(
        max_tokens=new, temperature=0.0, logit_bias={2: -100.0}
    )  # the end token: all are equally long

    @torch.inference_mode()
    def one_by_one() -> None:
        for ids in prompts[:4]:
            lm.generate(torch.tensor([ids]), **options)

    @torch.inference_mode()
    def padded() -> None:
        ids_BT, mask_BT = left_pad(prompts, fill=2)
        lm.generate(ids_BT, attention_mask=mask_BT.long(), **options)

    def continuous() -> None:
        free = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=2)
        small = ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=512
        )  # its own choice takes all memory there is
        lm.generate_batch(inputs=prompts, generation_config=free, continuous_batching_config=small, progress_bar=False)

    ways: dict[str, tuple[Callable[[], None], int]] = {
        "generate, one by one": (one_by_one, 4),
        "generate, one padded batch": (padded, count),
        "generate_batch (continuous batching)": (continuous, count),
    }
    for _ in range(2):
        for name, (way, made) in ways.items():
            start = time.perf_counter()
            way()
            print(f"{name}: {made * new / (time.perf_counter() - start):.1f} tokens/s", flush=True)
        with running(gem, prefix_cache_bytes=0) as asker:
            start = time.perf_counter()
            for heard in [asker.write(ids, never) for ids in prompts]:
                heard.wait()
            print(f"the engine: {count * new / (time.perf_counter() - start):.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
