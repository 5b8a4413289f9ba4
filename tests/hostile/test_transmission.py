"""Hostile bytes in the transmission phase of the real server: errors as the protocol says.

The rules: a request that cannot be granted is answered with its error and the stream stays in
step, a WRITE's payload consumed; only a broken frame ends a connection, and only its own.
"""

import random
import time

import pytest

from hostile.conftest import SIZE_BYTES, Connect
from millpond.nbd.wire import Command, CommandFlag, Error, TransmissionFlag
from millpondprocess import Millpond
from nbdclient import (
    ConnectionLost,
    NbdClient,
    NbdReplyError,
    Request,
    connect_socket,
    request_bytes,
)

MAX_PAYLOAD_BYTES = 32 << 20
BLOCK = bytes(range(256)) * 16
MUTATIONS = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
RANGED = (Command.READ, *MUTATIONS)


def past_end(command: int) -> Error:
    """Writing behind the end is a full disk, asking behind it is a mistake."""
    return Error.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Error.EINVAL


def ask(client: NbdClient, command: int, offset: int, length: int, flags: int = 0) -> int:
    """The error a request is answered with; a WRITE brings its whole payload."""
    payload = b"\xee" * length if command == Command.WRITE else b""
    return client.result(client.submit(command, offset, length, flags=flags, payload=payload)).error


def assert_in_step(client: NbdClient) -> None:
    """The stream is in step: a write, a read and a flush do what they say."""
    client.write(8192, BLOCK)
    assert client.read(8192, len(BLOCK)) == BLOCK
    client.flush()


# Framing.


@pytest.mark.parametrize("command", [*RANGED, Command.FLUSH, 99])
def test_every_request_split_at_every_byte(client: NbdClient, command: int) -> None:
    length = 0 if command == Command.FLUSH else 16
    payload = b"0123456789abcdef" if command == Command.WRITE else b""
    expected = Error.EINVAL if command == 99 else Error.OK
    client.write(4090, b"fedcba9876543210")
    for cut in range(1, 28 + len(payload)):
        request = Request(1 << 63 | cut, command, 4090, length, 0)
        whole = request_bytes(request) + payload
        client.expect(request)
        client.send(whole[:cut])
        time.sleep(0.001)  # so that it is read alone, as far as a test can say
        client.send(whole[cut:])
        reply = client.result(request.cookie)
        assert reply.error == expected
        if command == Command.READ:
            assert reply.data == b"fedcba9876543210"
        if command == Command.WRITE:
            assert client.read(4090, 16) == payload


def test_requests_byte_by_byte(client: NbdClient) -> None:
    payload = random.Random(2).randbytes(300)
    write = Request(1, Command.WRITE, 100, 300, CommandFlag.FUA)
    read = Request(2, Command.READ, 100, 300, 0)
    for request, stream in ((write, request_bytes(write) + payload), (read, request_bytes(read))):
        client.expect(request)
        for byte in stream:
            client.send(bytes([byte]))
        reply = client.wait(request.cookie)
    assert reply.data == payload


def test_wrong_magic_ends_only_its_own_connection(connect: Connect) -> None:
    bad, good = connect(), connect()
    request = Request(5, Command.READ, 0, 4096, 0)
    bad.send(request_bytes(request, magic=0x25609514) + bytes(100))
    assert bad.wait_for_end() == []
    assert_in_step(good)


def test_reply_magic_and_other_generations_of_requests_are_wrong_magics(connect: Connect) -> None:
    for magic in (0, 0x67446698, 0x668E33EF, 0x21E41C71, 0x13956025):
        bad = connect()
        bad.send(request_bytes(Request(5, Command.READ, 0, 4096, 0), magic=magic))
        assert bad.wait_for_end() == []


def test_garbage_ends_only_its_own_connection(connect: Connect) -> None:
    chance = random.Random(3)
    good = connect()
    for _ in range(20):
        bad = connect()
        bad.send(chance.randbytes(chance.randrange(28, 5000)))
        assert bad.wait_for_end() == []
        assert_in_step(good)


def test_any_cookie_comes_back(client: NbdClient) -> None:
    for cookie in (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1):
        client.submit(Command.READ, 0, 1, cookie=cookie)
        assert client.wait(cookie).error == Error.OK


def test_one_cookie_for_many_requests_is_the_clients_business(client: NbdClient) -> None:
    for _ in range(10):
        client.submit(Command.WRITE, 0, 4, payload=b"same", cookie=7)
    assert [reply.error for reply in client.replies()] == [Error.OK] * 10


# Commands and flags.


@pytest.mark.parametrize("command", [Command.RESIZE, 9, 99, 0x7FFF, 0xFFFF])
def test_command_that_was_not_offered_is_refused(client: NbdClient, command: int) -> None:
    assert ask(client, command, 0, 4096) == Error.EINVAL
    assert_in_step(client)


def test_block_status_is_refused_unless_its_context_was_selected(client: NbdClient) -> None:
    selected = client.structured  # the fixture selects it whenever it can
    expected = Error.OK if selected else Error.EINVAL
    assert ask(client, Command.BLOCK_STATUS, 0, 4096) == expected
    assert_in_step(client)


def test_cache_is_offered_and_done(client: NbdClient) -> None:
    assert TransmissionFlag.SEND_CACHE in client.flags
    assert ask(client, Command.CACHE, 0, 4096) == Error.OK
    assert_in_step(client)


@pytest.mark.parametrize("command", [*RANGED, Command.FLUSH])
@pytest.mark.parametrize("bit", range(1, 16))
def test_flag_that_does_not_belong_is_refused(client: NbdClient, command: int, bit: int) -> None:
    if command == Command.WRITE_ZEROES and 1 << bit == CommandFlag.NO_HOLE:
        expected = Error.OK
    elif command == Command.WRITE_ZEROES and 1 << bit == CommandFlag.FAST_ZERO:
        assert TransmissionFlag.SEND_FAST_ZERO in client.flags
        expected = Error.OK
    elif command == Command.READ and 1 << bit == CommandFlag.DF:
        expected = Error.OK if client.structured else Error.EINVAL
    else:
        expected = Error.EINVAL
    before = client.read(0, 4096)
    length = 0 if command == Command.FLUSH else 4096
    found = ask(client, command, 0, length, flags=1 << bit)
    assert found == expected
    if expected == Error.EINVAL:
        assert client.read(0, 4096) == before
    assert_in_step(client)


@pytest.mark.parametrize("command", [*RANGED, Command.FLUSH])
def test_forced_unit_access_is_accepted_on_every_command(client: NbdClient, command: int) -> None:
    length = 0 if command == Command.FLUSH else 512
    assert ask(client, command, 0, length, flags=CommandFlag.FUA) == Error.OK


def test_flush_ignores_offset_and_length_at_most(client: NbdClient) -> None:
    assert ask(client, Command.FLUSH, 1 << 63, 4096) in (Error.OK, Error.EINVAL)
    assert_in_step(client)


# Ranges.


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE_BYTES, 1),
        (SIZE_BYTES - 1, 2),
        (SIZE_BYTES - 4096, 4097),
        (SIZE_BYTES + 1, 4096),
        (1 << 63, 4096),
        ((1 << 64) - 512, 512),
        ((1 << 64) - 512, 1024),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 4096, 4097),
    ],
)
def test_range_past_the_end(client: NbdClient, command: int, offset: int, length: int) -> None:
    start = client.read(0, 8192)
    tail = client.read(SIZE_BYTES - 8192, 8192)
    assert ask(client, command, offset, length) == past_end(command)
    assert client.read(0, 8192) == start  # what wraps would end here
    assert client.read(SIZE_BYTES - 8192, 8192) == tail
    assert_in_step(client)


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES])
def test_longest_length_past_the_end(client: NbdClient, command: int) -> None:
    assert ask(client, command, 0, 0xFFFFFFFF) == past_end(command)
    assert ask(client, command, (1 << 64) - 0xFFFFFFFF, 0xFFFFFFFF) == past_end(command)
    assert_in_step(client)


def test_last_bytes_of_a_disk_that_ends_inside_a_block(client: NbdClient) -> None:
    client.write(SIZE_BYTES - 5000, b"\x5a" * 5000)
    assert client.read(SIZE_BYTES - 1, 1) == b"\x5a"
    client.trim(SIZE_BYTES - 1234, 1234)
    assert client.read(SIZE_BYTES - 5000, 5000) == b"\x5a" * 3766 + bytes(1234)


@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize("offset", [0, 1, 4096, SIZE_BYTES])
def test_zero_length_succeeds_and_does_nothing(
    client: NbdClient, command: int, offset: int
) -> None:
    before = client.read(0, 8192)
    assert ask(client, command, offset, 0) == Error.OK
    assert client.read(0, 8192) == before


# Sizes.


def test_largest_advertised_payload_is_served(client: NbdClient) -> None:
    payload = random.Random(4).randbytes(1 << 20) * 32
    client.write(12345, payload)
    assert client.read(12345, MAX_PAYLOAD_BYTES) == payload


@pytest.mark.parametrize("length", [(64 << 20) + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_oversized_read_is_refused(client: NbdClient, length: int) -> None:
    assert ask(client, Command.READ, 0, length) == Error.EINVAL
    assert_in_step(client)


def test_read_above_the_advertised_payload_is_served_or_refused(client: NbdClient) -> None:
    cookie = client.submit(Command.READ, 0, 49_865_728)  # seen in a trace of a real guest
    reply = client.result(cookie)
    assert reply.error in (Error.OK, Error.EINVAL)
    assert_in_step(client)


def test_oversized_write_is_consumed_and_refused_or_ends_its_connection(
    client: NbdClient, connect: Connect
) -> None:
    length = (64 << 20) + 4096
    before = client.read(0, 4096)
    other = connect()
    try:
        cookie = other.submit(Command.WRITE, 0, length, payload=b"\xee" * length)
        error = other.result(cookie).error
    except ConnectionLost:
        pass
    else:
        assert error == Error.EINVAL
        assert_in_step(other)
    assert client.read(0, 4096) == before


def test_length_alone_buys_no_memory(millpond: Millpond, connect: Connect) -> None:
    connect().read(0, 1)
    before_bytes = millpond.resident_bytes()
    writers = [connect() for _ in range(16)]
    for writer in writers:
        request = Request(1, Command.WRITE, 0, 0xFFFFFFFF, 0)
        writer.send(request_bytes(request) + bytes(1000))
    time.sleep(0.5)
    assert millpond.resident_bytes() - before_bytes < 256 << 20
    assert_in_step(connect())


@pytest.mark.parametrize(
    ("offset", "length", "flags", "error"),
    [
        (SIZE_BYTES, 1 << 20, 0, Error.ENOSPC),
        ((1 << 64) - 512, 4096, 0, Error.ENOSPC),
        (0, 1 << 20, CommandFlag.DF, Error.EINVAL),
        (0, 1 << 20, 1 << 15, Error.EINVAL),
    ],
)
def test_payload_of_a_refused_write_is_consumed(
    client: NbdClient, offset: int, length: int, flags: int, error: Error
) -> None:
    before = client.read(0, 1 << 20)
    # The payload looks like requests: a server that is out of step would answer them.
    trap = request_bytes(Request(666, Command.WRITE, 0, 0, 0))
    payload = (trap * (length // len(trap) + 1))[:length]
    cookies = [
        client.submit(Command.WRITE, offset, length, flags=flags, payload=payload) for _ in range(5)
    ]
    assert [client.result(cookie).error for cookie in cookies] == [error] * 5
    assert client.read(0, 1 << 20) == before
    assert_in_step(client)


# Many requests, and clients that do not read.


def test_thousand_reads_without_reading_a_reply(client: NbdClient) -> None:
    chance = random.Random(5)
    content = chance.randbytes(1 << 20)
    client.write(0, content)
    wanted = {}
    stream = b""
    for cookie in range(1000):
        request = Request(cookie, Command.READ, chance.randrange(1 << 19), 16384, 0)
        wanted[cookie] = content[request.offset : request.offset + 16384]
        client.expect(request)
        stream += request_bytes(request)
    client.socket.setblocking(True)
    client.socket.sendall(stream)  # blocks if the server stops reading too early
    client.socket.setblocking(False)
    time.sleep(0.2)
    replies = list(client.replies())
    assert {reply.request.cookie: reply.data for reply in replies} == wanted


def test_client_that_never_reads_stalls_only_itself(connect: Connect) -> None:
    deaf = connect()
    deaf.socket.setblocking(True)
    for cookie in range(200):
        deaf.socket.sendall(request_bytes(Request(cookie, Command.READ, 0, 1 << 20, 0)))
    served = connect()
    for number in range(200):
        served.write(number * 4096, BLOCK)
        assert served.read(number * 4096, 4096) == BLOCK
    served.flush()


def test_many_deaf_clients_leave_memory_for_others(millpond: Millpond, connect: Connect) -> None:
    before_bytes = millpond.resident_bytes()
    for _ in range(8):
        deaf = connect()
        for cookie in range(64):
            deaf.socket.send(request_bytes(Request(cookie, Command.READ, 0, 32 << 20, 0)))
    served = connect()
    assert_in_step(served)
    time.sleep(0.5)
    assert_in_step(served)
    assert millpond.resident_bytes() - before_bytes < 1 << 30


def test_thousand_writes_and_reads_of_one_block_are_each_whole(client: NbdClient) -> None:
    pages = [bytes([number]) * 4096 for number in range(250)]
    client.write(4096, bytes(4096))  # the first read may still see what was there before
    for page in pages:
        client.submit_write(4096, page)
        client.submit_read(4096, 4096)
    for reply in client.replies():
        assert reply.error == Error.OK
        assert len(set(reply.data)) <= 1, "a read saw half of a write"
    assert client.read(4096, 4096) in pages


# Ends.


def test_half_close_still_gets_every_reply(client: NbdClient) -> None:
    for number in range(100):
        client.submit_write(number * 512, b"%08d" % number * 64)
        client.submit_read(number * 512, 512)
    client.submit_flush()
    client.half_close()
    replies = client.wait_for_end()
    assert len(replies) == 201
    assert {reply.error for reply in replies} == {Error.OK}
    assert client.in_flight == {}


def test_disconnect_answers_everything_in_flight_first(connect: Connect) -> None:
    for _ in range(10):
        client = connect()
        for number in range(50):
            client.submit_write(number * 4096, BLOCK, fua=number % 5 == 0)
            client.submit_read(number * 4096, 65536)
        replies = client.disconnect()
        assert len(replies) == 100
        assert {reply.error for reply in replies} == {Error.OK}


def test_nothing_behind_a_disconnect_is_done(connect: Connect) -> None:
    client, witness = connect(), connect()
    witness.write(0, bytes(4096))
    disc = request_bytes(Request(1, Command.DISC, 1 << 63, 0xFFFFFFFF, 0))
    write = request_bytes(Request(2, Command.WRITE, 0, 4096, 0)) + BLOCK
    client.send(disc + write)
    assert client.wait_for_end() == []
    assert witness.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("sent", [0, 1, 4095, 65535])
def test_abrupt_close_inside_a_payload_writes_nothing(connect: Connect, sent: int) -> None:
    client, witness = connect(), connect()
    witness.write(65536, b"\x77" * 65536)
    client.send(request_bytes(Request(1, Command.WRITE, 65536, 65536, 0)) + bytes(sent))
    time.sleep(0.01)
    client.close()
    time.sleep(0.05)
    assert witness.read(65536, 65536) == b"\x77" * 65536
    assert_in_step(witness)


def test_abrupt_close_with_requests_in_flight(connect: Connect) -> None:
    witness = connect()
    for _ in range(20):
        client = connect()
        for number in range(64):
            client.submit_write(number * 4096, BLOCK)
            client.submit_read(number * 4096, 1 << 16)
        client.reset()
        assert_in_step(witness)


def test_end_inside_a_header(connect: Connect) -> None:
    for sent in range(28):
        client = connect()
        client.send(request_bytes(Request(1, Command.WRITE, 0, 4096, 0))[:sent])
        client.half_close()
        assert client.wait_for_end() == []


def test_hundreds_of_connections_come_and_go(millpond: Millpond, connect: Connect) -> None:
    for _ in range(300):
        connect_socket(millpond.uri).close()
    clients = [connect() for _ in range(50)]
    for number, client in enumerate(clients):
        client.submit_write(number * 4096, BLOCK)
    for client in clients:
        assert [reply.error for reply in client.replies()] == [Error.OK]


def test_flush_covers_what_another_connection_was_told(connect: Connect) -> None:
    writer, flusher = connect(), connect()
    writer.write(0, BLOCK)
    flusher.flush()
    assert flusher.read(0, 4096) == BLOCK


def test_write_on_a_writable_export_is_allowed_on_every_alignment(client: NbdClient) -> None:
    chance = random.Random(6)
    model = bytearray(1 << 16)
    client.zeroes(0, len(model))
    for _ in range(300):
        offset = chance.randrange(len(model))
        length = chance.randrange(1, min(9000, len(model) - offset) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            client.zeroes(offset, length, no_hole=chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif kind == 1:
            client.trim(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = chance.randbytes(length)
            client.write(offset, data, fua=chance.random() < 0.1)
            model[offset : offset + length] = data
    assert client.read(0, len(model)) == model


def test_error_in_the_middle_of_a_pipeline_is_answered_alone(client: NbdClient) -> None:
    good = client.submit_write(0, BLOCK)
    bad = client.submit_write(SIZE_BYTES, BLOCK)
    also_good = client.submit_read(0, 4096)
    assert client.wait(good).error == Error.OK
    with pytest.raises(NbdReplyError) as caught:
        client.wait(bad)
    assert caught.value.error == Error.ENOSPC
    assert client.wait(also_good).error == Error.OK
