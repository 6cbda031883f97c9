"""An Exchange over mutual TLS: the owner's certificate lets it in, and another one's does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from owner.exchange.hub import ExchangeHub, ProcessorClientView
from owner.owner_config import OwnerExchangeSection
from processor.service.exchange_server import ExchangeServer
from tablewire.model.ids import CaptureInfo, ChangefeedID
from tablewire.model.messages import ActiveChangefeed
from tablewire.runtime import tls
from tablewire.runtime.sections import PeerTlsSection

FILES = Path(__file__).parent.parent / "tablewire" / "tls"
DEADLINE_S = 10.0
ACTIVE = (ActiveChangefeed(ChangefeedID("default", "orders"), 1),)


def section(name: str, **options: object) -> PeerTlsSection:
    files = {"ca_file": f"{FILES}/ca.pem", "cert_file": f"{FILES}/{name}.pem", "key_file": f"{FILES}/{name}.key"}
    return PeerTlsSection(enabled=True, **{**files, **options})  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[ExchangeServer]:
    """Admit the certificate "client" and no other."""
    own = section("server", allowed_common_names=("client",))
    server = ExchangeServer(
        "capture-1",
        "127.0.0.1",
        0,
        exchange_wait_ms=10,
        credentials=tls.server_credentials(own),
        interceptors=tls.interceptors(own),
    )
    server.start()
    yield server
    server.stop(0)


def first_turn(server: ExchangeServer, own: PeerTlsSection) -> ProcessorClientView:
    """Return the view of the capture once one Exchange has succeeded or failed."""
    hub = ExchangeHub("owner-1", config=OwnerExchangeSection(idle_ms=20), credentials=tls.channel_credentials(own))
    never = threading.Event()
    try:
        hub.set_term(7)
        hub.set_captures({"capture-1": CaptureInfo("capture-1", f"127.0.0.1:{server.port}")})
        hub.set_active(ACTIVE)
        for _ in range(int(DEADLINE_S / 0.01)):
            (view,) = hub.client_views()
            if view.failures or view.exchanges > 1:
                return view
            never.wait(0.01)
        raise AssertionError("no turn ended")
    finally:
        hub.close()


def test_owner_with_an_allowed_certificate_exchanges(server: ExchangeServer) -> None:
    """The batch reaches the loop."""
    view = first_turn(server, section("client"))
    assert (view.failures, view.last_error) == (0, "")
    assert server.take()[0].batch.active == ACTIVE


def test_owner_with_another_certificate_is_refused(server: ExchangeServer) -> None:
    """Nothing of it reaches the loop, and the owner's status has the reason."""
    view = first_turn(server, section("stranger"))
    assert "PERMISSION_DENIED: certificate of stranger may not call here" in view.last_error
    assert server.take() == []
    assert server.stats.seen_revision == 0


def test_owner_in_plain_text_is_refused(server: ExchangeServer) -> None:
    """There is no connection at all."""
    view = first_turn(server, PeerTlsSection())
    assert "UNAVAILABLE" in view.last_error
    assert server.take() == []
