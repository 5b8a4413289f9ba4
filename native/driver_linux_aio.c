/* driver_linux_aio.c - READ, WRITE and SYNC by Linux AIO on O_DIRECT, for the real driver.
 *
 * Happy path: submit appends to a list; flush gives the kernel up to MP_LINUX_AIO_BATCH of them
 * per io_submit; completions signal an eventfd in the epoll set and are read from the ring that
 * the kernel shares with the process, without a system call.
 * Failure modes: the context is full or the kernel short of memory (the rest waits, in order);
 * an io that the kernel refuses or whose file does not open gets that error in wait, never
 * inside submit; a short transfer is continued (and a read at the end of the file is -EIO); no
 * FDSYNC in this kernel or file system (the helper thread syncs); an unknown ring layout
 * (io_getevents instead).
 */
#include "driver_linux.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { RING_MAGIC = 0xa10a10a1, DEPTH_MIN = 16 };

/* fs/aio.c: the head is the process's to move, the tail is the kernel's. */
struct ring {
	uint32_t id, nr, head, tail, magic, compat_features, incompat_features, header_length_bytes;
	struct io_event events[];
};

int mp_linux_aio_open(struct mp_linux *linux_driver)
{
	/* The system allows fs.aio-max-nr places for all processes together: ask for less if it
	 * must be. */
	for (uint32_t depth = MP_LINUX_AIO_DEPTH; depth >= DEPTH_MIN; depth /= 2) {
		if (syscall(SYS_io_setup, depth, &linux_driver->aio) == 0) {
			linux_driver->aio_depth = depth;
			return 0;
		}
		if (errno != EAGAIN)
			break;
	}
	return -errno;
}

void mp_linux_aio_close(struct mp_linux *linux_driver)
{
	assert(linux_driver->aio_in_flight == 0 && linux_driver->waiting.count == 0);
	long result = syscall(SYS_io_destroy, linux_driver->aio);
	assert(result == 0);
}

/* Off to where done will run: in wait, never inside submit. */
static void finish_later(struct mp_linux *linux_driver, struct mp_io *io, int64_t result)
{
	struct mp_linux_private *private = mp_linux_private(io);

	if (private->file)
		mp_linux_file_release(&linux_driver->files, private->file);
	private->file = NULL;
	free(private->rest);
	private->rest = NULL;
	io->result = result;
	mp_linux_list_push(&linux_driver->finished, io);
}

static void fill_control(struct mp_linux *linux_driver, struct mp_io *io)
{
	struct mp_linux_private *private = mp_linux_private(io);
	const struct mp_linux_rest *rest = private->rest;
	const struct iovec *iov = rest ? rest->iov : io->iov;
	struct iocb *control = &private->control;

	memset(control, 0, sizeof *control);
	control->aio_data = (uint64_t)(uintptr_t)io;
	control->aio_fildes = (uint32_t)private->file->fd;
	control->aio_flags = IOCB_FLAG_RESFD;
	control->aio_resfd = (uint32_t)linux_driver->aio_fd;
	if (io->op == MP_OP_SYNC) {
		control->aio_lio_opcode = IOCB_CMD_FDSYNC;
		return;
	}
	control->aio_lio_opcode = io->op == MP_OP_READ ? IOCB_CMD_PREADV : IOCB_CMD_PWRITEV;
	control->aio_buf = (uint64_t)(uintptr_t)iov;
	control->aio_nbytes = rest ? rest->iov_count : io->iov_count;
	control->aio_offset = (int64_t)(io->offset_bytes + (rest ? rest->done_bytes : 0));
}

/* Open the file and fill the iocb. False: the io has gone elsewhere. */
static bool prepare(struct mp_linux *linux_driver, struct mp_io *io)
{
	struct mp_linux_private *private = mp_linux_private(io);

	if (io->op == MP_OP_SYNC && linux_driver->aio_sync_refused) {
		mp_linux_helper_queue(linux_driver, io);
		return false;
	}
	if (!private->file) {
		int error = mp_linux_file_acquire(&linux_driver->files, io->file, &private->file);
		if (error == 0 && io->op == MP_OP_WRITE)
			error = mp_linux_device_room(&linux_driver->files,
						     io->offset_bytes + io->length_bytes);
		if (error < 0) {
			finish_later(linux_driver, io, error);
			return false;
		}
	}
	if (io->op != MP_OP_SYNC && io->length_bytes == 0) {
		finish_later(linux_driver, io, 0);
		return false;
	}
	fill_control(linux_driver, io);
	return true;
}

/* The kernel refused the first of a batch for its own sake. */
static void refused(struct mp_linux *linux_driver, struct mp_io *io, int error)
{
	struct mp_linux_private *private = mp_linux_private(io);

	if (io->op == MP_OP_SYNC && (error == EINVAL || error == EOPNOTSUPP)) {
		mp_linux_file_release(&linux_driver->files, private->file);
		private->file = NULL;
		linux_driver->aio_sync_refused = true;
		mp_linux_helper_queue(linux_driver, io);
		return;
	}
	finish_later(linux_driver, io, -error);
}

static void push_back_front(struct mp_linux_list *list, struct mp_io **ios, uint32_t count)
{
	while (count > 0) {
		struct mp_io *io = ios[--count];
		io->next = list->first;
		list->first = io;
		if (!list->last)
			list->last = io;
		list->count++;
	}
}

/* One io_submit. False: the kernel takes no more for now. */
static bool flush_batch(struct mp_linux *linux_driver)
{
	struct mp_io *ios[MP_LINUX_AIO_BATCH];
	struct iocb *controls[MP_LINUX_AIO_BATCH];
	uint32_t room = linux_driver->aio_depth - linux_driver->aio_in_flight;
	uint32_t count = 0;

	if (room > MP_LINUX_AIO_BATCH)
		room = MP_LINUX_AIO_BATCH;
	while (count < room && linux_driver->waiting.count > 0) {
		struct mp_io *io = mp_linux_list_pop(&linux_driver->waiting);
		if (prepare(linux_driver, io)) {
			ios[count] = io;
			controls[count++] = &mp_linux_private(io)->control;
		}
	}
	if (count == 0)
		return linux_driver->aio_in_flight < linux_driver->aio_depth;
	long submitted;
	do {
		submitted = syscall(SYS_io_submit, linux_driver->aio, (long)count, controls);
	} while (submitted < 0 && errno == EINTR);
	if (submitted > 0) {
		assert((uint32_t)submitted <= count);
		linux_driver->aio_in_flight += (uint32_t)submitted;
		push_back_front(&linux_driver->waiting, ios + submitted,
				count - (uint32_t)submitted);
		return true;
	}
	int error = submitted < 0 ? errno : EAGAIN;
	bool busy = error == EAGAIN || error == ENOMEM;
	push_back_front(&linux_driver->waiting, ios + !busy, count - !busy);
	if (!busy)
		refused(linux_driver, ios[0], error);
	else
		linux_driver->aio_starved = linux_driver->aio_in_flight == 0;
	return !busy;
}

void mp_linux_aio_flush(struct mp_linux *linux_driver)
{
	linux_driver->aio_starved = false;
	while (linux_driver->waiting.count > 0 && flush_batch(linux_driver))
		;
}

/* The iovecs behind done_bytes. The submitter's own are never changed: it may use them again. */
static struct mp_linux_rest *make_rest(const struct mp_io *io, uint64_t done_bytes)
{
	struct mp_linux_rest *rest = malloc(sizeof *rest + io->iov_count * sizeof rest->iov[0]);
	uint64_t skip_bytes = done_bytes;

	if (!rest)
		return NULL;
	rest->done_bytes = done_bytes;
	rest->iov_count = 0;
	for (uint32_t i = 0; i < io->iov_count; i++) {
		struct iovec iov = io->iov[i];
		uint64_t skip_here = skip_bytes < iov.iov_len ? skip_bytes : iov.iov_len;
		iov.iov_base = (char *)iov.iov_base + skip_here;
		iov.iov_len -= skip_here;
		skip_bytes -= skip_here;
		if (iov.iov_len > 0)
			rest->iov[rest->iov_count++] = iov;
	}
	return rest;
}

/* The whole result of an io whose last piece moved result bytes; -EAGAIN: cut short, there is
 * more. */
static int64_t judge(const struct mp_io *io, uint64_t done_bytes, int64_t result)
{
	if (io->op == MP_OP_SYNC || result < 0)
		return result;
	assert(done_bytes <= io->length_bytes);
	if (done_bytes == io->length_bytes)
		return (int64_t)done_bytes;
	/* Nothing more comes, or the end of the file is inside a block: there is no whole
	 * length. */
	return result == 0 || done_bytes % MP_BLOCK_BYTES ? -EIO : -EAGAIN;
}

/* One event; an io that was cut short counts as well, or wait would sleep before it goes on. */
static int64_t take_event(struct mp_linux *linux_driver, const struct io_event *event)
{
	struct mp_io *io = (struct mp_io *)(uintptr_t)event->data;
	struct mp_linux_private *private = mp_linux_private(io);
	struct mp_linux_rest *rest = private->rest;
	uint64_t done_bytes = rest ? rest->done_bytes : 0;

	assert(linux_driver->aio_in_flight > 0);
	linux_driver->aio_in_flight--;
	mp_linux_file_release(&linux_driver->files, private->file);
	private->file = NULL;
	private->rest = NULL;
	if (event->res > 0)
		done_bytes += (uint64_t)event->res;
	int64_t result = event->res == -EAGAIN ? -EIO : judge(io, done_bytes, event->res);
	if (result == -EAGAIN) {
		private->rest = make_rest(io, done_bytes);
		result = private->rest ? -EAGAIN : -ENOMEM;
	}
	free(rest);
	if (result == -EAGAIN) {
		mp_linux_list_push(&linux_driver->waiting, io);
		return 1;
	}
	io->result = result;
	io->done(io);
	return 1;
}

static int64_t reap_by_call(struct mp_linux *linux_driver)
{
	struct io_event events[MP_LINUX_AIO_BATCH];
	struct timespec now = {0, 0};
	int64_t handled = 0;
	long count = syscall(SYS_io_getevents, linux_driver->aio, 0L, (long)MP_LINUX_AIO_BATCH,
			     events, &now);

	assert(count >= 0 || errno == EINTR);
	for (long i = 0; i < count; i++)
		handled += take_event(linux_driver, &events[i]);
	return handled;
}

/* What has completed by now; what completes meanwhile is for the next turn, so that this one
 * ends. */
int64_t mp_linux_aio_reap(struct mp_linux *linux_driver)
{
	struct ring *ring = (struct ring *)linux_driver->aio;
	int64_t handled = 0;

	if (linux_driver->aio_in_flight == 0)
		return 0;
	if (ring->magic != RING_MAGIC || ring->incompat_features != 0)
		return reap_by_call(linux_driver);
	uint32_t head = ring->head;
	uint32_t tail = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
	while (head != tail) {
		struct io_event event = ring->events[head];
		head = head + 1 == ring->nr ? 0 : head + 1;
		/* Moved before done runs: done may submit, and the kernel counts free places by
		 * the head. */
		__atomic_store_n(&ring->head, head, __ATOMIC_RELEASE);
		handled += take_event(linux_driver, &event);
	}
	return handled;
}
