"""The systemd units: systemd's own check of them, and what they promise, compared with the services' defaults."""

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
"""Tenths, as `systemd-analyze security --threshold` counts; 100 is a service without any protection."""
SERVICES: dict[str, click.Command] = {"owner": owner_cli, "processor": processor_cli}

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here: install systemd")


def settings(unit: Path) -> dict[str, list[str]]:
    """Every setting of a unit with its values, in order; a line that is none is an error."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if not line or line.startswith("#") or re.fullmatch(r"\[(Unit|Service|Install)\]", line):
            continue
        name, equals, value = line.partition("=")
        assert equals, f"{unit.name}: {line!r} is no setting"
        found.setdefault(name, []).append(value)
    return found


def installed_here(unit: Path, folder: Path) -> Path:
    """The unit with the programs of this environment, and a user that this machine has; the rest as it is."""
    text = unit.read_text().replace("/opt/tablewire/bin/", f"{Path(sys.executable).parent}/")
    text = re.sub(r"^(User|Group)=tablewire$", r"\1=daemon", text, flags=re.M)
    target = folder / unit.name
    target.write_text(text)
    return target


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_there_is_a_unit_for_each_service() -> None:
    """One for the owner and one for the processor."""
    assert [unit.name for unit in UNITS] == ["tablewire-owner.service", "tablewire-processor.service"]


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    """`systemd-analyze verify` knows every setting and finds every program, and says nothing at all."""
    done = analyze("verify", "--man=no", str(installed_here(unit, tmp_path)))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_systemd_would_notice_a_wrong_setting(tmp_path: Path) -> None:
    """The same check complains about a misspelt key."""
    unit = installed_here(UNITS[0], tmp_path)
    unit.write_text(unit.read_text().replace("ProtectSystem=", "ProtectSytem="))
    assert "ProtectSytem" in analyze("verify", "--man=no", str(unit)).stderr


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_is_locked_down(unit: Path, tmp_path: Path) -> None:
    """Its exposure, as systemd counts it, is low."""
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX}", str(installed_here(unit, tmp_path)))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_unit_runs_a_command_that_exists(unit: Path) -> None:
    """ExecStart is `owner serve` or `processor serve` with an option that it has, as a user without rights."""
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


def test_systemd_waits_longer_than_a_processor_needs_to_leave() -> None:
    """TimeoutStopSec is above the time that a drain and the closing of executors may take."""
    (stop_s,) = settings(FOLDER / "tablewire-processor.service")["TimeoutStopSec"]
    config = ProcessorConfig()
    assert int(stop_s) > (config.stop.drain_timeout_ms + config.stop.close_timeout_ms) / 1000
    (stop_s,) = settings(FOLDER / "tablewire-owner.service")["TimeoutStopSec"]
    assert int(stop_s) > STOP_TIMEOUT_S


def test_a_start_that_waits_for_etcd_is_tried_for_ever() -> None:
    """Starts that last as long as the wait for etcd do not reach the limit of starts; those that fail at once do."""
    for unit in UNITS:
        found = settings(unit)
        interval_s, burst, pause_s = (int(found[name][0]) for name in ("StartLimitIntervalSec", "StartLimitBurst", "RestartSec"))
        start_s = ProcessorConfig().etcd.start_timeout_ms / 1000
        assert interval_s / (start_s + pause_s) < burst - 1
        assert burst * (pause_s + 2) < interval_s
