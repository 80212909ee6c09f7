"""SFT alone against SFT with GEM, at equal SFT tokens: held-out chat and text loss, STSBenchmark, seconds.

    python examples/sft_with_gem.py chats.jsonl --texts held-out.txt --sts dev.jsonl --output runs/sft

Conversations are in a shape that `gemify train` reads; the last 256 are held out. Runs are resumed: the same command
goes on, and a finished run is not made again. Needs `pip install 'gemify[trl]'`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from gemify import GemModel
from gemify.integrations.trl import GemSFTTrainer
from gemify.io.atomic import atomic_file
from gemify.io.rows import load_lines
from gemify.io.tables import markdown_table
from gemify.model.chat_template import ChatTemplate
from gemify.training.callbacks import read_pairs, spearman
from gemify.training.examples import Source

WEIGHTS = {"SFT": 0.0, "SFT + GEM": 1.0}
SETTINGS = [
    "chats",
    "base",
    "tune",
    "max_steps",
    "batch_size",
    "contrastive_batch_size",
    "max_length",
    "lr",
    "num_texts",
]
"""What a kept result depends on."""


class Seconds(TrainerCallback):
    """Adds up the seconds of all parts of a run in one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.since = path, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.since = time.perf_counter()

    def on_save(self, *_: Any, **__: Any) -> None:
        before = float(self.path.read_text()) if self.path.exists() else 0.0
        self.path.write_text(str(before + time.perf_counter() - self.since))
        self.since = time.perf_counter()


@torch.no_grad()
def mean_loss(gem: GemModel, rows: list[tuple[tuple[int, ...], tuple[bool, ...]]]) -> float:
    """Nats of each learned token, one text at a time."""
    total = count = 0.0
    for ids, learned in rows:
        ids_1T = torch.tensor([ids], device=gem.device)
        logits_TV = gem.lm(input_ids=ids_1T).logits[0, :-1].float()
        flags_T = torch.tensor(learned[1:], device=gem.device)
        total += float(torch.nn.functional.cross_entropy(logits_TV[flags_T], ids_1T[0, 1:][flags_T], reduction="sum"))
        count += float(flags_T.sum())
    return total / count


def measure(gem: GemModel, chats: list[Any], texts: list[str], pairs: Any, max_length: int) -> dict[str, float]:
    gem.lm.eval()
    template = ChatTemplate(gem.tokenizer)
    rows = [chat.tokenize(template, max_tokens=max_length) for chat in chats]
    plain = [tuple(ids) for ids in gem.text_tokenizer(texts, max_tokens=max_length) if len(ids) > 1]
    return {
        "chat loss": mean_loss(gem, [(row.ids, row.learned) for row in rows if row.targets]),
        "text loss": mean_loss(gem, [(ids, (True,) * len(ids)) for ids in plain]),
        "STS": spearman(gem, pairs),
    }


def run(name: str, args: argparse.Namespace, train: list[Any], held_out: list[Any]) -> dict[str, Any]:
    """Train or go on, and measure; the result is kept."""
    directory = args.output / name.replace(" + ", "-").lower()
    result, settings = directory / "result.json", directory / "settings.json"
    asked = {key: str(value) for key, value in vars(args).items() if key in SETTINGS}
    if settings.exists() and (made := json.loads(settings.read_text())) != asked:
        other = next(key for key in asked if made.get(key) != asked[key])
        raise SystemExit(
            f"{directory} was made with {other} {made.get(other)}, not {asked[other]}: give another --output"
        )
    if result.exists():
        return json.loads(result.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(settings) as stage:
        stage.write_text(json.dumps(asked, indent=2) + "\n")
    torch.manual_seed(0)
    gem = GemModel.from_base(args.base, tune=args.tune, dtype=torch.float32)
    messages = [[dict(m) for m in chat.messages] for chat in train]
    data = Dataset.from_list([{"prompt": said[:-1], "completion": said[-1:]} for said in messages])
    config = SFTConfig(
        str(directory),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        max_length=args.max_length,
        bf16=False,
        save_steps=args.save_steps,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
    )
    recipe = {
        "ntp_steps": args.max_steps // 4,
        "contrastive_batch_size": args.contrastive_batch_size,
        "max_length": args.max_length,
        "min_length": 4,
        "alpha_final": 0.9,
    }
    seconds = directory / "seconds"
    trainer = GemSFTTrainer(gem, config, data, gem_weight=WEIGHTS[name], recipe=recipe, callbacks=[Seconds(seconds)])
    trainer.train(resume_from_checkpoint=any(directory.glob("checkpoint-*")))
    found = measure(gem, held_out, args.held_out_texts, args.pairs, args.max_length)
    found |= {"seconds": float(seconds.read_text()) if seconds.exists() else 0.0}
    with atomic_file(result) as stage:
        stage.write_text(json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", help="conversations, as for gemify train")
    parser.add_argument("--texts", type=Path, required=True, help="held-out texts, one a line")
    parser.add_argument("--sts", type=Path, required=True, help="sentence pairs with scores")
    parser.add_argument("--output", type=Path, default=Path("runs/sft"))
    parser.add_argument("--base", default="starter")
    parser.add_argument("--tune", default="full", choices=["full", "lora"])
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--contrastive-batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--num-texts", type=int, default=256, help="held-out conversations, and texts")
    args = parser.parse_args()
    chats = [example.conversation for example in Source(args.chats) if example.conversation is not None]
    chats = [chat for chat in chats if chat.messages[-1]["role"] == "assistant" and not chat.tools]
    train, held_out = chats[: -args.num_texts], chats[-args.num_texts :]
    args.held_out_texts = [line for _, line in load_lines(args.texts)][: args.num_texts]
    args.pairs = read_pairs(args.sts)
    base = GemModel.from_base(args.base, tune="full", dtype=torch.float32)
    rows = {"before": measure(base, held_out, args.held_out_texts, args.pairs, args.max_length) | {"seconds": 0.0}}
    del base
    rows |= {name: run(name, args, train, held_out) for name in WEIGHTS}
    table = [
        (name, f"{r['chat loss']:.3f}", f"{r['text loss']:.3f}", f"{r['STS']:.1f}", f"{r['seconds']:.0f}")
        for name, r in rows.items()
    ]
    header = ("training", "held-out chat loss", "held-out text loss", "STS dev", "seconds")
    print(markdown_table(header, table, numeric=True))


if __name__ == "__main__":
    main()
