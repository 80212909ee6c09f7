from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing

import tiny_models
from gemify.model.tokenization import TextTokenizer
from gemify.paper.tokens import Row
from gemify.training.batches import Batches
from gemify.training.examples import Example, Source
from gemify.training.recipe import PRESETS, Recipe


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    texts = ["one text", "another", "ünïcödé"]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("\n".join(texts))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "x": 1}) + "\n" for t in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("n,text\n" + "".join(f'{n},"{t}"\r\n' for n, t in enumerate(texts)))
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in texts]))
    (tmp_path / "a.tsv.zst").write_bytes(pa.compress("\n".join(["text", *texts]).encode(), "zstd", asbytes=True))
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "a.parquet", "a.csv", "a.json", "a.tsv.zst"):
        source = Source(str(tmp_path / name))
        assert [e.text for e in source] == texts
        assert [e.text for e in source] == texts  # again


def test_a_hugging_face_data_set_is_streamed(tmp_path: Path) -> None:
    """A directory laid out as on the hub, through the library's own loader."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(5)))
    (tmp_path / "test.jsonl").write_text('{"body": "held out"}\n')
    assert [e.text for e in Source(str(tmp_path), text_column="body")] == [f"text {i}" for i in range(5)]
    assert [e.text for e in Source(str(tmp_path), text_column="body", split="test")] == ["held out"]
    with pytest.raises(ValueError, match="no column 'text'"):
        list(Source(str(tmp_path)))


def test_empty_rows_are_kept_where_rows_must_stay_in_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n')
    assert [e.text for e in Source(str(tmp_path / "a.txt"), keep_empty=True)] == ["one", "", "three"]
    assert [e.text for e in Source(str(tmp_path / "a.txt"))] == ["one", "three"]
    assert len(list(Source(str(tmp_path / "a.jsonl"), keep_empty=True))) == 2
    assert len(list(Source(str(tmp_path / "a.jsonl")))) == 1


def test_the_text_column_wins_over_pairs(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "t", "prompt": "q", "answer": "a"}\n')
    assert list(Source(str(path))) == [Example("t")]


def test_views_keep_what_the_tokenizer_puts_first(texts_file: Path) -> None:
    bos = tiny_models.tokenizer()
    bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    recipe = Recipe.from_dict(
        {
            "data": str(texts_file),
            "batch_size": 8,
            "contrastive_batch_size": 16,
            "max_steps": 3,
            "ntp_steps": 0,
            "drop_rate": 0.9,
        }
    )
    made = list(Batches(recipe, Source(str(texts_file)), TextTokenizer(bos, frozenset([3])), end_id=2))
    views = [v for b in made for pair in b["batch"].views for v in pair]
    assert views
    assert all(v.ids[0] == 1 and v.seen[0] and 1 not in v.ids[1:] for v in views)


@pytest.mark.parametrize("view", ["delete", "mask", "span", "halves"])
@pytest.mark.parametrize("both", [False, True])
def test_a_template_stands_around_views_and_nothing_of_it_is_dropped(tmp_path: Path, view: str, both: bool) -> None:
    """Texts are of letters a to h, the template's words of others: what is whose shows."""
    letters = {i for c in "abcdefgh" for i in tiny_models.tokenizer()(c)["input_ids"]}
    (tmp_path / "a.txt").write_text("".join("abcdefgh"[i % 8 :] + "abcdefgh" * 3 + "\n" for i in range(40)))
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"anchor": "abcdefgh" * 2, "positive": "hgfedcba" * (1 + i % 2)}) + "\n" for i in range(40))
    )
    bos = tiny_models.tokenizer()
    bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words = "<|reserved_1|>X {text} YZ"
    before, after = (
        (1, *bos("<|reserved_1|>X ", add_special_tokens=False)["input_ids"]),
        tuple(tiny_models.tokenizer()(" YZ")["input_ids"]),
    )
    for name in ("a.txt", "p.jsonl"):
        entries = {
            "data": str(tmp_path / name),
            "batch_size": 8,
            "contrastive_batch_size": 16,
            "max_steps": 6,
            "ntp_steps": 2,
            "ramp_steps": 2,
            "max_length": 20,
            "drop_rate": 0.5,
            "view": view,
            "drop_both": both,
            "template": words,
        }
        bare = Batches(
            Recipe.from_dict({**entries, "template": "{text}"}),
            Source(entries["data"]),
            TextTokenizer(bos, frozenset([3])),
            end_id=2,
        )
        made = Batches(
            Recipe.from_dict(entries), Source(entries["data"]), TextTokenizer(bos, frozenset([3]), words), end_id=2
        )
        seen = 0
        for plain, batch in zip((b["batch"] for b in bare), (b["batch"] for b in made), strict=True):
            assert batch.rows == plain.rows  # next-token rows are the paper's
            for theirs, ours in zip(itertools.chain(*plain.views), itertools.chain(*batch.views), strict=True):
                text, flags = theirs.ids[1:], theirs.seen[1:]
                assert letters.issuperset(text)
                assert len(text) <= 20 - (name == "a.txt")
                assert ours.ids == (*before, *text, *after)
                assert ours.seen == ((True,) * len(before) + flags + (True,) * len(after))
                seen += 1
        assert seen


def test_pairs_become_examples_of_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"context": "long", "summary": "s"}\n{"prompt": "q", "answer": "a"}\n{"anchor": "t", "positive": "u"}\n'
    )
    wanted = [Example("long", "s", "summary"), Example("q", "a", "soft_prompt"), Example("t", "u", "positive")]
    assert list(Source(str(path))) == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"ok\n\xff\xfe\x00binary", "row 2: not UTF-8 text"),
        ("a.txt", b"ok\n\x00\x01\n", "row 2: not UTF-8 text"),
        ("a.txt.gz", b"not gzip at all", "damaged .gz"),
        ("a.jsonl", b'{"text": "a"}\nnonsense\n', "row 2: not JSON"),
        ("a.jsonl", b'["a"]\n', "row 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"body": "a"}\n', r"row 1: no column 'text' \(there are body\): set --text-column"),
        ("a.jsonl", b'{"text": 7}\n', "'text' must be text, got int"),
        ("a.parquet", b"PAR1 nonsense", "not readable as Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(Source(str(tmp_path / name)))


def test_missing_files_and_unreachable_data_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such data file"):
        Source(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="give --data"):
        Source("")
    with pytest.raises(ValueError, match="neither a file nor a data set"):
        list(Source(str(tmp_path)))
    with pytest.raises(ValueError, match="neither a file nor a data set"):
        list(Source("nobody/nothing-at-all"))


def tokenize() -> TextTokenizer:
    return TextTokenizer(tiny_models.tokenizer(), frozenset([3]))


def batches(path: Path, **options: object) -> Batches:
    recipe = Recipe.from_dict(
        {"data": str(path), "batch_size": 8, "contrastive_batch_size": 16, "max_steps": 12, "ntp_steps": 6, **options}
    )
    return Batches(recipe, Source(str(path)), tokenize(), end_id=2)


def test_batches_are_a_function_of_the_step(texts_file: Path) -> None:
    every = list(batches(texts_file))
    assert every == list(batches(texts_file))
    late = batches(texts_file)
    late.start_step = 7
    assert list(late) == every[7:]
    assert every != list(batches(texts_file, seed=1))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch_out_between_them(texts_file: Path, world: int) -> None:
    """The rows of a batch go round; where they do not come out even, one is taken twice and does not count."""
    recipe = Recipe.from_dict(
        {"data": str(texts_file), "batch_size": 8, "max_steps": 3, "ntp_steps": 2, "ramp_steps": 0}
    )
    source = Source(str(texts_file))
    whole = [b["batch"] for b in Batches(recipe, source, tokenize(), end_id=2)]
    shares = [
        [b["batch"] for b in Batches(recipe, source, tokenize(), end_id=2, rank=r, world=world)] for r in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        for rank, part in enumerate(parts):
            assert part.rows[: part.own_rows] == batch.rows[rank::world]
            assert part.views[: part.own_pairs] == batch.views[rank::world]
            assert part.step_targets == batch.step_targets
            assert part.pairs == len(batch.views)
        assert len({len(part.rows) for part in parts}) == len({len(part.views) for part in parts}) == 1


def test_rows_of_a_batch_are_of_like_length(texts_file: Path) -> None:
    def spread(rows: list[Row]) -> int:
        lengths = [len(r.prefix) for r in rows if r.kind == "reconstruction"]
        return max(lengths) - min(lengths) if lengths else 0

    found = [spread(b["batch"].rows) for b in itertools.islice(batches(texts_file), 6)]
    assert max(found) <= 8  # the texts themselves spread over some forty


def test_proportions_of_row_kinds(texts_file: Path) -> None:
    made = batches(texts_file, tune="full", mix=0.8, reconstruction=0.25, ntp_steps=60, max_steps=60, batch_size=32)
    kinds = [row.kind for b in made for row in b["batch"].rows]
    assert len(kinds) == 60 * 32
    assert kinds.count("raw") / len(kinds) == pytest.approx(0.8, abs=0.03)
    assert kinds.count("reconstruction") / len(kinds) == pytest.approx(0.05, abs=0.02)


def test_pairs_are_the_views_and_their_anchors_the_rows(tmp_path: Path) -> None:
    anchors = [f"the anchor number {i} {'a b c d '[: 2 * (i % 4) + 2]} of all of them" for i in range(40)]
    lines = [json.dumps({"anchor": a, "positive": f"positive of {i}", "task": "x"}) for i, a in enumerate(anchors)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    made = list(batches(tmp_path / "pairs.jsonl", drop_rate=0.0, reconstruction=1.0, append_end=False))
    known = dict(zip(map(tuple, tokenize()(anchors, max_tokens=None)), range(40), strict=True))
    seen = set()
    for first, second in (pair for b in made[6:] for pair in b["batch"].views):
        at = known[first.ids]
        assert second.ids == tuple(tokenize()([f"positive of {at}"], max_tokens=None)[0])
        seen.add(at)
    assert len(seen) == 40
    assert all(row.prefix == row.suffix and row.prefix in known for b in made[:6] for row in b["batch"].rows)


def test_the_papers_contrast_is_over_the_special_rows_of_the_batch(texts_file: Path) -> None:
    recipe = {**PRESETS["paper"], "data": str(texts_file), "max_steps": 6, "ntp_steps": 2, "min_length": 2}
    made = list(Batches(Recipe.from_dict(recipe), Source(str(texts_file)), tokenize(), end_id=2))
    assert [b["batch"].alpha for b in made] == [0, 0, 1, 1, 1, 1]
    for b in made[2:]:
        assert 2 <= len(b["batch"].views) < 20
        assert b["batch"].rows == []


def test_epochs_differ_and_use_every_text(tmp_path: Path) -> None:
    path = tiny_models.write_texts(tmp_path / "few.txt", 64)
    made = list(batches(path, ntp_steps=16, max_steps=16, reconstruction=1.0))
    first, second = ([tuple(r.prefix for r in b["batch"].rows) for b in part] for part in (made[:8], made[8:]))
    assert {p for b in first for p in b} == {p for b in second for p in b}
    assert first != second


def test_too_little_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("only one line of text\nab\n")
    with pytest.raises(ValueError, match="too few"):
        next(iter(batches(path)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tune": "half"}, "unknown tune"),
        ({"special_tokens": 0}, "k must be at least 1"),
        ({"mix": 0.8}, "contradicts tune 'gated'"),
        ({"mix": 1.0, "tune": "full"}, "leaves no row"),
        ({"gradient_checkpointing": True}, "contradicts tune"),
        ({"contrastive_batch_size": 1}, "at least 2"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"nonsense": 1}, "unknown entries"),
        ({"view": "shuffle"}, "unknown view"),
        ({"drop_rate": 1.5}, "drop rate"),
        ({"min_length": 300}, "max_length"),
        ({"special_names": ["<a>", "<b>"]}, "2 names"),
        ({"template": "no place"}, r"template must hold \{text\} exactly once, got 'no place'"),
        ({"template": "{text}{text}"}, "exactly once"),
        ({"template": 7}, "template must be text, got 7"),
        ({"template": "{text}:", "special_tokens": 0, "tune": "full"}, "needs special tokens to read it"),
    ],
)
def test_contradicting_recipes_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(values)


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    for preset in PRESETS.values():
        given = {"data": "x.txt", "special_tokens": 2, "special_names": ["<a>", "<b>"], "template": 'a : "{text}" é:\n'}
        recipe = Recipe.from_dict({**preset, **given})
        path = tmp_path / "r.yaml"
        path.write_text(recipe.to_yaml())
        assert Recipe.from_dict(Recipe.read_yaml(path)) == recipe


def test_the_paper_preset_is_section_4_2() -> None:
    paper = Recipe.from_dict(PRESETS["paper"])
    assert (paper.max_steps * paper.batch_size, paper.max_length, paper.lr, paper.contrastive_lr) == (
        32_000,
        512,
        1e-4,
        1e-5,
    )
    assert (paper.tune, paper.p, paper.ntp_steps) == ("full", 0.8, 100)
