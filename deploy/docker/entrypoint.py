"""Run the command of the container: `entrypoint.py owner serve ...`. Ends in exec, so that the service is process 1.

First replaces `{hostname}` in TABLEWIRE_*__ADVERTISE variables by the host name of the container. Docker gives each container
a host name (the start of its id) that other containers can resolve, so a service can have any number of containers, and capture
ids start with what `docker ps` shows. Uses only the standard library.
"""

from __future__ import annotations

import os
import re
import socket
import sys


def with_addresses(environment: dict[str, str], hostname: str) -> dict[str, str]:
    def resolved(name: str, value: str) -> str:
        return value.replace("{hostname}", hostname) if re.fullmatch("TABLEWIRE_.*__ADVERTISE", name) else value

    return {name: resolved(name, value) for name, value in environment.items()}


def main() -> int:
    command = sys.argv[1:]
    if not command:
        print("tablewire: no command given, for example: owner serve, processor serve, owner status", file=sys.stderr)
        return 2
    try:
        os.execvpe(command[0], command, with_addresses(dict(os.environ), socket.gethostname()))
    except OSError as error:
        print(f"tablewire: {command[0]}: {error.strerror}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main())
