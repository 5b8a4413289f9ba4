/* engine_internal.h - the state of one shard, shared by the engine's own files and by nobody else.
 *
 * Everything here belongs to the engine thread, except the mailbox and the outboxes, which say so.
 * The order of one turn (engine.c): completions and sockets, commands, appends, sync, background
 * work, replies.
 *
 * Life of a mutation: arrive (nbd.c) -> wait for overlapping earlier ones -> read the base of
 * partial blocks -> ready -> part of a log record in flight (log.c) -> applied to the index in log
 * order -> held until "dirty" is on record -> acknowledged (FUA: after a sync).
 */
#ifndef MILLPOND_ENGINE_INTERNAL_H
#define MILLPOND_ENGINE_INTERNAL_H

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "buffers.h"
#include "driver.h"
#include "engine.h"
#include "format.h"
#include "core_limits.h"
#include "index.h"
#include "list.h"
#include "record.h"
#include "shares.h"
#include "slots.h"
#include "fetch_internal.h"

/* ---- range tombstones (tombstones.c): trims and zeroes of many blocks, per volume ---- */

struct tombstone {
	uint64_t first_block, block_count, sequence;
	uint64_t cursor;      /* of the sweep; UINT64_MAX: swept */
	uint64_t start;       /* of its walk over the index */
	uint32_t phase;       /* 0: index, 1: slots, 2: done */
};
struct tombstones {
	struct tombstone *items; /* sorted, disjoint */
	uint32_t count, capacity;
};
/* Sequence of the range that covers block; 0: none. */
uint64_t tombstones_find(const struct tombstones *tombstones, uint64_t block);
int tombstones_put(struct tombstones *tombstones, uint64_t first_block, uint64_t block_count,
		   uint64_t sequence);

/* ---- segments and chains ---- */

enum segment_state { SEGMENT_FREE, SEGMENT_CHAIN, SEGMENT_WAITING /* for a checkpoint */ };
#define NO_SEGMENT UINT32_MAX
struct segment {
	uint32_t state, pins;
	uint32_t next;            /* towards the head of its chain */
	uint32_t number;          /* of its volume */
	uint64_t ordinal;
	uint64_t first_sequence;  /* of its first record */
	uint64_t released_serial; /* checkpoints begun when it was released */
	bool damage_told;         /* of a header that is not needed any more; once is enough */
};

struct volume;
struct connection;
struct request;
struct read;
struct left;

/* What log records put into memory without taking as much log (ledger.c). */
struct needs { uint64_t zeros, ranges; };

/* ---- mutations ---- */

enum mutation_kind { MUTATION_DATA, MUTATION_TRIM, MUTATION_ZERO };
enum mutation_state { MUTATION_BLOCKED, MUTATION_BASE, MUTATION_READY, MUTATION_LOGGING,
	MUTATION_DONE };
struct mutation {
	struct link in_volume;    /* volume->mutations, in order of arrival */
	struct link in_queue;     /* ready, an append's mutations, held or waiting for a sync */
	struct volume *volume;
	struct request *request;
	enum mutation_kind kind;
	enum mutation_state state;
	uint64_t first_byte, length_bytes;    /* as the guest said, within this slice */
	uint64_t first_block, block_count;    /* blocks touched */
	uint64_t sequence;
	uint8_t *buffer;          /* block_count blocks; payload at first_byte % 4096; DATA only */
	uint64_t buffer_bytes;
	uint32_t bases_pending;
	bool dropped;             /* its base is awaited, then it ends; in nobody's way */
	int error;
	uint64_t checksums[SLICE_BLOCKS];  /* 0: zero block */
};

/* One log record in flight. */
struct append {
	struct link in_volume;
	struct volume *volume;
	struct mp_io io;
	struct link mutations;
	struct needs needs;
	uint8_t *header;
	uint64_t header_bytes, header_capacity_bytes, payload_bytes;
	uint64_t first_sequence, last_sequence;
	uint32_t segment, address;  /* address: of the payload, 4 KiB units */
	uint64_t end_offset_bytes, ordinal;
	bool done;
	struct iovec iov[APPEND_IOVECS_MAX];  /* last: see append_new */
};

/* ---- reads ---- */

enum source_kind { SOURCE_ZERO = 1, SOURCE_LOG, SOURCE_SLOT, SOURCE_MISS };
struct source {
	uint64_t checksum;        /* LOG: 64 bits; SLOT: 31 bits */
	uint32_t place;           /* LOG: address; SLOT: slot */
	uint8_t kind;
	uint8_t restored;
};
struct read {
	struct volume *volume;
	struct request *request;  /* NULL: base of a mutation */
	struct mutation *mutation;
	struct link in_request;
	uint64_t first_block;
	uint32_t block_count;
	uint32_t pending;         /* parts, fetches; + 1 while it is being set up */
	uint32_t fills;           /* slot writes from the buffer */
	bool prefetch;            /* CACHE: only misses, for the slots; nobody gets the data */
	bool may_be_hole, hole;   /* zeroes that the reply may say, not carry */
	uint8_t chunk[32];        /* header of the structured chunk that begins here */
	uint32_t chunk_bytes;     /* 0: none does */
	int error;
	bool finished;
	uint8_t *buffer;
	uint64_t buffer_bytes;
	struct source sources[];
};
/* A run of blocks of one read that is one device read. */
struct part {
	struct mp_io io;
	struct iovec iov;
	struct read *read;
	uint32_t first, count;    /* within the read */
};

/* ---- requests and connections (nbd.c) ---- */

struct request {
	struct connection *connection;
	struct link in_connection;
	uint64_t handle;          /* the client's cookie, as received */
	uint16_t command, flags;
	uint64_t offset_bytes, length_bytes;
	uint32_t pending;         /* slices; + 1 while slices are being added */
	int error;                /* errno of the first failure */
	bool reading;             /* counted in the connection's reading_bytes */
	bool untold;              /* no reply: the connection ends */
	struct link reads;        /* READ: slices in order */
	uint64_t sync_sequence;   /* FLUSH, FUA: what a sync must cover */
	struct link in_sync;
	struct link in_replies;
	struct link in_walks;     /* CACHE, BLOCK_STATUS: not yet at the end of its range */
	uint64_t cursor;          /* their next block */
	struct status *status;    /* BLOCK_STATUS: what is found so far, then the descriptors */
	uint8_t header[32];
	uint32_t header_bytes;
	uint64_t reply_bytes;     /* header and what follows */
};

enum receive_state { RECEIVE_HEADER, RECEIVE_PAYLOAD, RECEIVE_DISCARD, RECEIVE_STOPPED };
struct connection {
	struct link in_engine;
	struct mp_engine *engine;
	struct volume *volume;
	uint64_t cookie;
	int socket;
	bool read_only, disconnected, ended, broken, paused, stopping;
	bool fenced;                  /* not served yet: nbdfence.c */
	bool leaving;                 /* nbdleave.c */
	bool structured, allocation;  /* negotiated */
	uint32_t interest, inflight;
	uint32_t statuses;            /* BLOCK_STATUS requests in flight */
	uint8_t *receive;
	uint32_t receive_begin, receive_end;
	enum receive_state state;
	struct request *writing;      /* WRITE whose payload is being received */
	struct mutation *slice;
	uint64_t slice_received, payload_left;
	bool bulk;                    /* the last WRITE was a large one */
	uint64_t reading_bytes;       /* of READs in flight or not yet sent */
	struct link requests;         /* all in flight */
	struct link replies;          /* finished, in order of completion */
	uint64_t sent_bytes;
};

/* ---- volumes ---- */

/* Where a chain goes on: behind a record. */
struct position { uint64_t ordinal, offset_bytes, checksum, incarnation; };
struct age_sample { uint64_t sequence, time_ns; };
enum { AGE_SAMPLES = 256 };
struct volume {
	struct mp_engine *engine;
	uint8_t id[16];
	uint64_t seed;
	uint32_t number, origin;
	uint32_t store;               /* where it lives: of the engine's links */
	uint64_t size_bytes, epoch, lineage;
	uint64_t last_sequence;       /* given to a mutation */
	uint64_t applied_sequence;    /* logged and in the index */
	uint64_t synced_sequence, syncing_sequence, destaged_sequence;
	uint32_t tail_segment, head_segment;
	uint64_t head_offset_bytes, head_checksum, head_incarnation, head_ordinal;
	/* Where the chain goes on behind applied_sequence: a checkpoint's log position. */
	uint64_t applied_offset_bytes, applied_checksum, applied_incarnation, applied_ordinal;
	/* The same behind synced_sequence, and behind syncing_sequence: where a rescue forks the
	 * chain. */
	struct position synced_position, syncing_position;
	uint32_t doomed_segment;      /* left behind by a rescue; free once it is final */
	/* newest synced_sequence that a record of the chain tells */
	uint64_t logged_synced_sequence;
	uint64_t synced_at_ns;
	/* ready: data; ready_ranges: trims and zeroes, which do not wait for log space */
	struct link mutations, ready, ready_ranges, appends, held, syncs;
	struct volume_share share;
	uint32_t appends_inflight;
	struct tombstones tombstones;
	uint64_t release_generation;  /* moves when the log or a tombstone stops covering blocks */
	bool sweep_wanted;            /* a tombstone is not swept, or may be over */
	bool open, dirty_recorded, dirty_asked, dirty_ready_told, failed, corrupt;
	bool waking;                  /* a loop that wakes blocked mutations is running */
	bool open_pending;            /* MP_EVENT_OPENED waits for a checkpoint */
	uint64_t open_cookie, open_serial;
	int error;
	uint32_t connections, fetch_count, ahead_count, fills_inflight;
	struct stream streams[STREAMS_MAX];
	uint64_t buffer_bytes;        /* of its mutations and reads */
	/* destage */
	uint32_t cut_segment;
	/* where the record with this first sequence starts */
	uint64_t cut_offset_bytes, cut_sequence;
	uint8_t *batch;
	uint64_t batch_bytes, batch_taken;
	uint64_t batch_last_sequence, batch_end_offset_bytes;
	bool cut_queued, tell_after_sync;
	uint64_t cut_max_bytes, cut_cookie;
	struct age_sample ages[AGE_SAMPLES];
	uint32_t age_first, age_count;
	uint64_t age_gap_ns;          /* between samples */
	struct mp_engine_volume counters;
};

/* ---- background work ---- */

/* What a recovery may find: the last checkpoint's, and what was appended since it began. */
struct ledger {
	struct needs saved, since;
	/* not yet applied; since the running checkpoint began */
	struct needs inflight, since_running;
};

struct scan {                     /* reads a segment into memory, a step at a time; see scan.c */
	struct mp_io io;
	struct iovec iov;
	uint8_t *memory;              /* one segment */
	uint32_t segment;
	uint64_t begin_bytes, end_bytes;  /* what of it is in memory */
	uint64_t step_bytes;          /* of one read; 0: SCAN_STEP_BYTES */
	bool busy;
};
struct cut {
	struct scan scan;
	struct volume *volume;        /* NULL: idle */
	uint64_t parse_offset_bytes, next_sequence, raw_bytes;
	/* As it was when the scan began: what was synced later may not be in its memory, and what
	 * is destaged meanwhile must not be missing between older records of the batch. */
	uint64_t limit_sequence, destaged_sequence;
	uint64_t begin_offset_bytes, end_offset_bytes; /* of the records taken */
	uint64_t first_sequence, last_sequence, lineage, epoch;
	struct mp_io call;
	uint8_t *frame;               /* result of encoding, malloc'ed */
	int64_t frame_bytes;
	uint64_t faults;
	uint8_t volume_id[16];
};
struct release {
	struct scan scan;
	struct volume *volume;        /* NULL: idle */
	uint64_t parse_offset_bytes, next_sequence, end_sequence;
	uint32_t extent;              /* next extent of the record at parse_offset_bytes */
	uint64_t payload_offset_bytes;/* of its data */
	uint32_t fills;
	bool parsed, broken;
};
struct checkpoint {
	bool running, wanted, clean;
	uint32_t stage;
	uint64_t serial;              /* checkpoints begun */
	uint64_t completed_serial;
	struct mp_io io;
	struct iovec iov;
	uint8_t *buffer;              /* CHECKPOINT_STEP_BYTES */
	/* offset: where in the area buffer goes */
	uint64_t filled_bytes, flushing_bytes, offset_bytes;
	uint8_t *captured;            /* volumes, segment table, tombstones: of one instant */
	uint64_t captured_bytes;
	uint64_t cursor, zeros;
	/* of the walk over the index; moves when it paused where it should not, else 0 */
	uint64_t index_start, index_moves;
	struct XXH3_state_s *hash;
	struct mp_cache_checkpoint header;
	struct mp_cache_super super;
	uint64_t log_bytes;           /* appended since the last one began */
	uint64_t slot_changes, slot_bytes; /* filled since the last one began */
	uint64_t began_ns;
	uint32_t frees;               /* segments that wait for the one that runs */
	uint32_t failures;            /* writes that failed in a row */
	uint64_t sync_goal;           /* number of the sync it waits for; 0: none */
	bool super_in_doubt;          /* super was written, but no sync after it was good */
};
struct syncer {
	bool running, wanted;
	uint64_t ended_ns, due_ns;    /* due: when destage may have one of its own; 0: none asked */
	uint64_t started, completed;  /* counts: completed is the number of the last good one */
	struct mp_io io;
};

enum rescue_stage { RESCUE_NONE, RESCUE_DRAIN, RESCUE_COPY, RESCUE_SYNC, RESCUE_CHECKPOINT };
struct rescue {
	enum rescue_stage stage;
	bool busy, forked, unreadable;
	struct scan scan;             /* the old place */
	struct mp_io io;              /* one write or sync at a time */
	struct iovec iov;
	uint32_t number;              /* of the volume at work */
	uint32_t old_tail;            /* its chain as it was */
	uint64_t offset_bytes, sequence; /* of the next record to copy, in scan.segment */
	struct mp_record *copying;    /* being written, in scan.memory */
	uint32_t from_address, to_address; /* of its payload */
	uint64_t copying_bytes;
	struct link *append;          /* next of its appends to place */
	uint64_t serial;              /* of the checkpoint that makes it final */
};

struct command {
	struct command *next;
	int kind, flag, socket;
	uint32_t store;
	uint8_t volume[16];
	uint64_t size_bytes, epoch, lineage, sequence, cookie, length_bytes;
	uint8_t bytes[];
};
struct event_node { struct event_node *next; struct mp_event event; };

struct mp_engine {
	struct mp_driver *driver;
	struct mp_engine_options options;
	struct mp_cache_super super;
	uint32_t super_copy;          /* where the newest superblock is */
	struct segment *segments;
	uint32_t segment_count, segments_free, segments_waiting, next_free_hint;
	uint64_t slot_blocks;
	struct index index;
	uint64_t tombstone_count;     /* of all volumes */
	uint64_t zeros_max;           /* index entries with address 0 */
	uint64_t unmet_segments;      /* of minimums, not yet held */
	bool shares_stale, release_pressed;
	struct ledger ledger;
	struct mp_slots *slots;
	struct mp_buffers *buffers;
	struct volume *volumes[VOLUMES_MAX];
	uint32_t volume_count;        /* numbers below this are or were in use */
	uint32_t next_origin;
	struct link connections;
	uint32_t connection_count, paused;
	struct link walks;            /* CACHE and BLOCK_STATUS, whose turn it is first */
	bool walks_pending;           /* there is work for the next turn */
	uint32_t prefetches;          /* slices of CACHE that wait for the store */
	bool resume_wanted;           /* a request ended: paused connections may go on */
	struct store_link stores[STORES_MAX];
	struct link fetches[FETCH_BUCKETS]; /* outstanding, by request id */
	struct link fetch_places[FETCH_BUCKETS];
	struct link ahead;            /* read ahead and not yet taken, oldest first */
	uint64_t ahead_bytes;         /* those, and the ones on their way */
	uint64_t next_request_id;
	bool fetches_wait;            /* in a store's queue, to be sent this turn */
	uint32_t fills_inflight, ios_inflight;
	uint32_t guest_ios;           /* of those, that a guest waits for: reads, appends */
	struct cut cut;
	uint32_t cut_turn, append_turn;
	struct release release;
	struct checkpoint checkpoint;
	struct syncer sync;
	struct rescue rescue;
	struct scrub *scrub;          /* NULL: off */
	uint64_t now_ns, active_ns, stop_ns;
	uint64_t appended_ns;         /* when a guest last wrote */
	bool stopping, stopped, notify_wanted;
	bool cut_off;                 /* stopping, and no guest is answered any more */
	bool was_clean;               /* the last life ended in order: no slot can be stale */
	int failed;
	struct mp_engine_counters counters;

	pthread_t thread;
	bool has_thread;
	/* under mutex: the mailbox and the outboxes */
	pthread_mutex_t mutex;
	struct command *commands, **commands_tail;
	struct event_node *events, **events_tail;
	struct left *left;            /* connections given back and not yet taken */
	uint64_t event_count;
	struct mp_engine_volume *published;
	uint32_t published_count;
	struct mp_engine_counters published_counters;
	uint64_t published_ns;
};

/* engine.c */
void engine_event(struct mp_engine *engine, const struct mp_event *event);
void engine_volume_event(struct volume *volume, uint32_t type, int status, uint64_t cookie);
void engine_fail(struct mp_engine *engine, int error, const char *what);
void volume_fail(struct volume *volume, int error, const char *what);
void engine_submit(struct mp_engine *engine, struct mp_io *io);
static inline bool fault(const struct mp_engine *engine, uint64_t which)
{
	return (engine->options.test_faults & which) != 0;
}

/* Memory for a request of this volume, counted at it; engine->buffers. */
static inline void *volume_buffer(struct volume *volume, uint64_t bytes)
{
	void *buffer = mp_buffers_get(volume->engine->buffers, bytes);

	volume->buffer_bytes += buffer ? bytes : 0;
	return buffer;
}
static inline void volume_buffer_put(struct volume *volume, void *buffer, uint64_t bytes)
{
	volume->buffer_bytes -= bytes;
	mp_buffers_put(volume->engine->buffers, buffer, bytes);
}

/* volumes.c */
struct volume *volume_new(struct mp_engine *engine, const uint8_t *id, uint32_t number);
struct volume *volume_by_id(struct mp_engine *engine, const uint8_t *id);
int volume_open(struct mp_engine *engine, const struct command *command);
int volume_close(struct mp_engine *engine, const struct command *command);
void volume_grow(struct mp_engine *engine, const struct command *command);
void volume_configure(struct mp_engine *engine, const struct command *command);
void volume_free(struct volume *volume);
bool volume_is_idle(const struct volume *volume);
uint64_t volume_age_ns(const struct volume *volume); /* of its oldest undestaged write; 0: none */

/* mailbox.c */
void commands_run(struct mp_engine *engine);
bool commands_waiting(const struct mp_engine *engine);
void mailbox_free(struct mp_engine *engine); /* with the events that nobody took */

/* outbox.c */
void volume_publish(const struct volume *volume, struct mp_engine_volume *out);

/* nbd.c */
int connection_open(struct mp_engine *engine, struct volume *volume, const struct command *command);
void connections_ready(void *owner, void *context, uint32_t ready);
void connections_resume(struct mp_engine *engine);  /* buffers came back: parse on */
void connection_stop(struct connection *connection);
void connection_leave(struct connection *connection); /* nbdleave.c */
void left_free(struct mp_engine *engine);
void connections_free(struct mp_engine *engine);

/* nbdreply.c */
void connections_flush(struct mp_engine *engine); /* end of a turn: replies, closing */
void request_error(struct request *request, int error);
void request_slice_done(struct request *request);
void request_finish(struct request *request);

/* nbdwalk.c, nbdstatus.c */
void walks_step(struct mp_engine *engine);
void prefetch_done(struct read *read);
/* The store will not answer: not known. */
void statuses_abandon(struct store_link *store);
/* The first that waits is asked: READ_FRAME_BYTES. */
void status_frame(struct store_link *store, uint8_t *out);
int status_reply(struct store_link *store, const struct mp_frame *frame, const uint8_t *payload);

/* reads.c */
/* Where a block is; its number, checksum and kind. */
void source_find(struct volume *volume, uint64_t block, struct source *source);
struct read *read_new(struct volume *volume, uint64_t first_block, uint32_t block_count);
void read_start(struct read *read);
void read_part_done(struct read *read);
void read_release(struct read *read);

/* mutations.c */
struct mutation *mutation_new(struct volume *volume, enum mutation_kind kind, uint64_t first_byte,
			      uint64_t length_bytes);
void mutation_arrive(struct mutation *mutation);
void mutation_base_done(struct mutation *mutation, struct read *read);
void mutation_applied(struct mutation *mutation);
void mutation_failed(struct mutation *mutation, int error);
void mutation_free(struct mutation *mutation);
/* What a dead connection asked for and is in no log record yet will not happen. */
void mutations_drop(const struct connection *connection);
void mutations_unhold(struct volume *volume);

/* log.c */
void log_append_ready(struct mp_engine *engine);
void log_sync_if_wanted(struct mp_engine *engine);
void log_want_sync_for_destage(struct mp_engine *engine);
void log_synced_record(struct volume *volume);
void log_tell_if_due(struct volume *volume);
uint64_t log_next_timer_ns(const struct mp_engine *engine);
void log_wait_for_sync(struct volume *volume, struct request *request);
uint64_t segment_offset_bytes(const struct mp_engine *engine, uint32_t segment);
uint32_t segment_of_address(const struct mp_engine *engine, uint32_t address);
/* Put one logged extent into the index and out of the slots; address of its first block, 0 for
 * none. */
void log_index_extent(struct volume *volume, const struct mp_extent *extent, uint32_t address);

void append_finish(struct append *append);
void append_place(struct append *append);
bool log_make_room(struct volume *volume, uint64_t bytes, enum log_use use);
void fail_waiting(struct volume *volume); /* engine.c: EIO to what waits for the log */
struct position log_applied_position(const struct volume *volume);

/* rescue.c */
void log_failed(struct mp_engine *engine, int error, const char *what);
void log_synced(struct volume *volume); /* logsync.c */
void rescue_step(struct mp_engine *engine);

/* ledger.c */
struct needs needs_of_extent(const struct mp_extent *extent);
struct needs needs_of_mutation(const struct mutation *mutation);
void needs_add(struct needs *sum, struct needs more);
bool ledger_allows(struct mp_engine *engine, struct needs needs);
void ledger_appended(struct mp_engine *engine, struct needs needs);
void ledger_applied(struct mp_engine *engine, struct needs needs);
void ledger_checkpoint_begins(struct mp_engine *engine);
void ledger_checkpoint_ends(struct mp_engine *engine);

/* sweep.c */
void sweep_step(struct mp_engine *engine);
void sweep_again(struct mp_engine *engine); /* tombstones may have become needless */
bool sweep_pending(const struct mp_engine *engine);

/* scan.c, cut.c, release.c; encode.h has more of scan.c */
void scan_start(struct mp_engine *engine, struct scan *scan, uint32_t segment, uint64_t begin_bytes,
		void (*done)(struct mp_io *));
void scan_more(struct mp_engine *engine, struct scan *scan, void (*done)(struct mp_io *));
void cut_step(struct mp_engine *engine);
void cut_reset(struct volume *volume);
void destaged(struct volume *volume, uint64_t sequence);
void release_step(struct mp_engine *engine);
uint64_t release_timer_ns(const struct mp_engine *engine);

/* scrub.c, scrublog.c */
int scrub_new(struct mp_engine *engine);
void scrub_free(struct mp_engine *engine);
void scrub_step(struct mp_engine *engine);
uint64_t scrub_timer_ns(const struct mp_engine *engine);
/* The chain of this volume (NULL: of any) is not what it was. */
void scrub_forget(struct mp_engine *engine, const struct volume *volume);
bool scrub_is_reading(const struct volume *volume); /* its log, now */

/* checkpoint.c, recovery.c */
enum { SUPER_COPY_BYTES = 65536 }; /* where the second copy of the superblock is */
void checkpoint_step(struct mp_engine *engine);
/* End one that runs and has no I/O in flight; another is wanted. */
void checkpoint_abandon(struct mp_engine *engine);
/* Waiting segments that a checkpoint begun now would free, and the one that runs will not. */
uint32_t checkpoint_would_free(const struct mp_engine *engine);
void checkpoint_note_log(struct mp_engine *engine, uint64_t bytes);
void checkpoint_note_fill(struct mp_engine *engine, uint64_t bytes);
/* When a checkpoint is due because of filled slots; UINT64_MAX: not at all. */
uint64_t checkpoint_due_ns(const struct mp_engine *engine);
void checkpoint_fill_volume(const struct volume *volume, struct mp_cache_volume *out);
/* blocking */
int super_write(struct mp_driver *driver, struct mp_cache_super *super, uint32_t *copy);
/* What a checkpoint could hold. */
uint64_t index_entries_max(const struct mp_engine *engine);
int checkpoint_load(struct mp_engine *engine, char *message, uint64_t message_bytes);
int recovery_run(struct mp_engine *engine, char *message, uint64_t message_bytes);
int super_load(struct mp_driver *driver, struct mp_cache_super *out, uint32_t *copy, char *message,
	       uint64_t message_bytes);
int super_check(const struct mp_cache_super *super, uint64_t device_bytes, char *message,
		uint64_t message_bytes);
void super_seal(struct mp_cache_super *super);

#endif
