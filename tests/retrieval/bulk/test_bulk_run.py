"""`embed_corpus`: what is in the corpus, resuming, refusals, bad rows, flat memory, search equal to exact search."""

from __future__ import annotations

import os
import signal
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemify.io.vectors import normalize
from gemify.retrieval.bulk.plan import plan
from gemify.retrieval.bulk.rows import ShardReader
from gemify.retrieval.bulk.run import EmbedReport, embed_corpus
from gemify.retrieval.document_store import Store
from gemify.retrieval.index import GemIndex
from gemify.retrieval.metadata import FilterError
from gemify.retrieval.vector_table import Corpus, CorpusMeta
from rows_of_words import Words, read_back, row, vectors_of, write_inputs, write_jsonl, write_parquet, write_rows


def embed(inputs: list[Path], output: Path, model: Words | None = None, **options: Any) -> EmbedReport:
    return embed_corpus(inputs, output, model or Words(), model_name="words", **{"shard_rows": 20, **options})


def test_a_corpus_holds_its_inputs_in_order(tmp_path: Path) -> None:
    model = Words()
    report = embed(write_inputs(tmp_path / "in"), tmp_path / "out", model, precision="float32")
    assert (report.rows, report.left, report.embedded, report.skipped, report.stopped) == (150, 0, 150, 0, False)
    table = read_back(tmp_path / "out")
    rows = [row(n) for n in range(150)]
    for column, name in (("id", "_id"), ("title", "title"), ("text", "text")):
        assert table[column].to_pylist() == [r[name] for r in rows]
    words = [f"{r['title']}\n{r['text']}" if r["title"] else r["text"] for r in rows]
    np.testing.assert_allclose(vectors_of(table), normalize(Words().encode_document(words)), atol=1e-6)
    again = embed([tmp_path / "in"], tmp_path / "out", model)  # a directory of the same files
    assert (again.rows, again.embedded, len(model.embedded)) == (150, 0, 150)


def test_a_limit_then_the_rest_is_the_whole(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    embed(inputs, tmp_path / "whole")
    first = embed(inputs, tmp_path / "out", limit=25)
    assert (first.rows, first.left) == (40, 110)
    assert read_back(tmp_path / "out")["id"].to_pylist() == [f"d{n}" for n in range(40)]
    second = embed(inputs, tmp_path / "out", precision=None, shard_rows=None)  # what it was begun with
    assert (second.rows, second.embedded) == (150, 110)
    assert read_back(tmp_path / "out").equals(read_back(tmp_path / "whole"))


def test_more_files_behind_the_old_are_added(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    embed(inputs[:2], tmp_path / "out")
    assert embed(inputs, tmp_path / "out").rows == 150
    assert read_back(tmp_path / "out")["id"].to_pylist() == [f"d{n}" for n in range(150)]
    hits = Corpus.open(tmp_path / "out").text_search("149", 3)
    assert [hit.id for hit in hits] == ["d149"], "the words of new rows are found"


def test_other_settings_models_and_inputs_are_refused(tmp_path: Path) -> None:
    inputs, out = write_inputs(tmp_path / "in"), tmp_path / "out"
    embed(inputs, out, limit=20)

    def refused(match: str, given: list[Path] = inputs, model: Words | None = None, **options: Any) -> None:
        with pytest.raises(ValueError, match=match) as said:
            embed(given, out, model, **options)
        assert "\n" not in str(said.value)

    refused("begun with precision float16, not int8", precision="int8")
    refused("begun with format lance, not parquet", format="parquet")
    refused("begun with shard rows 20, not 30", shard_rows=30)
    refused(r"begun by another model \(words, fingerprint words; this one has other\)", model=Words(name="other"))
    refused("rows 1-20 are not those", given=inputs[::-1])
    inputs[0].write_bytes(inputs[0].read_bytes().replace(b"d3", b"e3"))
    refused(r"a.jsonl rows 1-20 are not those that .* was begun with", given=inputs)
    refused("was begun with more input|rows 1-", given=[write_jsonl(tmp_path / "a.jsonl", [row(0)])])
    refused("no such file", given=[tmp_path / "none.jsonl"])
    refused("not of a known kind", given=[tmp_path / "in" / "a.jsonl", Path(__file__)])
    refused("given twice", given=[inputs[0], inputs[0]])
    refused("unknown executor 'spark'", executor="spark")
    refused("unknown index 'hnsw'", index="hnsw")
    refused("--workers are Ray's", workers=2)
    refused("limit must be at least 1", limit=0)


def test_a_mistake_in_the_first_run_settles_nothing(tmp_path: Path) -> None:
    """The run ended before any shard was done: a mended command may follow, and what it does not name stays."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"_id": "x", "body": "owls"}, {"_id": "y", "body": "bees"}])
    with pytest.raises(ValueError, match=r"no column 'text'.*set --text-column"):
        embed([path], tmp_path / "out", precision="float32")
    assert embed([path], tmp_path / "out", text_column="body", precision=None).rows == 2
    table = read_back(tmp_path / "out")
    assert (table["text"].to_pylist(), vectors_of(table).dtype) == (["owls", "bees"], np.float32)
    with pytest.raises(ValueError, match="begun with text column body, not text"):
        embed([path], tmp_path / "out", text_column="text")


def test_what_could_not_be_ended_is_not_begun(tmp_path: Path) -> None:
    inputs, model = write_inputs(tmp_path / "in"), Words()

    def refused(match: str, given: list[Path], output: Path, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            embed(given, output, model, **options)
        assert not (output / "gemify-corpus.json").exists()

    refused(
        "binary vectors have one kind of index, flat, got pq", inputs, tmp_path / "a", precision="binary", index="pq"
    )
    refused("Parquet files get no index of vectors, got sq", inputs, tmp_path / "b", format="parquet", index="sq")
    refused("int8 vectors get no index of vectors, got sq", inputs, tmp_path / "c", precision="int8", index="sq")
    model.dimension = 12
    refused("an rq index needs vectors of a multiple of 8 numbers, got 12", inputs, tmp_path / "d", index="rq")
    refused("the inputs lie in the output", inputs, tmp_path / "in", format="parquet")
    assert model.embedded == []


def test_an_output_within_the_inputs_is_no_input(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in")
    out = tmp_path / "in" / "out"
    assert embed([tmp_path / "in"], out, format="parquet", limit=20).rows == 20
    assert embed([tmp_path / "in"], out, format="parquet").rows == 150, "its own Parquet files were not read"


def test_parquet_bytes_are_known_again(tmp_path: Path) -> None:
    """A row changed for one of the same length is another file, whichever shard of the row group it is in."""
    rows = [row(n) for n in range(60)]
    columns = ShardReader(CorpusMeta("m", "f", 8)).columns
    before = list(plan([write_parquet(tmp_path / "a.parquet", rows, group=25)], shard_rows=10, columns=columns))
    rows[30]["text"] = rows[30]["text"][::-1]
    after = list(plan([write_parquet(tmp_path / "a.parquet", rows, group=25)], shard_rows=10, columns=columns))
    changed = [b.digest != a.digest for b, a in zip(before, after, strict=True)]
    assert changed == [False, False, True, True, True, False]  # the shards that touch rows 25 to 49


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{broken", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"_id": "x", "body": "a"}', "no column 'text' .there are _id, body.: set --text-column"),
        ('{"_id": "x", "text": null}', "'text' must be text, got NoneType"),
    ],
)
def test_bad_rows(bad: str, why: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row(0), "", row(1), bad, row(2)])
    with pytest.raises(ValueError, match=rf"a\.jsonl row 4: {why}.* \(--skip-bad"):
        embed([path], tmp_path / "out")
    report = embed([path], tmp_path / "out", skip_bad=True)
    assert (report.rows, report.skipped, len(report.bad)) == (3, 1, 1)
    assert read_back(tmp_path / "out")["id"].to_pylist() == ["d0", "d1", "d2"]


@pytest.mark.parametrize("column", ["text", "title", "_id"])
def test_parquet_rows_that_are_not_utf8(column: str, tmp_path: Path) -> None:
    """Such a file says of its bytes that they are text; only reading them shows that they are not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {name: [row(n)[name].encode() for n in range(40)] for name in ("_id", "title", "text")}
    rows[column][25] = b"owls \xff\xfe"
    pq.write_table(
        pa.table({name: pa.array(values, pa.binary()).view(pa.string()) for name, values in rows.items()}),
        tmp_path / "a.parquet",
    )
    with pytest.raises(ValueError, match=r"a\.parquet row 26: not UTF-8 text: .* \(--skip-bad") as said:
        embed([tmp_path / "a.parquet"], tmp_path / "out")
    assert "\n" not in str(said.value)
    report = embed([tmp_path / "a.parquet"], tmp_path / "out", skip_bad=True)
    assert (report.rows, report.skipped) == (39, 1)
    assert read_back(tmp_path / "out")["id"].to_pylist() == [f"d{n}" for n in range(40) if n != 25]


def test_pq_codes_are_learned_from_enough_rows(tmp_path: Path) -> None:
    """Of fewer LanceDB would make an index that holds none of them."""
    question = normalize(Words().encode_query("moon river")[None])[0]
    for count, built in ((255, ("text", "title")), (256, ("pq vectors", "text", "title"))):
        path, out = write_jsonl(tmp_path / f"{count}.jsonl", [row(n) for n in range(count)]), tmp_path / str(count)
        assert embed([path], out, index="pq", precision="float32").indexes == built
        exact = np.sort(vectors_of(read_back(out)) @ question)[::-1][:5]
        np.testing.assert_allclose([h.score for h in Corpus.open(out).vector_search(question, 5)], exact, atol=1e-5)


def test_bad_files(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            embed([path], tmp_path / f"out-{path.name}")

    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    refused(tmp_path / "a.parquet", "a.parquet: not readable as Parquet")
    refused(write_parquet(tmp_path / "b.parquet", [{"body": "x"}]), r"no column 'text' \(there are body\)")
    (tmp_path / "c.jsonl.gz").write_bytes(
        write_jsonl(tmp_path / "d.jsonl.gz", [row(n) for n in range(99)]).read_bytes()[:-30]
    )
    refused(tmp_path / "c.jsonl.gz", "damaged .gz file")
    (tmp_path / "e.jsonl").touch()
    refused(tmp_path / "e.jsonl", "hold no row")
    (tmp_path / "f").mkdir()
    refused(tmp_path / "f", "no .parquet.* file in")


def test_rows_without_ids_are_named_by_file_and_number(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "owls"}, {"id": 7, "text": "bees"}, {"_id": True, "text": "moon"}]
    )
    embed([path], tmp_path / "out", keep_text=False)
    table = read_back(tmp_path / "out")
    assert table["id"].to_pylist() == ["a.jsonl:1", "7", "a.jsonl:3"]
    assert table.schema.names == ["id", "vector"]
    named = write_jsonl(tmp_path / "b.jsonl", [{"key": "k1", "body": "owls"}])
    embed([named], tmp_path / "named", text_column="body", id_column="key")
    assert read_back(tmp_path / "named")["id"].to_pylist() == ["k1"]
    with pytest.raises(ValueError, match=r"row 1: no text or whole number in column 'key'"):
        embed([path], tmp_path / "unnamed", id_column="key")


def test_rows_of_files_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    """A search by words and vectors takes two passages of one id for one; files added later change no earlier id."""
    paths = [tmp_path / name / "rows.jsonl" for name in ("a", "b", "b/a")]
    for path in paths:
        path.parent.mkdir()
        write_jsonl(path, [{"text": f"owls {path.parent.name}"}])
    embed(paths[:1], tmp_path / "out")
    embed(paths, tmp_path / "out")
    assert read_back(tmp_path / "out")["id"].to_pylist() == ["rows.jsonl:1", "b/rows.jsonl:1", "a/rows.jsonl:1"]


def test_a_corpus_and_a_store_keep_apart(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    embed(inputs, tmp_path / "out", limit=1)
    from bag_of_words import BagOfWords

    GemIndex.open(tmp_path / "store", BagOfWords()).add(inputs[0])
    with pytest.raises(ValueError, match="is a store that gemify index wrote"):
        embed(inputs, tmp_path / "store")
    index = GemIndex.open(tmp_path / "out", None)
    first = next(index.passages())
    assert index.read(first.id, before=1, after=1) == [first]
    with pytest.raises(ValueError, match="no passage 'none'"):
        index.read("none")
    with pytest.raises(ValueError, match="has rows and no files to list"):
        index.files()
    index.model = BagOfWords()
    with pytest.raises(ValueError, match="is a corpus that gemify embed-corpus writes"):
        index.add(inputs[0])
    with pytest.raises(ValueError, match="holds vectors of 16 numbers"):
        GemIndex.open(tmp_path / "out", BagOfWords())
    assert not Store.exists(tmp_path / "out")


@pytest.mark.parametrize("precision", ["float32", "float16", "binary"])
@pytest.mark.parametrize("index", ["none", "flat"])
def test_search_is_exact_search(precision: str, index: str, tmp_path: Path) -> None:
    """The vectors read back by pylance and compared by numpy are the oracle."""
    out = tmp_path / "out"
    embed(write_inputs(tmp_path / "in"), out, Words(64), precision=precision, index=index)
    table, corpus = read_back(out), Corpus.open(out)
    assert corpus.build_indexes("flat") == ([] if index == "flat" else ["flat vectors", "text", "title"])
    kept = vectors_of(table)
    for number in range(12):
        question = normalize(Words(64).encode_query(row(number * 11)["text"])[None])[0]
        hits = corpus.vector_search(question, 5)
        if precision == "binary":
            signs = np.unpackbits(kept, axis=1).astype(np.float32) * 2 - 1
            far = (np.unpackbits(np.packbits(question > 0)) != np.unpackbits(kept, axis=1)).sum(1)
            candidates = np.argsort(far, kind="stable")[:100]
            exact = np.sort((signs @ question / 8)[candidates])[::-1][:5]
            assert far[candidates[-1]] > far[candidates[4]], "rescoring has a choice"
        else:
            exact = np.sort(kept.astype(np.float32) @ question)[::-1][:5]
        np.testing.assert_allclose([h.score for h in hits], exact, atol=2e-3)
        texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
        assert [h.text for h in hits] == [texts[h.id] for h in hits]


def test_hybrid_search_and_what_cannot_be_searched(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    embed(inputs, tmp_path / "out")
    index = GemIndex.open(tmp_path / "out", None)
    vector = Words().encode_query("moon river 77")
    assert index.search("77", mode="fts", k=1)[0].id == "d77"
    assert "d77" in [p.id for p in index.search("77", mode="hybrid", k=5, vector=vector)]
    for mode in ("vector", "fts", "hybrid"):
        found = index.search("moon 77 78", mode=mode, k=5, vector=vector, where="id = 'd78'")  # type: ignore[arg-type]
        assert [p.id for p in found] == ["d78"]
        with pytest.raises(FilterError, match=r"the columns are id \(text\), title"):
            index.search("moon", mode=mode, vector=vector, where="lang = 'de'")  # type: ignore[arg-type]
    assert [p.id for p in index.passages()] == [f"d{n}" for n in range(150)]

    def refused(match: str, **settings: Any) -> None:
        out = tmp_path / "-".join(map(str, settings.values()))
        embed(inputs, out, **settings)
        with pytest.raises(ValueError, match=match):
            GemIndex.open(out, None).search("moon", mode=settings.get("mode", "hybrid"), vector=vector)

    refused("int8 vectors, which LanceDB does not search: embed with --precision float16", precision="int8")
    refused("Parquet files, which are not searched", format="parquet")
    refused("keeps no text to find words in", keep_text=False)
    refused("has no index of its words", index="none")
    with pytest.raises(ValueError, match="keeps no text to answer from"):
        GemIndex.open(tmp_path / "False", None).require_text()


def test_parquet_parts_are_the_same_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    inputs = write_inputs(tmp_path / "in")
    embed(inputs, tmp_path / "lance")
    embed(inputs, tmp_path / "parquet", format="parquet", limit=50)
    embed(inputs, tmp_path / "parquet", format="parquet")
    parts = sorted((tmp_path / "parquet").glob("*.parquet"))
    found = pq.read_table(parts)
    assert found.replace_schema_metadata().equals(read_back(tmp_path / "lance").replace_schema_metadata())
    meta = CorpusMeta.from_json(pq.read_schema(parts[0]).metadata[b"gemify"], "x")
    assert (meta.model, meta.fingerprint, meta.precision) == ("words", "words", "float16")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_what_is_done(number: signal.Signals, tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    inputs = write_inputs(tmp_path / "in")
    embed(inputs, tmp_path / "whole")

    class Signalled(Words):
        def encode_document(self, inputs: Any, **options: Any) -> np.ndarray:
            if len(self.embedded) >= 60:
                os.kill(os.getpid(), number)
            return super().encode_document(inputs)

    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        report = embed(inputs, tmp_path / "out", Signalled())
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert (report.stopped, report.rows, signal.getsignal(signal.SIGTERM)) == (
        True,
        73,
        before,
    )  # a.jsonl, one shard on
    assert len(Corpus.open(tmp_path / "out")) == 73
    assert not embed(inputs, tmp_path / "out").stopped
    assert read_back(tmp_path / "out").equals(read_back(tmp_path / "whole"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_large_file_is_read_in_flat_memory(kind: str, tmp_path: Path) -> None:
    """20 MB of text in shards of 40 kB: never more than a few pieces of it are held."""
    import pyarrow as pa

    path, text = tmp_path / f"a.{kind}", "many words about owls " * 45
    rows = [{"_id": str(n), "text": f"{n} {text}"} for n in range(20_000)]
    write_parquet(path, rows, group=2000) if kind == "parquet" else write_jsonl(path, rows)
    del rows
    meta = CorpusMeta("m", "f", 8, shard_rows=40)
    tracemalloc.start()
    arrow, count = pa.total_allocated_bytes(), 0
    most = 0
    reader = ShardReader(meta)
    for shard in list(plan([path], shard_rows=40, columns=reader.columns)):
        count += len(reader.passages(shard, []))
        most = max(most, pa.total_allocated_bytes() - arrow)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 6e6, f"{peak:,} bytes of Python's"
    assert most < 6e6, f"{most:,} bytes of Arrow's"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.zst", "a.json", "a.json.gz", "a.jsonl.zst", "a.csv.gz"])
def test_every_format_of_rows_is_a_corpus(name: str, tmp_path: Path) -> None:
    """Whatever shards are read first, by one reader or by many, and after a stop."""
    rows = [row(n) | {"title": f'a "title",\t\r\nof {n}'} for n in range(70)]
    path = write_rows(tmp_path / name, rows)
    assert embed([path], tmp_path / "out", limit=25).rows == 40
    assert embed([path], tmp_path / "out").embedded == 30
    table = read_back(tmp_path / "out")
    for column, key in (("id", "_id"), ("title", "title"), ("text", "text")):
        assert table[column].to_pylist() == [r[key] for r in rows]
    reader = ShardReader(CorpusMeta("m", "f", 8))
    shards = list(plan([path], shard_rows=20, columns=reader.columns))
    backwards = [p.id for shard in shards[::-1] for p in reader.passages(shard, [])]
    assert sorted(backwards) == sorted(r["_id"] for r in rows)
    write_rows(path, [{**r, "text": r["text"].replace("owls", "bees")} for r in rows])
    with pytest.raises(ValueError, match="changed while it was read"):
        [ShardReader(reader.meta).passages(shard, []) for shard in shards]
    with pytest.raises(ValueError, match=r"are not those that .* was begun with"):
        embed([path], tmp_path / "out")


def test_text_is_a_corpus_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfowls\r\n\r\nbees\r\n")
    embed([tmp_path / "a.txt"], tmp_path / "out", text_column="body")
    assert read_back(tmp_path / "out")["text"].to_pylist() == ["owls", "", "bees"]
