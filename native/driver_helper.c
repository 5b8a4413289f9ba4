/* driver_helper.c - one operation at a time over a driver, for recovery, formatting and tests.
 *
 * Happy path: submit, run the driver's wait until done ran, return the result.
 * Failure modes: the operation's own error; the world ended (simulated crash): -ESHUTDOWN, and the
 * operation is abandoned, its memory is the caller's again because the driver will never touch it.
 */
#include "driver.h"

#include <errno.h>
#include <string.h>

#include "format.h"

static void mark_done(struct mp_io *io)
{
	*(int *)io->context = 1;
}

int64_t mp_driver_do(struct mp_driver *driver, struct mp_io *io)
{
	int done = 0;

	io->context = &done;
	io->done = mark_done;
	driver->submit(driver->self, &io, 1);
	while (!done) {
		int64_t handled = driver->wait(driver->self, -1);
		if (handled < 0)
			return handled;
	}
	return io->result;
}

static int64_t transfer(struct mp_driver *driver, uint32_t op, uint64_t file, uint64_t offset_bytes,
			void *buffer, uint64_t length_bytes)
{
	struct iovec iov = {.iov_base = buffer, .iov_len = length_bytes};
	struct mp_io io;

	memset(&io, 0, sizeof io);
	io.op = op;
	io.file = file;
	io.offset_bytes = offset_bytes;
	io.length_bytes = length_bytes;
	io.iov = &iov;
	io.iov_count = length_bytes ? 1 : 0;
	return mp_driver_do(driver, &io);
}

int64_t mp_driver_read(struct mp_driver *driver, uint64_t file, uint64_t offset_bytes, void *buffer,
		       uint64_t length_bytes)
{
	return transfer(driver, MP_OP_READ, file, offset_bytes, buffer, length_bytes);
}

int64_t mp_driver_write(struct mp_driver *driver, uint64_t file, uint64_t offset_bytes,
			const void *buffer, uint64_t length_bytes)
{
	/* A WRITE only reads through iov_base, which POSIX types without const. */
	return transfer(driver, MP_OP_WRITE, file, offset_bytes, (void *)(uintptr_t)buffer,
			length_bytes);
}

int64_t mp_driver_sync(struct mp_driver *driver, uint64_t file)
{
	return transfer(driver, MP_OP_SYNC, file, 0, NULL, 0);
}

void mp_driver_destroy(struct mp_driver *driver)
{
	driver->destroy(driver->self);
}
