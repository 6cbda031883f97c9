"""The `owner` program: its commands, assembled."""

from __future__ import annotations

from typing import Any

import click

from owner.cli.changefeed import changefeed_group
from owner.cli.cluster import capture_group, resign, status, version
from owner.cli.events import events
from owner.cli.options import shared_options
from owner.cli.serve import config_group, serve
from owner.cli.table import rebalance, table_group
from owner.cli.top import top

PROGRAM = "owner"


@click.group(
    PROGRAM,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done; 1 refused or failed, with the reason on stderr; 2 wrong usage.",
)
@shared_options
def cli(**_options: Any) -> None:
    """Run a Tablewire owner, or send a command to one.

    Any owner can be asked: an owner that does not lead forwards the call to the leader.
    """


for command in (
    *(serve, status, capture_group, changefeed_group, table_group, rebalance),
    *(top, events, resign, config_group, version),
):
    cli.add_command(command)
