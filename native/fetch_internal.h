/* fetch_internal.h - misses: fetches outstanding at the stores, and the connections they go over.
 *
 * Part of engine_internal.h, which includes it; engine thread only unless marked.
 *
 * Life of a fetch: started by a read (fetch.c) -> waits in its store's queue -> a READ frame on
 * the connection (fetchlink.c) -> its reply verified and decoded into the read's buffer -> the read
 * is done, its blocks are offered to the slots (fill.c). One that was read ahead (readahead.c) has
 * a buffer of its own and stays until reads have taken it.
 */
#ifndef MILLPOND_FETCH_INTERNAL_H
#define MILLPOND_FETCH_INTERNAL_H

#include <stdatomic.h>

#include "core_limits.h"
#include "driver.h"
#include "format.h"
#include "list.h"
#include "slots.h"

struct read;
struct volume;
struct mp_engine;
struct command;

enum { READ_FRAME_BYTES = MP_FRAME_HEADER_BYTES + (int)sizeof(struct mp_read_request) };

/* A run of blocks that comes from a store. */
struct fetch {
	struct link in_queue;     /* of its store: waiting, background or sent, oldest first */
	struct link in_bucket;    /* engine->fetches, by request_id, until it is answered */
	struct link in_place;     /* engine->fetch_places, by volume and block */
	struct link in_ahead;     /* engine->ahead: read ahead, here, oldest first */
	struct volume *volume;
	struct read *read;        /* whose buffer it goes to; NULL: read ahead, has its own */
	uint64_t first_block;
	uint32_t count, attempts;
	uint8_t *buffer;
	uint64_t request_id;
	uint64_t generation;      /* volume->release_generation at the time of the miss */
	struct link waiters;      /* reads that missed blocks of it meanwhile */
	uint32_t used;            /* read ahead: blocks that somebody took */
	bool background, sent, ahead, done;
};
struct waiter {
	struct link in_fetch;
	struct read *read;
	uint32_t first, count;    /* within the read */
};

/* A sequential reader of a volume. */
struct stream {
	uint64_t next_block;
	uint64_t ahead_block;     /* fetched up to here */
	uint64_t touched;         /* volume->counters.reads at its last request */
	uint32_t requests;        /* 0: none */
	uint32_t window_blocks;
	bool missing;             /* what it reads is not all here */
};

/* The fetch connection to one store, and what is asked of it. */
struct store_link {
	struct mp_engine *engine;
	int socket;               /* -1: away */
	uint64_t cookie;
	uint32_t interest;
	struct link waiting, background, sent; /* waiting goes first */
	bool block_status;        /* it answers BLOCK_STATUS */
	struct link statuses_waiting, statuses; /* the latter are asked (nbdstatus.c) */
	uint8_t *out;             /* FETCH_OUT_BYTES of frames on their way */
	uint32_t out_begin, out_end;
	uint8_t *in;              /* replies: the start of an incomplete frame */
	uint64_t in_length, in_capacity;
	_Atomic uint64_t sent_bytes, received_bytes; /* read by any thread */
};

static inline bool store_link_is_up(const struct store_link *store)
{
	return store->socket >= 0;
}

struct fill {
	struct mp_io io;
	struct iovec iov;
	struct read *read;
	uint32_t first, count;
	int64_t slot;
	uint64_t generation;
	uint32_t checksums[MP_SLOT_BLOCKS_MAX];
};

/* fetch.c */
void fetch_start(struct read *read, uint32_t first, uint32_t count);
/* One whole frame of a store. -EPROTO: give the connection up. */
int fetch_reply(struct store_link *store, const uint8_t *bytes, uint64_t length_bytes);
void fetches_abandon(struct mp_engine *engine);
/* The fetch that will bring, or has read ahead, this block as it is now; NULL: none. */
struct fetch *fetch_of_block(const struct volume *volume, uint64_t block);
struct fetch *fetch_new(struct volume *volume, uint64_t first_block, uint32_t count,
			uint8_t *buffer);
void fetch_free(struct fetch *fetch);

/* readahead.c */
/* A guest's read has looked its blocks up. */
void readahead_note(const struct read *read, bool missed);
void readahead_arrived(struct fetch *fetch, int error);
/* Blocks of it were taken; gone when all are. */
void readahead_used(struct fetch *fetch, uint32_t blocks);
/* Drop what is here; of one volume, or (NULL) of all. */
void readahead_forget(struct mp_engine *engine, const struct volume *volume);

/* fetchlink.c */
void fetch_links_init(struct mp_engine *engine);
void fetch_links_free(struct mp_engine *engine);
void fetch_link_queue(struct fetch *fetch);      /* to be sent, behind the others of its kind */
void fetch_link_hurry(struct fetch *fetch);      /* a guest waits for it now */
void fetch_links_flush(struct mp_engine *engine); /* send what waits */
void fetch_link_open(struct mp_engine *engine, const struct command *command);
void fetch_link_close(struct mp_engine *engine, uint32_t store);
/* Is this what the driver was given with a store's socket? Then it was that store's. */
bool fetch_link_ready(struct mp_engine *engine, void *context, uint32_t ready);

/* fill.c */
bool fill_allowed(struct volume *volume, uint64_t block, uint64_t generation);
/* Offer blocks of a read's buffer, as the store sent them, to the slots. */
void fill_run(struct read *read, uint32_t first, uint32_t count, uint64_t generation);

#endif
