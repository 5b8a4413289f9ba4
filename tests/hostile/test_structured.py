"""Structured replies and CACHE of the real server: chunks, holes, errors, ranges as long as a disk.

What of a reply must always hold is asserted by the client (tests/nbdchunks.py).
"""

import random
from collections.abc import Iterator

import pytest

from hostile.conftest import SIZE_BYTES, Connect
from millpond.nbd.wire import Chunk, Command, CommandFlag, Error
from millpondprocess import Millpond
from nbdclient import NbdClient
from nbdclient import connect as connect_client

MIB = 1 << 20
SLICE = 256 << 10


@pytest.fixture
def structured(millpond: Millpond) -> Iterator[NbdClient]:
    """A client with structured replies and base:allocation."""
    with connect_client(millpond.uri, allocation=True) as client:
        yield client
    assert millpond.alive(), f"millpond up died:\n{millpond.log()}"


def chunks(client: NbdClient, offset: int, length: int, flags: int = 0) -> tuple[int, ...]:
    """The chunks of a read."""
    return client.wait(client.submit(Command.READ, offset, length, flags=flags)).chunks


def test_data_is_one_chunk_and_zeroes_are_one_hole(structured: NbdClient) -> None:
    structured.write(0, random.Random(1).randbytes(MIB))
    structured.zeroes(MIB, MIB)
    assert chunks(structured, 0, 4096) == (Chunk.OFFSET_DATA,)
    assert chunks(structured, 777, MIB - 777) == (Chunk.OFFSET_DATA,)
    assert chunks(structured, MIB, 4096) == (Chunk.OFFSET_HOLE,)
    assert chunks(structured, MIB + 13, MIB - 77) == (Chunk.OFFSET_HOLE,)
    assert chunks(structured, 0, 2 * MIB) == (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE)


def test_do_not_fragment_gives_one_chunk_of_data(structured: NbdClient) -> None:
    data = random.Random(2).randbytes(SLICE)
    structured.zeroes(0, 4 * MIB)
    structured.write(MIB, data)
    assert chunks(structured, 0, 4 * MIB, CommandFlag.DF) == (Chunk.OFFSET_DATA,)
    assert structured.read(0, 4 * MIB) == bytes(MIB) + data + bytes(3 * MIB - SLICE)


def test_nothing_read_is_a_chunk_of_nothing(structured: NbdClient) -> None:
    assert chunks(structured, 4096, 0) == (Chunk.NONE,)


def test_errors_of_reads_and_status_are_chunks(structured: NbdClient) -> None:
    for command in (Command.READ, Command.BLOCK_STATUS):
        for offset, length in ((SIZE_BYTES, 1), ((1 << 64) - 512, 4096), (0, 0xFFFFFFFF)):
            reply = structured.result(structured.submit(command, offset, length))
            assert (reply.error, reply.chunks) == (Error.EINVAL, (Chunk.ERROR,))
    early = structured.result(structured.submit(Command.READ, 0, 1, flags=1 << 9))
    assert early.chunks == (Chunk.ERROR,)
    other = structured.result(structured.submit(Command.TRIM, SIZE_BYTES, 1))
    assert (other.error, other.chunks) == (Error.EINVAL, ())


def test_holes_and_data_in_any_mixture_at_any_alignment(structured: NbdClient) -> None:
    chance = random.Random(3)
    model = bytearray(4 * MIB)
    structured.zeroes(0, len(model))
    for _ in range(60):
        at = chance.randrange(len(model))
        length = chance.randrange(1, min(600_000, len(model) - at) + 1)
        if chance.random() < 0.5:
            structured.trim(at, length)
            model[at : at + length] = bytes(length)
        else:
            data = chance.randbytes(length)
            structured.write(at, data)
            model[at : at + length] = data
        begin = chance.randrange(len(model))
        end = chance.randrange(begin, len(model)) + 1
        assert structured.read(begin, end - begin) == model[begin:end]


def test_reply_of_many_chunks_to_a_slow_reader_is_whole(structured: NbdClient) -> None:
    structured.zeroes(0, 64 * MIB)
    for number in range(0, 256, 2):
        structured.write(number * SLICE, bytes([number | 1]) * SLICE)
    cookie = structured.submit(Command.READ, 0, 64 * MIB)
    reply = structured.wait(cookie)
    assert len(reply.chunks) <= 256  # fewer where zeroes came from the store meanwhile
    for number in range(256):
        expected = bytes([0 if number % 2 else number | 1])
        assert reply.data[number * SLICE : (number + 1) * SLICE] == expected * SLICE


def test_fast_zero_is_refused_only_where_it_would_be_a_write(connect: Connect) -> None:
    client = connect()
    client.write(0, b"\x55" * 16384)
    flags = CommandFlag.FAST_ZERO

    def fast(offset: int, length: int) -> int:
        return client.result(client.submit(Command.WRITE_ZEROES, offset, length, flags=flags)).error

    assert fast(1, 4000) == Error.ENOTSUP
    assert fast(4095, 4096) == Error.ENOTSUP
    assert client.read(0, 16384) == b"\x55" * 16384
    assert fast(4095, 4098) == Error.OK
    assert client.read(4095, 4098) == bytes(4098)
    assert fast(0, 0) == Error.OK
    assert fast(SIZE_BYTES, 4096) == Error.ENOSPC


def test_cache_of_the_whole_disk_is_done_in_steps_beside_other_requests(connect: Connect) -> None:
    client, other = connect(), connect()
    cookies = [client.submit(Command.CACHE, 0, SIZE_BYTES) for _ in range(20)]
    for number in range(50):
        other.write(number * 4096, bytes([number]) * 4096)
        assert other.read(number * 4096, 4096) == bytes([number]) * 4096
    assert [client.result(cookie).error for cookie in cookies] == [Error.OK] * 20


def test_disconnect_waits_for_cache_and_status(connect: Connect) -> None:
    client = connect()
    client.submit(Command.CACHE, 12345, SIZE_BYTES - 12345)
    if client.structured:
        client.submit(Command.BLOCK_STATUS, 1, SIZE_BYTES - 1)
    replies = client.disconnect()
    assert {reply.error for reply in replies} == {Error.OK}
    assert len(replies) == 1 + client.structured


def test_abrupt_close_with_cache_and_status_in_flight(millpond: Millpond, connect: Connect) -> None:
    for _ in range(10):
        with connect_client(millpond.uri, allocation=True) as client:
            client.submit(Command.CACHE, 0, SIZE_BYTES)
            for _ in range(50):
                client.submit(Command.BLOCK_STATUS, 0, SIZE_BYTES)
            client.reset()


def test_status_answered_to_a_client_that_never_reads_stalls_only_it(
    millpond: Millpond, connect: Connect
) -> None:
    deaf = connect_client(millpond.uri, allocation=True)
    with deaf:
        for _ in range(1000):
            deaf.submit(Command.BLOCK_STATUS, 0, SIZE_BYTES)
        client = connect()
        client.write(0, b"x" * 4096)
        assert client.read(0, 4096) == b"x" * 4096
        assert len(list(deaf.replies())) == 1000
