/* storesocket.c - fetch connections whose socket the core itself reads and writes.
 *
 * The daemon accepts and shakes hands, then hands the socket over: a READ passes through no other
 * thread of this process.
 *
 * Happy path: what a socket brought is cut into frames (storeconnection.c) and worked on in the
 * same turn; the replies of a turn leave in one send per connection, as far as the peer takes them.
 * Failure modes: bytes that are no READ: an ERROR frame behind what is ready to be sent, then the
 * end. The peer does not read its replies, or asks for too much at once: its socket is not read
 * until it has taken half of it, so that it costs bounded memory whatever it does. The peer is
 * gone: its number is listed by mp_store_ended, its accepted work goes on. The daemon hung up: the
 * socket closes with the next turn.
 */
#include "store_internal.h"

enum { FLUSH_IOVECS = 64, RECEIVES = 4, WORDS_BYTES_MAX = 4 << 20 };

static void watch(struct mp_store *store, struct store_socket *socket)
{
	const struct store_connection *connection = socket->connection;
	uint64_t pending = connection->pending_bytes, unsent = connection->out_bytes;
	uint32_t interest = 0;

	if (pending > STORE_FETCH_PENDING_HIGH || unsent > STORE_FETCH_UNSENT_HIGH)
		socket->behind = 1;
	else if (pending <= STORE_FETCH_PENDING_LOW && unsent <= STORE_FETCH_UNSENT_LOW)
		socket->behind = 0;
	if (!socket->behind && !connection->broken)
		interest |= MP_SOCKET_READ;
	if (connection->out)
		interest |= MP_SOCKET_WRITE;
	if (interest == socket->interest)
		return;
	socket->interest = interest;
	store->driver->watch(store->driver->self, socket->number, interest, socket);
}

/* Closed at the end of the turn: others on the stack may still look at it. */
static void end(struct store_socket *socket)
{
	socket->ended = 1;
	socket->store->sockets_changed = 1;
}

static void feed(struct store_socket *socket, const uint8_t *bytes, uint64_t length_bytes)
{
	struct mp_store *store = socket->store;

	if (store_connection_feed(store, socket->connection, bytes, length_bytes) < 0)
		store->sockets_changed = 1;
}

static void receive(struct store_socket *socket)
{
	struct mp_store *store = socket->store;
	struct mp_driver *driver = store->driver;

	for (int i = 0; i < RECEIVES && !socket->connection->broken; i++) {
		struct iovec iov = {store->receive, sizeof store->receive};
		int64_t got = driver->receive(driver->self, socket->number, &iov, 1);

		if (got == -EAGAIN)
			return;
		if (got <= 0) {
			end(socket);
			return;
		}
		feed(socket, store->receive, (uint64_t)got);
		/* The socket is empty: asking again would be a system call for nothing. */
		if ((uint64_t)got < sizeof store->receive)
			return;
		if (socket->connection->pending_bytes > STORE_FETCH_PENDING_HIGH)
			return;
	}
}

/* Send what waits, as much as the peer takes. */
static void flush(struct store_socket *socket)
{
	struct store_connection *connection = socket->connection;
	struct mp_driver *driver = socket->store->driver;

	while (connection->out && !socket->ended) {
		struct iovec iov[FLUSH_IOVECS];
		struct store_chunk *chunk = connection->out;
		int count = 0;
		int64_t sent;

		for (; chunk && count < FLUSH_IOVECS; chunk = chunk->next, count++) {
			iov[count].iov_base = chunk->bytes + chunk->taken_bytes;
			iov[count].iov_len = chunk->length_bytes - chunk->taken_bytes;
		}
		sent = driver->send(driver->self, socket->number, iov, count);
		if (sent == -EAGAIN)
			break;
		if (sent < 0) {
			end(socket);
			break;
		}
		store_connection_sent(socket->store, connection, (uint64_t)sent);
	}
	/* The last words are said. */
	if (connection->broken && !connection->out)
		end(socket);
}

void store_sockets_ready(void *owner, void *context, uint32_t ready)
{
	struct store_socket *socket = context;

	(void)owner;
	if (socket->ended)
		return;
	if (ready & MP_SOCKET_WRITE)
		flush(socket);
	if (!socket->ended && (ready & (MP_SOCKET_READ | MP_SOCKET_HANGUP)))
		receive(socket);
	/* Nobody is there any more to take an answer. */
	if (ready & MP_SOCKET_HANGUP)
		end(socket);
	socket->store->sockets_changed = 1;
}

static void adopt(struct mp_store *store, struct store_handover *handover)
{
	struct store_socket *socket = store_allocate(sizeof *socket);

	socket->store = store;
	socket->number = handover->socket;
	socket->connection = handover->connection;
	socket->next = store->sockets;
	store->sockets = socket;
	store_connection_push(store, socket->connection, handover->greeting);
	if (handover->gone)
		end(socket);
	feed(socket, handover->received, handover->received_bytes);
	free(handover);
}

static void forget(struct mp_store *store, struct store_socket *socket)
{
	store->driver->close_socket(store->driver->self, socket->number);
	store_connection_ended(store, socket->connection);
	free(socket);
}

/* Sockets that were handed over; then what a turn has to say to all of them. */
void store_sockets_adopt(struct mp_store *store)
{
	struct store_handover *handovers;

	pthread_mutex_lock(&store->mutex);
	handovers = store->handovers;
	store->handovers = NULL;
	for (struct store_handover *at = handovers; at; at = at->next)
		at->gone = at->connection->gone;
	for (struct store_socket *at = store->hung_up ? store->sockets : NULL; at; at = at->next)
		if (at->connection->gone)
			end(at);
	store->hung_up = 0;
	pthread_mutex_unlock(&store->mutex);
	while (handovers) {
		struct store_handover *next = handovers->next;
		adopt(store, handovers);
		handovers = next;
		store->sockets_changed = 1;
	}
}

void store_sockets_flush(struct mp_store *store)
{
	struct store_socket **at = &store->sockets;

	if (!store->sockets_changed)
		return;
	store->sockets_changed = 0;
	while (*at) {
		struct store_socket *socket = *at;

		flush(socket);
		if (socket->ended) {
			*at = socket->next;
			forget(store, socket);
			continue;
		}
		watch(store, socket);
		at = &socket->next;
	}
}

void store_sockets_free(struct mp_store *store)
{
	while (store->handovers) {
		struct store_handover *next = store->handovers->next;
		store->driver->close_socket(store->driver->self, store->handovers->socket);
		store_connection_ended(store, store->handovers->connection);
		free(store->handovers->greeting);
		free(store->handovers);
		store->handovers = next;
	}
	while (store->sockets) {
		struct store_socket *next = store->sockets->next;
		forget(store, store->sockets);
		store->sockets = next;
	}
}

int mp_store_connect(struct mp_store *store, uint64_t connection, int socket, const void *received,
		     uint64_t received_bytes, const void *greeting, uint64_t greeting_bytes)
{
	struct store_handover *handover = NULL;
	struct store_chunk *chunk = NULL;
	int stopping;

	if (received_bytes <= WORDS_BYTES_MAX && greeting_bytes <= WORDS_BYTES_MAX) {
		handover = calloc(1, sizeof *handover + received_bytes);
		chunk = calloc(1, sizeof *chunk + greeting_bytes);
	}
	if (!handover || !chunk) {
		free(handover);
		free(chunk);
		return -ENOMEM;
	}
	/* NULL with a length of 0 is welcome, but not to memcpy. */
	if (received_bytes)
		memcpy(handover->received, received, received_bytes);
	handover->received_bytes = received_bytes;
	if (greeting_bytes)
		memcpy(chunk->bytes, greeting, greeting_bytes);
	chunk->length_bytes = greeting_bytes;
	handover->greeting = chunk;
	handover->socket = socket;
	pthread_mutex_lock(&store->mutex);
	stopping = store->stopping;
	if (!stopping) {
		handover->connection = store_connection_get(store, connection);
		handover->connection->references++;
		handover->connection->by_socket = 1;
		handover->next = store->handovers;
		store->handovers = handover;
	}
	pthread_mutex_unlock(&store->mutex);
	if (stopping) {
		free(handover);
		free(chunk);
		return -ESHUTDOWN;
	}
	store->driver->wake(store->driver->self);
	return 0;
}
