"""The figures on llama.cpp in docs/how-to/engines.md.

Run by hand: ``python tests/export/llama_cpp_figures.py STSBenchmark.test.jsonl.gz``.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from test_llama_cpp import Server, converted, cosines

from gemify import GemModel
from gemify.training.callbacks import read_pairs

PAIRS = 150


def main() -> None:
    pairs = read_pairs(Path(sys.argv[1]))[:PAIRS]
    texts = [p.sentence1 for p in pairs] + [p.sentence2 for p in pairs]
    scores = [p.score for p in pairs]

    def sts(vectors: np.ndarray) -> float:
        return 100 * float(spearmanr(cosines(vectors[:PAIRS], vectors[PAIRS:]), scores).statistic)

    gem = GemModel.from_pretrained("starter-gated")
    wanted = gem.encode(texts)
    print(f"library: STS {sts(wanted):.2f}")
    with tempfile.TemporaryDirectory() as directory:
        files = converted(gem, Path(directory))
        for pooling, slots, clients in (("none", 1, 4), ("last", 1, 4), ("none", 4, 1), ("none", 4, 4)):
            server = Server(files, pooling=pooling, slots=slots)
            embed = server.embed if pooling == "last" else server.embed_gated
            with ThreadPoolExecutor(clients) as pool:
                vectors = np.array(list(pool.map(embed, texts)))
            same = cosines(vectors, wanted)
            print(
                f"pooling {pooling}, {slots} slots, {clients} clients: cosine to the library's"
                f" at least {same.min():.6f},"
                f" mean {same.mean():.6f}; STS {sts(vectors):.2f}",
                flush=True,
            )
            del embed, server


if __name__ == "__main__":
    main()
