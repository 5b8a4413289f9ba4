/* driver_front.c - a table in front of another driver that lets every call pass.
 *
 * Happy path: each call goes to the inner driver; what the core sets in our table (on_ready, owner,
 * poll_ns) is handed on before the call that needs it. Failure modes: none of its own.
 */
#include "driver_front.h"

#include <stdlib.h>

static uint64_t front_now_ns(void *self)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	return inner->now_ns(inner->self);
}

static void front_random_bytes(void *self, void *buffer, size_t length)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	inner->random_bytes(inner->self, buffer, length);
}

static void front_submit(void *self, struct mp_io *const *ios, uint32_t count)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	inner->submit(inner->self, ios, count);
}

static int64_t front_file_length_bytes(void *self, uint64_t file)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	return inner->file_length_bytes(inner->self, file);
}

static int64_t front_list_files(void *self, uint64_t *numbers, uint64_t capacity)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	return inner->list_files(inner->self, numbers, capacity);
}

static int64_t front_receive(void *self, int socket, struct iovec *iov, int count)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	return inner->receive(inner->self, socket, iov, count);
}

static int64_t front_send(void *self, int socket, const struct iovec *iov, int count)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	return inner->send(inner->self, socket, iov, count);
}

static int front_watch(void *self, int socket, uint32_t interest, void *context)
{
	struct front *front = self;

	front->inner->on_ready = front->table.on_ready;
	front->inner->owner = front->table.owner;
	return front->inner->watch(front->inner->self, socket, interest, context);
}

static uint32_t front_closed_by_peer(void *self, int socket)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	return inner->closed_by_peer(inner->self, socket);
}

static void front_release_socket(void *self, int socket)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	inner->release_socket(inner->self, socket);
}

static void front_close_socket(void *self, int socket)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	inner->close_socket(inner->self, socket);
}

int64_t front_wait(void *self, int64_t timeout_ns)
{
	struct front *front = self;

	front->inner->poll_ns = front->table.poll_ns;
	return front->inner->wait(front->inner->self, timeout_ns);
}

static void front_wake(void *self)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	inner->wake(inner->self);
}

static void front_notify(void *self)
{
	struct mp_driver *inner = ((struct front *)self)->inner;

	inner->notify(inner->self);
}

void front_destroy(void *self)
{
	struct front *front = self;

	mp_driver_destroy(front->inner);
	free(front);
}

void front_init(struct front *front, struct mp_driver *inner)
{
	front->inner = inner;
	front->table = (struct mp_driver){
		.self = front,
		.now_ns = front_now_ns,
		.random_bytes = front_random_bytes,
		.submit = front_submit,
		.file_length_bytes = front_file_length_bytes,
		.list_files = front_list_files,
		.receive = front_receive,
		.send = front_send,
		.watch = front_watch,
		.closed_by_peer = front_closed_by_peer,
		.close_socket = front_close_socket,
		.release_socket = front_release_socket,
		.wait = front_wait,
		.wake = front_wake,
		.notify = front_notify,
		.destroy = front_destroy,
	};
}
