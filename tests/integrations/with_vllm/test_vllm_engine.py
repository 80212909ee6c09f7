"""One vLLM engine writes and embeds. Runs in vLLM's own environment, named by GEMIFY_VLLM_PYTHON; skipped without one.

Reference vectors are the library's, on transformers; reference tokens those of the plain base in the same vLLM.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_models import child_environment, make_saved_gem, save_base, vllm_python

from gemify import GemModel
from gemify.model.base import load_base
from gemify.model.export import export

CHILD = Path(__file__).with_name("vllm_child.py")
TEXTS = ["a cat on a mat", "", "the name <|reserved_0|> is text", "long " * 30, "x"]
# Of 31, 63, 80 tokens and 1: with a special token after them the first two fill blocks of the cache, which hold 32.
PROMPTS = [[1, *range(20, 50)], [1, *range(40, 102)], [1, *range(100, 179)], [7]]
SPELLED = [[*ids, 3, 9] for ids in PROMPTS]  # 3 is the special token's id; a prompt may hold it


def run_child(gem: Path | None, base: Path, *, kv_cache: int = 8_000_000) -> dict[str, Any]:
    job = {"gem": gem and str(gem), "base": str(base), "prompts": PROMPTS, "spelled": SPELLED, "texts": TEXTS}
    job["kv_cache"] = kv_cache
    done = subprocess.run(
        [vllm_python(), str(CHILD)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("vllm") / "base")


@pytest.fixture(scope="module")
def plain(base: Path) -> dict[str, Any]:
    """The plain base in vLLM, and what it writes after a spelled special token."""
    return run_child(None, base)


@pytest.mark.parametrize(
    "options",
    [
        {"tune": "gated"},
        {"tune": "gated", "special_tokens": 2, "pooling": "concat", "max_length": 40},
        {"tune": "tokens", "special_tokens": 3, "template": 'Say "{text}" shortly:'},
    ],
    ids=["gated", "two-tokens", "tokens"],
)
def test_one_engine_writes_as_the_base_and_embeds(
    options: dict[str, Any], base: Path, plain: dict[str, Any], tmp_path: Path
) -> None:
    gem = make_saved_gem(base, tmp_path / "gem", **options)
    found = run_child(tmp_path / "gem", base)
    assert found["before"] == found["after"] == found["mixed"] == plain["before"]
    assert found["spelled"] == plain["spelled"]
    vectors, wanted = torch.tensor(found["vectors"]), gem.encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(vectors, wanted, atol=1e-3), (vectors - wanted).abs().max()
    without = GemModel.from_base(str(base), device="cpu", **options).encode(TEXTS, convert_to_tensor=True)
    assert (wanted - without).abs().max() > 0.1  # what was trained matters
    short = torch.nn.functional.normalize(wanted[:1, :16], dim=-1)
    assert torch.allclose(torch.tensor(found["again"]), short, atol=1e-3)
    assert found["cached"] == [0, 32, 64, 0]  # whole blocks of the prompts, run for the chats
    assert found["left"] == [{}]  # a vector is taken once


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_merged_weights_embed_too(tune: str, base: Path, tmp_path: Path) -> None:
    if tune == "lora":
        gem = make_saved_gem(base, tmp_path / "gem", tune="lora")
        wanted = gem.encode(TEXTS, convert_to_tensor=True)
        export(gem, tmp_path / "whole")
    else:
        gem = GemModel.from_base(str(base), device="cpu", tune="full")
        with torch.no_grad():
            gem.lm.get_input_embeddings().weight[gem.special_ids[0]] += 1.0
        wanted = gem.encode(TEXTS, convert_to_tensor=True)
        gem.save_pretrained(tmp_path / "whole")
    found = run_child(tmp_path / "whole", tmp_path / "whole")
    assert torch.allclose(torch.tensor(found["vectors"]), wanted, atol=1e-3)
    assert found["before"] == found["after"] == found["mixed"]
    again = GemModel.from_pretrained(tmp_path / "whole", device="cpu")
    ids = torch.tensor([PROMPTS[1]])
    written = again.lm.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, suppress_tokens=None)
    assert found["before"][1] == written[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_gated_gems_of_other_architectures(kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", kind)
    gem = make_saved_gem(base, tmp_path / "gem")
    found = run_child(tmp_path / "gem", base)
    assert torch.allclose(torch.tensor(found["vectors"]), gem.encode(TEXTS, convert_to_tensor=True), atol=2e-3)
    assert found["before"] == found["after"] == found["mixed"]


@pytest.mark.real
def test_the_shipped_gem(shipped: GemModel, tmp_path: Path) -> None:
    lm, tokenizer = load_base("starter", device="cpu", dtype=torch.float32)
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    found = run_child(Path("starter"), tmp_path / "base", kv_cache=60_000_000)
    alone = run_child(None, tmp_path / "base", kv_cache=60_000_000)
    vectors, wanted = torch.tensor(found["vectors"]), shipped.encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(vectors, wanted, atol=1e-3)
    assert found["before"] == found["after"] == found["mixed"] == alone["before"]
