"""A GEM as plain directories for other engines: the language model, and beside it what makes its vectors.

An engine that knows nothing of gemify runs ``text S`` through plain weights and takes the last token's hidden state.
That is the GEM's vector wherever its weights act at every position, or only the special token's row was trained:

- ``full``, ``lora``, ``tokens``: the language model with everything folded in, and ``embedding/`` in
  sentence-transformers'
  layout: the same weights (a hard link; up to the read-out layer, if there is one), a tokenizer that puts the template
  around every text and the special token after it, and last-token pooling.
- ``embedding_lora``: the base as it is, ``adapter/``, the LoRA as PEFT reads it, and ``embedding/``: the base with the
  LoRA merged, ``is_causal: false`` in its configuration if the pass is bidirectional, mean or last-token pooling, and
  the projection as a ``Dense`` module.
- ``gated``: its LoRA acts at the special token alone, which plain weights cannot express. The language model (the base
  with the special token's row), and ``adapter/``, an aLoRA adapter for it.

Several special tokens share a position and do not see each other, so they equal as many texts with one token each:
``embedding-1/``, ``embedding-2/``, ... (``adapter-1/``, ...), whose vectors are averaged or concatenated.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedModel

from gemify.io.atomic import atomic_directory
from gemify.model.adapter import merge_adapter
from gemify.model.base import grow_table, hide_progress_bars, parse_dtype
from gemify.model.config import CONFIG_FILE, GemConfig
from gemify.model.early_exit import truncate_layers
from gemify.model.gem import GemModel
from gemify.model.sentence_transformers_files import write_json, write_sentence_transformers_files
from gemify.model.tokenization import PLAIN, split_template

DOCS = "docs/how-to/engines.md of gemify"


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote, as paths within its directory."""

    directory: Path
    special_tokens: tuple[str, ...]
    embedding: tuple[str, ...]
    """Directories for sentence-transformers, one per special token. None of a gated GEM."""
    adapters: tuple[str, ...]
    """aLoRA adapters of a gated GEM, one per special token; the LoRA of an ``embedding_lora`` GEM."""


def export(gem: GemModel, output: Path, *, dtype: str | None = None) -> Exported:
    """Write a GEM for other engines. Ends the use of ``gem``.

    Args:
        gem: The model.
        output: A new or empty directory.
        dtype: Type of the weights: float32, bfloat16 or float16. None: as loaded.

    Returns:
        What was written.

    Raises:
        ValueError: `require_exportable` refuses.
    """
    config = gem.config
    require_exportable(config, output, dtype)
    gated, apart = config.tune == "gated", config.tune == "embedding_lora"
    ends: Sequence[int | None] = config.special_ids or (None,)
    numbers = [""] if len(ends) == 1 else [f"-{n}" for n in range(1, config.k + 1)]
    embedding = () if gated else tuple(f"embedding{n}" for n in numbers)
    adapters = tuple(f"adapter{n}" for n in numbers) if gated else ("adapter",) if apart else ()
    written = Exported(output, config.special_tokens, embedding, adapters)
    with atomic_directory(output, last="config.json") as stage:
        for name, special in zip(adapters, ends, strict=bool(adapters)):
            assert gem.adapter is not None
            if special is None or apart:
                gem.adapter.save(stage / name)
            else:
                gem.adapter.save_without_rows(stage / name, special_id=special)
        lm = plain_model(gem)
        with hide_progress_bars():
            (lm if dtype is None else lm.to(parse_dtype(dtype))).save_pretrained(stage)
        gem.tokenizer.save_pretrained(stage)
        if not gated and not apart:
            whole = dataclasses.replace(config, tune="full")
            (stage / CONFIG_FILE).write_text(whole.to_json(), encoding="utf-8")
        weights = stage
        if embedding and (apart or config.layer is not None):
            weights = stage / "cut"
            if apart:
                lm = merge_adapter(lm, stage / "adapter")
                lm.config.is_causal = config.attention == "causal"
            if config.layer is not None:
                truncate_layers(lm, config.layer)
            with hide_progress_bars():
                lm.save_pretrained(weights)
        for name, special in zip(embedding, ends, strict=bool(embedding)):
            _write_embedding(gem, lm, weights, stage / name, special)
        if weights != stage:
            shutil.rmtree(weights)
        text = render_card(config, embedding=embedding, adapters=adapters)
        (stage / "README.md").write_text(text, encoding="utf-8")
    return written


def require_exportable(config: GemConfig, output: Path, dtype: str | None) -> None:
    """Check whether a GEM can be exported, before its model is loaded.

    Raises:
        ValueError: The vectors are not those of ``text S`` (several special tokens at consecutive positions or in a
            pass of its own, a gated GEM with a read-out layer or a projection), ``output`` holds files, or ``dtype`` is
            unknown.
    """
    if dtype is not None:
        parse_dtype(dtype)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"{output} {'is a file' if output.is_file() else 'holds files'}: give a new --output")
    if config.tune == "gated" and config.projection_dim is not None:
        raise ValueError(
            "this gated model projects its vectors, which an adapter for other engines cannot: use `gemify serve`"
        )
    if config.tune == "embedding_lora" and config.k > 1:
        raise ValueError(
            f"{config.k} special tokens that see each other are no {config.k} texts with one token each: other engines"
            " cannot embed with this model, use `gemify embed`"
        )
    if config.tune == "gated" and config.layer is not None:
        raise ValueError(
            f"this gated model is read out at layer {config.layer}, other engines read the last: use `gemify serve`, or"
            " train with tune lora or full, or without layer"
        )
    if config.k > 1 and not config.shared_position:
        raise ValueError(
            f"{config.k} special tokens at positions of their own are no {config.k} texts with one token each:"
            " other engines cannot embed with this model, use `gemify embed`, or train with a shared position"
        )


@torch.no_grad()
def plain_model(gem: GemModel) -> PreTrainedModel:
    """Return the model with the special tokens' rows in its table.

    Its output head does not change: a tied one is untied.
    """
    lm, adapter, ids = gem.lm, gem.adapter, list(gem.config.special_ids)
    if lm.generation_config is not None:
        lm.generation_config.suppress_tokens = ids  # as `GemModel.generate` never emits them
    if adapter is None:
        return lm
    rows_KD = adapter.rows.rows_KD
    lm = adapter.unload(lm)
    old = lm.get_input_embeddings().weight.shape[0]
    grow_table(lm, ids, rows_KD)
    table, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.clone(), requires_grad=False)
        head.weight[[i for i in ids if i >= old]] = head.weight[:old].mean(0)  # likely in no context
        lm.config.tie_word_embeddings = lm.config.get_text_config().tie_word_embeddings = False
    table.weight[ids] = rows_KD.to(table.weight)
    return lm


def _write_embedding(gem: GemModel, lm: PreTrainedModel, model: Path, directory: Path, special: int | None) -> None:
    """A sentence-transformers directory on the weights beside it, whose tokenizer lays a row out as `encode` does."""
    directory.mkdir()
    for path in [model / "config.json", *model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")]:
        try:
            os.link(path, directory / path.name)
        except OSError:  # a file system without hard links
            shutil.copy2(path, directory / path.name)
    _write_tokenizer(gem, directory, special)
    width = int(lm.config.get_text_config().hidden_size)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if gem.projection is not None:
        parts += [("2_Normalize", "Normalize"), ("3_Dense", "Dense")]
        (directory / "2_Normalize").mkdir()
        (directory / "3_Dense").mkdir()
        gem.projection.save(directory / "3_Dense", name="model.safetensors")
        P, D = gem.projection.weight_PD.shape
        identity = "torch.nn.modules.linear.Identity"
        dense = {"in_features": D, "out_features": P, "bias": False, "activation_function": identity}
        write_json(directory / "3_Dense" / "config.json", dense)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {
        "word_embedding_dimension": width,
        **{f"pooling_mode_{mode}": mode == ("mean_tokens" if special is None else "lasttoken") for mode in modes},
        "include_prompt": True,
    }
    (directory / "1_Pooling").mkdir()
    modules = [(path, f"sentence_transformers.models.{kind}") for path, kind in parts]
    write_sentence_transformers_files(directory, gem.config, modules)
    write_json(directory / "1_Pooling" / "config.json", pooling)
    write_json(
        directory / "sentence_bert_config.json",
        {"max_seq_length": gem.config.max_text_tokens + (special is not None), "do_lower_case": False},
    )


def _write_tokenizer(gem: GemModel, directory: Path, special: int | None) -> None:
    """The tokenizer, with template and ``special`` around every text; special tokens' names are ordinary text."""
    tokenizer = copy.deepcopy(gem.tokenizer)
    texts = gem.text_tokenizer
    # BOS and template prefix before a text; template suffix and special token after it.
    ends = [] if special is None else [special]
    pieces = {"prefix": [*texts.bos_ids, *texts.prefix_ids], "suffix": [*texts.suffix_ids, *ends]}
    front, back = (["prefix"] if pieces["prefix"] else []), (["suffix"] if pieces["suffix"] else [])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*front, "$A", *back],
        pair=[*front, "$A", "$B:0", *back],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in pieces.items()
            if ids
        ],
    )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = gem.config.max_text_tokens + len(ends)
    tokenizer.save_pretrained(directory)
    _forget_names(directory, gem.config.special_tokens)


def _forget_names(directory: Path, names: Sequence[str]) -> None:
    """Leave the special tokens to the template: a text that spells one's name is text, as in `GemModel.encode`."""
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in names]
    write_json(path, values)
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if extra := values.get("extra_special_tokens"):
        values["extra_special_tokens"] = [name for name in extra if name not in names]
    values.pop("added_tokens_decoder", None)
    values["split_special_tokens"] = True  # a control token's name in a text is text
    write_json(path, values)


def render_card(config: GemConfig, *, embedding: Sequence[str], adapters: Sequence[str]) -> str:
    """Return the README.md of an exported GEM: what lies in the directory, and how an engine gets a text's vector.

    Its tags name the special tokens, because llama.cpp's converter keeps tags in the GGUF file's metadata.
    """
    tags = ["gemify", "sentence-similarity", *(f"special-token:{name}" for name in config.special_tokens)]
    names = ", ".join(f"`{name}` (id {i})" for name, i in zip(config.special_tokens, config.special_ids, strict=True))
    lines = [
        "---",
        f"tags: {json.dumps(tags, ensure_ascii=False)}",
        "---",
        "",
        "# A GEM, exported for other engines",
        "",
        *_card_of_vectors(config, names),
    ]
    prefix, suffix = (json.dumps(words, ensure_ascii=False) for words in split_template(config.template))
    plain = config.template == PLAIN
    if not plain:
        lines.append(
            f"- Template: {prefix} before every text and {suffix} after it, then the special token. Tokenise the"
            " three parts apart; the longest text counts them all"
        )
    for name, prompt in config.prompts.items():
        default = ", before every text unless another is asked for" if name == config.default_prompt_name else ""
        lines.append(f"- Prompt `{name}`: {json.dumps(prompt, ensure_ascii=False)}{default}")
    lines += ["- This directory: the language model; chat and generate with it as with any other"]
    for name, token in itertools.zip_longest(embedding, config.special_tokens[: len(embedding)]):
        end = f"; appends `{token}` itself" if token else ""
        lines.append(f"- `{name}/`: for sentence-transformers and engines that read its layout{end}")
    if config.tune == "embedding_lora":
        lines.append("- `adapter/`: the embedding pass's LoRA as PEFT reads it, over this directory's model")
        return "\n".join([*lines, ""])
    lines += [
        f"- `{name}/`: an aLoRA adapter that acts from `{token}` on; without it the vectors are untrained"
        for name, token in zip(adapters, config.special_tokens, strict=bool(adapters))
    ]
    if config.k > 1:
        way = "averaged" if config.pooling == "mean" else "put one after the other, in this order"
        lines.append(f"- A text's vector: its {config.k} vectors, one with each special token alone, {way}")
    filled, apart = (
        ("", "") if plain else (" in its template", ", which also tokenise the template apart from the text")
    )
    lines += [
        "",
        f"Engines that tokenise for themselves (llama.cpp, Ollama) get the text{filled} with"
        f" {'a' if config.k > 1 else 'the'} special token's name appended, and no space before it. A user's text that"
        f" spells the name is then read as the token: remove it, or send token ids{apart}. What each engine can do,"
        f" with figures: {DOCS}.",
        "",
    ]
    return "\n".join(lines)


def _card_of_vectors(config: GemConfig, names: str) -> list[str]:
    """The card's lines on where a text's vector is read."""
    where = "the last hidden state at its special token" if config.k else "the mean of its last hidden states"
    apart = ""
    if config.tune == "embedding_lora":
        sight = ", with bidirectional attention" if config.attention == "bidirectional" else ""
        apart = f" Vectors come from a pass of their own: the weights in `embedding/`{sight}."
    ends = " and the special token" if config.k else ""
    return [
        f"A language model that also embeds: a text's vector is {where}.{apart}",
        "",
        *([f"- Special token{'s' if config.k > 1 else ''}: {names}"] if config.k else []),
        f"- Longest text: {config.max_text_tokens} tokens{ends}",
    ]
