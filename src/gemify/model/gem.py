"""`GemModel`: one language model that writes and embeds."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemify.model import prefill as prefilling
from gemify.model.adapter import Adapter, AdapterSettings
from gemify.model.base import Loading
from gemify.model.chat_template import ChatTemplate, Message, pop_chat_options
from gemify.model.config import Attention, GemConfig, Pooling, Tune, pool, require_finite
from gemify.model.early_exit import early_exit, enable_early_exit
from gemify.model.embedding_mixin import EmbeddingMixin, Texts
from gemify.model.encode import ThroughputMeter
from gemify.model.forward import left_pad, special_pass, text_pass
from gemify.model.hub import HubMixin
from gemify.model.prefill import Prefill, find_eos_ids, greedy_from_specials
from gemify.model.pretrained import GemParts, embedding_fingerprint, load_pretrained, prepare_base, save_parts
from gemify.model.projection import Projection
from gemify.model.tokenization import PLAIN, TextTokenizer


class GemModel(EmbeddingMixin, HubMixin):
    """A decoder-only language model with special tokens whose hidden states are text embeddings.

    Make one with `from_base` (untrained) or `from_pretrained` (saved).

    Attributes:
        lm: The transformers model. With a gated GEM it computes exactly what the base model computes.
        tokenizer: The base model's tokenizer, which knows the special tokens.
        text_tokenizer: Turns texts to embed into token ids: template, special-token names as text, truncation.
        config: What the directory's ``config_gemify.json`` holds.
        adapter: The trained weights, where they are not the model's own (``full``).
        projection: The map into a teacher's space, if the GEM has one.
        meter: Token counts and speed of the last `encode`.
        lock: Hold it around each call where threads share this model (``with gem.lock:``). The tokenizer's switches,
            torch's random numbers and ``meter`` belong to the model, not to a thread.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GemConfig,
        adapter: Adapter | None,
        projection: Projection | None = None,
    ) -> None:
        self.lm, self.tokenizer, self.config, self.adapter = lm, tokenizer, config, adapter
        self.projection = projection
        self.lock = threading.RLock()
        self.meter = ThroughputMeter()
        self.text_tokenizer = TextTokenizer(tokenizer, frozenset(config.special_ids), config.template)
        if config.template != PLAIN and self.max_seq_length <= len(self.text_tokenizer.bos_ids):
            raise ValueError(
                f"the template {config.template!r} leaves no room for a text in {config.max_length} tokens"
                " (max_length): shorten it"
            )
        if config.layer is not None:
            enable_early_exit(lm, config.layer)

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, which stays in its process."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

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
        attention: Attention = "causal",
        adapter: AdapterSettings | None = None,
        **loading: Unpack[Loading],
    ) -> GemModel:
        """Prepare a base model for training: choose special tokens and attach fresh trainable weights.

        Args:
            base: A directory, a GGUF file, a Hugging Face repo id, or ``starter``.
            tune: Which weights are trained: ``gated``, ``tokens``, ``embedding_lora``, ``lora`` or ``full``
                (`gemify.model.config.Tune`).
            special_tokens: How many special tokens, or their names. A reserved control token that the base does not use
                is preferred to a new token. 0: the vector is the mean over the text (``embedding_lora``, ``lora`` and
                ``full``).
            pooling: ``mean`` or ``concat`` over the special tokens (GEM, Section 3.1).
            shared_position: Give all special tokens the same position id.
            max_length: Most tokens of a text, template and special tokens included.
            prompts: Prompts by name, to put before texts in `encode`.
            template: Words around every text that is embedded, such as ``In one word, "{text}" means:``.
            layer: Read the embedding after this layer (the first is 1), through the final norm. The layers above it do
                not run. None: the last layer.
            attention: What a token of the embedding pass sees, ``causal`` or ``bidirectional`` (``embedding_lora``).
            adapter: LoRA's rank, lora_alpha, lora_dropout and target_modules.
            loading: dtype, device, attn_implementation, revision, trust_remote_code and quantize (int8, int4, nf4).

        Returns:
            An untrained GEM.

        Raises:
            ValueError: The base is not found, is no causal language model, has no fast tokenizer, or computes text
                states that no attention mask can hide (recurrent or convolutional layers).
        """
        parts = prepare_base(
            base,
            tune=tune,
            special_tokens=special_tokens,
            pooling=pooling,
            shared_position=shared_position,
            max_length=max_length,
            prompts=prompts or {},
            template=template,
            layer=layer,
            attention=attention,
            adapter=adapter or {},
            **loading,
        )
        return cls(*parts)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, base: str | None = None, max_length: int | None = None, **loading: Unpack[Loading]
    ) -> GemModel:
        """Load a saved GEM.

        A base with other weights than the GEM was trained on is used, with a warning.

        Args:
            path: A directory, a Hugging Face repo id, or a GEM that comes with gemify (`gemify.model.config.SHIPPED`).
            base: Where to look for the base model. None: where the configuration says.
            max_length: Most tokens of a text, template and special tokens included, up to the base's positions. None:
                what the GEM was saved with.
            loading: dtype, device, attn_implementation, revision, token, trust_remote_code and quantize (int8, int4,
                nf4). ``revision`` is the GEM's in a repo, and the base's with a directory.

        Returns:
            The GEM, in evaluation mode.

        Raises:
            ValueError: No GEM is there, it is damaged, or its base is not found.
        """
        gem = cls(*load_pretrained(path, base=base, **loading))
        if max_length is not None:
            gem.set_max_length(max_length)
        return gem

    def save_pretrained(
        self, path: str | Path, *, merge: bool = False, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Save to a directory. A full disk or a kill leaves the old files or all of the new ones.

        ``gated``, ``tokens`` and ``lora`` store an adapter, the tokenizer and the base's name. ``full`` stores a plain
        transformers model. ``modules.json`` lets sentence-transformers load the directory. In a directory that holds
        files, complete new files replace them one by one, the configuration last.

        Args:
            path: The directory; it is made if it does not exist.
            merge: Fold a ``lora`` adapter into the model and store a plain transformers model. Ends the use of this
                object.
            weights: The language model's state dict, where this process holds only a part of the weights.

        Raises:
            ValueError: ``merge`` with another GEM than a ``lora`` one.
        """
        save_parts(
            GemParts(self.lm, self.tokenizer, self.config, self.adapter, self.projection),
            path,
            merge=merge,
            weights=weights,
        )

    # Properties

    @property
    def device(self) -> torch.device:
        """Where the language model's weights are."""
        return self.lm.device

    @property
    def special_ids(self) -> list[int]:
        """Token ids of the special tokens."""
        return list(self.config.special_ids)

    @property
    def fingerprint(self) -> str:
        """A short hash that names this model's vectors: see `embedding_fingerprint`."""
        return embedding_fingerprint(self.lm, self.config, self.adapter, self.projection)

    # Generating

    @torch.no_grad()
    def prefill(self, texts: Texts, *, add_special_tokens: bool = True) -> Prefill:
        """Run texts once, at full length, and keep their KV cache for `embed`, `generate` and `recover`.

        Args:
            texts: One text, or several.
            add_special_tokens: Add what the tokenizer puts around a text, such as a BOS token.

        Returns:
            KV cache and next-token logits. Any number of calls may use it, in any order.

        Raises:
            ValueError: No text is given, or one has no tokens.
        """
        self.lm.eval()
        ids_BT, mask_BT = self._prompt_ids(texts, add_special_tokens=add_special_tokens)
        return prefilling.run_prefill(self.lm, ids_BT, mask_BT, single=isinstance(texts, str))

    def prefill_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prefill:
        """`prefill` of a conversation, laid out by the tokenizer's chat template up to the answer's start.

        Args:
            messages: ``role`` and ``content`` of each message, the oldest first.
            tools: JSON schemas of tools, for templates that name them.
            continue_final_message: The answer goes on from the last message.
            chat_template_kwargs: Further variables of the template, such as ``enable_thinking``.

        Raises:
            ValueError: The base model has no chat template, or it refuses the conversation.
        """
        self.lm.eval()
        template = ChatTemplate(self.tokenizer, template_kwargs=chat_template_kwargs)
        ids = template.apply(messages, tools=tools, continue_final_message=continue_final_message)
        ids_BT, mask_BT = (t.to(self.device) for t in left_pad([ids]))
        return prefilling.run_prefill(self.lm, ids_BT, mask_BT, single=True)

    @torch.no_grad()
    def embed(self, prefill: Prefill, *, start: int = 0) -> Tensor:
        """Embed texts that have run: only the template's suffix and the special tokens are computed.

        Args:
            prefill: The texts. Its cache is not changed.
            start: The first position that the special tokens see, to embed a part of a prompt such as its question.

        Returns:
            float32 vectors on the CPU: [D] if the prefill is of one string, else [B, D].

        Raises:
            ValueError: ``start`` lies outside the prefill, or `require_embeddable_prefill` refuses.
        """
        self.lm.eval()
        self.require_embeddable_prefill()
        with early_exit(self.lm, self.config.layer):
            hidden_BKD = prefilling.embed(
                self.lm,
                prefill,
                self.special_ids,
                shared_position=self.config.shared_position,
                start=start,
                suffix_ids=self.text_tokenizer.suffix_ids,
            )
        vectors_BD = require_finite(self.pool(hidden_BKD).cpu())
        return vectors_BD[0] if prefill.single else vectors_BD

    def pool(self, hidden_BKD: Tensor) -> Tensor:
        """Return the float32 vectors [B, D] of special tokens' last hidden states, projected if the GEM projects."""
        states_BD = pool(hidden_BKD, self.config.pooling).float()
        return states_BD if self.projection is None else self.projection(states_BD)

    def require_embeddable_prefill(self) -> None:
        """Refuse to embed a text from its own KV cache where the vector is not a function of that cache.

        Raises:
            ValueError: The model has no special tokens, embeds in a pass of its own, or its template has words before
                the text.
        """
        if not self.config.embeds_from_cache:
            raise ValueError(
                "this model embeds in a pass of its own: to embed use encode, or take a gated GEM such as starter-gated"
                if self.config.k
                else "this model has no special tokens in a text's cache: to embed use encode, or take a gated GEM such"
                " as starter-gated"
            )
        if self.text_tokenizer.prefix_ids:
            raise ValueError(
                f"this model's template {self.config.template!r} has words before the text, which a cache of the text"
                " alone has not seen: to embed use encode"
            )

    @overload
    def generate(
        self, prompts: str | Prefill, *, max_new_tokens: int = 256, num_return_sequences: int, **options: Any
    ) -> str | list[str]: ...
    @overload
    def generate(self, prompts: str, *, max_new_tokens: int = 256, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 256, **options: Any) -> list[str]: ...
    @overload
    def generate(self, prompts: Prefill, *, max_new_tokens: int = 256, **options: Any) -> str | list[str]: ...
    @torch.no_grad()
    def generate(self, prompts: Texts | Prefill, *, max_new_tokens: int = 256, **options: Any) -> str | list[str]:
        """Continue prompts with transformers' own `generate`. The special tokens are never emitted.

        Args:
            prompts: One prompt, several, or a `Prefill`, whose texts are not run again.
            max_new_tokens: Most tokens of a continuation.
            options: Those of transformers' `generate` (do_sample, temperature, stop_strings, streamer, ...).

        Returns:
            The continuation of one prompt as a string; a list for several prompts, or for one prompt with several
            answers.

        Raises:
            ValueError: No prompt is given, or one has no tokens.
        """
        self.lm.eval()
        if isinstance(prompts, Prefill):
            prefill, ids_BT, mask_BT, single = prompts, prompts.ids_BT, prompts.text.mask_BT, prompts.single
        else:
            prefill, (ids_BT, mask_BT), single = None, self._prompt_ids(prompts), isinstance(prompts, str)
        out_BT = self.generate_ids(prefill, ids_BT, mask_BT, max_new_tokens=max_new_tokens, **options)
        texts: list[str] = self.tokenizer.batch_decode(out_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
        return texts[0] if single and len(texts) == 1 else texts

    @torch.no_grad()
    def generate_ids(self, prefill: Prefill | None, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
        """`generate` on token ids.

        Args:
            prefill: A run of the same prompts, or None.
            ids_BT: Prompts [B, T], padded on the left.
            mask_BT: False at padding, [B, T].
            options: Those of transformers' `generate`.

        Returns:
            Prompts and continuations, [B, T + new].
        """
        suppressed = self.config.special_ids
        ids: Tensor = prefilling.generate_ids(
            self.lm, self.tokenizer, prefill, ids_BT, mask_BT, suppressed_ids=suppressed, **options
        )
        return ids

    def chat(self, messages: Sequence[Message], *, max_new_tokens: int = 256, **options: Any) -> str:
        """Answer a conversation in the base model's own chat format.

        Args:
            messages: ``role`` and ``content`` of each message, the oldest first.
            max_new_tokens: Most tokens of the answer.
            options: Those of `prefill_chat` and of transformers' `generate`.

        Returns:
            The answer's text.

        Raises:
            ValueError: The base model has no chat template.
        """
        prefill = self.prefill_chat(messages, **pop_chat_options(options))
        return str(self.generate(prefill, max_new_tokens=max_new_tokens, **options))

    # Recovery

    @overload
    def recover(self, texts: str, *, max_new_tokens: int = 64) -> str: ...  # type: ignore[overload-overlap]
    @overload
    def recover(self, texts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]: ...
    @overload
    def recover(self, texts: Prefill, *, max_new_tokens: int = 64) -> str | list[str]: ...
    @torch.no_grad()
    def recover(self, texts: Texts | Prefill, *, max_new_tokens: int = 64) -> str | list[str]:
        """Decode texts greedily from the KV cache of their special tokens alone (GEM, Appendix B).

        The result is what the special tokens remember, and what a stored KV cache of them gives away.

        Args:
            texts: One text, several, or a `Prefill`.
            max_new_tokens: Most tokens of a recovered text.

        Returns:
            The recovered text of one string; a list for several.

        Raises:
            ValueError: The model has no special tokens, or `require_embeddable_prefill` refuses a prefill.
        """
        self.lm.eval()
        if not self.config.embeds_from_cache:
            raise ValueError(
                "this model has no special tokens in a text's cache: nothing to recover a text from, take a gated GEM"
                " such as starter-gated"
            )
        if isinstance(texts, Prefill):
            self.require_embeddable_prefill()
            text, single = prefilling.append_tokens(self.lm, texts.text, self.text_tokenizer.suffix_ids), texts.single
        else:
            single = isinstance(texts, str)
            rows = self.text_tokenizer(
                [texts] if isinstance(texts, str) else texts, max_tokens=self.config.max_text_tokens
            )
            ids_BT, mask_BT = (t.to(self.device) for t in left_pad(rows))
            text = text_pass(self.lm, ids_BT, mask_BT)
        rows = greedy_from_specials(
            self.lm,
            special_pass(
                self.lm, text, self.special_ids, shared_position=self.config.shared_position, with_logits=True
            ),
            eos_ids=find_eos_ids(self.lm, self.tokenizer),
            suppressed_ids=self.config.special_ids,
            max_new_tokens=max_new_tokens,
        )
        decoded = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]
        return decoded[0] if single else decoded

    def _prompt_ids(self, texts: Texts, *, add_special_tokens: bool = True) -> tuple[Tensor, Tensor]:
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise ValueError("no text given: give at least one prompt")
        vocab_size = self.lm.get_input_embeddings().weight.shape[0]
        rows = self.text_tokenizer.tokenize_prompts(
            listed, add_special_tokens=add_special_tokens, vocab_size=vocab_size
        )
        if empty := [i for i, r in enumerate(rows) if not r]:
            raise ValueError(f"prompt {empty[0]} has no tokens: give a prompt that is not empty")
        pad = self.tokenizer.pad_token_id
        ids_BT, mask_BT = left_pad(rows, fill=0 if pad is None else pad)
        return ids_BT.to(self.device), mask_BT.to(self.device)
