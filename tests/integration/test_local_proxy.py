"""The TCP proxy applies the rules of its links at once, and to the connections of that link only."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from deploy.local.process import wait_until
from deploy.local.proxy import BUFFER_BYTES, Link, ProxyLoop, TcpProxy
from tablewire.runtime.addresses import parse_address

WAIT_S = 10.0
QUIET_S = 0.2


class Echo:
    """A server that sends back what it receives, with one thread per connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = "{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    @staticmethod
    def _serve(peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(65536):
                    peer.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", echo.endpoint) as proxy:
        yield proxy


def dial(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(parse_address(proxy.endpoint), timeout=WAIT_S)


def exchange(proxy: TcpProxy) -> None:
    """Send one byte and receive it on a new connection."""
    with dial(proxy) as client:
        client.sendall(b"a")
        assert receive(client, 1) == b"a"


def receive(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def quiet(client: socket.socket) -> bool:
    """Return whether nothing arrives for a moment."""
    client.settimeout(QUIET_S)
    try:
        return client.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        client.settimeout(WAIT_S)


def test_bytes_pass_both_ways_and_the_end_too(proxy: TcpProxy) -> None:
    """More than the buffers hold passes unchanged, and a half-close is passed on."""
    data = bytes(range(256)) * (16 * BUFFER_BYTES // 256)
    with dial(proxy) as client:
        sender = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sender.start()
        assert receive(client, len(data) + 1) == data
        sender.join()
    wait_until("the connection is gone", lambda: proxy.link.connections == 0, WAIT_S)


def test_cut_holds_and_heal_delivers(proxy: TcpProxy) -> None:
    """During a cut nothing arrives; bytes sent meanwhile arrive after heal."""
    with dial(proxy) as client:
        client.sendall(b"a")
        assert receive(client, 1) == b"a"
        proxy.cut()
        client.sendall(b"b")
        assert quiet(client)
        proxy.heal()
        assert receive(client, 1) == b"b"


def test_cut_one_way(proxy: TcpProxy) -> None:
    """With from_target cut the request still reaches the target; its answer waits for heal."""
    with dial(proxy) as client:
        client.sendall(b"a")
        assert receive(client, 1) == b"a"
        before = proxy.link.carried_bytes
        proxy.cut("from_target")
        client.sendall(b"b")
        wait_until("the request is delivered", lambda: proxy.link.carried_bytes == before + 1, WAIT_S)
        assert quiet(client)
        proxy.heal()
        assert receive(client, 1) == b"b"


def test_new_connections_do_not_reach_the_target_while_cut(proxy: TcpProxy) -> None:
    """A connection made during a cut is carried after heal."""
    proxy.cut("to_target")
    with dial(proxy) as client:
        client.sendall(b"a")
        assert quiet(client)
        proxy.heal()
        assert receive(client, 1) == b"a"


def test_stalled_sender_is_held_back(proxy: TcpProxy) -> None:
    """A stalled link accepts no more than its buffers hold: the sender's window fills up."""
    with dial(proxy) as client:
        proxy.stall()
        client.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            client.sendall(b"x" * (1 << 28))


def test_delay_keeps_the_order(proxy: TcpProxy) -> None:
    """Every byte arrives one delay later in each direction, in order; after heal without a delay."""
    with dial(proxy) as client:
        proxy.delay_ms(500)
        begin = time.monotonic()
        for number in range(10):
            client.sendall(bytes([number]))
        assert receive(client, 10) == bytes(range(10))
        assert time.monotonic() - begin >= 1.0
        proxy.heal()
        begin = time.monotonic()
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        assert time.monotonic() - begin < 0.9


def test_reset_ends_connections_and_new_ones_work(proxy: TcpProxy) -> None:
    """Both ends get an RST; the next connection is carried."""
    with dial(proxy) as client:
        client.sendall(b"a")
        assert receive(client, 1) == b"a"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with dial(proxy) as client:
        client.sendall(b"a")
        assert receive(client, 1) == b"a"


def test_refuse_is_like_a_dead_process(proxy: TcpProxy) -> None:
    """New connections end at once until heal."""
    proxy.refuse()
    with pytest.raises(ConnectionResetError):
        exchange(proxy)
    proxy.heal()
    exchange(proxy)


def test_dead_target_is_told_to_the_client(echo: Echo) -> None:
    """When no server listens behind the proxy, the client's connection ends."""
    with TcpProxy("127.0.0.1", "127.0.0.1:1") as proxy:
        with contextlib.suppress(ConnectionResetError), dial(proxy) as client:
            assert client.recv(1) == b""
        proxy.retarget(echo.endpoint)
        exchange(proxy)


def test_links_of_one_proxy_are_cut_apart(echo: Echo) -> None:
    """Two clients dial one address; a cut of one link does not affect the other."""
    loop = ProxyLoop()
    links = {"first": Link(loop, "first"), "second": Link(loop, "second")}
    names = iter(links)
    with TcpProxy("127.0.0.1", echo.endpoint, loop=loop, classify=lambda _address: links[next(names)]) as proxy:
        with dial(proxy) as first:
            first.sendall(b"a")
            assert receive(first, 1) == b"a"
            with dial(proxy) as second:
                links["first"].cut()
                first.sendall(b"b")
                second.sendall(b"c")
                assert receive(second, 1) == b"c"
                assert quiet(first)
        assert {link.accepted for link in links.values()} == {1}
    loop.close()


def test_many_proxies_share_one_thread(echo: Echo) -> None:
    """A hundred proxies need one thread."""
    loop = ProxyLoop()
    before = threading.active_count()
    proxies = [TcpProxy("127.0.0.1", echo.endpoint, loop=loop) for _ in range(100)]
    clients = [dial(proxy) for proxy in proxies]
    for number, client in enumerate(clients):
        client.sendall(bytes([number]))
    assert [receive(client, 1) for client in clients] == [bytes([number]) for number in range(100)]
    assert threading.active_count() <= before + len(clients) + 1  # the echo server's own
    for client in clients:
        client.close()
    loop.close()


def test_connections_that_end_in_one_round_do_not_end_the_proxies(proxy: TcpProxy) -> None:
    """Many connections that are reset at once do not end the proxy."""
    for _ in range(20):
        clients = [dial(proxy) for _ in range(20)]
        for client in clients:
            client.sendall(b"a")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for client in clients:
            client.close()
    exchange(proxy)
    wait_until("all connections are gone", lambda: proxy.link.connections <= 1, WAIT_S)
