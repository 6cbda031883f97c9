"""A real Prometheus on the loopback with the rules of this folder: for tests, and for the plots of docs/.

    with Prometheus(folder, targets={"tablewire-owner": ["127.0.0.1:7441"], ...}) as prometheus:
        prometheus.wait_scraped()
        prometheus.query("sum(tablewire_owner_is_leader)")

It has a data folder, a port and a process of its own, ended by its pid. Without `targets` it runs prometheus.yml as it is
shipped; with them the same file with DNS replaced by these addresses, and shorter intervals.
"""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.local.net import BindLostError, free_port, retry_bind
from deploy.local.process import ManagedProcess, Scoped, StartError, tail, wait_until

SHIPPED = Path(__file__).with_name("prometheus")
RULES = SHIPPED / "rules.yml"
SCRAPE_INTERVAL = "1s"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
SCRAPE_TIMEOUT_S = 30.0
_HTTP_TIMEOUT_S = 10.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class QueryError(Exception):
    """Prometheus refused an expression; the text names both."""


def missing_program() -> str:
    """ "" when promtool and prometheus are on this machine, else what is not and how to get it."""
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} on this machine: apt install prometheus" if missing else ""


class Prometheus(Scoped):
    """start, query, close. One thread."""

    def __init__(self, folder: Path, *, targets: Mapping[str, Sequence[str]] | None = None) -> None:
        """targets: host:port of what to scrape by job; None: what the shipped configuration says."""
        self._folder = folder / "prometheus"
        self._targets = targets
        self.address = ""
        self._process: ManagedProcess | None = None

    def start(self) -> None:
        """StartError when it does not answer as ready."""
        if problem := missing_program():
            raise StartError(problem)
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(RULES, self._folder)
        text = (SHIPPED / "prometheus.yml").read_text(encoding="utf-8")
        (self._folder / "prometheus.yml").write_text(
            text if self._targets is None else with_targets(text, self._targets), encoding="utf-8"
        )
        retry_bind(self._launch)

    def close(self) -> None:
        """Ends it and waits. Idempotent."""
        if self._process is not None and self._process.running:
            self._process.terminate(STOP_TIMEOUT_S)

    # -- what it says -------------------------------------------------------------------------------------------------

    def api(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of /api/v1/. QueryError when it is refused."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with _NO_PROXY.open(url, timeout=_HTTP_TIMEOUT_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(f"{path} {parameters}: {error.read().decode('utf-8', 'replace')}") from None

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an expression now: [{"metric": labels, "value": [time, text]}]."""
        data = self.api("query", query=expr)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        series: list[dict[str, Any]] = data["result"]
        return series

    def query_range(self, expr: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """The series of an expression between two times: [{"metric": labels, "values": [[time, text], ...]}]."""
        data = self.api("query_range", query=expr, start=f"{start:.3f}", end=f"{end:.3f}", step=f"{step_s:g}")
        series: list[dict[str, Any]] = data["result"]
        return series

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its type, name, query, duration, labels and annotations."""
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]

    def down(self) -> list[str]:
        """The targets that are not scraped (yet), with the reason."""
        active = self.api("targets", state="active")["activeTargets"]
        return [f"{target['scrapeUrl']}: {target['lastError'] or 'not yet'}" for target in active if target["health"] != "up"]

    def wait_scraped(self) -> None:
        """Until every target is up. TimeoutError."""
        wait_until("every target is scraped", lambda: not self.down(), SCRAPE_TIMEOUT_S)

    def _launch(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        log = self._folder / "prometheus.log"
        log.unlink(missing_ok=True)
        command = [
            str(shutil.which("prometheus")),
            f"--config.file={self._folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self.address}",
            "--storage.tsdb.retention.time=1d",
            "--log.level=warn",
        ]
        self._process = process = ManagedProcess("prometheus", command, log=log, cwd=self._folder)
        process.start()
        try:
            wait_until("Prometheus is ready", lambda: not process.running or self._ready(), START_TIMEOUT_S)
        except TimeoutError as error:
            process.kill()
            raise StartError(f"{error}\n{tail(log)}") from None
        if not process.running:
            text = tail(log)
            if "address already in use" in text:
                raise BindLostError(f"prometheus: {self.address} is taken")
            raise StartError(f"prometheus ended with {process.exit_code}\n{text}")

    def _ready(self) -> bool:
        try:
            with _NO_PROXY.open(f"http://{self.address}/-/ready", timeout=_HTTP_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def with_targets(text: str, targets: Mapping[str, Sequence[str]]) -> str:
    """A configuration with the addresses of each job in place of its DNS names, scraped every SCRAPE_INTERVAL, without the
    last job, which is Prometheus itself.

    LookupError when a job is not in the file: names of jobs are what the rules go by."""
    text = re.sub(r"(scrape_interval|scrape_timeout|evaluation_interval): \S+", rf"\1: {SCRAPE_INTERVAL}", text)
    for job, addresses in targets.items():
        pattern = rf"(  - job_name: {re.escape(job)}\n)    dns_sd_configs:\n(?:      .*\n)+"
        found = f"\\g<1>    static_configs:\n      - targets: {json.dumps(list(addresses))}\n"
        text, count = re.subn(pattern, found, text)
        if count != 1:
            raise LookupError(f"prometheus.yml has no job {job} that finds its targets by DNS")
    return text[: text.index("  - job_name: prometheus\n")]
