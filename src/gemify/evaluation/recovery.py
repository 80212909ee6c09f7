"""How much of a text can be decoded from its special tokens (GEM, Appendix B): a quality, and a leak.

From the special tokens' KV a text is decoded greedily; who holds a stored KV can do the same. A *vector* alone cannot
be decoded, so the attack on it is another, weaker one: a linear map, fitted on other texts, guesses which tokens occur.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gemify.model.gem import GemModel
from gemify.model.prefill import common_subsequence_length

LENGTHS = (6, 12, 24, 48, 96)
"""Token lengths that texts are cut to, one for each of the report's buckets."""
_BATCH = 32


def select_texts_by_length(gem: GemModel, texts: Sequence[str], count: int) -> list[str]:
    """Cut about ``count`` texts, evenly over `LENGTHS`, from the given ones; short ones are joined."""
    each = max(1, count // len(LENGTHS))
    tokenize = gem.text_tokenizer
    chosen: list[str] = []
    stream = iter(texts)
    for length in LENGTHS:
        found = 0
        parts: list[str] = []
        for text in stream:
            parts.append(text)
            ids = tokenize.tokenize_plain([" ".join(parts)])[0]
            if len(ids) < length:
                continue
            chosen.append(gem.tokenizer.decode(ids[:length], skip_special_tokens=False).strip())
            parts = []
            found += 1
            if found == each:
                break
    return chosen


def measure_recovery(gem: GemModel, texts: Sequence[str], *, k: int | None = None) -> dict[str, Any]:
    """Decode texts from the KV of the first ``k`` special tokens (default: all) and compare.

    Returns:
        The cell of the report: for each text its length in tokens, whether it was recovered exactly (spaces aside), the
        F1 over tokens, and ROUGE-L.
    """
    with_k = _with_special_tokens(gem, k)
    tokenize = gem.text_tokenizer
    rows: list[dict[str, Any]] = []
    for start in range(0, len(texts), _BATCH):
        some = list(texts[start : start + _BATCH])
        ids = tokenize.tokenize_plain(some)
        back = with_k.recover(some, max_new_tokens=max(len(i) for i in ids) + 8)
        back_ids = tokenize.tokenize_plain(back)
        for text, guess, wanted, got in zip(some, back, ids, back_ids, strict=True):
            rows.append(
                {
                    "text": text,
                    "recovered": guess,
                    "tokens": len(wanted),
                    "exact": _spaced(text) == _spaced(guess),
                    "token_f1": token_f1(wanted, got),
                    "rouge_l": rouge_l(text, guess),
                }
            )
    return {"k": with_k.config.k, "rows": rows}


def token_f1(wanted: Sequence[int], got: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over tokens, counted with repetition."""
    same = sum((Counter(wanted) & Counter(got)).values())
    return 2.0 * same / (len(wanted) + len(got)) if wanted and got else float(not wanted and not got)


def rouge_l(wanted: str, got: str) -> float:
    """ROUGE-L (Lin, 2004): F1 of the longest common subsequence of lower-case words, as ``rouge_score`` gives it."""
    words, back = (re.findall(r"[a-z0-9]+", text.lower()) for text in (wanted, got))
    common = common_subsequence_length(words, back)
    if not common:
        return 0.0
    precision, recall = common / len(back), common / len(words)
    return 2 * precision * recall / (precision + recall)


def attack_vectors(gem: GemModel, known: Sequence[str], texts: Sequence[str], *, ridge: float = 1.0) -> dict[str, Any]:
    """Guess the tokens of texts from their vectors alone: ridge regression fitted on ``known`` texts.

    The attack knows how many different tokens each text has (which favours it) and guesses that many. Chance guesses
    the tokens that are most frequent in the known texts.
    """
    tokenize = gem.text_tokenizer
    known_ids = [set(ids) for ids in tokenize.tokenize_plain(known, max_tokens=gem.config.max_length)]
    wanted_ids = [set(ids) for ids in tokenize.tokenize_plain(texts, max_tokens=gem.config.max_length)]
    counts = Counter(i for ids in known_ids for i in ids)
    vocabulary = [i for i, n in counts.most_common() if n >= 3]
    if not vocabulary:
        raise ValueError(f"no token occurs three times in {len(known)} known texts: give the attack more of them")
    column = {token: at for at, token in enumerate(vocabulary)}
    present_NV = np.zeros((len(known), len(vocabulary)), dtype=np.float32)
    for row, ids in enumerate(known_ids):
        present_NV[row, [column[i] for i in ids if i in column]] = 1.0
    vectors_ND = gem.encode(list(known), normalize_embeddings=True)
    mean_D, base_V = vectors_ND.mean(0), present_NV.mean(0)
    centred_ND = vectors_ND - mean_D
    gram_DD = centred_ND.T @ centred_ND + ridge * np.eye(centred_ND.shape[1], dtype=np.float32)
    map_DV = np.linalg.solve(gram_DD, centred_ND.T @ (present_NV - base_V))
    scores_MV = (gem.encode(list(texts), normalize_embeddings=True) - mean_D) @ map_DV + base_V
    rows, chance = [], []
    for text, wanted, scores_V in zip(texts, wanted_ids, scores_MV, strict=True):
        guess = [vocabulary[at] for at in np.argsort(-scores_V)[: len(wanted)]]
        words = " ".join(gem.tokenizer.decode([i]).strip() for i in guess)
        rows.append({"text": text, "guess": words, "tokens": len(wanted), "token_f1": token_f1(sorted(wanted), guess)})
        chance.append(token_f1(sorted(wanted), vocabulary[: len(wanted)]))
    return {
        "rows": rows,
        "chance_token_f1": float(np.mean(chance)),
        "note": f"ridge regression on {len(known)} other texts, told the number of different tokens",
    }


def _with_special_tokens(gem: GemModel, k: int | None) -> GemModel:
    """The same model, reading only its first ``k`` special tokens."""
    if k is None or k == gem.config.k:
        return gem
    if not 1 <= k <= gem.config.k:
        raise ValueError(f"k must lie in 1..{gem.config.k}, got {k}")
    config = replace(gem.config, special_ids=gem.config.special_ids[:k], special_tokens=gem.config.special_tokens[:k])
    return GemModel(gem.lm, gem.tokenizer, config, gem.adapter)


def _spaced(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
