/* driver_sim_socket.c - sockets of the simulated world: two queues of bytes each.
 *
 * Happy path: the test pushes and pops, the core receives and sends; on_ready is level-
 * triggered, as epoll.
 * Failure modes: -EAGAIN with nothing to read or no room under the test's limit; after the
 * peer's hangup what it sent can still be read, then the end of the stream, and a send is
 * -EPIPE; after the core's close (or its death) the test can pop what was sent, then -EPIPE.
 * With reorder, bytes arrive in pieces.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "driver_sim_private.h"

enum { FIRST_SOCKET = 1 << 20 };     /* a number that no real descriptor has */

static struct mp_sim_socket *find(struct mp_sim *sim, int socket)
{
	assert(socket >= FIRST_SOCKET && (uint64_t)(socket - FIRST_SOCKET) < sim->socket_count);
	return &sim->sockets[socket - FIRST_SOCKET];
}

static struct mp_sim_socket *find_open(struct mp_sim *sim, int socket)
{
	struct mp_sim_socket *found = find(sim, socket);
	assert(!found->closed); /* a use after close would hit a stranger's connection */
	return found;
}

static uint64_t used(const struct mp_sim_bytes *bytes)
{
	return bytes->end - bytes->first;
}

static void append(struct mp_sim_bytes *bytes, const void *data, uint64_t length_bytes)
{
	if (bytes->first > 0) {
		memmove(bytes->data, bytes->data + bytes->first, used(bytes));
		bytes->end -= bytes->first;
		bytes->first = 0;
	}
	if (length_bytes == 0)
		return;
	bytes->data = mp_sim_grow(bytes->data, &bytes->capacity_bytes, bytes->end + length_bytes,
				  1);
	memcpy(bytes->data + bytes->end, data, length_bytes);
	bytes->end += length_bytes;
}

static uint64_t take(struct mp_sim_bytes *bytes, void *out, uint64_t capacity_bytes)
{
	uint64_t length_bytes = used(bytes) < capacity_bytes ? used(bytes) : capacity_bytes;

	if (length_bytes > 0)
		memcpy(out, bytes->data + bytes->first, length_bytes);
	bytes->first += length_bytes;
	return length_bytes;
}

/* A stream may come in any pieces: now and then only a part of what is there. */
static uint64_t piece(struct mp_sim *sim, uint64_t length_bytes)
{
	if (!sim->options.reorder || length_bytes < 2 || mp_sim_random_below(&sim->schedule, 4))
		return length_bytes;
	return 1 + mp_sim_random_below(&sim->schedule, length_bytes);
}

int64_t mp_sim_receive(void *self, int socket, struct iovec *iov, int count)
{
	struct mp_sim *sim = self;
	struct mp_sim_socket *from = find_open(sim, socket);
	uint64_t left = 0, got = 0;

	if (from->dead)
		return -ESHUTDOWN;
	if (used(&from->to_core) == 0)
		return from->hung_up ? 0 : -EAGAIN;
	for (int i = 0; i < count; i++)
		left += iov[i].iov_len;
	left = piece(sim, left < used(&from->to_core) ? left : used(&from->to_core));
	for (int i = 0; i < count && left > 0; i++) {
		uint64_t want = iov[i].iov_len < left ? iov[i].iov_len : left;
		uint64_t taken = take(&from->to_core, iov[i].iov_base, want);
		assert(taken == want);
		got += taken;
		left -= taken;
	}
	return (int64_t)got;
}

int64_t mp_sim_send(void *self, int socket, const struct iovec *iov, int count)
{
	struct mp_sim *sim = self;
	struct mp_sim_socket *to = find_open(sim, socket);
	uint64_t unread = used(&to->from_core), sent = 0;

	if (to->dead)
		return -ESHUTDOWN;
	if (to->hung_up)
		return -EPIPE;
	if (unread >= to->limit_bytes)
		return -EAGAIN;
	uint64_t room = piece(sim, to->limit_bytes - unread);
	for (int i = 0; i < count && room > 0; i++) {
		uint64_t length_bytes = iov[i].iov_len < room ? iov[i].iov_len : room;
		append(&to->from_core, iov[i].iov_base, length_bytes);
		sent += length_bytes;
		room -= length_bytes;
	}
	return (int64_t)sent;
}

int mp_sim_watch(void *self, int socket, uint32_t interest, void *context)
{
	struct mp_sim_socket *watched = find_open(self, socket);

	assert((interest & ~(uint32_t)(MP_SOCKET_READ | MP_SOCKET_WRITE)) == 0);
	if (watched->dead)
		return -ESHUTDOWN;
	watched->interest = interest;
	watched->context = context;
	return 0;
}

uint32_t mp_sim_closed_by_peer(void *self, int socket)
{
	return find_open(self, socket)->hung_up ? MP_SOCKET_READ | MP_SOCKET_HANGUP : 0;
}

void mp_sim_release_socket(void *self, int socket)
{
	find_open(self, socket)->interest = 0;
}

void mp_sim_close_socket(void *self, int socket)
{
	struct mp_sim_socket *closing = find_open(self, socket);

	closing->closed = true;
	closing->interest = 0;
	closing->to_core.first = closing->to_core.end;
}

static uint32_t readiness(const struct mp_sim_socket *socket)
{
	uint32_t ready = 0;

	if (socket->closed || socket->dead || socket->interest == 0)
		return 0;
	if (used(&socket->to_core) > 0 || socket->hung_up)
		ready |= MP_SOCKET_READ;
	if (used(&socket->from_core) < socket->limit_bytes || socket->hung_up)
		ready |= MP_SOCKET_WRITE;
	ready &= socket->interest;
	return socket->hung_up ? ready | MP_SOCKET_HANGUP : ready;
}

int64_t mp_sim_sockets_run(struct mp_sim *sim)
{
	uint64_t count = sim->socket_count, start = 0;
	int64_t handled = 0;

	if (count > 0 && sim->options.reorder)
		start = mp_sim_random_below(&sim->schedule, count);
	for (uint64_t i = 0; i < count && !sim->crashed; i++) {
		/* Asked in its turn: an earlier one may have closed or narrowed it. */
		const struct mp_sim_socket *socket = &sim->sockets[(start + i) % count];
		uint32_t ready = readiness(socket);
		if (!ready)
			continue;
		sim->driver->on_ready(sim->driver->owner, socket->context, ready);
		handled++;
	}
	return handled;
}

void mp_sim_sockets_kill(struct mp_sim *sim)
{
	for (uint64_t i = 0; i < sim->socket_count; i++) {
		sim->sockets[i].dead = true;
	}
}

void mp_sim_sockets_free(struct mp_sim *sim)
{
	for (uint64_t i = 0; i < sim->socket_count; i++) {
		free(sim->sockets[i].to_core.data);
		free(sim->sockets[i].from_core.data);
	}
	free(sim->sockets);
}

int mp_sim_socket(struct mp_sim *sim)
{
	uint64_t number = sim->socket_count++;

	assert(number < INT32_MAX - FIRST_SOCKET);
	sim->sockets = realloc(sim->sockets, sim->socket_count * sizeof *sim->sockets);
	assert(sim->sockets);
	sim->sockets[number] = (struct mp_sim_socket){.limit_bytes = UINT64_MAX};
	return FIRST_SOCKET + (int)number;
}

int64_t mp_sim_socket_push(struct mp_sim *sim, int socket, const void *bytes, uint64_t length)
{
	struct mp_sim_socket *to = find(sim, socket);

	if (to->closed || to->dead || to->hung_up)
		return -EPIPE;
	append(&to->to_core, bytes, length);
	return (int64_t)length;
}

int64_t mp_sim_socket_pop(struct mp_sim *sim, int socket, void *out, uint64_t capacity)
{
	struct mp_sim_socket *from = find(sim, socket);

	if (used(&from->from_core) == 0)
		return from->closed || from->dead ? -EPIPE : 0;
	return (int64_t)take(&from->from_core, out, capacity);
}

uint64_t mp_sim_socket_take_back(struct mp_sim *sim, int socket, void *out, uint64_t capacity)
{
	return take(&find(sim, socket)->to_core, out, capacity);
}

void mp_sim_socket_limit(struct mp_sim *sim, int socket, uint64_t bytes)
{
	find(sim, socket)->limit_bytes = bytes;
}

void mp_sim_socket_hangup(struct mp_sim *sim, int socket)
{
	find(sim, socket)->hung_up = true;
}
