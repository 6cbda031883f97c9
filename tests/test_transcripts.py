"""The transcripts of tests/transcripts: whole stories of the scheduler and its agents, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transcripts.player import FOLDER, play

STORIES = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    """It runs as written; `python -m tests.transcripts.player --rewrite` regenerates it, and the diff is to be read."""
    text = path.read_text()
    assert play(text) == text


def test_there_are_stories() -> None:
    """The folder is found, and each story has commands and output."""
    assert len(STORIES) >= 20
    assert all("\n> " in path.read_text() and "\n  " in path.read_text() for path in STORIES)
