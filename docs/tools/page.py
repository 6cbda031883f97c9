"""The command line that the generators of pages share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def main(module: str, render: Callable[[], str]) -> None:
    """Print the page, or write it to FILE with `--write FILE`."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        Path(arguments[1]).write_text(render(), encoding="utf-8")
    elif not arguments:
        sys.stdout.write(render())
    else:
        sys.exit(f"usage: python -m docs.tools.{module} [--write FILE]")
