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
		struct status_run *last = &status->runs[status->run_count - 1];

		if (status->run_count && last->kind == kind) {
			last->block_count++;
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

/* The unknown: as the store says, data without its answer. */
static void answer_request(struct request *request)
{
	struct answer answer = {.request = request, .at_byte = request->offset_bytes};
	struct status *status = request->status;
	uint64_t block = status->first_block;
	uint32_t i;

	for (i = 0; i < status->run_count; i++) {
		block += status->runs[i].block_count;
		tell(&answer, block, status->runs[i].kind);
	}
	if (!answer.full)
		close_descriptor(&answer);
	assert(status->descriptor_count);
	request_slice_done(request);
}

void status_walked(struct request *request)
{
	if (request->error)
		request_slice_done(request);
	else
		answer_request(request);
}

void statuses_abandon(struct mp_engine *engine)
{
	(void)engine;
}
