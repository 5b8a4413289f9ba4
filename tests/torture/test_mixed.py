"""Everything that can go wrong around two real processes, in any mixture, while guests verify.

One store on a small disk, one cache, a network between them that breaks and hangs; two stamping
clients, and fio with verify behind a qemu-nbd that reconnects.  A schedule drawn from a printed
seed kills, freezes and restarts both processes, cuts and holds connections, fills the disk and
makes I/Os fail.  No guest ever gets an error; what was acknowledged is there after every kill; in
the end the store's image is the disk, byte for byte.

MILLPOND_TORTURE_S=3600 for an hour of it; a failing run prints its seed and one command.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

from torture.amounts import amount, seed_for
from torture.daemons import MIB, Pair
from torture.fio import Fio
from torture.guests import Guest, guests_of
from torture.proxy import Proxy
from torture.smalldisk import small_disk
from torture.trouble import Trouble

STAMPED_BYTES = 48 * MIB
FIO_BYTES = 48 * MIB
DISK_BYTES = 1536 * MIB
GUESTS = 2
DEPTH = 12
HERE = "tests/torture/test_mixed.py"


def test_any_mixture_of_troubles_loses_nothing(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    duration_s = amount("TORTURE_S", usual=12, prove=300)
    seed = seed_for(HERE, 20261127)
    print(f"and as long: MILLPOND_TORTURE_S={duration_s}")
    with small_disk(tmp_path, DISK_BYTES) as disk:
        store_socket = disk.path / "store.sock"
        proxy = Proxy(store_socket)
        volumes = {"stamped": STAMPED_BYTES, "fio": FIO_BYTES}
        try:
            with Pair(tmp_path, volumes, store_directory=disk.path, reach=proxy.address) as pair:
                trouble = Trouble(pair, proxy, disk, random.Random(seed), long=duration_s >= 600)
                figure = torment(pair, trouble, tmp_path, seed, duration_s)
        finally:
            proxy.close()
    record_property("figure", figure)
    print(figure)


def torment(pair: Pair, trouble: Trouble, folder: Path, seed: int, duration_s: int) -> str:
    """Guests at work, trouble, then peace: everything must be there."""
    guests = guests_of(
        pair.uri,
        "stamped",
        GUESTS,
        seed=seed,
        share_bytes=STAMPED_BYTES // GUESTS,
        depth=DEPTH,
        replies_per_death=1_000,
    )
    fio = Fio(pair.uri, "fio", folder, FIO_BYTES, seed)
    try:
        end = time.perf_counter() + duration_s
        while time.perf_counter() < end:
            trouble.make()
            for guest in guests:
                guest.check()
            fio.check()
        trouble.end()
        workers: list[Guest | Fio] = [*guests, fio]
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            worker.join()
    finally:
        trouble.end()
        fio.close()
    pair.wait_drained()
    check_status(pair)
    stamped = b"".join(bytes(guest.stamper.image) for guest in guests)
    assert pair.image("stamped") == stamped, "the store's image is not the disk"
    assert pair.image("fio") == fio.read_all(pair.uri), "the store's image is not fio's disk"
    totals = "; ".join(str(guest.stamper.totals) for guest in guests)
    return f"{trouble}; {totals}; {fio}"


def check_status(pair: Pair) -> None:
    """Nothing has failed, nothing was found damaged but slots that a failed sync has lost."""
    answer = pair.status()
    errors = {where: count for where, count in answer["checksum_errors"].items() if count}
    assert not errors.keys() - {"slots"}, errors
    assert not answer["engine"]["failed"] and not answer["engine"]["protocol_errors"]
    for volume in answer["volumes"]:
        assert volume["state"] in ("open", "closed", "closing"), volume
        assert not volume["problem"] and not volume["engine_error"], volume


def test_seed_draws_the_same_troubles_again() -> None:
    """The schedule is a function of the seed alone."""
    first, second = (Trouble.schedule(random.Random(5), long=False) for _ in range(2))
    drawn = [next(first) for _ in range(100)]
    assert drawn == [next(second) for _ in range(100)]
    assert len({name for name, _ in drawn}) == len(Trouble.kinds())
