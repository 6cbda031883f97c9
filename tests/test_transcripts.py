"""The transcripts of tests/transcripts: stories of the scheduler and its agents, compared word for
word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transcripts.player import FOLDER, play

STORIES = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    """The output is as written; `python -m tests.transcripts.player --rewrite` regenerates it, and
    its diff is to be reviewed."""
    text = path.read_text()
    assert play(text) == text


def test_there_are_stories() -> None:
    """The folder is found, and each transcript has commands and output."""
    assert len(STORIES) >= 20
    assert all("\n> " in path.read_text() and "\n  " in path.read_text() for path in STORIES)
