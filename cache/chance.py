"""The control plane's one door to randomness: identities that must never repeat by accident.

`Chance` takes its source so that a simulation can pass a seeded one; the real source is the
kernel's, through `secrets`.
"""

import secrets
from collections.abc import Callable


class Chance:
    """New identities, from one source of random bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._token_bytes = token_bytes

    def new_lineage(self) -> int:
        """A lineage id: 64 random bits, never 0 (0 is "none" in every format)."""
        while True:
            lineage = int.from_bytes(self._token_bytes(8), "little")
            if lineage != 0:
                return lineage

    def new_id(self) -> bytes:
        """A 128-bit id (cache, client), never all zero."""
        while True:
            identity = self._token_bytes(16)
            if any(identity):
                return identity
