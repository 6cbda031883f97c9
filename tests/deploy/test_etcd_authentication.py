"""The commands of docs/security.md that protect etcd with users work on a real etcd."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.etcd import EtcdServer, etcd_binary

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "s3cret"
TIMEOUT_S = 30


def commands() -> list[list[str]]:
    """Return the etcdctl commands of the page, in order."""
    (block,) = re.findall(r"^```sh\n((?:etcdctl .*\n)+)```$", (ROOT / "docs/security.md").read_text(), re.M)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def test_the_commands_let_tablewire_write_below_its_prefix_only(new_etcd: Callable[..., EtcdServer]) -> None:
    """After them etcd rejects calls without a user, and the user `tablewire` can only read and write its own keys."""
    etcd = new_etcd()

    def etcdctl(*arguments: str, user: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(etcd_binary()).with_name("etcdctl"), *arguments],
            env={**os.environ, "ETCDCTL_ENDPOINTS": etcd.endpoint, **({"ETCDCTL_USER": f"{user}:{PASSWORD}"} if user else {})},
            input=f"{PASSWORD}\n",
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    for command in commands():
        asks_for_password = command[:2] == ["user", "add"]
        done = etcdctl(*command, *(["--interactive=false"] if asks_for_password else []))
        assert done.returncode == 0, (command, done.stderr)
    assert "user name is empty" in etcdctl("put", "/tablewire/prod/key", "1").stderr
    assert etcdctl("put", "/tablewire/prod/key", "1", user="tablewire").returncode == 0
    assert etcdctl("get", "/tablewire/prod/key", "--print-value-only", user="tablewire").stdout == "1\n"
    for words in (["put", "/tablewire/other/key", "1"], ["get", "/", "--prefix"], ["role", "list"]):
        assert "permission denied" in etcdctl(*words, user="tablewire").stderr, words
    assert etcdctl("role", "list", user="root").returncode == 0
