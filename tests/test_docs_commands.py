"""What the documentation tells people to type, to write into files and to look at: commands parse, snippets load, files exist."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from owner.cli.main import cli as owner_cli
from owner.owner_config import OwnerConfig
from processor.__main__ import cli as processor_cli
from processor.processor_config import ProcessorConfig
from tablewire.errors import ConfigError
from tablewire.runtime.config import Section, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("deploy/**/*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
TIMEOUT_S = 60
SERVICES: dict[str, click.Command] = {"owner": owner_cli, "processor": processor_cli}
KINDS: dict[str, type[Section]] = {"owner": OwnerConfig, "processor": ProcessorConfig}
PROGRAMS = {"demo": "deploy.local.demo", "cluster": "deploy.local.playground", "bench": "tests.bench", "sim": "tests.sim"}
"""Behind the verbs whose ARGS are checked; those of `test` and `check` are pytest's."""


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^( *)```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


@EVERY_PAGE
def test_files_that_are_named_exist(page: Path) -> None:
    """Text in backquotes that looks like a path of this project is one; a star matches some."""
    named = re.findall(r"`((?:deploy|docs|tests|owner|processor|proto|requirements|\.ci)/[\w./*<>-]*)`", prose(page))
    assert not [path for path in named if "<" not in path and not any(ROOT.glob(path.rstrip("/")))]


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) of all shell blocks: what starts with owner, processor or make."""
    found = set()
    for page in PAGES:
        text = "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```$", page.read_text(), re.M | re.S)).replace("\\\n", " ")
        for line in text.splitlines():
            for part in re.split(r" -- | && ", line.strip()):
                if re.match(r"(owner|processor|make) ", part):
                    found.add((page.relative_to(ROOT).as_posix(), re.sub(r"\s+", " ", part)))
    return sorted(found)


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that is meant, and what is left of its line."""
    command, rest = SERVICES[words[0]], words[1:]
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    return command, rest


@functools.cache
def verbs() -> tuple[str, ...]:
    """What `make help` lists."""
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    return tuple(re.findall(r"^  ([a-z-]+) ", said, re.M))


@functools.cache
def options_of(module: str) -> frozenset[str]:
    """What a program of ours says that it takes."""
    command = [sys.executable, "-m", module, "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    return frozenset(re.findall(r"--[a-z-]+", said))


def refusal(line: str) -> str:
    """Why a command line would not be accepted; "" if its program's parser takes it."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        given = [option for word in words[2:] if word.startswith("ARGS=") for option in re.findall(r"--[a-z-]+", word)]
        if words[1] not in verbs():
            return f"make has no verb {words[1]}"
        unknown = set(given) - options_of(PROGRAMS[words[1]]) if words[1] in PROGRAMS else set()
        return f"make {words[1]} has no {', '.join(unknown)}" if unknown else ""
    command, rest = resolve(words)
    if isinstance(command, click.Group):
        return f"no command of this name: {line}"
    try:
        command.make_context(" ".join(words), rest).close()
    except click.UsageError as error:
        return error.format_message()
    return ""


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines_parse(page: str, line: str) -> None:
    """Each command in a page's shell blocks is accepted by the parser of its program, up to its running."""
    assert refusal(line) == "", page


@pytest.mark.parametrize(
    "line", ["owner tabel list", "owner table move x --too y", "owner table move x", "make dmeo", 'make demo ARGS="--sec"']
)
def test_a_wrong_command_line_would_be_noticed(line: str) -> None:
    """A misspelt command, option or verb, and an option that is missing."""
    assert refusal(line)


@EVERY_PAGE
def test_commands_in_prose_exist(page: Path) -> None:
    """Text in backquotes that begins like a command is one, with options that it has."""
    wrong = []
    for line in re.findall(r"`((?:owner|processor|make) [a-z][^`\n]*)`", prose(page)):
        words = re.split(r"[\s|]+", re.sub(r"\.\.\.|…", "", line).strip())
        if words[0] == "make":
            wrong += [line] if words[1] not in verbs() else []
            continue
        command, rest = resolve(words)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        named = [re.split("[=.,]", word.strip("[]"))[0] for word in rest if word.strip("[]").startswith("-")]
        wrong += [line] if command is SERVICES[words[0]] or set(named) - known else []
    assert not wrong


def toml_snippets() -> list[tuple[str, str]]:
    return [
        (page.relative_to(ROOT).as_posix(), text)
        for page in PAGES
        for text in re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]


@pytest.mark.parametrize(("page", "text"), toml_snippets())
def test_snippets_of_configuration_are_accepted(page: str, text: str, tmp_path: Path) -> None:
    """Each is read by the loader of the service that its first line names; a plug-in's own pyproject.toml is at least TOML."""
    if text.startswith("[project"):
        assert tomllib.loads(text)
        return
    named = re.match(r"# (owner|processor)\.toml", text)
    assert named, f"{page}: a snippet of configuration begins with the name of its file"
    file = tmp_path / "snippet.toml"
    file.write_text(text)
    try:
        load(KINDS[named[1]], files=[file])
    except ConfigError as error:
        pytest.fail(f"{page}: {error}")
