"""docs/cli.md is what the program says of itself, and the JSON is what the page says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.tools import cli_page as docs
from owner.admin import models as answers
from owner.changefeed.store import TRANSITIONS, Refused
from owner.cli import shapes
from tablewire.v1 import admin_pb2 as pb

PAGE = Path(__file__).resolve().parents[2] / "docs/cli.md"

SAMPLES = {
    "owner": (pb.Owner(), answers.OwnerRow),
    "status": (pb.GetStatusResponse(), answers.ClusterStatus),
    "capture": (pb.Capture(), answers.CaptureRow),
    "drain": (pb.DrainCaptureResponse(), answers.DrainProgress),
    "table": (pb.TableRow(), answers.TableRow),
    "job": (pb.Job(), answers.JobRow),
    "changefeed": (pb.Changefeed(), answers.ChangefeedRow),
    "plan": (pb.Plan(), answers.Plan),
    "planned move": (pb.PlannedMove(), answers.PlannedMoveRow),
    "event": (pb.Event(), answers.EventRow),
}


def test_the_page_is_up_to_date() -> None:
    """It is written by `python -m docs.tools.cli_page --write docs/cli.md`. In a process of its
    own: a command remembers how it was
    asked for help first, and other tests ask otherwise."""
    said = subprocess.run([sys.executable, "-m", "docs.tools.cli_page"], capture_output=True, encoding="utf-8", check=True).stdout
    assert said == PAGE.read_text(encoding="utf-8"), "run: python -m docs.tools.cli_page --write docs/cli.md"


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda shape: shape.name)
def test_a_shape_shows_every_field_of_its_message(shape: shapes.Shape) -> None:
    """What the owner tells is what the CLI shows, under the same names, and an empty message can be shown."""
    message, answer = SAMPLES[shape.name]
    shown = set(shape.of(message))
    assert shown == {field.name for field in message.DESCRIPTOR.fields}
    assert shown == {field.name for field in dataclasses.fields(answer)}


def test_the_picture_of_a_changefeeds_life_has_every_arrow_and_every_refusal() -> None:
    """It is drawn from the table that the owner goes by."""
    page = docs.render()
    for (state, event), outcome in TRANSITIONS.items():
        if isinstance(outcome, Refused):
            assert f"| {state} | `{event}` | {outcome.reason} |" in page
        elif outcome.state is not state:
            (line,) = re.findall(rf"^    {state} --> {outcome.state}: (.*)$", page, re.M)
            assert event.replace("_", " ") in line.split(", ")


def test_nothing_known_is_null_and_zero_stays_zero() -> None:
    """An optional number that is 0 is not the same as one that is not known."""
    shown = shapes.CHANGEFEED.of(pb.Changefeed(lag=0))
    assert (shown["lag"], shown["retained_bytes"], shown["slowest"], shown["error"]) == (0, None, None, None)
    assert shapes.TABLE.of(pb.TableRow(start_key=b"\x01"))["start_key"] == "01"
