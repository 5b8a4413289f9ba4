"""The same core on a real directory, with its own thread."""

import os
import select
from pathlib import Path

from millpond.native import ffi, lib, record
from millpond.native.drivers import destroy, open_directory
from millpond.native.store import Lineage, StoreCore, VolumeState, format_store
from store_support import BLOCK, LINEAGE, VOLUME, Write, batch_payload, fill

OK = lib.MP_STATUS_OK


def wait_for(core: StoreCore, driver: object, count: int) -> dict[int, tuple[int, bytes]]:
    """Replies by request id, as a daemon collects them: woken by the eventfd."""
    fd = lib.mp_driver_linux_notify_fd(driver)
    replies: dict[int, tuple[int, bytes]] = {}
    streams: dict[int, bytes] = {}
    while len(replies) < count:
        assert select.select([fd], [], [], 30)[0], "no reply"
        os.read(fd, 8)
        for connection in core.ready():
            while data := core.take(connection):
                streams[connection] = streams.get(connection, b"") + data
            while found := record.decode_frame(streams[connection]):
                frame, length = found
                replies[frame.request_id] = (frame.status, bytes(frame.payload))
                streams[connection] = streams[connection][length:]
    return replies


def test_write_stop_open_read(tmp_path: Path) -> None:
    driver = open_directory(tmp_path)
    format_store(driver, b"s" * 16, segment_bytes=1 << 20)
    core = StoreCore.open(driver)
    core.start()
    state = VolumeState(
        id=VOLUME, name="real", size_bytes=1 << 30, epoch=1, lineages=(Lineage(LINEAGE, 1),)
    )
    core.feed(0, record.encode_frame(lib.MP_FRAME_PUT_VOLUME, state.encode()))
    assert wait_for(core, driver, 1)[0][0] == OK
    for sequence in range(1, 65):
        payload = batch_payload([Write(sequence * 40, fill(sequence, 32))], first=sequence)
        core.feed(
            1,
            record.encode_frame(lib.MP_FRAME_BATCH, payload, checked_bytes=0, request_id=sequence),
        )
    assert {status for status, _ in wait_for(core, driver, 64).values()} == {OK}
    core.stop()
    core.close()
    destroy(driver)

    driver = open_directory(tmp_path)
    core = StoreCore.open(driver)
    core.start()
    for sequence in range(1, 65):
        request = ffi.new("struct mp_read_request *")
        ffi.memmove(request.volume, VOLUME, 16)
        request.epoch = 1
        request.first_block = sequence * 40
        request.block_count = 32
        payload = bytes(ffi.buffer(request))
        core.feed(2, record.encode_frame(lib.MP_FRAME_READ, payload, request_id=sequence))
    for sequence, (status, payload) in wait_for(core, driver, 64).items():
        assert status == OK
        assert payload[-32 * BLOCK :] == fill(sequence, 32)
    assert core.counters()["applied_batches"] == 0  # the stop wrote a checkpoint
    core.stop()
    core.close()
    destroy(driver)
