"""docs/cli.md is what the program prints, and the JSON is what the page describes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.tools import cli_page as docs
from owner.changefeed.store import TRANSITIONS, Refused
from owner.cli.json_objects import NULL_IF_EMPTY, map_value, to_object
from tablewire.v1 import admin_pb2 as pb

PAGE = Path(__file__).resolve().parents[2] / "docs/cli.md"


def test_the_page_is_up_to_date() -> None:
    """A process of its own renders the page, because click caches the help of a command at its first use."""
    said = subprocess.run([sys.executable, "-m", "docs.tools.cli_page"], capture_output=True, encoding="utf-8", check=True).stdout
    assert said == PAGE.read_text(encoding="utf-8"), "run: python -m docs.tools.cli_page --write docs/cli.md"


@pytest.mark.parametrize("record", docs.RECORDS)
def test_an_object_shows_every_field_of_its_record(record: str) -> None:
    """The names are the same, and an empty record can be shown."""
    kind = pb.DESCRIPTOR.message_types_by_name[record]
    shown = to_object(getattr(pb, record)())
    assert list(shown) == [field.name for field in kind.fields]
    assert NULL_IF_EMPTY.get(record, set()) <= set(shown)


def test_every_record_of_an_answer_is_on_the_page() -> None:
    """The comments of admin.proto give the meaning of each field."""
    records = [pb.DESCRIPTOR.message_types_by_name[record] for record in docs.RECORDS]
    assert set(NULL_IF_EMPTY) <= set(docs.RECORDS)
    fields = [field for record in records for field in record.fields]
    assert {field.message_type.name for field in fields if field.message_type and not map_value(field)} <= set(docs.RECORDS)
    meanings = docs.comments()
    assert all(meanings[field.full_name].endswith(".") for field in fields)


def test_the_picture_of_a_changefeeds_life_has_every_arrow_and_every_refusal() -> None:
    """It is drawn from the owner's own table of transitions."""
    page = docs.render()
    for (state, event), outcome in TRANSITIONS.items():
        if isinstance(outcome, Refused):
            assert f"| {state} | `{event}` | {outcome.reason} |" in page
        elif outcome.state is not state:
            (line,) = re.findall(rf"^    {state} --> {outcome.state}: (.*)$", page, re.M)
            assert event.replace("_", " ") in line.split(", ")


def test_nothing_known_is_null_and_zero_stays_zero() -> None:
    """An optional number that is 0 differs from one that is unknown."""
    shown = to_object(pb.Changefeed(lag=0))
    assert (shown["lag"], shown["retained_bytes"], shown["slowest"], shown["error"]) == (0, None, None, None)
    assert to_object(pb.TableRow(start_key=b"\x01"))["start_key"] == "01"
