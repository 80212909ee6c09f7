"""STS score and held-out language loss of the starter's mean-pooled base and of any GEM directories, side by side.

python examples/score.py --pairs STSBenchmark.test.jsonl.gz --text held_out.txt.gz DIR [DIR ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemify import GemModel
from gemify.evaluation.language import language_loss
from gemify.evaluation.sts import read_pairs, spearman
from gemify.model.base import load_base
from gemify.model.batching import length_groups
from gemify.model.passes import right_pad
from gemify.training.data import Source


class MeanPooled:
    """The base model's last hidden states, averaged over a text's tokens."""

    def __init__(self, lm: Any, tokenizer: Any) -> None:
        self.lm, self.tokenizer = lm, tokenizer

    @torch.inference_mode()
    def encode(self, inputs: list[str], *, batch_size: int = 32) -> np.ndarray:
        rows = self.tokenizer(inputs)["input_ids"]
        out = np.zeros((len(rows), self.lm.config.hidden_size), dtype=np.float32)
        for group in length_groups([len(r) for r in rows], max_tokens=4096):
            ids_BT, mask_BT = (t.to(self.lm.device) for t in right_pad([rows[i] for i in group]))
            hidden = self.lm.get_decoder()(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
            out[group] = ((hidden * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)).float().cpu().numpy()
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--text", required=True, help="held-out text; the last 500 rows are used")
    options = parser.parse_args()
    pairs = read_pairs(options.pairs)
    held_out = [example.text for example in Source(options.text)][-500:]
    lm, tokenizer = load_base("starter")
    print(f"{'model':40} {'STS Spearman':>12} {'held-out loss':>20}")
    print(
        f"{'base, mean-pooled':40} {spearman(MeanPooled(lm, tokenizer), pairs):12.2f} {language_loss(lm, tokenizer, held_out)!r:>20}"
    )
    for directory in options.directories:
        gem = GemModel.from_pretrained(directory)
        loss = language_loss(gem.lm, gem.tokenizer, held_out)
        print(f"{directory!s:40} {spearman(gem, pairs):12.2f} {loss!r:>20}")


if __name__ == "__main__":
    main()
