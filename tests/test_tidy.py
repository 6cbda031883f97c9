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
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.source_tree import GENERATED, PACKAGES, ROOT, Module, files, functions_of, modules, report

OURS = modules(*PACKAGES)
TESTS = modules("tests")
ALL = modules(*PACKAGES, "deploy", "docs", "tests")

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


def _is_one_of(imported: str, modules: set[str]) -> bool:
    parts = imported.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts) + 1))


ROOMS: dict[str, set[str]] = {
    "tablewire.errors": set(),
    "tablewire.model": {"errors"},
    "tablewire.wire": {"errors", "model"},
    "tablewire.runtime": {"errors", "model", "wire"},
    "tablewire.etcd": {"errors", "model", "wire", "runtime"},
    "tablewire.source": {"errors", "model"},
    "tablewire.executor": {"errors", "model"},
    "tablewire.postgres": {"errors", "model", "runtime", "source"},
    "tablewire.testing": {"errors", "model", "wire", "executor", "source"},
    "owner.core": set(),
    "owner.owner_config": {"core"},
    "owner.scheduling": {"core"},
    "owner.events": {"core", "scheduling"},
    "owner.changefeed": {"core", "owner_config", "scheduling", "events"},
    "owner.exchange": {"owner_config"},
    "owner.leadership": {"core", "owner_config", "scheduling", "events", "changefeed", "exchange"},
    "owner.admin": {"core", "scheduling", "events", "changefeed"},
    "owner.owner_metrics": {"core", "scheduling", "events", "changefeed", "exchange"},
    "owner.service": {"owner_config", "owner_metrics", "scheduling", "events", "changefeed", "exchange", "leadership", "admin"},
    "owner.cli": {"owner_config", "service", "admin"},
    "owner.__main__": {"cli"},
    "processor.core": set(),
    "processor.processor_config": set(),
    "processor.agent": {"core"},
    "processor.service": {"processor_config", "agent"},
    "processor.postgres": set(),
    "processor.__main__": {"processor_config", "service"},
}
"""What each room may import of its own package; a room that is not listed may not exist."""


POSTGRES_FOLDERS = ("source", "sinks", "tables", "readers", "executor")
"""What is inside processor/postgres; each imports only those before it."""


def test_the_postgres_executor_has_layers() -> None:
    """processor/postgres consists of POSTGRES_FOLDERS, and imports inside it point downwards."""
    found = []
    for module in OURS:
        if not module.dotted.startswith("processor.postgres."):
            continue
        folder = module.dotted.split(".")[2]
        assert folder in POSTGRES_FOLDERS, module.name
        for line, imported in _imported_modules(module):
            if imported.startswith("processor.postgres."):
                target = imported.split(".")[2]
                if POSTGRES_FOLDERS.index(target) > POSTGRES_FOLDERS.index(folder):
                    found.append(f"{module.name}:{line} {imported}")
    report(found, "a folder of processor/postgres imports only those before it")


def _room(dotted: str) -> str:
    """Return the package and the first name below it: a folder or a module."""
    return ".".join(dotted.split(".")[:2])


def _imported_modules(module: Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of our own modules that a module imports."""
    known = {one.dotted for one in OURS}
    for line, imported in module.imports:
        name = imported if imported in known else imported.rpartition(".")[0]
        if name in known and name != module.dotted:
            yield line, name


def test_arrows_go_one_way() -> None:
    """owner -> tablewire <- processor, each room imports only what ROOMS says, and nothing imports tests or deployment."""
    others = {"owner": {"tablewire"}, "processor": {"tablewire"}, "tablewire": set()}
    found = []
    for module in OURS:
        room = _room(module.dotted)
        package = module.dotted.split(".")[0]
        found += [f"{module.name}:{n} {name}" for n, name in module.imports if name.split(".")[0] in {"tests", "deploy", "docs"}]
        for line, imported in _imported_modules(module):
            target = _room(imported)
            if target.split(".")[0] != package:
                allowed = target.split(".")[0] in others[package]
            else:
                allowed = "." not in room or target == room or target.partition(".")[2] in ROOMS.get(room, set())
            if not allowed:
                found.append(f"{module.name}:{line} {imported}")
    report(found, "a room imports only what ROOMS allows")
    rooms = {_room(module.dotted) for module in OURS if "." in module.dotted} - {f"{name}.v1" for name in PACKAGES}
    assert rooms == set(ROOMS), "ROOMS names every room, and no other"


def test_no_two_modules_import_each_other() -> None:
    """The graph of imports, those for type checkers included, has no cycle."""
    arrows = {module.dotted: {name for _, name in _imported_modules(module)} for module in OURS}
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            cycle = [*path[path.index(name) :], name]
            raise AssertionError("an import cycle: " + " -> ".join(cycle))
        if name not in done:
            path.append(name)
            for target in sorted(arrows.get(name, ())):
                visit(target)
            done.add(path.pop())

    for name in sorted(arrows):
        visit(name)


def test_one_class_name_has_one_meaning() -> None:
    """No two classes share a name, leading underscores aside, unless one of a module implements the Protocol beside it."""
    seen: dict[str, str] = {}
    found = []
    for module in modules(*PACKAGES, "deploy"):
        for node in module.nodes:
            if isinstance(node, ast.ClassDef):
                former = seen.setdefault(node.name.lstrip("_"), module.name)
                if former != module.name:
                    found.append(f"{node.name}: {former} and {module.name}")
    report(found, "one class name, one meaning")


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
        found += [f"{module.name}:{line} {name}" for line, name in module.imports if not _is_one_of(name, allowed)]
        found += [
            f"{module.name}:{node.lineno} numpy.random"
            for node in module.nodes
            if isinstance(node, ast.Attribute) and node.attr == "random" and ast.unparse(node.value) in {"np", "numpy"}
        ]
        found += [
            f"{module.name}:{node.lineno} {node.func.id}()"
            for node in module.nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "print", "input"}
        ]
    report(found, "a core decides and does nothing else")


MAY_SEE_MESSAGES = (
    "tablewire/wire/", "tablewire/runtime/grpc", "owner/exchange/", "owner/admin/", "owner/cli/", "processor/service/exchange_",
)  # fmt: skip
"""Who sees generated messages; runtime/grpc.py has the standard services."""


def test_libraries_stay_behind_their_borders() -> None:
    """Generated messages, etcd3 and psycopg are each seen by the few modules that translate them."""
    found = []
    for module in OURS:
        for line, imported in module.imports:
            top = imported.split(".")[0]
            if re.search(r"_pb2(_grpc)?\b", imported) and not module.name.startswith(MAY_SEE_MESSAGES):
                found.append(f"{module.name}:{line} {imported}: only wire, exchange, admin and cli see it")
            if top == "etcd3" and not module.name.startswith("tablewire/etcd/"):
                found.append(f"{module.name}:{line} {imported}: only tablewire/etcd sees it")
            if top == "psycopg" and not module.name.startswith(("tablewire/postgres/", "processor/postgres/")):
                found.append(f"{module.name}:{line} {imported}: only the two postgres packages see it")
    report(found, "libraries stay behind their borders")


def test_proto_and_tests_are_not_packages() -> None:
    """proto/__init__.py would shadow proto-plus, and one in tests would change what its modules are called."""
    assert not (ROOT / "proto/__init__.py").exists()
    report([module.name for module in TESTS if module.path.name == "__init__.py"], "tests are no packages")


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
    for module in [*OURS, *modules("deploy")]:
        for qualified, function in module.functions:
            inner = {id(node) for _, nested in functions_of(function, "") for node in ast.walk(nested)}
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler) and id(node) not in inner and _swallows_everything(node):
                    seen.add((module.name, qualified))
    report([f"{name}: {function}" for name, function in sorted(seen - BORDERS.keys())], "a broad except, not in BORDERS")
    report([f"{name}: {function}" for name, function in sorted(BORDERS.keys() - seen)], "in BORDERS, and no longer there")


def test_no_test_sleeps() -> None:
    """A test waits on a condition with a deadline, never for a time; only a poll named wait_until may pause, and a bench."""
    found = []
    for module in TESTS:
        if module.name.startswith("tests/bench/"):
            continue
        polls = [function for name, function in module.functions if name.endswith("wait_until")]
        pauses = {id(node) for function in polls for node in ast.walk(function)}
        found += [
            f"{module.name}:{node.lineno}"
            for node, called in module.calls
            if called in {"time.sleep", "sleep"} and id(node) not in pauses
        ]
    report(found, "time.sleep in a test")


def test_skips_have_reasons() -> None:
    """A skipped test has its reason."""
    found = []
    for module in TESTS:
        for node in module.nodes:
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text.endswith(("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail")):
                call = next((c for c, called in module.calls if c.func is node), None)
                if call is None or not any(keyword.arg == "reason" for keyword in call.keywords):
                    found.append(f"{module.name}:{node.lineno} {text}")
        for node, called in module.calls:
            if called == "pytest.skip" and not node.args and not node.keywords:
                found.append(f"{module.name}:{node.lineno} {called}")
    report(found, "a skip without a reason")


def test_one_screen_one_thought() -> None:
    """Files and functions stay small enough to be read."""
    found = []
    for module in ALL:
        lines = module.text.count("\n")
        most = MAX_TEST_FILE_LINES if module.name.startswith("tests/") else MAX_FILE_LINES
        if lines > most and module.name not in LONG_FILES:
            found.append(f"{module.name}: {lines} lines")
        for qualified, node in module.functions:
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and (module.name, qualified) not in LONG_FUNCTIONS:
                found.append(f"{module.name}:{node.lineno} {qualified}: {length} lines")
    report(found, f"at most {MAX_FILE_LINES} lines a file ({MAX_TEST_FILE_LINES} of tests) and {MAX_FUNCTION_LINES} a function")


def test_modules_and_tests_say_what_they_are() -> None:
    """Every module has a docstring, and every test one that is a sentence."""
    found = [module.name for module in ALL if not (ast.get_docstring(module.tree) or "").strip()]
    for module in TESTS:
        if not module.path.name.startswith("test_"):
            continue
        for qualified, node in module.functions:
            said = (ast.get_docstring(node) or "").strip()
            if node.name.startswith("test_") and not said.endswith((".", "?", "!")):
                found.append(f"{module.name}:{node.lineno} {qualified}")
    report(found, "a docstring that is a sentence")


def test_enum_values_are_their_names_in_lower_case() -> None:
    """What is stored and shown is the lower-case name."""
    found = []
    for module in OURS:
        for node in module.nodes:
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
    report(found, "a StrEnum's value is its lower-case name")


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
    found = []
    for name in files():
        path = ROOT / name
        if path.suffix not in TEXT_ENDINGS or name in kept:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := MACHINE.search(line):
                found.append(f"{name}:{number} {match.group()}")
    report(found, "a path or a host of somebody's machine")


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
    report([name for name in fresh if fresh[name] != kept[name]], "run `make proto`")


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
    report(found, "run `make lock`")
