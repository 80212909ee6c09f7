"""What a schema costs: its compilation, its mask of a token, and answers under it against plain answers as long.

``python tests/engine/grammar_speed.py [schemas] [slowest] [answers]``, with the starter model's 49,152 tokens. First
the sampler alone, under every schema; then the engine, a batch of answers under each of the slowest schemas and plain
answers of as many tokens, in turn. Not a test: figures for docs/log/.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_grammar import schema

from engine_client import Asker, running
from gemify import GemModel
from gemify.bench.serve import traffic
from gemify.engine.engine import Engine
from gemify.engine.grammar import Grammar
from gemify.engine.sampling import Sampler, SamplingParams
from gemify.model.chat_template import ChatTemplate
from gemify.serving.protocol.structured_outputs import json_grammar

_TOKENS = 48


def sampler_times(grammar: Grammar | None, logits_TV: torch.Tensor) -> list[float]:
    """Seconds of each token."""
    sampler, times = Sampler(SamplingParams(temperature=0.0, grammar=grammar)), []
    for logits_V in logits_TV:
        start = time.perf_counter()
        sampler.sample(logits_V)
        times.append(time.perf_counter() - start)
        if sampler.done:
            break
    return times


def answer_all(asker: Asker, prompts: list[list[int]], sampling: list[SamplingParams]) -> tuple[float, list[int]]:
    """Seconds, and the tokens of each answer."""
    start = time.perf_counter()
    all_heard = [asker.write(ids, one) for ids, one in zip(prompts, sampling, strict=True)]
    counts = [heard.finished()[0].completion_tokens for heard in all_heard]
    return time.perf_counter() - start, counts


def main(schemas: str = "500", slowest: str = "5", answers: str = "8") -> None:
    gem = GemModel.from_pretrained("starter-gated")
    compiler = Engine(gem).grammar_compiler()
    compiler.compile(json_grammar({"const": 0}))  # the tokenizer's own tables
    vocabulary = gem.lm.get_output_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    compiling, masks, first = [], {}, []
    for number in range(int(schemas)):
        start = time.perf_counter()
        grammar = compiler.compile(json_grammar(schema(random.Random(number))))
        compiling.append(time.perf_counter() - start)
        times = sampler_times(grammar, torch.randn(_TOKENS, vocabulary, generator=draw) * 3)
        first.append(max(times))
        masks[number] = statistics.fmean(times)
    plain = statistics.fmean(sampler_times(None, torch.randn(_TOKENS, vocabulary, generator=draw)))
    for name, values in {"compile": compiling, "token, mean": [*masks.values()], "token, longest": first}.items():
        print(f"{name}: median {statistics.median(values) * 1e3:.2f} ms, most {max(values) * 1e3:.2f} ms", flush=True)
    print(f"token without a schema: {plain * 1e3:.2f} ms", flush=True)

    chat = ChatTemplate(gem.tokenizer)
    prompts = [list(chat.apply([{"role": "user", "content": r.texts[0]}])) for r in traffic(int(answers), chats=1.0)]
    worst = sorted(masks, key=lambda number: -masks[number])[: int(slowest)]
    with running(gem) as asker:
        never = SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True)
        answer_all(asker, prompts, [never] * len(prompts))
        for number in worst:
            grammar = compiler.compile(json_grammar(schema(random.Random(number))))
            guided = replace(never, ignore_eos=False, grammar=grammar)
            guided_s, plain_s = 0.0, 0.0
            for _ in range(3):
                seconds, counts = answer_all(asker, prompts, [guided] * len(prompts))
                guided_s += seconds
                plain_s += answer_all(asker, prompts, [replace(never, max_tokens=max(1, n)) for n in counts])[0]
            print(
                f"schema {number}: {sum(counts)} tokens, {guided_s / plain_s:.2f} of a plain answer's time", flush=True
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
