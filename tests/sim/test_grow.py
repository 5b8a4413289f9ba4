"""A volume grows twice while it is written; the world is cut after every Nth I/O of its cache.

What was flushed is there afterwards, behind the old ends too, and everything ships.
"""

import pytest

from millpond.native.drivers import SimOptions
from sim.nodes import MIB
from sim.oracle import Illegal
from sim.rig import Rig

ONE = b"one volume ....!"
SIZES = (MIB, 2 * MIB, 3 * MIB)
CUTS_MAX = 500  # the history has far fewer


class History:
    """What the guest wrote, and what a flush has promised it."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.written: dict[int, set[int]] = {}  # block: every token it was given
        self.flushed: dict[int, int] = {}

    def write(self, guest: int, block: int, token: int) -> None:
        self.written.setdefault(block, set()).add(token)
        self.rig.write(guest, block, token)
        self.rig.flush(guest)
        self.flushed[block] = token

    def play(self) -> None:
        """Grow, write behind the old end, ship, grow again, write everywhere."""
        rig = self.rig
        guest = rig.connect(ONE)
        self.write(guest, 10, 1)
        guest = self.grow(SIZES[1])
        self.write(guest, 300, 2)
        rig.ship(ONE)
        self.write(guest, 301, 3)
        guest = self.grow(SIZES[2])
        self.write(guest, 600, 4)
        self.write(guest, 300, 5)
        self.write(guest, 10, 6)

    def grow(self, size_bytes: int) -> int:
        """As a new connection does: the store has grown, the engine hears of it."""
        epoch = self.rig.epoch[ONE] - 1
        self.rig.epoch[ONE] = epoch  # put counts it up again: growing takes no epoch
        self.rig.put(ONE, size_bytes)
        self.rig.engine.grow_volume(ONE, size_bytes=size_bytes)
        return self.rig.connect(ONE)

    def check(self) -> None:
        """Open with the store's size: promises are kept, what is there was written."""
        state = self.rig.store.core.volume(ONE)
        assert state is not None
        self.rig.open(ONE, size_bytes=state.size_bytes)
        guest = self.rig.connect(ONE)
        for block, token in self.flushed.items():
            later = {each for each in self.written[block] if each > token}
            assert self.rig.read(guest, block) in {token, *later}, f"block {block}"
        self.rig.ship(ONE)
        assert not self.rig.failures
        self.rig.stop()


@pytest.mark.parametrize("loses", [False, True], ids=["crash", "power"])
def test_every_cut_of_a_volume_that_grows(loses: bool) -> None:
    for cut_after in range(1, CUTS_MAX):
        rig = Rig()
        history = History(rig)
        rig.start()
        rig.open(ONE, size_bytes=SIZES[0])
        rig.sim.set(
            SimOptions(
                seed=cut_after,
                lose_unsynced=loses,
                tear=loses,
                reorder=loses,
                crash_after_io=cut_after,
            )
        )
        try:
            history.play()
            cut = False
        except (Illegal, OSError):
            cut = True
        rig.fall(SimOptions(seed=cut_after))
        rig.start()
        history.check()
        rig.close()
        if not cut:
            assert cut_after > 10, "the history has more I/Os than that"
            return
    raise AssertionError("the history never ended")
