"""kill -9 of the real process while a client verifies what it was promised, again and again.

The schedule is drawn from the seed and printed: how many replies the client has got when the
process dies, and, now and then, that it is killed once more while it recovers.  After each restart
all that was acknowledged is read back, what was in flight may be old or new per 512 bytes, and the
log goes on being destaged by itself until the store's image is the disk.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbdclient
from millpondprocess import Millpond
from torture.amounts import amount, seed_for
from torture.commands import disk_of, export, printed_status, wait_drained
from torture.stamping import MIB, Stamper, Totals

SIZE_BYTES = 96 * MIB
CACHE_BYTES = 256 * MIB  # the smallest: a log of 64 MiB wraps often
CONNECTIONS = 2
DEPTH = 12
REPLIES_MAX = 3000


@dataclass(frozen=True)
class Kill:
    """One line of the schedule."""

    replies: int  # the client has had since the start when the process dies
    again_after_s: float | None  # and once more, so long after the next start

    def __str__(self) -> str:
        again = f", again {self.again_after_s:.2f} s into recovery" if self.again_after_s else ""
        return f"after {self.replies} replies{again}"


def schedule(chance: random.Random, count: int) -> list[Kill]:
    """Early, late, and every fifth time twice."""
    return [
        Kill(
            replies=int(10 ** chance.uniform(0, 3.477)),
            again_after_s=chance.uniform(0.05, 1.0) if index % 5 == 4 else None,
        )
        for index in range(count)
    ]


def load(stampers: list[Stamper], replies: int) -> None:
    """Verified load until so many replies came; requests are in flight at the end."""
    done = 0
    while done < replies:
        for stamper in stampers:
            done += stamper.step()
    for stamper in stampers:
        stamper.fill_up()


def connect(millpond: Millpond, stampers: list[Stamper]) -> None:
    """A connection each; everything is verified before anything is changed."""
    for stamper in stampers:
        stamper.attach(nbdclient.connect(millpond.uri, timeout_s=120))
    for stamper in stampers:
        stamper.verify()


def kill(millpond: Millpond, stampers: list[Stamper]) -> None:
    """kill -9, then what the clients know."""
    millpond.kill()
    for stamper in stampers:
        stamper.lost()


def check_status(directory: Path) -> None:
    """No checksum error anywhere, nothing has failed, nothing is late."""
    answer = printed_status(directory)
    assert not any(answer["checksum_errors"].values()), answer["checksum_errors"]
    disk = disk_of(answer)
    assert disk["state"] in ("open", "closed") and not disk["problem"], disk
    assert not disk["destage_problem"] and not disk["engine_error"], disk
    assert not answer["engine"]["failed"]
    assert not answer["engine"]["protocol_errors"]


def test_kill_9_during_verified_load(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = seed_for("tests/torture/test_kill.py", 20261120)
    count = amount("KILLS", usual=6, prove=50)
    chance = random.Random(seed)
    kills = schedule(chance, count)
    print("\n".join(f"kill {index + 1}: {line}" for index, line in enumerate(kills)))
    share = SIZE_BYTES // CONNECTIONS
    totals = Totals()
    stampers = [
        Stamper(random.Random(chance.random()), index * share, share, DEPTH, totals)
        for index in range(CONNECTIONS)
    ]
    directory = tmp_path / "up"
    millpond = Millpond(directory, size_bytes=SIZE_BYTES, cache_bytes=CACHE_BYTES)
    with millpond:
        connect(millpond, stampers)
        for line in kills:
            load(stampers, line.replies)
            kill(millpond, stampers)
            if line.again_after_s is not None:
                millpond.spawn()
                time.sleep(line.again_after_s)
                millpond.kill()
            millpond.start()
            check_status(directory)
            connect(millpond, stampers)
        load(stampers, REPLIES_MAX)
        kill(millpond, stampers)
        millpond.start()
        # No client: whatever is dirty leaves by itself.
        wait_drained(directory)
        check_status(directory)
        shipped = export(directory, tmp_path / "image")
        connect(millpond, stampers)
        for stamper in stampers:
            stamper.close()
        disk = b"".join(bytes(stamper.image) for stamper in stampers)
        assert shipped == disk, "the store's image is not the disk"
    record_property("figure", f"{count + 1} kills; {totals}")
    print(totals)
