"""The project's own files as the tidy tests read them: each file is read, parsed and walked once in a process."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("owner", "processor", "tablewire")
GENERATED = "tablewire/v1/"
LEFT_BY_TOOLS = {
    ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".demo", ".runs", ".cluster", "__pycache__",
}  # fmt: skip
COMMENT = re.compile(r"(?:^|\s)#(\s.*)$")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One Python file of the project."""

    path: Path

    @property
    def name(self) -> str:
        """Return the path below the root, with slashes."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def dotted(self) -> str:
        """Return the name by which Python imports it."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Return every node of the tree, breadth first."""
        return list(ast.walk(self.tree))

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """Return (line, module or module.name) of every import, under TYPE_CHECKING and inside functions too."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno}: imports are absolute here"
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found

    @cached_property
    def functions(self) -> list[tuple[str, Function]]:
        """Return (qualified name, node) of every function."""
        return list(functions_of(self.tree, ""))

    @cached_property
    def calls(self) -> list[tuple[ast.Call, str]]:
        """Return every call and the dotted name of what is called ("" for anything else)."""
        return [(node, dotted_name(node.func)) for node in self.nodes if isinstance(node, ast.Call)]

    @cached_property
    def docstrings(self) -> list[tuple[Documented, str]]:
        """Return every documented module, class and function with its docstring."""
        found = ((node, ast.get_docstring(node)) for node in self.nodes if isinstance(node, Documented))
        return [(node, text) for node, text in found if text]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """Return (line, text) of all docstrings, the strings below attributes included, and of all comments."""
        found = [
            (node.lineno, node.value.value)
            for node in self.nodes
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        return found + [
            (number, match[1]) for number, line in enumerate(self.text.splitlines(), 1) if (match := COMMENT.search(line))
        ]


def dotted_name(node: ast.AST) -> str:
    """Return `a.b.c` of a name or attribute, and "" of any other expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def functions_of(parent: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Yield (qualified name, node) of the functions below `parent`."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Function):
            yield prefix + node.name, node
            yield from functions_of(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{prefix}{node.name}.")
        else:
            yield from functions_of(node, prefix)


@cache
def files() -> tuple[str, ...]:
    """Return the paths of all files below the root, without what installations, tools and runs leave there."""
    found: list[str] = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in LEFT_BY_TOOLS]
        found += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in names if name not in LEFT_BY_TOOLS]
    return tuple(sorted(found))


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Return the Python files below these folders, without the generated ones."""
    return tuple(
        _module(name)
        for name in files()
        if name.endswith(".py") and name.startswith(tuple(f"{folder}/" for folder in folders)) and not name.startswith(GENERATED)
    )


@cache
def _module(name: str) -> Module:
    return Module(ROOT / name)


def report(offenders: list[str], rule: str) -> None:
    """Fail with the rule and every place that breaks it."""
    assert not offenders, f"{rule}:\n  " + "\n  ".join(offenders)
