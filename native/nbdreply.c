/* nbdreply.c - NBD transmission, the way back: finished requests, replies, closing.
 *
 * Happy path: everything that finished in a turn leaves in one send per connection, straight from
 * the buffers it was read into. A connection is closed when nothing more comes and all its requests
 * are answered.
 * Failure modes: a client that does not read: the rest waits, its socket is watched, nobody else is
 * held up. A failed send breaks the connection: its replies are dropped, accepted mutations finish.
 */
#include "nbd_internal.h"

#include <endian.h>

enum { SIMPLE_BYTES = 16, CHUNK_BYTES = 20 };
enum { CHUNK_NONE = 0, CHUNK_OFFSET_DATA = 1, CHUNK_OFFSET_HOLE = 2, CHUNK_BLOCK_STATUS = 5,
	CHUNK_ERROR = 32769 };

/* ---- finished requests ---- */

/* NBD's own error numbers; anything else that goes wrong inside is an I/O error to the guest. Never
 * ENOSPC for our reasons: it is set only for a request beyond the end; ENOTSUP only for
 * FAST_ZERO. */
static uint32_t wire_error(int error)
{
	switch (error) {
	case 0:
	case EPERM:
	case EINVAL:
	case ENOSPC:
	case ENOTSUP:
		return (uint32_t)error;
	default:
		return EIO;
	}
}

void request_free(struct request *request)
{
	struct connection *connection = request->connection;

	while (!list_is_empty(&request->reads)) {
		struct read *read = CONTAINER(request->reads.next, struct read, in_request);
		list_remove(&read->in_request);
		read->request = NULL;
		read_release(read);
	}
	if (request->reading)
		connection->reading_bytes -= request->length_bytes;
	list_remove(&request->in_connection);
	list_remove(&request->in_replies);
	list_remove(&request->in_walks);
	if (request->status)
		list_remove(&request->status->in_queue);
	free(request->status);
	connection->statuses -= request->command == COMMAND_BLOCK_STATUS;
	connection->inflight--;
	connection->engine->counters.inflight_requests--;
	connection->engine->resume_wanted = true;
	free(request);
}

static uint32_t put_chunk(uint8_t *out, const struct request *request, bool last, uint16_t type,
			  uint32_t length_bytes)
{
	uint32_t magic = htobe32(CHUNK_MAGIC), length = htobe32(length_bytes);
	uint16_t flags = htobe16(last), kind = htobe16(type);

	memcpy(out, &magic, 4);
	memcpy(out + 4, &flags, 2);
	memcpy(out + 6, &kind, 2);
	memcpy(out + 8, &request->handle, 8);
	memcpy(out + 16, &length, 4);
	return CHUNK_BYTES;
}

/* OFFSET_DATA or OFFSET_HOLE, at the read where it begins. */
static uint64_t put_read_chunk(struct read *read, const struct request *request, uint64_t at,
			       uint64_t length_bytes, bool last)
{
	uint64_t offset = htobe64(at);
	uint32_t hole = htobe32((uint32_t)length_bytes);

	if (read->hole)
		put_chunk(read->chunk, request, last, CHUNK_OFFSET_HOLE, 12);
	else
		put_chunk(read->chunk, request, last, CHUNK_OFFSET_DATA,
			  8 + (uint32_t)length_bytes);
	memcpy(read->chunk + CHUNK_BYTES, &offset, 8);
	memcpy(read->chunk + CHUNK_BYTES + 8, &hole, 4); /* a hole's; else not sent */
	read->chunk_bytes = read->hole ? CHUNK_BYTES + 12 : CHUNK_BYTES + 8;
	return read->chunk_bytes + (read->hole ? 0 : length_bytes);
}

/* A structured READ: neighbours of one kind are one chunk, so DF (no holes) makes a single one. All
 * data is here and no error can follow: the last chunk is DONE. */
static void frame_read(struct request *request)
{
	uint64_t at = request->offset_bytes, end = at + request->length_bytes, begin = at;
	struct read *head = NULL;
	struct link *link;

	for (link = request->reads.next; link != &request->reads; link = link->next) {
		struct read *read = CONTAINER(link, struct read, in_request);

		if (head && head->hole != read->hole) {
			request->reply_bytes +=
				put_read_chunk(head, request, begin, at - begin, false);
			head = NULL;
		}
		if (!head) {
			head = read;
			begin = at;
		}
		at = (read->first_block + read->block_count) * MP_BLOCK_BYTES;
		at = at < end ? at : end;
	}
	if (head)
		request->reply_bytes += put_read_chunk(head, request, begin, at - begin, true);
}

static void frame_structured(struct request *request)
{
	uint32_t error = htobe32(wire_error(request->error)), context = htobe32(ALLOCATION_CONTEXT);
	uint32_t bytes = 0;

	if (request->error) {
		put_chunk(request->header, request, true, CHUNK_ERROR, 6);
		memcpy(request->header + CHUNK_BYTES, &error, 4);
		memset(request->header + CHUNK_BYTES + 4, 0, 2); /* no message */
		request->header_bytes = CHUNK_BYTES + 6;
	} else if (request->command == COMMAND_BLOCK_STATUS) {
		bytes = request->status->descriptor_count * 8;
		put_chunk(request->header, request, true, CHUNK_BLOCK_STATUS, 4 + bytes);
		memcpy(request->header + CHUNK_BYTES, &context, 4);
		request->header_bytes = CHUNK_BYTES + 4;
	} else if (request->length_bytes == 0)
		request->header_bytes =
			put_chunk(request->header, request, true, CHUNK_NONE, 0);
	request->reply_bytes = request->header_bytes + bytes;
	if (request->command == COMMAND_READ && !request->error)
		frame_read(request);
}

/* Commands without data in their answer may keep simple replies, and do: they are shorter. */
static bool is_structured(const struct request *request)
{
	return request->connection->structured &&
	       (request->command == COMMAND_READ || request->command == COMMAND_BLOCK_STATUS);
}

void request_finish(struct request *request)
{
	struct connection *connection = request->connection;
	uint32_t magic = htobe32(REPLY_MAGIC), error = htobe32(wire_error(request->error));
	bool data = request->command == COMMAND_READ && !request->error;

	if (connection->broken || request->untold) {
		request_free(request);
		return;
	}
	if (is_structured(request))
		frame_structured(request);
	else {
		memcpy(request->header, &magic, 4);
		memcpy(request->header + 4, &error, 4);
		memcpy(request->header + 8, &request->handle, 8);
		request->header_bytes = SIMPLE_BYTES;
		request->reply_bytes = SIMPLE_BYTES + (data ? request->length_bytes : 0);
	}
	list_append(&connection->replies, &request->in_replies);
}

void request_slice_done(struct request *request)
{
	assert(request->pending);
	if (--request->pending)
		return;
	if (request->command != COMMAND_READ && (request->flags & FLAG_FUA) && !request->error)
		log_wait_for_sync(request->connection->volume, request);
	else
		request_finish(request);
}

void request_error(struct request *request, int error)
{
	if (!request->error)
		request->error = error;
}

/* ---- sending ---- */

/* What one send carries; the bytes of the first reply that were sent already are left out. */
struct gathering { struct iovec iov[REPLY_IOVECS]; int count; uint64_t skip; };

static bool gather(struct gathering *out, const void *bytes, uint64_t length_bytes)
{
	if (out->skip >= length_bytes) {
		out->skip -= length_bytes;
		return true;
	}
	if (out->count == REPLY_IOVECS)
		return false;
	out->iov[out->count].iov_base = (uint8_t *)(uintptr_t)bytes + out->skip;
	out->iov[out->count++].iov_len = length_bytes - out->skip;
	out->skip = 0;
	return true;
}

static bool gather_reads(struct gathering *out, const struct request *request)
{
	uint64_t skip = request->offset_bytes % MP_BLOCK_BYTES, left = request->length_bytes;
	const struct link *link;

	for (link = request->reads.next; link != &request->reads && left; link = link->next) {
		const struct read *read = CONTAINER(link, struct read, in_request);
		uint64_t length = read->buffer_bytes - skip;

		length = length < left ? length : left;
		if (!gather(out, read->chunk, read->chunk_bytes) ||
		    (!read->hole && !gather(out, read->buffer + skip, length)))
			return false;
		left -= length;
		skip = 0;
	}
	return true;
}

static void gather_replies(const struct connection *connection, struct gathering *out)
{
	const struct link *link;

	out->count = 0;
	out->skip = connection->sent_bytes;
	for (link = connection->replies.next; link != &connection->replies; link = link->next) {
		const struct request *request = CONTAINER(link, struct request, in_replies);

		if (!gather(out, request->header, request->header_bytes))
			return;
		if (request->error)
			continue;
		if (request->command == COMMAND_READ && !gather_reads(out, request))
			return;
		if (request->command == COMMAND_BLOCK_STATUS &&
		    !gather(out, request->status->descriptors,
			    request->status->descriptor_count * 8ULL))
			return;
	}
}

static void advance(struct connection *connection, uint64_t sent)
{
	connection->sent_bytes += sent;
	while (!list_is_empty(&connection->replies)) {
		struct request *request =
			CONTAINER(connection->replies.next, struct request, in_replies);
		if (connection->sent_bytes < request->reply_bytes)
			return;
		connection->sent_bytes -= request->reply_bytes;
		request_free(request);
	}
}

void connection_watch(struct connection *connection, bool write)
{
	struct mp_engine *engine = connection->engine;
	uint32_t interest = (connection_may_receive(connection) ? MP_SOCKET_READ : 0U) |
			    (write ? MP_SOCKET_WRITE : 0U);

	if (interest == connection->interest)
		return;
	connection->interest = interest;
	engine->driver->watch(engine->driver->self, connection->socket, interest, connection);
}

static void send_replies(struct connection *connection)
{
	struct mp_engine *engine = connection->engine;
	struct gathering out;
	int64_t sent = 0;

	while (!list_is_empty(&connection->replies) && !connection->broken) {
		gather_replies(connection, &out);
		assert(out.count);
		sent = engine->driver->send(engine->driver->self, connection->socket, out.iov,
					    out.count);
		if (sent == -EAGAIN)
			break;
		if (sent < 0) {
			connection_break(connection);
			connection_abandon_write(connection);
			break;
		}
		advance(connection, (uint64_t)sent);
	}
	while (connection->broken && !list_is_empty(&connection->replies))
		request_free(CONTAINER(connection->replies.next, struct request, in_replies));
	/* Broken too: a hang-up that is still watched is reported for ever. */
	connection_watch(connection, sent == -EAGAIN && !connection->broken);
}

static bool may_close(const struct connection *connection)
{
	bool no_more = connection->disconnected || connection->ended || connection->broken ||
		       connection->stopping;

	return no_more && connection->inflight == 0;
}

static void connection_free(struct connection *connection)
{
	struct mp_engine *engine = connection->engine;

	assert(!connection->writing && !connection->slice);
	connection->volume->connections--;
	/* A guest went away: a good time to save what its reads brought in, while that is cheap. */
	engine->checkpoint.wanted |=
		engine->checkpoint.slot_changes > 0 &&
		engine->super.checkpoint_length_bytes <= CHECKPOINT_CHEAP_BYTES;
	engine->connection_count--;
	engine->paused -= connection->paused;
	list_remove(&connection->in_engine);
	free(connection->receive);
	free(connection);
}

static void connection_close(struct connection *connection)
{
	struct mp_engine *engine = connection->engine;

	engine->driver->close_socket(engine->driver->self, connection->socket);
	engine_volume_event(connection->volume, MP_EVENT_CONNECTION_CLOSED,
			    connection->disconnected ? 1 : 0, connection->cookie);
	connection_free(connection);
}

void connections_flush(struct mp_engine *engine)
{
	struct link *link = engine->connections.next;

	while (link != &engine->connections) {
		struct connection *connection = CONTAINER(link, struct connection, in_engine);
		link = link->next;
		connection_unfence(connection);
		send_replies(connection);
		if (may_close(connection))
			connection_close(connection);
		else if (connection_may_leave(connection) && connection_left(connection))
			connection_free(connection);
	}
}

static void request_forget(struct request *request)
{
	while (!list_is_empty(&request->reads)) {
		struct read *read = CONTAINER(request->reads.next, struct read, in_request);
		list_remove(&read->in_request);
		free(read);
	}
	list_remove(&request->in_connection);
	free(request->status);
	free(request);
}

/* The engine goes away under its connections: only in a simulated crash. */
void connections_free(struct mp_engine *engine)
{
	while (!list_is_empty(&engine->connections)) {
		struct connection *connection =
			CONTAINER(engine->connections.next, struct connection, in_engine);

		while (!list_is_empty(&connection->requests))
			request_forget(CONTAINER(connection->requests.next, struct request,
						 in_connection));
		free(connection->slice);
		list_remove(&connection->in_engine);
		free(connection->receive);
		free(connection);
	}
}
