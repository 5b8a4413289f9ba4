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

#include "driver_front.h"

struct slow {
	struct front front;
	uint32_t arms;
	_Atomic uint64_t latency_ns;
	uint64_t free_at_ns[MP_SLOW_ARMS_MAX];
	struct mp_io *first, **last;     /* waiting, by the time they are due: driver_private[0] */
};

static uint64_t now_ns(const struct slow *slow)
{
	return slow->front.inner->now_ns(slow->front.inner->self);
}

/* Each takes as long, and the arm that is free first: they are due in order of arrival. */
static void delay(struct slow *slow, struct mp_io *io)
{
	uint64_t time_ns = now_ns(slow);
	uint32_t i, arm = 0;

	for (i = 1; i < slow->arms; i++)
		if (slow->free_at_ns[i] < slow->free_at_ns[arm])
			arm = i;
	if (slow->free_at_ns[arm] < time_ns)
		slow->free_at_ns[arm] = time_ns;
	slow->free_at_ns[arm] += slow->latency_ns;
	io->driver_private[0] = slow->free_at_ns[arm];
	io->next = NULL;
	*slow->last = io;
	slow->last = &io->next;
}

static void slow_submit(void *self, struct mp_io *const *ios, uint32_t count)
{
	struct slow *slow = self;
	struct mp_driver *inner = slow->front.inner;
	uint32_t i;

	for (i = 0; i < count; i++)
		if (ios[i]->op == MP_OP_READ)
			delay(slow, ios[i]);
		else
			inner->submit(inner->self, &ios[i], 1);
}

/* Hand on what is due; ns until the next is, UINT64_MAX when none waits. */
static uint64_t pass_on(struct slow *slow)
{
	struct mp_driver *inner = slow->front.inner;

	while (slow->first) {
		struct mp_io *io = slow->first;
		uint64_t time_ns = now_ns(slow);

		if (io->driver_private[0] > time_ns)
			return io->driver_private[0] - time_ns;
		slow->first = io->next;
		if (!slow->first)
			slow->last = &slow->first;
		inner->submit(inner->self, &io, 1);
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
	rc = front_wait(self, timeout_ns);
	pass_on(slow);
	return rc;
}

static void slow_destroy(void *self)
{
	assert(!((struct slow *)self)->first);
	front_destroy(self);
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
	front_init(&slow->front, inner);
	slow->front.table.submit = slow_submit;
	slow->front.table.wait = slow_wait;
	slow->front.table.destroy = slow_destroy;
	slow->arms = arms;
	slow->latency_ns = latency_ns;
	slow->last = &slow->first;
	return &slow->front.table;
}
