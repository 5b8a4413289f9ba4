/* driver_test.c - tests only: any driver, from Python, without callbacks.
 *
 * Happy path: queue, submit, wait, take, data. Events are kept in order of completion.
 * Failure modes: after a simulated crash nothing completes; free gives back what never will.
 */
#include "driver_test.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "format.h"

enum { REPLACEMENT_COOKIE = 1000 };

struct operation {
	struct mp_io io;
	struct mp_driver_test *test;
	uint64_t cookie;
	pthread_t submitter;
	uint8_t *buffer;
	bool done;
	struct operation *next;
	struct iovec iov[];
};

struct mp_driver_test {
	struct mp_driver *driver;
	struct operation *operations;     /* all that are not freed, newest first */
	struct mp_io **queued;
	uint32_t queued_count, queued_capacity;
	struct mp_driver_test_event *events;
	uint64_t first_event, event_count, event_capacity;
	uint64_t close_cookie;
	int close_socket;                 /* -1: none */
	int replacement;                  /* -1: none */
};

static void *grow(void *array, uint64_t needed, uint64_t *capacity, size_t element_bytes)
{
	if (needed <= *capacity)
		return array;
	*capacity = needed * 2;
	array = realloc(array, *capacity * element_bytes);
	assert(array);
	return array;
}

static void add_event(struct mp_driver_test *test, struct mp_driver_test_event event)
{
	test->events = grow(test->events, test->event_count + 1, &test->event_capacity,
			    sizeof event);
	test->events[test->event_count++] = event;
}

static void free_operation(struct operation *operation)
{
	free(operation->buffer);
	free(operation);
}

static void unlink_operation(struct operation *operation)
{
	struct operation **link = &operation->test->operations;

	while (*link != operation)
		link = &(*link)->next;
	*link = operation->next;
}

static void on_done(struct mp_io *io)
{
	struct operation *operation = io->context;
	struct mp_driver_test_event event = {operation->cookie, io->op, 0, io->result};

	assert(!operation->done);
	operation->done = true;
	add_event(operation->test, event);
	if (io->op != MP_OP_READ) {
		unlink_operation(operation);
		free_operation(operation);
	}
}

static void on_call(struct mp_io *io)
{
	const struct operation *operation = io->context;
	io->result = !pthread_equal(operation->submitter, pthread_self());
}

static void on_ready(void *owner, void *context, uint32_t ready)
{
	struct mp_driver_test *test = owner;
	uint64_t cookie = (uint64_t)(uintptr_t)context;
	int socket = test->close_socket;

	add_event(test, (struct mp_driver_test_event){cookie, 0, ready, 0});
	if (socket >= 0 && test->close_cookie == cookie) {
		test->close_socket = -1;
		test->driver->close_socket(test->driver->self, socket);
		if (test->replacement >= 0) {
			int number = dup2(test->replacement, socket);
			assert(number == socket);
			mp_driver_test_watch(test, socket, MP_SOCKET_READ, REPLACEMENT_COOKIE);
		}
	}
}

struct mp_driver_test *mp_driver_test_new(struct mp_driver *driver)
{
	struct mp_driver_test *test = calloc(1, sizeof *test);

	assert(test);
	test->driver = driver;
	test->close_socket = -1;
	driver->owner = test;
	driver->on_ready = on_ready;
	return test;
}

void mp_driver_test_free(struct mp_driver_test *test)
{
	while (test->operations) {
		struct operation *operation = test->operations;
		test->operations = operation->next;
		free_operation(operation);
	}
	free(test->queued);
	free(test->events);
	free(test);
}

/* length_bytes in pieces iovecs, each a multiple of a block, none empty. */
static uint32_t cut(struct iovec *iov, uint8_t *buffer, uint64_t length_bytes, uint32_t pieces)
{
	uint64_t blocks = length_bytes / MP_BLOCK_BYTES;
	uint32_t count = blocks < pieces ? (uint32_t)blocks : pieces;

	for (uint32_t i = 0; i < count; i++) {
		uint64_t first = blocks * i / count, end = blocks * (i + 1) / count;
		iov[i].iov_base = buffer + first * MP_BLOCK_BYTES;
		iov[i].iov_len = (end - first) * MP_BLOCK_BYTES;
	}
	return count;
}

void mp_driver_test_queue(struct mp_driver_test *test, uint64_t cookie, uint32_t op, uint64_t file,
			  uint64_t offset_bytes, uint64_t length_bytes, const void *data,
			  uint32_t pieces)
{
	struct operation *operation = calloc(1, sizeof *operation + pieces * sizeof(struct iovec));
	struct mp_io *io = &operation->io;
	uint64_t capacity = test->queued_capacity;

	assert(operation);
	operation->test = test;
	operation->cookie = cookie;
	operation->submitter = pthread_self();
	operation->next = test->operations;
	test->operations = operation;
	io->op = op;
	io->file = file;
	io->offset_bytes = offset_bytes;
	io->length_bytes = length_bytes;
	io->done = on_done;
	io->call = on_call;
	io->context = operation;
	io->iov = operation->iov;
	if (op == MP_OP_READ || op == MP_OP_WRITE) {
		operation->buffer = aligned_alloc(MP_BLOCK_BYTES, length_bytes + MP_BLOCK_BYTES);
		assert(operation->buffer);
		if (op == MP_OP_WRITE)
			memcpy(operation->buffer, data, length_bytes);
		io->iov_count = cut(operation->iov, operation->buffer, length_bytes, pieces);
	}
	test->queued = grow(test->queued, test->queued_count + 1u, &capacity,
			    sizeof(struct mp_io *));
	test->queued_capacity = (uint32_t)capacity;
	test->queued[test->queued_count++] = io;
}

void mp_driver_test_submit(struct mp_driver_test *test)
{
	uint32_t count = test->queued_count;

	test->queued_count = 0;
	test->driver->submit(test->driver->self, test->queued, count);
}

int64_t mp_driver_test_wait(struct mp_driver_test *test, int64_t timeout_ns)
{
	return test->driver->wait(test->driver->self, timeout_ns);
}

int64_t mp_driver_test_take(struct mp_driver_test *test, struct mp_driver_test_event *out,
			    uint64_t capacity)
{
	uint64_t count = test->event_count - test->first_event;

	count = count < capacity ? count : capacity;
	for (uint64_t i = 0; i < count; i++)
		out[i] = test->events[test->first_event++];
	if (test->first_event == test->event_count)
		test->first_event = test->event_count = 0;
	return (int64_t)count;
}

int64_t mp_driver_test_data(struct mp_driver_test *test, uint64_t cookie, void *out,
			    uint64_t capacity_bytes)
{
	struct operation *operation = test->operations;

	while (operation && !(operation->done && operation->cookie == cookie))
		operation = operation->next;
	if (!operation)
		return -ENOENT;
	uint64_t length_bytes = operation->io.length_bytes;
	assert(length_bytes <= capacity_bytes);
	memcpy(out, operation->buffer, length_bytes);
	unlink_operation(operation);
	free_operation(operation);
	return (int64_t)length_bytes;
}

int64_t mp_driver_test_length(struct mp_driver_test *test, uint64_t file)
{
	return test->driver->file_length_bytes(test->driver->self, file);
}

int64_t mp_driver_test_list(struct mp_driver_test *test, uint64_t *numbers, uint64_t capacity)
{
	return test->driver->list_files(test->driver->self, numbers, capacity);
}

uint64_t mp_driver_test_now_ns(struct mp_driver_test *test)
{
	return test->driver->now_ns(test->driver->self);
}

void mp_driver_test_random(struct mp_driver_test *test, void *out, uint64_t length_bytes)
{
	test->driver->random_bytes(test->driver->self, out, length_bytes);
}

void mp_driver_test_wake(struct mp_driver_test *test)
{
	test->driver->wake(test->driver->self);
}

void mp_driver_test_notify(struct mp_driver_test *test)
{
	test->driver->notify(test->driver->self);
}

int mp_driver_test_watch(struct mp_driver_test *test, int socket, uint32_t interest,
			 uint64_t cookie)
{
	return test->driver->watch(test->driver->self, socket, interest, (void *)(uintptr_t)cookie);
}

void mp_driver_test_close(struct mp_driver_test *test, int socket)
{
	test->driver->close_socket(test->driver->self, socket);
}

void mp_driver_test_close_on_ready(struct mp_driver_test *test, uint64_t cookie, int socket,
				   int replacement)
{
	test->close_cookie = cookie;
	test->replacement = replacement;
	test->close_socket = socket;
}

int64_t mp_driver_test_receive(struct mp_driver_test *test, int socket, void *out,
			       uint64_t capacity_bytes)
{
	struct iovec iov = {out, capacity_bytes};
	return test->driver->receive(test->driver->self, socket, &iov, 1);
}

int64_t mp_driver_test_send(struct mp_driver_test *test, int socket, const void *bytes,
			    uint64_t length_bytes)
{
	struct iovec iov = {(void *)(uintptr_t)bytes, length_bytes};
	return test->driver->send(test->driver->self, socket, &iov, 1);
}
