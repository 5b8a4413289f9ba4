"""Guests' connections that outlive this process: what the next one needs to go on with each.

Rules: a connection is given away only between two requests, with everything before answered, and
is in one process at a time: whoever passes it on has no engine any more that reads from it.

Happy path: CacheDaemon.give_back(), stop(), take_kept() -> Kept, one each -> encode(), and the
descriptors, to whoever keeps them (systemd) -> decode() in the next process -> inherit(kept).
Failure modes: bytes that are not ours, or of another version: HandoverError; the connections are
closed then, and guests connect again, as after a crash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from millpond.cache.errors import CacheError
from millpond.cache.exports import Agreed

VERSION = 1


class HandoverError(CacheError):
    """What was passed on cannot be used."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A connection between two requests."""

    fd: int  # whoever holds this owns it
    volume: bytes  # its id
    agreed: Agreed
    received: bytes  # read from the socket behind the last request
    tag: str = ""  # of whoever connected it: a kernel device, or nobody in particular


class _Version(msgspec.Struct, frozen=True):
    """What every version has."""

    version: int


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of them, on its way."""

    name: str  # of the descriptor
    volume: str
    structured: bool
    allocation: bool
    read_only: bool
    received: bytes
    tag: str


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    cache: str  # id: a connection goes on with this cache's log and no other
    connections: list[_Entry]


def encode(cache_id: bytes, named: Mapping[str, Kept]) -> bytes:
    """All of them but the descriptors, which travel beside it under these names."""
    entries = [
        _Entry(
            name=name,
            volume=kept.volume.hex(),
            structured=kept.agreed.structured,
            allocation=kept.agreed.allocation,
            read_only=kept.agreed.read_only,
            received=kept.received,
            tag=kept.tag,
        )
        for name, kept in named.items()
    ]
    return msgspec.json.encode(_State(VERSION, cache_id.hex(), entries))


def decode(data: bytes, cache_id: bytes, descriptors: Mapping[str, int]) -> Sequence[Kept]:
    """Those whose descriptors came too.  HandoverError."""
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != VERSION:
            raise HandoverError(f"connections were kept in version {version}, not {VERSION}")
        state = msgspec.json.decode(data, type=_State)
        if state.cache != cache_id.hex():
            raise HandoverError(f"connections were kept for the cache {state.cache}, not this one")
        return [
            Kept(
                fd=descriptors[entry.name],
                volume=bytes.fromhex(entry.volume),
                agreed=Agreed(
                    structured=entry.structured,
                    allocation=entry.allocation,
                    read_only=entry.read_only,
                ),
                received=entry.received,
                tag=entry.tag,
            )
            for entry in state.connections
            if entry.name in descriptors
        ]
    except (msgspec.DecodeError, ValueError) as error:
        raise HandoverError(f"kept connections cannot be read: {error}") from None
