"""Random histories against a dict of blocks."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millpond.native import lib
from millpond.native.drivers import SimOptions
from store_support import BLOCK, World, Write, fill

OK = lib.MP_STATUS_OK
BLOCKS = 3000  # more than five leaves, two levels

write = st.builds(
    lambda first, count, seed, compressible: Write(
        first, fill(seed, min(count, BLOCKS - first), compressible=compressible)
    ),
    st.integers(0, BLOCKS - 1),
    st.integers(1, 12),
    st.integers(1, 50),
    st.booleans(),
)
trim = st.builds(
    lambda first, count: Write(first, block_count=min(count, BLOCKS - first)),
    st.integers(0, BLOCKS - 1),
    st.sampled_from([1, 3, 100, 512, 1024, BLOCKS]),
)
batch = st.lists(st.one_of(write, write, trim), min_size=1, max_size=6)
step = st.one_of(
    batch, batch, batch, st.sampled_from(["checkpoint", "reopen", "settle", "stop", "overlap"])
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(step, max_size=14), st.integers(0, 1000))
def test_histories_read_back_like_the_model(steps: list[object], seed: int) -> None:
    world = World(SimOptions(seed=seed, latency_ns=3000, reorder=True), page_cache_bytes=BLOCK)
    world.format(segment_bytes=128 * 1024).open()
    world.create(blocks=BLOCKS)
    model: dict[int, bytes] = {}
    sequence, last = 1, []
    try:
        for action in steps:
            if isinstance(action, list):
                last = action
                assert world.write(action, first=sequence) == OK
                sequence += len(action)
                for one in action:
                    count = one.block_count or len(one.data) // BLOCK
                    for n in range(count):
                        model[one.first_block + n] = one.data[n * BLOCK : (n + 1) * BLOCK]
            elif action == "overlap" and last:
                assert world.write(last, first=sequence - len(last)) == OK
            elif action == "checkpoint":
                assert world.checkpoint() == OK
            elif action == "settle":
                world.settle(30)
            elif action in ("reopen", "stop"):
                if action == "stop":
                    world.store.stop()
                world.reopen()
        expected = b"".join(model.get(block, b"") or bytes(BLOCK) for block in range(BLOCKS))
        assert world.image(BLOCKS) == expected
        assert world.state().applied_sequence == sequence - 1
        world.reopen()
        assert world.image(BLOCKS) == expected
    finally:
        world.close()
