"""`GemModel`: one language model that writes and embeds."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemify.io.atomic import atomic_directory
from gemify.io.errors import first_line
from gemify.model import prefill as prefilling
from gemify.model.adapter import ADAPTER_FILE, Adapter, AdapterSettings, Tune, adapter_settings, attached
from gemify.model.attention import require_kernel, require_maskable
from gemify.model.base import (
    Loading,
    choose_special_tokens,
    grow_table,
    hide_progress_bars,
    initial_rows,
    load_base,
    max_positions,
    special_token_ids,
)
from gemify.model.compile import compiled
from gemify.model.config import CONFIG_FILE, GemConfig, require_special_tokens, resolve_directory
from gemify.model.early_exit import early_exit, enable_early_exit
from gemify.model.encode import TextTokenizer, encode_texts
from gemify.model.fingerprint import embedding_fingerprint, weights_fingerprint
from gemify.model.forward import left_pad, special_pass, text_pass
from gemify.model.pooling import Pooling, pool
from gemify.model.prefill import Prefill
from gemify.model.recovery import find_eos_ids, greedy_from_specials
from gemify.model.throughput import ThroughputMeter
from gemify.model.tokenization import PLAIN, require_template

logger = logging.getLogger(__name__)

Texts = str | Sequence[str]
Message = Mapping[str, str]


class GemModel:
    """A decoder-only language model with special tokens whose hidden states are text embeddings.

    Make one with `from_base` (untrained: to be trained) or `from_pretrained` (a saved one). ``lm`` is the transformers
    model itself; with a gated GEM it computes exactly what the base computes.
    """

    def __init__(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GemConfig, adapter: Adapter | None
    ) -> None:
        self.lm, self.tokenizer, self.config, self.adapter = lm, tokenizer, config, adapter
        self.lock = threading.RLock()
        """Hold it around each call where threads share this model (``with gem.lock:``)."""
        self.meter = ThroughputMeter()
        """What the last `encode` computed."""
        self.text_tokenizer = TextTokenizer(tokenizer, frozenset(config.special_ids), config.template)
        """The tokenizer as embedding uses it."""
        if config.template != PLAIN and self.max_seq_length <= len(self.text_tokenizer.bos_ids):
            raise ValueError(
                f"the template {config.template!r} leaves no room for a text in {config.max_length} tokens"
                " (max_length): shorten it"
            )
        if config.layer is not None:
            enable_early_exit(lm, config.layer)

    # Making, loading, saving

    @classmethod
    def from_base(
        cls,
        base: str,
        *,
        tune: Tune = "gated",
        special_tokens: int | Sequence[str] = 1,
        pooling: Pooling = "mean",
        shared_position: bool = True,
        max_length: int = 512,
        prompts: Mapping[str, str] | None = None,
        template: str = PLAIN,
        layer: int | None = None,
        adapter: AdapterSettings | None = None,
        **loading: Unpack[Loading],
    ) -> GemModel:
        """Prepare a base model for training: choose special tokens, attach fresh trainable weights.

        Args:
            base: directory, GGUF file, Hugging Face repo id, or ``starter``.
            tune: what will be trained; see `gemify.model.adapter`.
            special_tokens: how many, or their names. A reserved, unused control token is preferred to adding one.
                0: the SimCSE baseline, a mean over the text (``lora`` and ``full`` only).
            pooling: ``mean`` or ``concat`` over the special tokens (GEM, Section 3.1).
            shared_position: give all special tokens one position id.
            max_length: most tokens of a text, template and special tokens included.
            template: words around every text that is embedded, such as ``In one word, "{text}" means:``.
            layer: read the embedding after this layer (the first is 1), through the final norm; deeper ones do not run.
            adapter: LoRA's rank, lora_alpha, lora_dropout and target_modules (`AdapterSettings`).
            loading: dtype, device, attn_implementation, revision, trust_remote_code (`Loading`).

        Raises:
            ValueError: base not found, no causal LM, no fast tokenizer, or a model that no attention mask can split.
        """
        names_given = None if isinstance(special_tokens, int) else list(special_tokens)
        k = special_tokens if isinstance(special_tokens, int) else len(special_tokens)
        require_special_tokens(k, tune=tune, pooling=pooling)
        require_template(template, k=k)
        require_kernel(loading.get("attn_implementation"))
        lm, tokenizer = load_base(base, **loading)
        require_maskable(lm)
        ends = lm.generation_config.eos_token_id if lm.generation_config is not None else None
        taken = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        names = choose_special_tokens(tokenizer, k, wanted=names_given, taken=taken)
        ids = special_token_ids(tokenizer, names)
        config = GemConfig(
            tune=tune,
            base=base,
            base_revision=loading.get("revision"),
            base_fingerprint=weights_fingerprint(lm),
            special_tokens=tuple(names),
            special_ids=tuple(ids),
            pooling=pooling,
            shared_position=shared_position,
            max_length=min(max_length, max_positions(lm) or max_length),
            prompts=dict(prompts or {}),
            template=template,
            layer=layer,
        )
        rows = initial_rows(lm, ids)
        if tune in ("lora", "full"):
            grow_table(lm, ids, rows)
        return cls(lm, tokenizer, config, attached(lm, config, rows, adapter or {}))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, base: str | None = None, **loading: Unpack[Loading]) -> GemModel:
        """Load a saved GEM: a directory, a Hugging Face repo id, or ``starter``, which comes with gemify.

        ``base`` overrides where the base model is looked for. If its weights are not those the GEM was trained on, a
        warning says so.
        """
        directory = resolve_directory(path)
        config = GemConfig.from_directory(directory)
        full = config.tune == "full" or not (directory / ADAPTER_FILE).is_file()
        if full and not (directory / "config.json").is_file():
            raise ValueError(
                f"{directory} holds neither {ADAPTER_FILE} nor a model: restore the missing file or train again"
            )
        require_kernel(loading.get("attn_implementation"))
        if not full and base is None and config.base_revision is not None:
            loading.setdefault("revision", config.base_revision)
        lm, tokenizer = load_base(str(directory) if full else base or config.base, **loading)
        if full:
            return cls(lm, tokenizer, config, None)
        if (found := weights_fingerprint(lm)) != config.base_fingerprint:
            logger.warning(
                "%s was trained on other base weights (fingerprint %s) than those loaded from %s (%s): another"
                " quantisation or precision moves embeddings a little, another model makes them meaningless",
                directory,
                config.base_fingerprint,
                base or config.base,
                found,
            )
        if (directory / "tokenizer_config.json").is_file():  # the shipped ones use their base's
            tokenizer = type(tokenizer).from_pretrained(str(directory))
        rows = initial_rows(lm, config.special_ids)
        if config.tune == "lora":
            grow_table(lm, config.special_ids, rows)
        adapter = attached(lm, config, rows, adapter_settings(directory))
        assert adapter is not None
        try:
            adapter.load(directory)
        except SafetensorError as error:
            raise ValueError(f"{directory / ADAPTER_FILE} is damaged: {error}") from error
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot load the adapter in {directory}: {first_line(error)}") from error
        lm.eval()
        return cls(lm, tokenizer, config, adapter)

    def save_pretrained(
        self, path: str | Path, *, merge: bool = False, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Save to a directory: a full disk or a kill leaves what was there before, or all of the new.

        (Into a directory that holds files already, complete new ones are moved over them one by one, the configuration
        last.)

        ``gated``, ``tokens`` and ``lora`` store an adapter, the tokenizer and the base's name, not the base. ``full``,
        and ``lora`` with ``merge=True`` (which ends this object's use), store a plain transformers model; its ``weights``
        may be given, where this process holds a part of them only.
        """
        target = Path(path)
        if merge and self.config.tune != "lora":
            raise ValueError(
                f"only a `lora` GEM can be merged, this one is {self.config.tune!r}: train with --tune lora"
            )
        with atomic_directory(target, last=CONFIG_FILE) as stage:
            if self.adapter is not None and not merge:
                self.adapter.save(stage)
            else:
                lm = self.adapter.merge() if self.adapter is not None else self.lm
                with hide_progress_bars():
                    lm.save_pretrained(stage, state_dict=weights)
            self.tokenizer.save_pretrained(stage)
            (stage / CONFIG_FILE).write_text(self.config.to_json(), encoding="utf-8")

    # Properties

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def special_ids(self) -> list[int]:
        return list(self.config.special_ids)

    def get_embedding_dim(self) -> int:
        """Length of the vectors."""
        width = int(self.lm.config.get_text_config().hidden_size)
        return width * (self.config.k if self.config.pooling == "concat" else 1)

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text that are read, template and special tokens not counted."""
        return self.config.max_text_tokens - len(self.text_tokenizer.prefix_ids) - len(self.text_tokenizer.suffix_ids)

    @property
    def fingerprint(self) -> str:
        """A short name for the vectors this model gives: see `embedding_fingerprint`."""
        return embedding_fingerprint(self.lm, self.config, self.adapter)

    # Embedding

    def encode(
        self,
        inputs: Texts,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        max_tokens: int | None = None,
        compile: bool = False,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Embed texts, with sentence-transformers' words and defaults.

        Args:
            inputs: one string (gives a 1-D vector) or several (give [N, D]).
            prompt_name: name of a prompt in ``config.prompts`` to put before every text.
            prompt: the prompt itself.
            batch_size: most rows a batch. ``max_tokens``: most tokens a batch [default: what suits the device].
            compile: compile the layers first, once, for encoding alone (`gemify.model.compile`).
            truncate_dim: keep the first so many dimensions.

        Returns:
            float32, numpy by default. What was computed, and how fast, is in ``self.meter``.
        """
        single = isinstance(inputs, str)
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts must be strings, item {at} is a {type(text).__name__}")
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.get_embedding_dim():
            raise ValueError(f"truncate_dim must lie in 1..{self.get_embedding_dim()}, got {truncate_dim}")
        before = self.config.resolve_prompt(prompt_name, prompt)
        self.meter = ThroughputMeter()
        if texts:
            self.lm.eval()
            with compiled(self.lm) if compile else contextlib.nullcontext():
                vectors_ND = encode_texts(
                    self.lm,
                    self.text_tokenizer,
                    self.config,
                    [before + t for t in texts] if before else texts,
                    batch_size=batch_size,
                    max_tokens=max_tokens,
                    show_progress_bar=show_progress_bar,
                    meter=self.meter,
                )
        else:
            vectors_ND = torch.empty(0, self.get_embedding_dim())
        vectors_ND = vectors_ND[:, :truncate_dim]
        if normalize_embeddings:
            vectors_ND = F.normalize(vectors_ND, dim=-1)
        result = vectors_ND[0] if single else vectors_ND
        return result if convert_to_tensor else result.numpy()

    def encode_query(self, inputs: Texts, **options: Any) -> Any:
        """`encode` with the prompt named ``query``, if there is one."""
        return self.encode(inputs, **self._named("query", options))

    def encode_document(self, inputs: Texts, **options: Any) -> Any:
        """`encode` with the prompt named ``document``, if there is one."""
        return self.encode(inputs, **self._named("document", options))

    @staticmethod
    def similarity(embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Cosine similarities [N, M] of every vector of the first with every one of the second."""
        a, b = (F.normalize(_matrix(e), dim=-1) for e in (embeddings1, embeddings2))
        return a @ b.T

    @staticmethod
    def similarity_pairwise(embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Cosine similarities [N] of vectors at equal places."""
        a, b = (_matrix(e) for e in (embeddings1, embeddings2))
        return F.cosine_similarity(a, b, dim=-1)

    def _named(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        if "prompt" in options or "prompt_name" in options or name not in self.config.prompts:
            return options
        return {**options, "prompt_name": name}

    # Generating

    @torch.no_grad()
    def prefill(self, texts: Texts, *, add_special_tokens: bool = True) -> Prefill:
        """Run texts once, uncut, and keep their KV cache. `embed` and `generate` go on from it, in any order."""
        self.lm.eval()
        ids_BT, mask_BT = self._prompt_ids(texts, add_special_tokens=add_special_tokens)
        return prefilling.run_prefill(self.lm, ids_BT, mask_BT, single=isinstance(texts, str))

    @torch.no_grad()
    def embed(self, prefill: Prefill, *, start: int = 0) -> Tensor:
        """Embeddings of a prefill's texts, [B, D] ([D] for one string): only what comes after the texts is computed.

        These are the template's words after a text and the special tokens, which see the columns from ``start`` on, such
        as a question inside a prompt. The prefill's cache stays as it was. Without special tokens, or with a template that
        has words before the text, the vector is not in the cache: ValueError (`require_embeddable_prefill`).
        """
        self.lm.eval()
        self.require_embeddable_prefill()
        shared, suffix_ids = self.config.shared_position, self.text_tokenizer.suffix_ids
        with early_exit(self.lm, self.config.layer):
            hidden_BKD = prefilling.embed(
                self.lm, prefill, self.special_ids, shared_position=shared, start=start, suffix_ids=suffix_ids
            )
        vectors_BD = pool(hidden_BKD, self.config.pooling).float().cpu()
        return vectors_BD[0] if prefill.single else vectors_BD

    def require_embeddable_prefill(self) -> None:
        """Refuse to embed a text in its own cache where its vector is not of it."""
        if not self.config.k:
            raise ValueError(
                "this model has no special tokens: nothing to recover a text from, and to embed use encode"
            )
        if self.text_tokenizer.prefix_ids:
            raise ValueError(
                f"this model's template {self.config.template!r} has words before the text, which a cache of the text"
                " alone has not seen: to embed use encode"
            )

    @torch.no_grad()
    def generate(self, prompts: Texts | Prefill, *, max_new_tokens: int = 256, **options: Any) -> Any:
        """Continue prompts: transformers' own `generate`, with the special tokens' ids never emitted.

        Takes one string (gives a string), several (give a list), or a `Prefill`, whose texts are not run again.
        ``options`` are those of transformers' `generate` (do_sample, temperature, stop_strings, streamer, ...).
        """
        self.lm.eval()
        if isinstance(prompts, Prefill):
            prefill, ids_BT, mask_BT, single = prompts, prompts.ids_BT, prompts.text.mask_BT, prompts.single
        else:
            prefill, (ids_BT, mask_BT), single = None, self._prompt_ids(prompts), isinstance(prompts, str)
        out_BT = self.generate_ids(prefill, ids_BT, mask_BT, max_new_tokens=max_new_tokens, **options)
        texts = self.tokenizer.batch_decode(out_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
        return texts[0] if single and len(texts) == 1 else texts

    @torch.no_grad()
    def generate_ids(self, prefill: Prefill | None, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
        """`generate` on token ids, [B, T] padded on the left; returns prompts and continuations, [B, T + new]."""
        suppressed = self.config.special_ids
        return prefilling.generate_ids(
            self.lm, self.tokenizer, prefill, ids_BT, mask_BT, suppressed_ids=suppressed, **options
        )

    def chat(self, messages: Sequence[Message], *, max_new_tokens: int = 256, **options: Any) -> str:
        """Answer a conversation in the base model's own chat format."""
        return str(self.generate(self.prefill_chat(messages), max_new_tokens=max_new_tokens, **options))

    def prefill_chat(self, messages: Sequence[Message]) -> Prefill:
        """`prefill` of a conversation, laid out by the tokenizer's chat template up to the answer's start."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the base model {self.config.base} has no chat template: use generate with a plain prompt"
            )
        prompt = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.prefill(str(prompt), add_special_tokens=False)

    # Recovery

    @torch.no_grad()
    def recover(self, texts: Texts | Prefill, *, max_new_tokens: int = 64) -> Any:
        """Decode texts greedily from their special tokens' KV alone (GEM, Appendix B).

        What comes back is what the special tokens remember, and so also what a stored KV of them gives away.
        """
        self.lm.eval()
        if isinstance(texts, Prefill):
            self.require_embeddable_prefill()
            text, single = prefilling.append_tokens(self.lm, texts.text, self.text_tokenizer.suffix_ids), texts.single
        else:
            single = isinstance(texts, str)
            listed = [texts] if isinstance(texts, str) else texts
            rows = self.text_tokenizer(listed, max_tokens=self.config.max_text_tokens)
            ids_BT, mask_BT = (t.to(self.device) for t in left_pad(rows))
            text = text_pass(self.lm, ids_BT, mask_BT)
        shared = self.config.shared_position
        specials = special_pass(self.lm, text, self.special_ids, shared_position=shared, with_logits=True)
        out = [
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in greedy_from_specials(
                self.lm,
                specials,
                eos_ids=find_eos_ids(self.lm, self.tokenizer),
                suppressed_ids=self.config.special_ids,
                max_new_tokens=max_new_tokens,
            )
        ]
        return out[0] if single else out

    # Inside

    def _prompt_ids(self, texts: Texts, *, add_special_tokens: bool = True) -> tuple[Tensor, Tensor]:
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise ValueError("no text given: give at least one prompt")
        table = self.lm.get_input_embeddings().weight.shape[0]
        rows = self.text_tokenizer.tokenize_prompts(listed, add_special_tokens=add_special_tokens, vocab_size=table)
        if empty := [i for i, r in enumerate(rows) if not r]:
            raise ValueError(f"prompt {empty[0]} has no tokens: give a prompt that is not empty")
        pad = self.tokenizer.pad_token_id
        ids_BT, mask_BT = left_pad(rows, fill=0 if pad is None else pad)
        return ids_BT.to(self.device), mask_BT.to(self.device)


def _matrix(vectors: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(vectors).float().reshape(-1, np.shape(vectors)[-1])
