"""TCP: loopback unless the operator insists, no delays, and clients that vanish do not stay."""

import asyncio
import errno
import logging
import socket

import pytest

import nbdclient
from millpond.cache.exports import Export
from millpond.nbd.errors import ListenError
from millpond.nbd.limits import VANISHED_AFTER_S
from millpond.nbd.listener import listen_tcp, prepare_tcp
from millpond.nbd.server import NbdServer
from millpond.store.address import parse_address
from nbdmemory import MemoryExports

VOLUME = Export("vol", 1 << 20, False, "a disk")


def use(uri: str) -> None:
    """A client that does a little of everything."""
    with nbdclient.connect(uri, structured=False) as client:
        client.write(4095, b"over tcp")
        assert client.read(4095, 8) == b"over tcp"
        client.flush()


def test_localhost_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.bind

    def bind(sock: socket.socket, where: tuple[object, ...]) -> None:
        if sock.family == socket.AF_INET6:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        real(sock, where)

    monkeypatch.setattr(socket.socket, "bind", bind, raising=False)
    both = [(socket.AF_INET6, ("::1", 0, 0, 0)), (socket.AF_INET, ("127.0.0.1", 0))]
    found = [(family, socket.SOCK_STREAM, 6, "", where) for family, where in both]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)
    (sock,) = listen_tcp(parse_address("localhost:0"), insecure_listen=False, backlog=1)
    assert sock.family == socket.AF_INET
    sock.close()
    found.pop()
    with pytest.raises(ListenError, match="cannot listen on localhost:0: Cannot assign"):
        listen_tcp(parse_address("localhost:0"), insecure_listen=False, backlog=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_clients_are_served_on_loopback(host: str) -> None:
    async def main() -> None:
        exports = MemoryExports(VOLUME)
        server = NbdServer(exports)
        bound = await server.serve_tcp(parse_address(f"{host}:0"))
        assert bound.port
        await asyncio.to_thread(use, f"nbd://{host}:{bound.port}/vol")
        await server.close()
        exports.disks["vol"].stop()
        with pytest.raises(ConnectionRefusedError):
            nbdclient.connect_socket(f"nbd://{host}:{bound.port}/vol")

    asyncio.run(main())


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "example.org:10809", "192.0.2.1:0"])
def test_address_that_others_can_reach_is_refused(address: str) -> None:
    with pytest.raises(ListenError, match="insist with --insecure-listen"):
        listen_tcp(parse_address(address), insecure_listen=False, backlog=1)


@pytest.mark.expects_warnings
def test_operator_who_insists_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sockets = listen_tcp(parse_address("0.0.0.0:0"), insecure_listen=True, backlog=1)
    assert "listens insecurely" in caplog.text
    for sock in sockets:
        sock.close()


def test_address_in_use_and_name_that_does_not_resolve_get_one_line() -> None:
    (taken,) = listen_tcp(parse_address("127.0.0.1:0"), insecure_listen=False, backlog=1)
    port = taken.getsockname()[1]
    with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already"):
        listen_tcp(parse_address(f"127.0.0.1:{port}"), insecure_listen=False, backlog=1)
    taken.close()


def test_connections_send_at_once_and_notice_a_vanished_client() -> None:
    with socket.socket() as sock:
        prepare_tcp(sock)
        options = [
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        ]
        idle_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        interval_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        count = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
    assert options == [1, 1, VANISHED_AFTER_S * 1000]
    assert idle_s + interval_s * count == VANISHED_AFTER_S
