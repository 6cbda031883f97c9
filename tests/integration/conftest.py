"""What tests of real services share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.counter_world import install_plugin


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The counting plug-in, installed as a user would; the folder to put on a service's path."""
    return install_plugin(tmp_path_factory.mktemp("plugin"))
