"""The HTTP port of a service, and its metrics."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tablewire.errors import OperatingError
from tablewire.runtime import http as runtime_http
from tablewire.runtime.http import Check, HttpServer, always_passes
from tablewire.runtime.metrics import Metrics

TIMEOUT_S = 10.0


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("owner", "0.1.0")


@pytest.fixture
def serve(metrics: Metrics) -> Iterator[Callable[..., HttpServer]]:
    servers: list[HttpServer] = []

    def start(healthz: Check = always_passes, readyz: Check = always_passes) -> HttpServer:
        server = HttpServer("127.0.0.1", 0, metrics.registry, healthz=healthz, readyz=readyz)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.close()
        server.close()


def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_checks_return_the_reason(serve: Callable[..., HttpServer]) -> None:
    """A check answers 200 ok, or 503 with the reason at that moment."""
    reasons = ["no etcd for 12 s"]
    server = serve(readyz=lambda: reasons[0])
    assert ask(server, "/healthz") == (200, "ok\n")
    assert ask(server, "/readyz") == (503, "no etcd for 12 s\n")
    reasons[0] = ""
    assert ask(server, "/readyz?verbose=1") == (200, "ok\n")
    assert ask(server, "/readyz", "HEAD") == (200, "")


def test_other_paths_and_methods_are_refused(serve: Callable[..., HttpServer]) -> None:
    """Other paths get 404 with the existing paths, other methods 501."""
    server = serve()
    status, text = ask(server, "/")
    assert status == 404
    assert "/metrics" in text
    assert ask(server, "/metrics", "POST")[0] == 501


def test_metrics_are_what_prometheus_reads(serve: Callable[..., HttpServer], metrics: Metrics) -> None:
    """The output can be parsed, and contains Tablewire's families and those of the process."""
    metrics.counter("ticks", "Ticks", ["changefeed"]).labels("default/a").inc(3)
    metrics.histogram("tick_seconds", "Time of a tick").observe(0.01)
    status, text = ask(serve(), "/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["tablewire_owner_ticks"].samples[0].value == 3
    assert {"tablewire_build_info", "process_cpu_seconds", "tablewire_owner_tick_seconds"} <= set(families)


def test_scenario_30_forgetting_one_changefeed_leaves_the_others(metrics: Metrics) -> None:
    """The labels of a removed changefeed disappear from every family, and no others."""
    ticks = metrics.counter("ticks", "Ticks", ["changefeed"])
    spans = metrics.gauge("spans", "Spans", ["changefeed", "state"])
    captures = metrics.gauge("captures", "Captures", ["state"])
    seconds = metrics.histogram("tick_seconds", "Time", ["changefeed"])
    plain = metrics.gauge("up", "Up")
    for changefeed in ("default/a", "default/ab"):
        ticks.labels(changefeed).inc()
        seconds.labels(changefeed).observe(1)
        for state in ("absent", "replicating"):
            spans.labels(changefeed, state).set(1)
    captures.labels("default/a").set(1)
    plain.set(1)
    metrics.forget(changefeed="default/a")
    metrics.forget(changefeed="default/a")
    left = [
        sample for family in metrics.registry.collect() for sample in family.samples if sample.name.startswith("tablewire_owner")
    ]
    assert not [sample for sample in left if sample.labels.get("changefeed") == "default/a"]
    by_name: dict[str, int] = {}
    for sample in left:
        by_name[sample.name] = by_name.get(sample.name, 0) + 1
    assert by_name["tablewire_owner_spans"] == 2
    assert by_name["tablewire_owner_ticks_total"] == 1
    assert by_name["tablewire_owner_tick_seconds_count"] == 1
    assert by_name["tablewire_owner_captures"] == 1
    assert by_name["tablewire_owner_up"] == 1


def test_a_port_in_use_is_an_error(serve: Callable[..., HttpServer], metrics: Metrics) -> None:
    """A port that is in use is one clear error with the address."""
    server = serve()
    with pytest.raises(OperatingError, match=f"127.0.0.1:{server.port}: Address already in use"):
        HttpServer("127.0.0.1", server.port, metrics.registry)


def test_silent_clients_do_not_use_up_the_server(serve: Callable[..., HttpServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle connections are limited in number and time; afterwards the port answers again."""
    monkeypatch.setattr(runtime_http._Handler, "timeout", 0.2)
    server = serve()
    idle = [socket.create_connection((server.host, server.port), TIMEOUT_S) for _ in range(3 * runtime_http.REQUESTS_MAX)]
    for connection in idle:
        assert connection.recv(1) == b""  # closed by the server, immediately or after the timeout
        connection.close()
    assert ask(server, "/healthz") == (200, "ok\n")


def test_a_check_that_raises_does_not_stop_the_server(serve: Callable[..., HttpServer]) -> None:
    """The request ends without an answer, and the next one is served."""

    def broken() -> str:
        raise KeyError("a bug")

    server = serve(readyz=broken)
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(server, "/readyz")
    assert ask(server, "/healthz") == (200, "ok\n")
