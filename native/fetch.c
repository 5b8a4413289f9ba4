/* fetch.c - misses: READ frames out, replies in, data to the waiting read and into slots.
 *
 * Happy path: a run of missing blocks becomes one READ frame in the outgoing ring; the control
 * plane carries it; the reply's pieces are verified and decoded straight into the read's buffer,
 * the guest is answered, and the blocks are written to slots from the same buffer.
 * A fill installs only if nothing newer happened to its block since the miss (fill_allowed): no log
 * entry, no tombstone, and no release of either (release_generation).
 * Failure modes: link down: outstanding fetches wait and are sent again on a fresh stream (the
 * guest stalls). A reply that does not verify is asked for again on a new link, FETCH_ATTEMPTS
 * times, then EIO. An error status is EIO for that read; a store that is behind, fenced or without
 * the volume also fails the volume, loudly. A malformed stream: -EPROTO, the link is dropped.
 */
#include "engine_internal.h"

enum { READ_FRAME_BYTES = MP_FRAME_HEADER_BYTES + (int)sizeof(struct mp_read_request) };

static bool outgoing_reserve(struct store_link *link, uint64_t bytes)
{
	uint64_t used = link->outgoing_end - link->outgoing_begin, capacity;
	uint8_t *memory;

	if (link->outgoing_end + bytes <= link->outgoing_capacity)
		return true;
	if (used)
		memmove(link->outgoing, link->outgoing + link->outgoing_begin, used);
	link->outgoing_begin = 0;
	link->outgoing_end = used;
	if (used + bytes <= link->outgoing_capacity)
		return true;
	capacity = link->outgoing_capacity ? link->outgoing_capacity * 2 : 65536;
	memory = realloc(link->outgoing, capacity);
	if (!memory)
		return false;
	link->outgoing = memory;
	link->outgoing_capacity = capacity;
	return true;
}

static void fetch_send(struct mp_engine *engine, struct fetch *fetch)
{
	struct volume *volume = fetch->read->volume;
	struct store_link *link = &engine->stores[volume->store];
	struct { struct mp_frame frame; struct mp_read_request request; } out;
	bool ok;

	if (!link->up)
		return;
	memset(&out, 0, sizeof out);
	out.frame.type = MP_FRAME_READ;
	out.frame.payload_bytes = out.frame.checked_bytes = sizeof out.request;
	out.frame.request_id = fetch->request_id;
	memcpy(out.request.volume, volume->id, sizeof out.request.volume);
	out.request.epoch = volume->epoch;
	out.request.minimum_sequence = volume->destaged_sequence;
	out.request.first_block = fetch->read->first_block + fetch->first;
	out.request.block_count = fetch->count;
	mp_frame_seal(&out.frame);
	pthread_mutex_lock(&engine->mutex);
	ok = outgoing_reserve(link, READ_FRAME_BYTES);
	if (ok) {
		memcpy(link->outgoing + link->outgoing_end, &out, READ_FRAME_BYTES);
		link->outgoing_end += READ_FRAME_BYTES;
	}
	pthread_mutex_unlock(&engine->mutex);
	fetch->sent = ok; /* without memory now: the next link_up sends it */
	engine->notify_wanted = true;
}

void fetch_start(struct read *read, uint32_t first, uint32_t count)
{
	struct mp_engine *engine = read->volume->engine;

	while (count) {
		struct fetch *fetch = calloc(1, sizeof *fetch);
		uint32_t run = count < MP_READ_BLOCKS_MAX ? count : MP_READ_BLOCKS_MAX;

		if (!fetch) {
			read->error = EIO;
			return;
		}
		fetch->read = read;
		fetch->first = first;
		fetch->count = run;
		fetch->request_id = ++engine->next_request_id;
		fetch->generation = read->volume->release_generation;
		read->pending++;
		list_append(&engine->stores[read->volume->store].fetches, &fetch->in_queue);
		engine->fetch_count++;
		read->volume->fetch_count++;
		engine->counters.fetches++;
		fetch_send(engine, fetch);
		first += run;
		count -= run;
	}
}

static void fetch_end(struct mp_engine *engine, struct fetch *fetch, int error)
{
	struct read *read = fetch->read;

	list_remove(&fetch->in_queue);
	engine->fetch_count--;
	read->volume->fetch_count--;
	free(fetch);
	if (error)
		read->error = error;
	read_part_done(read);
}

/* ---- filling slots ---- */

bool fill_allowed(struct volume *volume, uint64_t block, uint64_t generation)
{
	if (fault(volume->engine, MP_FAULT_STALE_FILL))
		return true;
	return volume->release_generation == generation &&
	       !index_find(&volume->engine->index, volume->number, block) &&
	       !tombstones_find(&volume->tombstones, block);
}

static void unclaim(struct mp_engine *engine, int64_t slot, uint32_t count)
{
	while (count--)
		mp_slots_unpin(engine->slots, slot);
}

static void fill_done(struct mp_io *io)
{
	struct fill *fill = io->context;
	struct read *read = fill->read;
	struct volume *volume = read->volume;
	struct mp_engine *engine = volume->engine;
	uint32_t i;

	engine->ios_inflight--;
	engine->fills_inflight--;
	volume->fills_inflight--;
	if (io->result < 0)
		engine->counters.device_errors++;
	for (i = 0; io->result >= 0 && i < fill->count; i++) {
		uint64_t block = read->first_block + fill->first + i;
		if (fill_allowed(volume, block, fill->generation))
			mp_slots_install(engine->slots, fill->slot, block, fill->checksums[i]);
	}
	unclaim(engine, fill->slot, fill->count);
	checkpoint_note_fill(engine, fill->iov.iov_len);
	free(fill);
	read->fills--;
	read_release(read);
}

static void fill_submit(struct mp_engine *engine, struct fill *fill)
{
	uint64_t block = fill->read->first_block + fill->first;

	fill->iov.iov_base = fill->read->buffer + (uint64_t)fill->first * MP_BLOCK_BYTES;
	fill->iov.iov_len = (size_t)fill->count * MP_BLOCK_BYTES;
	fill->io.op = MP_OP_WRITE;
	fill->io.iov = &fill->iov;
	fill->io.iov_count = 1;
	fill->io.length_bytes = fill->iov.iov_len;
	fill->io.offset_bytes = engine->super.slots_offset_bytes +
				(uint64_t)fill->slot * engine->super.slot_bytes +
				block % engine->slot_blocks * MP_BLOCK_BYTES;
	fill->io.done = fill_done;
	fill->io.context = fill;
	fill->read->fills++;
	engine->fills_inflight++;
	fill->read->volume->fills_inflight++;
	engine->counters.slot_writes++;
	engine->counters.slot_bytes_written += fill->iov.iov_len;
	engine_submit(engine, &fill->io);
}

static bool fill_is_zero(const struct fill *fill)
{
	uint32_t i;

	for (i = 0; i < fill->count; i++)
		if (fill->checksums[i])
			return false;
	return true;
}

/* Claim consecutive blocks of one slot, from first on; returns how many. A block that is valid,
 * being filled, or changed since the miss ends the run. */
static uint32_t claim(struct read *read, uint32_t first, uint32_t count, uint64_t generation,
		      int64_t *slot)
{
	struct volume *volume = read->volume;
	uint32_t claimed = 0;

	while (claimed < count) {
		uint64_t block = read->first_block + first + claimed;
		int64_t got = fill_allowed(volume, block, generation)
				      ? mp_slots_reserve(volume->engine->slots, volume->origin,
							 block)
				      : -1;
		if (got < 0)
			break;
		*slot = got;
		claimed++;
	}
	return claimed;
}

/* Fill what can be claimed of blocks [first, first + count), all of one slot; returns the blocks
 * dealt with. */
static uint32_t fill_slot(struct read *read, uint32_t first, uint32_t count, uint64_t generation)
{
	struct volume *volume = read->volume;
	struct mp_engine *engine = volume->engine;
	struct fill *fill;
	int64_t slot = -1;
	uint32_t i, claimed = claim(read, first, count, generation, &slot);

	if (claimed == 0)
		return 1;
	fill = calloc(1, sizeof *fill);
	if (!fill) {
		unclaim(engine, slot, claimed);
		return claimed;
	}
	fill->read = read;
	fill->first = first;
	fill->count = claimed;
	fill->slot = slot;
	fill->generation = generation;
	for (i = 0; i < claimed; i++) {
		const uint8_t *data = read->buffer + (uint64_t)(first + i) * MP_BLOCK_BYTES;
		uint32_t low = (uint32_t)mp_block_checksum(
			volume->seed, read->first_block + first + i, data, MP_BLOCK_BYTES);
		fill->checksums[i] = mp_is_zero(data, MP_BLOCK_BYTES) ? 0 : low ? low : 1;
	}
	if (fill_is_zero(fill)) {
		for (i = 0; i < claimed; i++)
			mp_slots_install(engine->slots, slot, read->first_block + first + i, 0);
		unclaim(engine, slot, claimed);
		checkpoint_note_fill(engine, 0);
		free(fill);
	} else
		fill_submit(engine, fill);
	return claimed;
}

static void fill_run(struct read *read, uint32_t first, uint32_t count, uint64_t generation)
{
	struct mp_engine *engine = read->volume->engine;

	while (count && engine->fills_inflight < FILLS_MAX) {
		uint64_t within = (read->first_block + first) % engine->slot_blocks;
		uint64_t room = engine->slot_blocks - within;
		uint32_t run = fill_slot(read, first, count < room ? count : (uint32_t)room,
					 generation);

		first += run;
		count -= run;
	}
}

/* ---- replies ---- */

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

static void refused(struct mp_engine *engine, struct fetch *fetch, uint32_t status)
{
	struct volume *volume = fetch->read->volume;

	if (status == MP_STATUS_STALE_EPOCH)
		volume_fail(volume, ESTALE, "another cache has opened the volume: fenced");
	else if (status == MP_STATUS_BEHIND)
		volume_fail(volume, EIO, "the store lost writes that it had acknowledged");
	else if (status == MP_STATUS_UNKNOWN_VOLUME)
		volume_fail(volume, ENOENT, "the store does not know the volume any more");
	fetch_end(engine, fetch, EIO);
}

static struct fetch *fetch_by_id(struct store_link *store, uint64_t request_id)
{
	struct link *link;

	/* Replies come nearly in order: the oldest is nearly always the first. */
	for (link = store->fetches.next; link != &store->fetches; link = link->next) {
		struct fetch *fetch = CONTAINER(link, struct fetch, in_queue);
		if (fetch->request_id == request_id)
			return fetch;
	}
	return NULL;
}

static int reply_handle(struct mp_engine *engine, struct store_link *link, const uint8_t *bytes,
			uint64_t length_bytes)
{
	struct mp_frame frame;
	struct fetch *fetch;
	int rc;

	memcpy(&frame, bytes, sizeof frame);
	if (frame.type != MP_FRAME_READ_REPLY)
		return -EPROTO;
	fetch = fetch_by_id(link, frame.request_id);
	if (!fetch)
		return 0; /* answered on an earlier link */
	if (frame.status) {
		if (frame.status == MP_STATUS_CORRUPT)
			engine->counters.fetch_checksum_errors++;
		refused(engine, fetch, frame.status);
		return 0;
	}
	rc = decode(fetch, bytes + sizeof frame, length_bytes - sizeof frame);
	if (rc == -EPROTO)
		return rc;
	if (rc == -EBADMSG) { /* damaged on the way: ask again, on a new link */
		engine->counters.fetch_checksum_errors++;
		if (++fetch->attempts < FETCH_ATTEMPTS) {
			engine->counters.fetch_retries++;
			return -EPROTO;
		}
	}
	if (rc == 0)
		fill_run(fetch->read, fetch->first, fetch->count, fetch->generation);
	fetch_end(engine, fetch, rc ? EIO : 0);
	return 0;
}

static void stream_broken(struct mp_engine *engine, uint32_t store)
{
	struct mp_event event;

	engine->counters.protocol_errors++;
	engine->stores[store].up = false;
	engine->stores[store].reply_length = 0;
	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_LINK_BROKEN;
	event.cookie = store;
	strcpy(event.message, "a reply of the store is malformed: connect again");
	engine_event(engine, &event);
}

static bool reply_append(struct store_link *link, const uint8_t *bytes, uint64_t length_bytes)
{
	uint64_t need = link->reply_length + length_bytes;

	if (need > link->reply_capacity) {
		uint8_t *memory = realloc(link->reply_bytes, need * 2);
		if (!memory)
			return false;
		link->reply_bytes = memory;
		link->reply_capacity = need * 2;
	}
	memcpy(link->reply_bytes + link->reply_length, bytes, length_bytes);
	link->reply_length = need;
	return true;
}

void fetch_feed(struct mp_engine *engine, uint32_t store, const uint8_t *bytes,
		uint64_t length_bytes)
{
	struct store_link *link = &engine->stores[store];
	uint64_t at = 0;
	int64_t total = 0;

	if (!link->up)
		return; /* left over from a link that was given up */
	if (!reply_append(link, bytes, length_bytes)) {
		stream_broken(engine, store);
		return;
	}
	while (at < link->reply_length) {
		total = mp_frame_check(link->reply_bytes + at, link->reply_length - at);
		if (total == -EAGAIN || (total > 0 && (uint64_t)total > link->reply_length - at))
			break;
		if (total < 0 ||
		    reply_handle(engine, link, link->reply_bytes + at, (uint64_t)total)) {
			stream_broken(engine, store);
			return;
		}
		at += (uint64_t)total;
	}
	link->reply_length -= at;
	memmove(link->reply_bytes, link->reply_bytes + at, link->reply_length);
}

void fetch_link(struct mp_engine *engine, uint32_t store, bool up)
{
	struct store_link *link = &engine->stores[store];
	struct link *each;

	link->up = up;
	link->reply_length = 0;
	pthread_mutex_lock(&engine->mutex);
	link->outgoing_begin = link->outgoing_end = 0;
	pthread_mutex_unlock(&engine->mutex);
	if (!up)
		return;
	for (each = link->fetches.next; each != &link->fetches; each = each->next)
		fetch_send(engine, CONTAINER(each, struct fetch, in_queue));
}

/* The engine stops: nobody waits for these any more (their connections are broken). */
void fetches_abandon(struct mp_engine *engine)
{
	uint32_t i;

	for (i = 0; i < STORES_MAX; i++) {
		struct link *fetches = &engine->stores[i].fetches;
		while (!list_is_empty(fetches))
			fetch_end(engine, CONTAINER(fetches->next, struct fetch, in_queue), EIO);
	}
}
