/* driver_linux_helper.c - the one thread for operations that block, for the real driver.
 *
 * Happy path: CREATE, REMOVE, ALLOCATE, PUNCH, CALL (and SYNC where AIO cannot) run here one
 * after the other; finished ones return through a list under a mutex, with a wake, and done runs
 * in wait.
 * Failure modes: the operation's own errno. It opens files by itself: a descriptor of the
 * reactor's table may be closed while this thread is at work.
 */
#include "driver_linux.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

static int64_t allocate(int fd, const struct mp_io *io)
{
	struct stat status;

	if (fallocate(fd, 0, (off_t)io->offset_bytes, (off_t)io->length_bytes) == 0)
		return 0;
	int error = errno;
	/* A block device has all its space; it just does not know the call. */
	if (error == EOPNOTSUPP && fstat(fd, &status) == 0 && S_ISBLK(status.st_mode))
		return 0;
	return -error;
}

static int64_t on_open_file(int fd, const struct mp_io *io)
{
	if (io->op == MP_OP_SYNC)
		return fdatasync(fd) < 0 ? -errno : 0;
	if (io->length_bytes == 0)
		return 0;
	if (io->op == MP_OP_ALLOCATE)
		return allocate(fd, io);
	int result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       (off_t)io->offset_bytes,
			       (off_t)io->length_bytes);
	return result < 0 ? -errno : 0;
}

static int64_t on_file(const struct mp_linux_files *files, const struct mp_io *io)
{
	if (files->is_device) {
		int64_t length_bytes = mp_linux_file_length(files, io->file);
		uint64_t end_bytes = io->offset_bytes + io->length_bytes;
		if (length_bytes < 0)
			return length_bytes;
		if (io->op == MP_OP_ALLOCATE && end_bytes > (uint64_t)length_bytes)
			return -ENOSPC; /* a device does not grow, nor does a file in its place */
		return on_open_file(files->device.fd, io);
	}
	int fd = mp_linux_file_open(files, io->file, O_RDWR | O_DIRECT);
	if (fd < 0)
		return fd;
	int64_t result = on_open_file(fd, io);
	close(fd);
	return result;
}

static void run(const struct mp_linux_files *files, struct mp_io *io)
{
	io->result = 0;
	switch (io->op) {
	case MP_OP_CALL:
		io->call(io); /* may set io->result */
		break;
	case MP_OP_CREATE:
		io->result = mp_linux_file_create(files, io->file);
		break;
	case MP_OP_REMOVE:
		io->result = mp_linux_file_remove(files, io->file);
		break;
	default:
		assert(io->op == MP_OP_SYNC || io->op == MP_OP_PUNCH || io->op == MP_OP_ALLOCATE);
		io->result = on_file(files, io);
	}
}

static void *helper_main(void *argument)
{
	struct mp_linux *linux_driver = argument;
	struct mp_linux_helper *helper = &linux_driver->helper;

	pthread_mutex_lock(&helper->mutex);
	for (;;) {
		while (helper->todo.count == 0 && !helper->stopping)
			pthread_cond_wait(&helper->more, &helper->mutex);
		if (helper->todo.count == 0)
			break;
		struct mp_io *io = mp_linux_list_pop(&helper->todo);
		pthread_mutex_unlock(&helper->mutex);
		run(&linux_driver->files, io);
		pthread_mutex_lock(&helper->mutex);
		mp_linux_list_push(&helper->finished, io);
		/* Under the mutex: after collect has taken the last io the driver may be
		 * destroyed. */
		mp_linux_wake(linux_driver);
	}
	pthread_mutex_unlock(&helper->mutex);
	return NULL;
}

int mp_linux_helper_start(struct mp_linux *linux_driver)
{
	struct mp_linux_helper *helper = &linux_driver->helper;
	sigset_t all, before;

	pthread_mutex_init(&helper->mutex, NULL);
	pthread_cond_init(&helper->more, NULL);
	/* Signals are for the thread that runs Python's handlers. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int error = pthread_create(&helper->thread, NULL, helper_main, linux_driver);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error) {
		pthread_cond_destroy(&helper->more);
		pthread_mutex_destroy(&helper->mutex);
	}
	return -error;
}

void mp_linux_helper_stop(struct mp_linux *linux_driver)
{
	struct mp_linux_helper *helper = &linux_driver->helper;

	assert(helper->pending == 0);
	pthread_mutex_lock(&helper->mutex);
	helper->stopping = true;
	pthread_cond_signal(&helper->more);
	pthread_mutex_unlock(&helper->mutex);
	pthread_join(helper->thread, NULL);
	pthread_cond_destroy(&helper->more);
	pthread_mutex_destroy(&helper->mutex);
}

void mp_linux_helper_queue(struct mp_linux *linux_driver, struct mp_io *io)
{
	struct mp_linux_helper *helper = &linux_driver->helper;

	helper->pending++;
	pthread_mutex_lock(&helper->mutex);
	mp_linux_list_push(&helper->todo, io);
	pthread_cond_signal(&helper->more);
	pthread_mutex_unlock(&helper->mutex);
}

int64_t mp_linux_helper_collect(struct mp_linux *linux_driver)
{
	struct mp_linux_helper *helper = &linux_driver->helper;
	int64_t handled = 0;

	if (helper->pending == 0)
		return 0;
	pthread_mutex_lock(&helper->mutex);
	struct mp_linux_list finished = helper->finished;
	helper->finished = (struct mp_linux_list){NULL, NULL, 0};
	pthread_mutex_unlock(&helper->mutex);
	while (finished.count > 0) {
		struct mp_io *io = mp_linux_list_pop(&finished);
		helper->pending--;
		if (io->op == MP_OP_REMOVE && io->result == 0 && !linux_driver->files.is_device)
			mp_linux_file_forget(&linux_driver->files, io->file);
		io->done(io);
		handled++;
	}
	return handled;
}
