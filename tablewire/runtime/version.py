"""The version of this software."""

from __future__ import annotations

import importlib.metadata


def software_version() -> str:
    """Return the version of the installed package."""
    return importlib.metadata.version("tablewire")
