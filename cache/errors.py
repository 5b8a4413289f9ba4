"""Errors of the cache room, and how anything from outside becomes one log line.

A class of its own exists only where a caller handles it differently.  Every message is one line:
what happened, to which volume, what to do.
"""


class CacheError(Exception):
    """An expected failure; str() is the line for the operator."""


class VolumeRefused(CacheError):
    """This volume cannot be served here; others can.  The state is shown in status."""


class VolumeFenced(VolumeRefused):
    """Another cache took the volume over: nothing of ours is shipped or served any more."""


class VolumeUnknown(VolumeRefused):
    """The store has no such volume; it is never taken for an empty one."""


class VolumeBusy(CacheError):
    """Another cache holds the volume, or somebody here the device; it may become free."""


class UnderWay(VolumeBusy):
    """The same is being done here already; that is over soon."""


class StoreAway(CacheError):
    """The store cannot be reached now; the same call later may succeed."""


class AlreadyThere(CacheError):
    """What was asked for exists already."""


class NotPermitted(CacheError):
    """This process lacks a right that it needs; the message says which."""


class CacheAway(CacheError):
    """No cache answers at a control socket."""


def escaped(text: str) -> str:
    """A name from outside as logfmt: quoted when needed, control characters escaped, bounded."""
    bounded = text if len(text) <= 256 else text[:253] + "..."
    safe = "".join(_escaped_char(char) for char in bounded)
    return f'"{safe}"' if not safe or any(char in ' ="' for char in safe) else safe


def _escaped_char(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else char.encode("unicode_escape").decode()
