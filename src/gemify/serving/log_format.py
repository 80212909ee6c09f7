"""Logs: one JSON object a line, on stderr. Clients' texts are not in them unless --log-prompts asks for it."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON, with the fields of ``extra={"fields": {...}}``.

    Args:
        log_prompts: also log the messages of exceptions, which may quote a prompt.
    """

    def __init__(self, *, log_prompts: bool = False) -> None:
        super().__init__()
        self._log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields: dict[str, Any] = getattr(record, "fields", {})
        line |= {name: value for name, value in fields.items() if value is not None}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)[-12:]
            line["traceback"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
            if self._log_prompts:
                line["error_message"] = str(error)
        return json.dumps(line, ensure_ascii=True, default=str)


def set_up_logs(*, log_prompts: bool) -> None:
    """Give the server's loggers, and uvicorn's, this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(log_prompts=log_prompts))
    for name in ("gemify.serving", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True
