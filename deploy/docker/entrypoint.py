"""Becomes the command of the container: `entrypoint.py owner serve ...`. Ends in exec, so that the service is process 1.

Before that, `{hostname}` in a TABLEWIRE_*__ADVERTISE variable becomes the container's host name. Docker gives every container
one of its own (the beginning of its id), which the others resolve: so any number of owners and processors find each other from
one service definition, and capture ids begin with what `docker ps` shows. Standard library alone, without site packages.
"""

from __future__ import annotations

import os
import socket
import sys

PLACEHOLDER = "{hostname}"
PREFIX, SUFFIX = "TABLEWIRE_", "__ADVERTISE"


def with_addresses(environment: dict[str, str], hostname: str) -> dict[str, str]:
    """The variables with every placeholder replaced; all others as they are."""
    return {
        name: value.replace(PLACEHOLDER, hostname) if name.startswith(PREFIX) and name.endswith(SUFFIX) else value
        for name, value in environment.items()
    }


def main() -> int:
    command = sys.argv[1:]
    if not command:
        print("tablewire: no command: owner serve, processor serve, owner status ...", file=sys.stderr)
        return 2
    try:
        os.execvpe(command[0], command, with_addresses(dict(os.environ), socket.gethostname()))
    except OSError as error:
        print(f"tablewire: {command[0]}: {error.strerror}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main())
