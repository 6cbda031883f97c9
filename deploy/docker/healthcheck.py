"""Check the service of this container: `healthcheck.py [/readyz|/healthz]`. Prints the response; exit code 0 means OK, else 1.

The port is TABLEWIRE_HTTP__PORT, or else the default port of an owner or a processor, whichever responds. For HEALTHCHECK and
probes, so that the image needs no curl. Uses only the standard library.
"""

from __future__ import annotations

import http.client
import os
import sys

PORTS = (7441, 7451)
TIMEOUT_S = 2.0


def get(port: int, path: str) -> tuple[int, str]:
    """Return status and text. Raises OSError if there is no response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(1_000).decode("utf-8", "replace").strip()
    finally:
        connection.close()


def main() -> int:
    path = sys.argv[1] if len(sys.argv) > 1 else "/readyz"
    configured = os.environ.get("TABLEWIRE_HTTP__PORT", "")
    errors = []
    for port in (int(configured),) if configured.isdigit() else PORTS:
        try:
            status, text = get(port, path)
        except (OSError, http.client.HTTPException) as error:
            errors.append(f"port {port}: {error}")
            continue
        print(text)
        return 0 if status == http.HTTPStatus.OK else 1
    print(f"{path}: {'; '.join(errors)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
