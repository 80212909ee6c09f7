"""What a GEM is compared with: embeddings of its untrained base, and any sentence-transformers model.

All methods run the same base weights through the same code, so a difference is the method's. Each turns a text into one
row of tokens and pools the last hidden states over a span of it:

    mean, weighted-mean, last    [text]                                  pooled over the text
    prompteol                    This sentence : "[text]" means in one word:"      its last token
    echo                         Rewrite the sentence: [text], rewritten sentence: [text]   the second text

Sources: position-weighted mean, SGPT (arXiv 2202.08904); PromptEOL (arXiv 2307.16645); Echo (arXiv 2402.15449).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gemify.io.tables import first_line
from gemify.model.base import max_positions
from gemify.model.forward import length_groups, positions_of, right_pad
from gemify.model.tokenization import PLAIN, PROMPTEOL, TextTokenizer

Baseline = Literal["mean", "weighted-mean", "last", "prompteol", "echo"]
BASELINES: tuple[Baseline, ...] = ("mean", "weighted-mean", "last", "prompteol", "echo")
_TEMPLATES = {"prompteol": PROMPTEOL, "echo": "Rewrite the sentence: {text}, rewritten sentence: "}


@dataclass(frozen=True)
class BaselineEncoder:
    """A base model's embeddings by one of `BASELINES`."""

    lm: Any
    tokenizer: Any
    method: Baseline
    max_length: int = 512
    """Maximum tokens of a text; a longer one is cut at the end, as is one that the model has no positions for."""

    def __post_init__(self) -> None:
        if self.method not in BASELINES:
            raise ValueError(f"unknown baseline {self.method!r}: choose from {', '.join(BASELINES)}")

    @torch.inference_mode()
    def encode(
        self,
        inputs: Sequence[str],
        *,
        prompt: str | None = None,
        batch_size: int = 64,
        max_tokens: int = 8192,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Embed texts.

        Args:
            inputs: Texts.
            prompt: Stands before every text and is not pooled.
            batch_size: Most texts of a batch.
            max_tokens: Most tokens of a batch, padding included.
            show_progress_bar: Show a bar on stderr.

        Returns:
            Vectors [N, D], float32.
        """
        distinct = list(dict.fromkeys(inputs))
        rows = self._rows(distinct, prompt)
        out: np.ndarray | None = None
        bar = tqdm(total=len(rows), desc="encode", unit="text", disable=not show_progress_bar)
        for group in length_groups([len(ids) for ids, _ in rows], max_tokens=max_tokens):
            for first in range(0, len(group), batch_size):
                some = group[first : first + batch_size]
                vectors_BD = self._pool([rows[i] for i in some]).float().cpu().numpy()
                if out is None:
                    out = np.zeros((len(rows), vectors_BD.shape[1]), dtype=np.float32)
                out[some] = vectors_BD
                bar.update(len(some))
        bar.close()
        if out is None:
            return np.zeros((0, self.lm.config.get_text_config().hidden_size), dtype=np.float32)
        place = {text: at for at, text in enumerate(distinct)}
        return out[[place[text] for text in inputs]]

    def _rows(self, texts: Sequence[str], prompt: str | None) -> list[tuple[list[int], int]]:
        """Ids of each row, and the column at which its pooled span starts."""
        tokenize = TextTokenizer(self.tokenizer, frozenset(), _TEMPLATES.get(self.method, PLAIN))
        before = tokenize.tokenize_plain([prompt])[0] if prompt else []
        empty = tokenize.tokenize_plain(["\n"])[0]  # a text without tokens still has a vector
        start, right = tokenize.bos_ids + before + tokenize.prefix_ids, tokenize.suffix_ids
        times = 2 if self.method == "echo" else 1
        positions = max_positions(self.lm) or math.inf
        room = min(self.max_length, (positions - len(start) - len(right)) // times)
        if room < 1:
            raise ValueError(f"the prompt leaves no room for a text in {positions} positions: shorten it")
        bodies = [ids or empty for ids in tokenize.tokenize_plain(texts, max_tokens=int(room))]
        if self.method == "echo":
            fronts = [start + ids + right for ids in bodies]
            return [(front + ids, len(front)) for front, ids in zip(fronts, bodies, strict=True)]
        return [(start + ids + right, len(start)) for ids in bodies]

    def _pool(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        ids_BT, mask_BT = (t.to(self.lm.device) for t in right_pad([ids for ids, _ in rows]))
        hidden_BTD = self.lm.get_decoder()(
            input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=positions_of(mask_BT), use_cache=False
        ).last_hidden_state.float()
        lengths_B = mask_BT.sum(-1)
        if self.method in ("last", "prompteol"):
            return hidden_BTD[torch.arange(len(rows), device=ids_BT.device), lengths_B - 1]
        start_B1 = torch.tensor([[start] for _, start in rows], device=ids_BT.device)
        columns_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None].expand_as(ids_BT)
        weights_BT = (mask_BT & (columns_BT >= start_B1)).float()
        if self.method == "weighted-mean":
            weights_BT = weights_BT * (columns_BT - start_B1 + 1)
        return (hidden_BTD * weights_BT[..., None]).sum(1) / weights_BT.sum(1, keepdim=True)


class BidirectionalEncoder(BaselineEncoder):
    """The base without its causal mask, mean over the text: LLM2Vec (arXiv 2404.05961) without its training."""

    def _pool(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        ids_BT, mask_BT = (t.to(self.lm.device) for t in right_pad([ids for ids, _ in rows]))
        visible_B1TT = mask_BT[:, None, None, :].expand(-1, 1, ids_BT.shape[1], -1)
        hidden_BTD = self.lm.get_decoder()(
            input_ids=ids_BT, attention_mask=visible_B1TT, use_cache=False
        ).last_hidden_state.float()
        return (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)


def load_sentence_transformer(name: str, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A sentence-transformers model from a directory or the hub; ValueError in one line if there is none."""
    from sentence_transformers import SentenceTransformer

    path = Path(name)
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise ValueError(f"no such sentence-transformers directory: {name}")
    try:
        return SentenceTransformer(name, device=device, model_kwargs={"dtype": dtype})
    except Exception as error:  # it raises whatever its modules and the hub raise
        reason = first_line(error)
        raise ValueError(f"cannot load the sentence-transformers model {name!r}: {reason}") from error
