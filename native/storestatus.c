/* storestatus.c - BLOCK_STATUS frames: which blocks of a range the map has, which are holes.
 *
 * Happy path: the map's leaves are walked in order, a hole is skipped as large as it is; the runs
 * found go out as one reply. Nothing else is read: a block that is mapped is data.
 * The walk may stop for a page and see a batch in part. That is no lie: each block was as it is
 * told at some moment after the question, and what is written after it may be told or not.
 * Failure modes: as READ's: a page that does not verify answers MP_STATUS_CORRUPT, a device error
 * MP_STATUS_IO. A long or ragged range is answered in part, at least by one run.
 */
#include "store_internal.h"

struct store_status {
	struct store_wait wait;
	struct store_status *next, *previous;
	struct store_request *request;
	struct mp_status_request wanted;
	struct mp_status_reply reply;
	uint64_t cursor, end;              /* blocks */
	uint32_t leaves_left, status;
	struct mp_status_run runs[MP_STATUS_RUNS_MAX];
};

static uint32_t admit(struct mp_store *store, struct store_status *status)
{
	const struct mp_status_request *wanted = &status->wanted;

	return store_query_admit(store,
				 &(struct store_query){wanted->volume, wanted->epoch,
						       wanted->minimum_sequence,
						       wanted->first_block, wanted->block_count},
				 &status->reply.lineage, &status->reply.sequence);
}

/* More blocks of one kind; 0: there is no room for another run. */
static int add(struct store_status *status, uint64_t blocks, uint32_t hole)
{
	uint32_t count = status->reply.run_count;

	if (count && status->runs[count - 1].hole == hole)
		status->runs[count - 1].block_count += blocks;
	else if (count == MP_STATUS_RUNS_MAX)
		return 0;
	else
		status->runs[status->reply.run_count++] =
			(struct mp_status_run){.block_count = blocks, .hole = hole};
	status->cursor += blocks;
	return 1;
}

/* Up to the end of one leaf, or of the hole where it would be. */
static int add_span(struct mp_store *store, struct store_status *status)
{
	struct store_volume *volume = store_volume_find(store, status->wanted.volume);
	const uint64_t *addresses;
	uint64_t span_end, mask = (1 << MP_MAP_LEAF_BITS) - 1;
	uint8_t *leaf;
	int error = store_tree_span(store, &volume->map, status->cursor, &leaf, &span_end);

	if (error)
		return error;
	if (span_end > status->end)
		span_end = status->end;
	status->leaves_left--;
	addresses = (const uint64_t *)(const void *)leaf;
	if (!leaf && !add(status, span_end - status->cursor, 1))
		status->end = status->cursor;
	while (leaf && status->cursor < span_end)
		if (!add(status, 1, addresses[status->cursor & mask] == 0)) {
			status->end = status->cursor;
			break;
		}
	return 0;
}

static void finish(struct mp_store *store, struct store_status *status)
{
	uint64_t runs_bytes, bytes;
	struct store_chunk *chunk;
	uint8_t *at;

	if (status->status != MP_STATUS_OK)
		status->reply.run_count = 0;
	runs_bytes = status->reply.run_count * sizeof status->runs[0];
	bytes = sizeof status->reply + runs_bytes;
	chunk = store_reply_start(status->request, bytes, bytes, status->status, &at);
	memcpy(at, &status->reply, sizeof status->reply);
	memcpy(at + sizeof status->reply, status->runs, runs_bytes);
	store_reply_finish(store, status->request, chunk);
	if (status->previous)
		status->previous->next = status->next;
	else
		store->statuses = status->next;
	if (status->next)
		status->next->previous = status->previous;
	store->statuses_in_flight--;
	free(status);
}

/* As far as pages allow; goes on when the missing one is there. */
static void advance(struct mp_store *store, struct store_wait *wait)
{
	struct store_status *status = (struct store_status *)(void *)wait;
	int error = 0;

	/* The volume may have gone, or moved on, while a page was read. */
	status->status = admit(store, status);
	while (!error && status->status == MP_STATUS_OK && status->cursor < status->end &&
	       status->leaves_left)
		error = add_span(store, status);
	if (error == -EAGAIN) {
		store_page_wait(store, &status->wait);
		return;
	}
	if (error)
		status->status = error == -EBADMSG ? MP_STATUS_CORRUPT : MP_STATUS_IO;
	finish(store, status);
}

static void begin(struct mp_store *store, struct store_request *request)
{
	struct store_status *status = store_allocate(sizeof *status);

	status->request = request;
	status->next = store->statuses;
	if (store->statuses)
		store->statuses->previous = status;
	store->statuses = status;
	store->statuses_in_flight++;
	if (request->frame.payload_bytes == sizeof status->wanted)
		memcpy(&status->wanted, request->buffer + MP_GROUP_HEADER_BYTES,
		       sizeof status->wanted);
	memcpy(status->reply.volume, status->wanted.volume, sizeof status->reply.volume);
	status->reply.first_block = status->cursor = status->wanted.first_block;
	status->end = status->cursor + status->wanted.block_count;
	status->leaves_left = STORE_STATUS_LEAVES;
	status->wait.ready = advance;
	advance(store, &status->wait);
}

void store_status_start(struct mp_store *store, struct store_request *request)
{
	store_queue_push(&store->statuses_waiting, request);
	store_statuses_advance(store);
}

void store_statuses_advance(struct mp_store *store)
{
	while (store->statuses_waiting.head &&
	       store->statuses_in_flight < STORE_STATUSES_IN_FLIGHT)
		begin(store, store_queue_pop(&store->statuses_waiting));
}

void store_statuses_free(struct mp_store *store)
{
	struct store_request *request;

	while (store->statuses) {
		struct store_status *status = store->statuses;

		store->statuses = status->next;
		store_request_free(store, status->request);
		free(status);
	}
	while ((request = store_queue_pop(&store->statuses_waiting)))
		store_request_free(store, request);
}
