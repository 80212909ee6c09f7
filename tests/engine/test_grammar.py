"""Grammars in the sampler: what random logits write under a schema is valid, and grammars are compiled once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from gemify import GemModel
from gemify.engine.engine import Engine
from gemify.engine.grammar import GrammarCompiler
from gemify.engine.sampling import Sampler, SamplingParams
from gemify.serving.protocol.structured_outputs import json_grammar
from tiny_gems import make_gem

LEAVES: list[dict[str, Any]] = [
    {"type": "integer"}, {"type": "integer", "minimum": -3, "maximum": 17}, {"type": "number"}, {"type": "boolean"},
    {"type": "null"}, {"type": "string", "maxLength": 5}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}, {"enum": ["a", "b c", "é", 3, None]},
    {"const": {"x": [1, "\n"]}}, {"type": ["integer", "null"]}, {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
]  # fmt: skip


def schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of a random kind."""
    kind = draw.choice(["leaf", "leaf", "object", "array", "any", "tuple", "ref"]) if depth else "leaf"
    if kind == "object":
        fields = {name: schema(draw, depth - 1) for name in draw.sample(["id", "name", "ä", 'q"', "a b"], 3)}
        required = draw.sample(list(fields), draw.randint(0, 3))
        return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
    if kind == "array":
        low = draw.randint(0, 2)
        return {"type": "array", "items": schema(draw, depth - 1), "minItems": low, "maxItems": low + 2}
    if kind == "any":
        return {"anyOf": [schema(draw, depth - 1), schema(draw, depth - 1)]}
    if kind == "tuple":
        some = [schema(draw, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": some, "items": False, "minItems": 2}
    if kind == "ref":
        return {"type": "array", "items": draw.choice(LEAVES), "maxItems": 2} if draw.random() < 0.5 else nested(draw)
    return draw.choice(LEAVES)


def nested(draw: random.Random) -> dict[str, Any]:
    inner = {"type": "object", "properties": {"in": draw.choice(LEAVES)}, "required": ["in"]}
    return {"anyOf": [draw.choice(LEAVES), inner | {"additionalProperties": False}]}


@pytest.fixture(scope="module")
def gem(base_dir: Path) -> GemModel:
    return make_gem(base_dir)


@pytest.fixture(scope="module")
def compiler(gem: GemModel) -> GrammarCompiler:
    return Engine(gem).grammar_compiler()


def written(gem: GemModel, sampling: SamplingParams, seed: int, tokens: int = 400) -> str | None:
    """What random logits write; None: it is not finished."""
    sampler, draw, ids = Sampler(sampling), torch.Generator().manual_seed(seed), []
    for _ in range(tokens):
        ids.append(sampler.sample(torch.randn(320, generator=draw) * 3))
        if sampler.done:
            return str(gem.tokenizer.decode(ids, skip_special_tokens=True))
    return None


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.long)])
def test_what_is_written_validates(gem: GemModel, compiler: GrammarCompiler, count: int) -> None:
    finished = 0
    for number in range(count):
        wanted = schema(random.Random(number))
        grammar = compiler.compile(json_grammar(wanted))
        for temperature in (0.0, 1.0):
            text = written(gem, SamplingParams(temperature=temperature, seed=number, grammar=grammar), number)
            if text is not None:
                finished += 1
                jsonschema.validate(json.loads(text), wanted)
    assert finished > 1.5 * count


def test_grammars_are_compiled_once_and_the_last_are_kept(compiler: GrammarCompiler) -> None:
    first = compiler.compile(json_grammar({"const": 0}))
    assert compiler.compile(json_grammar({"const": 0})) is first
    for number in range(1, 65):
        compiler.compile(json_grammar({"const": number}))
    assert compiler.compile(json_grammar({"const": 0})) is not first
    assert compiler.compile(json_grammar({"const": 64})) is compiler.compile(json_grammar({"const": 64}))


def test_answers_do_not_share_their_place_in_a_grammar(gem: GemModel, compiler: GrammarCompiler) -> None:
    sampling = SamplingParams(seed=1, grammar=compiler.compile(json_grammar({"type": "string", "maxLength": 9})))
    assert written(gem, sampling, 5) == written(gem, sampling, 5) != written(gem, sampling, 6)
