"""The whole path in a few minutes on a CPU: the GEM that comes with gemify, then one trained here.

Run by `make demo`. The text to train on is what every Python has: the documentation strings of its standard library.
An interrupted demo goes on where it stopped; a finished one is not trained again (delete runs/demo to do so).
"""

from __future__ import annotations

import ast
import sysconfig
import time
import warnings
from pathlib import Path

from gemify import GemModel
from gemify.evaluation.language_model import PROBES, language_loss, same_logits
from gemify.io.atomic import atomic_file
from gemify.io.signals import StopRequestedError
from gemify.model.base import load_base
from gemify.model.throughput import format_summary
from gemify.training.recipe import Recipe
from gemify.training.trainer import RECIPE_FILE, train

RUN = Path("runs/demo")
TEXTS = Path("runs/demo-texts.txt")

LIBRARY = [
    "Open a file and return a stream.",
    "Sort a list in ascending order.",
    "Send an email message over SMTP.",
    "Return the square root of a number.",
    "Parse a JSON document into Python objects.",
    "Start a new thread of execution.",
    "Compress data with the zlib algorithm.",
    "Connect to a remote host through a socket.",
]
QUERIES = ["reading text from disk", "how do I put items in order?", "run code in parallel", "make a file smaller"]


def docstring_sentences() -> list[str]:
    """First paragraphs of the standard library's documentation strings, each once."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 30 <= len(first) <= 300:
                    found[first] = None
    return list(found)


def neighbours(gem: GemModel, title: str) -> None:
    print(f"\n{title}")
    documents, queries = gem.encode_document(LIBRARY), gem.encode_query(QUERIES)
    for query, scores in zip(QUERIES, gem.similarity(queries, documents), strict=True):
        best = int(scores.argmax())
        print(f"  {query:30} -> {LIBRARY[best]:45} {float(scores[best]):.3f}")


def both_jobs(gem: GemModel) -> None:
    question = "What is the capital of France?"
    started = time.perf_counter()
    prefill = gem.prefill_chat([{"role": "user", "content": question}])
    answer, vector = gem.generate(prefill, max_new_tokens=30, do_sample=False), gem.embed(prefill)
    print(f"\nOne prefill, both jobs ({time.perf_counter() - started:.1f} s):\n  {question} -> {answer.strip()}")
    print(f"  its embedding: {len(vector)} numbers, {[round(float(v), 2) for v in vector[:4]]} ...")


def train_one(training: list[str]) -> GemModel:
    with atomic_file(TEXTS) as stage:
        stage.write_text("\n".join(training) + "\n", encoding="utf-8")
    recipe = Recipe(
        data=str(TEXTS),
        max_steps=45,
        ntp_steps=25,
        batch_size=16,
        contrastive_batch_size=48,
        max_length=48,
        save_steps=10,
    )
    if (RUN / "summary.json").is_file():
        print(f"found a finished run in {RUN}: not training again")
        return GemModel.from_pretrained(RUN)
    print(f"training a gated GEM on {len(training):,} documentation strings (a few minutes on two CPU cores)")
    try:
        gem, summary = train(
            recipe,
            RUN,
            resume=(RUN / RECIPE_FILE).is_file(),
            on_ready=lambda fresh: neighbours(fresh, "Nearest neighbours before training:"),
        )
    except StopRequestedError as stopped:
        raise SystemExit(f"{str(stopped).split(';')[0]}; `make demo` goes on from there") from None
    print(f"trained {summary['trainable_parameters']:,} parameters: {format_summary(summary)}")
    return gem


def require_untouched(gem: GemModel, held_out: list[str]) -> None:
    base, tokenizer = load_base("starter", dtype=gem.lm.dtype)
    same = same_logits(base, gem.lm, tokenizer, [*PROBES, *held_out[:20]])
    before, after = (language_loss(lm, tokenizer, held_out[:100]) for lm in (base, gem.lm))
    print("\nIs the language model still the one it was?")
    print(f"  logits on {len(PROBES) + 20} texts equal to the base model's, bit for bit: {'yes' if same else 'NO'}")
    print(f"  held-out loss before {before!r}, after {after!r}")
    if not same or before != after:
        raise SystemExit("the language model has changed: this is a bug")


def main() -> None:
    print("The GEM that comes with gemify, on SmolLM2-135M-Instruct:")
    shipped = GemModel.from_pretrained("starter")
    neighbours(shipped, "Nearest neighbours:")
    both_jobs(shipped)
    del shipped

    print("\nOne of your own:")
    sentences = docstring_sentences()
    held_out, training = sentences[::50], [s for i, s in enumerate(sentences) if i % 50]
    gem = train_one(training)
    neighbours(gem, "Nearest neighbours after training:")
    text = "Return the number of items in a container."
    print(f"\nDecoded from the special token alone:\n  {text}\n  {gem.recover(text, max_new_tokens=24).strip()}")
    require_untouched(gem, held_out)
    print(f"\nYour GEM is in {RUN} ({sum(f.stat().st_size for f in RUN.iterdir() if f.is_file()) >> 20} MB). Try:")
    for name in ("starter", RUN):
        print(f'  .venv/bin/gemify embed "a text" --model {name}')
    print(f'  .venv/bin/gemify generate "Tell me a joke." --model {RUN}')


if __name__ == "__main__":
    main()
