"""How shards are run, by this process or by Ray Data with one worker a device, on one machine or a cluster.

Ray gives shards out, starts killed workers anew and gives their shards out again; nothing here does. Since a shard that
is done stays done, what a worker had finished when it died is not computed twice.

A shard is read, embedded, written, and only then marked as done. `embed_shard` may run any number of times, be killed
at any point, and run in two processes at once. The first done marker of a shard names its part. Other parts lie unused
until the run's end deletes them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from gemify.io.directory import Directory
from gemify.io.signals import signal_handlers
from gemify.io.tables import first_line
from gemify.model.encode import ThroughputMeter
from gemify.retrieval.bulk.lance_writer import table, write_part
from gemify.retrieval.bulk.plan import Shard
from gemify.retrieval.bulk.rows import ShardReader
from gemify.retrieval.vector_table import CorpusMeta, marker_name

_ATTEMPTS = 3  # for a disk or a network that fails and comes back
_MAX_NAMED_ROWS = 20  # of a shard


class DocumentEncoder(Protocol):
    """The methods of a model that a corpus needs. `GemModel` has them."""

    meter: ThroughputMeter

    @property
    def fingerprint(self) -> str:
        """A name of the model's weights and settings: equal for equal vectors."""

    def get_embedding_dim(self) -> int:
        """Return D, the width of a vector."""

    def encode_document(self, inputs: Any, **options: Any) -> Any:
        """Embed a list of texts, [N, D]."""


@dataclass(frozen=True)
class DoneMarker:
    """A shard's done marker."""

    shard: Shard
    rows: int
    """Number of rows embedded: those of the shard but for blank and malformed ones."""
    skipped: int
    bad: list[str] = field(default_factory=list)
    """The first skipped rows, with reasons."""
    parts: list[str] = field(default_factory=list)
    """References to the part, as `write_part` gives them."""
    tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return the marker's text."""
        return json.dumps({**asdict(self), "shard": self.shard.to_dict()})

    @classmethod
    def from_json(cls, text: str | bytes) -> DoneMarker:
        """Read a marker that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "shard": Shard.from_dict(values["shard"])})


def embed_shard(
    shard: Shard,
    *,
    model: DocumentEncoder,
    reader: ShardReader,
    directory: Directory,
    batch_size: int = 32,
    wait: float = 1.0,
) -> DoneMarker:
    """Embed a shard's passages into the corpus, unless they are there.

    Args:
        shard: The shard.
        model: The model of the corpus.
        reader: The reader of its inputs.
        directory: The corpus.
        batch_size: Maximum passages that the model embeds at a time.
        wait: Seconds before a second attempt, when a disk or a network failed.

    Returns:
        The shard's done marker: this call's, or the earlier one.

    Raises:
        ValueError: A malformed row, an input that changed, or a vector that is not finite.
        OSError: The disk or the network failed three times.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _embed(shard, model, reader, directory, batch_size)
        except OSError:
            reader.close()  # a file that failed half-way does not go on where it was
            if attempt == _ATTEMPTS:
                raise
            time.sleep(wait * attempt)
    raise AssertionError("the last attempt returns or raises")


def _embed(
    shard: Shard, model: DocumentEncoder, reader: ShardReader, directory: Directory, batch_size: int
) -> DoneMarker:
    if (there := directory.read(marker_name(shard.name))) is not None:
        return DoneMarker.from_json(there)
    begin = time.perf_counter()
    skipped: list[str] = []
    passages = reader.passages(shard, skipped)
    meta: CorpusMeta = reader.meta
    vectors_ND, tokens = np.empty((0, meta.dimension), np.float32), 0
    if passages:
        vectors_ND = np.asarray(model.encode_document([p.embed_text for p in passages], batch_size=batch_size))
        tokens = model.meter.tokens - model.meter.padding
    if wrong := np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1)).tolist():
        raise ValueError(
            f"{shard.path}: the vector of passage {passages[wrong[0]].id!r} has numbers that are not finite: compute in"
            " another precision (--dtype float32)"
        )
    parts = write_part(directory, meta, shard, table(meta, passages, vectors_ND))
    seconds = time.perf_counter() - begin
    done = DoneMarker(shard, len(passages), len(skipped), skipped[:_MAX_NAMED_ROWS], parts, tokens, seconds)
    if directory.write_if_absent(marker_name(shard.name), done.to_json().encode()):
        return done
    return DoneMarker.from_json(directory.read(marker_name(shard.name)) or b"")


_MAX_BLOCKS = 4096  # groups of shards that Ray tracks


@dataclass(frozen=True)
class EmbedJob:
    """The settings that a worker needs."""

    uri: str
    meta: CorpusMeta
    base: str | None = None
    device: str | None = None
    batch_size: int = 32
    skip_bad: bool = False

    def load_model(self) -> DocumentEncoder:
        """Load the model of the corpus."""
        from gemify.model.gem import GemModel

        loading: Any = {"device": self.device, "dtype": self.meta.dtype}
        return GemModel.from_pretrained(self.meta.model, base=self.base, **loading)

    def embedder(self, model: DocumentEncoder) -> Callable[[Shard], DoneMarker]:
        """Return `embed_shard` with this job's settings. It reads shards fastest in their order."""
        reader, directory = ShardReader(self.meta, skip_bad=self.skip_bad), Directory(self.uri)
        return lambda shard: embed_shard(
            shard, model=model, reader=reader, directory=directory, batch_size=self.batch_size
        )


def run_locally(shards: Sequence[Shard], job: EmbedJob, model: DocumentEncoder) -> Generator[DoneMarker, None, None]:
    """Embed one shard after the other, in this process."""
    embed = job.embedder(model)
    for shard in shards:
        yield embed(shard)


def run_on_ray(
    shards: Sequence[Shard], job: EmbedJob, *, workers: int | None = None
) -> Generator[DoneMarker, None, None]:
    """Embed shards by workers on a Ray cluster (``RAY_ADDRESS``) or a local one.

    Args:
        shards: The shards to embed.
        job: The settings of the run.
        workers: Number of workers. By default one a GPU of the cluster; without GPUs, one a machine.

    Yields:
        Done markers, in the order in which the shards are done.

    Raises:
        ValueError: A worker's error, or Ray is not installed.
        RuntimeError: Ray failed.
    """
    try:
        import ray.data
        from ray.exceptions import RayError
    except ModuleNotFoundError as error:
        raise ValueError(f"the executor ray needs Ray ({error.name} is missing): pip install 'gemify[ray]'") from None
    if not shards:
        return
    with _cluster(ray, workers):
        rows = ray.data.from_items([{"shard": s.to_json()} for s in shards], override_num_blocks=_blocks(len(shards)))
        done = rows.map_batches(
            ShardWorker,
            batch_size=1,
            fn_constructor_args=(job,),
            **_devices(ray, job, workers),
        )
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise ValueError(row["error"])
                yield DoneMarker.from_json(row["done"])
        except RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines() or ["no reason given"]
            raise RuntimeError(f"a worker failed: {reason[0]}") from error


class ShardWorker:
    """One model on one device. Ray calls it with one shard at a time."""

    def __init__(self, job: EmbedJob) -> None:
        self._embed: Callable[[Shard], DoneMarker] | None = None
        try:
            model = job.load_model()
            if model.fingerprint != job.meta.fingerprint:
                raise ValueError(
                    f"{job.meta.model} is another model on a worker (fingerprint {model.fingerprint}) than where the"
                    f" run began ({job.meta.fingerprint}): put the same one on every machine"
                )
            self._embed = job.embedder(model)
        except (ValueError, OSError) as error:  # reported with the first shard: Ray would start the worker anew
            self._error = f"a worker cannot load the model: {first_line(error)}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Embed the shard of a batch; its done marker, or an error."""
        if self._embed is None:
            return {"done": [""], "error": [self._error]}
        try:
            return {"done": [self._embed(Shard.from_json(str(batch["shard"][0]))).to_json()], "error": [""]}
        except ValueError as error:
            return {"done": [""], "error": [str(error)]}


def _blocks(shards: int) -> int:
    return max(1, min(shards, _MAX_BLOCKS))


def _devices(ray: Any, job: EmbedJob, workers: int | None) -> dict[str, Any]:
    """How many workers, and the share of a machine that each takes."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if job.device is None or job.device.startswith("cuda") else 0
    size = workers or gpus or len(ray.nodes())
    share = {"num_gpus": 1} if gpus else {"num_cpus": max(1, int(resources.get("CPU", 1)) // size)}
    return {"compute": ray.data.ActorPoolStrategy(size=size), **share}


@contextlib.contextmanager
def _cluster(ray: Any, workers: int | None) -> Iterator[None]:
    """Ray as it runs already, or started for the block."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plan and its bars; ours say what is done
    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        yield
        return
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(workers or 1, os.cpu_count() or 1)}
    kept: dict[int, Any] = {
        signal.SIGTERM: signal.getsignal(signal.SIGTERM)
    }  # Ray's own would end the process without a commit
    try:
        with signal_handlers(kept):
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # Ray raises the bare class where a machine is too busy to start it in 30 seconds
        raise RuntimeError(f"Ray did not start: {(str(error).splitlines() or ['no reason given'])[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()
