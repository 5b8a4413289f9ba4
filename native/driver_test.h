/* driver_test.h - tests only: any driver, from Python, without callbacks.
 *
 * cffi calls C functions well and C callbacks badly (and house rule: no Python callback from C
 * threads). A test queues operations here, turns the driver, and collects what completed, in
 * order of completion. No core uses this. One thread, except mp_driver_test_wake and _notify.
 */
#ifndef MILLPOND_DRIVER_TEST_H
#define MILLPOND_DRIVER_TEST_H

#include "driver.h"

/* cdef: begin */
struct mp_driver_test;
struct mp_driver_test_event {
	uint64_t cookie;                 /* of the operation, or the socket's */
	uint32_t op;                     /* enum mp_op; 0: a socket became ready */
	/* MP_SOCKET_READ 1, MP_SOCKET_WRITE 2, MP_SOCKET_HANGUP 4 */
	uint32_t ready;
	int64_t result;                  /* CALL: 1 when it ran in another thread, else 0 */
};
/* takes the driver's owner and on_ready */
struct mp_driver_test *mp_driver_test_new(struct mp_driver *driver);
void mp_driver_test_free(struct mp_driver_test *test); /* before the driver is destroyed */
/* Copy the data (WRITE) into aligned buffers of pieces iovecs and queue; nothing is submitted
 * yet. */
void mp_driver_test_queue(struct mp_driver_test *test, uint64_t cookie, uint32_t op, uint64_t file,
			  uint64_t offset_bytes, uint64_t length_bytes, const void *data,
			  uint32_t pieces);
/* all that is queued, in one call */
void mp_driver_test_submit(struct mp_driver_test *test);
/* one turn of the driver */
int64_t mp_driver_test_wait(struct mp_driver_test *test, int64_t timeout_ns);
int64_t mp_driver_test_take(struct mp_driver_test *test, struct mp_driver_test_event *out,
			    uint64_t capacity);
/* The bytes of a completed READ, whose event has been taken. Frees them. Returns the length, or
 * -ENOENT. */
int64_t mp_driver_test_data(struct mp_driver_test *test, uint64_t cookie, void *out,
			    uint64_t capacity_bytes);
int64_t mp_driver_test_length(struct mp_driver_test *test, uint64_t file);
int64_t mp_driver_test_list(struct mp_driver_test *test, uint64_t *numbers, uint64_t capacity);
uint64_t mp_driver_test_now_ns(struct mp_driver_test *test);
void mp_driver_test_random(struct mp_driver_test *test, void *out, uint64_t length_bytes);
void mp_driver_test_wake(struct mp_driver_test *test);
void mp_driver_test_notify(struct mp_driver_test *test);
int mp_driver_test_watch(struct mp_driver_test *test, int socket, uint32_t interest,
			 uint64_t cookie);
void mp_driver_test_close(struct mp_driver_test *test, int socket);
/* When the socket of this cookie is ready next, close that other socket inside on_ready. With a
 * replacement >= 0 (real sockets), it takes the closed one's number at once, watched for reading
 * with the cookie 1000: as accept would. */
void mp_driver_test_close_on_ready(struct mp_driver_test *test, uint64_t cookie, int socket,
				   int replacement);
int64_t mp_driver_test_receive(struct mp_driver_test *test, int socket, void *out,
			       uint64_t capacity_bytes);
int64_t mp_driver_test_send(struct mp_driver_test *test, int socket, const void *bytes,
			    uint64_t length_bytes);
/* cdef: end */

#endif
