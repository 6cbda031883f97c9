"""Logs: one event a line on stderr, as JSON or text. The main module calls `configure` once.

The event is a snake_case word; everything else is a field, and the ids of the process are fields of
every event. Passwords are removed from every field, exceptions included. Records of other libraries
(logging, warnings) are written in the same form. A line that cannot be written is dropped: logging
must never stop the service.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import msgspec
import structlog

from tablewire.runtime.uris import redact_uri

FIELD_CHARACTERS_MAX = 16_384
"""Longer texts, such as a traceback, are cut."""
_NESTING_MAX = 4

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(format: str = "auto", level: str = "info", *, stream: TextIO | None = None, **bound: str) -> None:
    """Write every structlog and logging event of at least this level to the stream (default: stderr).

    format: "json", "console", or "auto" (console on a terminal). bound: fields of every event.
    """
    target = stream if stream is not None else sys.stderr
    renderer: Any = structlog.processors.JSONRenderer(serializer=_to_json)
    if format == "console" or (format == "auto" and target.isatty()):
        renderer = structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            lambda _logger, _method, event: {**bound, **event},
            structlog.processors.add_log_level,
            _add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *names: _Logger(str(names[0]) if names else "", target),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_Bridge()]
    # The INFO messages of other libraries are of no use to an operator.
    root.setLevel(max(_LEVELS[level], logging.WARNING) if level != "debug" else logging.DEBUG)
    logging.captureWarnings(True)


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Remove passwords from every field and cut long ones (a structlog processor)."""
    return {name: _clean(value, _NESTING_MAX) for name, value in event.items()}


def _clean(value: Any, nesting: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if nesting and isinstance(value, Mapping):
        return {str(name): _clean(item, nesting - 1) for name, item in value.items()}
    if nesting and isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, nesting - 1) for item in value]
    text = redact_uri(str(value))
    return text if len(text) <= FIELD_CHARACTERS_MAX else f"{text[:FIELD_CHARACTERS_MAX]}... ({len(text)} characters)"


def _to_json(event: Any, **_options: Any) -> str:
    return msgspec.json.encode(event).decode("utf-8")


def _add_logger_name(logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if logger.name:
        event["logger"] = logger.name
    return event


class _Logger(structlog.WriteLogger):
    def __init__(self, name: str, stream: TextIO) -> None:
        super().__init__(stream)
        self.name = name

    def msg(self, message: str) -> None:
        # The reader of a pipe has ended, the disk is full, or the stream was closed at exit.
        with contextlib.suppress(OSError, ValueError):
            super().msg(message)

    debug = info = warning = error = critical = exception = log = msg


class _Bridge(logging.Handler):
    """Turns records of the standard library's logging into structlog events."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(min(record.levelno, logging.CRITICAL), record.getMessage(), exc_info=record.exc_info or None)
