/* core_limits.h - every bound of the C core's queues, tables and retries, with how they relate. */
#ifndef MILLPOND_CORE_LIMITS_H
#define MILLPOND_CORE_LIMITS_H

#include "format.h"

enum {
	VOLUMES_MAX = 1024,                  /* volumes per shard */
	CONNECTIONS_MAX = 4096,              /* per shard */
	/* READ and WRITE. The handshake announces half of it: a trace of a real guest has 47 MiB,
	 * libnbd sends up to 64 MiB */
	NBD_PAYLOAD_MAX = 64 * 1024 * 1024,
	NBD_DISCARD_MAX = 128 * 1024 * 1024, /* an oversized WRITE up to here is read and dropped */
	/* of replies that one connection may hold: one READ of any alignment fits */
	CONNECTION_BYTES_MAX = NBD_PAYLOAD_MAX + 4 * MP_BLOCK_BYTES,
	REQUESTS_MAX = 1024,                 /* in flight per connection */
	RECEIVE_BYTES = 128 * 1024,          /* a connection's receive buffer */
	SLICE_BLOCKS = 64,                   /* a request is cut into slices of this many blocks */
	SLICE_BYTES = SLICE_BLOCKS * MP_BLOCK_BYTES,
	APPENDS_MAX = 8,                     /* log records in flight per volume */
	APPEND_EXTENTS_MAX = 480,            /* extents per log record: header stays below 64 KiB */
	APPEND_BYTES_MAX = 1024 * 1024,      /* payload per log record; far below a segment */
	/* zero blocks in short runs per log record; see ledger.c */
	APPEND_ZEROS_MAX = 512,
	APPEND_IOVECS_MAX = 500,             /* below MP_IOV_MAX */
	/* of the log; MP_CACHE_SEGMENT_BYTES is usual, and most */
	SEGMENT_BYTES_MIN = 1536 * 1024,
	/* No guest takes the last segments: a failed write of the log is written again there. */
	SEGMENTS_RESERVED = 2,
	RANGE_SEGMENTS = 1,                  /* of trims and zeroes beyond a volume's share */
	SHARE_SEGMENTS_MIN = 2,              /* least that a maximum share of the log can be */
	/* of what no minimum covers and nobody else has, one volume may take; see shares.c */
	SHARE_PART = 3, SHARE_PARTS = 4,
	/* Slowing: from beyond this rate (a first touch that few guests notice), in so many
	 * halvings, to the least rate that destage may have (64 KiB/s, cache/limits.py). */
	RATE_SLOWED_FIRST = 256 * 1024 * 1024,
	RATE_HALVINGS = 12,
	PACE_STEP_NS = 20000000,             /* of a slowed guest's rate goes into one record */
	PACE_CREDIT_NS = 2000000,
	/* room in the last segment of a share that data leaves to trims and tellings */
	RANGE_ROOM_BYTES = 64 * 1024,
	/* of the buffers that a volume may hold otherwise, for writes of a slowed guest */
	SLOWED_BUFFER_PARTS = 4,
	RANGE_BLOCKS_MIN = 9,                /* trims from this many blocks on are tombstones */
	TOMBSTONES_MAX = 65536,              /* per shard; more wait for destage and sweep */
	SWEEP_STEPS = 256,                   /* table steps of sweeping per turn of the loop */
	STORES_MAX = 64,                     /* that one cache is connected to */
	FETCH_BUCKETS = 256,                 /* of outstanding fetches; a power of two */
	FETCH_OUT_BYTES = 16 * 1024,         /* READ frames on their way into a socket */
	FETCH_RECEIVE_BYTES = 256 * 1024,    /* of replies, per system call */
	FETCH_RECEIVES = 8,                  /* per connection and turn */
	FETCH_BLOCKS_MAX = SLICE_BLOCKS,     /* of one READ frame: what a read has, at most */
	STREAMS_MAX = 8,                     /* sequential readers told apart, per volume */
	STREAM_PATIENCE = 64,                /* a real stream outlives this many other reads, x 8 */
	READAHEAD_REQUESTS = 3,              /* that continue one another before it is a stream */
	READAHEAD_GAP_REQUESTS = 4,          /* that change places in flight */
	READAHEAD_BLOCKS_MIN = 32,           /* first window; it doubles with each use */
	READAHEAD_BLOCKS_MAX = 512,
	READAHEAD_BYTES_MAX = 16 * 1024 * 1024, /* on its way or not yet asked for; per shard */
	FETCH_ATTEMPTS = 3,                  /* of a reply that does not verify */
	/* slot writes in flight; beyond it a miss is not installed */
	FILLS_MAX = 128,
	/* blocks looked at per turn when a segment is released */
	PROMOTE_STEPS = 64,
	SCAN_STEP_BYTES = 512 * 1024,        /* one read of a segment scan */
	CHECKPOINT_STEP_BYTES = 512 * 1024,  /* one write of a checkpoint */
	INTERNAL_BYTES = 16 * 1024 * 1024,   /* of buffers, beyond what guest requests may take */
	CHECKPOINT_FAILURES_MAX = 3,         /* failed writes of checkpoints in a row */
	/* Background verification: one read of it, which a guest's may have to wait for. */
	SCRUB_READ_BYTES = 128 * 1024,
	SCRUB_SLOTS_MAX = SCRUB_READ_BYTES / MP_BLOCK_BYTES,
	SCRUB_BURST_BYTES = 4 * SCRUB_READ_BYTES, /* of its budget that is kept while it yields */
	SCRUB_LOOKS = 4096,                  /* slots passed over for as much as one read */
	/* A pass takes at least as long as so much would. */
	SCRUB_PASS_BYTES = 256 * 1024 * 1024,
	EVENTS_MAX = 65536,
	REPLY_IOVECS = 256,                  /* per sendmsg */
	WALK_STEPS = 1024,                   /* of CACHE and BLOCK_STATUS per turn, in blocks */
	PREFETCHES_MAX = 4,                  /* slices of CACHE that wait for the store */
	STATUSES_MAX = 8,                    /* BLOCK_STATUS requests in flight per connection */
	STATUS_RUNS_MAX = 1024,              /* descriptors in one answer to BLOCK_STATUS */
	/* of the range of a BLOCK_STATUS that is answered; the client asks again for the rest */
	STATUS_BLOCKS_MAX = 262144,
};

/* An index key has 40 bits of block. */
#define VOLUME_BYTES_MAX ((1ULL << 40) * MP_BLOCK_BYTES)

/* Numbers of volumes in slot keys, and blocks of a volume in index keys: what their bits can
 * hold. */
#define ORIGINS_MAX 0xffffffU
#define VOLUME_BLOCKS_MAX (1ULL << 40)
/* Quiet time after a sync before a record tells recovery about it; see log.c. */
#define SYNCED_RECORD_DELAY_NS 50000000ULL
/* Filled slots are worth a checkpoint (a crash forgets those behind it): soon while one is cheap,
 * else by the bytes filled, so that checkpoints stay a small part of what is written. */
#define CHECKPOINT_FILLS_NS 5000000000ULL
#define CHECKPOINT_CHEAP_BYTES (32ULL * 1024 * 1024)
#define CHECKPOINT_FILLS_BYTES (64ULL * 1024 * 1024)
#define CHECKPOINT_FILLS_FACTOR 8

/* A sync holds up what else the device does, for milliseconds on many. Nobody waits for one that
 * only destage wants; what it brings is shipped for a while, so it comes at most this often. */
#define DESTAGE_SYNC_NS 50000000ULL

/* So long without a write of a guest, log segments are given back before the log is short. */
#define RELEASE_REST_NS 100000000ULL

/* Background verification goes where guests have been quiet for so long: more than there is between
 * two requests of one that never stops. At depth 16, replies and requests come in bursts, and
 * between them nothing is in flight; reads that went there cost a third of the guest's rate. */
#define SCRUB_QUIET_NS 2000000ULL
/* A read of it waits so long for that. Twenty a second, of SCRUB_READ_BYTES, go to a cache that
 * never rests: it is verified once in five days per TiB. */
#define SCRUB_PATIENCE_NS 50000000ULL

/* Ages of dirty data are known to this resolution. */
#define AGE_RESOLUTION_NS 100000000ULL

_Static_assert(APPEND_BYTES_MAX + 65536 + MP_BLOCK_BYTES < SEGMENT_BYTES_MIN,
	       "record fits a segment");
_Static_assert(MP_CACHE_SEGMENT_BYTES % SCAN_STEP_BYTES == 0, "a segment is whole scan steps");
_Static_assert(MP_RECORD_HEADER_BYTES + APPEND_EXTENTS_MAX * MP_EXTENT_BYTES <= 65536,
	       "header fits");
_Static_assert(PREFETCHES_MAX * SLICE_BYTES <= INTERNAL_BYTES, "CACHE leaves room for guests");
_Static_assert(2 * READAHEAD_BLOCKS_MAX * MP_BLOCK_BYTES <= READAHEAD_BYTES_MAX, "some streams");
_Static_assert(FETCH_BLOCKS_MAX <= (int)MP_READ_BLOCKS_MAX, "a store takes it");
_Static_assert(RATE_SLOWED_FIRST >> RATE_HALVINGS == 64 * 1024, "slowed to destage's least rate");
_Static_assert(RANGE_ROOM_BYTES < SEGMENT_BYTES_MIN / 8, "data has most of a segment");
_Static_assert(SHARE_PART < SHARE_PARTS, "something is left for the next volume");
_Static_assert(SLICE_BYTES <= APPEND_BYTES_MAX, "one mutation fits one record");
_Static_assert(SCRUB_READ_BYTES / MP_BLOCK_BYTES / MP_SLOT_BLOCKS_MAX >= 1, "a slot is one read");
_Static_assert(MP_CACHE_SEGMENT_BYTES % SCRUB_READ_BYTES == 0, "a segment is whole reads");

#endif
