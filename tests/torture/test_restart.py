"""Planned restarts under guests that verify: they keep their connections and see a pause.

Two stamping guests and one that sleeps, each with one socket for all of it; the cache is stopped
and started again as systemd does it, at any moment of their requests.  Failure modes that are
tried: descriptions that are damaged or lost on the way: guests connect again, nothing is lost.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import nbdclient
from torture.amounts import amount, seed_for
from torture.daemons import MIB
from torture.guests import Guest, guests_of
from torture.managed import Site, site

SIZE_BYTES = 64 * MIB
GUESTS = 2
SHARE_BYTES = 20 * MIB
DEPTH = 8
STATE, GUEST = "millpond-guests", "millpond-guest-"
HERE = "tests/torture/test_restart.py"


def stampers(made: Site, seed: object) -> list[Guest]:
    """Who writes, and verifies what was acknowledged."""
    return guests_of(made.uri, "disk", GUESTS, seed=seed, share_bytes=SHARE_BYTES, depth=DEPTH)


def test_guests_keep_their_connections_over_restarts(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    restarts = amount("RESTARTS", usual=4, prove=30)
    chance = random.Random(seed_for(HERE, 5))
    with site(tmp_path, SIZE_BYTES) as made:
        guests = stampers(made, chance.random())
        with nbdclient.connect(made.uri, export="disk") as idle:
            last = SIZE_BYTES - 4096
            for number in range(restarts):
                token = bytes([number + 1]) * 4096
                idle.write(last, token)
                for guest in guests:
                    guest.wait_for_more(chance.randrange(300))
                made.stop()
                assert sorted(name for name, _ in made.manager.kept) == [
                    *(f"{GUEST}{number}" for number in range(GUESTS + 1)),
                    STATE,
                ]
                made.start()
                assert not made.manager.kept, "forgotten before anything is used"
                assert idle.read(last, 4096) == token
        for guest in guests:
            guest.ask_to_stop()
        for guest in guests:
            guest.join()
            assert guest.reconnects == 0, "a guest lost its connection"
        figure = f"{restarts} restarts; " + "; ".join(str(guest.stamper.totals) for guest in guests)
    record_property("figure", figure)


def test_process_that_dies_before_it_reads_from_any_costs_connections_and_nothing_else(
    tmp_path: Path,
) -> None:
    with site(tmp_path, SIZE_BYTES) as made:
        guests = stampers(made, seed_for(HERE, 6))
        for guest in guests:
            guest.wait_for_more(200)
        made.stop()
        assert made.manager.kept
        made.start_and_kill()
        assert not made.manager.kept, "no third process reads what the second may have read"
        made.start()
        for guest in guests:
            guest.wait_for_more(200)
            guest.ask_to_stop()
        for guest in guests:
            guest.join()
            assert guest.reconnects == 1


@pytest.mark.parametrize("lost", [STATE, f"{GUEST}0"])
def test_what_is_lost_on_the_way_is_shut_down_and_guests_connect_again(
    tmp_path: Path, lost: str
) -> None:
    with site(tmp_path, SIZE_BYTES) as made:
        old = nbdclient.connect(made.uri, export="disk")
        old.write(0, b"w" * 4096)
        made.stop()
        made.manager._forget(lost)
        # A copy that somebody holds: a close alone would not be noticed at the other end.
        held = [os.dup(number) for _, number in made.manager.kept]
        made.start()
        with pytest.raises(nbdclient.ConnectionLost):
            old.read(0, 4096)
        old.close()
        with nbdclient.connect(made.uri, export="disk") as new:
            assert new.read(0, 4096) == b"w" * 4096
        for number in held:
            os.close(number)
    assert lost != STATE or "Traceback" not in made.log.read_text()
