"""A connection that goes on in another process: given back between two requests, nothing lost."""

import struct

import pytest

from millpond.native.engine import ConnectionClosed, ConnectionLeft, NativeError
from millpond.nbd.wire import REQUEST_MAGIC, SIMPLE_REPLY_MAGIC
from sim.rig import BLOCK, READ, REPLY_BYTES, REQUEST, VOLUME, WRITE, Rig

DISC, FLUSH, TRIM = 2, 3, 4
MIB = 1 << 20
REPLY = struct.Struct(">IIQ")


def leave(rig: Rig) -> int:
    """Ask for the newest connection; its cookie."""
    cookie = 1000 + rig._cookie
    rig.engine.leave(cookie)
    rig.turn()
    return cookie


def taken(rig: Rig, cookie: int) -> tuple[int, bytes]:
    """Wait until it has left."""
    event = rig.wait(ConnectionLeft)
    assert event.cookie == cookie
    return rig.engine.take_left(cookie, event.bytes_count)


def go_on(rig: Rig, socket: int, received: bytes) -> None:
    """As the next process does, in the same engine."""
    rig._cookie += 1
    rig.engine.connect(
        VOLUME, socket, read_only=False, received=received, cookie=1000 + rig._cookie
    )
    rig.turn()


def test_idle_connection_leaves_and_goes_on(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    rig.write(socket, 0, 7)
    assert taken(rig, leave(rig)) == (socket, b"")
    assert rig.status(VOLUME).connections == 0
    go_on(rig, socket, b"")
    assert rig.read(socket, 0) == 7


def test_half_a_header_is_given_back(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    rig.write(socket, 0, 7)
    request = rig.request(READ, 0, BLOCK)
    rig.push(socket, request[:11])
    rig.turn()
    _, received = taken(rig, leave(rig))
    assert received == request[:11]
    rig.push(socket, request[11:])
    go_on(rig, socket, received)
    assert rig.answers(socket, REPLY_BYTES + BLOCK)[REPLY_BYTES:] == b"\7" * BLOCK


def test_write_on_its_way_is_received_and_answered_first(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    write = rig.request(WRITE, 0, 4 * BLOCK, b"\5" * 4 * BLOCK)
    behind = rig.request(READ, 0, BLOCK)
    rig.push(socket, write[:5000])
    rig.turn()
    cookie = leave(rig)
    for _ in range(10):
        rig.turn()
    assert rig.take(ConnectionLeft) is None, "in the middle of a request"
    rig.push(socket, write[5000:] + behind)
    _, received = taken(rig, cookie)
    assert len(rig.answers(socket, REPLY_BYTES)) == REPLY_BYTES, "of the write"
    go_on(rig, socket, received)
    assert rig.answers(socket, REPLY_BYTES + BLOCK)[REPLY_BYTES:] == b"\5" * BLOCK


def test_requests_in_flight_are_answered_first(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    rig.carrying = False
    rig.ask(socket, READ, 0, BLOCK)  # a miss
    rig.turn()
    cookie = leave(rig)
    later = rig.request(READ, BLOCK, BLOCK)
    rig.push(socket, later)
    for _ in range(10):
        rig.turn()
    assert rig.take(ConnectionLeft) is None, "a request waits for the store"
    rig.carrying = True
    _, received = taken(rig, cookie)
    assert len(rig.answers(socket, REPLY_BYTES + BLOCK)) == REPLY_BYTES + BLOCK
    assert received == b"", "what came later was not even read"
    go_on(rig, socket, received)
    assert len(rig.answers(socket, REPLY_BYTES + BLOCK)) == REPLY_BYTES + BLOCK


def test_client_that_goes_away_meanwhile_is_closed(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    rig.carrying = False
    rig.ask(socket, READ, 0, BLOCK)
    rig.turn()
    cookie = leave(rig)
    rig.sim.hangup(socket)
    rig.carrying = True
    assert rig.wait(ConnectionClosed).cookie == cookie
    with pytest.raises(NativeError):
        rig.engine.take_left(cookie, 0)


def test_patience_ends_with_a_disconnect(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    rig.push(socket, rig.request(WRITE, 0, BLOCK, b"half"))
    cookie = leave(rig)
    rig.engine.disconnect(cookie)
    assert rig.wait(ConnectionClosed).cookie == cookie


def test_connection_that_nobody_took_is_closed_with_the_engine(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    leave(rig)
    rig.wait(ConnectionLeft)
    rig.fall()
    with pytest.raises(BrokenPipeError):
        rig.sim.pop(socket)
    rig.start()


def test_stream_may_be_cut_at_any_byte(rig: Rig) -> None:
    """What comes before the cut is served here, the rest there: as if it had not been cut."""
    requests = [
        (WRITE, 0, 2 * BLOCK, b"\5" * 2 * BLOCK),
        (READ, 8 * BLOCK, BLOCK, b""),
        (WRITE, 1 << 60, BLOCK, b"\6" * BLOCK),  # refused, and received all the same
        (TRIM, 2 * BLOCK, BLOCK, b""),
        (READ, 8 * BLOCK, 2 * BLOCK, b""),
        (FLUSH, 0, 0, b""),
    ]
    messages = []
    for number, (command, offset, length, data) in enumerate(requests):
        messages.append(REQUEST.pack(REQUEST_MAGIC, 0, command, number, offset, length) + data)
    stream = b"".join(messages)
    edges = [len(b"".join(messages[:count])) for count in range(len(messages) + 1)]
    cuts = {edge + near for edge in edges for near in (-1, 0, 1, 27, 28, 29)}
    cuts |= set(range(0, len(stream), 997))
    nine = b"\x09" * BLOCK
    payloads = [b"", nine, b"", b"", 2 * nine, b""]
    for cut in sorted(cut for cut in cuts if 0 <= cut <= len(stream)):
        socket = rig.connect(VOLUME)
        rig.write(socket, 0, 9, blocks=10)
        rig.push(socket, stream[:cut])
        rig.turn()
        cookie = leave(rig)
        rig.push(socket, stream[cut:])
        _, received = taken(rig, cookie)
        go_on(rig, socket, received)
        whole = rig.answers(socket, sum(REPLY_BYTES + len(each) for each in payloads))
        found = {}
        while whole:
            magic, error, number = REPLY.unpack_from(whole)
            end = REPLY_BYTES + len(payloads[number])
            assert magic == SIMPLE_REPLY_MAGIC and (error != 0) == (number == 2)
            found[number], whole = whole[REPLY_BYTES:end], whole[end:]
        assert [found[number] for number in range(len(payloads))] == payloads, cut
        assert [rig.read(socket, block) for block in (0, 1, 2)] == [5, 5, 0]
        rig.sim.hangup(socket)
        rig.wait(ConnectionClosed)


def test_reply_half_sent_is_sent_to_its_end_first(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    rig.write(socket, 0, 7)
    rig.sim.limit(socket, 100)  # of 4112 bytes
    rig.ask(socket, READ, 0, BLOCK)
    for _ in range(20):
        rig.turn()
    cookie = leave(rig)
    for _ in range(20):
        rig.turn()
    assert rig.take(ConnectionLeft) is None
    rig.sim.limit(socket, MIB)
    assert rig.answers(socket, REPLY_BYTES + BLOCK)[REPLY_BYTES:] == b"\7" * BLOCK
    assert taken(rig, cookie) == (socket, b"")


def test_client_that_said_goodbye_does_not_leave(rig: Rig) -> None:
    socket = rig.connect(VOLUME)
    rig.carrying = False
    rig.ask(socket, READ, 0, BLOCK)  # a miss
    rig.push(socket, rig.request(DISC, 0, 0))
    rig.turn()
    cookie = leave(rig)
    rig.carrying = True
    assert rig.wait(ConnectionClosed).cookie == cookie
    assert rig.take(ConnectionLeft) is None
