"""A few seeds of the simulation, and the guarantee that a seed determines everything."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from tablewire.model.messages import Message
from tests.sim.simulation import Simulation, quietly

SEEDS = range(1, 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_seed(seed: int) -> None:
    """No invariant is violated under one seed; `make sim` runs more seeds."""
    with quietly():
        assert Simulation(seed).run().violations == []


def digest(seed: int) -> str:
    """Return a digest of all messages, except for the random names of agents."""
    sim = Simulation(seed)
    said = hashlib.sha256()
    former = sim.network.on_send

    def listen(message: Message) -> None:
        former(message)
        said.update(f"{sim.ticks} {message.sender} {message.receiver} {message.number} {message.echo} {message.body}\n".encode())

    sim.network.on_send = listen
    with quietly():
        sim.run(storms=2)
    return said.hexdigest()


def test_a_seed_replays() -> None:
    """Another process, with other orders of sets and dictionaries of strings, sends the same
    messages."""
    program = "from tests.sim.test_simulation import digest; print(digest(5))"
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
