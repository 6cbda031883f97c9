"""The documentation is true: its example runs and prints what it says, links lead somewhere, words are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tablewire.types import StallReason

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TIMEOUT_S = 60


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of this language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def test_the_example_executor_runs_and_prints_what_the_page_says() -> None:
    """docs/writing-an-executor.md is one program, and its output stands below it."""
    page = ROOT / "docs/writing-an-executor.md"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks(page, "python"))],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.stdout, done.stderr) == (blocks(page, "text")[0], "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file of the project names one that exists."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    dead = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not dead


def test_every_page_is_in_the_index() -> None:
    """docs/README.md names each page beside it."""
    index = (ROOT / "docs/README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index]


def test_every_stall_reason_is_explained() -> None:
    """docs/concepts.md has a line for each stall reason, and for nothing else."""
    rows = re.findall(r"^\| ([a-z_]+) \|", (ROOT / "docs/concepts.md").read_text().split("| stall reason |")[1], re.M)
    assert rows == [reason.value for reason in StallReason]


def test_every_verb_is_in_help() -> None:
    """`make help` lists every verb of the Makefile."""
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    verbs = ["help", "venv", "demo", "cluster", "check", "test", "proto", "lock", "bench", "bench-core", "sim", "compose-test"]
    assert re.findall(r"^  ([a-z-]+) ", said, re.M) == verbs
