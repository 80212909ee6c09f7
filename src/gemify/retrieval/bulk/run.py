"""`embed_corpus`: inputs in, one searchable table of vectors out. After a kill at any point, the same call continues.

plan      read the inputs through: shards, and whether they are those of an earlier run
embed     every shard that has no done marker, here or on Ray
commit    the parts of all markers become the table, in the order of the inputs
index     once all shards are done
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from gemify.io.directory import Directory, error_reason, is_disk_full, is_remote, resolve_uri
from gemify.io.signals import signal_handlers
from gemify.retrieval.bulk.executors import DocumentEncoder, DoneMarker, EmbedJob, run_locally, run_on_ray
from gemify.retrieval.bulk.lance_writer import commit, committed, vacuum
from gemify.retrieval.bulk.plan import Shard, find_inputs, plan
from gemify.retrieval.bulk.rows import ShardReader
from gemify.retrieval.document_store import Store
from gemify.retrieval.lance import IndexKind, only_writer
from gemify.retrieval.vector_table import MANIFEST, MARKERS, Corpus, CorpusMeta, read_manifest, require_index

Executor = Literal["local", "ray"]
_ELSEWHERE = "leave the setting out, or give another --output"


@dataclass(frozen=True)
class EmbedReport:
    """What a run did, and what the corpus holds after it."""

    rows: int
    """Rows in the corpus."""
    left: int
    """Rows of the inputs still to embed."""
    embedded: int
    """Rows embedded in this run."""
    skipped: int
    """Malformed rows left out, in all runs."""
    bad: tuple[str, ...]
    """The first malformed rows, with reasons."""
    tokens: int
    """Tokens embedded in this run."""
    seconds: float
    """Time from the first shard to the last."""
    indexes: tuple[str, ...]
    """Indexes built in this run."""
    stopped: bool
    """Whether Ctrl-C or SIGTERM ended the run."""

    @property
    def rows_per_second(self) -> float:
        """Rows embedded a second; 0 if there were none."""
        return self.embedded / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens embedded a second; 0 if there were none."""
        return self.tokens / self.seconds if self.seconds else 0.0


def embed_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    model: DocumentEncoder,
    *,
    model_name: str,
    base: str | None = None,
    device: str | None = None,
    executor: Executor = "local",
    workers: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    skip_bad: bool = False,
    index: IndexKind | Literal["auto", "none"] = "auto",
    show_progress_bar: bool = False,
    **settings: Any,
) -> EmbedReport:
    """Embed the rows of files into a corpus that `gemify search` opens.

    Args:
        inputs: Files of rows (`gemify.io.rows`), or directories of them.
        output: A directory, or a URI that Lance and pyarrow take (``s3://bucket/path``).
        model: The model. With Ray it only names the model; workers load theirs.
        model_name: The name that loads the model, which the corpus keeps.
        base: Where to look for the base model instead.
        device: The device of workers on Ray.
        executor: ``local``, or ``ray`` for a cluster (``RAY_ADDRESS``) or this machine.
        workers: Number of Ray's workers. By default one a GPU; without GPUs, one a machine.
        batch_size: Maximum passages that the model embeds at a time.
        limit: Maximum rows to embed now, in whole shards.
        skip_bad: Whether to leave malformed rows out, and count them.
        index: The kind of vector index. ``auto``: one that fits, from 20,000 rows on. ``none``: no index of texts
            either.
        show_progress_bar: Whether to show progress bars on stderr.
        settings: Fields of `CorpusMeta` for a new corpus. Those of an existing one must be the same, or None.

    Returns:
        What was embedded, and what the corpus holds.

    Raises:
        ValueError: An input is malformed, or the corpus was begun with another model, settings or inputs.
        OSError: A disk is full or fails. What is done stays, and the same call continues.
    """
    _check_options(executor, workers, batch_size, limit, index)
    found = find_inputs(inputs)
    uri = _require_corpus_uri(output)
    directory = Directory(uri)
    meta = _resolve_meta(directory, model, model_name, settings)
    _require_index(meta, index)
    if meta.format == "parquet":
        found = _without_outputs(found, inputs, directory)
    if directory.local:
        Path(directory.path).mkdir(parents=True, exist_ok=True)
    job = EmbedJob(uri, meta, base, device, batch_size, skip_bad)
    with only_writer(uri), _explain_disk_errors(uri):
        shards = _plan_shards(found, meta, show_progress_bar)
        done = _read_markers(directory, shards, uri)
        directory.write(MANIFEST, meta.to_json().encode())
        todo = _take_rows([s for s in shards if s.number not in done], limit)
        run = run_locally(todo, job, model) if executor == "local" else run_on_ray(todo, job, workers=workers)
        before = len(done)
        begin = time.perf_counter()
        stopped = _run_shards(run, done, shards, show_progress_bar)
        seconds = time.perf_counter() - begin
        if stopped:  # workers may have done more than they could still say
            done.update({n: d for n, d in _read_markers(directory, shards, uri).items() if n not in done})
        whole = len(done) == len(shards)
        built = _commit_shards(directory, meta, list(done.values()), index if whole else "none", whole)
    new = list(done.values())[before:]
    return EmbedReport(
        rows=sum(d.rows for d in done.values()),
        left=sum(s.rows for s in shards if s.number not in done),
        embedded=sum(d.rows for d in new),
        skipped=sum(d.skipped for d in done.values()),
        bad=tuple(line for d in done.values() for line in d.bad)[:20],
        tokens=sum(d.tokens for d in new),
        seconds=seconds,
        indexes=tuple(built),
        stopped=stopped,
    )


def _require_corpus_uri(output: str | Path) -> str:
    """The URI to write to. Raises ValueError if it is a file, or a store."""
    uri = resolve_uri(output)
    if not is_remote(uri) and Path(uri).exists() and not Path(uri).is_dir():
        raise ValueError(f"cannot write a corpus to {uri}: it is a file, give a directory")
    if Store.exists(uri):
        raise ValueError(f"{uri} is a store that gemify index wrote: give another --output")
    return uri


@contextlib.contextmanager
def _explain_disk_errors(uri: str) -> Iterator[None]:
    """Say in one line that a disk failed, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        mend = "make room" if is_disk_full(error) else "mend that"
        raise OSError(
            f"{uri} is not finished ({error_reason(error)}): what is done stays, {mend} and run the same command again"
        ) from error


def _check_options(executor: str, workers: int | None, batch_size: int, limit: int | None, index: str) -> None:
    if executor not in get_args(Executor):
        raise ValueError(f"unknown executor {executor!r}: choose one of {', '.join(get_args(Executor))}")
    if index not in (allowed := ("auto", "none", *get_args(IndexKind))):
        raise ValueError(f"unknown index {index!r}: choose one of {', '.join(allowed)}")
    if workers is not None and executor != "ray":
        raise ValueError("--workers are Ray's: give --executor ray")
    for name, value in (("workers", workers), ("batch size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _resolve_meta(directory: Directory, model: DocumentEncoder, name: str, settings: dict[str, Any]) -> CorpusMeta:
    """The settings of the corpus. Those of a run that ended before any shard was done do not bind."""
    given = {key: value for key, value in settings.items() if value is not None}
    uri, old = directory.uri, read_manifest(directory.uri)
    kept = {} if old is None else dataclasses.asdict(old)
    made: dict[str, Any] = {"model": name, "fingerprint": model.fingerprint, "dimension": model.get_embedding_dim()}
    wanted = CorpusMeta(**{**kept, **made, **given})
    if old is None or not (
        directory.list_names(MARKERS) or any(n.endswith(".parquet") for n in directory.list_names(""))
    ):
        return wanted
    if old.fingerprint != wanted.fingerprint:
        raise ValueError(
            f"{uri} was begun by another model ({old.model}, fingerprint {old.fingerprint}; this one has"
            f" {wanted.fingerprint}): load that model, or give another --output"
        )
    for key in given:
        if getattr(old, key) != getattr(wanted, key):
            said = f"{key.replace('_', ' ')} {getattr(old, key)}, not {getattr(wanted, key)}"
            raise ValueError(f"{uri} was begun with {said}: {_ELSEWHERE}")
    return wanted


def _require_index(meta: CorpusMeta, index: str) -> None:
    """Raise ValueError before anything is embedded if the index cannot be built."""
    if index not in ("auto", "none"):
        if meta.format == "parquet" or meta.precision == "int8":
            kind = "Parquet files" if meta.format == "parquet" else "int8 vectors"
            raise ValueError(f"{kind} get no index of vectors, got {index}: leave --index out")
        require_index(meta.precision, index, meta.dimension)


def _without_outputs(found: Sequence[Path], given: Sequence[str | Path], directory: Directory) -> list[Path]:
    """Inputs without the corpus' own Parquet files."""
    if any(Path(one).absolute().is_relative_to(directory.uri) for one in given):
        raise ValueError(
            f"the inputs lie in the output {directory.uri}, beside Parquet files of its own: give another --output"
        )
    return [path for path in found if not path.is_relative_to(directory.uri)]


def _plan_shards(inputs: Sequence[Path], meta: CorpusMeta, show: bool) -> list[Shard]:
    size = sum(path.stat().st_size for path in inputs)
    with tqdm(total=size, desc="read inputs", unit="B", unit_scale=True, disable=not show, leave=False) as bar:
        shards = list(plan(inputs, shard_rows=meta.shard_rows, columns=ShardReader(meta).columns, on_bytes=bar.update))
    if not shards:
        raise ValueError(f"the inputs hold no row ({', '.join(str(p) for p in inputs[:3])}): give rows")
    return shards


def _read_markers(directory: Directory, shards: Sequence[Shard], uri: str) -> dict[int, DoneMarker]:
    """The shards that are done, by number. Raises ValueError where they are of other inputs."""
    with ThreadPoolExecutor(8) as pool:  # an object store answers slowly
        texts = pool.map(lambda name: directory.read(f"{MARKERS}/{name}"), directory.list_names(MARKERS))
        known = {d.shard.number: d for d in map(DoneMarker.from_json, filter(None, texts))}
    for number, done in known.items():
        was = done.shard
        if number >= len(shards):
            raise ValueError(
                f"{uri} was begun with more input ({Path(was.path).name} from row {was.first + 1}): give all of it"
                " again, or another --output"
            )
        now = shards[number]
        if (Path(now.path).name, now.first, now.digest) != (Path(was.path).name, was.first, was.digest):
            raise ValueError(
                f"{now.path} rows {now.first + 1}-{now.first + now.rows} are not those that {uri} was begun with"
                f" ({Path(was.path).name} from row {was.first + 1}): give the same inputs, or another --output"
            )
    return dict(sorted(known.items()))


def _take_rows(shards: Sequence[Shard], limit: int | None) -> list[Shard]:
    """The first shards that hold so many rows."""
    taken: list[Shard] = []
    for shard in shards:
        if limit is not None and limit <= 0:
            break
        taken.append(shard)
        limit = None if limit is None else limit - shard.rows
    return taken


def _run_shards(
    run: Generator[DoneMarker, None, None], done: dict[int, DoneMarker], shards: Sequence[Shard], show: bool
) -> bool:
    """Run to the end or to a signal. Returns whether a signal ended it."""
    total, begin = sum(s.rows for s in shards), sum(d.shard.rows for d in done.values())
    tokens, start = 0, time.perf_counter()
    with tqdm(total=total, initial=begin, desc="embed", unit=" rows", disable=not show) as bar:
        try:
            with (
                signal_handlers({signal.SIGTERM: signal.default_int_handler}),  # a shard cut short is done anew
                contextlib.closing(run) if hasattr(run, "close") else contextlib.nullcontext(),
            ):
                for one in run:
                    done[one.shard.number] = one
                    tokens += one.tokens
                    bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                    bar.update(one.shard.rows)
        except KeyboardInterrupt:
            return True
    return False


def _commit_shards(
    directory: Directory, meta: CorpusMeta, done: list[DoneMarker], index: str, whole: bool
) -> list[str]:
    """Commit the shards that are done. Once all are, build indexes and vacuum. Returns the indexes built."""
    done.sort(key=lambda d: d.shard.number)
    parts = [part for d in done for part in d.parts]
    if meta.format == "parquet" or not parts:
        return []
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    if committed(directory) != name:
        commit(directory, meta, parts, name=name)
    built: list[str] = []
    if index != "none":
        built = Corpus.open(directory.uri).build_indexes(None if index == "auto" else index)  # type: ignore[arg-type]
    if whole:
        vacuum(directory)
    return built
