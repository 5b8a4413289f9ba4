/* nbdrequest.c - NBD transmission: what each request asks for, checked once, cut into slices,
 * started.
 *
 * Happy path: validate -> start: a READ becomes reads of at most SLICE_BLOCKS blocks, TRIM and
 * WRITE_ZEROES one range and its edges, FLUSH waits for a sync, CACHE and BLOCK_STATUS
 * walk. A WRITE is cut as its payload arrives (nbd.c).
 * Failure modes: a request that must not be carried out has the protocol's error from validate and
 * is answered at once; without memory it ends with EIO.
 */
#include "nbd_internal.h"

#include <endian.h>

struct request *request_new(struct connection *connection, const uint8_t *header)
{
	struct request *request = calloc(1, sizeof *request);
	uint16_t half;
	uint32_t word;
	uint64_t giant;

	if (!request)
		return NULL;
	request->connection = connection;
	list_init(&request->in_connection);
	list_init(&request->reads);
	list_init(&request->in_sync);
	list_init(&request->in_replies);
	list_init(&request->in_walks);
	memcpy(&half, header + 4, 2);
	request->flags = be16toh(half);
	memcpy(&half, header + 6, 2);
	request->command = be16toh(half);
	memcpy(&request->handle, header + 8, 8);
	memcpy(&giant, header + 16, 8);
	request->offset_bytes = be64toh(giant);
	memcpy(&word, header + 24, 4);
	request->length_bytes = be32toh(word);
	request->pending = 1; /* ours, until all slices are started */
	list_append(&connection->requests, &request->in_connection);
	connection->inflight++;
	connection->statuses += request->command == COMMAND_BLOCK_STATUS;
	connection->engine->counters.requests++;
	connection->engine->counters.inflight_requests++;
	return request;
}

static bool is_mutation(uint16_t command)
{
	return command == COMMAND_WRITE || command == COMMAND_TRIM ||
	       command == COMMAND_WRITE_ZEROES;
}

/* Whole blocks become a range, whatever their count: that is fast. A piece of a block is read and
 * written like any other write. */
static bool covers_whole_block(const struct request *request)
{
	uint64_t end = request->offset_bytes + request->length_bytes;

	if (end == request->connection->volume->size_bytes)
		end += MP_BLOCK_BYTES - 1; /* nothing lies behind the end */
	return (request->offset_bytes + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES < end / MP_BLOCK_BYTES;
}

int request_validate(const struct request *request)
{
	const struct connection *connection = request->connection;
	uint64_t size = connection->volume->size_bytes;
	uint16_t allowed = FLAG_FUA;
	bool beyond = request->offset_bytes > size ||
		      request->length_bytes > size - request->offset_bytes;

	if (request->command == COMMAND_WRITE_ZEROES)
		allowed |= FLAG_NO_HOLE | FLAG_FAST_ZERO;
	if (request->command == COMMAND_READ && connection->structured)
		allowed |= FLAG_DF;
	if (request->command == COMMAND_BLOCK_STATUS)
		allowed |= FLAG_REQ_ONE;
	if (request->flags & ~allowed || request->command > COMMAND_BLOCK_STATUS)
		return EINVAL;
	/* Of nothing there is no extent, and an answer must have one. */
	if (request->command == COMMAND_BLOCK_STATUS &&
	    (!connection->allocation || request->length_bytes == 0))
		return EINVAL;
	if (is_mutation(request->command) && connection->read_only)
		return EPERM;
	if (request->command == COMMAND_FLUSH)
		return 0;
	if ((request->command == COMMAND_READ || request->command == COMMAND_WRITE) &&
	    request->length_bytes > NBD_PAYLOAD_MAX)
		return EINVAL;
	if (beyond)
		return request->command == COMMAND_WRITE ||
				       request->command == COMMAND_WRITE_ZEROES
			       ? ENOSPC
			       : EINVAL;
	if (request->flags & FLAG_FAST_ZERO && request->length_bytes &&
	    !covers_whole_block(request))
		return ENOTSUP;
	return 0;
}

static void start_read(struct request *request)
{
	struct volume *volume = request->connection->volume;
	uint64_t first = request->offset_bytes / MP_BLOCK_BYTES;
	uint64_t end = (request->offset_bytes + request->length_bytes + MP_BLOCK_BYTES - 1) /
		       MP_BLOCK_BYTES;

	volume->counters.reads++;
	request->reading = true;
	request->connection->reading_bytes += request->length_bytes;
	volume->engine->counters.read_bytes += request->length_bytes;
	while (request->length_bytes && first < end) {
		uint32_t count = end - first > SLICE_BLOCKS ? SLICE_BLOCKS
							    : (uint32_t)(end - first);
		struct read *read = read_new(volume, first, count);

		if (!read) {
			request_error(request, EIO);
			break;
		}
		read->request = request;
		read->may_be_hole = request->connection->structured &&
				    !(request->flags & FLAG_DF);
		request->pending++;
		list_append(&request->reads, &read->in_request);
		read_start(read);
		first += count;
	}
	request_slice_done(request);
}

struct mutation *request_mutation(struct request *request, enum mutation_kind kind,
				  uint64_t first_byte, uint64_t length_bytes)
{
	struct volume *volume = request->connection->volume;
	struct mutation *mutation = mutation_new(volume, kind, first_byte, length_bytes);

	if (!mutation)
		return NULL;
	mutation->request = request;
	request->pending++;
	return mutation;
}

static bool zero_edge(struct request *request, uint64_t first_byte, uint64_t length_bytes)
{
	struct mutation *mutation =
		request_mutation(request, MUTATION_DATA, first_byte, length_bytes);

	if (!mutation)
		return false;
	memset(mutation->buffer, 0, mutation->buffer_bytes);
	mutation_arrive(mutation);
	return true;
}

/* TRIM and WRITE_ZEROES: the edges that cover a block partly are written, whole blocks become one
 * range. */
static void start_range(struct request *request)
{
	uint64_t at = request->offset_bytes, end = at + request->length_bytes;
	uint64_t first = (at + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	uint64_t last = end / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	struct volume *volume = request->connection->volume;
	bool ok = true, trim = request->command == COMMAND_TRIM;

	if (end == volume->size_bytes && end % MP_BLOCK_BYTES)
		/* nothing lies behind the end */
		last = (end / MP_BLOCK_BYTES + 1) * MP_BLOCK_BYTES;
	if (trim)
		volume->counters.trims++;
	else
		volume->counters.zeroes++;
	if (request->length_bytes && last < first)
		ok = zero_edge(request, at, end - at);
	else if (request->length_bytes) {
		if (at < first)
			ok = zero_edge(request, at, first - at);
		if (ok && first < last) {
			struct mutation *middle =
				request_mutation(request, trim ? MUTATION_TRIM : MUTATION_ZERO,
						 first, last - first);
			ok = middle != NULL;
			if (middle)
				mutation_arrive(middle);
		}
		if (ok && last < end)
			ok = zero_edge(request, last, end - last);
	}
	if (!ok)
		request_error(request, EIO);
	request_slice_done(request);
}

static void start_flush(struct request *request)
{
	struct volume *volume = request->connection->volume;

	volume->counters.flushes++;
	volume->engine->counters.flushes++;
	if (volume->failed)
		request_error(request, EIO);
	if (request->error)
		request_finish(request);
	else
		log_wait_for_sync(volume, request);
}

void request_start(struct request *request)
{
	switch (request->command) {
	case COMMAND_READ:
		start_read(request);
		break;
	case COMMAND_FLUSH:
		start_flush(request);
		break;
	case COMMAND_CACHE:
	case COMMAND_BLOCK_STATUS:
		walk_start(request);
		break;
	default:
		start_range(request);
	}
}
