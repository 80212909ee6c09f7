"""Everything gemify does, in a few minutes on a CPU: the GEMs that come with it, then one trained here.

Run by `make demo`. The text to train on is what every Python has: the docstrings of its standard library. Ctrl-C stops
it at any time; an interrupted training run continues with the next `make demo`, a finished one is not repeated.
"""

from __future__ import annotations

import ast
import sysconfig
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemify import GemModel

PLAN = """\
This demo runs on the CPU and needs no network.
  1. The GEMs that come with gemify search, answer and recover a text (under a minute).
  2. A GEM of your own is trained on the docstrings of Python's standard library (about 5 minutes on two cores).
Ctrl-C stops it at any time; `make demo` continues where it stopped.
"""
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


def show_search(gem: GemModel, title: str) -> None:
    """Print the sentence of `LIBRARY` that is nearest to each query, with its cosine similarity."""
    print(f"\n{title}")
    documents, queries = gem.encode_document(LIBRARY), gem.encode_query(QUERIES)
    for query, scores in zip(QUERIES, gem.similarity(queries, documents), strict=True):
        best = int(scores.argmax())
        print(f"  {query:30} -> {LIBRARY[best]:45} {float(scores[best]):.3f}")


def show_chat(gem: GemModel) -> None:
    """Answer and embed a question from one prefill."""
    question = "What is the capital of France?"
    start = time.perf_counter()
    prefill = gem.prefill_chat([{"role": "user", "content": question}])
    answer, vector = gem.generate(prefill, max_new_tokens=30, do_sample=False), gem.embed(prefill)
    print(f"\nChat and embedding from one pass of the prompt ({time.perf_counter() - start:.1f} s):")
    print(f"  {question} -> {answer.strip()}")
    print(f"  its embedding: {len(vector)} numbers, {[round(float(v), 2) for v in vector[:4]]} ...")


def show_recovery(gem: GemModel) -> None:
    """Decode a text from the KV cache of its special token alone."""
    text = "Return the number of items in a container."
    print("\nDecoded from the special token alone, without the text:")
    recovered = gem.recover(text, max_new_tokens=24).split()
    print(f"  {text} -> {' '.join(recovered)}")


def train_gem(sentences: list[str]) -> GemModel:
    """Train a gated GEM, or load the one of a finished run."""
    from gemify import GemModel
    from gemify.io.atomic import atomic_file
    from gemify.io.signals import StopRequestedError
    from gemify.model.encode import format_summary
    from gemify.training.recipe import Recipe
    from gemify.training.trainer import RECIPE_FILE, SUMMARY_FILE, train

    if (RUN / SUMMARY_FILE).is_file():
        print(f"found a finished run in {RUN} (delete it to train again)")
        return GemModel.from_pretrained(RUN)
    with atomic_file(TEXTS) as stage:
        stage.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    recipe = Recipe(
        data=str(TEXTS),
        max_steps=45,
        ntp_steps=25,
        batch_size=16,
        contrastive_batch_size=48,
        max_length=48,
        save_steps=10,
    )
    resume = (RUN / RECIPE_FILE).is_file()
    print(f"{'continuing' if resume else 'training'} a gated GEM on {len(sentences):,} docstrings")
    try:
        gem, summary = train(
            recipe, RUN, resume=resume, on_ready=lambda untrained: show_search(untrained, "Search before training:")
        )
    except StopRequestedError:  # Ctrl-C while a step ran: the trainer has saved a checkpoint
        raise KeyboardInterrupt from None
    print(f"trained {summary['trainable_parameters']:,} parameters: {format_summary(summary)}")
    return gem


def require_unchanged(gem: GemModel, held_out: list[str]) -> None:
    """Compare the language model with the base model, to the bit."""
    from gemify.evaluation.models import PROBES, language_loss, same_logits
    from gemify.model.base import load_base

    base, tokenizer = load_base("starter", dtype=gem.lm.dtype)
    same = same_logits(base, gem.lm, tokenizer, [*PROBES, *held_out[:20]])
    before, after = (language_loss(lm, tokenizer, held_out[:100]) for lm in (base, gem.lm))
    print("\nIs the language model unchanged?")
    print(f"  logits on {len(PROBES) + 20} texts equal to the base model's, bit for bit: {'yes' if same else 'NO'}")
    print(f"  held-out loss before {before!r}, after {after!r}")
    if not same or before != after:
        raise SystemExit("the language model has changed: this is a bug")


def show_shipped() -> None:
    """Step 1: the GEMs that come with gemify."""
    print("1. The GEMs that come with gemify, on SmolLM2-135M-Instruct: loading ...", flush=True)
    from gemify import GemModel

    show_search(GemModel.from_pretrained("starter"), "Search by meaning, with starter:")
    print("\nstarter-gated: its vectors come from the KV cache of the text itself.")
    gated = GemModel.from_pretrained("starter-gated")
    show_chat(gated)
    show_recovery(gated)


def train_own() -> None:
    """Step 2: a GEM trained here."""
    print("\n2. A GEM of your own", flush=True)
    sentences = docstring_sentences()
    held_out, training = sentences[::50], [s for i, s in enumerate(sentences) if i % 50]
    gem = train_gem(training)
    show_search(gem, "Search after training:")
    show_recovery(gem)
    require_unchanged(gem, held_out)
    print(f"\nYour GEM is in {RUN} ({sum(f.stat().st_size for f in RUN.iterdir() if f.is_file()) >> 20} MB). Try:")
    for name in ("starter", RUN):
        print(f'  .venv/bin/gemify embed "a text" --model {name}')
    print(f'  .venv/bin/gemify generate "Tell me a joke." --model {RUN}')


def kept() -> str:
    """What an interrupted demo leaves."""
    if (RUN / "summary.json").is_file():
        return f"the trained GEM is kept in {RUN}"
    if any(RUN.rglob("checkpoint-*")):
        return f"the training run is kept in {RUN}; `make demo` continues it"
    return "nothing was trained yet; `make demo` starts again"


def main() -> None:
    """Run both steps."""
    print(PLAN, flush=True)
    try:
        show_shipped()
        train_own()
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; {kept()}") from None


if __name__ == "__main__":
    main()
