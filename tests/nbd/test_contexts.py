"""Structured replies and metadata contexts: what is agreed, for which export, when it is lost."""

import pytest

from millpond.nbd import wire
from millpond.nbd.handshake import Handshake
from millpond.nbd.wire import Option, OptionReply, TransmissionFlag
from nbd.test_handshake import VOLUME, converse, go, option, replies, started
from nbdclient import contexts_data

STRUCTURED = option(Option.STRUCTURED_REPLY)
ALLOCATION = "base:allocation"


def select(name: str, *queries: str) -> bytes:
    """SET_META_CONTEXT."""
    return option(Option.SET_META_CONTEXT, contexts_data(name, *queries))


def ask(name: str, *queries: str) -> bytes:
    """LIST_META_CONTEXT."""
    return option(Option.LIST_META_CONTEXT, contexts_data(name, *queries))


def agreed_after(*messages: bytes) -> tuple[bool, bool]:
    """Structured replies, base:allocation: as agreed when the messages end with GO."""
    handshake = started()
    _, leftover = converse(handshake, [b"".join(messages)])
    assert leftover == b""
    return handshake.agreed.structured, handshake.agreed.allocation


def answers(*messages: bytes) -> list[tuple[int, int, bytes]]:
    """All replies."""
    return replies(converse(started(), [b"".join(messages)])[0])


def kinds(*messages: bytes) -> list[int]:
    """The kinds of all replies."""
    return [kind for _, kind, _ in answers(*messages)]


def test_nothing_is_agreed_without_asking() -> None:
    assert agreed_after(go("vol")) == (False, False)


def test_structured_replies_bring_do_not_fragment() -> None:
    assert agreed_after(STRUCTURED, go("vol")) == (True, False)
    for messages, expected in (((), False), ((STRUCTURED,), True)):
        info = answers(*messages, go("vol"))[-2][2]
        flags = TransmissionFlag(wire.INFO_EXPORT.unpack(info)[2])
        assert (TransmissionFlag.SEND_DF in flags) is expected


def test_structured_reply_with_data_or_twice_is_invalid() -> None:
    assert kinds(option(Option.STRUCTURED_REPLY, b"x")) == [OptionReply.ERR_INVALID]
    assert kinds(STRUCTURED, STRUCTURED) == [OptionReply.ACK, OptionReply.ERR_INVALID]
    assert agreed_after(STRUCTURED, STRUCTURED, go("vol")) == (True, False)


def test_selected_context_is_agreed_for_its_export() -> None:
    name = wire.CONTEXT_ID.pack(1) + ALLOCATION.encode()
    set_option = Option.SET_META_CONTEXT
    assert answers(STRUCTURED, select("vol", ALLOCATION))[1:] == [
        (set_option, OptionReply.META_CONTEXT, name),
        (set_option, OptionReply.ACK, b""),
    ]
    assert agreed_after(STRUCTURED, select("vol", ALLOCATION), go("vol")) == (True, True)
    assert agreed_after(STRUCTURED, select("vol", ALLOCATION), go("ro")) == (True, False)
    export_name = option(Option.EXPORT_NAME, b"vol")
    assert agreed_after(STRUCTURED, select("vol", ALLOCATION), export_name) == (True, True)


def test_selecting_needs_structured_replies_listing_does_not() -> None:
    assert kinds(select("vol", ALLOCATION)) == [OptionReply.ERR_INVALID]
    assert kinds(ask("vol")) == [OptionReply.META_CONTEXT, OptionReply.ACK]


@pytest.mark.parametrize(
    "again",
    [
        select("vol"),
        select("vol", "qemu:dirty-bitmap:x"),
        select("vol", "base:"),
        select("nosuch", ALLOCATION),
        option(Option.SET_META_CONTEXT, b"broken"),
        select("vol", ALLOCATION) + select("ro", ALLOCATION),
    ],
)
def test_selection_that_fails_or_selects_something_else_clears_the_old_one(again: bytes) -> None:
    assert agreed_after(STRUCTURED, select("vol", ALLOCATION), again, go("vol")) == (True, False)


def test_listing_changes_no_selection() -> None:
    messages = (STRUCTURED, select("vol", ALLOCATION), ask("nosuch"), ask("ro"), go("vol"))
    assert agreed_after(*messages) == (True, True)


@pytest.mark.parametrize(
    ("queries", "count"),
    [
        ((), 1),
        (("base:",), 1),
        ((ALLOCATION,), 1),
        ((ALLOCATION, "base:", ALLOCATION), 1),
        (("base:alloc",), 0),
        (("qemu:",), 0),
        (("nonsense", ""), 0),
    ],
)
def test_listing_answers_namespaces_and_ignores_strangers(
    queries: tuple[str, ...], count: int
) -> None:
    name = wire.CONTEXT_ID.pack(0) + ALLOCATION.encode()
    found = answers(ask("vol", *queries))
    assert [data for _, kind, data in found if kind == OptionReply.META_CONTEXT] == [name] * count
    assert found[-1][1] == OptionReply.ACK


def test_unknown_export_is_refused() -> None:
    assert kinds(ask("nosuch")) == [OptionReply.ERR_UNKNOWN]
    assert kinds(STRUCTURED, select("nosuch", ALLOCATION))[1:] == [OptionReply.ERR_UNKNOWN]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        contexts_data("vol")[:-1],
        contexts_data("vol", ALLOCATION)[:-1],
        contexts_data("vol", ALLOCATION) + b"x",
        contexts_data("vol")[:-1] + b"\1",
        contexts_data("v\0l"),
        contexts_data("vol", "x" * 4097),
        b"\xff\xff\xff\xffvol\0\0\0\0",
        b"\0\0\0\3vol\xff\xff\xff\xff",
    ],
)
def test_malformed_data_is_invalid_and_negotiation_goes_on(data: bytes) -> None:
    for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        found = kinds(STRUCTURED, option(number, data), go("vol"))
        assert found[:2] == [OptionReply.ACK, OptionReply.ERR_INVALID]
        assert found[-1] == OptionReply.ACK


def test_every_message_split_at_every_byte() -> None:
    whole = STRUCTURED + ask("vol", "base:") + select("vol", "x:y", ALLOCATION) + go("vol", 3)
    expected = converse(started(), [whole])
    for cut in range(1, len(whole)):
        handshake = started()
        assert converse(handshake, [whole[:cut], whole[cut:]]) == expected
        assert handshake.agreed.allocation
    single = [whole[at : at + 1] for at in range(len(whole))]
    assert converse(started(), single) == expected


def test_answer_without_a_question_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        Handshake().answer_contexts()
    with pytest.raises(AssertionError):
        started().answer_open(VOLUME)
