"""What runs the shards: this process, or Ray Data with one worker a device, on one machine or a cluster.

Ray gives shards out, starts killed workers anew and gives their shards out again; nothing here does. Since a shard that
is done stays done, what a worker had finished when it died is not computed twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gemify.io.directory import Directory
from gemify.io.errors import first_line
from gemify.io.signals import signal_handlers
from gemify.retrieval.bulk.plan import Shard
from gemify.retrieval.bulk.rows import ShardReader
from gemify.retrieval.bulk.shard import DocumentEncoder, DoneMarker, embed_shard
from gemify.retrieval.corpus_format import CorpusMeta

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
