"""The systemd units, checked by systemd and against the defaults of the services."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from owner.cli.main import cli as owner_cli
from owner.service import STOP_TIMEOUT_S
from processor.__main__ import cli as processor_cli
from processor.processor_config import ProcessorConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/systemd"
UNITS = sorted(FOLDER.glob("*.service"))
TIMEOUT_S = 60
EXPOSURE_MAX = 20
"""In tenths, as for `systemd-analyze security --threshold`; 100 is a service without any protection."""
SERVICES: dict[str, click.Command] = {"owner": owner_cli, "processor": processor_cli}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze not found: install systemd")


def settings(unit: Path) -> dict[str, list[str]]:
    """Return every setting of a unit with its values, in order. Fails on a malformed line."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if not line or line.startswith("#") or re.fullmatch(r"\[(Unit|Service|Install)\]", line):
            continue
        name, equals, value = line.partition("=")
        assert equals, f"{unit.name}: {line!r} is not a setting"
        found.setdefault(name, []).append(value)
    return found


def adapted(unit: Path, folder: Path) -> Path:
    """Return a copy of the unit with the programs of this environment and an existing user."""
    text = unit.read_text().replace("/opt/tablewire/bin/", f"{Path(sys.executable).parent}/")
    text = re.sub(r"^(User|Group)=tablewire$", r"\1=daemon", text, flags=re.M)
    target = folder / unit.name
    target.write_text(text)
    return target


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_there_is_a_unit_for_each_service() -> None:
    """There is one for the owner and one for the processor."""
    assert [unit.name for unit in UNITS] == ["tablewire-owner.service", "tablewire-processor.service"]


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    """`systemd-analyze verify` accepts every setting, finds every program, and prints nothing."""
    done = analyze("verify", "--man=no", str(adapted(unit, tmp_path)))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_systemd_would_notice_a_wrong_setting(tmp_path: Path) -> None:
    """`systemd-analyze verify` reports a misspelt key."""
    unit = adapted(UNITS[0], tmp_path)
    unit.write_text(unit.read_text().replace("ProtectSystem=", "ProtectSytem="))
    assert "ProtectSytem" in analyze("verify", "--man=no", str(unit)).stderr


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_is_locked_down(unit: Path, tmp_path: Path) -> None:
    """`systemd-analyze security` rates its exposure below the limit."""
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX}", str(adapted(unit, tmp_path)))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_runs_a_command_that_exists(unit: Path) -> None:
    """ExecStart is `owner serve` or `processor serve` with valid options, and the user has no privileges."""
    found = settings(unit)
    for line in [*found["ExecStart"], *found.get("ExecStartPre", [])]:
        program, *words = line.split()
        command = SERVICES[Path(program).name]
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_parser(click.Context(command)).parse_args(words)
    assert found["User"] == ["tablewire"]
    assert found["Restart"] == ["on-failure"]
    assert found["CapabilityBoundingSet"] == [""]


def test_systemd_waits_longer_than_a_service_needs_to_stop() -> None:
    """TimeoutStopSec is longer than a drain and the closing of executors may take."""
    (stop_s,) = settings(FOLDER / "tablewire-processor.service")["TimeoutStopSec"]
    config = ProcessorConfig()
    assert int(stop_s) > (config.stop.drain_timeout_ms + config.stop.close_timeout_ms) / 1000
    (stop_s,) = settings(FOLDER / "tablewire-owner.service")["TimeoutStopSec"]
    assert int(stop_s) > STOP_TIMEOUT_S


def test_a_start_that_waits_for_etcd_is_retried_without_limit() -> None:
    """Starts that fail after the wait for etcd never reach the start limit; those that fail at once do."""
    for unit in UNITS:
        found = settings(unit)
        interval_s, burst, pause_s = (int(found[name][0]) for name in ("StartLimitIntervalSec", "StartLimitBurst", "RestartSec"))
        start_s = ProcessorConfig().etcd.start_timeout_ms / 1000
        assert interval_s / (start_s + pause_s) < burst - 1
        assert burst * (pause_s + 2) < interval_s
