"""Every bound of the cache room, with the relations that must hold between them.

Sizes are bytes, durations seconds of loop.time().  A number carries its reason.
"""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Destage batches.  4 MiB is the payload of one record (format.h); 64 KiB still amortises the
# store's sync over sixteen blocks.
BATCH_MAX_BYTES = 4 * MIB
BATCH_MIN_BYTES = 64 * KIB
# At most a sixteenth of a second's peak per batch: a sliding second packs to at least 15/16.
PEAK_PARTS = 16
# A write waits this long for company before it is shipped: an overwritten block travels once, and
# the store syncs once.  This is also the floor of the remote image's age.
GATHER_S = 0.25
# The engine answered "nothing synced to ship" and started a sync; its end is announced, and asked
# for again after so long in case that the announcement was for something else.
RESYNC_FIRST_S = 0.1
RESYNC_MAX_S = 1.0

# Shaping.  The sliding second is measured with a margin of 1 ms for the clock's rounding.
PEAK_WINDOW_S = 1.001
AVERAGE_CAPACITY_S = 2.0
TIMER_GRAIN_S = 0.001
RATE_MIN_BYTES_PER_S = 64 * KIB
# A volume with a bound passes its average rate from this part of the bound on, its peak rate from
# that; early enough that a batch more does not exceed it.
LATE_FOR_AVERAGE = 0.5
LATE_FOR_PEAK = 0.75
# Bytes that a store leaves unanswered for so long hold up no other volume's rates any more.
UNANSWERED_S = 5.0
# A batch is at most this part of the volume's share of the log: its guest, if slowed, feels no
# jumps.
SHARE_PARTS = 16

# Links to stores.
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
CALL_TIMEOUT_S = 30.0
BATCH_REPLY_TIMEOUT_S = 60.0
OPEN_WAIT_S = 10.0
STATUS_STORE_TIMEOUT_S = 2.0
OPEN_RACES_MAX = 4
ENGINE_BUSY_FIRST_S = 0.002
ENGINE_BUSY_MAX_S = 0.1
BATCHES_IN_FLIGHT_MAX = 8  # per store: at most 8 batches of 4 MiB wait in sockets
CORRUPT_RETRIES_MAX = 5
STORES_MAX = 64  # per cache; as core_limits.h
# One store has the volume: how long another one may keep us waiting for its no.
STORES_GRACE_S = 1.0
BATCH_REPLY_MAX_BYTES = 4096  # a reply has 48 bytes, an ERROR frame one line

# Volumes.
CONNECTIONS_MAX = 4096
VOLUMES_MAX = 4096
DIRTY_IDLE_S = 5.0  # drained for so long: "dirty" is taken off the record
RELEASE_IDLE_S = 1.0  # no connection for so long: given back to the store
STOP_CONNECTIONS_S = 10.0
# Until what a guest has in flight is answered; else it connects again.  Others wait for it.
GIVE_BACK_S = 2.0
STOP_HURRY_S = 0.5  # guests wait for the next process: what others still need may wait, too
STOP_RELEASE_S = 5.0
STOP_ENGINE_S = 60.0

# Control socket.
CONTROL_LINE_BYTES = 64 * KIB
CONTROL_CONNECTIONS_MAX = 32
CONTROL_IDLE_S = 60.0

# Background verification of the cache device.  2 MiB/s reads 1 TiB in six days, with 16 reads a
# second, so that an idle cache stays below 1 % of a core (4 MiB/s took 1.3 % with 100 volumes, on
# a machine that was busy otherwise); it writes nothing, so it wears nothing.  64 MiB/s reads 1 TiB
# in five hours; beyond it, one read at a time would be most of the time in flight.  64 KiB/s is
# two days per 10 GiB.
SCRUB_BYTES_PER_S = 2 * MIB
SCRUB_MIN_BYTES_PER_S = 64 * KIB
SCRUB_MAX_BYTES_PER_S = 64 * MIB

# Devices.
SLOT_BYTES = 16 * KIB  # default; 4 to 64 KiB at format time
SLOT_MIN_BYTES = 4 * KIB
SLOT_MAX_BYTES = 64 * KIB
LOG_SEGMENT_BYTES = 8 * MIB  # MP_CACHE_SEGMENT_BYTES
LOG_MIN_BYTES = 64 * MIB
CACHE_MIN_BYTES = 256 * MIB  # log minimum, slots and two checkpoints

assert BATCH_MIN_BYTES <= BATCH_MAX_BYTES
assert BATCH_MIN_BYTES <= RATE_MIN_BYTES_PER_S
assert AVERAGE_CAPACITY_S + 1.0 <= 0.05 * 60.0, "bucket and one batch within 5 % of a minute"
assert LOG_MIN_BYTES % LOG_SEGMENT_BYTES == 0 and 2 * LOG_MIN_BYTES <= CACHE_MIN_BYTES
assert RELEASE_IDLE_S <= DIRTY_IDLE_S
assert 0 < LATE_FOR_AVERAGE <= LATE_FOR_PEAK < 1, "the bound is kept, not found exceeded"
assert SCRUB_MIN_BYTES_PER_S <= SCRUB_BYTES_PER_S <= SCRUB_MAX_BYTES_PER_S
assert BACKOFF_FIRST_S <= BACKOFF_MAX_S <= CALL_TIMEOUT_S


def log_bytes_for(cache_bytes: int) -> int:
    """Write log of a cache device: a quarter, at least LOG_MIN_BYTES, at most half."""
    wanted = max(cache_bytes // 4, LOG_MIN_BYTES)
    return min(wanted, cache_bytes // 2) // LOG_SEGMENT_BYTES * LOG_SEGMENT_BYTES
