"""Logs: one event a line on stderr, for an operator; JSON or text. `configure` is called once, by a composition root.

An event is a snake_case word, what belongs to it are fields, and ids that hold for the whole process (service, capture) are
given to `configure`. Passwords in URIs vanish whatever field they stand in, exception texts included. Other libraries' records
(logging, warnings) come out of the same end. A log that cannot be written is dropped: it must never stop the service.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import msgspec
import structlog

from tablewire.runtime.uris import redact_uri

FIELD_CHARACTERS_MAX = 16_384
"""A longer text (a traceback, an error of a driver) is cut."""
_NESTING_MAX = 4

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(format: str = "auto", level: str = "info", *, stream: TextIO | None = None, **bound: str) -> None:
    """From now on every structlog and logging event of at least `level` goes to `stream` (stderr) as `format`: "json",
    "console", or "auto" (console on a terminal). `bound`: fields of every event."""
    target = stream if stream is not None else sys.stderr
    is_console = format == "console" or (format == "auto" and target.isatty())
    renderer: Any
    if is_console:
        renderer = structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=structlog.dev.plain_traceback)
    else:
        renderer = structlog.processors.JSONRenderer(serializer=_to_json)

    def bind(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for name, value in bound.items():
            event.setdefault(name, value)
        return event

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            bind,
            structlog.processors.add_log_level,
            _add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=_Factory(target),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_Bridge()]
    # Other libraries say much at INFO that is nothing to an operator.
    root.setLevel(max(_LEVELS[level], logging.WARNING) if level != "debug" else logging.DEBUG)
    logging.captureWarnings(True)


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: no password of a URI leaves the process, and no field is endless."""
    for name, value in event.items():
        event[name] = _clean(value, _NESTING_MAX)
    return event


def _clean(value: Any, nesting: int) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if nesting and isinstance(value, Mapping):
        return {str(name): _clean(item, nesting - 1) for name, item in value.items()}
    if nesting and isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, nesting - 1) for item in value]
    text = redact_uri(value if isinstance(value, str) else str(value))
    return text if len(text) <= FIELD_CHARACTERS_MAX else f"{text[:FIELD_CHARACTERS_MAX]}... ({len(text)} characters)"


def _to_json(event: Any, **_options: Any) -> str:
    return msgspec.json.encode(event).decode("utf-8")


def _add_logger_name(logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if logger.name:
        event["logger"] = logger.name
    return event


class _Logger:
    """Writes whole lines, one at a time."""

    def __init__(self, name: str, stream: TextIO, lock: threading.Lock) -> None:
        self.name = name
        self._stream = stream
        self._lock = lock

    def msg(self, line: str) -> None:
        try:
            with self._lock:
                self._stream.write(f"{line}\n")
                self._stream.flush()
        except (OSError, ValueError):  # the reader has gone, the disk is full, or the stream was closed at exit
            return

    debug = info = warning = error = critical = exception = log = msg


class _Factory:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> _Logger:
        return _Logger(str(arguments[0]) if arguments else "", self._stream, self._lock)


class _Bridge(logging.Handler):
    """Records of the standard library's logging as events of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(min(record.levelno, logging.CRITICAL), record.getMessage(), exc_info=record.exc_info or None)
