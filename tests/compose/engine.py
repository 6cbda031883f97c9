"""A Docker engine of our own: its folders, socket and pid file below one temporary folder, ended by its pid, and nothing left.

It touches no rule of the machine's firewall and has no default bridge: containers of one network reach each other and this
machine, builds use the machine's network. containerd is started by dockerd; where one runs on the machine already, ours keeps to
namespaces of its own. `close` removes containers, networks, mounts and control groups, and says what it could not remove.

`python -m tests.compose.engine` starts one and ends it: exit code 0 where that works, else 1 and one line that says why not.
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
"""The first that works here is taken."""
_PREFIX = "tablewire-engine-"
_PR_SET_PDEATHSIG = 1


class EngineError(Exception):
    """The engine did not start, or left something behind; the text says what."""


class CommandError(Exception):
    """A command ended with another exit code than 0; the text is what it said."""


class Engine(Scoped):
    """Start it, use `docker` and `environment`, close it. One thread."""

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
        """For docker and docker-compose: this engine, and the builder that every version has."""
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
        """EngineError with the reason of each storage driver when none works."""
        (self.folder / "client").mkdir()
        reasons: list[str] = []
        for driver in STORAGE_DRIVERS:
            self._launch(driver)
            try:
                wait_until("dockerd answers", lambda: not self._running() or self._answers(), START_TIMEOUT_S)
            except TimeoutError as error:
                reasons.append(f"{driver}: {error}")
            if self._running() and self._answers():
                self.storage_driver = driver
                return
            reasons.append(f"{driver}: {_last_error(tail(self.log))}")
            self._end()
        raise EngineError("no Docker engine can be started here: " + "; ".join(reasons))

    def docker(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S, given: str | None = None) -> str:
        """The standard output of a docker command; CommandError when it fails."""
        return run(["docker", *arguments], environment=self.environment, timeout_s=timeout_s, given=given)

    def inspect(self, *names: str) -> list[dict[str, Any]]:
        """What `docker inspect` tells about containers or images; an empty list for no names."""
        found: list[dict[str, Any]] = json.loads(self.docker("inspect", *names)) if names else []
        return found

    def close(self) -> None:
        """Ends everything. EngineError names what is left."""
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
        """Processes, mounts, bridges, control groups and files of this engine that are still there."""
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

    def _answers(self) -> bool:
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
    """The standard output of a command; CommandError with what it said when it fails or takes too long."""
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
        raise CommandError(f"{' '.join(command)}: not within {timeout_s:g} s") from None
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def sweep() -> None:
    """Remove what engines of runs that were killed left behind: the folder's name holds the pid."""
    for folder in Path("/var/tmp").glob(f"{_PREFIX}*-*"):
        pid = folder.name[len(_PREFIX) :].partition("-")[0]
        if not pid.isdigit() or Path("/proc", pid).exists():
            continue
        cgroup = f"{_PREFIX}{pid}"
        with contextlib.suppress(TimeoutError):  # it was told to end when its parent died
            wait_until("the former engine ends", lambda f=folder, c=cgroup: not _processes(f, c), STOP_TIMEOUT_S)  # type: ignore[misc]
        _kill_rest(folder, cgroup)
        _unmount(folder)
        if Path("/sys/class/net", f"tw{pid}").exists():
            subprocess.run(["ip", "link", "delete", f"tw{pid}"], check=False, capture_output=True)
        _remove_cgroups(cgroup)
        shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: Path, cgroup: str) -> set[int]:
    """Those that name the engine's folder on their command line, and those in its control groups: its containers."""
    found = {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and f"{folder}/" in _command(int(pid))}
    for top in _cgroups(cgroup):
        for path in [top / "cgroup.procs", *top.rglob("cgroup.procs")]:
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in path.read_text().split()}
    return found - {os.getpid()}


def _kill_rest(folder: Path, cgroup: str) -> None:
    """What the engine did not end itself."""
    for pid in _processes(folder, cgroup):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):  # whoever asks what is left behind will say so
        wait_until("its processes are gone", lambda: not _processes(folder, cgroup), KILL_TIMEOUT_S)


def _unmount(folder: Path) -> None:
    for mount in sorted(_mounts(folder), key=len, reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)


def _end_with_parent() -> None:
    """dockerd gets SIGTERM when this process dies, whatever it dies of, and ends its containers."""
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
    """The command line of a process; empty when it is gone."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def _last_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "level=fatal" in line or "failed to start" in line or "level=error" in line]
    return (lines or log.splitlines() or ["it said nothing"])[-1][-400:]


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
