"""A plug-in of forty lines, installed from its folder, replicates with both services unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local.cluster import Cluster
from tests.plugins.counter_world import PLUGIN, WAIT_S, environment_of, install_plugin

pytestmark = pytest.mark.integration

MINIMAL = PLUGIN.parent / "minimal"


def test_a_plugin_of_forty_lines_replicates(tmp_path: Path) -> None:
    """It is found by the scheme of the source URI; its tables are spread, moved and removed like
    any others.
    """
    assert len((MINIMAL / "tablewire_minimal.py").read_text().splitlines()) <= 42
    plugin = install_plugin(tmp_path, MINIMAL)
    sink = tmp_path / "sink"
    sink.mkdir()
    with Cluster(
        tmp_path / "cluster", etcd=1, owners=1, processors=2, links=False, environment=environment_of(plugin)
    ) as cluster:
        arguments = ("--source", "minimal://here?tables=4", "--sink", f"file://{sink}", "--tables", "*")
        cluster.owner_json("changefeed", "create", "--id", "one", *arguments)
        cluster.wait_replicating("one", tables=4, timeout_s=WAIT_S)
        cluster.wait(
            "each table is at the sink", lambda: sorted(path.name for path in sink.iterdir()) == ["1", "2", "3", "4"], WAIT_S
        )
        reached = cluster.admin.changefeed("one")["checkpoint_ts"]
        cluster.wait_checkpoint(reached + 500, "one", WAIT_S)
        primary = {row["table_id"]: row["primary"] for row in cluster.admin.tables("one")}
        assert set(primary.values()) == set(cluster.captures().values())
        other = next(capture for capture in cluster.captures().values() if capture != primary[1])
        cluster.owner_json("table", "move", "public.t1", "--to", other, "--wait")
        assert cluster.admin.tables("one")[0]["primary"] == other
        cluster.owner_json("changefeed", "remove", "one")
        cluster.wait("it is forgotten", lambda: not cluster.admin.changefeeds(), WAIT_S)
