"""A cluster that replicates with the counting plug-in, and an audit of what its executors wrote.

The audit reads the files of the sink: every write contains its epochs, its capture, where it
started and where it ended.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local.admin import Json
from deploy.local.cluster import Cluster
from deploy.local.node import ROOT
from deploy.local.process import wait_until

NewWorld = Callable[..., "CounterWorld"]
"""Starts a cluster with the given options of `CounterWorld`."""
PLUGIN = ROOT / "tests" / "plugins" / "counter"
WAIT_S = 30.0
LOG_TAIL_CHARACTERS = 6_000


def install_plugin(target: Path, plugin: Path = PLUGIN) -> Path:
    """Install the plug-in as a user would, into a folder of its own; return that folder."""
    copy = target / "source"  # a build leaves files behind, which must not be in the work tree
    shutil.copytree(plugin, copy)
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target / "installed"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return target / "installed"


def environment_of(plugin: Path) -> dict[str, str]:
    """Return the environment in which a service finds the installed plug-in."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(plugin)])}


@dataclass(frozen=True, slots=True)
class Write:
    """One line of a log. at_ms: the wall clock right before the write."""

    changefeed_epoch: int
    epoch: int
    capture: str
    start: int
    end: int
    at_ms: int

    @property
    def fence(self) -> tuple[int, int]:
        return self.changefeed_epoch, self.epoch


class CounterWorld:
    """Folders of a source and a sink, and the cluster that replicates between them."""

    def __init__(self, folder: Path, plugin: Path, **options: Any) -> None:
        self.folder = folder
        self.source, self.sink = folder / "source", folder / "sink"
        self.source.mkdir(parents=True)
        self.sink.mkdir()
        options = {"etcd": 1, "owners": 1, "processors": 1, "links": False, **options}
        self.cluster = Cluster(folder / "cluster", environment=environment_of(plugin), **options)

    def set_tables(self, *names: str) -> None:
        """Set the tables of the source; the id of a table is its position, from 1."""
        beside = self.source / "tables.new"
        beside.write_text("\n".join(names))
        beside.rename(self.source / "tables")

    def create(self, name: str = "one", tables: Iterable[str] = ("public.*",), sink: Path | None = None, *more: str) -> Json:
        pattern = [part for table in tables for part in ("--tables", table)]
        uris = ("--source", f"counter://{self.source}", "--sink", f"file://{sink or self.sink}")
        return self.cluster.owner_json("changefeed", "create", "--id", name, *uris, *pattern, *more)

    def replicate(self, *table_ids: int) -> None:
        """Create these tables, 1 to the last, and a changefeed `one`; return when it writes each of
        them.
        """
        self.set_tables(*(f"public.t{table_id}" for table_id in table_ids))
        self.create()
        self.wait_steady(len(table_ids))
        self.wait_written(*table_ids)

    def writes(self, table_id: int | str, sink: Path | None = None) -> list[Write]:
        """Return the lines of a log. table_id: followed by "-<start key>" for a part of a table."""
        path = (sink or self.sink) / f"{table_id}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            changefeed_epoch, epoch, capture, *numbers = line.split()
            found.append(Write(int(changefeed_epoch), int(epoch), capture, *map(int, numbers)))
        return found

    def audit(self, *table_ids: int | str, recreated: bool = False) -> None:
        """Check that there is no gap, no overlap, no write under an older epoch, and one writer for
        each epoch.

        recreated: the changefeed was removed and created again meanwhile, which allows a gap
        between its two lives.
        """
        for table_id in table_ids:
            writes = self.writes(table_id)
            assert writes, f"table {table_id} was never written"
            owners: dict[tuple[int, int], str] = {}
            for before, after in itertools.pairwise(writes):
                assert after.fence >= before.fence, f"table {table_id}: an older epoch writes after a newer one: {before} {after}"
                if recreated and after.changefeed_epoch > before.changefeed_epoch:
                    assert after.start >= before.end
                    continue
                assert after.start == before.end, f"table {table_id}: a gap or an overlap: {before} {after}"
            for write in writes:
                assert owners.setdefault(write.fence, write.capture) == write.capture, f"two writers in one epoch: {write}"

    def longest_gap_ms(self, table_id: int | str) -> int:
        """Return the longest time between two writes of a table."""
        at = [write.at_ms for write in self.writes(table_id)]
        return max(after - before for before, after in itertools.pairwise(at))

    def primaries(self, changefeed: str = "one") -> dict[int, str]:
        return {row["table_id"]: row["primary"] for row in self.cluster.admin.tables(changefeed)}

    def capture_of(self, node: str) -> str:
        return self.cluster.captures()[node]

    def wait_steady(self, tables: int, changefeed: str = "one", timeout_s: float = WAIT_S) -> None:
        self.cluster.wait_replicating(changefeed, tables=tables, timeout_s=timeout_s)

    def wait_written(self, *table_ids: int | str, after_ms: int | None = None, timeout_s: float = WAIT_S) -> None:
        """Wait until each of these tables has been written after the given wall time (default: now)."""
        since = now_ms() if after_ms is None else after_ms

        def written() -> bool:
            return all((writes := self.writes(table_id)) and writes[-1].at_ms > since for table_id in table_ids)

        wait_until(f"tables {table_ids} are written", written, timeout_s)

    def close(self) -> None:
        """Stop the cluster. Print the end of each log, which pytest shows if the test has failed."""
        for name in self.cluster.nodes:
            print(f"--- {name}\n{self.log(name)[-LOG_TAIL_CHARACTERS:]}")
        self.cluster.close()

    def log(self, node: str) -> str:
        path = self.cluster.node(node).log
        return path.read_text() if path.exists() else ""


def now_ms() -> int:
    return int(time.time() * 1000)
