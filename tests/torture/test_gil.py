"""Five seconds without Python: the guest does not notice.

A thread of the process holds the GIL while a client reads what the read slots and the log have, and
writes.  Completions are counted from the client's side; that the lock was really held is proved by
a Python thread of the process that could not run.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import nbdclient
from millpondprocess import Millpond
from nbdclient import NbdClient
from torture.amounts import seed_for
from torture.commands import disk_of, status, wait_drained

MIB = 1 << 20
BLOCK = 4096
SIZE_BYTES = 256 * MIB
CACHE_BYTES = 512 * MIB  # a log of 128 MiB: what is written meanwhile cannot be destaged
WARM_BYTES = 96 * MIB  # of the first part of the disk: more than half the log, so slots fill
DEPTH = 8
LOG_BYTES_PER_S = 8 * MIB  # paced: what is written during the hold has to fit into the log
LEAD_S = 1.0  # of load before and after
GAP_MAX_S = 1.0
COMPLETIONS_MIN = 500  # in five seconds: not a speed, only "it went on"


class Load:
    """Random hits and writes, at depth; remembers when each kind completed."""

    def __init__(self, client: NbdClient, chance: random.Random) -> None:
        self.client = client
        self.chance = chance
        self.reads: list[float] = []
        self.writes: list[float] = []
        self.log_bytes = 0
        self._begin = time.perf_counter()
        self._payload = chance.randbytes(MIB)

    def run_until(self, ended: Callable[[], bool]) -> None:
        """Keep DEPTH requests in flight."""
        while True:
            while sum(map(len, self.client.in_flight.values())) < DEPTH:
                self._send()
            reply = self.client.next_reply()
            assert not reply.error, reply
            (self.writes if reply.request.payload else self.reads).append(time.perf_counter())
            if ended():
                break
        for reply in self.client.replies():
            assert not reply.error, reply

    def _send(self) -> None:
        chance = self.chance
        offset = chance.randrange(WARM_BYTES // BLOCK) * BLOCK
        due_bytes = (time.perf_counter() - self._begin) * LOG_BYTES_PER_S
        if chance.randrange(4) or self.log_bytes > due_bytes:
            self.client.submit_read(offset, BLOCK)
            return
        start = chance.randrange(MIB - BLOCK)
        self.client.submit_write(offset, self._payload[start : start + BLOCK])
        self.log_bytes += 2 * BLOCK  # a record has a header block

    def during(self, begin: float, end: float) -> tuple[int, int, float]:
        """Reads and writes completed in an interval, and the longest pause of either kind."""
        pauses = []
        for times in (self.reads, self.writes):
            inside = [begin, *(at for at in times if begin < at < end), end]
            pauses.append(max(later - earlier for earlier, later in pairwise(inside)))
        counts = [sum(begin < at < end for at in times) for times in (self.reads, self.writes)]
        return counts[0], counts[1], max(pauses)


def warm(client: NbdClient, directory: Path, chance: random.Random) -> None:
    """Everything that will be read is on the device, some of it in slots."""
    payload = chance.randbytes(2 * MIB)
    for offset in range(0, WARM_BYTES, MIB):
        start = chance.randrange(MIB)
        client.write(offset, payload[start : start + MIB])
    wait_drained(directory)
    for _ in range(2):  # what was released without a slot comes back as a miss
        for offset in range(0, WARM_BYTES, MIB):
            client.read(offset, MIB)


def hold(process_id: int, markers: Path) -> Callable[[], bool]:
    """SIGUSR2 after LEAD_S of load; done LEAD_S after the holder has told."""
    begin = time.perf_counter()
    state = {"asked": False, "told_at": 0.0}

    def ended() -> bool:
        now = time.perf_counter()
        if not state["asked"] and now - begin > LEAD_S:
            os.kill(process_id, signal.SIGUSR2)
            state["asked"] = True
        if state["asked"] and not state["told_at"] and markers.exists():
            state["told_at"] = now
        assert now - begin < 120, "the holder never told"
        return bool(state["told_at"]) and now - state["told_at"] > LEAD_S

    return ended


def test_hits_and_writes_go_on_while_python_stands_still(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(seed_for("tests/torture/test_gil.py", 5))
    markers = tmp_path / "markers"
    directory = tmp_path / "up"
    holder = Path(__file__).with_name("gil_holder.py")
    server = Millpond(
        directory,
        size_bytes=SIZE_BYTES,
        cache_bytes=CACHE_BYTES,
        command=[sys.executable, str(holder), str(markers)],
    )
    with server, nbdclient.connect(server.uri, timeout_s=120) as client:
        warm(client, directory, chance)
        before = disk_of(status(directory))
        load = Load(client, chance)
        load.run_until(hold(server.process_id, markers))
        after = disk_of(status(directory))
        told = json.loads(markers.read_text())
        reads, writes, pause_s = load.during(told["begin"], told["end"])
        print(f"{told['end'] - told['begin']:.2f} s held: {reads} reads, {writes} writes")
        stood_still_s = told["after"] - told["before"]
        assert stood_still_s > 4.9, "the GIL was not held: nothing was tested"
        assert after["read_miss_blocks"] == before["read_miss_blocks"], "not all reads were hits"
        assert reads > COMPLETIONS_MIN and writes > COMPLETIONS_MIN // 4
        assert pause_s < GAP_MAX_S, f"nothing completed for {pause_s:.2f} s"
        assert status(directory)["engine"]["slot_hits"] > 0, "no hit came from a slot"
    record_property(
        "figure",
        f"GIL held {stood_still_s:.1f} s: {reads} reads and {writes} writes completed meanwhile,"
        f" longest pause {pause_s * 1000:.0f} ms",
    )
