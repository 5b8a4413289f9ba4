/* fetch.c - misses: runs of blocks asked of a store, replies verified and decoded.
 *
 * Happy path: a run of missing blocks becomes one READ frame on the connection of the volume's
 * store (fetchlink.c); the reply's pieces are verified and decoded straight into the read's buffer,
 * the guest is answered, and the blocks are written to slots from the same buffer (fill.c).
 * Failure modes: the store is away: outstanding fetches wait and are sent again on a fresh
 * connection (the guest stalls). A reply that does not verify is asked for again on a new one,
 * FETCH_ATTEMPTS times, then EIO. An error status is EIO for that read; a store that is behind,
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

void fetch_start(struct read *read, uint32_t first, uint32_t count)
{
	struct mp_engine *engine = read->volume->engine;
	struct fetch *fetch = calloc(1, sizeof *fetch);

	assert(count && count <= FETCH_BLOCKS_MAX);
	if (!fetch) {
		read->error = EIO;
		return;
	}
	fetch->read = read;
	fetch->first = first;
	fetch->count = count;
	fetch->request_id = ++engine->next_request_id;
	fetch->generation = read->volume->release_generation;
	read->pending++;
	list_append(bucket_of(engine, fetch->request_id), &fetch->in_bucket);
	read->volume->fetch_count++;
	engine->counters.fetches++;
	fetch_link_queue(fetch);
}

static void fetch_end(struct fetch *fetch, int error)
{
	struct read *read = fetch->read;

	list_remove(&fetch->in_queue);
	list_remove(&fetch->in_bucket);
	read->volume->fetch_count--;
	free(fetch);
	if (error)
		read->error = error;
	read_part_done(read);
}

/* Decode the pieces of one verified reply into the read's buffer. 0, -EBADMSG or -EPROTO. */
static int decode(const struct fetch *fetch, const uint8_t *payload, uint64_t payload_bytes)
{
	struct read *read = fetch->read;
	struct mp_read_reply reply;
	uint64_t next = read->first_block + fetch->first, end = next + fetch->count, at, i;

	if (payload_bytes < sizeof reply)
		return -EPROTO;
	memcpy(&reply, payload, sizeof reply);
	at = sizeof reply + (uint64_t)reply.piece_count * sizeof(struct mp_piece);
	if (reply.piece_count > fetch->count || at > payload_bytes ||
	    memcmp(reply.volume, read->volume->id, sizeof reply.volume) != 0)
		return -EPROTO;
	for (i = 0; i < reply.piece_count; i++) {
		struct mp_piece piece;
		uint8_t *out = read->buffer + (next - read->first_block) * MP_BLOCK_BYTES;
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
	struct volume *volume = fetch->read->volume;

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
	if (!fetch || fetch->read->volume->store != (uint32_t)(store - engine->stores))
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
	if (rc == 0)
		fill_run(fetch->read, fetch->first, fetch->count, fetch->generation);
	fetch_end(fetch, rc ? EIO : 0);
	return 0;
}

/* The engine stops: nobody waits for these any more (their connections are broken). */
void fetches_abandon(struct mp_engine *engine)
{
	for (uint32_t i = 0; i < FETCH_BUCKETS; i++)
		while (!list_is_empty(&engine->fetches[i]))
			fetch_end(CONTAINER(engine->fetches[i].next, struct fetch, in_bucket), EIO);
	for (uint32_t i = 0; i < STORES_MAX; i++)
		statuses_abandon(&engine->stores[i]);
}
