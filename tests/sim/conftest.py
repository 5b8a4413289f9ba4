"""What tests of one engine share."""

from collections.abc import Iterator

import pytest

from sim.rig import VOLUME, Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A cache and a store with an open volume."""
    rig = Rig()
    rig.start()
    rig.open(VOLUME)
    yield rig
    rig.close()
