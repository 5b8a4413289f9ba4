/* nbdstatus.c - BLOCK_STATUS: what of a range is data, what reads as zeroes.
 *
 * Happy path: the walk (nbdwalk.c) asks log index and tombstones block by block: written here, or
 * zeroed here. What neither knows has been destaged, or was never written: only the store can tell,
 * and "not in the cache" is no hole. One question for the whole range goes out, its answer is laid
 * under what is known here, and both become one chunk of descriptors.
 * First here, then the store: a block that was in the log when it was looked up is answered from
 * there; any other was at the store by then, whose answer comes later.
 * A long range is answered in part (the protocol allows it): STATUS_BLOCKS_MAX, STATUS_RUNS_MAX.
 * Failure modes: the store is away, does not know the question, refuses it, or answers nonsense:
 * the unknown is reported as data, which is always a safe answer.
 */
#include "nbd_internal.h"

#include <endian.h>

_Static_assert(READ_FRAME_BYTES == MP_FRAME_HEADER_BYTES + sizeof(struct mp_status_request),
	       "both questions are of one size");

static enum run_kind kind_of(struct volume *volume, uint64_t block)
{
	struct source source;

	source_find(volume, block, &source);
	if (source.kind == SOURCE_ZERO)
		return RUN_ZERO;
	return source.kind == SOURCE_LOG || source.kind == SOURCE_SLOT ? RUN_DATA : RUN_UNKNOWN;
}

static uint64_t end_block(const struct request *request)
{
	uint64_t end = (request->offset_bytes + request->length_bytes + MP_BLOCK_BYTES - 1) /
		       MP_BLOCK_BYTES;
	uint64_t first = request->offset_bytes / MP_BLOCK_BYTES;

	return end - first > STATUS_BLOCKS_MAX ? first + STATUS_BLOCKS_MAX : end;
}

bool status_walk(struct request *request, uint32_t *steps)
{
	struct volume *volume = request->connection->volume;
	struct status *status = request->status;
	uint64_t end = end_block(request);
	uint32_t runs_max = request->flags & FLAG_REQ_ONE ? 1 : STATUS_RUNS_MAX;

	if (!status) {
		status = request->status = malloc(sizeof *status);
		if (!status) {
			request_error(request, EIO);
			return true;
		}
		memset(status, 0, offsetof(struct status, runs));
		list_init(&status->in_queue);
		status->request = request;
		status->first_block = request->cursor;
	}
	for (; request->cursor < end && *steps; --*steps, request->cursor++) {
		enum run_kind kind = kind_of(volume, request->cursor);
		uint32_t count = status->run_count;

		if (count && status->runs[count - 1].kind == kind) {
			status->runs[count - 1].block_count++;
			continue;
		}
		if (status->run_count == runs_max)
			return true;
		status->runs[status->run_count++] = (struct status_run){1, kind};
	}
	return request->cursor == end;
}

/* Descriptors, merged, in the range that was asked for. */
struct answer {
	struct request *request;
	uint64_t at_byte, open_bytes;
	uint32_t open_flags;
	bool full;
};

static void close_descriptor(struct answer *answer)
{
	struct status *status = answer->request->status;
	uint32_t *out = &status->descriptors[2 * status->descriptor_count];

	if (!answer->open_bytes)
		return;
	out[0] = htobe32((uint32_t)answer->open_bytes);
	out[1] = htobe32(answer->open_flags);
	status->descriptor_count++;
	answer->open_bytes = 0;
	answer->full = status->descriptor_count == STATUS_RUNS_MAX ||
		       answer->request->flags & FLAG_REQ_ONE;
}

/* Blocks from at_byte on to the end of end_block are all of one kind. */
static void tell(struct answer *answer, uint64_t end_block_number, enum run_kind kind)
{
	const struct request *request = answer->request;
	uint32_t flags = kind == RUN_ZERO ? ALLOCATION_HOLE | ALLOCATION_ZERO : 0;
	uint64_t end = request->offset_bytes + request->length_bytes;

	if (end_block_number * MP_BLOCK_BYTES < end)
		end = end_block_number * MP_BLOCK_BYTES;
	if (answer->open_bytes && answer->open_flags != flags)
		close_descriptor(answer);
	if (answer->full || end <= answer->at_byte)
		return;
	answer->open_flags = flags;
	answer->open_bytes += end - answer->at_byte;
	answer->at_byte = end;
}

/* What the store says of blocks from asked_first on; count 0: nothing. */
struct told { const uint8_t *runs; uint32_t count; };

/* An unknown run [block, end): as the store says, as far as it says; all of it is data when it says
 * nothing. false: the answer ends here. */
static bool tell_unknown(struct answer *answer, const struct told *told, uint64_t block,
			 uint64_t end)
{
	uint64_t at = answer->request->status->asked_first;
	uint32_t i;

	if (!told->count) {
		tell(answer, end, RUN_DATA);
		return true;
	}
	for (i = 0; i < told->count && at < end; i++) {
		struct mp_status_run run;

		memcpy(&run, told->runs + i * sizeof run, sizeof run);
		at += run.block_count;
		if (at > block)
			tell(answer, at < end ? at : end, run.hole ? RUN_ZERO : RUN_DATA);
	}
	return at >= end;
}

static void answer_request(struct request *request, const struct told *told)
{
	struct answer answer = {.request = request, .at_byte = request->offset_bytes};
	struct status *status = request->status;
	uint64_t block = status->first_block, end;
	bool on = true;
	uint32_t i;

	list_remove(&status->in_queue);
	for (i = 0; i < status->run_count && on; i++, block = end) {
		end = block + status->runs[i].block_count;
		if (status->runs[i].kind == RUN_UNKNOWN)
			on = tell_unknown(&answer, told, block, end);
		else
			tell(&answer, end, status->runs[i].kind);
	}
	if (!answer.full)
		close_descriptor(&answer);
	assert(status->descriptor_count);
	request_slice_done(request);
}

/* ---- the store ---- */

static void ask(struct request *request, struct store_link *store)
{
	list_append(&store->statuses_waiting, &request->status->in_queue);
	store->engine->fetches_wait = true;
}

void status_frame(struct store_link *store, uint8_t *out)
{
	struct status *status = CONTAINER(store->statuses_waiting.next, struct status, in_queue);
	const struct volume *volume = status->request->connection->volume;
	struct { struct mp_frame frame; struct mp_status_request request; } wire;

	memset(&wire, 0, sizeof wire);
	status->request_id = ++store->engine->next_request_id;
	wire.frame.type = MP_FRAME_BLOCK_STATUS;
	wire.frame.payload_bytes = wire.frame.checked_bytes = sizeof wire.request;
	wire.frame.request_id = status->request_id;
	memcpy(wire.request.volume, volume->id, sizeof wire.request.volume);
	wire.request.epoch = volume->epoch;
	wire.request.minimum_sequence = volume->destaged_sequence;
	wire.request.first_block = status->asked_first;
	wire.request.block_count = status->asked_end - status->asked_first;
	mp_frame_seal(&wire.frame);
	memcpy(out, &wire, READ_FRAME_BYTES);
	list_remove(&status->in_queue);
	list_append(&store->statuses, &status->in_queue);
}

void status_walked(struct request *request)
{
	struct volume *volume = request->connection->volume;
	struct store_link *store = &volume->engine->stores[volume->store];
	struct status *status = request->status;
	struct told nothing = {0};
	uint64_t block;
	uint32_t i;

	if (request->error) {
		request_slice_done(request);
		return;
	}
	block = status->first_block;
	for (i = 0; i < status->run_count; i++) {
		if (status->runs[i].kind == RUN_UNKNOWN) {
			status->asked_first = status->asked_end ? status->asked_first : block;
			status->asked_end = block + status->runs[i].block_count;
		}
		block += status->runs[i].block_count;
	}
	if (status->asked_end && store_link_is_up(store) && store->block_status)
		ask(request, store);
	else
		answer_request(request, &nothing);
}

/* 0, or -EPROTO. */
static int check_reply(const struct status *status, const struct mp_frame *frame,
		       const uint8_t *payload, struct told *told)
{
	struct mp_status_reply reply;
	uint64_t left = status->asked_end - status->asked_first;
	uint32_t i;

	if (frame->payload_bytes < sizeof reply)
		return -EPROTO;
	memcpy(&reply, payload, sizeof reply);
	if (reply.run_count == 0 || reply.run_count > MP_STATUS_RUNS_MAX || reply.reserved ||
	    frame->payload_bytes !=
		    sizeof reply + reply.run_count * sizeof(struct mp_status_run) ||
	    reply.first_block != status->asked_first ||
	    memcmp(reply.volume, status->request->connection->volume->id, sizeof reply.volume) != 0)
		return -EPROTO;
	told->runs = payload + sizeof reply;
	told->count = reply.run_count;
	for (i = 0; i < told->count; i++) {
		struct mp_status_run run;

		memcpy(&run, told->runs + i * sizeof run, sizeof run);
		if (run.block_count == 0 || run.block_count > left || run.hole > 1 || run.reserved)
			return -EPROTO;
		left -= run.block_count;
	}
	return 0;
}

int status_reply(struct store_link *store, const struct mp_frame *frame, const uint8_t *payload)
{
	struct link *each;
	struct told told = {0};

	for (each = store->statuses.next; each != &store->statuses; each = each->next) {
		struct status *status = CONTAINER(each, struct status, in_queue);

		if (status->request_id != frame->request_id)
			continue;
		/* Why it refuses is for READ to find out: this question is a service only. */
		if (!frame->status && check_reply(status, frame, payload, &told))
			return -EPROTO;
		answer_request(status->request, &told);
		return 0;
	}
	return 0; /* given up on an earlier link */
}

void statuses_abandon(struct store_link *store)
{
	struct link *lists[] = {&store->statuses, &store->statuses_waiting};
	struct told nothing = {0};
	uint32_t i;

	for (i = 0; i < 2; i++)
		while (!list_is_empty(lists[i])) {
			struct status *status = CONTAINER(lists[i]->next, struct status, in_queue);
			answer_request(status->request, &nothing);
		}
}
