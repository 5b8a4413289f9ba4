/* fetch.c - misses: runs of blocks asked of a store, replies verified and decoded.
 *
 * Happy path: a run of missing blocks becomes one READ frame on the connection of the volume's
 * store (fetchlink.c); the reply's pieces are verified and decoded straight into the read's buffer,
 * the guest is answered, and the blocks are written to slots from the same buffer (fill.c). A read
 * that misses what is on its way already, or was read ahead (readahead.c), waits for that or takes
 * it: a block is asked for once.
 * Joining is right as long as nothing happened to the block since the fetch began: a read comes
 * here only with blocks that are neither in the log nor under a tombstone, and release_generation
 * says whether they were meanwhile.
 * Failure modes: the store is away: outstanding fetches wait and are sent again on a fresh
 * connection (the guest stalls). A reply that does not verify is asked for again on a new one,
 * FETCH_ATTEMPTS times, then EIO. An error status is EIO for those reads; a store that is behind,
 * fenced or without the volume also fails the volume, loudly. A malformed reply: -EPROTO, the
 * connection is given up.
 */
#include "engine_internal.h"

static struct link *bucket_of(struct mp_engine *engine, uint64_t request_id)
{
	return &engine->fetches[request_id & (FETCH_BUCKETS - 1)];
}

static struct fetch *fetch_by_id(struct mp_engine *engine, uint64_t request_id)
{
	struct link *bucket = bucket_of(engine, request_id), *link;

	for (link = bucket->next; link != bucket; link = link->next) {
		struct fetch *fetch = CONTAINER(link, struct fetch, in_bucket);
		if (fetch->request_id == request_id)
			return fetch;
	}
	return NULL;
}

/* Fetches are found by the stretch of FETCH_BLOCKS_MAX blocks in which they begin. */
static struct link *place_of(const struct volume *volume, uint64_t stretch)
{
	uint64_t hash = (stretch + (uint64_t)volume->number * 31) * 0x9e3779b97f4a7c15ULL;

	return &volume->engine->fetch_places[hash >> 32 & (FETCH_BUCKETS - 1)];
}

static struct fetch *find_in(const struct volume *volume, uint64_t stretch, uint64_t block)
{
	struct link *place = place_of(volume, stretch), *link;

	for (link = place->next; link != place; link = link->next) {
		struct fetch *fetch = CONTAINER(link, struct fetch, in_place);
		if (fetch->volume == volume && block >= fetch->first_block &&
		    block < fetch->first_block + fetch->count &&
		    (fetch->generation == volume->release_generation ||
		     fault(volume->engine, MP_FAULT_STALE_FILL)))
			return fetch;
	}
	return NULL;
}

struct fetch *fetch_of_block(const struct volume *volume, uint64_t block)
{
	uint64_t stretch = block / FETCH_BLOCKS_MAX;
	struct fetch *fetch = NULL;

	if (!volume->fetch_count && !volume->ahead_count)
		return NULL;
	fetch = find_in(volume, stretch, block);
	return fetch || stretch == 0 ? fetch : find_in(volume, stretch - 1, block);
}

struct fetch *fetch_new(struct volume *volume, uint64_t first_block, uint32_t count,
			uint8_t *buffer)
{
	struct mp_engine *engine = volume->engine;
	struct fetch *fetch = calloc(1, sizeof *fetch);

	assert(count && count <= FETCH_BLOCKS_MAX);
	if (!fetch)
		return NULL;
	fetch->volume = volume;
	fetch->first_block = first_block;
	fetch->count = count;
	fetch->buffer = buffer;
	fetch->request_id = ++engine->next_request_id;
	fetch->generation = volume->release_generation;
	list_init(&fetch->in_queue);
	list_init(&fetch->in_ahead);
	list_init(&fetch->waiters);
	list_append(bucket_of(engine, fetch->request_id), &fetch->in_bucket);
	list_append(place_of(volume, first_block / FETCH_BLOCKS_MAX), &fetch->in_place);
	volume->fetch_count++;
	engine->counters.fetches++;
	return fetch;
}

void fetch_free(struct fetch *fetch)
{
	list_remove(&fetch->in_queue);
	list_remove(&fetch->in_bucket);
	list_remove(&fetch->in_place);
	free(fetch);
}

/* Blocks that a fetch brought, to a read that came later. What was read ahead is offered to the
 * slots here: only what a guest asked for is worth one. */
static void hand_over(const struct fetch *fetch, struct read *read, uint32_t first, uint32_t count)
{
	uint64_t skip = read->first_block + first - fetch->first_block;

	memcpy(read->buffer + (uint64_t)first * MP_BLOCK_BYTES,
	       fetch->buffer + skip * MP_BLOCK_BYTES, (size_t)count * MP_BLOCK_BYTES);
	if (fetch->ahead)
		fill_run(read, first, count, fetch->generation);
}

/* False: no memory, fetch it anew. */
static bool join(struct fetch *fetch, struct read *read, uint32_t first, uint32_t count)
{
	struct waiter *waiter;

	if (fetch->done) {
		hand_over(fetch, read, first, count);
		readahead_used(fetch, count);
	} else {
		waiter = malloc(sizeof *waiter);
		if (!waiter)
			return false;
		waiter->read = read;
		waiter->first = first;
		waiter->count = count;
		list_append(&fetch->waiters, &waiter->in_fetch);
		read->pending++;
		if (!read->prefetch)
			fetch_link_hurry(fetch);
	}
	read->volume->engine->counters.fetches_joined++;
	return true;
}

static bool start_one(struct read *read, uint32_t first, uint32_t count)
{
	struct fetch *fetch = fetch_new(read->volume, read->first_block + first, count,
					read->buffer + (uint64_t)first * MP_BLOCK_BYTES);

	if (!fetch)
		return false;
	fetch->read = read;
	fetch->background = read->prefetch;
	read->pending++;
	fetch_link_queue(fetch);
	return true;
}

void fetch_start(struct read *read, uint32_t first, uint32_t count)
{
	uint32_t run;

	for (; count; first += run, count -= run) {
		uint64_t block = read->first_block + first;
		struct fetch *fetch = fetch_of_block(read->volume, block);

		if (fetch) {
			uint64_t left = fetch->first_block + fetch->count - block;
			run = left < count ? (uint32_t)left : count;
			if (join(fetch, read, first, run))
				continue;
		}
		for (run = 1; run < count && !fetch_of_block(read->volume, block + run); run++)
			;
		if (!start_one(read, first, run)) {
			read->error = EIO;
			return;
		}
	}
}

/* A failure is of the whole run: who wanted a part of it asks for just that, unless the engine
 * stops. */
static void waiter_end(struct fetch *fetch, struct waiter *waiter, int error)
{
	struct read *read = waiter->read;

	list_remove(&waiter->in_fetch);
	fetch->used += waiter->count;
	if (!error)
		hand_over(fetch, read, waiter->first, waiter->count);
	else if (error == ESHUTDOWN || !start_one(read, waiter->first, waiter->count))
		read->error = EIO;
	free(waiter);
	read_part_done(read);
}

/* ESHUTDOWN: it will not be answered any more. */
static void fetch_end(struct fetch *fetch, int error)
{
	struct read *read = fetch->read;

	/* Nobody may join it from here on. */
	list_remove(&fetch->in_place);
	fetch->volume->fetch_count--;
	while (!list_is_empty(&fetch->waiters))
		waiter_end(fetch, CONTAINER(fetch->waiters.next, struct waiter, in_fetch), error);
	if (fetch->ahead) {
		list_append(place_of(fetch->volume, fetch->first_block / FETCH_BLOCKS_MAX),
			    &fetch->in_place);
		readahead_arrived(fetch, error);
		return;
	}
	fetch_free(fetch);
	if (error)
		read->error = EIO;
	read_part_done(read);
}

/* Decode the pieces of one verified reply into the buffer. 0, -EBADMSG or -EPROTO. */
static int decode(const struct fetch *fetch, const uint8_t *payload, uint64_t payload_bytes)
{
	struct mp_read_reply reply;
	uint64_t next = fetch->first_block, end = next + fetch->count, at, i;

	if (payload_bytes < sizeof reply)
		return -EPROTO;
	memcpy(&reply, payload, sizeof reply);
	at = sizeof reply + (uint64_t)reply.piece_count * sizeof(struct mp_piece);
	if (reply.piece_count > fetch->count || at > payload_bytes ||
	    memcmp(reply.volume, fetch->volume->id, sizeof reply.volume) != 0)
		return -EPROTO;
	for (i = 0; i < reply.piece_count; i++) {
		struct mp_piece piece;
		uint8_t *out = fetch->buffer + (next - fetch->first_block) * MP_BLOCK_BYTES;
		uint64_t skip;
		int rc;

		memcpy(&piece, payload + sizeof reply + i * sizeof piece, sizeof piece);
		skip = piece.first_block - piece.extent.first_block;
		if (piece.first_block != next || piece.block_count == 0 ||
		    piece.block_count > end - next || piece.shipped_bytes > payload_bytes - at ||
		    mp_extent_check(&piece.extent) || skip > UINT32_MAX ||
		    piece.first_block < piece.extent.first_block ||
		    skip + piece.block_count > piece.extent.block_count)
			return -EPROTO;
		rc = mp_extent_decode(&piece.extent, (uint32_t)skip, piece.block_count,
				      payload + at, piece.shipped_bytes, out);
		if (rc)
			return rc;
		at += piece.shipped_bytes;
		next += piece.block_count;
	}
	return next == end && at == payload_bytes ? 0 : -EPROTO;
}

static void refused(struct fetch *fetch, uint32_t status)
{
	struct volume *volume = fetch->volume;

	if (status == MP_STATUS_CORRUPT)
		volume->engine->counters.fetch_checksum_errors++;
	if (status == MP_STATUS_STALE_EPOCH)
		volume_fail(volume, ESTALE, "another cache has opened the volume: fenced");
	else if (status == MP_STATUS_BEHIND)
		volume_fail(volume, EIO, "the store lost writes that it had acknowledged");
	else if (status == MP_STATUS_UNKNOWN_VOLUME)
		volume_fail(volume, ENOENT, "the store does not know the volume any more");
	fetch_end(fetch, EIO);
}

int fetch_reply(struct store_link *store, const uint8_t *bytes, uint64_t length_bytes)
{
	struct mp_engine *engine = store->engine;
	struct mp_frame frame;
	struct fetch *fetch;
	int rc;

	memcpy(&frame, bytes, sizeof frame);
	if (frame.type == MP_FRAME_BLOCK_STATUS_REPLY)
		return status_reply(store, &frame, bytes + sizeof frame);
	if (frame.type != MP_FRAME_READ_REPLY)
		return -EPROTO;
	fetch = fetch_by_id(engine, frame.request_id);
	if (!fetch && engine->stopping)
		return 0; /* abandoned */
	if (!fetch || !fetch->sent || fetch->volume->store != (uint32_t)(store - engine->stores))
		return -EPROTO;
	if (frame.status) {
		refused(fetch, frame.status);
		return 0;
	}
	rc = decode(fetch, bytes + sizeof frame, length_bytes - sizeof frame);
	if (rc == -EPROTO)
		return rc;
	if (rc == -EBADMSG) { /* damaged on the way: ask again, on a new connection */
		engine->counters.fetch_checksum_errors++;
		if (++fetch->attempts < FETCH_ATTEMPTS) {
			engine->counters.fetch_retries++;
			return -EPROTO;
		}
	}
	if (rc == 0 && fetch->read)
		fill_run(fetch->read, (uint32_t)(fetch->first_block - fetch->read->first_block),
			 fetch->count, fetch->generation);
	fetch_end(fetch, rc ? EIO : 0);
	return 0;
}

/* The engine stops: nobody waits for these any more (their connections are broken). */
void fetches_abandon(struct mp_engine *engine)
{
	engine->cut_off = true;
	for (uint32_t i = 0; i < FETCH_BUCKETS; i++)
		while (!list_is_empty(&engine->fetches[i]))
			fetch_end(CONTAINER(engine->fetches[i].next, struct fetch, in_bucket),
				  ESHUTDOWN);
	readahead_forget(engine, NULL);
	for (uint32_t i = 0; i < STORES_MAX; i++)
		statuses_abandon(&engine->stores[i]);
}
