"""What a vLLM worker does for GEM: the adapter at special tokens alone, and their hidden states kept.

A request to embed is an ordinary request for one token whose ``extra_args`` hold a key. Its prompt ends in a special
token. In the step that runs this token, the worker

- maps the adapter to this token and to no other (vLLM's kernels take an adapter per token), and
- keeps the input of the output head there, the last hidden state, under the key until it is taken.

Every other token, of this request and of all others, runs through the base's weights alone. So the text's KV cache
equals that of a chat, and vLLM's prefix cache serves both.

`fix_cpu_lora` is for vLLM's LoRA on a CPU: there, tokens without an adapter get the last slot's, and buffers count
requests. vLLM's torch kernels index the stacked adapters with the token's slot, -1 for none, which is the last slot in
Python; and they copy one adapter a token. Below, rows without an adapter are left alone, and the others alone are
computed. On GPUs vLLM's own kernels do this, and nothing here is used.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemify.integrations.vllm.config import MARK, EngineGem

LORA_ID = 2**31 - 7
"""The adapter's number in the engine, far from those that vLLM gives to its users' adapters."""
MAX_KEPT_VECTORS = 8192
"""Vectors that are kept until they are taken; beyond that the oldest are dropped."""


class HiddenStateTap:
    """Watches a model runner: which requests end their prompt in a step, and the hidden states there."""

    def __init__(self, runner: Any, adapter: Any | None) -> None:
        self.runner, self.adapter = runner, adapter
        self.vectors: OrderedDict[str, Tensor] = OrderedDict()
        self._prompts: dict[str, tuple[str, int]] = {}  # request -> its key, the length of its prompt
        self._ending: dict[str, str] = {}  # in this step: request -> key
        self._execute: Callable[..., Any] = runner.execute_model
        self._lora_inputs: Callable[..., Any] = runner.input_batch.make_lora_inputs
        model = runner.get_model()
        self._logits: Callable[..., Any] = model.compute_logits
        runner.execute_model = self.execute_model
        model.compute_logits = self.compute_logits
        if adapter is not None:
            runner.input_batch.make_lora_inputs = self.make_lora_inputs

    def execute_model(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        """Note which requests end their prompt in this step, then run it."""
        for request in scheduled.finished_req_ids:
            self._prompts.pop(request, None)
        computed = dict(
            zip(
                scheduled.scheduled_cached_reqs.req_ids,
                scheduled.scheduled_cached_reqs.num_computed_tokens,
                strict=True,
            )
        )
        for new in scheduled.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            if key := embedding_key(new.sampling_params):
                self._prompts[new.req_id] = (key, len(new.prompt_token_ids))
        self._ending = {
            request: key
            for request, (key, length) in self._prompts.items()
            if request in computed and computed[request] + scheduled.num_scheduled_tokens[request] == length
        }
        return self._execute(scheduled, *args, **kwargs)

    def make_lora_inputs(self, scheduled: np.ndarray, sampled: np.ndarray) -> tuple[Any, Any, set[Any]]:
        """Return vLLM's map from tokens to adapters, with ours at the last token of each prompt that ends."""
        assert self.adapter is not None
        batch = self.runner.input_batch
        batch.lora_id_to_lora_request.pop(LORA_ID, None)
        if self._ending:  # vLLM picks its kernels and CUDA graphs by how many adapters are in here
            batch.lora_id_to_lora_request[LORA_ID] = self.adapter
        prompts, tokens, adapters = self._lora_inputs(scheduled, sampled)
        if not self._ending:
            return prompts, tokens, adapters
        of_token = np.array(tokens)
        ends = np.cumsum(scheduled) - 1
        for row in self._rows():
            of_token[ends[row]] = LORA_ID
        return prompts, tuple(of_token.tolist()), adapters

    def compute_logits(self, hidden_ND: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the hidden states of the prompts that end, then compute logits."""
        if self._ending:
            requests = self.runner.input_batch.req_ids
            for row in self._rows():
                self.vectors[self._ending[requests[row]]] = hidden_ND[row].clone()
            while len(self.vectors) > MAX_KEPT_VECTORS:
                self.vectors.popitem(last=False)
        return self._logits(hidden_ND, *args, **kwargs)

    def _rows(self) -> list[int]:
        """Rows of the batch whose prompt ends in this step: a row is a request, and gives one row of hidden states."""
        return [row for row, request in enumerate(self.runner.input_batch.req_ids) if request in self._ending]


class GemWorker:
    """vLLM's ``worker_extension_cls``: methods that the engine calls on every worker by name."""

    model_runner: Any
    vllm_config: Any

    def gemify_open(self) -> list[int]:
        """Prepare to embed, at the first call. Returns the special tokens' ids."""
        found = EngineGem.of(self.vllm_config.additional_config[MARK]["gem"], base="given")
        if getattr(self, "_gemify_tap", None) is None:
            require_engine(self.vllm_config, self.model_runner)
            adapter = None if found.settings is None else self._gemify_adapter(found)
            self._gemify_tap = HiddenStateTap(self.model_runner, adapter)
        return list(found.config.special_ids)

    def gemify_take(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Take the float32 vectors of these keys out of the engine. Those of another worker are left out."""
        vectors = self._gemify_tap.vectors
        return {
            key: vectors.pop(key).to("cpu", torch.float32).numpy().tobytes() for key in list(keys) if key in vectors
        }

    def _gemify_adapter(self, found: EngineGem) -> Any:
        from vllm.lora.request import LoRARequest

        table, vocabulary = embedding_table(self.model_runner.get_model())
        ids = torch.tensor(found.config.special_ids, device=next(table.parameters()).device)
        if int(ids.max()) >= vocabulary:
            raise ValueError(
                f"special token {int(ids.max())} has no row among the base's {vocabulary}:"
                " make a base that has one with `gemify export`, and give its directory as base"
            )
        with torch.inference_mode():
            rows_KD = table(ids)
        fix_cpu_lora(self.model_runner.lora_manager._adapter_manager)
        with tempfile.TemporaryDirectory() as name:
            found.write_lora(Path(name), rows_KD=rows_KD, vocabulary=vocabulary)
            adapter = LoRARequest(MARK, LORA_ID, name)
            self.model_runner.add_lora(adapter)
        self.model_runner.pin_lora(LORA_ID)
        return adapter


def embedding_key(sampling: Any) -> str | None:
    """Return the key of a request that is to be embedded, or None. Over HTTP a user may write anything there."""
    extra = getattr(sampling, "extra_args", None)
    key = extra.get(MARK) if extra else None
    return key if isinstance(key, str) else None


def embedding_table(model: nn.Module) -> tuple[nn.Module, int]:
    """Return the embedding table beneath vLLM's LoRA layer, and how many rows the base has."""
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

    for module in model.modules():
        if isinstance(module, VocabParallelEmbeddingWithLoRA):
            return module.base_layer, int(module.base_layer.org_vocab_size)
    raise ValueError(
        f"vLLM takes no adapter on the embedding table of {type(model).__name__}, and a gated GEM needs one:"
        " use `gemify serve`, or a GEM of another kind (full, or lora after `gemify export`)"
    )


def require_engine(config: Any, runner: Any) -> None:
    """Check the engine's set-up. ValueError where a step's rows are not one per request."""
    wrong = {
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": config.parallel_config.pipeline_parallel_size > 1,
        "data parallelism": config.parallel_config.data_parallel_size > 1,
        "model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": not hasattr(runner, "input_batch"),
    }
    if bad := [name for name, is_so in wrong.items() if is_so]:
        raise ValueError(f"gemify's vLLM plugin does not run with {bad[0]}: start the engine without it")


def fix_cpu_lora(manager: Any) -> None:
    """Fix every LoRA layer of a CPU engine. Other engines stay as they are."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    fixed = _fixed_wrapper(PunicaWrapperCPU)
    for wrapper in manager.punica_wrapper_mapping.values():
        if type(wrapper) is PunicaWrapperCPU:
            wrapper.__class__ = fixed


def _fixed_wrapper(wrapper: type[Any]) -> type[Any]:
    from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_expand_slice, bgmv_shrink

    class RowsOnly(wrapper):
        """The rows that have an adapter, and their slots, are found once a step."""

        def _update_prefill_metadata(self, slots_N: Tensor) -> None:
            self.rows = torch.where(slots_N >= 0)[0]
            self.slots = slots_N[self.rows]
            self.no_lora = not len(self.rows)

        def _shrink_prefill(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
            if not self.no_lora:
                part = torch.zeros_like(y[self.rows])
                bgmv_shrink(x[self.rows], w_t_all, part, self.slots, scale)
                y[self.rows] = part

        def _expand_prefill(self, y: Tensor, x: Tensor, w_t_all: Tensor, add_inputs: bool) -> None:
            if not self.no_lora:
                part = y[self.rows]
                bgmv_expand(x[self.rows], w_t_all, part, self.slots, add_inputs)
                y[self.rows] = part

        def _expand_slice_prefill(
            self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool
        ) -> None:
            if not self.no_lora:
                part = y[self.rows]
                bgmv_expand_slice(x[self.rows], w_t_all, part, self.slots, y_offset, y_slice_size, add_inputs)
                y[self.rows] = part

    return RowsOnly
