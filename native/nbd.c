/* nbd.c - NBD transmission, the way in: receive, cut into requests and payloads, start them.
 *
 * Happy path: one receive brings many requests; headers are parsed in place, a WRITE's payload goes
 * into aligned block buffers (received straight into them when large), everything finished in a
 * turn leaves in one send. Every request is validated once (nbdrequest.c); below, the same facts
 * are asserted.
 *
 * Failure modes: a bad request is answered with the protocol's error and its payload is consumed,
 * so that the stream stays in step; a bad magic or an absurd WRITE ends the connection. A client
 * that does not read its replies, or asks for more than the buffers hold, stalls alone: its socket
 * is not read. End of stream: writes already read whole are finished, a partly received slice is
 * dropped. Full hang-up: unread input is dropped, so that a stale write cannot come after those of
 * a new connection.
 */
#include "nbd_internal.h"

#include <endian.h>

enum { BULK_BYTES = RECEIVE_BYTES, RECEIVES_PER_TURN = 16 };

/* ---- receiving ---- */

/* Guests share the buffers: a volume may hold as much as it leaves free, so one alone gets half,
 * and however many are stuck, there is something left for the next. What a slowed guest writes may
 * hold a quarter of that: it would only wait there. */
static bool is_fair(const struct connection *connection, uint64_t used, uint64_t bytes)
{
	const struct volume *volume = connection->volume;
	uint64_t part = connection->writing && share_is_slowed(volume) ? SLOWED_BUFFER_PARTS : 1;

	return volume->buffer_bytes * part + used + bytes <=
	       connection->engine->options.buffer_bytes;
}

/* Whatever stuck volumes and clients that do not read their replies hold, a connection that holds
 * nothing gets one slice out of the reserve, and a large request alone in the engine is always
 * served. */
static bool buffers_allow(const struct connection *connection, uint64_t bytes)
{
	const struct mp_engine *engine = connection->engine;
	uint64_t used = mp_buffers_used_bytes(engine->buffers);
	uint64_t own = connection->writing ? 1 : 0;
	bool holds_nothing = connection->inflight <= own &&
			     (!own || connection->writing->pending == 1);

	if (is_fair(connection, used, bytes))
		return connection->reading_bytes + bytes <= CONNECTION_BYTES_MAX;
	return holds_nothing &&
	       (engine->counters.inflight_requests <= own ||
		(bytes <= SLICE_BYTES + 2 * MP_BLOCK_BYTES &&
		 used + bytes <= engine->options.buffer_bytes + INTERNAL_BYTES / 2));
}

static void pause_reading(struct connection *connection)
{
	if (!connection->paused) {
		connection->paused = true;
		connection->engine->paused++;
	}
}

void connection_break(struct connection *connection)
{
	connection->broken = true;
	connection->state = RECEIVE_STOPPED;
	connection->receive_begin = connection->receive_end = 0;
}

/* A WRITE being received will never be whole: forget the slice; what was cut before goes its
 * way. No error is told: it is none of the disk's, and a guest that connects again sends it
 * again. */
void connection_abandon_write(struct connection *connection)
{
	struct request *request = connection->writing;

	if (connection->slice) {
		mutation_free(connection->slice);
		request->pending--;
		connection->slice = NULL;
	}
	connection->writing = NULL;
	if (request) {
		request->untold = true;
		request_error(request, EIO);
		request_slice_done(request);
	}
}

static void discard_payload(struct connection *connection, struct request *request, int error)
{
	connection->payload_left = request->length_bytes;
	connection->state = connection->payload_left ? RECEIVE_DISCARD : RECEIVE_HEADER;
	if (request->length_bytes > NBD_DISCARD_MAX) {
		connection->engine->counters.protocol_errors++;
		connection_break(connection);
	}
	request_error(request, error);
	request_finish(request);
}

static void refuse(struct connection *connection, struct request *request, int error)
{
	connection->engine->counters.refused_requests++;
	if (request->command == COMMAND_WRITE) {
		discard_payload(connection, request, error);
		return;
	}
	request_error(request, error);
	request_finish(request);
}

static void dispatch(struct connection *connection, struct request *request)
{
	int error = request_validate(request);

	if (request->command == COMMAND_DISC) {
		connection->disconnected = true;
		connection->state = RECEIVE_STOPPED;
		request_free(request);
		return;
	}
	if (error) {
		refuse(connection, request, error);
		return;
	}
	connection->bulk = request->command == COMMAND_WRITE &&
			   request->length_bytes >= BULK_BYTES;
	if (request->command != COMMAND_WRITE) {
		request_start(request);
		return;
	}
	connection->volume->counters.writes++;
	connection->engine->counters.written_bytes += request->length_bytes;
	connection->writing = request;
	connection->payload_left = request->length_bytes;
	connection->state = RECEIVE_PAYLOAD;
}

static bool parse_header(struct connection *connection)
{
	const uint8_t *header = connection->receive + connection->receive_begin;
	uint16_t command;
	uint32_t magic, length;
	struct request *request;

	if (connection->leaving ||
	    connection->receive_end - connection->receive_begin < REQUEST_BYTES)
		return false;
	memcpy(&magic, header, 4);
	memcpy(&command, header + 6, 2);
	memcpy(&length, header + 24, 4);
	if (be32toh(magic) != REQUEST_MAGIC) {
		connection->engine->counters.protocol_errors++;
		connection_break(connection);
		return false;
	}
	if (connection->inflight >= REQUESTS_MAX ||
	    (be16toh(command) == COMMAND_BLOCK_STATUS && connection->statuses >= STATUSES_MAX) ||
	    (be16toh(command) == COMMAND_READ && be32toh(length) <= NBD_PAYLOAD_MAX &&
	     !buffers_allow(connection, be32toh(length) + 2ULL * MP_BLOCK_BYTES))) {
		pause_reading(connection);
		return false;
	}
	request = request_new(connection, header);
	if (!request) {
		pause_reading(connection);
		return false;
	}
	connection->receive_begin += REQUEST_BYTES;
	dispatch(connection, request);
	return true;
}

/* The next slice of a WRITE ends where a slice-sized stretch of the volume ends. */
static bool next_slice(struct connection *connection)
{
	struct request *request = connection->writing;
	uint64_t at = request->offset_bytes + request->length_bytes - connection->payload_left;
	uint64_t length = SLICE_BYTES - at % MP_BLOCK_BYTES;

	if (length > connection->payload_left)
		length = connection->payload_left;
	if (buffers_allow(connection, length + 2ULL * MP_BLOCK_BYTES))
		connection->slice = request_mutation(request, MUTATION_DATA, at, length);
	connection->slice_received = 0;
	if (!connection->slice)
		pause_reading(connection);
	return connection->slice != NULL;
}

static void payload_arrived(struct connection *connection, uint64_t bytes)
{
	struct mutation *slice = connection->slice;

	connection->slice_received += bytes;
	connection->payload_left -= bytes;
	if (connection->slice_received < slice->length_bytes)
		return;
	connection->slice = NULL;
	mutation_arrive(slice);
}

static bool parse_payload(struct connection *connection)
{
	uint32_t available = connection->receive_end - connection->receive_begin;
	struct request *request = connection->writing;
	struct mutation *slice;
	uint64_t take;

	if (connection->payload_left == 0) {
		connection->writing = NULL;
		connection->state = RECEIVE_HEADER;
		request_slice_done(request);
		return true;
	}
	if (!connection->slice && !next_slice(connection))
		return false;
	if (available == 0)
		return false;
	slice = connection->slice;
	take = slice->length_bytes - connection->slice_received;
	take = take < available ? take : available;
	memcpy(slice->buffer + slice->first_byte % MP_BLOCK_BYTES + connection->slice_received,
	       connection->receive + connection->receive_begin, take);
	connection->receive_begin += (uint32_t)take;
	payload_arrived(connection, take);
	return true;
}

static bool parse_discard(struct connection *connection)
{
	uint32_t available = connection->receive_end - connection->receive_begin;
	uint32_t take = connection->payload_left < available ? (uint32_t)connection->payload_left
							     : available;

	connection->receive_begin += take;
	connection->payload_left -= take;
	if (connection->payload_left == 0)
		connection->state = RECEIVE_HEADER;
	return take > 0;
}

static void parse(struct connection *connection)
{
	bool more = true;

	while (more && !connection->paused && !connection->fenced)
		switch (connection->state) {
		case RECEIVE_HEADER:
			more = parse_header(connection);
			break;
		case RECEIVE_PAYLOAD:
			more = parse_payload(connection);
			break;
		case RECEIVE_DISCARD:
			more = parse_discard(connection);
			break;
		case RECEIVE_STOPPED:
			connection->receive_begin = connection->receive_end = 0;
			more = false;
			break;
		}
	if (connection->receive_begin == connection->receive_end)
		connection->receive_begin = connection->receive_end = 0;
	else if (connection->receive_begin > RECEIVE_BYTES / 2) {
		connection->receive_end -= connection->receive_begin;
		memmove(connection->receive, connection->receive + connection->receive_begin,
			connection->receive_end);
		connection->receive_begin = 0;
	}
}

/* How much may go to the receive buffer in one receive: behind a large WRITE comes its next slice
 * or probably another large WRITE, whose payload would be copied out of there. Then no more than a
 * header is taken, and the payload goes where it belongs. */
static uint64_t buffered_bytes(const struct connection *connection, uint64_t direct_bytes)
{
	uint64_t room = RECEIVE_BYTES - connection->receive_end;

	if (direct_bytes && direct_bytes < connection->payload_left)
		return 0;
	if (connection->bulk && connection->receive_begin == connection->receive_end &&
	    (direct_bytes || connection->state == RECEIVE_HEADER))
		return room < REQUEST_BYTES ? room : REQUEST_BYTES;
	return room;
}

/* The rest of a large slice is received in place; what comes behind it goes to the receive
 * buffer. */
static int64_t receive_some(struct connection *connection, uint64_t *asked_bytes)
{
	struct mp_engine *engine = connection->engine;
	struct iovec iov[2];
	int count = 0;
	uint64_t direct = 0;
	int64_t got;

	if (connection->slice && connection->receive_begin == connection->receive_end) {
		struct mutation *slice = connection->slice;
		direct = slice->length_bytes - connection->slice_received;
		iov[count].iov_base = slice->buffer + slice->first_byte % MP_BLOCK_BYTES +
				      connection->slice_received;
		iov[count++].iov_len = direct;
	}
	iov[count].iov_base = connection->receive + connection->receive_end;
	iov[count].iov_len = buffered_bytes(connection, direct);
	*asked_bytes = direct + iov[count].iov_len;
	if (iov[count].iov_len)
		count++;
	got = engine->driver->receive(engine->driver->self, connection->socket, iov, count);
	if (got <= 0)
		return got;
	if (direct) {
		uint64_t placed = (uint64_t)got < direct ? (uint64_t)got : direct;
		payload_arrived(connection, placed);
		connection->receive_end += (uint32_t)((uint64_t)got - placed);
	} else
		connection->receive_end += (uint32_t)got;
	return got;
}

bool connection_may_receive(const struct connection *connection)
{
	bool at_request = connection->state == RECEIVE_HEADER;

	return !connection->paused && !connection->fenced && !connection->ended &&
	       !connection->broken && connection->state != RECEIVE_STOPPED &&
	       !(connection->leaving && at_request);
}

void connection_receive(struct connection *connection)
{
	int i;

	for (i = 0; i < RECEIVES_PER_TURN && connection_may_receive(connection); i++) {
		uint64_t asked = 0;
		int64_t got = receive_some(connection, &asked);

		if (got == -EAGAIN)
			return;
		if (got > 0) {
			parse(connection);
			/* The socket is empty; if more came meanwhile, it is ready again. */
			if ((uint64_t)got < asked)
				return;
			continue;
		}
		connection->ended = true;
		connection->state = RECEIVE_STOPPED;
		if (got < 0)
			connection_break(connection);
		connection_abandon_write(connection);
	}
}

void connections_ready(void *owner, void *context, uint32_t ready)
{
	struct connection *connection = context;

	(void)owner;
	if ((ready & MP_SOCKET_HANGUP) && !connection->ended) {
		/* Both directions are gone: nothing can be answered, and unread writes must not be
		 * carried out later than those that the client may have sent again on a new
		 * connection. */
		connection->ended = true;
		connection_break(connection);
		connection_abandon_write(connection);
		return;
	}
	if (ready & MP_SOCKET_READ)
		connection_receive(connection);
}

/* ---- connections ---- */

void connection_unfence(struct connection *connection)
{
	if (!connection->fenced || connection_is_fenced(connection))
		return;
	connection->fenced = false;
	parse(connection);
}

void connections_resume(struct mp_engine *engine)
{
	struct link *link = engine->connections.next;

	engine->resume_wanted = false;
	if (!engine->paused)
		return;
	while (link != &engine->connections) {
		struct connection *connection = CONTAINER(link, struct connection, in_engine);
		link = link->next;
		if (!connection->paused || connection->broken)
			continue;
		connection->paused = false;
		engine->paused--;
		parse(connection);
		if (!connection->broken)
			connection_watch(connection, !list_is_empty(&connection->replies));
	}
}

void connection_stop(struct connection *connection)
{
	connection->stopping = true;
	connection->state = RECEIVE_STOPPED;
	connection_abandon_write(connection);
}

int connection_open(struct mp_engine *engine, struct volume *volume, const struct command *command)
{
	struct connection *connection = calloc(1, sizeof *connection);

	if (connection)
		connection->receive = malloc(RECEIVE_BYTES);
	if (!connection || !connection->receive || command->length_bytes > RECEIVE_BYTES) {
		if (connection)
			free(connection->receive);
		free(connection);
		return -ENOMEM;
	}
	connection->engine = engine;
	connection->volume = volume;
	connection->cookie = command->cookie;
	connection->socket = command->socket;
	connection->read_only = command->flag & MP_CONNECT_READ_ONLY;
	connection->structured = command->flag & MP_CONNECT_STRUCTURED;
	connection->allocation = connection->structured && command->flag & MP_CONNECT_ALLOCATION;
	list_init(&connection->in_engine);
	list_init(&connection->requests);
	list_init(&connection->replies);
	fence_volume(volume);
	list_append(&engine->connections, &connection->in_engine);
	engine->connection_count++;
	volume->connections++;
	memcpy(connection->receive, command->bytes, command->length_bytes);
	connection->receive_end = (uint32_t)command->length_bytes;
	connection->fenced = connection_is_fenced(connection);
	connection->interest = connection->fenced ? 0 : MP_SOCKET_READ;
	engine->driver->watch(engine->driver->self, connection->socket, connection->interest,
			      connection);
	parse(connection);
	return 0;
}
