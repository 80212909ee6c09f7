"""The models of an evaluation: GEMs, their bases, baselines and other encoders; their names, revisions and loading.

Two language models are compared by their logits, bit for bit, and by held-out loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gemify import __version__
from gemify.evaluation.baselines import Baseline, BaselineEncoder, load_sentence_transformer
from gemify.evaluation.results import ModelEntry
from gemify.model.base import default_device, load_base, parse_dtype
from gemify.model.config import CONFIG_FILE, GemConfig, resolve_directory
from gemify.model.forward import length_groups, positions_of, right_pad
from gemify.model.gem import GemModel
from gemify.model.pretrained import weights_fingerprint
from gemify.model.quantization import Quantization

_WHOLE = 2**26  # bytes of a weights file that are hashed whole; a longer one is sampled


@dataclass(frozen=True)
class EvalSettings:
    """Everything but the weights that moves a figure. It is part of every revision."""

    dtype: str = "float32"
    instructions: bool = False
    limit: int | None = None
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        parse_dtype(self.dtype)
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"limit must be at least 2 rows, got {self.limit}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return parse_dtype(self.dtype) if self.quantize is None else torch.bfloat16

    def revision(self, weights: str, *, language_only: bool = False) -> str:
        """Weights and settings as a revision. ``language_only``: without instructions, which only vectors depend on."""
        parts = [weights, self.quantize or self.dtype]
        if self.instructions and not language_only:
            parts.append("instructions")
        if self.limit is not None:
            parts.append(f"limit{self.limit}")
        return "-".join(parts)

    def facts(self) -> dict[str, Any]:
        """The settings as facts of a `ModelEntry`."""
        return {
            "dtype": self.dtype,
            **({"quantize": self.quantize} if self.quantize is not None else {}),
            "instructions": self.instructions,
            "limit": self.limit,
            "gemify": __version__,
        }


class EvalModels:
    """The models of one evaluation: loads each when it is first needed."""

    def __init__(self, model: str | None, *, base: str | None, settings: EvalSettings, device: str | None) -> None:
        self.settings, self.device = settings, device
        self.directory = resolve_directory(model) if model is not None else None
        self.config = GemConfig.from_directory(self.directory) if self.directory is not None else None
        name = base or (self.config.base if self.config is not None else None)
        if name is None:
            raise ValueError(
                "nothing to evaluate: give --model DIR, --base MODEL with --baselines, or --encoder st:PATH"
            )
        self.model, self.base_name, self.base_given = model, name, base
        self._gem: GemModel | None = None
        self._base: tuple[Any, Any] | None = None

    @property
    def gem(self) -> GemModel:
        """The GEM, loaded at the first use."""
        if self._gem is None:
            assert self.model is not None
            self._gem = GemModel.from_pretrained(
                self.model,
                base=self.base_given,
                dtype=self.settings.torch_dtype,
                device=self.device,
                quantize=self.settings.quantize,
            )
        return self._gem

    @property
    def base(self) -> tuple[Any, Any]:
        """The base model and its tokenizer."""
        if self._base is None:
            revision = self.config.base_revision if self.config is not None and self.base_given is None else None
            self._base = load_base(
                self.base_name,
                dtype=self.settings.torch_dtype,
                device=self.device,
                revision=revision,
                quantize=self.settings.quantize,
            )
        return self._base

    def baseline(self, method: Baseline) -> BaselineEncoder:
        """The base's embeddings by a method."""
        lm, tokenizer = self.base
        return BaselineEncoder(lm, tokenizer, method)

    def gem_entry(self) -> ModelEntry:
        """The GEM as an embedding and language model."""
        assert self.directory is not None
        assert self.config is not None
        directory = self.directory.resolve()
        label = directory.name
        if directory.parent.name == "checkpoints":
            label = f"{directory.parents[1].name}-{label}"
        base = self.base_entry()
        weights = weights_hash(directory)
        if self.base_given is not None and self.config.tune != "full":
            found = weights_fingerprint(self.base[0])
            weights += "" if found == self.config.base_fingerprint else f"-on-{found}"  # another model, then
        simcse = self.config.k == 0 and not self.config.frozen_base
        words = "SimCSE, no special token" if simcse else f"GEM {self.config.tune}"
        facts = {
            "label": f"{words}: {label}",
            "kind": "gem",
            "tune": self.config.tune,
            "special_tokens": self.config.k,
            "pooling": self.config.pooling,
            **({"layer": self.config.layer} if self.config.layer is not None else {}),
            "base": self.base_name,
            "base_subject": {"name": base.name, "revision": base.revision},
            "path": str(self.model),
            **_training(directory),
            **self.settings.facts(),
        }
        return ModelEntry(f"gem/{_plain(label)}", self.settings.revision(weights), facts)

    def base_entry(self) -> ModelEntry:
        """The base as a language model."""
        return self._base_entry("base", f"{_short(self.base_name)}, base model", "base", language_only=True)

    def baseline_entry(self, method: Baseline) -> ModelEntry:
        """The base as an embedding model by a method."""
        words = {"mean": "mean pooling", "weighted-mean": "weighted mean pooling", "last": "last token"}
        names = {"prompteol": "PromptEOL", "echo": "Echo"}
        label = f"{_short(self.base_name)}, {words.get(method) or names[method]}"
        return self._base_entry(method, label, "baseline", language_only=False)

    def _base_entry(self, name: str, label: str, kind: str, *, language_only: bool) -> ModelEntry:
        weights = self.config.base_fingerprint if self.config is not None and self.base_given is None else None
        weights = weights or weights_fingerprint(self.base[0])
        facts = {"label": label, "kind": kind, "tune": None, "base": self.base_name, **self.settings.facts()}
        if language_only:
            facts["instructions"] = False  # they are for vectors
        revision = self.settings.revision(weights, language_only=language_only)
        return ModelEntry(f"{_plain(_short(self.base_name))}/{name}", revision, facts)


def encoder_entry(spec: str, settings: EvalSettings) -> tuple[ModelEntry, str]:
    """Entry and path of an ``--encoder``: ``st:PATH`` or ``st:NAME``, a sentence-transformers model."""
    kind, _, path = spec.partition(":")
    if kind != "st" or not path:
        raise ValueError(f"unknown encoder {spec!r}: write st:PATH or st:NAME for a sentence-transformers model")
    directory = Path(path)
    weights = weights_hash(directory) if directory.is_dir() else "hub"
    label = directory.resolve().name if directory.is_dir() else path.rsplit("/", 1)[-1]
    facts = {"label": label, "kind": "encoder", "tune": None, "path": path, **settings.facts()}
    name = label if directory.is_dir() else path  # of two models on the hub the owner may be all that differs
    return ModelEntry(f"st/{_plain(name)}", settings.revision(weights), facts), path


def load_encoder(path: str, settings: EvalSettings, device: str | None) -> Any:
    """Load a sentence-transformers model with the evaluation's dtype."""
    return load_sentence_transformer(path, device=device, dtype=settings.torch_dtype)


def weights_hash(directory: Path) -> str:
    """Twelve hex digits of the weights and configuration in a directory; long files are sampled at 64 places."""
    digest = hashlib.sha256()
    weights = [p for ending in ("safetensors", "bin") for p in directory.rglob(f"*.{ending}")]
    files = sorted(p for p in weights if "checkpoints" not in p.relative_to(directory).parts)
    for path in [*files, directory / CONFIG_FILE]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for part in range(64):
                file.seek(part * (size // 64))
                digest.update(file.read(2**16))
    return digest.hexdigest()[:12]


def _training(directory: Path) -> dict[str, Any]:
    """Summary and loss curve of the run that made a GEM, if its directory has them."""
    summary, curve = directory / "summary.json", directory / "metrics.jsonl"
    facts: dict[str, Any] = {"training": None, "curve": []}
    try:
        if summary.is_file():
            facts["training"] = json.loads(summary.read_text(encoding="utf-8"))
        if curve.is_file():
            facts["curve"] = list(_curve(curve.read_text(encoding="utf-8").splitlines()))
    except ValueError as error:
        raise ValueError(f"{directory}: summary.json or metrics.jsonl is damaged: restore or remove it") from error
    return facts


def _curve(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        entry = json.loads(line)
        if "loss" in entry:
            yield {name: entry[name] for name in ("step", "loss", "ntp", "contrastive", "alpha") if name in entry}


def _short(name: str) -> str:
    return Path(name).name if Path(name).exists() else name.rsplit("/", 1)[-1]


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: What do plants need to grow?\nA: Water, light and",
    "Once upon a time, in a village at the edge of a great forest, there lived an old clockmaker who",
    "1, 2, 4, 8, 16,",
)
"""A few prompts of different kinds, to compare language models on."""


def numerics_signature(device: torch.device | str | None) -> str:
    """What the rounding of sums depends on, apart from the weights: torch version, device, threads.

    Language scores are comparable to the last answer only where it is equal.
    On a CPU another number of threads adds in another order: in bfloat16 one answer in thirty of MMLU changes.
    """
    kind = default_device() if device is None else torch.device(device)
    threads = f", {torch.get_num_threads()} threads" if kind.type == "cpu" else ""
    name = f" {torch.cuda.get_device_name(kind)}" if kind.type == "cuda" else ""
    return f"torch {torch.__version__}, {kind.type}{name}{threads}"


@torch.inference_mode()
def logits_of(lm: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """Logits [T, V] of one text."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(lm.device)
    logits: torch.Tensor = lm(input_ids=ids, use_cache=False).logits[0]
    return logits


def same_logits(one: Any, other: Any, tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether two language models give the same logits on every text, to the last bit."""
    return all(torch.equal(logits_of(one, tokenizer, t), logits_of(other, tokenizer, t)) for t in texts)


def language_loss(lm: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 256) -> float:
    """Mean next-token loss in nats over the texts' tokens (each text on its own, cut to ``max_length``)."""
    losses = compute_text_losses(lm, tokenizer, texts, max_length=max_length)
    return sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))


@torch.inference_mode()
def compute_text_losses(
    lm: Any, tokenizer: Any, texts: Sequence[str], *, max_length: int = 256
) -> list[tuple[float, int]]:
    """Summed next-token loss in nats of each text, and the number of tokens predicted."""
    rows = [r[:max_length] for r in tokenizer(list(texts), verbose=False)["input_ids"]]
    device = lm.device
    losses = [(0.0, 0)] * len(rows)
    for group in length_groups([len(r) for r in rows], max_tokens=4096):
        ids_BT, mask_BT = (t.to(device) for t in right_pad([rows[i] for i in group]))
        if ids_BT.shape[1] < 2:  # nothing to predict
            continue
        logits_BTV = lm(
            input_ids=ids_BT, attention_mask=mask_BT.long(), position_ids=positions_of(mask_BT), use_cache=False
        ).logits
        labels_BT = ids_BT.masked_fill(~mask_BT, -100)[:, 1:]
        loss_BT = F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2).float(), labels_BT, reduction="none")
        for i, loss, count in zip(
            group, loss_BT.double().sum(1).tolist(), (labels_BT >= 0).sum(1).tolist(), strict=True
        ):
            losses[i] = (loss, count)
    return losses


@torch.inference_mode()
def compare_logits(one: Any, other: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """How many prompts give two language models the same logits to the last bit, and the largest difference."""
    identical, largest = 0, 0.0
    for prompt in prompts:
        first, second = (logits_of(lm, tokenizer, prompt) for lm in (one, other))
        width = min(first.shape[-1], second.shape[-1])  # a trained table may have grown by the special tokens' rows
        first, second = first[:, :width], second[:, :width].to(first.device)
        if torch.equal(first, second):
            identical += 1
        else:
            largest = max(largest, float((first.float() - second.float()).abs().max()))
    return {"prompts": len(prompts), "identical": identical, "max_difference": largest}
