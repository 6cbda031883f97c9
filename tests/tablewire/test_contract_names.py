"""The package `tablewire` alone is enough for a plug-in, whatever a user's own modules are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tablewire

ROOT = Path(__file__).resolve().parents[2]
USE_PLUGIN = """
import os
from tablewire_{name} import {executor}
from tablewire import ChangefeedID, Checkpoint, ExecutorRequest, Span, TableState

folder = os.getcwd()
request = ExecutorRequest("a", ChangefeedID("default", "one"), 1, "{name}://" + folder, "file://" + folder, ["*"])
executor, span = {executor}(request), Span(1)
assert executor.add_table_span(span, Checkpoint(1, 1), True)
assert executor.add_table_span(span, Checkpoint(1, 1), False)
assert executor.get_table_span_status(span, False).state is TableState.REPLICATING
import processor, owner
print(processor.MINE, owner.MINE)
"""


def test_all_names_can_be_imported() -> None:
    """Each name of __all__ exists, and no other name is found."""
    for name in tablewire.__all__:
        assert getattr(tablewire, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tablewire.nothing  # type: ignore[attr-defined]


def test_the_package_imports_nothing_by_itself() -> None:
    """A process that needs one module does not pay for the others: numpy alone takes longer than
    the CLI may.
    """
    program = "import sys, tablewire.errors; print(sorted(name for name in sys.modules if name.startswith('tablewire.')))"
    assert run(program, ROOT) == "['tablewire.errors']"


@pytest.mark.parametrize(("name", "executor"), [("minimal", "Executor"), ("counter", "new_executor")])
def test_modules_of_a_user_shadow_nothing_that_a_plugin_needs(tmp_path: Path, name: str, executor: str) -> None:
    """A plug-in works in a folder that also has a processor.py and an owner.py of the user's own."""
    source = ROOT / "tests" / "plugins" / name / f"tablewire_{name}.py"
    (tmp_path / source.name).write_text(source.read_text())
    for module in ("processor", "owner"):
        (tmp_path / f"{module}.py").write_text("MINE = __name__\n")
    assert run(USE_PLUGIN.format(name=name, executor=executor), tmp_path) == "processor owner"


def run(program: str, folder: Path) -> str:
    """Run a program in a folder, whose modules come first; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
