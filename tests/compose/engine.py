"""A separate Docker engine for the tests, with its folders, socket and pid file below one temporary folder.

It does not change firewall rules and has no default bridge: containers of one network can reach each other and the host, and
builds use the host's network. dockerd starts containerd; if the host already runs one, the engine uses namespaces of its own.
`close` removes containers, networks, mounts and control groups, and reports what it could not remove.

`python -m tests.compose.engine` starts an engine and stops it. Exit code 0 if that works, else 1 with the reason in one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.local.process import Scoped, tail, wait_until
from tests.compose.preflight import search_path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0
KILL_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 120.0
STORAGE_DRIVERS = ("overlay2", "fuse-overlayfs", "vfs")
"""In order of preference."""
_PREFIX = "tablewire-engine-"
_PR_SET_PDEATHSIG = 1


class EngineError(Exception):
    """The engine did not start, or left something behind. The text has the details."""


class CommandError(Exception):
    """A command failed. The text is its output."""


class Engine(Scoped):
    """A Docker engine. Not thread-safe."""

    def __init__(self) -> None:
        sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/var/tmp"))
        self.cgroup = f"{_PREFIX}{os.getpid()}"
        self.bridge = f"tw{os.getpid()}"
        self.log = self.folder / "dockerd.log"
        self.storage_driver = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._plugins_folder_is_ours = not Path("/run/docker").exists()

    @property
    def socket(self) -> str:
        return f"unix://{self.folder}/s"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment for docker and docker-compose: this engine and the classic builder."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("DOCKER_", "COMPOSE_"))}
        return {
            **kept,
            "PATH": search_path(),
            "DOCKER_HOST": self.socket,
            "DOCKER_CONFIG": str(self.folder / "client"),
            "DOCKER_BUILDKIT": "0",
            "COMPOSE_DOCKER_CLI_BUILD": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self) -> None:
        """Start the engine with the first storage driver that works. Raises EngineError with the reason for each driver."""
        (self.folder / "client").mkdir()
        reasons: list[str] = []
        for driver in STORAGE_DRIVERS:
            self._launch(driver)
            try:
                wait_until("dockerd is ready", lambda: not self._running() or self._is_ready(), START_TIMEOUT_S)
            except TimeoutError as error:
                reasons.append(f"{driver}: {error}")
            if self._running() and self._is_ready():
                self.storage_driver = driver
                return
            reasons.append(f"{driver}: {_last_error(tail(self.log))}")
            self._end()
        raise EngineError("no Docker engine can be started here: " + "; ".join(reasons))

    def docker(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S, given: str | None = None) -> str:
        """Run a docker command and return its standard output. Raises CommandError."""
        return run(["docker", *arguments], environment=self.environment, timeout_s=timeout_s, given=given)

    def inspect(self, *names: str) -> list[dict[str, Any]]:
        """Return the output of `docker inspect` for containers or images."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", *names)) if names else []
        return found

    def close(self) -> None:
        """Stop and remove everything. Raises EngineError that names what is left."""
        if self._running():
            self._remove_all()
        self._end()
        _unmount(self.folder)
        _remove_cgroups(self.cgroup)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._plugins_folder_is_ours:
            for folder in ("/run/docker/plugins", "/run/docker"):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        left = self.left_behind()
        if left:
            raise EngineError("the engine left behind: " + "; ".join(left))

    def left_behind(self) -> list[str]:
        """Return the processes, mounts, bridges, control groups and files of this engine that still exist."""
        found = [f"process {pid}: {_command(pid)}" for pid in sorted(_processes(self.folder, self.cgroup))]
        found += [f"mount {mount}" for mount in _mounts(self.folder)]
        found += [f"network interface {self.bridge}"] if Path("/sys/class/net", self.bridge).exists() else []
        found += [f"control group {folder}" for folder in _cgroups(self.cgroup)]
        found += [f"folder {self.folder}"] if self.folder.exists() else []
        return found

    def _launch(self, driver: str) -> None:
        command = [
            "dockerd",
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/x",
            f"--pidfile={self.folder}/pid",
            f"--host={self.socket}",
            f"--storage-driver={driver}",
            f"--cgroup-parent=/{self.cgroup}",
            f"--containerd-namespace={self.cgroup}",
            f"--containerd-plugins-namespace={self.cgroup}-plugins",
            *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
            "--log-level=warn",
        ]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": search_path()},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _is_ready(self) -> bool:
        try:
            self.docker("version", timeout_s=10.0)
        except CommandError:
            return False
        return True

    def _remove_all(self) -> None:
        containers = self.docker("ps", "--all", "--quiet").split()
        if containers:
            self.docker("rm", "--force", "--volumes", *containers)
        networks = self.docker("network", "ls", "--quiet", "--filter", "type=custom").split()
        if networks:
            self.docker("network", "rm", *networks)

    def _end(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _kill_rest(self.folder, self.cgroup)


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    timeout_s: float,
    given: str | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command and return its standard output. Raises CommandError with its output if it fails or times out."""
    try:
        done = subprocess.run(
            command,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=dict(environment),
            cwd=cwd,
        )
    except subprocess.TimeoutExpired:
        raise CommandError(f"{' '.join(command)}: timed out after {timeout_s:g} s") from None
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)} exited with code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def sweep() -> None:
    """Remove what the engines of killed runs left behind. The folder name contains the pid of the run."""
    for folder in Path("/var/tmp").glob(f"{_PREFIX}*-*"):
        pid = folder.name[len(_PREFIX) :].partition("-")[0]
        if not pid.isdigit() or Path("/proc", pid).exists():
            continue
        cgroup = f"{_PREFIX}{pid}"
        with contextlib.suppress(TimeoutError):  # it received SIGTERM when its parent died
            wait_until("the former engine stops", lambda f=folder, c=cgroup: not _processes(f, c), STOP_TIMEOUT_S)  # type: ignore[misc]
        _kill_rest(folder, cgroup)
        _unmount(folder)
        if Path("/sys/class/net", f"tw{pid}").exists():
            subprocess.run(["ip", "link", "delete", f"tw{pid}"], check=False, capture_output=True)
        _remove_cgroups(cgroup)
        shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: Path, cgroup: str) -> set[int]:
    """Return the processes with the engine's folder on their command line, and those in its control groups (the containers)."""
    found = {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and f"{folder}/" in _command(int(pid))}
    for top in _cgroups(cgroup):
        for path in [top / "cgroup.procs", *top.rglob("cgroup.procs")]:
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in path.read_text().split()}
    return found - {os.getpid()}


def _kill_rest(folder: Path, cgroup: str) -> None:
    """Kill the processes that the engine did not stop."""
    for pid in _processes(folder, cgroup):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):  # left_behind() reports them
        wait_until("its processes are gone", lambda: not _processes(folder, cgroup), KILL_TIMEOUT_S)


def _unmount(folder: Path) -> None:
    for mount in sorted(_mounts(folder), key=len, reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)


def _end_with_parent() -> None:
    """Make the kernel send SIGTERM to dockerd when this process dies, so that dockerd stops its containers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _mounts(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{folder}/")]


def _cgroups(name: str) -> list[Path]:
    return [path for path in (*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}")) if path.is_dir()]


def _remove_cgroups(name: str) -> None:
    for top in _cgroups(name):
        for folder in sorted(
            [top, *(path for path in top.rglob("*") if path.is_dir())], key=lambda p: len(p.parts), reverse=True
        ):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _command(pid: int) -> str:
    """Return the command line of a process; empty if it is gone."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "level=fatal" in line or "failed to start" in line or "level=error" in line]
    return (lines or log.splitlines() or ["no output"])[-1][-400:]


def main() -> int:
    try:
        with Engine() as engine:
            print(f"a Docker engine can be started here (storage driver {engine.storage_driver})")
    except (EngineError, CommandError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
