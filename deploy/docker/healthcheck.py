"""Asks the service of this container whether it is ready: `healthcheck.py [/readyz|/healthz]`. Exit code 0: yes; 1: it says why.

The port is TABLEWIRE_HTTP__PORT, or else whichever of the two defaults answers (an owner's, a processor's). For HEALTHCHECK and
for probes, so that the image needs no curl. Standard library alone.
"""

from __future__ import annotations

import http.client
import os
import sys

PORTS = (7441, 7451)
TIMEOUT_S = 2.0


def ask(port: int, path: str) -> tuple[int, str]:
    """Status and text. OSError when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(1_000).decode("utf-8", "replace").strip()
    finally:
        connection.close()


def main() -> int:
    path = sys.argv[1] if len(sys.argv) > 1 else "/readyz"
    named = os.environ.get("TABLEWIRE_HTTP__PORT", "")
    trouble = ""
    for port in (int(named),) if named.isdigit() else PORTS:
        try:
            status, text = ask(port, path)
        except (OSError, http.client.HTTPException) as error:
            trouble += f"port {port}: {error}; "
            continue
        print(text)
        return 0 if status == http.HTTPStatus.OK else 1
    print(f"{path}: {trouble.rstrip('; ')}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
