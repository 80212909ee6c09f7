"""Logs: one JSON object a line, on stderr. What clients say is no part of them unless --log-prompts asks for it."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

_FIELDS = ("request", "key", "method", "route", "status", "ms", "notes", "body")


class JsonLines(logging.Formatter):
    """A record as one line of JSON. Exceptions: where they arose; what they say may quote a prompt, so only if asked."""

    def __init__(self, *, log_prompts: bool = False) -> None:
        super().__init__()
        self._log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        for name in _FIELDS:
            value = getattr(record, name, None)
            if name == "notes":
                facts |= value or {}
            elif value is not None:
                facts[name] = value
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            facts["error"] = type(error).__name__
            facts["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)][-12:]
            if self._log_prompts:
                facts["said"] = str(error)
        return json.dumps(facts, ensure_ascii=True, default=str)


def set_up_logs(*, log_prompts: bool) -> None:
    """Give the server's loggers, and uvicorn's, this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(log_prompts=log_prompts))
    for name in ("gemify.serving", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
