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
};
struct mp_store_counters {
	uint64_t applied_batches, repeated_batches, refused_batches, groups, syncs, appended_bytes,
		payload_bytes, reads, read_bytes, checksum_errors, io_errors, checkpoints,
		live_bytes, punched_bytes, segments, pages_in_memory, volumes, failed;
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
/* 0, or -errno why it stopped */
int mp_store_failure(struct mp_store *store, char *message, uint64_t message_bytes);
/* cdef: end */

#endif
