"""A read-only export: everything that would change it is EPERM, and the stream stays in step."""

from collections.abc import Iterator

import pytest

import nbdclient
from millpond.nbd.wire import Command, CommandFlag, Error, TransmissionFlag
from millpondprocess import Millpond

SIZE_BYTES = 16 << 20


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nbdclient.NbdClient]:
    """A client of `millpond up --read-only` over a directory that was written to before."""
    directory = tmp_path_factory.mktemp("up") / "millpond"
    writable = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=1 << 30)
    read_only = Millpond(
        directory, size_bytes=SIZE_BYTES, cache_bytes=1 << 30, arguments=["--read-only"]
    )
    with writable as running, nbdclient.connect(running.uri) as writer:
        writer.write(0, b"kept" * 1024)
        writer.flush()
    with read_only as running, nbdclient.connect(running.uri) as reader:
        yield reader


def test_flags_say_so(client: nbdclient.NbdClient) -> None:
    assert TransmissionFlag.READ_ONLY in client.flags
    assert TransmissionFlag.SEND_TRIM not in client.flags


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
def test_change_is_not_permitted(client: nbdclient.NbdClient, command: int, flags: int) -> None:
    payload = b"\xee" * 4096 if command == Command.WRITE else b""
    cookie = client.submit(command, 0, 4096, flags=flags, payload=payload)
    assert client.result(cookie).error == Error.EPERM
    assert client.read(0, 4096) == b"kept" * 1024


def test_reads_and_flushes_are(client: nbdclient.NbdClient) -> None:
    client.flush()
    assert client.read(4, 4) == b"kept"
