"""Runs mteb's tasks over any encoder, and keeps the results in mteb's own format."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemify.evaluation.models import EvalModels, EvalSettings
from gemify.evaluation.results import ModelEntry, ResultStore

logger = logging.getLogger(__name__)


class MtebEncoder:
    """An encoder (ours, or a sentence-transformers model) as mteb calls one.

    ``instruction`` stands before every text as "instruction: text", in retrieval and reranking before queries only, as
    in LLM2Vec (arXiv 2404.05961).
    """

    def __init__(self, encoder: Any, entry: ModelEntry, *, instruction: str = "") -> None:
        from mteb.models.model_meta import ModelMeta

        self.encoder = encoder
        self.prompt = f"{instruction.strip().rstrip('.:')}: " if instruction else None
        self.mteb_model_meta = ModelMeta.create_empty({"name": entry.name, "revision": entry.revision})

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, batch_size: int = 64, **_: Any
    ) -> np.ndarray:
        """Vectors [N, D] of the texts in mteb's batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        side = getattr(prompt_type, "value", prompt_type)
        encode = self.encoder.encode
        options: dict[str, Any] = {}
        if self.prompt and side != "document":
            options["prompt"] = self.prompt
        elif side in ("query", "document") and hasattr(self.encoder, f"encode_{side}"):
            encode = getattr(self.encoder, f"encode_{side}")  # the model's own prompts, if it has any
        with _loud():
            vectors = encode(texts, batch_size=batch_size, **options)
        return np.asarray(vectors, dtype=np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of every pair: [N, M]."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of vectors at the same place: [N]."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def mteb_model(path: str, *, base: str | None = None, dtype: str = "float32", device: str | None = None) -> Any:
    """Return a GEM as a model of mteb, under the name and revision that `gemify eval` uses.

        mteb.evaluate(mteb_model("starter"), mteb.get_tasks(["STSBenchmark"]))

    Args:
        path: A GEM's directory, repo id or shipped name.
        base: Where its base is. None: where its configuration says.
        dtype: Of the weights and the arithmetic.
        device: Where it runs. None: the accelerator if there is one.

    Returns:
        mteb's ``ModelMeta``. Its ``load_model`` loads the GEM.

    Raises:
        ValueError: No GEM is there.
    """
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    models = EvalModels(path, base=base, settings=EvalSettings(dtype), device=device)
    entry, config = models.gem_entry(), models.config
    assert config is not None

    def load_gem(*_: Any, **__: Any) -> MtebEncoder:
        return MtebEncoder(models.gem, entry)

    facts = {
        "loader": load_gem,
        "name": entry.name,
        "revision": entry.revision,
        "max_tokens": config.max_length,
        "framework": ["PyTorch", "Transformers", "Sentence Transformers"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": bool(config.prompts),
        "modalities": ["text"],
        "model_type": ["dense"],
    }
    return ModelMeta.create_empty(facts)


def instruction_of(task: Any) -> str:
    """The task's instruction for queries (mteb keeps those of LLM2Vec and E5), or its task type's."""
    prompt = task.metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    return str(prompt or getattr(task, "abstask_prompt", "") or "")


def is_finished(store: ResultStore, entry: ModelEntry, name: str) -> bool:
    """Whether a task has a result. A file cut short by a kill is removed."""
    path = store.directory / "results" / entry.folder / f"{name}.json"
    if not path.is_file():
        return False
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        logger.warning("%s is damaged and is measured again", path)
        path.unlink()
        return False
    return True


def run_task(
    encoder: Any,
    task: Any,
    entry: ModelEntry,
    store: ResultStore,
    *,
    instructions: bool = False,
    batch_size: int = 64,
) -> float:
    """Evaluate one task and write its result, or read the result that is there.

    Args:
        encoder: What has an ``encode`` of texts.
        task: From `make_task`.
        entry: The model's name and revision, which mteb files the result under.
        store: Where the result goes.
        instructions: Put the task's instruction before the texts.
        batch_size: Most texts of a batch.

    Returns:
        The main score times 100.
    """
    import mteb

    wrapped = MtebEncoder(encoder, entry, instruction=instruction_of(task) if instructions else "")
    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mteb.evaluate(
            wrapped,
            task,
            cache=mteb.ResultCache(cache_path=Path(store.directory)),
            overwrite_strategy="only-missing",
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
        )
    return 100.0 * float(result.task_results[0].get_score())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the logs and bars of mteb and datasets, which report every step."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in ("mteb", "datasets")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _loud() -> Iterator[None]:
    """With the warnings of the encoder itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield
