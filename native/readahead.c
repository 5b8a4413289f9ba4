/* readahead.c - what a sequential reader will want next, fetched before it asks.
 *
 * Happy path: a request that begins where another one ended continues a stream. From its third
 * request on, a stream that misses has READAHEAD_BLOCKS_MIN to _MAX blocks behind it fetched in the
 * background: behind every miss of a guest on the connection, into buffers of their own. A read
 * that misses takes its blocks from there (fetch.c); what all have taken is dropped.
 * Rules: random reads start nothing. Slots are offered only what a guest then asked for, so that a
 * wrong guess costs the pond nothing. Nothing stale is handed out: see fetch.c.
 * Failure modes: no room (READAHEAD_BYTES_MAX, or guests have half of the buffers): the oldest that
 * nobody came for is dropped, or less is fetched. The store refuses: who waits asks for its own
 * blocks; the rest was advice.
 */
#include "engine_internal.h"

static void drop(struct fetch *fetch)
{
	struct mp_engine *engine = fetch->volume->engine;
	uint64_t bytes = (uint64_t)fetch->count * MP_BLOCK_BYTES;

	assert(fetch->done);
	list_remove(&fetch->in_ahead);
	fetch->volume->ahead_count--;
	engine->ahead_bytes -= bytes;
	mp_buffers_put(engine->buffers, fetch->buffer, bytes);
	fetch_free(fetch);
}

void readahead_used(struct fetch *fetch, uint32_t blocks)
{
	fetch->used += blocks;
	if (fetch->used >= fetch->count)
		drop(fetch);
}

void readahead_arrived(struct fetch *fetch, int error)
{
	struct volume *volume = fetch->volume;

	fetch->done = true;
	volume->ahead_count++;
	list_remove(&fetch->in_queue);
	list_remove(&fetch->in_bucket);
	list_append(&volume->engine->ahead, &fetch->in_ahead);
	if (error || fetch->used >= fetch->count ||
	    fetch->generation != volume->release_generation)
		drop(fetch);
}

void readahead_forget(struct mp_engine *engine, const struct volume *volume)
{
	struct link *link = engine->ahead.next;

	while (link != &engine->ahead) {
		struct fetch *fetch = CONTAINER(link, struct fetch, in_ahead);
		link = link->next;
		if (!volume || fetch->volume == volume)
			drop(fetch);
	}
}

/* ---- streams ---- */

/* The stream that a request goes on with: exactly at its end, or chance would make streams of
 * random reads in a small region; once it is one also over a small gap, because requests in flight
 * together may change places. */
static struct stream *stream_of(struct volume *volume, uint64_t first, uint64_t end)
{
	uint64_t gap = (end - first) * READAHEAD_GAP_REQUESTS;
	uint32_t i;

	for (i = 0; i < STREAMS_MAX; i++) {
		struct stream *stream = &volume->streams[i];
		bool proved = stream->requests >= READAHEAD_REQUESTS;

		if (stream->requests && (first == stream->next_block ||
					 (proved && first <= stream->next_block + gap &&
					  end + gap > stream->next_block)))
			return stream;
	}
	return NULL;
}

/* The least recently used; random reads, which come once, do not push out real streams soon. */
static void stream_begin(struct volume *volume, uint64_t end)
{
	struct stream *worst = &volume->streams[0];
	uint64_t worst_age = 0;
	uint32_t i;

	for (i = 0; i < STREAMS_MAX; i++) {
		struct stream *stream = &volume->streams[i];
		uint64_t age = volume->counters.reads - stream->touched;
		if (stream->requests > 1)
			age /= STREAM_PATIENCE;
		if (age >= worst_age) {
			worst = stream;
			worst_age = age;
		}
	}
	*worst = (struct stream){.next_block = end, .requests = 1,
				 .window_blocks = READAHEAD_BLOCKS_MIN,
				 .touched = volume->counters.reads};
}

static bool make_room(struct mp_engine *engine, uint64_t bytes)
{
	uint64_t limit = engine->options.buffer_bytes / 8;

	if (limit > READAHEAD_BYTES_MAX)
		limit = READAHEAD_BYTES_MAX;
	while (engine->ahead_bytes + bytes > limit && !list_is_empty(&engine->ahead))
		drop(CONTAINER(engine->ahead.next, struct fetch, in_ahead));
	return engine->ahead_bytes + bytes <= limit &&
	       mp_buffers_used_bytes(engine->buffers) + bytes <= engine->options.buffer_bytes / 2;
}

static bool fetch_ahead(struct volume *volume, uint64_t first, uint32_t count)
{
	struct mp_engine *engine = volume->engine;
	uint64_t bytes = (uint64_t)count * MP_BLOCK_BYTES;
	struct fetch *fetch;
	uint8_t *buffer;

	if (!make_room(engine, bytes))
		return false;
	buffer = mp_buffers_get(engine->buffers, bytes);
	fetch = buffer ? fetch_new(volume, first, count, buffer) : NULL;
	if (!fetch) {
		if (buffer)
			mp_buffers_put(engine->buffers, buffer, bytes);
		return false;
	}
	fetch->ahead = fetch->background = true;
	engine->ahead_bytes += bytes;
	engine->counters.readahead_blocks += count;
	fetch_link_queue(fetch);
	return true;
}

static bool is_wanted(struct volume *volume, uint64_t block)
{
	struct source source;

	if (fetch_of_block(volume, block))
		return false;
	source_find(volume, block, &source);
	return source.kind == SOURCE_MISS;
}

/* Everything up to target; false: nothing of it was missing. */
static bool run_ahead(struct volume *volume, struct stream *stream, uint64_t target)
{
	bool found = false;

	while (stream->ahead_block < target) {
		uint64_t first = stream->ahead_block;
		uint32_t count = 0;

		while (count < FETCH_BLOCKS_MAX && first + count < target &&
		       is_wanted(volume, first + count))
			count++;
		if (count && !fetch_ahead(volume, first, count))
			return true;
		found |= count != 0;
		stream->ahead_block += count ? count : 1;
	}
	return found;
}

void readahead_note(const struct read *read, bool missed)
{
	const struct request *request = read->request;
	struct volume *volume = read->volume;
	uint64_t first = request->offset_bytes / MP_BLOCK_BYTES, size, target;
	uint64_t end = (request->offset_bytes + request->length_bytes + MP_BLOCK_BYTES - 1) /
		       MP_BLOCK_BYTES;
	struct stream *stream;

	if (read->first_block + read->block_count != end)
		return; /* the last slice speaks for all */
	stream = stream_of(volume, first, end);
	if (!stream) {
		stream_begin(volume, end);
		return;
	}
	stream->touched = volume->counters.reads;
	if (end <= stream->next_block)
		return;
	stream->next_block = end;
	stream->requests++;
	stream->missing |= missed;
	if (stream->requests < READAHEAD_REQUESTS || !stream->missing || volume->failed ||
	    !store_link_is_up(&volume->engine->stores[volume->store]))
		return;
	if (stream->ahead_block < end)
		stream->ahead_block = end;
	if (stream->ahead_block - end > stream->window_blocks / 2)
		return;
	size = (volume->size_bytes + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES;
	target = end + stream->window_blocks < size ? end + stream->window_blocks : size;
	stream->missing = run_ahead(volume, stream, target);
	if (stream->window_blocks < READAHEAD_BLOCKS_MAX)
		stream->window_blocks *= 2;
}
