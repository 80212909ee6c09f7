"""The recipe of a training run: every choice with its default, named presets, YAML in and out."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from gemify.io.tables import first_line, parse_bytes
from gemify.model.attention import require_kernel
from gemify.model.config import (
    POOLINGS,
    TUNES,
    Attention,
    Pooling,
    Tune,
    is_frozen,
    require_attention,
    require_layer,
    require_special_tokens,
)
from gemify.model.quantization import parse_quantization
from gemify.model.tokenization import PLAIN, require_template
from gemify.paper.objectives import Schedule
from gemify.paper.views import VIEW_KINDS, ViewKind, Views

Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class DataSource:
    """One of several files or data sets of a recipe. Each step's batch comes from one of them."""

    path: str
    weight: float = 1.0
    """How often it is chosen, relative to the others."""
    batch_size: int | None = None
    """Rows of its batches. None: the recipe's."""

    @staticmethod
    def from_value(value: object) -> DataSource:
        """Read an entry of a recipe's list: a name, or ``path`` with ``weight`` and ``batch_size``.

        Raises:
            ValueError: It is neither, or a number is not positive.
        """
        entry = {"path": value} if isinstance(value, str) else value
        known = {"path", "weight", "batch_size"}
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - known:
            raise ValueError(f"an entry of data must be a name, or path with weight and batch_size, got {value!r}")
        weight, batch_size = entry.get("weight", 1.0), entry.get("batch_size")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ValueError(f"the weight of {entry['path']} must be a positive number, got {weight!r}")
        if batch_size is not None and (type(batch_size) is not int or batch_size < 2):
            raise ValueError(f"the batch_size of {entry['path']} must be a whole number from 2 on, got {batch_size!r}")
        return DataSource(entry["path"], float(weight), batch_size)


@dataclass(frozen=True)
class Recipe:
    """All choices of a run. Contradictions raise ValueError, in one line."""

    base: str = "starter"
    tune: Tune = "gated"
    data: str | tuple[DataSource, ...] = ""
    """A .txt (a row a line) or .jsonl file (also .gz), a .parquet file, or a Hugging Face data set name. A list of
    them, or of ``path`` and ``weight``: each batch comes from one of them, chosen by weight."""
    text_column: str = "text"
    """The column of plain texts; a dotted name (``translation.en``) goes into nested ones."""
    split: str = "train"
    skip_bad: bool = False
    """Leave malformed rows out and count them. Otherwise the first one ends the run."""

    # special tokens (GEM, Section 3.1)
    special_tokens: int = 1
    """How many. 0: the SimCSE baseline (``lora``, ``full``): raw rows, and the mean over the text is the embedding."""
    special_names: tuple[str, ...] | None = None
    pooling: Pooling = "mean"
    attention: Attention = "causal"
    """What a token of the embedding pass sees: ``causal``, or ``bidirectional`` (``embedding_lora`` only)."""
    shared_position: bool = True
    template: str = PLAIN
    """Words around every text that is embedded, also in the contrastive rows; ``{text}`` is the text. Not in the
    paper."""
    layer: int | None = None
    """The layer whose state is the embedding (1 is the first), where contrastive passes stop. None: the last. Not in
    the paper."""

    # LoRA (gated, lora)
    rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"

    # rows (Section 3.2)
    mix: float | None = None
    """p, the share of raw rows. Default: 0 with a frozen base (raw rows would teach nothing), 1 without special tokens,
    else 0.8."""
    reconstruction: float = 0.5
    """Share of reconstruction among the rows with special tokens made from plain text; the rest is split."""
    append_end: bool = True
    """Let a reconstruction end with the end-of-text token, so that recovery knows where to stop."""
    max_length: int = 128
    min_length: int = 8
    """Texts of fewer tokens are skipped."""

    # steps and losses (Sections 3.3 and 4.2)
    max_steps: int = 150
    ntp_steps: int = 60
    ramp_steps: int = 0
    alpha_final: float = 1.0
    batch_size: int = 32
    contrastive_batch_size: int | None = 128
    """Rows of the contrastive batch; none: the special rows of the next-token batch, as in the paper."""
    num_negatives: int = 1
    """Hard negatives of a pair that a step uses, drawn from those its row has. 0: none."""
    contrastive_chunk_size: int | None = None
    """Rows of the contrastive batch whose activations are held at a time (GradCache). The batch may then have any size,
    for one more forward pass. None: all."""
    gradient_accumulation_steps: int = 1
    lr: float = 1e-3
    contrastive_lr: float = 2e-3
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    matryoshka_dims: tuple[int, ...] = ()
    """Dimensions to which vectors are cut in the contrastive loss and that of similarities, beside whole vectors, so
    that cut ones are good too. Not in the paper."""
    view: ViewKind = "delete"
    drop_rate: float = 0.1
    drop_both: bool = False

    # distillation (not in the paper): these losses join the contrastive one
    teacher: str | None = None
    """``st:`` and a sentence-transformers model, or a GEM, whose vectors are learned. None: contrast alone."""
    cosine_weight: float = 1.0
    """Weight of 1 - cosine to the teacher's vector, through a linear map."""
    similarity_weight: float = 0.0
    """Weight of the KL divergence between in-batch similarities and the teacher's."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss. With a teacher only pairs are contrasted."""
    projection: Literal["keep", "drop"] = "keep"
    """Keep the linear map: the GEM's vectors are then in the teacher's space."""
    ridge_texts: int = 2048
    """How many texts the map is first fitted to, by ridge regression."""

    # running
    seed: int = 0
    precision: Precision = "auto"
    quantize: str | None = None
    """Bits of the frozen base's weights: int8, int4 (CPUs) or nf4 (bitsandbytes). None: as they are. No gradient runs
    through a gated text, so this is QLoRA without its cost."""
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    """sdpa, eager or flex_attention (GPUs: block masks, for long rows). None: the model's own."""
    group_tokens: int = 8192
    """Most tokens of one forward pass, padding included; a batch is split into groups of similar length."""
    text_cache: str | None = None
    """Memory for the KV of texts, such as 8GB, so that later epochs run the special tokens alone (``gated``,
    ``tokens``). Texts that lose tokens at random are not kept. None: texts run in every epoch."""
    shuffle_buffer: int = 10_000
    save_steps: int = 50
    save_total_limit: int = 2
    eval_pairs: str | None = None
    """STS pairs (sentence1, sentence2, score) to score during training."""
    eval_steps: int = 50

    def __post_init__(self) -> None:
        for name, allowed in (("tune", TUNES), ("pooling", POOLINGS), ("view", VIEW_KINDS), ("precision", PRECISIONS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
        require_special_tokens(self.special_tokens, tune=self.tune, pooling=self.pooling)
        require_template(self.template, k=self.special_tokens)
        require_layer(self.layer)
        require_attention(self.attention, tune=self.tune)
        if self.special_names is not None and len(self.special_names) != self.special_tokens:
            raise ValueError(f"special_tokens is {self.special_tokens}, but {len(self.special_names)} names are given")
        require_kernel(self.attn_implementation)
        self._check_ranges()
        self._check_frozen_base()
        self._check_rows()
        self._check_contrast()

    def _check_ranges(self) -> None:
        positive = ("rank", "batch_size", "gradient_accumulation_steps", "group_tokens", "shuffle_buffer", "save_steps")
        for name in (*positive, "save_total_limit", "eval_steps", "min_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives must be at least 0, got {self.num_negatives}")
        for name in ("mix", "reconstruction", "lora_dropout"):
            if (value := getattr(self, name)) is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if self.max_length < max(2, self.min_length):
            raise ValueError(f"max_length must be at least 2 and min_length ({self.min_length}), got {self.max_length}")
        if self.min_length < 2:
            raise ValueError(f"min_length must be at least 2 (a row is split in two), got {self.min_length}")
        if self.contrastive_chunk_size is not None and self.contrastive_chunk_size < 1:
            raise ValueError(f"contrastive_chunk_size must be at least 1, got {self.contrastive_chunk_size}")

    def _check_frozen_base(self) -> None:
        if parse_bytes(self.text_cache) is not None and self.tune not in ("gated", "tokens"):
            raise ValueError(f"text_cache needs texts that run without adapter (gated, tokens), got tune {self.tune}")
        if parse_quantization(self.quantize) is not None and (not self.frozen_base or self.precision == "fp32"):
            raise ValueError(
                f"quantize needs a frozen base (gated, tokens, embedding_lora) and bfloat16, got tune {self.tune} and"
                f" precision {self.precision}"
            )

    def _check_rows(self) -> None:
        if self.frozen_base and self.special_tokens and self.mix:
            raise ValueError(
                f"mix = {self.mix} contradicts tune {self.tune!r}: with a frozen base raw rows teach nothing"
            )
        if self.special_tokens and self.p == 1.0:
            raise ValueError("mix = 1 leaves no row with special tokens: there is nothing to train")
        if not self.special_tokens and self.p < 1.0:
            raise ValueError(f"mix = {self.mix} contradicts 0 special tokens: all rows are raw then, leave mix out")
        if not self.special_tokens and self.view == "mask":
            raise ValueError("view 'mask' hides text from special tokens, there are 0: choose delete, span or halves")
        if self.tune == "embedding_lora" and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing runs layers again without the embedding pass's adapter: set"
                " contrastive_chunk_size instead (GradCache)"
            )
        if self.frozen_base and self.gradient_checkpointing:
            raise ValueError(
                f"gradient_checkpointing contradicts tune {self.tune!r}: no gradient runs through the text"
            )

    def _check_contrast(self) -> None:
        schedule, _ = self.schedule, self.views  # both check their values
        if self.tune == "embedding_lora" and schedule.alpha(0) < 1.0:
            raise ValueError(
                "tune 'embedding_lora' acts in the embedding pass only, next-token prediction would teach nothing: set"
                " ntp_steps, ramp_steps to 0 and alpha_final to 1"
            )
        for name in ("cosine_weight", "similarity_weight", "contrastive_weight"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.teacher is not None and self.cosine_weight == self.similarity_weight == 0.0:
            raise ValueError("cosine_weight and similarity_weight are 0: nothing is learned from the teacher")
        if self.teacher is not None and self.contrastive_batch_size is None:
            raise ValueError("a teacher needs a batch of its own: set contrastive_batch_size")
        if any(dim < 1 for dim in self.matryoshka_dims):
            raise ValueError(f"matryoshka_dims must be at least 1 each, got {list(self.matryoshka_dims)}")
        contrastive = schedule.alpha(self.max_steps - 1) > 0.0
        if contrastive and self.contrastive_batch_size is not None and self.contrastive_batch_size < 2:
            raise ValueError(
                f"contrastive_batch_size must be at least 2 (else no negatives), got {self.contrastive_batch_size}"
            )
        if contrastive and self.contrastive_batch_size is None and self.batch_size * (1 - self.p) < 2:
            raise ValueError("fewer than two special rows a batch leave no negatives: set contrastive_batch_size")

    @property
    def frozen_base(self) -> bool:
        """Whether the base model's weights stay as they are."""
        return is_frozen(self.tune)

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The data with their weights."""
        return (DataSource(self.data),) if isinstance(self.data, str) else self.data

    @property
    def p(self) -> float:
        """The share of raw rows: ``mix``, or its default."""
        if self.mix is not None:
            return self.mix
        return 1.0 if not self.special_tokens else 0.0 if self.frozen_base else 0.8

    @property
    def schedule(self) -> Schedule:
        """Alpha and learning rate of each step."""
        names = ("max_steps", "ntp_steps", "ramp_steps", "alpha_final", "lr", "contrastive_lr", "warmup_steps")
        return Schedule(**{n: getattr(self, n) for n in names})

    @property
    def views(self) -> Views:
        """How the contrastive views are made."""
        return Views(self.view, self.drop_rate, self.drop_both)

    def to_yaml(self) -> str:
        """Return the recipe as YAML text, every field included."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, source: str = "the recipe") -> Recipe:
        """Build a recipe from plain values.

        Args:
            values: Fields by name. Lists become tuples, and text and whole numbers become numbers where one is wanted.
            source: Where the values come from, for error messages.

        Raises:
            ValueError: A name is unknown, a value has the wrong type, or values contradict each other.
        """
        hints = get_type_hints(Recipe)
        if unknown := sorted(set(values) - set(hints)):
            raise ValueError(f"{source} has unknown entries {unknown}: known are {', '.join(hints)}")
        checked = {}
        for name, value in values.items():
            if name == "data" and isinstance(value, list):
                value = tuple(DataSource.from_value(entry) for entry in value)
            elif isinstance(value, list):
                value = tuple(value)
            elif type(value) in (int, str) and float in (hints[name], *get_args(hints[name])):
                with contextlib.suppress(ValueError):
                    value = float(value)  # YAML reads 1e-3 as text
            try:
                # Which one of a few words: __post_init__ checks that.
                type_validator(name, value, str if get_origin(hints[name]) is Literal else hints[name])
            except TypeError as error:
                raise ValueError(f"{source}: {name} must be {_describe(hints[name])}, got {value!r}") from error
            checked[name] = value
        return Recipe(**checked)

    @staticmethod
    def read_yaml(path: Path) -> dict[str, Any]:
        """Read the entries of a YAML recipe, for `from_dict`.

        Raises:
            ValueError: The file is missing, is not YAML, or holds something else than names and values.
        """
        if not path.is_file():
            raise ValueError(f"no such recipe file: {path}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not readable as YAML: {first_line(error)}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
        return values


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # GEM, Section 4.2. What the paper leaves open (the last two lines) is our choice: docs/paper.md.
    "paper": {
        "tune": "full",
        "lora_dropout": 0.0,
        "mix": 0.8,
        "max_length": 512,
        "max_steps": 1000,
        "ntp_steps": 100,
        "ramp_steps": 0,
        "batch_size": 32,
        "contrastive_batch_size": None,
        "lr": 1e-4,
        "contrastive_lr": 1e-5,
        "warmup_steps": 0,
        "append_end": False,
        "view": "delete",
        "drop_rate": 0.1,
        "drop_both": False,
    },
    # A teacher's space, so that an index which the teacher wrote is kept (`gemify align`).
    "align": {
        "tune": "embedding_lora",
        "attention": "bidirectional",
        "special_tokens": 0,
        "projection": "keep",
        "similarity_weight": 0.3,
        "contrastive_weight": 0.2,
        "ntp_steps": 0,
        "batch_size": 64,
        "contrastive_batch_size": 64,
        "contrastive_lr": 1e-3,
        "drop_rate": 0.0,
        "max_steps": 600,
    },
}


def _describe(hint: Any) -> str:
    """A type in words: "a whole number or none"."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    names = []
    for choice in get_args(hint) if get_origin(hint) is types.UnionType else (hint,):
        if get_origin(choice) is Literal:
            names.append("one of " + ", ".join(get_args(choice)))
        else:
            names.append(words.get(choice, "a list of names"))
    return " or ".join(names)
