"""The README.md of an exported GEM: what lies in the directory, and how an engine gets a text's vector out of it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gemify.model.config import GemConfig

DOCS = "docs/engines.md of gemify"


def card(config: GemConfig, *, embedding: Sequence[str], adapters: Sequence[str]) -> str:
    """The card. Its tags name the special tokens: llama.cpp's converter keeps them in the GGUF file's metadata."""
    tags = ["gemify", "sentence-similarity", *(f"special-token:{name}" for name in config.special_tokens)]
    names = ", ".join(f"`{name}` (id {i})" for name, i in zip(config.special_tokens, config.special_ids, strict=True))
    lines = [
        "---",
        f"tags: {json.dumps(tags, ensure_ascii=False)}",
        "---",
        "",
        "# A GEM, exported for other engines",
        "",
        "A language model that also embeds: a text's vector is the last hidden state at its special token.",
        "",
        f"- Special token{'s' if config.k > 1 else ''}: {names}",
        f"- Longest text: {config.max_length - config.k} tokens and the special token",
    ]
    for name, prompt in config.prompts.items():
        default = ", before every text unless another is asked for" if name == config.default_prompt_name else ""
        lines.append(f"- Prompt `{name}`: {json.dumps(prompt, ensure_ascii=False)}{default}")
    lines += ["- This directory: the language model; chat and generate with it as with any other"]
    lines += [
        f"- `{name}/`: for sentence-transformers and engines that read its layout; appends `{token}` itself"
        for name, token in zip(embedding, config.special_tokens, strict=bool(embedding))
    ]
    lines += [
        f"- `{name}/`: an aLoRA adapter that acts from `{token}` on; without it the vectors are untrained"
        for name, token in zip(adapters, config.special_tokens, strict=bool(adapters))
    ]
    if config.k > 1:
        way = "averaged" if config.pooling == "mean" else "put one after the other, in this order"
        lines.append(f"- A text's vector: its {config.k} vectors, one with each special token alone, {way}")
    lines += [
        "",
        f"Engines that tokenise for themselves (llama.cpp, Ollama) get the text with {'a' if config.k > 1 else 'the'}"
        " special token's name appended, and no space before it. A user's text that spells the name is then read as the"
        f" token: remove it, or send token ids. What each engine can do, with figures: {DOCS}.",
        "",
    ]
    return "\n".join(lines)
