"""Expected failures of this room.

What a peer did wrong and what is wrong on this machine have one class each, because a caller
treats them differently: the first ends one connection, the second stops the start of a server.
What *we* did wrong is an assertion, never one of these.
"""


class NbdError(Exception):
    """Root of the expected failures here; its text is one line for a person."""


class ProtocolError(NbdError):
    """The client broke the protocol so that only a disconnect is left.

    kind: a short constant phrase, the key under which it is counted and logged once.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class ListenError(NbdError):
    """A listening socket cannot be set up; the text says which, why, and what to do."""
