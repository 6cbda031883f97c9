"""Logs: one line for each event, bound ids, no passwords, and no failure of the caller."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from tablewire.runtime import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore what `configure` changes for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_json_line_with_its_ids(stream: io.StringIO) -> None:
    """A line contains level, time, logger, the bound ids and the fields."""
    logs.configure("json", "info", stream=stream, service="owner", owner="o1")
    structlog.get_logger("owner.x").info("created", tables=3, changefeed="default/a")
    (event,) = lines(stream)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "created", "level": "info", "logger": "owner.x", "service": "owner", "owner": "o1", "tables": 3,
        "changefeed": "default/a",
    }  # fmt: skip


def test_the_level_filters(stream: io.StringIO) -> None:
    """Less severe events are not written, including those of other libraries."""
    logs.configure("json", "warning", stream=stream)
    structlog.get_logger("x").info("no")
    structlog.get_logger("x").warning("yes")
    logging.getLogger("lib").info("no")
    assert [event["event"] for event in lines(stream)] == ["yes"]


def test_no_password_is_written(stream: io.StringIO) -> None:
    """Passwords are removed from fields, nested fields, tracebacks and other libraries' records."""
    logs.configure("json", "info", stream=stream)
    log = structlog.get_logger("x")
    log.info("a", uri="postgresql://u:geheim@h/d", nested={"list": ["host=h password=geheim", ValueError("a://b:geheim@c")]})
    try:
        raise ValueError("cannot reach postgresql://u:geheim@h/d")
    except ValueError:
        log.error("b", exc_info=True)
    logging.getLogger("lib").warning("at %s", "postgresql://u:geheim@h/d")
    assert len(lines(stream)) == 3
    assert "geheim" not in stream.getvalue()
    assert "Traceback" in lines(stream)[1]["exception"]


def test_any_value_can_be_logged(stream: io.StringIO) -> None:
    """Bytes, exceptions, sets and very long texts are logged as short text."""
    logs.configure("json", "info", stream=stream)
    deep: Any = "x"
    for _ in range(50):
        deep = [deep]
    structlog.get_logger("x").info("a", raw=b"\xff", error=KeyError("k"), some={1}, long="y" * 100_000, deep=deep, key={1: 2})
    (event,) = lines(stream)
    assert event["raw"] == "b'\\xff'"
    assert len(event["long"]) < 20_000
    assert event["key"] == {"1": 2}


def test_other_libraries_and_warnings_are_logged(stream: io.StringIO) -> None:
    """Records of logging and warnings become events."""
    logs.configure("json", "info", stream=stream, service="owner")
    logging.getLogger("lib").warning("one %s", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("two", stacklevel=1)
    first, second = lines(stream)
    assert (first["event"], first["logger"], first["service"]) == ("one 1", "lib", "owner")
    assert "two" in second["event"]


def test_text_for_people(stream: io.StringIO) -> None:
    """The console format has no colours without a terminal, where auto means JSON."""
    logs.configure("console", "info", stream=stream)
    structlog.get_logger("x").info("created", tables=3)
    assert "created" in stream.getvalue()
    assert "tables=3" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    other = io.StringIO()
    logs.configure("auto", "info", stream=other)
    structlog.get_logger("x").info("created")
    assert lines(other)


def test_a_log_that_cannot_be_written_is_dropped() -> None:
    """A broken pipe or a closed stream does not raise."""

    class Broken(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    logs.configure("json", "info", stream=Broken())
    structlog.get_logger("x").info("a")
    closed = io.StringIO()
    logs.configure("json", "info", stream=closed)
    closed.close()
    structlog.get_logger("x").info("a")
