"""What a disk may hold: a plain model of a block device with flush semantics.

A request is cut into mutations as the engine cuts it.  Mutations of overlapping blocks take effect
in the order they were sent; what was acknowledged before another was sent comes before it.  An
image is legal when it is the outcome of a set of mutations that is closed under this order: nothing
is there whose past is missing, and of one mutation there is all or nothing.  That is what "a prefix
of the log" means to someone who sees only the guest's side; with one request at a time it is exact.

Happy path: write(), zero(), acknowledge(), flushed() as the guest goes on; check_read() for what it
reads; explain() for a whole image, recovered() when a cache came back with it.
Failure modes: Illegal, with the block and the mutation.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

BLOCK = 4096
SLICE_BLOCKS = 64  # SLICE_BLOCKS of core_limits.h
ZERO = bytes(BLOCK)


class Illegal(AssertionError):
    """The device under test showed what no disk may show."""


@dataclass(slots=True, eq=False)
class Mutation:
    """One slice of a request: in the log as a whole or not at all."""

    number: int
    blocks: range
    submitted: int
    acknowledged: int | None = None
    durable: bool = False

    def __repr__(self) -> str:
        acknowledged = "not acknowledged" if self.acknowledged is None else "acknowledged"
        durable = ", flushed" if self.durable else ""
        return (
            f"mutation {self.number} of blocks {self.blocks.start} to {self.blocks.stop - 1}"
            f" ({acknowledged}{durable})"
        )


@dataclass(slots=True)
class Block:
    """All a block has held: contents[i] since mutations[i]."""

    contents: list[bytes] = field(default_factory=lambda: [ZERO])
    mutations: list[Mutation | None] = field(default_factory=lambda: [None])
    seen: int = 0  # a read has shown this version, or a newer one


@dataclass(frozen=True, slots=True)
class ReadTicket:
    """The oldest versions that a read may show, taken when it was sent."""

    offset_bytes: int
    length_bytes: int
    oldest: list[int]


def always(_: Mutation) -> bool:
    """Every mutation."""
    return True


def never(_: Mutation) -> bool:
    """None."""
    return False


def is_acknowledged(mutation: Mutation) -> bool:
    """What a crash of the daemon may not take."""
    return mutation.acknowledged is not None


def is_durable(mutation: Mutation) -> bool:
    """What a loss of power may not take."""
    return mutation.durable


class Disk:
    """The model."""

    def __init__(self, block_count: int) -> None:
        self.blocks = [Block() for _ in range(block_count)]
        self.mutations: list[Mutation] = []  # by submission; what a crash took is gone
        self.now = 0
        self._made = 0

    # -- the guest

    def write(self, offset_bytes: int, data: bytes) -> list[Mutation]:
        """A write was sent."""
        mutations, at, end = [], offset_bytes, offset_bytes + len(data)
        while at < end:
            length = min(SLICE_BLOCKS * BLOCK - at % BLOCK, end - at)
            start = at - offset_bytes
            mutations.append(self._mutate(at, data[start : start + length]))
            at += length
        return mutations

    def zero(self, offset_bytes: int, length_bytes: int) -> list[Mutation]:
        """A trim or a write of zeroes was sent: partial edges are mutations of their own."""
        end = offset_bytes + length_bytes
        first = -(-offset_bytes // BLOCK) * BLOCK
        last = end // BLOCK * BLOCK
        if last < first:
            return [self._mutate(offset_bytes, bytes(length_bytes))]
        mutations = []
        if offset_bytes < first:
            mutations.append(self._mutate(offset_bytes, bytes(first - offset_bytes)))
        if first < last:
            mutations.append(self._mutate(first, bytes(last - first)))
        if last < end:
            mutations.append(self._mutate(last, bytes(end - last)))
        return mutations

    def _mutate(self, offset_bytes: int, data: bytes) -> Mutation:
        end = offset_bytes + len(data)
        blocks = range(offset_bytes // BLOCK, -(-end // BLOCK))
        self.now += 1
        self._made += 1
        mutation = Mutation(self._made, blocks, self.now)
        zero = not any(data) if len(data) < BLOCK else data.count(0) == len(data)
        for number in blocks:
            block, base = self.blocks[number], number * BLOCK
            old = block.contents[-1]
            start, stop = max(offset_bytes - base, 0), min(end - base, BLOCK)
            if stop - start < BLOCK:
                content = old[:start] + data[base + start - offset_bytes :][: stop - start]
                content += old[stop:]
            else:
                content = ZERO if zero else data[base - offset_bytes :][:BLOCK]
            block.contents.append(content)
            block.mutations.append(mutation)
        self.mutations.append(mutation)
        return mutation

    def acknowledge(self, mutations: Iterable[Mutation], *, durable: bool = False) -> None:
        """The reply to their request has come; with FUA it promises more."""
        self.now += 1
        for mutation in mutations:
            mutation.acknowledged = self.now
            mutation.durable |= durable

    def flushed(self, sent: int) -> None:
        """The reply to a FLUSH has come that was sent at this time."""
        for mutation in self.mutations:
            if mutation.acknowledged is not None and mutation.acknowledged <= sent:
                mutation.durable = True

    # -- reads while it runs

    def sent_read(self, offset_bytes: int, length_bytes: int) -> ReadTicket:
        """A read was sent: it may not show less than what was acknowledged or seen before."""
        self.now += 1
        first, end = offset_bytes // BLOCK, -(-(offset_bytes + length_bytes) // BLOCK)
        oldest = [self._newest_acknowledged(block) for block in self.blocks[first:end]]
        return ReadTicket(offset_bytes, length_bytes, oldest)

    @staticmethod
    def _newest_acknowledged(block: Block) -> int:
        for index in range(len(block.mutations) - 1, block.seen, -1):
            mutation = block.mutations[index]
            if mutation is not None and mutation.acknowledged is not None:
                return index
        return block.seen

    def check_read(self, ticket: ReadTicket, data: bytes) -> None:
        """Each block of the reply is one version between the oldest legal and the newest sent."""
        end = ticket.offset_bytes + ticket.length_bytes
        first = ticket.offset_bytes // BLOCK
        for index, oldest in enumerate(ticket.oldest):
            block, base = self.blocks[first + index], (first + index) * BLOCK
            start, stop = max(ticket.offset_bytes - base, 0), min(end - base, BLOCK)
            shown = data[base + start - ticket.offset_bytes :][: stop - start]
            for version in range(oldest, len(block.contents)):
                if block.contents[version][start:stop] == shown:
                    block.seen = max(block.seen, version)
                    break
            else:
                raise Illegal(
                    f"a read of block {first + index} shows {self._describe(first + index, shown)},"
                    f" not one of the {len(block.contents) - oldest} values that are legal now"
                )

    def _describe(self, number: int, shown: bytes) -> str:
        block = self.blocks[number]
        if not any(shown):
            return "zeroes"
        for version in range(len(block.contents) - 1, -1, -1):
            if len(shown) == BLOCK and block.contents[version] == shown:
                return f"its value of {block.mutations[version]!r}"
        return f"bytes it never held ({shown[:16].hex()}...)"

    # -- whole images

    def explain(
        self,
        image: bytes,
        *,
        required: Callable[[Mutation], bool],
        impossible: Iterable[Mutation] = (),
        unknown: Collection[int] = (),
    ) -> set[Mutation]:
        """The mutations that this image does not show, as few as can be.  Illegal.

        unknown: blocks that could not be read; they may show anything.
        """
        search = _Search(self, image, required, unknown)
        for mutation in impossible:
            search.leave_out(mutation, "it is newer than the position")
        search.run()
        return search.left_out

    def check_position(self, image: bytes, sequence: int, unknown: Collection[int] = ()) -> None:
        """The image is the state after exactly so many mutations in log order, if any order is."""
        acknowledged = sorted(m.acknowledged for m in self.mutations if m.acknowledged is not None)
        submitted = [mutation.submitted for mutation in self.mutations]
        count = len(self.mutations)
        if sequence > count:
            raise Illegal(f"position {sequence}, but only {count} mutations were ever sent")

        def required(mutation: Mutation) -> bool:
            if mutation.acknowledged is None:
                return False
            after = count - bisect_right(submitted, mutation.acknowledged)
            return count - 1 - after < sequence

        newer = [m for m in self.mutations if bisect_left(acknowledged, m.submitted) >= sequence]
        self.explain(image, required=required, impossible=newer, unknown=unknown)

    def recovered(
        self,
        image: bytes,
        sequence: int,
        required: Callable[[Mutation], bool],
        *,
        durable: bool = True,
        unknown: Collection[int] = (),
    ) -> None:
        """A cache came back with this image at this position: what it does not show is gone.

        durable: what it shows is on the device for good, because recovery synced it.
        """
        gone = self.explain(image, required=required, unknown=unknown)
        while len(self.mutations) - len(gone) > sequence:
            gone = self._without_one_more(image, gone, sequence, required, unknown)
        self._forget(gone)
        self.mutations = [mutation for mutation in self.mutations if mutation not in gone]
        if len(self.mutations) != sequence:
            raise Illegal(
                f"at position {sequence}, the image shows {len(self.mutations)} mutations"
            )
        self.now += 1
        for mutation in self.mutations:
            mutation.durable |= durable
            if mutation.acknowledged is None:
                mutation.acknowledged = self.now
        for block in self.blocks:
            block.seen = len(block.contents) - 1

    def _forget(self, gone: set[Mutation]) -> None:
        """Nothing that stays came after them."""
        for mutation in gone:
            for number in mutation.blocks:
                block = self.blocks[number]
                while block.mutations[-1] in gone:
                    block.mutations.pop()
                    block.contents.pop()

    def _without_one_more(
        self,
        image: bytes,
        gone: set[Mutation],
        sequence: int,
        required: Callable[[Mutation], bool],
        unknown: Collection[int],
    ) -> set[Mutation]:
        """Zeroes over zeroes: the image cannot tell whether they happened; the position can."""
        for last in reversed(self.mutations):
            if last in gone or required(last):
                continue
            try:
                more = self.explain(
                    image, required=required, impossible=gone | {last}, unknown=unknown
                )
            except Illegal:
                continue
            if len(self.mutations) - len(more) >= sequence:
                return more
        shown = len(self.mutations) - len(gone)
        raise Illegal(f"at position {sequence}, the image shows {shown} mutations")


class _Search:
    """Leave out as few mutations as can be, until the rest explains the image.

    The legal sets are closed under union, so there is a greatest one: what is left out here is in
    no legal set.  If that includes something required, nothing explains the image.
    """

    def __init__(
        self,
        disk: Disk,
        image: bytes,
        required: Callable[[Mutation], bool],
        unknown: Collection[int],
    ) -> None:
        assert len(image) == len(disk.blocks) * BLOCK
        self._disk = disk
        self._image = image
        self._required = required
        self._unknown = unknown
        self._newest = [len(block.contents) - 1 for block in disk.blocks]
        self._horizon = disk.now + 1  # what was sent after this is left out
        self.left_out: set[Mutation] = set()

    def run(self) -> None:
        """Look at every block until nothing changes."""
        changed = True
        while changed:
            changed = False
            for number, block in enumerate(self._disk.blocks):
                if number in self._unknown:
                    continue
                shown = self._image[number * BLOCK : (number + 1) * BLOCK]
                while block.contents[self._newest[number]] != shown:
                    mutation = block.mutations[self._newest[number]]
                    why = f"block {number} shows {self._disk._describe(number, shown)}"
                    if mutation is None:
                        raise Illegal(f"{why}, which nothing explains")
                    self.leave_out(mutation, why)
                    changed = True

    def leave_out(self, first: Mutation, why: str) -> None:
        """This one did not happen; neither did what came after it."""
        pending = [first]
        while pending:
            mutation = pending.pop()
            if mutation in self.left_out:
                continue
            if self._required(mutation):
                raise Illegal(f"{mutation!r} is lost: {why}")
            self.left_out.add(mutation)
            for number in mutation.blocks:
                mutations = self._disk.blocks[number].mutations
                while mutation in mutations[: self._newest[number] + 1]:
                    last = mutations[self._newest[number]]
                    self._newest[number] -= 1
                    assert last is not None
                    pending.append(last)
            if mutation.acknowledged is not None and mutation.acknowledged < self._horizon:
                self._horizon = mutation.acknowledged
                for later in reversed(self._disk.mutations):
                    if later.submitted <= self._horizon:
                        break
                    pending.append(later)
