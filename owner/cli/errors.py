"""How a command fails: one line on stderr, and with `-o json` also an object on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from owner.cli.output import Output


class CallError(Exception):
    """A call that failed or was refused. code: the gRPC status in lower case. text: one line for the operator."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class CommandError(click.ClickException):
    """Exit code 1: one line on stderr, and with `-o json` also {"error": {"code", "message", ...}} on stdout."""

    def __init__(self, code: str, text: str, output: Output, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self._code = code
        self._output = output
        self._details = details or {}

    def show(self, file: Any = None) -> None:
        self._output.note(f"Error: {self.message}")
        if self._output.is_json:
            self._output.json({"error": {"code": self._code, "message": self.message, **self._details}})


class OutputError(click.ClickException):
    """stdout cannot be written to: exit code 1. (click itself handles a closed pipe, as in `| head`.)"""
