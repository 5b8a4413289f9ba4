/* nbdfence.c - a client that comes again: what dead connections of its volume left behind.
 *
 * Whoever lost a connection, or died with it, looks at the disk when it comes again: it sends its
 * unanswered writes once more and then newer ones, or it is a guest that starts anew and reads its
 * journal. What came on the old connection may not happen behind its back. So before a new
 * connection is served:
 *   1. what lies unread in the sockets of dead ones is read while there is room, else dropped;
 *   2. their writes that are not in a log record yet are dropped: nobody was told of them;
 *   3. those in a record on its way to the device are waited for (connection_is_fenced).
 * A client that said goodbye (DISC) asked for all that it sent: nothing of that is dropped, all is
 * waited for.
 */
#include "nbd_internal.h"

enum { FENCE_RECEIVES = 64 }; /* turns: a socket's buffer is empty long before */

/* Input may lie in our own buffer behind a request that waits, where no hang-up is heard of: such a
 * socket is not watched. */
static void end_if_closed(struct connection *old)
{
	struct mp_driver *driver = old->engine->driver;
	uint32_t closed;
	int i;

	if (old->ended || old->broken)
		return;
	closed = driver->closed_by_peer(driver->self, old->socket);
	if (!closed)
		return;
	for (i = 0; !(closed & MP_SOCKET_HANGUP) && i < FENCE_RECEIVES; i++)
		if (connection_may_receive(old))
			connection_receive(old);
	if (old->ended)
		return;
	old->ended = true;
	old->receive_begin = old->receive_end = 0;
	old->state = RECEIVE_STOPPED;
	if (closed & MP_SOCKET_HANGUP)
		connection_break(old);
	connection_abandon_write(old);
}

void fence_volume(struct volume *volume)
{
	struct link *link, *all = &volume->engine->connections;

	for (link = all->next; link != all; link = link->next) {
		struct connection *old = CONTAINER(link, struct connection, in_engine);

		if (old->volume != volume)
			continue;
		end_if_closed(old);
		if (old->disconnected || !(old->ended || old->broken) ||
		    fault(volume->engine, MP_FAULT_NO_FENCE))
			continue;
		connection_break(old);
		mutations_drop(old);
	}
}

static bool is_over(const struct connection *connection)
{
	return connection->disconnected || connection->ended || connection->broken;
}

bool connection_is_fenced(const struct connection *connection)
{
	const struct link *link, *all = &connection->volume->mutations;

	if (fault(connection->engine, MP_FAULT_NO_FENCE))
		return false;
	for (link = all->next; link != all; link = link->next) {
		const struct mutation *mutation = CONTAINER(link, struct mutation, in_volume);
		const struct connection *of =
			mutation->request ? mutation->request->connection : NULL;

		if (of && of != connection && is_over(of) && !mutation->dropped)
			return true;
	}
	return false;
}
