"""A real Prometheus on the loopback interface with the shipped rules, for tests and for the figures of the docs.

with Prometheus(folder, targets={"tablewire-owner": ["127.0.0.1:7441"], ...}) as prometheus:
    prometheus.wait_scraped()
    prometheus.query("sum(tablewire_owner_is_leader)")
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
    """Prometheus rejected an expression. The text contains the expression and the reason."""


def missing_programs() -> str:
    """Return which of prometheus and promtool are not installed and how to install them; "" if both are."""
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: apt install prometheus" if missing else ""


class Prometheus(Scoped):
    """A Prometheus process with its own data folder and port. Not thread-safe."""

    def __init__(self, folder: Path, *, targets: Mapping[str, Sequence[str]] | None = None) -> None:
        """targets: job name -> host:port to scrape. None runs the shipped configuration unchanged."""
        self._folder = folder / "prometheus"
        self._targets = targets
        self.address = ""
        self._process: ManagedProcess | None = None

    def start(self) -> None:
        """Return when Prometheus is ready. Raises StartError."""
        if problem := missing_programs():
            raise StartError(problem)
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(RULES, self._folder)
        config = (SHIPPED / "prometheus.yml").read_text(encoding="utf-8")
        if self._targets is not None:
            config = with_targets(config, self._targets)
        (self._folder / "prometheus.yml").write_text(config, encoding="utf-8")
        retry_bind(self._launch)

    def close(self) -> None:
        if self._process is not None and self._process.running:
            self._process.terminate(STOP_TIMEOUT_S)

    def api(self, path: str, **parameters: str) -> Any:
        """Return the `data` of a response of /api/v1/. Raises QueryError if Prometheus rejects the request."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with _NO_PROXY.open(url, timeout=_HTTP_TIMEOUT_S) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(f"{path} {parameters}: {error.read().decode('utf-8', 'replace')}") from None

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Evaluate an expression now; return [{"metric": labels, "value": [time, text]}]."""
        data = self.api("query", query=expr)
        return [{"metric": {}, "value": data["result"]}] if data["resultType"] == "scalar" else list(data["result"])

    def query_range(self, expr: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """Evaluate an expression between two times; return [{"metric": labels, "values": [[time, text], ...]}]."""
        data = self.api("query_range", query=expr, start=f"{start:.3f}", end=f"{end:.3f}", step=f"{step_s:g}")
        return list(data["result"])

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules with type, name, query, duration, labels and annotations."""
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]

    def wait_scraped(self) -> None:
        """Wait until every target has been scraped. Raises TimeoutError."""

        def all_up() -> bool:
            return all(target["health"] == "up" for target in self.api("targets", state="active")["activeTargets"])

        wait_until("every target is scraped", all_up, SCRAPE_TIMEOUT_S)

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
                raise BindLostError(f"prometheus: {self.address} is in use")
            raise StartError(f"prometheus exited with code {process.exit_code}\n{text}")

    def _ready(self) -> bool:
        try:
            with _NO_PROXY.open(f"http://{self.address}/-/ready", timeout=_HTTP_TIMEOUT_S) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def with_targets(config: str, targets: Mapping[str, Sequence[str]]) -> str:
    """Return a configuration that scrapes the given addresses of each job every SCRAPE_INTERVAL instead of using DNS.

    Drops the last job, which scrapes Prometheus itself. Raises LookupError if the configuration has no such job with DNS
    discovery: the rules select series by job name.
    """
    config = re.sub(r"(scrape_interval|scrape_timeout|evaluation_interval): \S+", rf"\1: {SCRAPE_INTERVAL}", config)
    for job, addresses in targets.items():
        pattern = rf"(  - job_name: {re.escape(job)}\n)    dns_sd_configs:\n(?:      .*\n)+"
        static = f"\\g<1>    static_configs:\n      - targets: {json.dumps(list(addresses))}\n"
        config, count = re.subn(pattern, static, config)
        if count != 1:
            raise LookupError(f"prometheus.yml has no job {job} with dns_sd_configs")
    return config[: config.index("  - job_name: prometheus\n")]
