/* driver_failing.c - a disk that fails when it is told to: a table in front of another.
 *
 * As unkind as a real one. A READ that fails has read nothing. Of the WRITEs that fail every other
 * one is on the disk nevertheless. After a SYNC that fails, what it should have made durable can
 * still be read, as from a page cache that has marked it clean, and is gone (zeroes) when the next
 * SYNC of that file succeeds: whoever takes that one for a repetition has lost it.
 *
 * Happy path: an operation that no rule meets passes; WRITEs are remembered until a SYNC covers
 * them. Failure modes: those that it was told. Without memory: assert, it is for tests.
 */
#include "driver_failing.h"

#include <assert.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "driver_front.h"
#include "format.h"

/* A WRITE that is complete, and by when. */
struct place {
	uint64_t file, offset_bytes, length_bytes, number;
};

struct places {
	struct place *items;
	uint32_t count, capacity;
};

struct failing {
	struct front front;
	pthread_mutex_t mutex;           /* rule, met, failed: set and asked from any thread */
	struct mp_failing_rule rule;
	uint64_t met, failed;
	struct mp_io *first, **last;     /* failed; told in the next wait */
	struct places unsynced;          /* complete, and covered by no SYNC yet */
	struct places doubtful;          /* covered by a SYNC that failed */
	uint64_t writes;                 /* completed ones, numbered */
};

/* What is put into an operation on its way to the inner driver, and taken out again. */
struct passing {
	struct failing *failing;
	struct mp_io *io;
	void (*done)(struct mp_io *io);
	void *context;
	uint64_t covers;                 /* SYNC: WRITEs up to this number */
	uint32_t losses;                 /* SYNC: zeroes under way, and itself */
	uint32_t error;                  /* WRITE: carried out, and told as failed */
};

/* Zeroes over a place in doubt. */
struct loss {
	struct mp_io io;
	struct iovec iov;
	struct passing *sync;
};

static void *allocate(size_t bytes)
{
	void *memory = aligned_alloc(MP_BLOCK_BYTES, (bytes + MP_BLOCK_BYTES - 1) /
							     MP_BLOCK_BYTES * MP_BLOCK_BYTES);

	assert(memory);
	memset(memory, 0, bytes);
	return memory;
}

static void push(struct places *places, const struct place *place)
{
	if (places->count == places->capacity) {
		places->capacity = places->capacity * 2 + 64;
		places->items = realloc(places->items, places->capacity * sizeof *places->items);
		assert(places->items);
	}
	places->items[places->count++] = *place;
}

/* Take the places of a file out that a SYNC covers; to: where they go, NULL: nowhere. */
static void take(struct places *from, uint64_t file, uint64_t covers, struct places *to)
{
	uint32_t kept = 0, i;

	for (i = 0; i < from->count; i++) {
		struct place *place = &from->items[i];

		if (place->file != file || place->number > covers)
			from->items[kept++] = *place;
		else if (to)
			push(to, place);
	}
	from->count = kept;
}

/* What is written again is in doubt no more. */
static void forget(struct places *places, const struct mp_io *io)
{
	uint32_t kept = 0, i;

	for (i = 0; i < places->count; i++) {
		struct place *place = &places->items[i];

		if (place->file != io->file ||
		    place->offset_bytes >= io->offset_bytes + io->length_bytes ||
		    io->offset_bytes >= place->offset_bytes + place->length_bytes)
			places->items[kept++] = *place;
	}
	places->count = kept;
}

/* The error that this operation meets, 0: none; reaches: it is carried out nevertheless. */
static uint32_t meets(struct failing *failing, const struct mp_io *io, bool *reaches)
{
	const struct mp_failing_rule *rule = &failing->rule;
	uint32_t error = 0;

	*reaches = true;

	pthread_mutex_lock(&failing->mutex);
	if (io->op == rule->op && io->op &&
	    (io->op == MP_OP_SYNC ||
	     (io->offset_bytes >= rule->first_byte && io->offset_bytes < rule->end_byte))) {
		uint64_t number = failing->met++;

		if (number >= rule->skip && number - rule->skip < rule->count) {
			error = rule->error;
			*reaches = io->op == MP_OP_WRITE && failing->failed % 2;
			failing->failed++;
		}
	}
	pthread_mutex_unlock(&failing->mutex);
	return error;
}

static void tell_later(struct failing *failing, struct mp_io *io, uint32_t error)
{
	io->result = -(int64_t)error;
	io->next = NULL;
	*failing->last = io;
	failing->last = &io->next;
}

static void finish(struct passing *passing)
{
	struct mp_io *io = passing->io;

	io->done = passing->done;
	io->context = passing->context;
	free(passing);
	io->done(io);
}

static void write_passed(struct mp_io *io)
{
	struct passing *passing = io->context;
	struct failing *failing = passing->failing;

	if (io->result >= 0)
		push(&failing->unsynced, &(struct place){io->file, io->offset_bytes,
							 io->length_bytes, ++failing->writes});
	if (passing->error)
		io->result = -(int64_t)passing->error;
	finish(passing);
}

static void sync_step(struct passing *passing)
{
	if (--passing->losses)
		return;
	if (passing->io->result >= 0)
		take(&passing->failing->unsynced, passing->io->file, passing->covers, NULL);
	finish(passing);
}

static void sync_passed(struct mp_io *io)
{
	sync_step(io->context);
}

static void lost(struct mp_io *io)
{
	struct loss *loss = io->context;
	struct passing *sync = loss->sync;

	free(loss->iov.iov_base);
	free(loss);
	sync_step(sync);
}

static void lose(struct passing *sync, const struct place *place)
{
	struct mp_driver *inner = sync->failing->front.inner;
	struct loss *loss = allocate(sizeof *loss);
	struct mp_io *io = &loss->io;

	loss->sync = sync;
	loss->iov.iov_base = allocate(place->length_bytes);
	loss->iov.iov_len = place->length_bytes;
	io->op = MP_OP_WRITE;
	io->file = place->file;
	io->offset_bytes = place->offset_bytes;
	io->length_bytes = place->length_bytes;
	io->iov = &loss->iov;
	io->iov_count = 1;
	io->done = lost;
	io->context = loss;
	sync->losses++;
	inner->submit(inner->self, &io, 1);
}

static struct passing *follow(struct failing *failing, struct mp_io *io,
			      void (*done)(struct mp_io *io))
{
	struct passing *passing = allocate(sizeof *passing);

	passing->failing = failing;
	passing->io = io;
	passing->done = io->done;
	passing->context = io->context;
	io->done = done;
	io->context = passing;
	return passing;
}

/* A SYNC that will succeed, as far as anybody can see. */
static void pass_sync(struct failing *failing, struct mp_io *io)
{
	struct passing *passing = follow(failing, io, sync_passed);
	struct places gone = {0};
	uint32_t i;

	passing->covers = failing->writes;
	passing->losses = 1;
	take(&failing->doubtful, io->file, UINT64_MAX, &gone);
	for (i = 0; i < gone.count; i++)
		lose(passing, &gone.items[i]);
	free(gone.items);
	failing->front.inner->submit(failing->front.inner->self, &io, 1);
}

static void submit_one(struct failing *failing, struct mp_io *io)
{
	struct mp_driver *inner = failing->front.inner;
	bool reaches;
	uint32_t error = meets(failing, io, &reaches);

	if (!reaches) {
		if (io->op == MP_OP_SYNC)
			take(&failing->unsynced, io->file, failing->writes, &failing->doubtful);
		tell_later(failing, io, error);
	} else if (io->op == MP_OP_SYNC) {
		pass_sync(failing, io);
	} else {
		if (io->op == MP_OP_WRITE) {
			forget(&failing->doubtful, io);
			follow(failing, io, write_passed)->error = error;
		}
		inner->submit(inner->self, &io, 1);
	}
}

static void failing_submit(void *self, struct mp_io *const *ios, uint32_t count)
{
	uint32_t i;

	for (i = 0; i < count; i++)
		submit_one(self, ios[i]);
}

static int64_t failing_wait(void *self, int64_t timeout_ns)
{
	struct failing *failing = self;
	struct mp_io *io = failing->first;
	int64_t told = 0, passed;

	failing->first = NULL;
	failing->last = &failing->first;
	while (io) {
		struct mp_io *next = io->next;

		io->done(io); /* may submit: on the list of the next wait */
		io = next;
		told++;
	}
	passed = front_wait(self, told || failing->first ? 0 : timeout_ns);
	return passed < 0 ? passed : told + passed;
}

static void failing_destroy(void *self)
{
	struct failing *failing = self;

	assert(!failing->first);
	pthread_mutex_destroy(&failing->mutex);
	free(failing->unsynced.items);
	free(failing->doubtful.items);
	front_destroy(self);
}

void mp_driver_failing_set(struct mp_driver *driver, const struct mp_failing_rule *rule)
{
	struct failing *failing = driver->self;

	pthread_mutex_lock(&failing->mutex);
	failing->rule = *rule;
	failing->met = failing->failed = 0;
	pthread_mutex_unlock(&failing->mutex);
}

uint64_t mp_driver_failing_count(struct mp_driver *driver)
{
	struct failing *failing = driver->self;
	uint64_t count;

	pthread_mutex_lock(&failing->mutex);
	count = failing->failed;
	pthread_mutex_unlock(&failing->mutex);
	return count;
}

struct mp_driver *mp_driver_failing(struct mp_driver *inner)
{
	struct failing *failing = calloc(1, sizeof *failing);

	if (!failing)
		return NULL;
	front_init(&failing->front, inner);
	failing->front.table.submit = failing_submit;
	failing->front.table.wait = failing_wait;
	failing->front.table.destroy = failing_destroy;
	failing->last = &failing->first;
	pthread_mutex_init(&failing->mutex, NULL);
	return &failing->front.table;
}
