"""The OpenAPI description says what the routes do: schemathesis asks by it, and gets neither surprises nor a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from running_server import Served, indexed, serving, tiny_gem

KEY = {"authorization": "Bearer key-of-ann"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Served]:
    index = indexed(tmp_path_factory.mktemp("store"), {"owls.txt": "Owls hunt at night.\n" * 9}, tokens=64)
    keys = {"keys": {"ann": "key-of-ann"}, "upload_key": ("ann",)}
    with serving(index.model, index=index, default_max_tokens=8, **keys) as running:  # type: ignore[arg-type]
        yield running


@pytest.mark.parametrize("examples", [30, pytest.param(250, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda m: m.value)
def test_described_requests_get_described_answers(served: Served, mode: GenerationMode, examples: int) -> None:
    asked = 0
    described = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=KEY)
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 24
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get" and not list(operation.query):
            continue  # there is nothing to get wrong

        @settings(
            max_examples=examples,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body.pop("model", None)  # only one name is right
            if isinstance(case.body, dict):  # any number of tokens may be asked for; a few are enough
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                    if isinstance(case.body.get(name), int) and not isinstance(case.body[name], bool):
                        case.body[name] = min(case.body[name], 8)
            nonlocal asked
            asked += 1
            response = case.call(timeout=60, headers=KEY)
            case.validate_response(
                response, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
            )

        ask()
    print(f"{asked} requests that are {mode.value}")


def test_every_route_is_described(served: Served) -> None:
    described = served.http(headers=KEY).get("/openapi.json").json()
    routes = {(path, method) for path, some in described["paths"].items() for method in some}
    assert routes == {
        *((f"/v1/{name}", "post") for name in ("embeddings", "completions", "chat/completions", "search", "recover")),
        *((path, "post") for path in ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens")),
        *((path, "post") for path in ("/v1/rerank", "/rerank", "/v2/rerank", "/tokenize", "/detokenize")),
        ("/v1/stores/{store}/files", "post"),
        ("/v1/stores/{store}/files/{name}", "delete"),
        *((path, "get") for path in ("/v1/stores", "/v1/stores/map", "/v1/passages/{passage_id}")),
        *((path, "get") for path in ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics", "/v1/stats")),
    }
    for path, some in described["paths"].items():
        for facts in some.values():
            assert facts["description"], path
            assert "422" not in facts["responses"], path


def test_both_headers_of_a_key_are_described(tmp_path: Path) -> None:
    with serving(tiny_gem(tmp_path), keys={"ann": "key-of-ann"}) as served, served.http() as http:
        described = http.get("/openapi.json", headers={"x-api-key": "key-of-ann"}).json()
    assert described["paths"]["/v1/messages"]["post"]["security"] == [{"key": []}, {"x-api-key": []}]
    assert described["components"]["securitySchemes"].keys() == {"key", "x-api-key"}


def test_it_answers_afterwards(served: Served) -> None:
    assert served.post("/v1/embeddings", {"input": "a"}, **KEY).status_code == 200
    assert served.engine.stats().failed_requests == 0
