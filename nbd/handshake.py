"""Fixed newstyle negotiation without I/O: bytes in, events and bytes out.

Rules: one event at a time, and nothing is parsed behind it before it is answered.  An option's
data is complete before anything is replied to it, so that two sides that both write cannot wait
for each other.  What a client may not have (TLS, extended headers, ...) is refused by reply,
never by silence; what cannot be answered is a ProtocolError, after which only closing is left.

Happy path:
    take_output() -> greeting; receive(bytes); next_event() -> DescribeRequested, ListRequested,
    OpenRequested; answer_...(); take_output() -> reply; ...; after answer_open() the bytes that it
    returns belong to the transmission phase.
Failure modes:
    a refused option          -> error reply, the negotiation goes on
    a refused EXPORT_NAME     -> Ended: that option knows no error reply
    ABORT                     -> ACK, Ended
    broken framing, limits    -> ProtocolError from next_event
    calls out of order        -> AssertionError: that is our mistake, not the client's
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from millpond.cache.exports import Agreed, Export
from millpond.nbd import wire
from millpond.nbd.errors import ProtocolError
from millpond.nbd.limits import (
    BLOCK_BYTES_MIN,
    BLOCK_BYTES_PREFERRED,
    PAYLOAD_BYTES_MAX,
    NbdLimits,
)
from millpond.nbd.wire import HandshakeFlag, Info, Option, OptionReply, TransmissionFlag

_SERVER_FLAGS: Final = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


@dataclass(frozen=True)
class ListRequested:
    """Answer with answer_list or refuse."""


@dataclass(frozen=True)
class DescribeRequested:
    """INFO: answer with answer_describe or refuse; open nothing."""

    name: str


@dataclass(frozen=True)
class OpenRequested:
    """GO or EXPORT_NAME: answer with answer_open or refuse."""

    name: str


@dataclass(frozen=True)
class ContextsRequested:
    """LIST_META_CONTEXT or SET_META_CONTEXT: answer with answer_contexts or refuse."""

    name: str


@dataclass(frozen=True)
class Ended:
    """The negotiation is over without an export; close after sending what is left."""

    reason: str


Event = ListRequested | DescribeRequested | OpenRequested | ContextsRequested | Ended
RefusalCode = Literal["unknown", "policy", "platform", "shutdown"]

_REFUSALS: Final[dict[RefusalCode, OptionReply]] = {
    "unknown": OptionReply.ERR_UNKNOWN,
    "policy": OptionReply.ERR_POLICY,
    "platform": OptionReply.ERR_PLATFORM,
    "shutdown": OptionReply.ERR_SHUTDOWN,
}


def transmission_flags(export: Export, *, structured: bool = False) -> TransmissionFlag:
    """What the engine serves for this export; it answers EINVAL to everything else.

    CAN_MULTI_CONN: a flush covers all connections of a volume, whichever it arrives on.
    DF only makes sense, and is only allowed, where replies are structured.
    """
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.CAN_MULTI_CONN
        | TransmissionFlag.SEND_CACHE
    )
    if structured:
        flags |= TransmissionFlag.SEND_DF
    if export.read_only:
        return flags | TransmissionFlag.READ_ONLY
    return (
        flags
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_FAST_ZERO
    )


class _InvalidOption(Exception):
    """The option's data is wrong, its framing is not: answer ERR_INVALID and go on."""


@dataclass(frozen=True)
class _Pending:
    """The option whose event has no answer yet."""

    option: int
    infos: frozenset[int] = frozenset()
    name: str = ""
    contexts: tuple[str, ...] = ()


class Handshake:
    """One negotiation, from the greeting to the transmission phase."""

    def __init__(self, limits: NbdLimits | None = None) -> None:
        self._limits = limits or NbdLimits()
        self._received = bytearray()
        self._output = bytearray(
            wire.GREETING.pack(wire.GREETING_MAGIC, wire.OPTION_MAGIC, _SERVER_FLAGS)
        )
        self._client_flags: HandshakeFlag | None = None
        self._pending: _Pending | None = None
        self._event: Event | None = None
        self._ended: Ended | None = None
        self._finished = False
        self._options_left = self._limits.options_max
        self._listed_exports = 0
        self._structured = False
        self._allocation_of: str | None = None  # the export that base:allocation was selected for
        self._agreed: Agreed | None = None

    # What the caller does with bytes.

    def receive(self, data: bytes) -> None:
        """Take bytes that arrived; only while no event waits for its answer."""
        assert self._pending is None and self._ended is None and not self._finished
        self._received += data
        assert len(self._received) <= self._limits.buffered_bytes_max

    def take_output(self) -> bytes:
        """Bytes to send now."""
        output = bytes(self._output)
        self._output.clear()
        return output

    @property
    def idle(self) -> bool:
        """Between two options: an end of the stream here is rude but harmless."""
        return not self._received and self._pending is None

    def next_event(self) -> Event | None:
        """The next thing to answer; None: more bytes are needed.  Raises ProtocolError."""
        assert self._pending is None and not self._finished
        while self._ended is None and self._step():
            if self._event is not None:
                event, self._event = self._event, None
                return event
        return self._ended

    # What the caller answers to an event.

    def answer_list(self, names: Iterable[str]) -> None:
        """One SERVER reply per export, then ACK."""
        option = self._answering(Option.LIST)
        count = 0
        for name in names:
            encoded = _own_string(name)
            self._reply(option, OptionReply.SERVER, wire.NAME_LENGTH.pack(len(encoded)) + encoded)
            count += 1
        self._reply(option, OptionReply.ACK)
        # By the longest list, not per LIST: repeating it must not buy more options for ever.
        if count > self._listed_exports:
            per_export = self._limits.options_per_listed_export
            self._options_left += (count - self._listed_exports) * per_export
            self._listed_exports = count

    def answer_describe(self, export: Export) -> None:
        """The information that INFO asked for, then ACK."""
        assert self._pending is not None
        infos = self._pending.infos
        self._describe(self._answering(Option.INFO), infos, export)

    def answer_contexts(self) -> None:
        """The export exists: the contexts that were asked for and that we have, then ACK."""
        assert self._pending is not None
        name, contexts = self._pending.name, self._pending.contexts
        option = self._answering(Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT)
        selecting = option == Option.SET_META_CONTEXT
        for context in contexts:
            number = wire.ALLOCATION_CONTEXT_ID if selecting else 0
            data = wire.CONTEXT_ID.pack(number) + context.encode()
            self._reply(option, OptionReply.META_CONTEXT, data)
        if selecting and contexts:
            self._allocation_of = name
        self._reply(option, OptionReply.ACK)

    @property
    def agreed(self) -> Agreed:
        """What the transmission phase goes by, once answer_open was called."""
        assert self._agreed is not None
        return self._agreed

    def answer_open(self, export: Export) -> bytes:
        """The export is open.  Returns the bytes received behind the last option."""
        assert self._pending is not None
        assert self._client_flags is not None
        infos, name = self._pending.infos, self._pending.name
        self._agreed = Agreed(
            structured=self._structured,
            # Contexts count only for the export, by the very name, that they were selected for.
            allocation=self._structured and self._allocation_of == name,
        )
        option = self._answering(Option.GO, Option.EXPORT_NAME)
        if option == Option.GO:
            self._describe(option, infos, export)
        else:
            flags = transmission_flags(export, structured=self._structured)
            self._output += wire.EXPORT_NAME_REPLY.pack(export.size_bytes, flags)
            if HandshakeFlag.NO_ZEROES not in self._client_flags:
                self._output += wire.EXPORT_NAME_ZEROES
        self._finished = True
        leftover = bytes(self._received)
        self._received.clear()
        return leftover

    def refuse(self, code: RefusalCode, message: str) -> None:
        """The event cannot be granted; the client may ask for something else."""
        option = self._answering(
            Option.LIST,
            Option.INFO,
            Option.GO,
            Option.EXPORT_NAME,
            Option.LIST_META_CONTEXT,
            Option.SET_META_CONTEXT,
        )
        if option == Option.EXPORT_NAME:
            self._ended = Ended("refused an export asked for by EXPORT_NAME")
        else:
            self._refuse(option, _REFUSALS[code], message)

    # Parsing.  A step consumes one whole message or nothing.

    def _step(self) -> bool:
        """Consume one message if it is complete."""
        if self._client_flags is None:
            return self._step_client_flags()
        header = wire.OPTION_HEADER
        if len(self._received) < header.size:
            return False
        magic, option, length_bytes = header.unpack_from(self._received)
        if magic != wire.OPTION_MAGIC:
            raise ProtocolError("wrong option magic", f"{magic:#x}")
        if length_bytes > self._limits.option_data_bytes_max:
            raise ProtocolError("option data too long", f"{length_bytes} bytes, option {option}")
        if HandshakeFlag.FIXED_NEWSTYLE not in self._client_flags and option != Option.EXPORT_NAME:
            raise ProtocolError("option without FIXED_NEWSTYLE", f"option {option}")
        if self._options_left == 0:
            raise ProtocolError("too many options")
        if len(self._received) < header.size + length_bytes:
            return False
        data = bytes(self._received[header.size : header.size + length_bytes])
        del self._received[: header.size + length_bytes]
        self._options_left -= 1
        self._option(option, data)
        return True

    def _step_client_flags(self) -> bool:
        """The client's four bytes: an unknown or un-offered bit must end the connection."""
        if len(self._received) < wire.CLIENT_FLAGS.size:
            return False
        (bits,) = wire.CLIENT_FLAGS.unpack_from(self._received)
        if bits & ~int(_SERVER_FLAGS):
            raise ProtocolError("unknown client flags", f"{bits:#x}")
        del self._received[: wire.CLIENT_FLAGS.size]
        self._client_flags = HandshakeFlag(bits)
        return True

    def _option(self, option: int, data: bytes) -> None:
        """Answer one option, or leave its event for the caller to answer."""
        try:
            if option == Option.EXPORT_NAME:
                name = _name(data)
                self._ask(_Pending(option, name=name), OpenRequested(name))
            elif option == Option.ABORT:
                self._reply(option, OptionReply.ACK)
                self._ended = Ended("the client aborted")
            elif option == Option.LIST:
                if data:
                    raise _InvalidOption("LIST takes no data")
                self._ask(_Pending(option), ListRequested())
            elif option in (Option.INFO, Option.GO):
                name, infos = _name_and_infos(data)
                event = OpenRequested(name) if option == Option.GO else DescribeRequested(name)
                self._ask(_Pending(option, infos, name), event)
            elif option == Option.STRUCTURED_REPLY:
                self._agree_on_structured(data)
            elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
                self._ask_contexts(option, data)
            else:
                self._refuse(option, OptionReply.ERR_UNSUP, f"option {option} is not supported")
        except _InvalidOption as error:
            if option == Option.EXPORT_NAME:
                raise ProtocolError("invalid export name in EXPORT_NAME", str(error)) from None
            self._refuse(option, OptionReply.ERR_INVALID, str(error))

    def _agree_on_structured(self, data: bytes) -> None:
        if data:
            raise _InvalidOption("STRUCTURED_REPLY takes no data")
        if self._structured:
            raise _InvalidOption("structured replies were negotiated before")
        self._structured = True
        self._reply(Option.STRUCTURED_REPLY, OptionReply.ACK)

    def _ask_contexts(self, option: int, data: bytes) -> None:
        """A SET that fails, for whatever reason, leaves nothing selected."""
        selecting = option == Option.SET_META_CONTEXT
        if selecting:
            self._allocation_of = None
            if not self._structured:
                raise _InvalidOption("SET_META_CONTEXT needs structured replies first")
        name, queries = _name_and_queries(data)
        everything = not selecting and (not queries or wire.BASE_NAMESPACE in queries)
        found = everything or wire.ALLOCATION_CONTEXT in queries
        contexts = (wire.ALLOCATION_CONTEXT,) if found else ()
        self._ask(_Pending(option, name=name, contexts=contexts), ContextsRequested(name))

    def _ask(self, pending: _Pending, event: Event) -> None:
        self._pending = pending
        self._event = event

    def _answering(self, *options: Option) -> int:
        """The caller answers: the pending option, which must be one of these."""
        assert self._pending is not None and self._pending.option in options
        option, self._pending = self._pending.option, None
        return option

    # Replies.

    def _describe(self, option: int, infos: frozenset[int], export: Export) -> None:
        """EXPORT even if not asked for, the rest if asked for; unknown kinds are ignored."""
        if Info.NAME in infos:
            kind = wire.INFO_KIND.pack(Info.NAME)
            self._reply(option, OptionReply.INFO, kind + _own_string(export.name))
        if Info.DESCRIPTION in infos and export.description:
            kind = wire.INFO_KIND.pack(Info.DESCRIPTION)
            self._reply(option, OptionReply.INFO, kind + _cut_string(export.description))
        if Info.BLOCK_SIZE in infos:
            sizes = (BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX)
            block_size = wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes)
            self._reply(option, OptionReply.INFO, block_size)
        flags = transmission_flags(export, structured=self._structured)
        size = wire.INFO_EXPORT.pack(Info.EXPORT, export.size_bytes, flags)
        self._reply(option, OptionReply.INFO, size)
        self._reply(option, OptionReply.ACK)

    def _refuse(self, option: int, reply: OptionReply, message: str) -> None:
        self._reply(option, reply, _cut_string(message))

    def _reply(self, option: int, reply: OptionReply, data: bytes = b"") -> None:
        header = wire.OPTION_REPLY_HEADER
        self._output += header.pack(wire.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def _name(encoded: bytes) -> str:
    """An export name from outside.  Raises _InvalidOption."""
    if len(encoded) > wire.STRING_BYTES_MAX:
        raise _InvalidOption(f"the export name is longer than {wire.STRING_BYTES_MAX} bytes")
    if b"\0" in encoded:
        raise _InvalidOption("the export name contains a NUL")
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        raise _InvalidOption("the export name is not UTF-8") from None


def _name_and_infos(data: bytes) -> tuple[str, frozenset[int]]:
    """The data of INFO and GO: name length, name, count of kinds, kinds.  Raises _InvalidOption."""
    lengths = wire.NAME_LENGTH.size + wire.INFO_COUNT.size
    if len(data) < lengths:
        raise _InvalidOption("the option's data is too short")
    (name_bytes,) = wire.NAME_LENGTH.unpack_from(data)
    if name_bytes > len(data) - lengths:
        raise _InvalidOption("the export name is longer than the option")
    name_end = wire.NAME_LENGTH.size + name_bytes
    (count,) = wire.INFO_COUNT.unpack_from(data, name_end)
    kinds = data[name_end + wire.INFO_COUNT.size :]
    if len(kinds) != count * wire.INFO_KIND.size:
        raise _InvalidOption("the count of information requests does not match the option's length")
    name = _name(data[wire.NAME_LENGTH.size : name_end])
    return name, frozenset(kind for (kind,) in wire.INFO_KIND.iter_unpack(kinds))


def _name_and_queries(data: bytes) -> tuple[str, set[str]]:
    """The data of LIST_ and SET_META_CONTEXT: name, count, queries.  Raises _InvalidOption.

    Queries that name no context of ours, in whatever namespace, are ignored.
    """
    name_encoded, at = _counted(data, 0, "export name")
    if len(data) - at < wire.QUERY_COUNT.size:
        raise _InvalidOption("the option's data is too short")
    (count,) = wire.QUERY_COUNT.unpack_from(data, at)
    at += wire.QUERY_COUNT.size
    queries = set()
    while count and at < len(data):
        query, at = _counted(data, at, "query")
        if len(query) > wire.STRING_BYTES_MAX:
            raise _InvalidOption(f"a query is longer than {wire.STRING_BYTES_MAX} bytes")
        queries.add(query.decode("utf-8", "replace"))
        count -= 1
    if count or at != len(data):
        raise _InvalidOption("the count of queries does not match the option's length")
    return _name(name_encoded), queries


def _counted(data: bytes, at: int, what: str) -> tuple[bytes, int]:
    """A length and so many bytes, and where the next field is.  Raises _InvalidOption."""
    if len(data) - at < wire.NAME_LENGTH.size:
        raise _InvalidOption("the option's data is too short")
    (length_bytes,) = wire.NAME_LENGTH.unpack_from(data, at)
    at += wire.NAME_LENGTH.size
    if length_bytes > len(data) - at:
        raise _InvalidOption(f"the {what} is longer than the option")
    return data[at : at + length_bytes], at + length_bytes


def _own_string(text: str) -> bytes:
    """A name of ours for the wire: too long a one should never have been accepted."""
    encoded = text.encode("utf-8")
    assert len(encoded) <= wire.STRING_BYTES_MAX and b"\0" not in encoded
    return encoded


def _cut_string(text: str) -> bytes:
    """A text of ours for the wire, cut where the protocol's limit is, at a whole character."""
    encoded = text.replace("\0", "").encode("utf-8", "replace")[: wire.STRING_BYTES_MAX]
    return encoded.decode("utf-8", "ignore").encode("utf-8")
