"""The entry point `owner`: the CLI, whose `serve` runs the service (owner.service.serve is its composition root)."""

from __future__ import annotations

from owner.cli.main import PROGRAM, cli


def main() -> None:
    cli(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
