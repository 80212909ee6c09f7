"""Tiny random language models of many architectures, for exactness tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADED = COMMON | {"head_dim": 8}
WINDOW = {"sliding_window": 6}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "mistral-window": ("mistral", HEADED | WINDOW),
    "qwen2": ("qwen2", COMMON),
    "qwen2-window": (
        "qwen2",
        COMMON | WINDOW | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("qwen3", HEADED),
    "gemma2": ("gemma2", HEADED | WINDOW | {"query_pre_attn_scalar": 8}),
    "gemma3": (
        "gemma3_text",
        HEADED | WINDOW | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3-window": ("phi3", COMMON | WINDOW),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("gpt_neox", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "olmo2": ("olmo2", COMMON),
    "olmo3-window": ("olmo3", COMMON | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("smollm3", COMMON | {"no_rope_layers": [1, 0]}),
    "cohere2": ("cohere2", COMMON | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "falcon": (
        "falcon",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": False,
            "new_decoder_architecture": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "opt",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
            "word_embed_proj_dim": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        HEADED
        | WINDOW
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        COMMON
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
}

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", COMMON | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "mamba": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "qwen3_5": (
        "qwen3_5_text",
        HEADED
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        },
    ),
}

EAGER_ONLY = {"gpt_oss", "gemma2"}
"""Classes that sdpa cannot serve (attention sinks, soft-capped scores)."""


def build(name: str, attn_implementation: str = "sdpa", seed: int = 0, **other: Any) -> PreTrainedModel:
    """A random model of that architecture, in float32 and evaluation mode, with weights large enough to attend."""
    model_type, settings = {**ARCHITECTURES, **HYBRIDS}[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings | other)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return lm.eval()


def tokenizer(reserved: int = 4) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes and some control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *[f"<|reserved_{i}|>" for i in range(reserved)], *alphabet]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if reserved:
        made.add_special_tokens({"extra_special_tokens": [f"<|reserved_{i}|>" for i in range(reserved)]})
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return made


def save(
    directory: Path, name: str = "llama", *, reserved: int = 4, attn_implementation: str = "sdpa", **other: Any
) -> Path:
    """A model directory as on the hub. ``other``: entries of its configuration."""
    build(name, attn_implementation, **other).save_pretrained(directory)
    tokenizer(reserved).save_pretrained(directory)
    return directory


def write_texts(path: Path, count: int = 400) -> Path:
    """A text file of short, differing lines."""
    words = [
        "red",
        "blue",
        "stone",
        "river",
        "cat",
        "dog",
        "tree",
        "house",
        "light",
        "moon",
        "seven",
        "paper",
        "wind",
        "small",
        "green",
        "old",
    ]
    lines = []
    for i in range(count):
        n = 4 + (i * 7) % 9
        lines.append(" ".join(words[(i * 5 + j * (i % 7 + 1)) % len(words)] for j in range(n)) + f" {i}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_pairs(path: Path, count: int = 20) -> Path:
    """STS pairs as JSON lines."""
    rows = [
        {"sentence1": f"the cat {i}", "sentence2": f"the {'cat' if i % 2 else 'dog'} {i}", "score": i % 2 * 5}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
