"""Constants and fixed structs of the NBD protocol (doc/proto.md of 2025-05-31).  No logic.

Everything is big endian.  The sizes at the end are asserted, because a format string with one
letter too few still packs.  The C engine has its own copy of the transmission half; what both
use (magics, commands, flags, errors) is compared over a real socket by tests/hostile.
"""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

GREETING_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF


class HandshakeFlag(IntFlag):
    """Of the server's greeting (16 bits) and of the client's answer (32 bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export offers: 16 bits behind its size."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(IntEnum):
    """What a client may ask for while it negotiates."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """Answers to an option; those with bit 31 are errors and may carry a message in UTF-8."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


class Info(IntEnum):
    """Kinds of information in answers to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(IntFlag):
    """Flags of a request; FUA is valid on every command, the others on one each."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk(IntEnum):
    """Types of structured reply chunks; those with bit 15 are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


class Allocation(IntFlag):
    """Of a descriptor of base:allocation; 0, data, is always a safe answer."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class Error(IntEnum):
    """The only error numbers that may go on the wire."""

    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


GREETING: Final = Struct(">QQH")  # magic, option magic, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION_HEADER: Final = Struct(">QII")  # magic, option, data length
OPTION_REPLY_HEADER: Final = Struct(">QIII")  # magic, option, reply, data length
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags; then the zeroes
NAME_LENGTH: Final = Struct(">I")  # before each string of LIST, INFO and GO
INFO_COUNT: Final = Struct(">H")  # in INFO and GO: how many info kinds follow, 16 bits each
INFO_EXPORT: Final = Struct(">HQH")  # kind, size, transmission flags
INFO_KIND: Final = Struct(">H")  # before the string of NAME and DESCRIPTION
INFO_BLOCK_SIZE: Final = Struct(">HIII")  # kind, minimum, preferred, maximal payload
CONTEXT_ID: Final = Struct(">I")  # before the name of a context
QUERY_COUNT: Final = Struct(">I")  # behind the export's name in LIST_ and SET_META_CONTEXT
REQUEST: Final = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = Struct(">IHHQI")  # magic, flags, type, cookie, length
CHUNK_OFFSET: Final = Struct(">Q")  # in OFFSET_DATA, before the data
CHUNK_HOLE: Final = Struct(">QI")  # offset, length
CHUNK_ERROR: Final = Struct(">IH")  # error, length of the message
CHUNK_DONE: Final = 1  # flag: the last chunk of a reply
STATUS_DESCRIPTOR: Final = Struct(">II")  # length, enum Allocation; behind the context's id

BASE_NAMESPACE: Final = "base:"
ALLOCATION_CONTEXT: Final = "base:allocation"
ALLOCATION_CONTEXT_ID: Final = 1  # the engine answers with it
EXPORT_NAME_ZEROES: Final = bytes(124)  # behind EXPORT_NAME_REPLY unless NO_ZEROES was agreed
STRING_BYTES_MAX: Final = 4096  # of every string on the wire: a MUST of the protocol

assert GREETING.size == 18
assert CLIENT_FLAGS.size == 4
assert OPTION_HEADER.size == 16
assert OPTION_REPLY_HEADER.size == 20
assert EXPORT_NAME_REPLY.size == 10
assert INFO_EXPORT.size == 12
assert INFO_BLOCK_SIZE.size == 14
assert REQUEST.size == 28
assert SIMPLE_REPLY.size == 16
assert CHUNK.size == 20
