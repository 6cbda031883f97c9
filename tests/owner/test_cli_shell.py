"""The CLI in a shell: completion, pipes, an unwritable stdout, Ctrl-C, and addresses of other servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from deploy.local.process import wait_until
from owner.cli.client import CONNECT_TIMEOUT_S, AdminClient
from tablewire.runtime.grpc import listen, open_channel
from tests.owner.admin_world import AdminView, serving, ticking

WAIT_S = 30.0
OWNER = (sys.executable, "-m", "owner")


@pytest.fixture
def view() -> AdminView:
    view = AdminView()
    view.world.settle()
    return view


@pytest.fixture
def address(view: AdminView) -> Iterator[str]:
    """Return the address of the leader, which a thread ticks."""
    with ExitStack() as stack:
        address = stack.enter_context(serving(view))
        stack.enter_context(ticking(view))
        yield address


@pytest.fixture
def stranger() -> Iterator[str]:
    """Return the address of a gRPC server that is not an owner."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = listen(server, "127.0.0.1", 0, None)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def start(address: str, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "TABLEWIRE_ENDPOINTS": address}
    return subprocess.Popen((*OWNER, *arguments), stdout=stdout, stderr=subprocess.PIPE, env=environ)


def run(address: str, *arguments: str, stdout: int = subprocess.PIPE) -> tuple[int, str, str]:
    process = start(address, *arguments, stdout=stdout)
    said, errors = process.communicate(timeout=WAIT_S)
    return process.returncode, (said or b"").decode(), errors.decode()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("owner chan", "changefeed"),
        ("owner table mo", "move"),
        ("owner table move --dr", "--dry-run"),
        ("owner -o js", "json"),
        ("owner changefeed pause te", "test"),
        ("owner changefeed statistics te", "test"),
        ("owner table move public.t2", "public.t2"),
        ("owner table move public.t2 --to b", "b"),
        ("owner table list --capture c", "c"),
        ("owner capture drain a", "a"),
        ("owner capture drain nosuch", ""),
    ],
)
def test_bash_completes_commands_options_and_names(address: str, tmp_path: Path, line: str, offered: str) -> None:
    """A real bash completes them, set up as the documentation says."""
    program = tmp_path / "owner"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m owner "$@"\n')
    program.chmod(0o755)
    script = f"""
        eval "$(_OWNER_COMPLETE=bash_source owner)"
        COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
        _owner_completion owner "${{COMP_WORDS[COMP_CWORD]}}"
        echo "${{COMPREPLY[*]}}"
    """
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TABLEWIRE_ENDPOINTS": address}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    shown = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert (shown.stdout.split(), shown.stderr) == (offered.split(), "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_there_is_completion_for_other_shells(shell: str) -> None:
    """The program writes the script that they read."""
    environ = {**os.environ, "_OWNER_COMPLETE": f"{shell}_source"}
    script = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'owner'; from owner.__main__ import main; main()"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    ).stdout
    assert f"_OWNER_COMPLETE={shell}_complete" in script


def test_without_an_owner_nothing_is_offered(free_port: int) -> None:
    """There is neither an error nor a wait."""
    environ = {"_OWNER_COMPLETE": "bash_complete", "COMP_WORDS": "owner capture drain x", "COMP_CWORD": "3"}
    process = subprocess.run(
        [sys.executable, "-c", "from owner.__main__ import main; main()"],
        env={**os.environ, **environ, "TABLEWIRE_ENDPOINTS": f"127.0.0.1:{free_port}"},
        capture_output=True,
        timeout=WAIT_S,
        check=False,
    )
    assert (process.stdout.strip(), process.stderr) == (b"", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this platform has no /dev/full")
@pytest.mark.parametrize("arguments", [("table", "list"), ("-o", "json", "table", "list"), ("status",)])
def test_a_full_disk_is_one_line(address: str, arguments: tuple[str, ...]) -> None:
    """Output that cannot be written is a failure without a traceback."""
    with open("/dev/full", "wb") as full:
        assert run(address, *arguments, stdout=full.fileno()) == (
            1,
            "",
            "Error: cannot write to stdout: No space left on device\n",
        )


def test_a_closed_stdout_is_one_line(address: str) -> None:
    """`owner status >&-` prints one line of text on stderr."""
    environ = {**os.environ, "TABLEWIRE_ENDPOINTS": address}
    line = f"exec {sys.executable} -m owner status >&-"
    process = subprocess.run(["sh", "-c", line], env=environ, stderr=subprocess.PIPE, text=True, timeout=WAIT_S, check=False)
    assert (process.returncode, process.stderr) == (1, "Error: stdout is closed\n")


def test_following_ends_with_its_reader(view: AdminView, address: str) -> None:
    """`owner events -f | head -1` ends with head, although no event follows."""
    view.events.add("capture_joined", subject="a")
    process = start(address, "events", "-f")
    assert process.stdout is not None
    assert b"capture_joined" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(WAIT_S) == 0


def test_ctrl_c_ends_the_wait_and_says_what_continues(view: AdminView, address: str) -> None:
    """The exit code is 1, and the drain that was started continues."""
    view.world.paused |= {"b", "c"}
    wait_until("they are silent", lambda: len(view.world.snapshot.silent) == 2, WAIT_S)
    process = start(address, "-o", "json", "capture", "drain", "a", "--wait")
    assert process.stderr is not None
    assert b"is being drained" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert errors.decode().splitlines()[-1] == "Error: interrupted; the drain of a continues; --cancel cancels it"
    assert json.loads(said)["error"]["code"] == "interrupted"
    assert view.drains == ["a"]


def test_a_server_that_is_not_an_owner_is_left_out(address: str, stranger: str) -> None:
    """The address of a processor, or of a proxy without a backend, costs nothing."""
    for endpoints in (f"{stranger},{address}", f"{address},{stranger}"):
        code, said, errors = run(endpoints, "-o", "json", "status")
        assert (code, errors) == (0, "")
        assert json.loads(said)["endpoint"] == address


def test_an_endpoint_that_never_answers_costs_nothing(address: str) -> None:
    """It accepts connections and sends nothing, as a hung process does: the other endpoint is asked at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hung = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        client = AdminClient([hung, address], open_channel)
        client.call("GetStatus", WAIT_S)
        client.close()
        assert client.endpoint == address
        assert time.monotonic() - began < CONNECT_TIMEOUT_S / 2
        code, said, errors = run(hung, "status", "--timeout-s", "1")
        assert (code, said) == (1, "")
        assert f"no owner answers; tried {hung} (" in errors


def test_a_stranger_alone_is_named(stranger: str) -> None:
    """It is not asked again endlessly."""
    code, said, errors = run(stranger, "status")
    assert (code, said) == (1, "")
    assert f"{stranger} does not know this call" in errors
