"""The rules of the house that a machine can check: who may import whom, sizes, borders, docstrings, generated code.

Every exception is named in a list here, with its reason; a rule that is in the way is changed here and nowhere else.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"owner": "owner", "processor": "processor", "tablewire": "tablewire"}
GENERATED = "tablewire/v1/"

MAX_FILE_LINES = 450
MAX_TEST_FILE_LINES = 700
"""A list of cases is read one by one."""
MAX_FUNCTION_LINES = 80

LONG_FILES = {
    "tablewire/model/": "the contract, read in one go",
}
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}

NOT_IN_A_CORE = {
    "_thread", "asyncio", "concurrent", "datetime", "logging", "multiprocessing", "os", "pathlib", "queue", "random",
    "secrets", "select", "selectors", "signal", "socket", "subprocess", "threading", "time", "uuid",
}  # fmt: skip

BORDERS = {
    ("owner/changefeed/source_worker.py", "ChangefeedWorker._run"): "calls a user's source",
    ("processor/agent/executor_driver.py", "ExecutorDriver._ask"): "calls a user's executor",
    ("processor/agent/executor_driver.py", "ExecutorDriver._bulk_statuses"): "calls a user's executor",
    ("processor/agent/executor_driver.py", "ExecutorDriver.close"): "calls a user's executor",
    ("processor/agent/executor_driver.py", "ExecutorDriver.set_barrier"): "calls a user's executor",
    ("processor/service/agents.py", "meter_of"): "calls a user's executor",
    ("tablewire/runtime/plugins.py", "make"): "calls a user's factory",
    ("tablewire/runtime/plugins.py", "_load"): "imports a user's module",
    ("tablewire/runtime/shutdown.py", "run_thread.top"): "the top of a thread: logs, and ends the process",
}
"""Where `except Exception` may stand: the call into a user's code, and the top of a thread, which ends the process."""


@dataclass(frozen=True)
class Module:
    """One Python file of the project."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, module or module.name) of every import, under TYPE_CHECKING and inside functions too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno}: imports are absolute here"
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """(qualified name, node) of every function."""
        yield from _functions(self.tree, "")


def _functions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        else:
            yield from _functions(node, prefix)


def _modules(*folders: str) -> list[Module]:
    found = [Module(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [module for module in found if not module.name.startswith(GENERATED) and "/." not in module.name]


OURS = _modules(*PACKAGES.values())
TESTS = _modules("tests")
ALL = [*OURS, *_modules("deploy"), *TESTS]


def _offenders(lines: list[str], rule: str) -> None:
    assert not lines, f"{rule}:\n  " + "\n  ".join(lines)


def _is_one_of(imported: str, modules: set[str]) -> bool:
    parts = imported.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts) + 1))


def test_arrows_go_one_way() -> None:
    """owner -> tablewire <- processor; no package imports the tests or the deployment."""
    forbidden = {
        "owner/": {"processor", "tests", "deploy"},
        "processor/": {"owner", "tests", "deploy"},
        "tablewire/": {"owner", "processor", "tests", "deploy"},
    }
    found = [
        f"{module.name}:{line} imports {imported}"
        for module in OURS
        for folder, modules in forbidden.items()
        if module.name.startswith(folder)
        for line, imported in module.imports()
        if _is_one_of(imported, modules)
    ]
    _offenders(found, "owner -> tablewire <- processor, and nothing else")


def test_a_core_is_pure() -> None:
    """core/ sees numpy, two pure modules of tablewire, and of the standard library nothing that acts or waits."""
    found = []
    for module in OURS:
        package, _, rest = module.name.partition("/")
        if not rest.startswith("core/"):
            continue
        allowed = {
            "numpy",
            "tablewire.model",
            f"{package}.core",
            *(set(sys.stdlib_module_names) - NOT_IN_A_CORE),
        }
        found += [f"{module.name}:{line} {name}" for line, name in module.imports() if not _is_one_of(name, allowed)]
        found += [
            f"{module.name}:{node.lineno} numpy.random"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute) and node.attr == "random" and ast.unparse(node.value) in {"np", "numpy"}
        ]
        found += [
            f"{module.name}:{node.lineno} {node.func.id}()"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "print", "input"}
        ]
    _offenders(found, "a core decides and does nothing else")


MAY_SEE_MESSAGES = (
    "tablewire/wire/", "tablewire/runtime/grpc", "owner/exchange/", "owner/admin/", "owner/cli/", "processor/service/exchange_",
)  # fmt: skip
"""Who sees generated messages; runtime/grpc.py has the standard services."""


def test_libraries_stay_behind_their_borders() -> None:
    """Generated messages, etcd3 and psycopg are each seen by the few modules that translate them."""
    found = []
    for module in OURS:
        for line, imported in module.imports():
            top = imported.split(".")[0]
            if re.search(r"_pb2(_grpc)?\b", imported) and not module.name.startswith(MAY_SEE_MESSAGES):
                found.append(f"{module.name}:{line} {imported}: only wire, exchange, admin and cli see it")
            if top == "etcd3" and not module.name.startswith("tablewire/etcd/"):
                found.append(f"{module.name}:{line} {imported}: only tablewire/etcd sees it")
            if top == "psycopg" and not module.name.startswith(("tablewire/postgres/", "processor/postgres/")):
                found.append(f"{module.name}:{line} {imported}: only the two postgres packages see it")
    _offenders(found, "libraries stay behind their borders")


def test_proto_and_tests_are_not_packages() -> None:
    """proto/__init__.py would shadow proto-plus, and one in tests would change what its modules are called."""
    assert not (ROOT / "proto/__init__.py").exists()
    _offenders([module.name for module in TESTS if module.path.name == "__init__.py"], "tests are no packages")


def _swallows_everything(handler: ast.ExceptHandler) -> bool:
    """Catches any exception, and does not pass that very exception on."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"} for kind in caught)


def test_broad_excepts_stand_at_the_named_borders() -> None:
    """Any exception at all is caught only where a user's code is called, and where a thread begins."""
    seen = set()
    for module in [*OURS, *_modules("deploy")]:
        for qualified, function in module.functions():
            inner = {id(node) for _, nested in _functions(function, "") for node in ast.walk(nested)}
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler) and id(node) not in inner and _swallows_everything(node):
                    seen.add((module.name, qualified))
    _offenders([f"{name}: {function}" for name, function in sorted(seen - BORDERS.keys())], "a broad except, not in BORDERS")
    _offenders([f"{name}: {function}" for name, function in sorted(BORDERS.keys() - seen)], "in BORDERS, and no longer there")


def _calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_no_test_sleeps() -> None:
    """A test waits on a condition with a deadline, never for a time; only a poll named wait_until may pause, and a bench."""
    found = []
    for module in TESTS:
        if module.name.startswith("tests/bench/"):
            continue
        polls = {id(call) for name, function in module.functions() for call, _ in _calls(function) if name.endswith("wait_until")}
        found += [
            f"{module.name}:{node.lineno}"
            for node, called in _calls(module.tree)
            if called in {"time.sleep", "sleep"} and id(node) not in polls
        ]
    _offenders(found, "time.sleep in a test")


def test_skips_have_reasons() -> None:
    """A skipped test has its reason."""
    found = []
    for module in TESTS:
        for node in ast.walk(module.tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text.endswith(("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail")):
                call = next((c for c, called in _calls(module.tree) if c.func is node), None)
                if call is None or not any(keyword.arg == "reason" for keyword in call.keywords):
                    found.append(f"{module.name}:{node.lineno} {text}")
        for node, called in _calls(module.tree):
            if called == "pytest.skip" and not node.args and not node.keywords:
                found.append(f"{module.name}:{node.lineno} {called}")
    _offenders(found, "a skip without a reason")


def test_one_screen_one_thought() -> None:
    """Files and functions stay small enough to be read."""
    found = []
    for module in ALL:
        lines = module.text.count("\n")
        most = MAX_TEST_FILE_LINES if module.name.startswith("tests/") else MAX_FILE_LINES
        if lines > most and module.name not in LONG_FILES:
            found.append(f"{module.name}: {lines} lines")
        for qualified, node in module.functions():
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and (module.name, qualified) not in LONG_FUNCTIONS:
                found.append(f"{module.name}:{node.lineno} {qualified}: {length} lines")
    _offenders(
        found, f"at most {MAX_FILE_LINES} lines a file ({MAX_TEST_FILE_LINES} of tests) and {MAX_FUNCTION_LINES} a function"
    )


def test_modules_and_tests_say_what_they_are() -> None:
    """Every module has a docstring, and every test one that is a sentence."""
    found = [module.name for module in ALL if not (ast.get_docstring(module.tree) or "").strip()]
    for module in TESTS:
        if not module.path.name.startswith("test_"):
            continue
        for qualified, node in module.functions():
            said = (ast.get_docstring(node) or "").strip()
            if node.name.startswith("test_") and not said.endswith((".", "?", "!")):
                found.append(f"{module.name}:{node.lineno} {qualified}")
    _offenders(found, "a docstring that is a sentence")


def test_enum_values_are_their_names_in_lower_case() -> None:
    """What is stored and shown is the lower-case name."""
    found = []
    for module in OURS:
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ClassDef) or not any(
                ast.unparse(base).split(".")[-1] in {"StrEnum", "_CodedEnum", "CodedEnum"} for base in node.bases
            ):
                continue
            for member in node.body:
                if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
                    name = member.targets[0].id
                    value = member.value.value if isinstance(member.value, ast.Constant) else None
                    if not name.startswith("_") and value != name.lower():
                        found.append(f"{module.name}:{member.lineno} {node.name}.{name} = {value!r}")
    _offenders(found, "a StrEnum's value is its lower-case name")


TEXT_ENDINGS = {"", ".cfg", ".ini", ".json", ".md", ".proto", ".py", ".pyi", ".sh", ".sql", ".toml", ".txt", ".yaml", ".yml"}
MACHINE = re.compile(
    r"/(?:work|root|home|Users)/\w"  # somebody's folder
    r"|file:///(?:opt|usr|var|etc)/"
    r"|--(?:extra-)?index-url|--find-links"
    r"|(?:pypi|pythonhosted|npmjs|debian|ubuntu)\.(?:org|com|io)\b"
    r"|docker\.(?:org|com)\b|docker\.io/|\.docker\.io\b",  # `docker.io` alone is a package of Debian
)


def test_no_file_names_a_machine_or_a_registry() -> None:
    """The project builds anywhere: no absolute path of somebody's machine, no registry's host."""
    kept = {"tests/test_tidy.py"}
    skipped = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".demo", ".runs", ".cluster"}
    found = []
    for path in sorted(ROOT.rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if skipped & set(path.relative_to(ROOT).parts) or path.suffix not in TEXT_ENDINGS or not path.is_file() or name in kept:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := MACHINE.search(line):
                found.append(f"{name}:{number} {match.group()}")
    _offenders(found, "a path or a host of somebody's machine")


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """What stands beside the .proto files is what `make proto` writes today."""
    protos = sorted((ROOT / "proto" / GENERATED).glob("*.proto"))
    assert protos
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", "proto"),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}"),
            *(str(path.relative_to(ROOT)) for path in protos),
        ],
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    fresh = {path.name: path.read_text() for path in (tmp_path / "tablewire/v1").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / GENERATED).glob("*_pb2*")}
    assert sorted(kept) == sorted(fresh)
    _offenders([name for name in fresh if fresh[name] != kept[name]], "run `make proto`")


@pytest.mark.parametrize("name", ["run", "dev"])
def test_lock_files_satisfy_pyproject(name: str) -> None:
    """Everything that pyproject asks for is locked, at a version it allows, with hashes."""
    text = (ROOT / f"requirements/{name}.txt").read_text()
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.M))
    assert text.count("\n    --hash=sha256:") >= len(locked)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["local"]]
    groups = project["dependency-groups"]
    asked += groups["build"] + (groups["dev"] if name == "dev" else [])
    wanted = [Requirement(line) for line in asked if isinstance(line, str)]
    found = [str(r) for r in wanted if r.name not in locked or not r.specifier.contains(locked[r.name], prereleases=True)]
    _offenders(found, "run `make lock`")
