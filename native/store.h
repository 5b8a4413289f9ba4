/* store.h - the store's core: one log of segments, extent tables, copy-on-write maps, reads.
 *
 * Sans-I/O over struct mp_driver (a directory: file 0 superblocks, file n segment n). One reactor
 * owns all state: either mp_store_step is called by a test, or mp_store_start runs it in a thread.
 * Functions marked "any thread" go through a mailbox under a mutex.
 */
#ifndef MILLPOND_STORE_H
#define MILLPOND_STORE_H

#include "driver.h"
#include "format.h"

/* cdef: begin */
struct mp_store;
/* Deliberate faults, for tests that prove that tests can fail. Never set outside tests/. */
enum mp_store_fault { MP_STORE_FAULT_ACK_BEFORE_SYNC = 1, MP_STORE_FAULT_SKIP_SYNC = 2,
	MP_STORE_FAULT_HALF_BATCH = 4, MP_STORE_FAULT_OLD_EPOCH = 8,
	MP_STORE_FAULT_SKIP_CHECKSUM = 16, MP_STORE_FAULT_APPLY_GAP = 32,
	MP_STORE_FAULT_NO_INCARNATION = 64, MP_STORE_FAULT_CHECKPOINT_BEFORE_DATA = 128,
	MP_STORE_FAULT_PUNCH_EARLY = 256, MP_STORE_FAULT_FAILED_SYNC_IS_GOOD = 512,
	MP_STORE_FAULT_OLD_LINEAGE = 1024 };
struct mp_store_options {
	uint64_t segment_bytes;            /* of new segments; default 64 MiB */
	uint64_t page_cache_bytes;         /* map and extent-table pages kept in RAM */
	uint64_t checkpoint_every_bytes;   /* of log */
	uint64_t test_faults;              /* enum mp_store_fault; tests only */
	uint64_t scrub_bytes_per_s;        /* read in the background to verify it; 0: off */
	uint64_t scrub_interval_ns;        /* from the start of a pass to that of the next */
};
/* What scrubbing found. A pass tells of an extent, a record or a page of a table once. */
enum mp_scrub_kind {
	MP_SCRUB_EXTENT = 1,               /* stored bytes that do not verify */
	MP_SCRUB_RECORD,                   /* a group's or record's header, table or state */
	/* a page of an extent table; blocks: numbers of extents */
	MP_SCRUB_TABLE,
	MP_SCRUB_UNREADABLE                /* of an extent or, with no blocks, of a record */
};
struct mp_scrub_finding {
	uint32_t kind;                     /* enum mp_scrub_kind */
	uint32_t reserved;
	uint8_t volume[16];                /* that wrote the blocks; zero: none in particular */
	uint64_t first_block, block_count, segment, offset_bytes;
};
struct mp_store_counters {
	uint64_t applied_batches, repeated_batches, refused_batches, groups, syncs, appended_bytes,
		payload_bytes, reads, read_bytes, checksum_errors, io_errors, checkpoints,
		live_bytes, punched_bytes, segments, pages_in_memory, volumes, failed,
		/* Scrubbing. Where it is (segment 0: between passes), passes finished, and when the
		 * last one was, by the driver's clock (0: none); read and verified of all passes;
		 * bad in this pass, or the last if it is over, and in the last that is over. */
		scrub_segment, scrub_offset_bytes, scrub_passes, scrub_finished_ns,
		scrub_read_bytes, scrub_verified_bytes, scrub_bad, scrub_bad_last_pass,
		scrub_yields,              /* reads that were put off for clients */
		full; /* 1: no room for another segment when last asked */
};
/* Format an empty store directory (superblock, synced). -EEXIST when file 0 exists. */
int mp_store_format(struct mp_driver *driver, const uint8_t *store_id, uint64_t segment_bytes);
/* Recover and open. NULL on failure: *error is -errno and message one line for the operator. The
 * driver stays the caller's and must outlive the store. */
struct mp_store *mp_store_open(struct mp_driver *driver, const struct mp_store_options *options,
			       int *error, char *message, uint64_t message_bytes);
void mp_store_free(struct mp_store *store);  /* the reactor must be stopped; writes nothing */
/* one turn; -errno: the world ended */
int64_t mp_store_step(struct mp_store *store, int64_t timeout_ns);
int mp_store_start(struct mp_store *store);  /* run the reactor in its own thread */
/* finish what was accepted, checkpoint, join; any thread */
void mp_store_stop(struct mp_store *store);

/* A connection's byte streams. feed: whole or partial frames (READ, BATCH; PUT_VOLUME,
 * DELETE_VOLUME and CHECKPOINT only on connection 0, the daemon's own). take: bytes to send, at
 * most capacity. Any thread. feed returns 0, or -EPROTO/-EBADMSG/-ENOTSUP: the peer broke the
 * protocol, an ERROR frame is queued. */
int mp_store_feed(struct mp_store *store, uint64_t connection, const void *bytes,
		  uint64_t length_bytes);
int64_t mp_store_take(struct mp_store *store, uint64_t connection, void *out,
		      uint64_t capacity_bytes);
/* Connections that have bytes to take, at most capacity of them. Clears the notification. Any
 * thread. */
int64_t mp_store_ready(struct mp_store *store, uint64_t *connections, uint64_t capacity);
/* A connection whose socket is the core's from here, after its handshake: received is what was read
 * of it already, greeting is sent first. Only READ frames come over it. Any thread; on an error the
 * socket stays the caller's. */
int mp_store_connect(struct mp_store *store, uint64_t connection, int socket, const void *received,
		     uint64_t received_bytes, const void *greeting, uint64_t greeting_bytes);
/* Such connections that are gone; each is told once, and still wants its hangup. Any thread. */
int64_t mp_store_ended(struct mp_store *store, uint64_t *connections, uint64_t capacity);
/* drop its streams; work goes on */
void mp_store_hangup(struct mp_store *store, uint64_t connection);
/* Bytes fed and not yet answered on this connection: the daemon stops reading above a limit. Any
 * thread. */
uint64_t mp_store_pending_bytes(struct mp_store *store, uint64_t connection);

/* Committed (durable) state of the catalogue. Any thread. */
/* -ENOENT */
int mp_store_get_volume(struct mp_store *store, const uint8_t *id, struct mp_volume_state *out);
int64_t mp_store_list_volumes(struct mp_store *store, struct mp_volume_state *out,
			      uint64_t capacity);
/* stored bytes reachable (approximate) */
uint64_t mp_store_volume_bytes(struct mp_store *store, const uint8_t *id);
void mp_store_counters(struct mp_store *store, struct mp_store_counters *out);
/* Findings of scrubbing, oldest first, at most capacity; they are forgotten. Any thread. */
int64_t mp_store_scrub_findings(struct mp_store *store, struct mp_scrub_finding *out,
				uint64_t capacity);
/* 0, or -errno why it stopped */
int mp_store_failure(struct mp_store *store, char *message, uint64_t message_bytes);
/* cdef: end */

#endif
