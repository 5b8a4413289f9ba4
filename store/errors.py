"""Errors of the store room: one tree, each with a code that both ends of the wire know.

Rules: the message is one line, says what happened, to which volume, and what to do. A class of
its own exists only where a caller handles it differently; everything else is StoreError + code.
"""

from enum import StrEnum


class Code(StrEnum):
    """What went wrong, as it travels in control replies (and E_UNREACHABLE.., local only)."""

    NOT_FOUND = "E_NOT_FOUND"
    EXISTS = "E_EXISTS"
    BUSY = "E_BUSY"
    EPOCH = "E_EPOCH"
    DIRTY = "E_DIRTY"
    INVALID = "E_INVALID"
    IO = "E_IO"
    FULL = "E_FULL"
    UNREACHABLE = "E_UNREACHABLE"  # no answer: the operation may or may not have happened
    PERMISSION = "E_PERMISSION"
    PROTOCOL = "E_PROTOCOL"  # the peer broke the protocol


class StoreError(Exception):
    """An expected failure. `str()` is the line for people, `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ProtocolError(StoreError):
    """The peer broke the protocol; the connection ends after the reply that says so."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.PROTOCOL, message)


class Unreachable(StoreError):
    """The connection could not be made, or was lost. Retrying may help."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.UNREACHABLE, message)


def one_line(text: str, *, limit: int = 400) -> str:
    """Text from outside, made safe for one log line: control characters escaped, cut at limit."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."
