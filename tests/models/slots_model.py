"""The slot table as a person would write it: one dictionary per slot, every rule spelled out.

It does not choose victims.  It says what may happen and checks what did: the table under test
tells which slot it took, and the model follows if that was allowed.
"""

from dataclasses import dataclass, field

PINS_BUSY = 192


def kept(checksum: int) -> int:
    """What a slot keeps of a block's checksum: 31 bits, of which 0 to 3 mean something else."""
    return 0 if checksum == 0 else max(checksum % 2**31, 4)


@dataclass
class Block:
    """What is known of one block of a slot."""

    checksum: int | None = None  # None: not valid
    restored: bool = False
    claimed: bool = False  # someone is filling it
    stale: bool = False  # invalidated under pins


@dataclass
class Slot:
    """One slot in use."""

    origin: int
    unit: int  # block number // slot_blocks
    pins: int = 0
    blocks: dict[int, Block] = field(default_factory=dict)

    def valid_blocks(self) -> dict[int, Block]:
        """The blocks that may be served, by number."""
        return {n: b for n, b in self.blocks.items() if b.checksum is not None}


class SlotsModel:
    """Follows a table of slot_count slots of slot_blocks blocks."""

    def __init__(self, slot_count: int, slot_blocks: int) -> None:
        self.slot_count = slot_count
        self.slot_blocks = slot_blocks
        self.slots: dict[int, Slot] = {}

    def slot_of(self, origin: int, block: int) -> int | None:
        """Index of the slot that belongs to this block, valid or not."""
        wanted = (origin, block // self.slot_blocks)
        for index, slot in self.slots.items():
            if (slot.origin, slot.unit) == wanted:
                return index
        return None

    def find(self, origin: int, block: int) -> tuple[int, int, bool] | None:
        """(slot, checksum, restored) of a block that may be served."""
        index = self.slot_of(origin, block)
        if index is None:
            return None
        slot = self.slots[index]
        entry = slot.blocks.get(block)
        if entry is None or entry.checksum is None or slot.pins >= PINS_BUSY:
            return None
        return index, entry.checksum, entry.restored

    def reserve(self, origin: int, block: int, got: int) -> None:
        """Check the table's answer to a reserve and follow it."""
        index = self.slot_of(origin, block)
        if index is not None:
            slot = self.slots[index]
            entry = slot.blocks.get(block, Block())
            free = entry.checksum is None and not entry.claimed and not entry.stale
            assert got == (index if free and slot.pins < PINS_BUSY else -1)
        elif got == -1:
            assert len(self.slots) == self.slot_count, "refused although slots are free"
        else:
            assert 0 <= got < self.slot_count
            if got in self.slots:
                assert len(self.slots) == self.slot_count, "evicted although slots are free"
                assert self.slots[got].pins == 0, "evicted a pinned slot"
            self.slots[got] = Slot(origin, block // self.slot_blocks)
        if got != -1:
            slot = self.slots[got]
            slot.pins += 1
            slot.blocks.setdefault(block, Block()).claimed = True

    def install(self, index: int, block: int, checksum: int) -> None:
        """A fill is complete."""
        entry = self.slots[index].blocks.setdefault(block, Block())
        if not entry.stale:
            entry.checksum = kept(checksum)
            entry.claimed = entry.restored = False

    def pin(self, index: int) -> None:
        """One more I/O in flight."""
        self.slots[index].pins += 1

    def unpin(self, index: int) -> None:
        """One I/O less; with the last, claims end and an empty slot becomes free."""
        slot = self.slots[index]
        slot.pins -= 1
        if slot.pins == 0:
            slot.blocks = slot.valid_blocks()
            if not slot.blocks:
                del self.slots[index]

    def verified(self, index: int, block: int) -> None:
        """A restored block was read and its checksum held."""
        if block in self.slots[index].blocks:
            self.slots[index].blocks[block].restored = False

    def invalidate(self, origin: int, first_block: int, block_count: int) -> int:
        """Forget a range; returns how many blocks were valid."""
        dropped = 0
        for index, slot in list(self.slots.items()):
            base = slot.unit * self.slot_blocks
            for block in range(base, base + self.slot_blocks):
                if slot.origin != origin or not first_block <= block < first_block + block_count:
                    continue
                old = slot.blocks.pop(block, Block())
                dropped += old.checksum is not None
                if slot.pins > 0:
                    slot.blocks[block] = Block(stale=True)
            if not slot.blocks and slot.pins == 0:
                del self.slots[index]
        return dropped

    def restart(self) -> None:
        """What a new table knows after save and load."""
        for index, slot in list(self.slots.items()):
            slot.pins = 0
            slot.blocks = {
                n: Block(checksum=b.checksum, restored=True) for n, b in slot.valid_blocks().items()
            }
            if not slot.blocks:
                del self.slots[index]
