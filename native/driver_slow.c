/* driver_slow.c - a disk that is slower than the one there is: a table in front of another.
 *
 * What a density benchmark needs from a store's disk: so many random reads per second, each of so
 * many milliseconds, and a queue that grows when more are asked for.
 * Happy path: a READ waits for the arm that is free first, then for its latency, and goes to the
 * real driver when that is over. Failure modes: none of its own.
 */
#include "driver_slow.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

struct slow {
	struct mp_driver table;
	struct mp_driver *inner;
	uint32_t arms;
	_Atomic uint64_t latency_ns;
	uint64_t free_at_ns[MP_SLOW_ARMS_MAX];
	struct mp_io *first, **last;     /* waiting, by the time they are due: driver_private[0] */
};

static uint64_t slow_now_ns(void *self)
{
	struct slow *slow = self;

	return slow->inner->now_ns(slow->inner->self);
}

static void slow_random_bytes(void *self, void *buffer, size_t length)
{
	struct slow *slow = self;

	slow->inner->random_bytes(slow->inner->self, buffer, length);
}

/* Each takes as long, and the arm that is free first: they are due in order of arrival. */
static void delay(struct slow *slow, struct mp_io *io)
{
	uint64_t now_ns = slow_now_ns(slow);
	uint32_t i, arm = 0;

	for (i = 1; i < slow->arms; i++)
		if (slow->free_at_ns[i] < slow->free_at_ns[arm])
			arm = i;
	if (slow->free_at_ns[arm] < now_ns)
		slow->free_at_ns[arm] = now_ns;
	slow->free_at_ns[arm] += slow->latency_ns;
	io->driver_private[0] = slow->free_at_ns[arm];
	io->next = NULL;
	*slow->last = io;
	slow->last = &io->next;
}

static void slow_submit(void *self, struct mp_io *const *ios, uint32_t count)
{
	struct slow *slow = self;
	uint32_t i;

	for (i = 0; i < count; i++)
		if (ios[i]->op == MP_OP_READ)
			delay(slow, ios[i]);
		else
			slow->inner->submit(slow->inner->self, &ios[i], 1);
}

static int64_t slow_file_length_bytes(void *self, uint64_t file)
{
	struct slow *slow = self;

	return slow->inner->file_length_bytes(slow->inner->self, file);
}

static int64_t slow_list_files(void *self, uint64_t *numbers, uint64_t capacity)
{
	struct slow *slow = self;

	return slow->inner->list_files(slow->inner->self, numbers, capacity);
}

static int64_t slow_receive(void *self, int socket, struct iovec *iov, int count)
{
	struct slow *slow = self;

	return slow->inner->receive(slow->inner->self, socket, iov, count);
}

static int64_t slow_send(void *self, int socket, const struct iovec *iov, int count)
{
	struct slow *slow = self;

	return slow->inner->send(slow->inner->self, socket, iov, count);
}

static int slow_watch(void *self, int socket, uint32_t interest, void *context)
{
	struct slow *slow = self;

	slow->inner->on_ready = slow->table.on_ready;
	slow->inner->owner = slow->table.owner;
	return slow->inner->watch(slow->inner->self, socket, interest, context);
}

static void slow_close_socket(void *self, int socket)
{
	struct slow *slow = self;

	slow->inner->close_socket(slow->inner->self, socket);
}

/* Hand on what is due; ns until the next is, UINT64_MAX when none waits. */
static uint64_t pass_on(struct slow *slow)
{
	while (slow->first) {
		struct mp_io *io = slow->first;
		uint64_t now_ns = slow_now_ns(slow);

		if (io->driver_private[0] > now_ns)
			return io->driver_private[0] - now_ns;
		slow->first = io->next;
		if (!slow->first)
			slow->last = &slow->first;
		slow->inner->submit(slow->inner->self, &io, 1);
	}
	return UINT64_MAX;
}

static int64_t slow_wait(void *self, int64_t timeout_ns)
{
	struct slow *slow = self;
	uint64_t left_ns = pass_on(slow);
	int64_t rc;

	if (left_ns != UINT64_MAX && (timeout_ns < 0 || (uint64_t)timeout_ns > left_ns))
		timeout_ns = (int64_t)left_ns;
	rc = slow->inner->wait(slow->inner->self, timeout_ns);
	pass_on(slow);
	return rc;
}

static void slow_wake(void *self)
{
	struct slow *slow = self;

	slow->inner->wake(slow->inner->self);
}

static void slow_notify(void *self)
{
	struct slow *slow = self;

	slow->inner->notify(slow->inner->self);
}

static void slow_destroy(void *self)
{
	struct slow *slow = self;

	assert(!slow->first);
	mp_driver_destroy(slow->inner);
	free(slow);
}

void mp_driver_slow_set(struct mp_driver *driver, uint64_t latency_ns)
{
	struct slow *slow = driver->self;

	slow->latency_ns = latency_ns;
}

struct mp_driver *mp_driver_slow(struct mp_driver *inner, uint32_t arms, uint64_t latency_ns)
{
	struct slow *slow;

	if (!arms || arms > MP_SLOW_ARMS_MAX) {
		errno = EINVAL;
		return NULL;
	}
	slow = calloc(1, sizeof *slow);
	if (!slow)
		return NULL;
	slow->inner = inner;
	slow->arms = arms;
	slow->latency_ns = latency_ns;
	slow->last = &slow->first;
	slow->table = (struct mp_driver){
		.self = slow,
		.now_ns = slow_now_ns,
		.random_bytes = slow_random_bytes,
		.submit = slow_submit,
		.file_length_bytes = slow_file_length_bytes,
		.list_files = slow_list_files,
		.receive = slow_receive,
		.send = slow_send,
		.watch = slow_watch,
		.close_socket = slow_close_socket,
		.wait = slow_wait,
		.wake = slow_wake,
		.notify = slow_notify,
		.destroy = slow_destroy,
	};
	return &slow->table;
}
