"""What the local etcd members and PostgreSQL servers have in common: one process, one folder, one address."""

from __future__ import annotations

from pathlib import Path

from deploy.local.process import ManagedProcess, Scoped


class Server(Scoped):
    """A server with a folder and a log of its own below `folder`. Subclasses start and stop its process."""

    def __init__(self, folder: Path, name: str, host: str, log: str) -> None:
        self.name = name
        self.host = host
        self._folder = folder.resolve() / name
        self.log = self._folder / log
        self._port = 0
        self._process: ManagedProcess | None = None

    @property
    def endpoint(self) -> str:
        """host:port that clients dial."""
        return f"{self.host}:{self._port}"

    @property
    def process(self) -> ManagedProcess:
        """Raises RuntimeError before the first start."""
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
