"""Whatever an owner writes to etcd is guarded by its leadership: nothing else has the means to."""

from __future__ import annotations

import ast
from pathlib import Path

OWNER = Path(__file__).parents[2] / "owner"
WRITES = {"put", "put_if", "transact", "delete", "revoke", "grant", "compact"}
ALLOWED = {
    ("election.py", "transact"): "guarded_write: everything else that an owner writes goes through it",
    ("election.py", "put_if"): "a candidate's own key, under its own lease",
    ("election.py", "revoke"): "a candidate's own lease",
    (
        "evictions.py",
        "revoke",
    ): "the lease of a capture whose key a guarded write has just deleted; no id ever comes back under it",
}


def test_an_owner_writes_to_etcd_by_guarded_writes_alone() -> None:
    """Each call of a writing method on something named a session is one of those that are listed here, with its reason."""
    found = set()
    for path in sorted(OWNER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in WRITES
                and "session" in ast.unparse(node.func.value)
            ):
                found.add((path.name, node.func.attr))
    assert found == ALLOWED.keys()
