"""The extras of ``pip install 'gemify[...]'``, by the packages that only they bring."""

from __future__ import annotations

EXTRAS = {
    "datasets": "train",
    "mteb": "eval",
    "lm_eval": "eval",
    "pytrec_eval": "eval",
    "sklearn": "eval",
    "matplotlib": "eval",
    "sentence_transformers": "sentence-transformers",
    "langchain_core": "langchain",
    "llama_index": "llama-index",
    "llm": "llm",
    "lancedb": "rag",
    "pyarrow": "rag",
    "filelock": "rag",
    "watchfiles": "rag",
    "pypdf": "rag",
    "docx": "rag",
    "pptx": "rag",
    "openpyxl": "rag",
    "bs4": "rag",
    "lxml": "rag",
    "markdown_it": "rag",
    "onnxruntime": "ocr",
    "pypdfium2": "ocr",
    "rapidocr": "ocr",
    "lance": "corpus",
    "ray": "ray",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "h11": "serve",
    "httpx": "serve",
    "pydantic_settings": "serve",
    "prometheus_client": "serve",
    "limits": "serve",
    "llguidance": "serve",
    "bitsandbytes": "bitsandbytes",
    "mcp": "mcp",
    "trl": "trl",
}
"""The smallest extra that brings a package, by the name under which it is imported."""


def describe_missing(error: ModuleNotFoundError) -> str:
    """Return one line: the package that is missing, and the extra that brings it."""
    package = (error.name or "").partition(".")[0]
    return f"{package or error} is not installed: pip install 'gemify[{EXTRAS.get(package, 'all')}]'"
