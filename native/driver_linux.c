/* driver_linux.c - the real driver: epoll, Linux AIO, helper thread, sockets, clock.
 *
 * Happy path: submit queues; wait gives the queue to the kernel, runs what has completed (read
 * from shared memory, no system call), and only then sleeps in epoll until a completion, a ready
 * socket or a wake.
 * Failure modes: an interrupted or spurious wake-up returns 0 events; a full AIO context keeps
 * its queue; an event for a socket that was closed earlier in the same batch is recognised by
 * its generation and dropped. Construction is all or nothing; destroy asserts that nothing is in
 * flight.
 */
#include "driver_linux.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* epoll's 64 bits: generation << 32 | socket, or one of these. */
#define TOKEN_AIO UINT64_MAX
#define TOKEN_WAKE (UINT64_MAX - 1)
enum { STARVED_NS = 1000000 };


void mp_linux_list_push(struct mp_linux_list *list, struct mp_io *io)
{
	io->next = NULL;
	*(list->last ? &list->last->next : &list->first) = io;
	list->last = io;
	list->count++;
}

struct mp_io *mp_linux_list_pop(struct mp_linux_list *list)
{
	struct mp_io *io = list->first;

	list->first = io->next;
	if (!list->first)
		list->last = NULL;
	list->count--;
	return io;
}

static uint64_t linux_now_ns(void *self)
{
	struct timespec now;

	(void)self;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void linux_random_bytes(void *self, void *buffer, size_t length)
{
	char *out = buffer;

	(void)self;
	while (length > 0) {
		ssize_t got = getrandom(out, length, 0);
		assert(got > 0 || (got < 0 && errno == EINTR));
		if (got > 0) {
			out += got;
			length -= (size_t)got;
		}
	}
}

static void linux_submit(void *self, struct mp_io *const *ios, uint32_t count)
{
	struct mp_linux *linux_driver = self;

	for (uint32_t i = 0; i < count; i++) {
		struct mp_io *io = ios[i];
		mp_driver_check(io);
		memset(io->driver_private, 0, sizeof io->driver_private);
		if (io->op == MP_OP_READ || io->op == MP_OP_WRITE || io->op == MP_OP_SYNC)
			mp_linux_list_push(&linux_driver->waiting, io);
		else
			mp_linux_helper_queue(linux_driver, io);
	}
	/* Fewer than a batch wait for the start of wait: one system call for all of this turn. */
	if (linux_driver->waiting.count >= MP_LINUX_AIO_BATCH)
		mp_linux_aio_flush(linux_driver);
}

static int64_t linux_file_length_bytes(void *self, uint64_t file)
{
	struct mp_linux *linux_driver = self;
	return mp_linux_file_length(&linux_driver->files, file);
}

static int64_t linux_list_files(void *self, uint64_t *numbers, uint64_t capacity)
{
	struct mp_linux *linux_driver = self;
	return mp_linux_list_files(&linux_driver->files, numbers, capacity);
}

static int64_t linux_receive(void *self, int socket, struct iovec *iov, int count)
{
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)count};
	ssize_t got;

	(void)self;
	do {
		got = recvmsg(socket, &message, MSG_DONTWAIT);
	} while (got < 0 && errno == EINTR);
	return got < 0 ? -errno : got;
}

static int64_t linux_send(void *self, int socket, const struct iovec *iov, int count)
{
	/* sendmsg only reads through msg_iov, which POSIX types without const. */
	struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)iov,
				 .msg_iovlen = (size_t)count};
	ssize_t sent;

	(void)self;
	do {
		sent = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	} while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : sent;
}

static int grow_watches(struct mp_linux *linux_driver, uint32_t needed)
{
	uint32_t capacity = linux_driver->watch_capacity ? linux_driver->watch_capacity : 64;

	while (capacity < needed)
		capacity *= 2;
	if (capacity == linux_driver->watch_capacity)
		return 0;
	struct mp_linux_watch *watches = realloc(linux_driver->watches, capacity * sizeof *watches);
	if (!watches)
		return -ENOMEM;
	memset(watches + linux_driver->watch_capacity, 0,
	       (capacity - linux_driver->watch_capacity) * sizeof *watches);
	linux_driver->watches = watches;
	linux_driver->watch_capacity = capacity;
	return 0;
}

static int change_epoll(struct mp_linux *linux_driver, int socket, struct mp_linux_watch *watch,
			uint32_t interest)
{
	struct epoll_event event = {.events = 0, .data = {.u64 = 0}};
	int operation = EPOLL_CTL_MOD;

	if (interest & MP_SOCKET_READ)
		event.events |= EPOLLIN;
	if (interest & MP_SOCKET_WRITE)
		event.events |= EPOLLOUT;
	event.data.u64 = (uint64_t)watch->generation << 32 | (uint32_t)socket;
	if (interest == 0)
		operation = EPOLL_CTL_DEL;
	else if (watch->interest == 0)
		operation = EPOLL_CTL_ADD;
	return epoll_ctl(linux_driver->epoll_fd, operation, socket, &event) < 0 ? -errno : 0;
}

/* Interest 0 leaves the epoll set: level-triggered EPOLLHUP would otherwise spin a paused
 * connection. */
static int linux_watch(void *self, int socket, uint32_t interest, void *context)
{
	struct mp_linux *linux_driver = self;

	assert(socket >= 0 && (interest & ~(uint32_t)(MP_SOCKET_READ | MP_SOCKET_WRITE)) == 0);
	int result = grow_watches(linux_driver, (uint32_t)socket + 1);
	if (result < 0)
		return result;
	struct mp_linux_watch *watch = &linux_driver->watches[socket];
	if (!watch->used) {
		watch->used = true;
		watch->interest = 0;
		watch->generation++;
	}
	watch->context = context;
	if (watch->interest == interest)
		return 0;
	result = change_epoll(linux_driver, socket, watch, interest);
	if (result < 0)
		return result;
	if (watch->interest == 0)
		linux_driver->watched++;
	if (interest == 0)
		linux_driver->watched--;
	watch->interest = interest;
	return 0;
}

static uint32_t linux_closed_by_peer(void *self, int socket)
{
	struct pollfd asked = {.fd = socket, .events = POLLRDHUP};

	(void)self;
	if (poll(&asked, 1, 0) <= 0)
		return 0;
	return MP_SOCKET_READ | (asked.revents & (POLLHUP | POLLERR) ? MP_SOCKET_HANGUP : 0U);
}

static void linux_release_socket(void *self, int socket)
{
	struct mp_linux *linux_driver = self;

	if (socket >= 0 && (uint32_t)socket < linux_driver->watch_capacity &&
	    linux_driver->watches[socket].used) {
		linux_watch(self, socket, 0, NULL);
		linux_driver->watches[socket].used = false;
	}
}

static void linux_close_socket(void *self, int socket)
{
	linux_release_socket(self, socket);
	close(socket);
}

static int64_t dispatch(struct mp_linux *linux_driver, const struct epoll_event *event)
{
	uint32_t socket = (uint32_t)event->data.u64, ready = 0;

	if (event->data.u64 == TOKEN_AIO || event->data.u64 == TOKEN_WAKE)
		return 0;
	assert(socket < linux_driver->watch_capacity);
	const struct mp_linux_watch *watch = &linux_driver->watches[socket];
	if (!watch->used || watch->interest == 0 || watch->generation != event->data.u64 >> 32)
		return 0;
	/* Interest may have been narrowed by an earlier event of this batch. */
	if (event->events & EPOLLIN)
		ready |= MP_SOCKET_READ & watch->interest;
	if (event->events & EPOLLOUT)
		ready |= MP_SOCKET_WRITE & watch->interest;
	if (event->events & (EPOLLHUP | EPOLLERR))
		ready |= MP_SOCKET_HANGUP;
	if (!ready)
		return 0;
	linux_driver->table.on_ready(linux_driver->table.owner, watch->context, ready);
	return 1;
}

static int epoll_sleep(struct mp_linux *linux_driver, struct epoll_event *events,
		       int64_t timeout_ns)
{
	struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
	int count;

	if (timeout_ns > 0 && !linux_driver->pwait2_refused) {
		count = (int)syscall(SYS_epoll_pwait2, linux_driver->epoll_fd, events,
				     MP_LINUX_EVENTS,
				     &timeout, NULL, 0);
		if (count >= 0 || errno != ENOSYS)
			return count;
		linux_driver->pwait2_refused = true;
	}
	int64_t timeout_ms = timeout_ns < 0 ? -1 : (timeout_ns + 999999) / 1000000;
	if (timeout_ms > 1000000)
		timeout_ms = 1000000; /* an early return is allowed, an overflow is not */
	return epoll_wait(linux_driver->epoll_fd, events, MP_LINUX_EVENTS, (int)timeout_ms);
}

/* Stale: epoll returned, but with nothing for a socket. */
static int64_t poll_events(struct mp_linux *linux_driver, int64_t timeout_ns, bool *stale)
{
	struct epoll_event events[MP_LINUX_EVENTS];
	int64_t handled = 0;

	if (timeout_ns != 0) {
		/* Pairs with wake: either it sees sleeping and writes, or this sees woken and
		 * does not sleep. */
		atomic_store(&linux_driver->sleeping, true);
		if (atomic_load(&linux_driver->woken))
			timeout_ns = 0;
	}
	int count = epoll_sleep(linux_driver, events, timeout_ns);
	assert(count >= 0 || errno == EINTR);
	atomic_store(&linux_driver->sleeping, false);
	for (int i = 0; i < count; i++)
		handled += dispatch(linux_driver, &events[i]);
	*stale = count > 0 && handled == 0;
	return handled;
}

static int64_t run_finished(struct mp_linux *linux_driver)
{
	struct mp_linux_list finished = linux_driver->finished;
	int64_t handled = 0;

	linux_driver->finished = (struct mp_linux_list){NULL, NULL, 0};
	while (finished.count > 0) {
		struct mp_io *io = mp_linux_list_pop(&finished);
		io->done(io);
		handled++;
	}
	return handled;
}

static int64_t run_completions(struct mp_linux *linux_driver)
{
	int64_t handled = run_finished(linux_driver);

	handled += mp_linux_aio_reap(linux_driver);
	/* Before the helper's list and before the core's mailbox, or a wake in between would be
	 * lost. */
	if (atomic_load(&linux_driver->woken) && atomic_exchange(&linux_driver->woken, false))
		handled++;
	handled += mp_linux_helper_collect(linux_driver);
	return handled;
}

/* Sleep for the first event. An edge of a completion that was reaped before it could wake anybody
 * is used up by looking once, and is no reason to return early. */
static int64_t sleep_for_events(struct mp_linux *linux_driver, int64_t timeout_ns)
{
	uint64_t end_ns = timeout_ns > 0 ? linux_now_ns(NULL) + (uint64_t)timeout_ns : 0;

	for (;;) {
		bool stale = false;
		int64_t handled = poll_events(linux_driver, timeout_ns, &stale);
		handled += run_completions(linux_driver);
		if (handled > 0 || !stale)
			return handled;
		uint64_t now_ns = timeout_ns > 0 ? linux_now_ns(NULL) : 0;
		if (now_ns > 0 && now_ns >= end_ns)
			return 0;
		if (now_ns > 0)
			timeout_ns = (int64_t)(end_ns - now_ns);
	}
}

/* Look again and again until end_ns, while the device is at work for us. */
static int64_t poll_for_events(struct mp_linux *linux_driver, uint64_t end_ns)
{
	int64_t handled = 0;
	bool stale;

	while (handled == 0 && linux_driver->aio_in_flight > 0 && linux_now_ns(NULL) < end_ns) {
		if (linux_driver->watched > 0)
			handled = poll_events(linux_driver, 0, &stale);
		/* Last: the look may have used up the edge of what completed meanwhile. */
		handled += run_completions(linux_driver);
	}
	return handled;
}

/* Polls as a hypervisor does before it halts a processor: only after sleeps that were shorter than
 * poll_ns, so that who is idle costs nothing. */
static int64_t poll_then_sleep(struct mp_linux *linux_driver, int64_t timeout_ns)
{
	uint64_t poll_ns = linux_driver->table.poll_ns, begin_ns;
	int64_t handled = 0;

	if (poll_ns == 0)
		return sleep_for_events(linux_driver, timeout_ns);
	if (timeout_ns > 0 && poll_ns > (uint64_t)timeout_ns)
		poll_ns = (uint64_t)timeout_ns;
	begin_ns = linux_now_ns(NULL);
	if (linux_driver->poll_pays)
		handled = poll_for_events(linux_driver, begin_ns + poll_ns);
	if (handled == 0) {
		handled = sleep_for_events(linux_driver, timeout_ns);
		linux_driver->poll_pays = linux_now_ns(NULL) - begin_ns < poll_ns;
	}
	return handled;
}

static int64_t linux_wait(void *self, int64_t timeout_ns)
{
	struct mp_linux *linux_driver = self;
	bool stale;

	assert(!linux_driver->in_wait); /* done and on_ready must not wait */
	linux_driver->in_wait = true;
	mp_linux_aio_flush(linux_driver);
	int64_t handled = run_completions(linux_driver);
	if (handled > 0)
		timeout_ns = 0;
	else if (linux_driver->aio_starved && (timeout_ns < 0 || timeout_ns > STARVED_NS))
		timeout_ns = STARVED_NS;
	/* A poll without sockets costs no system call: everything else is in shared memory. */
	if (timeout_ns != 0)
		handled += poll_then_sleep(linux_driver, timeout_ns);
	else if (linux_driver->watched > 0)
		handled += poll_events(linux_driver, 0, &stale);
	linux_driver->in_wait = false;
	return handled;
}

static void signal_eventfd(int fd)
{
	uint64_t one = 1;
	/* EAGAIN: the counter is full, so it is readable, which is all that is wanted. */
	ssize_t written = write(fd, &one, sizeof one);
	assert(written == (ssize_t)sizeof one || errno == EAGAIN || errno == EINTR);
}

void mp_linux_wake(void *self)
{
	struct mp_linux *linux_driver = self;

	if (!atomic_exchange(&linux_driver->woken, true) && atomic_load(&linux_driver->sleeping))
		signal_eventfd(linux_driver->wake_fd);
}

static void linux_notify(void *self)
{
	struct mp_linux *linux_driver = self;
	signal_eventfd(linux_driver->notify_fd);
}

static void close_if_open(int fd)
{
	if (fd >= 0)
		close(fd);
}

static void linux_destroy(void *self)
{
	struct mp_linux *linux_driver = self;

	assert(!linux_driver->in_wait && linux_driver->finished.count == 0);
	mp_linux_helper_stop(linux_driver);
	mp_linux_aio_close(linux_driver);
	for (uint32_t i = 0; i < linux_driver->watch_capacity; i++) {
		if (linux_driver->watches[i].used)
			close((int)i);
	}
	free(linux_driver->watches);
	close(linux_driver->epoll_fd);
	close(linux_driver->aio_fd);
	close(linux_driver->wake_fd);
	close(linux_driver->notify_fd);
	mp_linux_files_close(&linux_driver->files);
	free(linux_driver);
}

static const struct mp_driver LINUX_TABLE = {
	.now_ns = linux_now_ns,
	.random_bytes = linux_random_bytes,
	.submit = linux_submit,
	.file_length_bytes = linux_file_length_bytes,
	.list_files = linux_list_files,
	.receive = linux_receive,
	.send = linux_send,
	.watch = linux_watch,
	.closed_by_peer = linux_closed_by_peer,
	.close_socket = linux_close_socket,
	.release_socket = linux_release_socket,
	.wait = linux_wait,
	.wake = mp_linux_wake,
	.notify = linux_notify,
	.destroy = linux_destroy,
};

/* Edge-triggered, so that neither is ever read: each signal is one edge, and saves a system
 * call. */
static int watch_own(struct mp_linux *linux_driver, int fd, uint64_t token)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data = {.u64 = token}};
	return epoll_ctl(linux_driver->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int open_parts(struct mp_linux *linux_driver)
{
	linux_driver->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	linux_driver->aio_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	linux_driver->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	linux_driver->notify_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	if (linux_driver->epoll_fd < 0 || linux_driver->aio_fd < 0 || linux_driver->wake_fd < 0 ||
	    linux_driver->notify_fd < 0)
		return -errno;
	int result = watch_own(linux_driver, linux_driver->aio_fd, TOKEN_AIO);
	if (result == 0)
		result = watch_own(linux_driver, linux_driver->wake_fd, TOKEN_WAKE);
	if (result == 0)
		result = mp_linux_aio_open(linux_driver);
	if (result < 0)
		return result;
	result = mp_linux_helper_start(linux_driver);
	if (result < 0)
		mp_linux_aio_close(linux_driver);
	return result;
}

static struct mp_driver *open_driver(int fd, bool is_device)
{
	struct mp_linux *linux_driver = calloc(1, sizeof *linux_driver);

	if (!linux_driver)
		return NULL;
	linux_driver->table = LINUX_TABLE;
	linux_driver->table.self = linux_driver;
	mp_linux_files_init(&linux_driver->files, fd, is_device);
	int error = open_parts(linux_driver);
	if (error == 0)
		return &linux_driver->table;
	close_if_open(linux_driver->epoll_fd);
	close_if_open(linux_driver->aio_fd);
	close_if_open(linux_driver->wake_fd);
	close_if_open(linux_driver->notify_fd);
	free(linux_driver);
	errno = -error;
	return NULL;
}

struct mp_driver *mp_driver_linux_device(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return NULL;
	/* Buffered, io_submit would block the reactor and a completed WRITE would not be on the
	 * device. */
	if (!(flags & O_DIRECT)) {
		errno = EINVAL;
		return NULL;
	}
	return open_driver(fd, true);
}

struct mp_driver *mp_driver_linux_directory(int directory_fd)
{
	return open_driver(directory_fd, false);
}

int mp_driver_linux_notify_fd(struct mp_driver *driver)
{
	const struct mp_linux *linux_driver = driver->self;
	return linux_driver->notify_fd;
}
