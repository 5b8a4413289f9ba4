/* mutations.c - writes, trims and zeroes on their way to the log: overlap, partial blocks,
 * acknowledgement.
 *
 * Happy path: arrive -> (no overlap with an unfinished one) -> checksums -> ready.
 * A mutation that touches a block of an unfinished one waits behind it, in order of arrival. Blocks
 * it covers only partly are completed from their base, read after that wait and before any log
 * space is taken.
 * Failure modes: base unreadable: the mutation fails with EIO, nothing was logged. Volume or engine
 * failed: EIO.
 */
#include "engine_internal.h"

struct mutation *mutation_new(struct volume *volume, enum mutation_kind kind, uint64_t first_byte,
			      uint64_t length_bytes)
{
	struct mutation *mutation = malloc(sizeof *mutation);
	uint64_t end = first_byte + length_bytes;

	if (!mutation)
		return NULL;
	memset(mutation, 0, offsetof(struct mutation, checksums));
	list_init(&mutation->in_volume);
	list_init(&mutation->in_queue);
	mutation->volume = volume;
	mutation->kind = kind;
	mutation->first_byte = first_byte;
	mutation->length_bytes = length_bytes;
	mutation->first_block = first_byte / MP_BLOCK_BYTES;
	mutation->block_count =
		(end + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES - mutation->first_block;
	if (kind != MUTATION_DATA)
		return mutation;
	assert(mutation->block_count <= SLICE_BLOCKS);
	mutation->buffer_bytes = mutation->block_count * MP_BLOCK_BYTES;
	mutation->buffer = volume_buffer(volume, mutation->buffer_bytes);
	if (!mutation->buffer) {
		free(mutation);
		return NULL;
	}
	return mutation;
}

void mutation_free(struct mutation *mutation)
{
	if (mutation->buffer)
		volume_buffer_put(mutation->volume, mutation->buffer, mutation->buffer_bytes);
	free(mutation);
}

static bool overlap(const struct mutation *a, const struct mutation *b)
{
	return a->first_block < b->first_block + b->block_count &&
	       b->first_block < a->first_block + a->block_count;
}

static bool is_blocked(const struct mutation *mutation)
{
	const struct link *link, *all = &mutation->volume->mutations;

	if (fault(mutation->volume->engine, MP_FAULT_NO_BLOCK_LOCK))
		return false;
	for (link = all->next; link != all && link != &mutation->in_volume; link = link->next) {
		const struct mutation *earlier = CONTAINER(link, struct mutation, in_volume);
		if (overlap(mutation, earlier) && !earlier->dropped)
			return true;
	}
	return false;
}

static void ready(struct mutation *mutation)
{
	uint32_t i;

	if (mutation->kind == MUTATION_DATA)
		for (i = 0; i < mutation->block_count; i++) {
			const uint8_t *block = mutation->buffer + (uint64_t)i * MP_BLOCK_BYTES;
			mutation->checksums[i] =
				mp_is_zero(block, MP_BLOCK_BYTES)
					? 0
					: mp_block_checksum(mutation->volume->seed,
							    mutation->first_block + i, block,
							    MP_BLOCK_BYTES);
		}
	mutation->state = MUTATION_READY;
	list_append(mutation->kind == MUTATION_DATA ? &mutation->volume->ready
						    : &mutation->volume->ready_ranges,
		    &mutation->in_queue);
}

static bool read_base(struct mutation *mutation, uint64_t block)
{
	struct read *read = read_new(mutation->volume, block, 1);

	if (!read)
		return false;
	read->mutation = mutation;
	mutation->bases_pending++;
	read_start(read);
	return true;
}

static void bases_ready(struct mutation *mutation)
{
	if (--mutation->bases_pending)
		return;
	if (mutation->error)
		mutation_failed(mutation, mutation->error);
	else
		ready(mutation);
}

static void proceed(struct mutation *mutation)
{
	uint64_t end = mutation->first_byte + mutation->length_bytes;
	uint64_t last_block = mutation->first_block + mutation->block_count - 1;
	bool head = mutation->first_byte % MP_BLOCK_BYTES != 0;
	bool tail = end % MP_BLOCK_BYTES != 0;
	bool ok = true;

	if (mutation->kind != MUTATION_DATA || (!head && !tail)) {
		ready(mutation);
		return;
	}
	mutation->state = MUTATION_BASE;
	mutation->bases_pending = 1;
	if (head || (tail && last_block == mutation->first_block))
		ok = read_base(mutation, mutation->first_block);
	if (ok && tail && last_block != mutation->first_block)
		ok = read_base(mutation, last_block);
	if (!ok)
		mutation->error = ENOMEM;
	bases_ready(mutation);
}

void mutation_base_done(struct mutation *mutation, struct read *read)
{
	uint64_t base = read->first_block * MP_BLOCK_BYTES;
	uint64_t end = mutation->first_byte + mutation->length_bytes;
	uint8_t *block = mutation->buffer + (base - mutation->first_block * MP_BLOCK_BYTES);

	if (read->error)
		mutation->error = read->error;
	else {
		if (mutation->first_byte > base)
			memcpy(block, read->buffer, mutation->first_byte - base);
		if (end < base + MP_BLOCK_BYTES)
			memcpy(block + (end - base), read->buffer + (end - base),
			       base + MP_BLOCK_BYTES - end);
	}
	bases_ready(mutation);
}

void mutation_arrive(struct mutation *mutation)
{
	struct volume *volume = mutation->volume;

	list_append(&volume->mutations, &mutation->in_volume);
	if (volume->failed || volume->engine->failed) {
		mutation_failed(mutation, EIO);
		return;
	}
	mutation->state = MUTATION_BLOCKED;
	if (!is_blocked(mutation))
		proceed(mutation);
}

/* Wake the first mutation that the end of another set free; each wake may change the list. */
static bool wake_one(struct volume *volume)
{
	struct link *link;

	for (link = volume->mutations.next; link != &volume->mutations; link = link->next) {
		struct mutation *mutation = CONTAINER(link, struct mutation, in_volume);
		if (mutation->state == MUTATION_BLOCKED && !is_blocked(mutation)) {
			mutation->state = MUTATION_BASE;
			/* Cut off: whom it waited for may not have happened, and it came after. */
			if (volume->failed || volume->engine->failed || volume->engine->cut_off)
				mutation_failed(mutation, EIO);
			else
				proceed(mutation);
			return true;
		}
	}
	return false;
}

/* Whom it wakes may end here too, when all fail: one loop, not a recursion as deep as the queue. */
static void wake(struct volume *volume)
{
	if (volume->waking)
		return;
	volume->waking = true;
	while (wake_one(volume))
		;
	volume->waking = false;
}

static bool leave(struct mutation *mutation)
{
	struct volume *volume = mutation->volume;
	struct link *link = mutation->in_volume.next;
	bool followed = link != &volume->mutations;

	list_remove(&mutation->in_volume);
	mutation->state = MUTATION_DONE;
	return followed;
}

static void acknowledge(struct mutation *mutation)
{
	struct request *request = mutation->request;

	mutation_free(mutation);
	if (request)
		request_slice_done(request);
}

static void finish(struct mutation *mutation)
{
	struct volume *volume = mutation->volume;
	bool followed = leave(mutation);

	if (mutation->buffer) {
		volume_buffer_put(volume, mutation->buffer, mutation->buffer_bytes);
		mutation->buffer = NULL;
	}
	if (!volume->dirty_recorded && !fault(volume->engine, MP_FAULT_ACK_BEFORE_DIRTY) &&
	    !mutation->error) {
		list_append(&volume->held, &mutation->in_queue);
		if (!volume->dirty_asked) {
			volume->dirty_asked = true;
			engine_volume_event(volume, MP_EVENT_NEED_DIRTY, 0, 0);
		}
	} else
		acknowledge(mutation);
	if (followed)
		wake(volume);
}

void mutation_applied(struct mutation *mutation)
{
	finish(mutation);
}

void mutation_failed(struct mutation *mutation, int error)
{
	list_remove(&mutation->in_queue);
	mutation->error = error;
	if (mutation->request && !mutation->request->error)
		mutation->request->error = error;
	finish(mutation);
}

/* One of them that can be dropped. */
static struct mutation *droppable(const struct connection *connection)
{
	struct link *link, *all = &connection->volume->mutations;

	for (link = all->next; link != all; link = link->next) {
		struct mutation *mutation = CONTAINER(link, struct mutation, in_volume);
		if (mutation->request && mutation->request->connection == connection &&
		    mutation->state < MUTATION_LOGGING && !mutation->dropped)
			return mutation;
	}
	return NULL;
}

void mutations_drop(const struct connection *connection)
{
	struct volume *volume = connection->volume;
	bool waking = volume->waking;
	struct mutation *mutation;

	volume->waking = true; /* not before all of them are out of the way */
	while ((mutation = droppable(connection))) {
		mutation->dropped = true;
		mutation->error = EIO;
		if (mutation->state != MUTATION_BASE)
			mutation_failed(mutation, EIO);
	}
	volume->waking = waking;
	wake(volume);
}

void mutations_unhold(struct volume *volume)
{
	while (!list_is_empty(&volume->held)) {
		struct mutation *mutation = CONTAINER(volume->held.next, struct mutation, in_queue);
		list_remove(&mutation->in_queue);
		if (volume->engine->failed && mutation->request)
			request_error(mutation->request, EIO);
		acknowledge(mutation);
	}
}
