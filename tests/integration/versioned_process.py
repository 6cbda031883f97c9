"""An owner or a processor of another release, as far as the wire goes: `... owner|processor LOWEST HIGHEST CONFIG`."""

from __future__ import annotations

import os
import sys

from owner.owner_config import OwnerConfig
from owner.service import serve
from processor.__main__ import run
from processor.processor_config import ProcessorConfig
from tablewire.runtime import config as configuration
from tablewire.wire.versions import ProtocolVersions


def main() -> None:
    kind, lowest, highest, file = sys.argv[1:]
    protocols = ProtocolVersions(int(lowest), int(highest))
    if kind == "owner":
        serve(configuration.load(OwnerConfig, files=(file,), environ=os.environ, flags={}), protocols)
    else:
        sys.exit(run(configuration.load(ProcessorConfig, files=(file,), environ=os.environ, flags={}), protocols))


if __name__ == "__main__":
    main()
