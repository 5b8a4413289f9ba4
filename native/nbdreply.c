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

/* ---- finished requests ---- */

/* NBD's own error numbers; anything else that goes wrong inside is an I/O error to the guest. Never
 * ENOSPC for our reasons: it is set only for a request beyond the end. */
static uint32_t wire_error(int error)
{
	switch (error) {
	case 0:
	case EPERM:
	case EINVAL:
	case ENOSPC:
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
	connection->inflight--;
	connection->engine->counters.inflight_requests--;
	connection->engine->resume_wanted = true;
	free(request);
}

void request_finish(struct request *request)
{
	struct connection *connection = request->connection;
	uint32_t magic = htobe32(REPLY_MAGIC), error = htobe32(wire_error(request->error));

	if (connection->broken) {
		request_free(request);
		return;
	}
	memcpy(request->header, &magic, 4);
	memcpy(request->header + 4, &error, 4);
	memcpy(request->header + 8, &request->handle, 8);
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

static int gather(const struct connection *connection, struct iovec *iov)
{
	const struct link *link, *slice;
	int count = 0;

	for (link = connection->replies.next; link != &connection->replies; link = link->next) {
		struct request *request = CONTAINER(link, struct request, in_replies);
		uint64_t skip = request->offset_bytes % MP_BLOCK_BYTES;
		uint64_t left = request->error ? 0 : request->length_bytes;

		if (count + 1 > REPLY_IOVECS)
			break;
		iov[count].iov_base = request->header;
		iov[count++].iov_len = sizeof request->header;
		if (request->command != COMMAND_READ)
			continue;
		for (slice = request->reads.next; slice != &request->reads && left;
		     slice = slice->next) {
			struct read *read = CONTAINER(slice, struct read, in_request);
			uint64_t length = read->buffer_bytes - skip;

			if (count == REPLY_IOVECS)
				return count;
			iov[count].iov_base = read->buffer + skip;
			iov[count].iov_len = length < left ? length : left;
			left -= iov[count++].iov_len;
			skip = 0;
		}
	}
	return count;
}

static uint64_t reply_bytes(const struct request *request)
{
	bool data = request->command == COMMAND_READ && !request->error;

	return sizeof request->header + (data ? request->length_bytes : 0);
}

static void advance(struct connection *connection, uint64_t sent)
{
	connection->sent_bytes += sent;
	while (!list_is_empty(&connection->replies)) {
		struct request *request =
			CONTAINER(connection->replies.next, struct request, in_replies);
		uint64_t bytes = reply_bytes(request);

		if (connection->sent_bytes < bytes)
			return;
		connection->sent_bytes -= bytes;
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

/* Skip what was sent of the first iovecs already. */
static int trim_sent(struct iovec *iov, int count, uint64_t sent)
{
	int i, keep = 0;

	for (i = 0; i < count; i++) {
		if (sent >= iov[i].iov_len) {
			sent -= iov[i].iov_len;
			continue;
		}
		iov[keep].iov_base = (uint8_t *)iov[i].iov_base + sent;
		iov[keep++].iov_len = iov[i].iov_len - sent;
		sent = 0;
	}
	return keep;
}

static void send_replies(struct connection *connection)
{
	struct mp_engine *engine = connection->engine;
	struct iovec iov[REPLY_IOVECS];
	int64_t sent = 0;

	while (!list_is_empty(&connection->replies) && !connection->broken) {
		int count = trim_sent(iov, gather(connection, iov), connection->sent_bytes);

		/* more slices than iovecs, all of them sent: cannot be, one slice is one */
		if (count == 0) {
			connection_break(connection);
			break;
		}
		sent = engine->driver->send(engine->driver->self, connection->socket, iov, count);
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

static void connection_close(struct connection *connection)
{
	struct mp_engine *engine = connection->engine;

	assert(!connection->writing && !connection->slice);
	engine->driver->close_socket(engine->driver->self, connection->socket);
	engine_volume_event(connection->volume, MP_EVENT_CONNECTION_CLOSED,
			    connection->disconnected ? 1 : 0, connection->cookie);
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

void connections_flush(struct mp_engine *engine)
{
	struct link *link = engine->connections.next;

	while (link != &engine->connections) {
		struct connection *connection = CONTAINER(link, struct connection, in_engine);
		link = link->next;
		send_replies(connection);
		if (may_close(connection))
			connection_close(connection);
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
