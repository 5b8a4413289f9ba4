/* store_internal.h - state of the store's core and what its files ask of one another.
 *
 * One reactor thread owns everything; what other threads may touch is behind mutex and marked so.
 * All functions here: reactor thread only, unless they say otherwise. -EAGAIN: a page is being
 * read; store->missing is the page to wait for, the caller starts again when it has arrived.
 */
#ifndef MILLPOND_STORE_INTERNAL_H
#define MILLPOND_STORE_INTERNAL_H

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "record.h"
#include "store.h"
#include "store_format.h"

enum {
	/* 9 + 7 * 8 bits of block number: more than 2^64 bytes have */
	STORE_LEVELS = 8,
	STORE_PAGE_BUCKETS = 16384,
	STORE_SLAB_PAGES = 256,             /* whose memory is allocated at once */
	STORE_VOLUME_BUCKETS = 4096,
	STORE_CONNECTION_BUCKETS = 256,
	STORE_GROUP_TARGET_BYTES = 4 << 20, /* collect requests into a group up to here */
	STORE_GROUP_MAX_BYTES = 32 << 20,   /* what recovery believes of a data group's length */
	STORE_META_GROUP_MAX_BYTES = 1 << 30,
	STORE_SYNC_BYTES = 16 << 20,        /* a sync waits no longer for writes under way */
	STORE_GROUPS_IN_FLIGHT = 4,
	STORE_GROUPS_UNAPPLIED = 16,
	STORE_READS_IN_FLIGHT = 256,
	STORE_STATUSES_IN_FLIGHT = 16,
	STORE_STATUS_LEAVES = 256,         /* of a map, looked at for one BLOCK_STATUS: 512 MiB */
	STORE_PUNCHES_IN_FLIGHT = 16,
	STORE_DEAD_RANGES_MAX = 1 << 20,    /* beyond: left to the removal of whole segments */
	STORE_GRAVE_PAGES_PER_TURN = 32,
	STORE_SCRUB_STEPS = 256,            /* per turn: looks at what is in memory */
	STORE_SCRUB_FINDINGS = 64,          /* not yet taken; more are counted only */
	STORE_MERGE_GAP_BYTES = 16384,      /* device reads this near to one another become one */
	/* A READ is 112 bytes and its answer up to 1 MiB, so what a fetch connection may have
	 * unanswered is a number of requests: high plus one receive, 274 of them, answers of 274
	 * MiB at the very worst and of about 4 MiB for the 16 KiB that a cache asks for. */
	STORE_QUERY_BYTES_MAX = MP_BLOCK_BYTES, /* of one, announced; the rest is refused */
	STORE_FETCH_RECEIVE_BYTES = 16 * 1024,
	STORE_FETCH_PENDING_HIGH = 128 * 112,
	STORE_FETCH_PENDING_LOW = 64 * 112,
	STORE_FETCH_UNSENT_HIGH = 4 << 20,
	STORE_FETCH_UNSENT_LOW = 1 << 20
};
#define STORE_EVIDENCE_NS 50000000ULL       /* idle time before synced_commit is put on record */
#define STORE_FULL_RETRY_NS 100000000ULL
#define STORE_SEGMENT_MAX_BYTES (1ULL << 30)
/* What places and addresses can hold: segment << MP_PLACE_PAGE_BITS | page. */
#define STORE_SEGMENTS_MAX (1ULL << (64 - MP_PLACE_PAGE_BITS))
#define STORE_FILE_MAX_BYTES ((uint64_t)MP_PAGE_BYTES << MP_PLACE_PAGE_BITS)
/* Sequences below it: what a checkpoint may hold, so what may come into the log. */
#define STORE_SEQUENCES_MAX (UINT64_MAX / 2)
/* in a place: number of a page that is on no disk yet */
#define STORE_IN_MEMORY (1ULL << 63)

struct mp_store;
struct store_page;

/* What a look without a change has found: no superblock or no checkpoint; a state between two
 * groups of the log; a state as of its applied position. */
enum store_look { STORE_LOOK_NOTHING, STORE_LOOK_PARTLY, STORE_LOOK_WHOLE };

/* An I/O of the store; embedded in what owns it. */
struct store_io {
	struct mp_io io;
	struct iovec iov;
	struct mp_store *store;
	void (*done)(struct store_io *io);
	void *owner;
};

struct store_wait {
	struct store_wait *next;
	void (*ready)(struct mp_store *store, struct store_wait *wait);
};

/* CLEAN: equals the disk, may be evicted. DIRTY: newer than any checkpoint. WRITING: frozen by the
 * running checkpoint; to change it, it is copied. */
enum store_page_state { STORE_PAGE_LOADING, STORE_PAGE_FAILED, STORE_PAGE_CLEAN, STORE_PAGE_DIRTY,
	STORE_PAGE_WRITING };

struct store_page {
	uint64_t place;
	uint64_t checksum;
	uint8_t *data;
	struct store_page *hash_next;
	struct store_page *newer, *older;  /* clean: by use; dirty: the others of its level */
	struct mp_page_ref *home;          /* dirty: the reference to it */
	struct store_wait *waiters;
	struct store_io *load;
	struct mp_page_descriptor about;   /* set when dirty */
	uint8_t state;                     /* enum store_page_state */
	uint8_t unreferenced;              /* writing: drop it when written */
	uint8_t refers_safely;             /* inner: see store_page_check_inner */
	int error;
};

struct store_page_memory {                 /* for the data of as many as ever were at once */
	uint8_t **slabs;
	uint64_t slab_count, slab_capacity;
	uint64_t cut_pages;                /* taken from slabs, at least once */
	uint8_t *unused;                   /* given back; begins with the next one's address */
};

struct store_tree {
	struct mp_page_ref root;
	uint32_t height;                   /* level of the root page */
	uint32_t leaf_bits;
	uint8_t volume[16];                /* or zero: extent table of segment */
	uint64_t segment;
};

struct store_segment {
	uint64_t id;
	uint64_t live_bytes;
	uint64_t length_bytes;             /* appended */
	uint64_t capacity_bytes;           /* allocated */
	uint64_t first_commit;
	struct store_tree extents;
	uint32_t extent_count;             /* applied */
	uint32_t extents_planned;          /* appended */
	uint32_t readers;                  /* reads in flight: not punched, not removed */
	uint16_t kind;
	uint8_t applied;                   /* a group of it was applied: belongs into checkpoints */
	uint8_t sealed;
	uint8_t created;                   /* its file exists */
};

struct store_volume {
	struct store_volume *next;
	struct mp_volume_state state;      /* durable and applied; any thread under mutex */
	struct mp_volume_state admitted;   /* with everything that is in the log behind it */
	struct store_tree map;
	uint64_t stored_bytes;             /* any thread, relaxed atomic */
	uint8_t visible;                   /* its first VOLUME record is durable; under mutex */
	uint8_t deleted;                   /* admitted */
};

struct store_chunk {                       /* bytes to send */
	struct store_chunk *next;
	uint64_t length_bytes, taken_bytes;
	_Alignas(16) uint8_t bytes[];
};

struct store_socket;

/* Under mutex, but for assembly: the feeding thread's; and, by_socket, the bytes to send: the
 * reactor's. */
struct store_connection {
	struct store_connection *next, *ready_next;
	uint64_t id;
	uint64_t references;               /* table and requests */
	uint64_t pending_bytes, out_bytes;
	struct store_chunk *out, *out_last;
	struct store_request *request;     /* being assembled */
	uint64_t have_bytes;
	uint8_t head[MP_FRAME_HEADER_BYTES];
	uint8_t broken, gone, is_ready, by_socket;
};

struct store_socket {                      /* a connection whose socket is the reactor's */
	struct store_socket *next;
	struct mp_store *store;
	struct store_connection *connection;
	int number;
	uint32_t interest;
	uint8_t behind, ended;
};

struct store_handover {                    /* a socket on its way to the reactor */
	struct store_handover *next;
	struct store_connection *connection;
	struct store_chunk *greeting;
	int socket;
	uint8_t gone;                      /* hung up meanwhile */
	uint64_t received_bytes;
	uint8_t received[];
};

struct store_batch {                       /* what admission needs to know of a batch */
	const uint8_t *volume;
	uint64_t first_sequence, last_sequence, epoch, lineage, end_block;
	uint32_t data_extents;
	uint8_t is_foreign;                /* data of another origin than the volume */
};

/* A frame being worked on. buffer is 4 KiB aligned and laid out so that it can become a group:
 * frame header at 64, payload at MP_GROUP_HEADER_BYTES, room for padding behind. */
struct store_request {
	struct store_request *next;
	struct store_connection *connection;
	uint8_t *buffer;
	struct mp_frame frame;
	struct store_batch batch;
	struct mp_volume_state volume;     /* PUT_VOLUME: as logged */
	uint32_t status;                   /* refused on sight, or how it went */
};

struct store_queue { struct store_request *head, *tail; uint64_t bytes; };

enum store_group_state { STORE_GROUP_WRITING, STORE_GROUP_WRITTEN };

struct store_group {
	struct store_group *next;
	uint8_t *buffer;
	struct store_segment *segment;
	struct store_queue requests;       /* in it; answered when it was applied */
	/* repeats of what is in it or before it; answered then too */
	struct store_queue riders;
	uint64_t length_bytes, offset_bytes, commit, checksum;
	uint64_t apply_offset;             /* of the next record to apply; 0: none yet */
	uint32_t record_count;
	uint8_t state, in_request;         /* in_request: buffer belongs to the first request */
	struct store_io io;
};

struct store_position { uint64_t segment, offset_bytes, commit, checksum, incarnation; };

struct store_range { uint64_t segment; uint32_t offset_bytes, length_bytes; };
struct store_ranges { struct store_range *items; uint64_t count, capacity; };

struct store_grave {
	struct store_grave *next;
	struct mp_page_ref root;
	uint32_t level, kind;
};

/* A round through mostly dead meta segments. */
struct store_sweep {
	struct store_io io;
	struct store_wait wait;
	uint8_t *head;                     /* of the group at segment, offset; NULL: none read */
	uint64_t segment, offset_bytes, group_bytes;
	uint64_t budget_pages;             /* 0: no round */
	uint32_t index, count;             /* descriptors of the group */
	uint8_t reading, blocked;
};

struct store_checkpoint;

struct store_scrub {
	struct store_io io;
	struct store_wait wait;
	uint8_t *buffer;                   /* window_from to window_to of the segment */
	uint64_t window_from, window_to;
	uint64_t segment, first_segment;   /* where it is, and where the pass began */
	uint64_t due_ns, cost_ns, pass_due_ns;
	/* extents: the next, and those that are being read */
	uint32_t index, one_by_one, count; /* below one_by_one each has a read of its own */
	struct mp_extent_entry entries[1 << MP_EXTENT_LEAF_BITS];
	uint32_t indices[1 << MP_EXTENT_LEAF_BITS];
	/* headers: the next, in the group if group_bytes is not 0 */
	uint64_t offset_bytes, group_offset_bytes, group_bytes, table_bytes;
	uint32_t records_left;
	uint8_t running, wrapped, in_headers, reading, blocked, yielding;
	/* under mutex */
	struct mp_scrub_finding findings[STORE_SCRUB_FINDINGS];
	uint32_t finding_count;
};

struct mp_store {
	struct mp_driver *driver;
	struct mp_store_options options;
	struct mp_store_super super;
	uint32_t super_copy;               /* written last */
	struct mp_store_counters counters;
	uint64_t ios_in_flight;
	uint8_t recovering;                /* pages are read blocking */
	uint8_t world_ended, winding_down;
	int failure;
	uint64_t turn_ns;

	/* pages.c */
	struct store_page *pages[STORE_PAGE_BUCKETS];
	struct store_page *newest, *oldest;
	struct store_page *dirty[STORE_LEVELS];
	struct store_page *missing;
	struct store_page_memory page_memory;
	uint64_t clean_pages, dirty_pages, writing_pages, clean_limit, dirty_limit, page_number;

	/* storesegment.c: ascending by id */
	struct store_segment **segments;
	uint64_t segment_count, segment_capacity, next_segment;
	struct store_segment *active, *active_meta, *spare, *spare_meta, *opening;
	uint64_t opening_bytes;
	struct store_io opening_io;
	uint64_t full_until_ns;
	struct store_segment **removable;  /* in no checkpoint any more; files still there */
	uint64_t removable_count, removable_capacity;
	struct store_ranges dead, dying, punchable; /* since the freeze, in it, in a durable one */
	uint64_t punch_next;
	struct store_io punch[STORE_PUNCHES_IN_FLIGHT];
	uint32_t punches;
	struct store_io remove_io;
	uint8_t removing;

	/* storelog.c, storeapply.c */
	struct store_queue queue;          /* checked, not admitted */
	struct store_group *groups, *groups_last;       /* appended, not durable */
	struct store_group *durable, *durable_last;     /* to be applied */
	struct store_group *building;
	uint32_t groups_writing, groups_unapplied;
	struct store_position position;    /* of the next group */
	struct store_position applied;     /* behind the last applied group */
	uint64_t synced_commit, evidence_commit, evidence_due_ns, log_bytes;
	struct store_io sync_io;
	uint64_t sync_commit;
	uint8_t syncing;
	struct store_wait apply_wait;
	uint8_t apply_blocked;

	struct store_volume *volumes[STORE_VOLUME_BUCKETS]; /* links and states: under mutex */
	uint8_t (*origins)[16];
	uint64_t origin_count, origin_capacity;

	/* storegrave.c */
	struct store_grave *graves;
	uint64_t grave_count;
	struct store_wait grave_wait;
	uint8_t grave_blocked;             /* 1: by a page; 2: by an error, until a checkpoint */

	struct store_sweep sweep;
	struct store_scrub scrub;
	uint64_t client_ns;                /* when a client last asked for anything */
	struct store_read *reads;
	struct store_queue reads_waiting;
	uint32_t reads_in_flight;
	struct store_socket *sockets;      /* storesocket.c */
	uint8_t sockets_changed;           /* something to send, to watch or to close */
	uint8_t receive[STORE_FETCH_RECEIVE_BYTES];
	struct store_status *statuses;
	struct store_queue statuses_waiting;
	uint32_t statuses_in_flight;
	struct store_checkpoint *checkpoint; /* running */
	struct store_queue checkpoint_requests;
	uint64_t checkpoint_log_bytes;     /* log_bytes at the last freeze */
	uint8_t final_checkpoint;          /* 0, 1 wanted, 2 done */

	pthread_mutex_t mutex;             /* below: any thread */
	pthread_t thread;
	uint8_t started, stopping, stopped;
	struct store_queue inbox;
	struct store_connection *connections[STORE_CONNECTION_BUCKETS];
	struct store_connection *ready, *ready_last;
	struct store_handover *handovers;
	uint64_t *ended;                   /* connections whose sockets are gone */
	uint64_t ended_count, ended_capacity;
	uint8_t hung_up;                   /* a connection with a socket */
	struct mp_store_counters published;
	char failure_message[256];
};

static inline uint64_t store_align(uint64_t value, uint64_t alignment)
{
	return (value + alignment - 1) / alignment * alignment;
}

static inline int store_fault(const struct mp_store *store, uint64_t fault)
{
	return (store->options.test_faults & fault) != 0;
}

/* store.c. Memory: never NULL, zeroed; running out of it ends the process. */
void *store_allocate(uint64_t length_bytes);
void *store_allocate_aligned(uint64_t length_bytes); /* not zeroed */
void *store_grow(void *array, uint64_t *capacity, uint64_t needed, uint64_t item_bytes);
void store_submit(struct mp_store *store, struct store_io *io, uint32_t op, uint64_t file,
		  uint64_t offset_bytes, void *buffer, uint64_t length_bytes);
void store_fail(struct mp_store *store, int error, const char *what, uint64_t file,
		uint64_t offset_bytes);
void store_queue_push(struct store_queue *queue, struct store_request *request);
struct store_request *store_queue_pop(struct store_queue *queue);
struct store_volume *store_volume_find(struct mp_store *store, const uint8_t *id);
struct store_volume *store_volume_add(struct mp_store *store, const uint8_t *id);
void store_volume_remove(struct mp_store *store, struct store_volume *volume);
void store_dispatch(struct mp_store *store);
/* Reads only, and stays that way: for who looks at a store that nobody serves. Never NULL; message
 * says what would refuse to open, or is empty. */
struct mp_store *store_open_to_look(struct mp_driver *driver,
				    const struct mp_store_options *options, enum store_look *look,
				    char *message, uint64_t message_bytes);
/* storerecover.c */
int store_recover(struct mp_store *store, char *message, uint64_t message_bytes);
enum store_look store_recover_look(struct mp_store *store, char *message, uint64_t message_bytes);

/* storeconnection.c */
struct store_chunk *store_reply_start(const struct store_request *request, uint64_t payload_bytes,
				      uint64_t checked_bytes, uint32_t status, uint8_t **payload);
void store_reply_finish(struct mp_store *store, struct store_request *request,
			struct store_chunk *chunk);
void store_reply(struct mp_store *store, struct store_request *request, uint32_t status);
void store_connections_free(struct mp_store *store);
/* For storesocket.c. Under mutex: */
struct store_connection *store_connection_get(struct mp_store *store, uint64_t id);
/* What a socket brought: whole frames, or -errno and an ERROR frame is queued. */
int store_connection_feed(struct mp_store *store, struct store_connection *connection,
			  const uint8_t *bytes, uint64_t length_bytes);
void store_connection_push(struct mp_store *store, struct store_connection *connection,
			   struct store_chunk *chunk);
/* Its first bytes have left. */
void store_connection_sent(struct mp_store *store, struct store_connection *connection,
			   uint64_t bytes);
/* Its socket is gone: nothing more can be sent; the socket's reference ends. */
void store_connection_ended(struct mp_store *store, struct store_connection *connection);

/* storesocket.c */
void store_sockets_ready(void *owner, void *context, uint32_t ready);
void store_sockets_adopt(struct mp_store *store);
void store_sockets_flush(struct mp_store *store);
void store_sockets_free(struct mp_store *store);
void store_request_free(struct mp_store *store, struct store_request *request);

/* pages.c */
int store_page_get(struct mp_store *store, const struct mp_page_ref *ref, struct store_page **page);
struct store_page *store_page_new(struct mp_store *store, struct mp_page_ref *home,
				  const struct mp_page_descriptor *about);
struct store_page *store_page_dirty(struct mp_store *store, struct store_page *page,
				    struct mp_page_ref *home,
					const struct mp_page_descriptor *about);
void store_page_release(struct mp_store *store, const struct mp_page_ref *ref);
void store_page_wait(struct mp_store *store, struct store_wait *wait); /* for store->missing */
/* Inner pages only, once per load: a page from disk may not refer to pages in memory, or it could
 * name one of another tree. 0 or -EBADMSG. */
int store_page_check_inner(struct store_page *page);
void store_page_freeze(struct mp_store *store, struct store_page *page, uint64_t place);
void store_page_written(struct mp_store *store, struct store_page *page);
void store_pages_trim(struct mp_store *store);
void store_pages_free(struct mp_store *store);

/* map.c */
enum store_walk { STORE_LOOK, STORE_DIRTY, STORE_CREATE };
int store_tree_leaf(struct mp_store *store, struct store_tree *tree, uint64_t key,
		    enum store_walk how,
		    uint8_t **leaf); /* 0 and NULL: a hole */
void store_tree_grow(struct mp_store *store, struct store_tree *tree, uint64_t keys);
/* Make the page dirty if it is the one about tells of, in that segment. 1: it was; 0; -errno. */
int store_tree_move(struct mp_store *store, struct store_tree *tree,
		    const struct mp_page_descriptor *about, uint64_t segment);
int store_extent_get(struct mp_store *store, uint64_t address, enum store_walk how,
		     struct mp_extent_entry **entry);
void store_extent_kill(struct mp_store *store, struct store_volume *volume, uint64_t address);
/* Trim and zero: prepare until it returns 0, then clear in the same turn. */
int store_map_clear(struct mp_store *store, struct store_volume *volume, uint64_t first_block,
		    uint64_t end_block, int prepare);

/* storeadmit.c */
uint32_t store_batch_check(struct mp_store *store, const uint8_t *bytes, uint64_t length_bytes,
			   struct store_batch *batch);
/* changes nothing */
uint32_t store_admission(struct mp_store *store, struct store_request *request);
void store_admit(struct mp_store *store, struct store_request *request);
/* What a READ or a BLOCK_STATUS asks for. */
struct store_query {
	const uint8_t *volume;
	uint64_t epoch, minimum_sequence, first_block, block_count;
};
/* MP_STATUS_OK or why not; lineage and sequence: as far as they are known. */
uint32_t store_query_admit(struct mp_store *store, const struct store_query *query,
			   uint64_t *lineage, uint64_t *sequence);

/* storesegment.c */
struct store_segment *store_segment_find(struct mp_store *store, uint64_t id);
struct store_segment *store_segment_add(struct mp_store *store, uint64_t id, uint32_t kind);
void store_segment_insert(struct mp_store *store, struct store_segment *segment);
/* -ENOSPC: full for now */
int store_segment_want(struct mp_store *store, uint32_t kind, uint64_t bytes);
void store_segment_seal(struct mp_store *store, struct store_segment *segment);
/* at freeze: what the checkpoint leaves out */
void store_segment_drop_dead(struct mp_store *store);
void store_dead_range(struct mp_store *store, uint64_t segment, uint64_t offset_bytes,
		      uint64_t length_bytes);
void store_ranges_release(struct mp_store *store, struct store_ranges *from);
void store_reclaim(struct mp_store *store);   /* punch and remove what may be */
int store_reclaiming(const struct mp_store *store);
void store_segments_free(struct mp_store *store);

/* storelog.c */
void store_log_advance(struct mp_store *store);
int store_log_idle(const struct mp_store *store);
uint64_t store_group_seal(struct mp_group *group, uint32_t kind);
int store_group_check(const struct mp_group *header, uint64_t segment, uint64_t offset_bytes);
void store_group_free(struct mp_store *store, struct store_group *group);
void store_log_free(struct mp_store *store);

/* storeapply.c: 1 when the group is applied as a whole, 0 when pages are missing, -errno. */
int store_apply_group(struct mp_store *store, struct store_group *group);
void store_apply_advance(struct mp_store *store);

/* storegrave.c */
void store_bury(struct mp_store *store, const struct mp_page_ref *root, uint32_t level,
		uint32_t kind);
void store_graves_advance(struct mp_store *store);

/* storecheckpoint.c, storesuper.c */
void store_checkpoint_advance(struct mp_store *store);
void store_checkpoint_free(struct mp_store *store);
uint8_t *store_checkpoint_encode(struct mp_store *store, uint64_t *length_bytes);
int store_checkpoint_load(struct mp_store *store, char *message, uint64_t message_bytes);
void store_super_seal(struct mp_store_super *super);
int store_super_valid(const struct mp_store_super *super);
int store_super_load(struct mp_store *store, char *message, uint64_t message_bytes);
int64_t store_super_write(struct mp_store *store); /* both copies, blocking: recovery only */

/* storescrub.c */
void store_scrub_advance(struct mp_store *store);
uint64_t store_scrub_wake_ns(const struct mp_store *store);
void store_scrub_free(struct mp_store *store);

/* storesweep.c */
void store_sweep_start(struct mp_store *store);
void store_sweep_advance(struct mp_store *store);

/* storeread.c */
int store_tree_span(struct mp_store *store, struct store_tree *tree, uint64_t key, uint8_t **leaf,
		    uint64_t *end);

/* The extent that an entry describes, without its sequence. -EBADMSG: it makes no sense. */
int store_extent_describe(const struct mp_store *store, const struct mp_extent_entry *entry,
			  struct mp_extent *extent);

/* storestatus.c */
void store_status_start(struct mp_store *store, struct store_request *request);
void store_statuses_advance(struct mp_store *store);
void store_statuses_free(struct mp_store *store);

/* storeread.c */
void store_read_start(struct mp_store *store, struct store_request *request);
void store_reads_advance(struct mp_store *store);
void store_reads_free(struct mp_store *store);

#endif
