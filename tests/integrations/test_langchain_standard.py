"""LangChain's standard tests for chat models and embeddings, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_tests")

from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from gemify import GemModel
from gemify.integrations.langchain import ChatGem, GemEmbeddings

pytestmark = pytest.mark.usefixtures("one_thread", "loaded")


class _OverAGem:
    gem: GemModel

    @pytest.fixture(scope="class", autouse=True)
    def loaded(self, base_dir: Path) -> None:
        type(self).gem = GemModel.from_base(str(base_dir))

    @property
    def chat_model_class(self) -> type[ChatGem]:
        return ChatGem

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"gem": self.gem}

    @property
    def has_tool_calling(self) -> bool:
        return False  # `bind_tools` only says who calls them

    @property
    def embeddings_class(self) -> type[GemEmbeddings]:
        return GemEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"gem": self.gem}


class TestChatUnit(_OverAGem, ChatModelUnitTests):
    pass


class TestChatIntegration(_OverAGem, ChatModelIntegrationTests):
    pass


class TestEmbeddingsUnit(_OverAGem, EmbeddingsUnitTests):
    pass


class TestEmbeddingsIntegration(_OverAGem, EmbeddingsIntegrationTests):
    pass
