/* engine.h - what the control plane may ask of a shard's engine.
 *
 * One engine thread owns all state of a shard: NBD transmission, log index, write log, read slots,
 * policy. The control plane talks to it through a mailbox (functions here, any thread unless said
 * otherwise) and hears from it through events, batches and the driver's notify. Nothing here
 * blocks; commands take effect in the order of the calls.
 */
#ifndef MILLPOND_ENGINE_H
#define MILLPOND_ENGINE_H

#include "driver.h"
#include "format.h"

/* cdef: begin */
struct mp_engine;
/* Deliberate faults, for tests that prove that tests can fail. Never set outside tests/. */
enum mp_engine_fault { MP_FAULT_ACK_BEFORE_WRITE = 1, MP_FAULT_SKIP_DATA_CHECKSUM = 2,
	MP_FAULT_SKIP_SYNC = 4, MP_FAULT_REUSE_SEGMENT_EARLY = 8, MP_FAULT_SHIP_UNSYNCED = 16,
	MP_FAULT_NO_INCARNATION = 32, MP_FAULT_NO_BLOCK_LOCK = 64, MP_FAULT_KEEP_STALE_SLOTS = 128,
	MP_FAULT_STALE_FILL = 256, MP_FAULT_DROP_TOMBSTONE = 512, MP_FAULT_CUT_WITHOUT_LAST = 1024,
	MP_FAULT_ACK_BEFORE_DIRTY = 2048, MP_FAULT_ACK_OUT_OF_ORDER = 4096,
	MP_FAULT_FAILED_SYNC_IS_GOOD = 8192, MP_FAULT_DIRTY_IS_MISS = 16384,
	MP_FAULT_ACK_TRIM_EARLY = 32768, MP_FAULT_NO_FENCE = 65536 };

struct mp_cache_format_options {
	uint64_t device_bytes;
	uint64_t slot_bytes;               /* 4096 to 65536, a power of two */
	uint64_t log_bytes;                /* rounded down to whole segments */
	uint8_t cache_id[16];
	/* of the log; 0: 8 MiB. Less is for tests: it wraps sooner */
	uint64_t segment_bytes;
};
/* Format the device behind driver (file 0): superblocks, log written once with zeroes, empty
 * checkpoint. Blocking; progress (may be NULL) is a counter of log bytes written so far, for
 * another thread to show. Overwrites. */
int mp_cache_format(struct mp_driver *driver, const struct mp_cache_format_options *options,
		    uint64_t *progress, char *message, uint64_t message_bytes);

struct mp_engine_options {
	uint64_t buffer_bytes;             /* RAM for requests in flight; default 256 MiB */
	uint64_t checkpoint_every_bytes;   /* of log, at least; default 512 MiB */
	/* how long to poll before sleeping while the device works; 0: not at all */
	uint64_t poll_ns;
	/* background verification of log and slots reads so much; 0: there is none */
	uint64_t scrub_bytes_per_s;
	uint64_t scrub_patience_ns;        /* each read of it yields so long; 0: 50 ms */
	uint64_t test_faults;              /* enum mp_engine_fault; tests only */
};
/* Recover the device and open. NULL on failure: *error is -errno, message one line for the
 * operator. Unclean: chains are followed and verified, stale slots dropped. The driver must outlive
 * the engine. */
struct mp_engine *mp_engine_open(struct mp_driver *driver, const struct mp_engine_options *options,
				 int *error, char *message, uint64_t message_bytes);
void mp_engine_free(struct mp_engine *engine); /* reactor stopped; writes nothing */
/* tests; -errno: the world ended */
int64_t mp_engine_step(struct mp_engine *engine, int64_t timeout_ns);
int mp_engine_start(struct mp_engine *engine);
/* Stop serving, let accepted mutations finish, sync, write a clean checkpoint, join. Dirty data
 * stays on the device. Any thread, blocks. mp_engine_request_stop / mp_engine_stopped: the same for
 * callers of mp_engine_step. */
void mp_engine_stop(struct mp_engine *engine);
void mp_engine_request_stop(struct mp_engine *engine);
int mp_engine_stopped(const struct mp_engine *engine);
void mp_engine_cache_id(const struct mp_engine *engine, uint8_t *out);

enum mp_volume_flag { MP_VOLUME_OPEN = 1, MP_VOLUME_DIRTY_RECORDED = 2, MP_VOLUME_FAILED = 4,
	MP_VOLUME_LATE = 8 };
struct mp_engine_volume {
	uint8_t id[16];
	uint64_t size_bytes, epoch, lineage;
	uint64_t destaged_sequence;        /* applied at the store */
	uint64_t synced_sequence;          /* durable on the device */
	uint64_t last_sequence;            /* acknowledged or about to be */
	uint64_t dirty_bytes;              /* log bytes not yet destaged */
	uint64_t log_segments;             /* held by its chain */
	uint64_t oldest_dirty_ns;          /* age of the oldest undestaged write; 0: none */
	uint64_t slots_held;
	uint64_t log_share_bytes;          /* most of dirty_bytes, now */
	/* its guest may write, now; UINT64_MAX: not slowed, 0: waits for destage */
	uint64_t slowed_bytes_per_s;
	uint64_t connections;
	uint64_t flags;                    /* enum mp_volume_flag */
	uint64_t reads, writes, flushes, trims, zeroes;
	uint64_t read_hit_blocks, read_miss_blocks, read_zero_blocks;
	uint64_t log_checksum_errors;
	int64_t error;                     /* why it is MP_VOLUME_FAILED: -errno */
};
struct mp_engine_counters {
	uint64_t requests, hits, misses, read_bytes, written_bytes, flushes, log_records, log_bytes,
		syncs, slot_hits, slot_writes, slot_bytes_written, slot_checksum_errors,
		slot_stale_after_restart, log_checksum_errors, fetches, fetches_joined,
		readahead_blocks, fetch_checksum_errors,
		fetch_retries, batches, batch_bytes, checkpoints, checkpoint_bytes, protocol_errors,
		refused_requests, device_errors, segments_free, segments_total, segments_waiting,
		slots_used, slots_total, slot_bytes, index_entries, memory_bytes, inflight_requests,
		buffer_bytes_used, promoted_blocks, recovered_records, recovered_bytes,
		log_rescues, failed,
		/* of the background verification: enum mp_scrub_stage, and its next slot then; the
		 * errors are of blocks and records that it found, not of what guests read */
		scrub_stage, scrub_slot, scrub_passes, scrub_read_bytes, scrub_verified_bytes,
		scrub_slot_errors, scrub_log_errors;
};
/* What a pass is at: log that is undestaged, the rest of the log, slots; or it is over. */
enum mp_scrub_stage { MP_SCRUB_OFF, MP_SCRUB_RESTS, MP_SCRUB_DIRTY, MP_SCRUB_CLEAN,
	MP_SCRUB_SLOTS };
int64_t mp_engine_list_volumes(struct mp_engine *engine, struct mp_engine_volume *out,
			       uint64_t capacity);
void mp_engine_counters(struct mp_engine *engine, struct mp_engine_counters *out);

/* Make a volume known, or known again under a new epoch and lineage: from here its records carry
 * them. applied_sequence is the store's position. keep_slots: the slots are valid for that
 * position. A volume that the device remembers with dirty records continues after its last
 * sequence; then applied_sequence must cover all but those. store: where its misses go, below
 * 64 (-EINVAL), as in take_fetch. Result: MP_EVENT_OPENED with cookie, status and last_sequence. */
int mp_engine_open_volume(struct mp_engine *engine, const uint8_t *id, uint64_t size_bytes,
			  uint64_t epoch, uint64_t lineage, uint64_t applied_sequence,
			  int keep_slots, uint32_t store, uint64_t cookie);
/* What a volume may take of a shard, for as long as it is open; 0: nothing set. Minimums are kept
 * free for it as far as the device allows, maximums are at least two segments. */
struct mp_volume_shares {
	uint64_t log_min_bytes, log_max_bytes;
	uint64_t slots_min_bytes, slots_max_bytes;
	/* The guest is slowed, and stopped, rather than that a write is undestaged for so long. */
	uint64_t strict_bound_ns;
};
int mp_engine_configure_volume(struct mp_engine *engine, const uint8_t *id,
			       const struct mp_volume_shares *shares);
/* Drop a volume without dirty records and without connections; its slots are swept.
 * MP_EVENT_CLOSED. */
int mp_engine_close_volume(struct mp_engine *engine, const uint8_t *id, int forget_slots,
			   uint64_t cookie);
/* An open volume grows: requests reach as far as size_bytes from here on. The store's record has
 * grown before, durably; ours is saved with the next checkpoint, and not needed before: every open
 * names the size. A size that is not larger changes nothing: only a closed volume shrinks. */
int mp_engine_grow_volume(struct mp_engine *engine, const uint8_t *id, uint64_t size_bytes);
/* Where a volume stands once every command before this one took effect: MP_EVENT_POSITION with
 * cookie; last_sequence covers everything acknowledged so far. -ENOENT: not known. */
int mp_engine_position(struct mp_engine *engine, const uint8_t *id, uint64_t cookie);
/* What the handshake agreed on with a client. */
enum mp_connect_flag { MP_CONNECT_READ_ONLY = 1, MP_CONNECT_STRUCTURED = 2,
	/* base:allocation, as context 1; only with MP_CONNECT_STRUCTURED */
	MP_CONNECT_ALLOCATION = 4 };
/* Hand over a connection in transmission phase, with bytes already read from it. flags: enum
 * mp_connect_flag. The engine owns socket from here (on error too). MP_EVENT_CONNECTION_CLOSED
 * with cookie when it is gone; status 1: after NBD_CMD_DISC. */
int mp_engine_connect(struct mp_engine *engine, const uint8_t *id, int socket, uint32_t flags,
		      const void *bytes, uint64_t length_bytes, uint64_t cookie);
/* Stop a connection: nothing more is parsed, accepted mutations finish, then it is closed. */
int mp_engine_disconnect(struct mp_engine *engine, uint64_t cookie);
/* Give a connection back between two requests, for another process to go on with:
 * MP_EVENT_CONNECTION_LEFT with cookie and the bytes that were read behind the last request, once
 * all before is answered; then take_left, after which the socket is the caller's. Returns the
 * bytes copied to out, or -ENOENT, or -EMSGSIZE. */
int mp_engine_leave(struct mp_engine *engine, uint64_t cookie);
int64_t mp_engine_take_left(struct mp_engine *engine, uint64_t cookie, int *socket, void *out,
			    uint64_t capacity_bytes);
/* The stores have (1) durably recorded that this cache may hold acknowledged data, or are about to
 * clear that (0). After every open, until 1, mutations are logged but not acknowledged, and
 * MP_EVENT_NEED_DIRTY asks once. 0 is refused with MP_EVENT_DIRTY_CLEAR status -EBUSY while records
 * are undestaged, else status 0; then the store may be told. */
int mp_engine_dirty_recorded(struct mp_engine *engine, const uint8_t *id, int recorded);

/* Destage: cut, coalesce and encode the next batch of a volume: at most max_bytes of raw data, at
 * least one record. MP_EVENT_BATCH: status 0 with first/last_sequence and frame bytes to take,
 * -ENODATA nothing synced to ship (a sync is started when there is something to sync), -EIO the log
 * does not verify: the volume is failed. One batch per volume at a time; it stays until destaged or
 * cut again. */
int mp_engine_cut(struct mp_engine *engine, const uint8_t *id, uint64_t max_bytes, uint64_t cookie);
int64_t mp_engine_take_batch(struct mp_engine *engine, const uint8_t *id, void *out,
			     uint64_t capacity_bytes);
/* The store has durably applied everything up to sequence. */
int mp_engine_destaged(struct mp_engine *engine, const uint8_t *id, uint64_t sequence);

/* What a store said in its HELLO_REPLY that it can do. */
enum mp_store_feature { MP_STORE_BLOCK_STATUS = 1 };
/* Misses: hand over the connection to a store, connected and its handshake done, with bytes already
 * read from it. The engine owns socket from here (on error too) and sends READ frames on it.
 * MP_EVENT_LINK_BROKEN with cookie when it is gone; outstanding reads wait and are sent again on
 * the next one. A connection that the store had before is closed. features: enum
 * mp_store_feature. */
int mp_engine_fetch_open(struct mp_engine *engine, uint32_t store, int socket, uint32_t features,
			 const void *bytes, uint64_t length_bytes, uint64_t cookie);
/* Close it, without an event. */
int mp_engine_fetch_close(struct mp_engine *engine, uint32_t store);
/* Bytes that went over a store's connections so far. */
void mp_engine_fetch_bytes(struct mp_engine *engine, uint32_t store, uint64_t *sent,
			   uint64_t *received);

enum mp_event_type { MP_EVENT_OPENED = 1, MP_EVENT_CLOSED, MP_EVENT_CONNECTION_CLOSED,
	MP_EVENT_NEED_DIRTY, MP_EVENT_DIRTY_CLEAR, MP_EVENT_BATCH, MP_EVENT_DIRTY_READY,
	MP_EVENT_VOLUME_FAILED, MP_EVENT_ENGINE_FAILED, MP_EVENT_STOPPED, MP_EVENT_LINK_BROKEN,
	MP_EVENT_POSITION, MP_EVENT_SCRUB_FOUND, MP_EVENT_SCRUB_PASS, MP_EVENT_CONNECTION_LEFT };
/* MP_EVENT_SCRUB_FOUND: damage on the device, of this volume, found in the background; message says
 * which block and what became of it. MP_EVENT_SCRUB_PASS: everything has been verified once. */
/* MP_EVENT_POSITION: first_sequence is destaged, last_sequence acknowledged or about to be. */
/* MP_EVENT_LINK_BROKEN: a fetch connection is gone, cookie says which; the engine has closed it.
 * status 0: the store closed it; -EPROTO: a reply was malformed or damaged; else -errno. */
/* MP_EVENT_DIRTY_READY: a volume without undestaged records has some now (ask with cut). */
struct mp_event {
	uint32_t type;                     /* enum mp_event_type */
	int32_t status;
	uint8_t volume[16];
	uint64_t cookie;
	uint64_t first_sequence, last_sequence, bytes;
	char message[160];                 /* NUL terminated, for the operator */
};
/* Drain: clears the notification. Returns the count; call again while it returns capacity. */
int64_t mp_engine_events(struct mp_engine *engine, struct mp_event *out, uint64_t capacity);
/* cdef: end */

#endif
