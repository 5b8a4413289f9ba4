"""Connections that behave, misbehave and race, against a real daemon and core."""

import asyncio
import os
import random
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from millpond.native import lib
from millpond.native.record import encode_batch
from millpond.store import limits, wire
from millpond.store.client import StoreClient, connect_data
from millpond.store.daemon import StoreDaemon
from millpond.store.errors import Code, ProtocolError, StoreError, Unreachable
from millpond.store.requests import DataRequests, ReadReply, encode_read
from store_daemon import ME, OTHER, SEGMENT_BYTES, RunTest, hello, running

BLOCK_BYTES: int = lib.MP_BLOCK_BYTES


def noise(length_bytes: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(length_bytes)


async def opened_volume(client: StoreClient, size_bytes: int = 64 << 20) -> tuple[bytes, int]:
    """A volume open for writing by ME with lineage 7: its id and epoch."""
    volume = (await client.call("volume.create", name="vm", size_bytes=size_bytes))["volume"]
    reply = await client.call(
        "volume.open", id=volume["id"], cache_id=ME.hex(), lineage=7, expected_epoch=0
    )
    return bytes.fromhex(volume["id"]), reply["volume"]["epoch"]


def mode_of(path: Path) -> int | None:
    """Permissions of a file, None when there is none."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else None


def batch(volume_id: bytes, epoch: int, sequence: int, block: int, data: bytes) -> bytes:
    payload, last = encode_batch(
        volume_id, lineage=7, epoch=epoch, first_sequence=sequence, first_block=block, data=data
    )
    assert last == sequence, "one extent, one sequence"
    return wire.encode_frame(wire.BATCH, payload, checked_bytes=0, request_id=sequence)


def read(volume_id: bytes, epoch: int, block: int, count: int, request_id: int) -> bytes:
    payload = encode_read(
        volume_id, epoch=epoch, minimum_sequence=0, first_block=block, block_count=count
    )
    return wire.encode_frame(wire.READ, payload, request_id=request_id)


def test_hello_split_at_every_byte(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            stream = hello()
            for cut in range(1, len(stream)):
                raw = await store.raw()
                raw.writer.write(stream[:cut])
                await asyncio.sleep(0)
                raw.writer.write(stream[cut:])
                reply = wire.decode_json((await raw.frame()).payload, wire.HelloReply, what="reply")
                assert reply.wire_version == wire.WIRE_VERSION
                assert reply.store_id == store.daemon.store_id.hex()
                assert reply.max_frame_bytes == wire.PAYLOAD_MAX_BYTES
                await raw.close()

    run(situation())


def test_hello_and_first_frames_in_one_packet(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            raw = await store.raw()
            call = wire.encode_json(wire.CONTROL, {"op": "volume.list"}, request_id=9)
            raw.writer.write(hello() + call)
            assert (await raw.frame()).type == wire.HELLO_REPLY
            reply = await raw.frame()
            assert (reply.type, reply.request_id) == (wire.CONTROL_REPLY, 9)
            await raw.close()
            raw = await store.raw()
            raw.writer.write(hello("fetch") + read(OTHER, 0, 0, 1, request_id=5))
            assert (await raw.frame()).type == wire.HELLO_REPLY
            reply = await raw.frame()
            assert (reply.request_id, reply.status) == (5, wire.STATUS_UNKNOWN_VOLUME)
            await raw.close()

    run(situation())


@pytest.mark.expects_warnings
@pytest.mark.parametrize(
    ("first_bytes", "words"),
    [
        (b"\0" * 64, "does not speak Millpond"),
        (hello()[:16] + b"\xff\xff\xff\xff" + hello()[20:], "are allowed"),
        (wire.encode_json(wire.CONTROL, {"op": "status"}), "unexpected type 3"),
        (hello()[:4] + b"\x09\0" + hello()[6:], "speaks wire version 9, this side speaks 1"),
        (hello()[:70] + b"?" + hello()[71:], "checksum"),
    ],
)
def test_broken_handshake_is_answered_and_ended(
    run: RunTest, tmp_path: Path, first_bytes: bytes, words: str
) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            raw = await store.raw()
            raw.writer.write(first_bytes)
            frame = await raw.frame()
            assert frame.type == wire.ERROR
            assert words in wire.error_text(frame.payload)
            assert await raw.ended()
            await raw.close()

    run(situation())


@pytest.mark.expects_warnings
def test_hello_of_another_version_names_both_sides(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            raw = await store.raw()
            raw.writer.write(hello(wire_version=2))
            frame = await raw.frame()
            reply = wire.decode_json(frame.payload, wire.HelloReply, what="HELLO_REPLY")
            assert frame.type == wire.HELLO_REPLY and frame.status == wire.STATUS_INVALID
            assert "the client speaks wire version 2, this store speaks 1" in reply.error
            assert await raw.ended()
            await raw.close()

    run(situation())


@pytest.mark.expects_warnings
def test_client_that_says_nothing_is_shown_the_door(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path, handshake_timeout_s=0.05) as store:
            silent = await store.raw()
            half = await store.raw()
            half.writer.write(hello()[:-1])
            for raw in (silent, half):
                assert "no HELLO within 0.05 s" in wire.error_text((await raw.frame()).payload)
                assert await raw.ended()
                await raw.close()
            client = await store.client()
            await asyncio.sleep(0.1)
            assert (await client.call("status"))["store"]["connections"] >= 1
            await client.close()

    run(situation())


@pytest.mark.expects_warnings
def test_more_connections_than_allowed(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path, connections_max=2) as store:
            first, second = await store.client(), await store.client(OTHER)
            with pytest.raises(ProtocolError, match="too many connections"):
                await store.client()
            await second.close()
            await asyncio.sleep(0.05)
            third = await store.client()
            assert (await third.call("status"))["store"]["refused_connections"] == 1
            await first.close()
            await third.close()

    run(situation())


def test_malformed_calls_are_refused_one_by_one(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            for op, arguments, words in (
                ("volume.explode", {}, "volume.explode"),
                ("volume.create", {"name": "a"}, "size_bytes"),
                ("volume.create", {"name": "a", "size_bytes": "20G"}, "size_bytes"),
                ("volume.show", {"id": "../../etc/passwd"}, "id"),
                ("volume.show", {}, "either"),
                ("volume.show", {"name": "a", "id": "0" * 32}, "either"),
            ):
                with pytest.raises(StoreError) as caught:
                    await client.call(op, **arguments)
                assert caught.value.code == Code.INVALID
                assert words in caught.value.message
            await client.call("volume.create", name="a", size_bytes=4096, colour="blue")
            await client.close()
            raw = await store.raw()
            await raw.hello()
            for payload in (b"", b"[", b"\xff\xfe", b"[" * 5000, b'{"op":1}'):
                raw.writer.write(wire.encode_frame(wire.CONTROL, payload))
                reply = await raw.frame()
                assert reply.type == wire.CONTROL_REPLY
                assert b"E_INVALID" in bytes(reply.payload)
            await raw.close()

    run(situation())


def test_thousands_of_calls_pipelined(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            calls = [client.call("volume.show", name=f"v{n}") for n in range(3000)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(r, StoreError) for r in results)
            assert [r.message for r in results] == [  # type: ignore[union-attr]
                f"no volume named 'v{n}'" for n in range(3000)
            ]
            await client.close()

    run(situation())


def test_thousands_of_batches_and_reads_pipelined(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume_id, epoch = await opened_volume(client)
            raw = await store.raw()
            await raw.hello("destage")
            count = 2000
            data = [noise(BLOCK_BYTES, seed) for seed in range(16)]
            raw.writer.writelines(
                batch(volume_id, epoch, n + 1, n, data[n % 16]) for n in range(count)
            )
            for n in range(count):
                reply = await raw.frame()
                assert (reply.request_id, reply.status) == (n + 1, wire.STATUS_OK)
            await raw.close()
            raw = await store.raw()
            await raw.hello("fetch")
            raw.writer.writelines(read(volume_id, epoch, n, 1, n) for n in range(count))
            for _ in range(count):
                frame = await raw.frame()
                n = frame.request_id
                reply_n = ReadReply(frame, volume_id=volume_id, first_block=n, block_count=1)
                ((block, memory, length),) = reply_n.blocks()
                assert block == n and bytes(memory)[:length] == data[n % 16]
            await raw.close()
            await client.close()

    run(situation())


def test_client_that_never_reads_its_replies_costs_bounded_memory(
    run: RunTest, tmp_path: Path
) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume_id, epoch = await opened_volume(client)
            writer = await store.raw()
            await writer.hello("destage")
            for n in range(64):
                writer.writer.write(batch(volume_id, epoch, n + 1, n * 4, noise(16384, n)))
            for _ in range(64):
                assert (await writer.frame()).status == wire.STATUS_OK
            await writer.close()
            greedy = socket.socket(socket.AF_UNIX)
            greedy.setblocking(False)
            greedy.connect(store.daemon.addresses[0].path)
            requests = b"".join(read(volume_id, epoch, 0, 256, n) for n in range(1000))
            sent = 0
            stream = hello("fetch") + requests * 50
            for _ in range(200):  # until the store has stopped reading for good
                try:
                    sent += greedy.send(stream[sent : sent + 65536])
                except BlockingIOError:
                    await asyncio.sleep(0.005)
            assert sent < len(stream), "the store went on reading from one who does not listen"
            # Answers are made only for what was read: a handful beyond the send buffer.
            counters = (await client.call("status"))["store"]
            assert counters["read_bytes"] < 600 << 20
            greedy.close()
            again = await client.call("volume.list")
            assert len(again["volumes"]) == 1, "others are served meanwhile"
            await client.close()

    run(situation())


def test_control_client_that_never_reads_is_not_read_any_more(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            for n in range(200):
                await client.call("volume.create", name=f"v{n:0200}", size_bytes=4096)
            deaf = socket.socket(socket.AF_UNIX)
            deaf.setblocking(False)
            deaf.connect(store.daemon.addresses[0].path)
            stream = hello() + wire.encode_json(wire.CONTROL, {"op": "volume.list"}) * 20000
            sent = 0
            for _ in range(200):
                try:
                    sent += deaf.send(stream[sent : sent + 65536])
                except BlockingIOError:
                    await asyncio.sleep(0.005)
            assert sent < len(stream)
            deaf.close()
            await client.close()

    run(situation())


@pytest.mark.expects_warnings
def test_data_connection_that_breaks_the_protocol_is_told_and_ended(
    run: RunTest, tmp_path: Path
) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume_id, epoch = await opened_volume(client)
            good = read(volume_id, epoch, 0, 1, request_id=1)
            put = wire.encode_frame(wire.PUT_VOLUME, bytes(688))
            for broken in (b"\0" * 64, put, good[:70] + b"\1" + good[71:], good[:4] + b"\7" * 60):
                raw = await store.raw()
                await raw.hello("fetch")
                raw.writer.write(broken)
                assert (await raw.frame()).type == wire.ERROR
                assert await raw.ended()
                await raw.close()
            await client.close()

    run(situation())


def test_batch_of_an_older_epoch_is_refused(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path) as store:
            client = await store.client()
            volume_id, epoch = await opened_volume(client)
            await client.call(
                "volume.open",
                id=volume_id.hex(),
                cache_id=OTHER.hex(),
                lineage=8,
                expected_epoch=epoch,
                accept_loss=True,
            )
            raw = await store.raw()
            await raw.hello("destage")
            raw.writer.write(batch(volume_id, epoch, 1, 0, noise(BLOCK_BYTES)))
            assert (await raw.frame()).status == wire.STATUS_STALE_EPOCH
            await raw.close()
            await client.close()

    run(situation())


def test_link_hears_when_the_store_goes_away(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        lost: list[Exception | None] = []
        async with running(tmp_path) as store:
            client = await store.client()
            link = await connect_data(
                store.address,
                role="fetch",
                client_id=ME,
                client_name="test",
                on_bytes=lambda view: None,
                on_lost=lost.append,
            )
            closed = await connect_data(
                store.address,
                role="fetch",
                client_id=ME,
                client_name="test",
                on_bytes=lambda view: None,
                on_lost=lost.append,
            )
            await closed.close()
            assert lost == [None], "we closed it ourselves"
        await asyncio.sleep(0.05)
        assert len(lost) == 2 and isinstance(lost[1], Unreachable)
        assert not link.writable
        with pytest.raises(Unreachable):
            await link.drain()
        with pytest.raises(Unreachable):
            await client.call("volume.list")
        with pytest.raises(Unreachable):
            await StoreClient.connect(store.address, client_id=ME, client_name="late")

    run(situation())


def test_second_daemon_on_the_same_directory_is_refused(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path):
            with pytest.raises(StoreError) as caught:
                await StoreDaemon.start(str(tmp_path))
            assert caught.value.code == Code.BUSY
            assert "served by another process" in caught.value.message
            assert "\n" not in caught.value.message
            code = (
                "from millpond.cli.main import main; import sys;"
                f" sys.exit(main(['store', 'serve', {str(tmp_path)!r}]))"
            )
            other = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True
            )
            assert other.returncode == 5
            assert other.stderr.startswith("millpond: error: directory ")
            assert other.stderr.count("\n") == 1

    run(situation())


def test_directory_without_a_store_is_not_formatted_unasked(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        with pytest.raises(StoreError, match="holds no store; make one with --format"):
            await StoreDaemon.start(str(tmp_path))
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(StoreError, match="is not empty"):
            await StoreDaemon.start(str(tmp_path), format_when_empty=True)
        with pytest.raises(StoreError, match="there is no directory"):
            await StoreDaemon.start(str(tmp_path / "nowhere"), format_when_empty=True)
        assert os.listdir(tmp_path) == ["thesis.txt"]

    run(situation())


@pytest.mark.expects_warnings
def test_sockets_are_private_and_tcp_is_loopback_only(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path, listen=["127.0.0.1:0"]) as store:
            path = Path(store.daemon.addresses[0].path)
            assert mode_of(path) == 0o660
            tcp = store.daemon.addresses[1]
            assert tcp.port > 0
            client = await StoreClient.connect(str(tcp), client_id=ME, client_name="tcp")
            assert str(tcp) in (await client.call("status"))["store"]["listening"]
            await client.close()
        assert mode_of(path) is None, "no socket file is left"
        for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "store.example:7420"):
            with pytest.raises(StoreError, match="--insecure-listen"):
                await StoreDaemon.start(str(tmp_path), listen=[address])
        async with running(tmp_path, listen=["0.0.0.0:0"], insecure_listen=True) as store:
            assert store.daemon.addresses[1].port > 0

    run(situation())


def test_socket_file_of_a_dead_daemon_is_replaced(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(tmp_path / "store.sock"))
        dead.close()
        async with running(tmp_path) as store:
            await (await store.client()).close()
        alive = socket.socket(socket.AF_UNIX)
        alive.bind(str(tmp_path / "other.sock"))
        alive.listen()
        with pytest.raises(StoreError, match="another process serves there"):
            await StoreDaemon.start(str(tmp_path), listen=[f"unix:{tmp_path}/other.sock"])
        alive.close()

    run(situation())


def test_data_requests_fail_with_the_words_of_the_store(run: RunTest, tmp_path: Path) -> None:
    async def situation() -> None:
        async with running(tmp_path, segment_bytes=SEGMENT_BYTES) as store:
            requests = DataRequests("fetch", "ghost")
            await requests.connect(store.address, client_id=ME, client_name="test")
            payload = encode_read(OTHER, epoch=0, minimum_sequence=0, first_block=0, block_count=1)
            with pytest.raises(StoreError, match="'ghost': unknown volume") as caught:
                await (await requests.submit(wire.READ, payload))
            assert caught.value.code == Code.NOT_FOUND
            await requests.close()

    run(situation())


def test_pending_limits_let_the_largest_frame_through() -> None:
    assert limits.DESTAGE_PENDING_LOW_BYTES > limits.FRAME_BYTES_MAX
    read_frame_bytes = len(read(ME, 0, 0, 1, 0))
    assert read_frame_bytes == 112
