/* nbdwalk.c - CACHE and BLOCK_STATUS: requests that go through a range as long as a disk, in steps.
 *
 * Happy path: each turn looks up at most WALK_STEPS blocks for all of them, in rotation. CACHE asks
 * the store for what is missing, slice by slice and few at a time, and offers it to the slots as
 * a read does; the guest's reads go before it. It is offered, not forced: a client that prefetches
 * a whole disk must not flush the pond. What BLOCK_STATUS finds, nbdstatus.c answers.
 * Failure modes: CACHE is advice. Without the store, without memory, or while too many fills are
 * under way it does less, and succeeds; only a failed volume is an error. A connection that ends
 * ends its walks.
 */
#include "nbd_internal.h"

void walk_start(struct request *request)
{
	request->cursor = request->offset_bytes / MP_BLOCK_BYTES;
	list_append(&request->connection->engine->walks, &request->in_walks);
}

static uint64_t end_block(const struct request *request)
{
	return (request->offset_bytes + request->length_bytes + MP_BLOCK_BYTES - 1) /
	       MP_BLOCK_BYTES;
}

static bool is_missing(const struct request *request, uint64_t block)
{
	struct source source;

	source_find(request->connection->volume, block, &source);
	return source.kind == SOURCE_MISS;
}

/* Fetch the missing blocks from the cursor on, up to a slice. */
static void prefetch(struct request *request, uint64_t end)
{
	struct volume *volume = request->connection->volume;
	struct read *read;
	uint32_t count = 1;

	while (count < SLICE_BLOCKS && request->cursor + count < end &&
	       is_missing(request, request->cursor + count))
		count++;
	read = read_new(volume, request->cursor, count);
	request->cursor += count;
	if (!read)
		return;
	read->prefetch = true;
	read->request = request;
	request->pending++;
	volume->engine->prefetches++;
	list_append(&request->reads, &read->in_request);
	read_start(read);
}

void prefetch_done(struct read *read)
{
	struct request *request = read->request;

	read->volume->engine->prefetches--;
	list_remove(&read->in_request);
	read->request = NULL;
	read_release(read);
	request_slice_done(request);
}

static bool may_prefetch(const struct mp_engine *engine)
{
	return engine->prefetches < PREFETCHES_MAX && engine->fills_inflight < FILLS_MAX / 2;
}

/* true: at the end of its range. */
static bool cache_walk(struct request *request, uint32_t *steps)
{
	struct mp_engine *engine = request->connection->engine;
	const struct store_link *store = &engine->stores[request->connection->volume->store];
	uint64_t end = end_block(request);

	if (request->connection->volume->failed)
		request_error(request, EIO);
	if (request->error || !store_link_is_up(store))
		return true;
	while (request->cursor < end && *steps) {
		--*steps;
		if (!is_missing(request, request->cursor))
			request->cursor++;
		else if (may_prefetch(engine))
			prefetch(request, end);
		else
			return false;
	}
	return request->cursor >= end;
}

static bool is_over(const struct connection *connection)
{
	return connection->broken || connection->stopping;
}

static bool walk(struct request *request, uint32_t *steps)
{
	if (request->command == COMMAND_CACHE)
		return is_over(request->connection) || cache_walk(request, steps);
	if (is_over(request->connection)) {
		request->untold = true;
		request_error(request, EIO);
	}
	return request->error || status_walk(request, steps);
}

void walks_step(struct mp_engine *engine)
{
	uint32_t steps = WALK_STEPS, count = 0;
	struct link *link;

	engine->walks_pending = false;
	if (list_is_empty(&engine->walks))
		return;
	for (link = engine->walks.next; link != &engine->walks; link = link->next)
		count++;
	/* A CACHE that waits for its slices leaves its steps to the others. */
	while (count-- && steps) {
		struct request *request =
			CONTAINER(engine->walks.next, struct request, in_walks);

		list_remove(&request->in_walks);
		if (!walk(request, &steps))
			list_append(&engine->walks, &request->in_walks);
		else if (request->command == COMMAND_CACHE)
			request_slice_done(request);
		else
			status_walked(request);
	}
	engine->walks_pending = steps == 0 && !list_is_empty(&engine->walks);
}
