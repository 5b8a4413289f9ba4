"""Negotiation: every option, every way to say it wrong, every message split at every byte."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.cache.exports import Export
from millpond.nbd import wire
from millpond.nbd.errors import ProtocolError
from millpond.nbd.handshake import (
    ContextsRequested,
    DescribeRequested,
    Ended,
    Event,
    Handshake,
    ListRequested,
    OpenRequested,
)
from millpond.nbd.limits import NbdLimits
from millpond.nbd.wire import Info, Option, OptionReply

VOLUME = Export("vol", 1 << 40, False, "a disk")
READ_ONLY = Export("ro", 12345, True, "")
FIXED = wire.CLIENT_FLAGS.pack(3)
# HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO
WRITABLE_FLAGS = 0b110101101101
READ_ONLY_FLAGS = 0b10100001111  # HAS_FLAGS, READ_ONLY, FLUSH, FUA, MULTI_CONN, CACHE


def option(number: int, data: bytes = b"") -> bytes:
    """An option as a client sends it."""
    return wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, number, len(data)) + data


def go(name: str, *kinds: int, number: int = Option.GO) -> bytes:
    """GO (or INFO)."""
    encoded = name.encode()
    data = wire.NAME_LENGTH.pack(len(encoded)) + encoded + wire.INFO_COUNT.pack(len(kinds))
    return option(number, data + b"".join(wire.INFO_KIND.pack(kind) for kind in kinds))


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """A reply as a client expects it."""
    header = wire.OPTION_REPLY_HEADER
    return header.pack(wire.OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def replies(output: bytes) -> list[tuple[int, int, bytes]]:
    """All replies in an output: option, kind, data."""
    found = []
    while output:
        magic, number, kind, length = wire.OPTION_REPLY_HEADER.unpack_from(output)
        assert magic == wire.OPTION_REPLY_MAGIC
        found.append((number, kind, output[20 : 20 + length]))
        assert len(found[-1][2]) == length
        output = output[20 + length :]
    return found


def started(flags: bytes = FIXED, limits: NbdLimits | None = None) -> Handshake:
    """A handshake behind the greeting."""
    handshake = Handshake(limits)
    handshake.take_output()
    handshake.receive(flags)
    assert handshake.next_event() is None
    return handshake


def answer(handshake: Handshake, event: Event) -> bytes | None:
    """Answer as a server with two exports does; bytes: transmission begins with them."""
    exports = {export.name: export for export in (VOLUME, READ_ONLY)}
    if isinstance(event, ListRequested):
        handshake.answer_list(exports)
    elif isinstance(event, DescribeRequested | OpenRequested | ContextsRequested):
        if event.name not in exports:
            handshake.refuse("unknown", "no such volume")
        elif isinstance(event, ContextsRequested):
            handshake.answer_contexts()
        elif isinstance(event, DescribeRequested):
            handshake.answer_describe(exports[event.name])
        else:
            return handshake.answer_open(exports[event.name])
    return None


def converse(handshake: Handshake, pieces: list[bytes]) -> tuple[bytes, bytes | None]:
    """Feed pieces, answer events: all output, and the leftover once transmission begins."""
    output = handshake.take_output()
    leftover: bytes | None = None
    for piece in pieces:
        if leftover is not None:
            leftover += piece  # the engine reads these itself
            continue
        handshake.receive(piece)
        while leftover is None and (event := handshake.next_event()) is not None:
            if isinstance(event, Ended):
                return output + handshake.take_output(), None
            leftover = answer(handshake, event)
            output += handshake.take_output()
        output += handshake.take_output()
    return output, leftover


def test_greeting_is_18_bytes_of_fixed_newstyle() -> None:
    assert Handshake().take_output() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_go_with_all_information() -> None:
    handshake = started()
    handshake.receive(go("vol", 0, 1, 2, 3, 99))
    assert handshake.next_event() == OpenRequested("vol")
    assert handshake.answer_open(VOLUME) == b""
    assert replies(handshake.take_output()) == [
        (Option.GO, OptionReply.INFO, b"\0\1vol"),
        (Option.GO, OptionReply.INFO, b"\0\2a disk"),
        (Option.GO, OptionReply.INFO, wire.INFO_BLOCK_SIZE.pack(3, 1, 4096, 32 << 20)),
        (Option.GO, OptionReply.INFO, wire.INFO_EXPORT.pack(0, 1 << 40, WRITABLE_FLAGS)),
        (Option.GO, OptionReply.ACK, b""),
    ]


def test_go_without_requests_still_gets_info_export() -> None:
    handshake = started()
    handshake.receive(go("ro"))
    handshake.next_event()
    handshake.answer_open(READ_ONLY)
    assert replies(handshake.take_output()) == [
        (Option.GO, OptionReply.INFO, wire.INFO_EXPORT.pack(0, 12345, READ_ONLY_FLAGS)),
        (Option.GO, OptionReply.ACK, b""),
    ]


def test_info_asked_for_twice_comes_once() -> None:
    handshake = started()
    handshake.receive(go("ro", *[Info.BLOCK_SIZE] * 1000))
    handshake.next_event()
    handshake.answer_open(READ_ONLY)
    assert len(replies(handshake.take_output())) == 3


def test_info_opens_nothing_and_negotiation_goes_on() -> None:
    handshake = started()
    handshake.receive(go("vol", Info.NAME, number=Option.INFO) + go("vol"))
    assert handshake.next_event() == DescribeRequested("vol")
    handshake.answer_describe(VOLUME)
    assert [kind for _, kind, _ in replies(handshake.take_output())] == [3, 3, 1]
    assert handshake.next_event() == OpenRequested("vol")


def test_default_export_reports_its_canonical_name() -> None:
    handshake = started()
    handshake.receive(go("", Info.NAME))
    assert handshake.next_event() == OpenRequested("")
    handshake.answer_open(VOLUME)
    assert replies(handshake.take_output())[0] == (Option.GO, OptionReply.INFO, b"\0\1vol")


@pytest.mark.parametrize(("flags", "zeroes"), [(3, 0), (1, 124), (2, 0), (0, 124)])
def test_export_name_sends_zeroes_unless_agreed(flags: int, zeroes: int) -> None:
    handshake = started(wire.CLIENT_FLAGS.pack(flags))
    handshake.receive(option(Option.EXPORT_NAME, b"vol") + b"request")
    assert handshake.next_event() == OpenRequested("vol")
    assert handshake.answer_open(VOLUME) == b"request"
    expected = wire.EXPORT_NAME_REPLY.pack(1 << 40, WRITABLE_FLAGS) + bytes(zeroes)
    assert handshake.take_output() == expected


def test_refused_export_name_leaves_only_disconnect() -> None:
    handshake = started()
    handshake.receive(option(Option.EXPORT_NAME, b"nope") + go("vol"))
    handshake.next_event()
    handshake.refuse("unknown", "no such volume")
    assert isinstance(handshake.next_event(), Ended)
    assert handshake.take_output() == b""


def test_refused_go_lets_the_client_try_another() -> None:
    handshake = started()
    output, leftover = converse(handshake, [go("nope") + go("vol") + b"rest"])
    assert replies(output)[0] == (Option.GO, OptionReply.ERR_UNKNOWN, b"no such volume")
    assert leftover == b"rest"


@pytest.mark.parametrize(
    ("code", "kind"),
    [("unknown", 6), ("policy", 2), ("platform", 4), ("shutdown", 7)],
)
def test_refusals_have_their_error(code: str, kind: int) -> None:
    handshake = started()
    handshake.receive(go("vol"))
    handshake.next_event()
    handshake.refuse(code, "because\0" + "ü" * 4000)  # type: ignore[arg-type]
    [(number, found, message)] = replies(handshake.take_output())
    assert (number, found) == (Option.GO, 1 << 31 | kind)
    assert message.decode() == "because" + "ü" * 2044  # 4096 bytes are the limit; no half character


def test_list_sends_one_reply_per_export() -> None:
    output, _ = converse(started(), [option(Option.LIST)])
    assert output == (
        reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\3vol")
        + reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\2ro")
        + reply(Option.LIST, OptionReply.ACK)
    )


def test_list_with_data_is_invalid_and_the_stream_stays_in_step() -> None:
    output, leftover = converse(started(), [option(Option.LIST, b"x"), go("vol")])
    assert replies(output)[0][:2] == (Option.LIST, OptionReply.ERR_INVALID)
    assert leftover == b""


def test_abort_is_acknowledged_whatever_it_carries() -> None:
    handshake = started()
    handshake.receive(option(Option.ABORT, b"bye") + b"garbage behind it")
    assert handshake.next_event() == Ended("the client aborted")
    assert handshake.take_output() == reply(Option.ABORT, OptionReply.ACK)


@pytest.mark.parametrize(
    "number",
    [
        Option.PEEK_EXPORT,
        Option.STARTTLS,
        Option.EXTENDED_HEADERS,
        0,
        12,
        0xFFFFFFFF,
    ],
)
def test_other_options_are_refused_after_their_data(number: int) -> None:
    handshake = started()
    whole = option(number, b"some data")
    handshake.receive(whole[:-1])
    assert handshake.next_event() is None
    assert handshake.take_output() == b""
    output, leftover = converse(handshake, [whole[-1:] + go("vol")])
    assert replies(output)[0][:2] == (number, OptionReply.ERR_UNSUP)
    assert leftover == b""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0\0",
        b"\0\0\0\4vol\0\0",
        b"\xff\xff\xff\xffvol\0\0",
        b"\0\0\0\3vol\0\1",
        b"\0\0\0\3vol\0\0\0",
        b"\0\0\0\3v\0l\0\0",
        b"\0\0\0\3v\xffl\0\0",
        b"\0\0\x10\x01" + b"x" * 4097 + b"\0\0",
    ],
)
@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
def test_malformed_go_is_invalid_and_the_stream_stays_in_step(number: int, data: bytes) -> None:
    output, leftover = converse(started(), [option(number, data) + go("vol")])
    assert replies(output)[0][:2] == (number, OptionReply.ERR_INVALID)
    assert leftover == b""


def test_longest_name_is_served() -> None:
    handshake = started()
    handshake.receive(go("x" * 4096))
    assert handshake.next_event() == OpenRequested("x" * 4096)


def broken(handshake: Handshake, data: bytes) -> str:
    """The kind of the protocol error that data is answered with."""
    handshake.receive(data)
    with pytest.raises(ProtocolError) as caught:
        while (event := handshake.next_event()) is not None:
            answer(handshake, event)
    return caught.value.kind


def test_unknown_client_flags_end_the_connection() -> None:
    for bit in range(2, 32):
        assert broken(Handshake(), wire.CLIENT_FLAGS.pack(3 | 1 << bit)) == "unknown client flags"


def test_wrong_option_magic_ends_the_connection() -> None:
    data = wire.OPTION_HEADER.pack(wire.OPTION_MAGIC ^ 1, Option.LIST, 0)
    assert broken(started(), data) == "wrong option magic"


@pytest.mark.parametrize("length", [(64 << 10) + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_too_long_an_option_ends_the_connection_before_its_data(length: int) -> None:
    data = wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, Option.GO, length)
    assert broken(started(), data) == "option data too long"


@pytest.mark.parametrize("name", [b"v\0l", b"v\xffl", b"x" * 4097])
def test_invalid_export_name_ends_the_connection(name: bytes) -> None:
    data = option(Option.EXPORT_NAME, name)
    assert broken(started(), data) == "invalid export name in EXPORT_NAME"


@pytest.mark.parametrize("number", [2, 3, 5, 6, 7, 8, 99])
def test_client_without_fixed_newstyle_gets_export_name_only(number: int) -> None:
    handshake = started(wire.CLIENT_FLAGS.pack(2))
    assert broken(handshake, option(number)) == "option without FIXED_NEWSTYLE"


def test_options_are_counted() -> None:
    handshake = started(limits=NbdLimits(options_max=3))
    assert broken(handshake, option(99) * 4) == "too many options"
    assert len(replies(handshake.take_output())) == 3


def test_a_list_buys_options_for_each_export_once() -> None:
    limits = NbdLimits(options_max=3, options_per_listed_export=2)
    handshake = started(limits=limits)
    assert broken(handshake, option(Option.LIST) * 100) == "too many options"
    acks = [kind for _, kind, _ in replies(handshake.take_output()) if kind == OptionReply.ACK]
    assert len(acks) == 3 + 2 * 2


def test_answers_out_of_order_are_our_mistake() -> None:
    handshake = started()
    mistakes: list[Callable[[], object]] = [
        lambda: handshake.answer_open(VOLUME),
        lambda: handshake.answer_list([]),
        lambda: handshake.refuse("unknown", ""),
    ]
    for mistake in mistakes:
        with pytest.raises(AssertionError):
            mistake()
    handshake.receive(option(Option.LIST) + go("vol"))
    handshake.next_event()
    for mistake in (handshake.next_event, lambda: handshake.receive(b""), mistakes[0]):
        with pytest.raises(AssertionError):
            mistake()


CONVERSATIONS = {
    "go": FIXED + go("vol", 0, 1, 2, 3) + b"\x25\x60\x95\x13request",
    "info, then go": FIXED + go("ro", 3, number=Option.INFO) + go("ro", 1),
    "list, refused, go": FIXED + option(Option.LIST) + go("nope") + go("vol") + b"rest",
    "export name": wire.CLIENT_FLAGS.pack(1) + option(Option.EXPORT_NAME, b"vol") + b"rest",
    "old export name": wire.CLIENT_FLAGS.pack(0) + option(Option.EXPORT_NAME, b"ro"),
    "unsupported, go": FIXED + option(8) + option(10, b"x" * 9) + option(3, b"x") + go("vol"),
    "malformed, abort": FIXED + option(7, b"\0\0\0\3vol") + option(2, b"bye"),
}


@pytest.mark.parametrize("stream", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_every_message_split_at_every_byte(stream: bytes) -> None:
    expected = converse(Handshake(), [stream])
    assert len(expected[0]) > 18
    for cut in range(1, len(stream)):
        assert converse(Handshake(), [stream[:cut], stream[cut:]]) == expected
    assert converse(Handshake(), [stream[n : n + 1] for n in range(len(stream))]) == expected


STRAY = st.one_of(
    st.binary(max_size=40),
    st.builds(option, st.integers(0, 12), st.binary(max_size=30)),
    st.builds(option, st.integers(0, 0xFFFFFFFF)),
    st.builds(
        lambda name, kinds, number: go(name, *kinds, number=number),
        st.sampled_from(["vol", "ro", "", "nope", "ü"]),
        st.lists(st.integers(0, 5), max_size=4),
        st.sampled_from([Option.GO, Option.INFO]),
    ),
    st.builds(lambda name: option(Option.EXPORT_NAME, name), st.binary(max_size=6)),
    st.builds(
        lambda number, length: wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, number, length),
        st.integers(0, 12),
        st.integers(0, 0xFFFFFFFF),
    ),
)


@settings(max_examples=500, deadline=None)
@given(
    flags=st.sampled_from([b"\0\0\0\3"] * 5 + [b"\0\0\0\1", b"\0\0\0\0", b"\1\0\0\3"]),
    messages=st.lists(STRAY, max_size=12),
    cuts=st.lists(st.integers(1, 50), max_size=20),
)
def test_any_stream_is_answered_or_ends_in_a_protocol_error(
    flags: bytes, messages: list[bytes], cuts: list[int]
) -> None:
    stream = flags + b"".join(messages)
    pieces = []
    for cut in cuts:
        pieces.append(stream[:cut])
        stream = stream[cut:]
    pieces.append(stream)
    handshake = Handshake()
    try:
        output, leftover = converse(handshake, [piece for piece in pieces if piece])
    except ProtocolError:
        return
    if leftover is not None:
        assert len(output) > 18
    else:
        replies(output[18:])  # well-formed to the last byte


@settings(max_examples=20, deadline=None)
@given(number=st.integers(0, 12), length=st.integers(0, 0xFFFFFFFF), byte=st.integers(0, 255))
def test_endless_input_is_held_to_its_limit(number: int, length: int, byte: int) -> None:
    limits = NbdLimits()
    handshake = started(limits=limits)
    data = wire.OPTION_HEADER.pack(wire.OPTION_MAGIC, number, length)
    filler = bytes([byte]) * limits.receive_bytes
    try:
        for _ in range(20):
            handshake.receive(data)
            assert len(handshake._received) <= limits.buffered_bytes_max
            while (event := handshake.next_event()) is not None:
                if isinstance(event, Ended) or answer(handshake, event) is not None:
                    return
            assert len(handshake.take_output()) < 1 << 16
            data = filler
    except ProtocolError:
        return
    raise AssertionError("more than a megabyte of option data was swallowed")
