"""Background verification in a running cache: its status, and the line that an operator reads."""

import logging
from pathlib import Path

import pytest

from cache_rig import MIB, rig, run, until
from millpond.cache import limits
from millpond.cache.scrub import check_rate
from millpond.cache.status import status_of
from millpond.cache.volumes import State
from millpond.native.engine import EngineOptions

FAST = EngineOptions(scrub_bytes_per_s=1024 * MIB)
BLOCK = bytes(range(1, 129)) * 32


def flip_first(device: Path, data: bytes) -> None:
    """One bit of the first place on the device that holds this."""
    content = device.read_bytes()
    with device.open("r+b") as file:
        file.seek(content.index(data) + 17)
        file.write(bytes([data[17] ^ 1]))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of damage, and of failed volumes."""
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if text.startswith(("damage found", "volume failed"))]


@pytest.mark.expects_warnings
def test_damaged_slot_is_told_with_volume_and_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest that comes later reads the right data, from the store."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(limits, "RELEASE_IDLE_S", 0.1)

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            writer = await world.cache("writer")
            guest = await writer.guest()
            await guest.write(3 * 4096, BLOCK)
            await world.stop(writer)
            reader = await world.cache("reader")
            assert await (await reader.guest()).read(3 * 4096, 4096) == BLOCK
            await until(
                lambda: reader.daemon.engine.counters()["slots_used"] == 1, "a slot is filled"
            )
            await world.stop(reader)
            flip_first(reader.device, BLOCK)
            again = await world.cache("reader", engine=FAST)
            guest = await again.guest()
            counters = again.daemon.engine.counters
            await until(lambda: counters()["scrub_slot_errors"] == 1, "the damage is found")
            await until(lambda: bool(messages(caplog)), "it is told")
            assert await guest.read(3 * 4096, 4096) == BLOCK
            status = await status_of(again.daemon)
            assert status["scrub"]["slot_errors"] == 1 and status["scrub"]["log_errors"] == 0
            assert status["checksum_errors"]["slots"] == 0, "no guest met it"
            await until(lambda: counters()["scrub_passes"] > 0, "a whole pass")
            status = await status_of(again.daemon)
            assert 0 <= status["scrub"]["last_pass_age_s"] < 60
            assert status["scrub"]["bytes_per_s"] == 1024 * MIB

    run(scenario())
    (message,) = messages(caplog)
    assert message.startswith("damage found volume=") and 'what="block 3: read slot 0' in message


@pytest.mark.expects_warnings
def test_damaged_undestaged_block_stops_its_volume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before destage meets it: the store is away."""
    monkeypatch.setattr(limits, "STOP_RELEASE_S", 0.1)

    async def scenario() -> None:
        async with rig(tmp_path) as world:
            cache = await world.cache("one")
            guest = await cache.guest()
            await guest.write(0, BLOCK[::-1])  # "dirty" is on record from here on
            world.wire.cut()
            await guest.write(3 * 4096, BLOCK)
            await guest.flush()
            await world.stop(cache)
            flip_first(cache.device, BLOCK)
            again = await world.cache("one", engine=FAST)
            await until(lambda: bool(again.daemon.volumes), "the volume is known")
            await until(lambda: again.volume.state is State.FAILED, "it stops")
            assert again.volume.problem.startswith("block 3 of the write log does not verify")
            (volume,) = (await status_of(again.daemon))["volumes"]
            assert volume["state"] == "failed" and volume["dirty_bytes"] > 0

    run(scenario())
    told, failed = messages(caplog)
    assert "block 3 of the write log does not verify; destage stopped" in told
    assert failed.startswith("volume failed volume=")


def test_rates_that_cannot_be() -> None:
    assert check_rate(None) == limits.SCRUB_BYTES_PER_S and check_rate(0) == 0
    for rate in (-1, 1, limits.SCRUB_MIN_BYTES_PER_S - 1, limits.SCRUB_MAX_BYTES_PER_S + 1):
        with pytest.raises(ValueError, match="scrub_rate is 0"):
            check_rate(rate)
