/* driver_linux.h - the inside of the real driver: shared by driver_linux*.c, by nobody else.
 *
 * Ownership: the reactor thread owns everything but what is marked; the helper thread touches
 * only struct mp_linux_helper under its mutex, the ios that are queued there, and the directory
 * descriptor.
 */
#ifndef MILLPOND_DRIVER_LINUX_H
#define MILLPOND_DRIVER_LINUX_H

#include <linux/aio_abi.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "driver_private.h"

enum {
	MP_LINUX_AIO_DEPTH = 256,    /* in flight in the kernel; the rest waits in a list here */
	MP_LINUX_AIO_BATCH = 8,      /* per io_submit; see README-driver.md for why not 64 */
	/* open segments; more than can be in flight, so one is always idle */
	MP_LINUX_FILES = 512,
	MP_LINUX_FILE_BUCKETS = 256, /* of the table that finds them; a power of two */
	MP_LINUX_EVENTS = 128        /* per epoll_wait */
};

/* A list of ios, first in first out, linked by io->next. */
struct mp_linux_list {
	struct mp_io *first, *last;
	uint32_t count;
};

/* An open file. The device is one of these as well, never evicted. */
struct mp_linux_file {
	uint64_t number;
	int fd;
	uint32_t in_flight;
	/* removed: in no table, closed by its last release */
	bool forgotten;
	struct mp_linux_file *bucket_next;
	struct mp_linux_file *older, *newer;   /* by last use; the free list uses older */
};

struct mp_linux_files {
	bool is_device;
	int directory_fd;                      /* or the device's fd */
	uint64_t device_bytes;
	struct mp_linux_file device;
	struct mp_linux_file *buckets[MP_LINUX_FILE_BUCKETS];
	struct mp_linux_file *oldest, *newest, *unused;
	struct mp_linux_file pool[MP_LINUX_FILES];
};

/* What an io that the kernel cut short still has to do. */
struct mp_linux_rest {
	uint64_t done_bytes;
	uint32_t iov_count;
	struct iovec iov[];
};

/* In io->driver_private. may_alias: the bytes are declared as uint64_t. */
struct __attribute__((may_alias)) mp_linux_private {
	struct iocb control;
	struct mp_linux_rest *rest;
	struct mp_linux_file *file;
};
_Static_assert(sizeof(struct mp_linux_private) <= sizeof(((struct mp_io *)0)->driver_private),
	       "an iocb and two pointers fit into the io");

struct mp_linux_helper {
	pthread_t thread;
	pthread_mutex_t mutex;                 /* of the three below */
	pthread_cond_t more;
	struct mp_linux_list todo, finished;
	bool stopping;
	uint32_t pending;                      /* queued and not collected; reactor thread's */
};

struct mp_linux_watch {
	void *context;
	uint32_t interest;                     /* 0: not in the epoll set */
	/* a ready event of an earlier owner of this fd differs */
	uint32_t generation;
	bool used;
};

struct mp_linux {
	struct mp_driver table;
	int epoll_fd, aio_fd, wake_fd, notify_fd;
	struct mp_linux_files files;
	struct mp_linux_helper helper;

	aio_context_t aio;
	uint32_t aio_depth, aio_in_flight;
	bool aio_sync_refused;                 /* no IOCB_CMD_FDSYNC here: the helper syncs */
	/* the kernel had no memory for a first io: try again soon */
	bool aio_starved;
	bool pwait2_refused;                   /* kernel before 5.11: milliseconds only */
	struct mp_linux_list waiting;          /* for a place in the kernel */
	/* result known without the kernel; done runs in wait */
	struct mp_linux_list finished;

	struct mp_linux_watch *watches;        /* by socket number */
	uint32_t watch_capacity, watched;
	bool in_wait;
	bool poll_pays;                        /* the last sleep was shorter than poll_ns */

	atomic_bool woken;                     /* any thread */
	atomic_bool sleeping;                  /* written by the reactor, read by any thread */
};

static inline struct mp_linux_private *mp_linux_private(struct mp_io *io)
{
	return (struct mp_linux_private *)io->driver_private;
}

void mp_linux_list_push(struct mp_linux_list *list, struct mp_io *io);
struct mp_io *mp_linux_list_pop(struct mp_linux_list *list);

/* driver_linux_files.c. Reactor thread only; from list_files on: any thread. */
void mp_linux_files_init(struct mp_linux_files *files, int fd, bool is_device);
void mp_linux_files_close(struct mp_linux_files *files);
int mp_linux_file_acquire(struct mp_linux_files *files, uint64_t number,
			  struct mp_linux_file **out);
void mp_linux_file_release(struct mp_linux_files *files, struct mp_linux_file *file);
void mp_linux_file_forget(struct mp_linux_files *files, uint64_t number);
int mp_linux_device_room(struct mp_linux_files *files, uint64_t end_bytes);
int64_t mp_linux_list_files(const struct mp_linux_files *files, uint64_t *numbers,
			    uint64_t capacity);
int64_t mp_linux_file_length(const struct mp_linux_files *files, uint64_t number);
/* fd, -errno */
int mp_linux_file_open(const struct mp_linux_files *files, uint64_t number, int flags);
int64_t mp_linux_file_create(const struct mp_linux_files *files, uint64_t number);
int64_t mp_linux_file_remove(const struct mp_linux_files *files, uint64_t number);

/* driver_linux_aio.c. Reactor thread only. */
int mp_linux_aio_open(struct mp_linux *linux_driver);
void mp_linux_aio_close(struct mp_linux *linux_driver);
void mp_linux_aio_flush(struct mp_linux *linux_driver);
int64_t mp_linux_aio_reap(struct mp_linux *linux_driver);

/* driver_linux_helper.c. Reactor thread only. */
int mp_linux_helper_start(struct mp_linux *linux_driver);
void mp_linux_helper_stop(struct mp_linux *linux_driver);
void mp_linux_helper_queue(struct mp_linux *linux_driver, struct mp_io *io);
int64_t mp_linux_helper_collect(struct mp_linux *linux_driver);

/* driver_linux.c. Any thread. */
void mp_linux_wake(void *self);

#endif
