"""The preflight names each unmet requirement in one line, before anything starts, also on old Pythons."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

preflight: Any = importlib.import_module("deploy.local.preflight")


def test_this_machine_will_do() -> None:
    """On the machine of the tests the preflight succeeds without output."""
    done = subprocess.run([sys.executable, preflight.__file__], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_old_python_is_named() -> None:
    """A Python that is too old is distinguished from one that is new enough."""
    assert "3.9 is too old" in preflight.wrong_python((3, 9))
    assert preflight.wrong_python((3, 11)) == ""
    assert preflight.wrong_python((3, 14)) == ""


def test_missing_venv_names_the_package() -> None:
    """Debian splits ensurepip off; the line names the package for this version."""
    problem = preflight.missing_modules((3, 12), lambda name: name != "ensurepip")
    assert "python3.12-venv" in problem
    assert preflight.missing_modules((3, 12), lambda name: True) == ""


def test_unsupported_platform_is_named() -> None:
    """Systems and machines without wheels, and C libraries that are too old, are named with the supported ones."""
    assert "Windows on AMD64 is not supported" in preflight.wrong_platform("Windows", "AMD64", ())
    assert "riscv64" in preflight.wrong_platform("Linux", "riscv64", (2, 36))
    assert "glibc 2.31 is too old" in preflight.wrong_platform("Linux", "x86_64", (2, 31))
    assert preflight.wrong_platform("Linux", "aarch64", (2, 36)) == ""
    assert preflight.wrong_platform("Linux", "x86_64", ()) == ""
    assert preflight.wrong_platform("Darwin", "arm64", ()) == ""


def test_syntax_is_old() -> None:
    """Python 3.6 can parse it, so that it can report that Python is too old."""
    ast.parse(Path(preflight.__file__).read_text(), feature_version=(3, 6))
