"""The values of the options that all commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Settings:
    """The values of the shared options. timeout_s: None for the command's own default."""

    endpoint: Sequence[str] = ()
    config: str = ""
    output: str = "table"
    timeout_s: float | None = None
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
