"""A shell starts the CLI at each press of TAB, so it must not import what is slow until a command needs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SLOW = ("grpc", "numpy", "rich", "msgspec", "google.protobuf", "structlog", "etcd3", "psycopg", "owner.service")
PROGRAM = f"""
import sys
from owner.__main__ import main
try:
    main()
finally:
    sys.stderr.write(" ".join(name for name in {SLOW} if name in sys.modules))
"""
TIMEOUT_S = 60


def slow_imports(*arguments: str, **environ: str) -> tuple[str, str]:
    """Run `owner` with these arguments; return its stdout, and which slow modules it has imported."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environ = {**os.environ, **environ}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("table", "move", "--help"), ("config", "show", "--help"), ("version",)])
def test_help_and_version_import_nothing_slow(arguments: tuple[str, ...]) -> None:
    """Of every command, since the help of the program names them all."""
    shown, slow = slow_imports(*arguments)
    assert "owner" in shown or "tablewire" in shown
    assert slow == ""


@pytest.mark.parametrize(("line", "offered"), [("owner table mo", "move"), ("owner table move --dr", "--dry-run")])
def test_completion_of_commands_and_options_imports_nothing_slow(line: str, offered: str) -> None:
    """Only the names of changefeeds, processors and tables need the cluster."""
    words = line.split()
    shown, slow = slow_imports(_OWNER_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    assert shown.split() == [f"plain,{offered}"]
    assert slow == ""


def test_a_command_that_calls_an_owner_starts_without_the_scheduler(free_port: int) -> None:
    """It needs grpc and the configuration, and neither numpy nor etcd."""
    program = PROGRAM.replace("finally:", "except SystemExit:\n    pass\nfinally:")
    command = [sys.executable, "-c", program, "--endpoint", f"127.0.0.1:{free_port}", "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert "no owner answers" in done.stderr
    assert done.stderr.splitlines()[-1].split() == ["grpc", "msgspec", "google.protobuf"]
