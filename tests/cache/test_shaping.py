"""Shaping on a virtual clock: no sliding second above the peak, a saturated minute on average."""

import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_support import run_virtual
from millpond.cache import limits
from millpond.cache.shaping import Admission, Lateness, RateLimits, Shaper

KIB = 1024
MIB = 1024 * KIB
UNLIMITED = RateLimits()


async def _ship_for(
    shaper: Shaper,
    *,
    duration_s: float,
    volumes: int,
    seed: int,
    latency_s: float,
    idle_s: float = 0.0,
) -> list[tuple[float, float, int]]:
    """(sent, acknowledged, bytes) of saturated volumes whose network delays every batch anew."""
    loop = asyncio.get_running_loop()
    chance = random.Random(seed)
    sent: list[tuple[float, float, int]] = []

    async def volume() -> None:
        while True:
            largest = min(shaper.cut_bytes * 104 // 100, int(shaper.largest_bytes))
            bytes_count = chance.randint(max(1, largest // 4), largest)
            permit = await shaper.admit(bytes_count)
            start_s = loop.time()
            await asyncio.sleep(chance.uniform(0, latency_s))
            sent.append((start_s, loop.time(), bytes_count))
            permit.finish()

    await asyncio.sleep(idle_s)
    tasks = [asyncio.create_task(volume()) for _ in range(volumes)]
    await asyncio.sleep(duration_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return sent


def _worst_second(passed: list[tuple[float, int]]) -> int:
    """The most bytes in any closed second [t, t + 1]."""
    passed = sorted(passed)
    worst = total = first = 0
    for time_s, bytes_count in passed:
        total += bytes_count
        while passed[first][0] < time_s - 1.0:
            total -= passed[first][1]
            first += 1
        worst = max(worst, total)
    return worst


@settings(max_examples=25, deadline=None)
@given(
    peak=st.integers(limits.RATE_MIN_BYTES_PER_S, 64 * MIB),
    volumes=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    latency_s=st.sampled_from([0.0, 0.001, 0.05, 0.7, 3.0]),
)
def test_no_sliding_second_exceeds_the_peak_wherever_the_bytes_pass(
    peak: int, volumes: int, seed: int, latency_s: float
) -> None:
    async def scenario() -> list[tuple[float, float, int]]:
        host = Admission(RateLimits(peak_bytes_per_s=peak))
        shaper = Shaper(Admission(UNLIMITED), host)
        return await _ship_for(
            shaper, duration_s=8.0, volumes=volumes, seed=seed, latency_s=latency_s
        )

    sent = run_virtual(scenario())
    chance = random.Random(seed)
    assert sent
    for place in (0.0, 1.0, None):  # at admission, at acknowledgement, anywhere between
        passed = [
            (begin + (end - begin) * (chance.random() if place is None else place), count)
            for begin, end, count in sent
        ]
        assert _worst_second(passed) <= peak


@settings(max_examples=25, deadline=None)
@given(
    average=st.integers(limits.RATE_MIN_BYTES_PER_S, 64 * MIB),
    headroom=st.sampled_from([1.05, 1.2, 2.0, 10.0]),
    volumes=st.integers(1, 4),
    idle_s=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 2**32),
)
def test_every_saturated_minute_is_within_five_percent_of_the_average(
    average: int, headroom: float, volumes: int, idle_s: float, seed: int
) -> None:
    async def scenario() -> list[tuple[float, float, int]]:
        # Below 1 MiB/s a second's peak holds few batches of 64 KiB and packs badly.
        peak = int(average * (headroom if average >= MIB else max(headroom, 2.0)))
        rates = RateLimits(average_bytes_per_s=average, peak_bytes_per_s=peak)
        shaper = Shaper(Admission(UNLIMITED), Admission(rates))
        return await _ship_for(
            shaper,
            duration_s=130.0,
            volumes=volumes,
            seed=seed,
            latency_s=0.002,
            idle_s=idle_s,
        )

    sent = sorted(run_virtual(scenario()))
    for start_s in range(int(idle_s), int(idle_s) + 70, 7):
        minute = sum(count for begin, _, count in sent if start_s <= begin < start_s + 60)
        assert abs(minute / 60 - average) <= 0.05 * average


def test_the_bucket_starts_empty_and_holds_two_seconds() -> None:
    async def scenario() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        admission = Admission(RateLimits(average_bytes_per_s=MIB))
        await admission.reserve(MIB)
        first_s = loop.time()
        await asyncio.sleep(1000)
        for _ in range(3):
            await admission.reserve(MIB)
        return first_s, loop.time() - first_s - 1000

    first_s, third_s = run_virtual(scenario())
    assert first_s == pytest.approx(1.0, abs=1e-3)
    assert third_s == pytest.approx(1.0, abs=1e-3)


def test_a_slow_volume_holds_up_nobody_else() -> None:
    async def scenario() -> tuple[int, int]:
        host = Admission(RateLimits(average_bytes_per_s=10 * MIB))
        slow = Admission(RateLimits(average_bytes_per_s=64 * KIB))
        fast = Admission(UNLIMITED)
        jobs = [
            asyncio.create_task(
                _ship_for(
                    Shaper(volume, host), duration_s=60, volumes=1, seed=number, latency_s=0.001
                )
            )
            for number, volume in enumerate((slow, fast))
        ]
        await asyncio.gather(*jobs)
        return slow.passed_bytes, fast.passed_bytes

    slow_bytes, fast_bytes = run_virtual(scenario())
    assert slow_bytes == pytest.approx(60 * 64 * KIB, rel=0.05)
    assert slow_bytes + fast_bytes == pytest.approx(600 * MIB, rel=0.05)


def test_volumes_take_turns_at_the_host() -> None:
    async def scenario() -> list[int]:
        host = Admission(RateLimits(average_bytes_per_s=8 * MIB))
        volumes = [Admission(UNLIMITED) for _ in range(4)]
        jobs = [
            asyncio.create_task(
                _ship_for(
                    Shaper(volume, host), duration_s=60, volumes=1, seed=number, latency_s=0.001
                )
            )
            for number, volume in enumerate(volumes)
        ]
        await asyncio.gather(*jobs)
        return [volume.passed_bytes for volume in volumes]

    shares = sorted(run_virtual(scenario()))
    assert shares[-1] < 1.3 * shares[0]


def test_a_waiter_that_gives_up_does_not_block_those_behind_it() -> None:
    async def scenario() -> float:
        loop = asyncio.get_running_loop()
        admission = Admission(RateLimits(average_bytes_per_s=MIB))
        head = asyncio.create_task(admission.reserve(2 * MIB))
        tail = asyncio.create_task(admission.reserve(64 * KIB))
        await asyncio.sleep(0.5)
        head.cancel()
        await tail
        return loop.time()

    assert run_virtual(scenario()) == pytest.approx(0.5, abs=1e-3)


def test_a_permit_given_in_the_moment_of_cancellation_is_given_back() -> None:
    async def scenario() -> None:
        admission = Admission(RateLimits(peak_bytes_per_s=MIB))
        shaper = Shaper(Admission(UNLIMITED), admission)
        (await shaper.admit(MIB)).finish()
        waiter = asyncio.create_task(shaper.admit(MIB))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_at(limits.PEAK_WINDOW_S, waiter.cancel)
        await asyncio.gather(waiter, return_exceptions=True)
        await asyncio.wait_for(shaper.admit(MIB), 2.5)

    run_virtual(scenario())


@pytest.mark.parametrize("peak", [None, 64 * KIB, MIB, 16 * MIB, 1024 * MIB])
def test_a_batch_is_never_cut_larger_than_the_peak_can_carry(peak: int | None) -> None:
    rates = RateLimits(peak_bytes_per_s=peak)
    assert 64 * KIB <= rates.cut_bytes <= 4 * MIB
    if peak is not None and peak >= MIB:
        assert rates.cut_bytes <= peak // 8


@pytest.mark.parametrize(("average", "peak"), [(1, None), (None, 1), (2 * MIB, MIB)])
def test_rates_that_cannot_work_are_refused(average: int | None, peak: int | None) -> None:
    with pytest.raises(ValueError, match="rate"):
        RateLimits(average, peak)


def test_virtual_time_is_ordered() -> None:
    async def scenario() -> list[float]:
        loop = asyncio.get_running_loop()
        times = []
        for _ in range(3):
            await asyncio.sleep(1)
            times.append(loop.time())
        return times

    assert all(a < b for a, b in pairwise(run_virtual(scenario())))


async def _late_volume(late: Lateness, rates: RateLimits, seconds: int) -> tuple[int, int]:
    """Bytes that a volume passes in so many seconds, and another one beside it on the same host."""
    host = Admission(rates)
    ours, others = Shaper(Admission(UNLIMITED), host), Shaper(Admission(UNLIMITED), host)
    ours.late = late
    passed = [0, 0]

    async def ship(which: int, shaper: Shaper) -> None:
        while True:
            permit = await shaper.admit(64 * KIB)
            await asyncio.sleep(0.001)
            permit.finish()
            passed[which] += 64 * KIB

    tasks = [asyncio.create_task(ship(0, ours)), asyncio.create_task(ship(1, others))]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return passed[0], passed[1]


def test_a_late_volume_ignores_the_average_then_the_peak() -> None:
    rates = RateLimits(MIB, 4 * MIB)
    on_time, beside = run_virtual(_late_volume(Lateness(), rates, 20))
    assert abs(on_time - beside) < MIB, "both on time: they take turns"
    assert on_time + beside < 22 * MIB
    average_ignored, beside = run_virtual(_late_volume(Lateness(10.0), rates, 20))
    assert 5 * MIB + 30 * MIB < average_ignored < 5 * MIB + 41 * MIB, "the peak still holds"
    assert beside < 8 * MIB, "the others make room"
    all_ignored, _ = run_virtual(_late_volume(Lateness(10.0, 15.0), rates, 20))
    assert all_ignored > 100 * MIB


def test_a_volume_becomes_late_while_it_waits_for_its_turn() -> None:
    async def scenario() -> float:
        shaper = Shaper(Admission(RateLimits(64 * KIB, None)), Admission(UNLIMITED))
        shaper.late = Lateness.of(3.0, 10.0, asyncio.get_running_loop().time())
        await shaper.admit(128 * KIB)  # the bucket is empty: two seconds
        await shaper.admit(128 * KIB)  # late in none
        return asyncio.get_running_loop().time()

    assert run_virtual(scenario()) == pytest.approx(2.0, abs=0.01)


def test_without_a_bound_no_age_is_late() -> None:
    assert Lateness.of(1e9, None, 0.0) == Lateness()
