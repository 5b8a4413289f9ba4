/* nbdleave.c - a connection that goes on in another process: given back between two requests.
 *
 * Happy path: mp_engine_leave -> no further request is begun, a WRITE whose payload is on its way
 * is received to its end, everything is answered -> MP_EVENT_CONNECTION_LEFT -> take_left gives the
 * socket and what was read from it behind the last request. The client notices a pause.
 * Failure modes: the client goes away meanwhile: MP_EVENT_CONNECTION_CLOSED as ever. A request
 * waits for a store that is away: the caller's patience ends, and mp_engine_disconnect ends the
 * connection; nothing was acknowledged that is not there.
 */
#include "nbd_internal.h"

void connection_leave(struct connection *connection)
{
	connection->leaving = true;
}

bool connection_may_leave(const struct connection *connection)
{
	return connection->leaving && !connection->stopping && !connection->broken &&
	       !connection->ended && !connection->disconnected && connection->inflight == 0 &&
	       connection->state == RECEIVE_HEADER;
}

bool connection_left(struct connection *connection)
{
	struct mp_engine *engine = connection->engine;
	uint32_t length = connection->receive_end - connection->receive_begin;
	struct left *left = malloc(sizeof *left + length);
	struct mp_event event;

	if (!left)
		return false;
	left->cookie = connection->cookie;
	left->socket = connection->socket;
	left->length_bytes = length;
	memcpy(left->bytes, connection->receive + connection->receive_begin, length);
	engine->driver->release_socket(engine->driver->self, connection->socket);
	pthread_mutex_lock(&engine->mutex);
	left->next = engine->left;
	engine->left = left;
	pthread_mutex_unlock(&engine->mutex);
	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_CONNECTION_LEFT;
	event.cookie = connection->cookie;
	event.bytes = length;
	memcpy(event.volume, connection->volume->id, sizeof event.volume);
	engine_event(engine, &event);
	return true;
}

int64_t mp_engine_take_left(struct mp_engine *engine, uint64_t cookie, int *socket, void *out,
			    uint64_t capacity_bytes)
{
	struct left **at, *left;
	int64_t length = -ENOENT;

	pthread_mutex_lock(&engine->mutex);
	for (at = &engine->left; *at && (*at)->cookie != cookie; at = &(*at)->next)
		;
	left = *at;
	if (left) {
		length = left->length_bytes <= capacity_bytes ? (int64_t)left->length_bytes
							      : -EMSGSIZE;
		if (length >= 0)
			*at = left->next;
	}
	pthread_mutex_unlock(&engine->mutex);
	if (length < 0)
		return length;
	*socket = left->socket;
	memcpy(out, left->bytes, left->length_bytes);
	free(left);
	return length;
}

void left_free(struct mp_engine *engine)
{
	while (engine->left) {
		struct left *left = engine->left;

		engine->left = left->next;
		engine->driver->close_socket(engine->driver->self, left->socket);
		free(left);
	}
}
