"""Destage keeps to its rates while the guest writes ten times as much; the rest survives kill -9.

The store's log is the witness: the groups that appear in its segment files are watched, so what was
appended in any sliding second, and over the whole, is known without asking Millpond.  A watcher
that comes late knows only between which two looks a group appeared; only a second that surely holds
too much is too much.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbdclient
from millpondprocess import Millpond
from nbdclient import NbdClient
from torture.amounts import amount, seed_for
from torture.commands import status
from torture.storefiles import group_at, segment_paths

MIB = 1 << 20
BLOCK = 4096
AVERAGE = MIB // 2
PEAK = MIB
TIMES = 10
CHUNK_BYTES = 32 * BLOCK
LOOK_S = 0.005
TOLERANCE = 0.05
MINUTE_S = 60.0
FILL_S = 2.5  # idle at first: the bucket fills, and the load begins with a burst at the peak
BURST_S = 4.0  # two seconds' worth, and what the average adds meanwhile, have left then


@dataclass(frozen=True)
class Appended:
    """A group with batches, seen first at `seen`, and not yet at `unseen`."""

    unseen: float
    seen: float
    batch_bytes: int


class Witness:
    """Follows the log of a store from its files."""

    def __init__(self, store: Path) -> None:
        self.appended: list[Appended] = []
        self.failure: BaseException | None = None
        self._store = store
        self._next: dict[int, int] = {}  # where the next group of each segment would begin
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Witness":
        self.look(0.0)
        self.appended.clear()  # what was there before
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def bytes_between(self, begin: float, end: float) -> int:
        """What was first seen in an interval."""
        return sum(each.batch_bytes for each in self.appended if begin < each.seen <= end)

    def worst_second(self) -> int:
        """The most that one second surely holds."""
        worst = held = 0
        recent: deque[Appended] = deque()
        for each in self.appended:
            recent.append(each)
            held += each.batch_bytes
            while each.seen - recent[0].unseen > 1.0:
                held -= recent.popleft().batch_bytes
            worst = max(worst, held)
        return worst

    def look(self, before: float) -> float:
        """Collect the groups that are new; when this look began."""
        begin = time.perf_counter()
        for segment, path in segment_paths(self._store).items():
            while (group := group_at(path, segment, self._next.get(segment, 0))) is not None:
                self._next[segment] = group.offset + group.length_bytes
                if group.batch_bytes:
                    now = time.perf_counter()
                    self.appended.append(Appended(before, now, group.batch_bytes))
        return begin

    def _run(self) -> None:
        try:
            before = time.perf_counter()
            while not self._stop.wait(LOOK_S):
                before = self.look(before)
        except BaseException as error:
            self.failure = error


def chunk(seed: int, index: int) -> bytes:
    """Incompressible, and known again."""
    return random.Random(f"{seed} {index}").randbytes(CHUNK_BYTES)


def write_paced(client: NbdClient, seed: int, duration_s: float) -> tuple[float, int]:
    """TIMES the average for so long; when it began, and how many chunks were acknowledged."""
    begin = time.perf_counter()
    sent = 0
    while (now := time.perf_counter()) - begin < duration_s:
        if sent * CHUNK_BYTES <= (now - begin) * AVERAGE * TIMES:
            client.submit_write(sent * CHUNK_BYTES, chunk(seed, sent))
            sent += 1
        else:
            time.sleep(0.002)
        for reply in client.arrived():
            assert not reply.error, reply
    for reply in client.replies():
        assert not reply.error, reply
    return begin, sent


def test_destage_keeps_its_rates_and_the_rest_survives(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = seed_for("tests/torture/test_shaping.py", 8)
    duration_s = float(amount("SHAPING_S", usual=10, prove=60))
    directory = tmp_path / "up"
    size_bytes = int(duration_s + 10) * AVERAGE * TIMES
    server = Millpond(
        directory,
        size_bytes=size_bytes // BLOCK * BLOCK,
        # The log is a quarter: it has to hold nearly all that is written.
        cache_bytes=(6 * size_bytes // BLOCK * BLOCK) + 256 * MIB,
        arguments=["--average-rate", str(AVERAGE), "--peak-rate", str(PEAK)],
    )
    server.start()
    try:
        with nbdclient.connect(server.uri, timeout_s=120) as client:
            time.sleep(FILL_S)
            with Witness(directory / "store") as witness:
                begin, chunks = write_paced(client, seed, duration_s)
                end = time.perf_counter()
            if witness.failure is not None:
                raise witness.failure
            passed_bytes = status(directory)["shaping"]["passed_bytes"]
    finally:
        server.kill()
    shipped = witness.bytes_between(begin, end)
    check_rates(witness, begin, end, chunks * CHUNK_BYTES)
    assert passed_bytes >= shipped, "more arrived at the store than the shaper let pass"
    server.start()
    try:
        check_survived(server, directory, seed, chunks)
    finally:
        server.kill()
    rate = shipped / (end - begin)
    record_property(
        "figure",
        f"{end - begin:.0f} s at {chunks * CHUNK_BYTES / (end - begin) / AVERAGE:.1f} times the"
        f" average: {rate / AVERAGE:.1%} of the average left, {witness.worst_second() / PEAK:.1%}"
        f" of the peak in the fullest second; {chunks} chunks survive kill -9",
    )


def check_rates(witness: Witness, begin: float, end: float, written_bytes: int) -> None:
    """Within 5 % of a minute's average, and, behind the first burst, of what is left of the run."""
    duration_s = end - begin
    assert written_bytes > 2 * duration_s * AVERAGE, "the machine is too slow to write too much"
    shipped = witness.bytes_between(begin, end)
    print(f"{duration_s:.1f} s, {shipped / duration_s / AVERAGE:.2%} of the average")
    assert abs(shipped - duration_s * AVERAGE) <= TOLERANCE * max(duration_s, MINUTE_S) * AVERAGE
    steady_s = duration_s - BURST_S
    steady = witness.bytes_between(begin + BURST_S, end)
    print(f"steady: {steady / steady_s / AVERAGE:.2%} of the average")
    batches = 2 * max(each.batch_bytes for each in witness.appended)  # cut at both ends
    assert abs(steady - steady_s * AVERAGE) <= TOLERANCE * steady_s * AVERAGE + batches
    worst = witness.worst_second()
    print(f"fullest second: {worst / PEAK:.2%} of the peak")
    assert PEAK // 2 < worst <= PEAK


def check_survived(server: Millpond, directory: Path, seed: int, chunks: int) -> None:
    """Most of it is still dirty, and all of it is there."""
    assert status(directory)["dirty_bytes"] > chunks * CHUNK_BYTES // 2
    with nbdclient.connect(server.uri, timeout_s=120) as client:
        for index in range(chunks):
            found = client.read(index * CHUNK_BYTES, CHUNK_BYTES)
            assert found == chunk(seed, index), f"chunk {index} is lost"
    assert not any(status(directory)["checksum_errors"].values())
