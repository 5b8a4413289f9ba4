/* fetch_internal.h - misses: fetches outstanding at the stores, and the connections they go over.
 *
 * Part of engine_internal.h, which includes it; engine thread only unless marked.
 *
 * Life of a fetch: started by a read (fetch.c) -> waits in its store's queue -> a READ frame on
 * the connection (fetchlink.c) -> its reply verified and decoded into the read's buffer -> the read
 * is done, its blocks are offered to the slots (fill.c).
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
	struct link in_queue;     /* of its store: waiting or sent, oldest first */
	struct link in_bucket;    /* engine->fetches, by request_id */
	struct read *read;
	uint32_t first, count;
	uint64_t request_id;
	uint64_t generation;      /* volume->release_generation at the time of the miss */
	uint32_t attempts;
};

/* The fetch connection to one store, and what is asked of it. */
struct store_link {
	struct mp_engine *engine;
	int socket;               /* -1: away */
	uint64_t cookie;
	uint32_t interest;
	struct link waiting, sent;
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

/* fetchlink.c */
void fetch_links_init(struct mp_engine *engine);
void fetch_links_free(struct mp_engine *engine);
void fetch_link_queue(struct fetch *fetch);      /* to be sent, behind the others */
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
