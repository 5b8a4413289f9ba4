/* driver.h - the whole outside world (disk, clock, chance, sockets) behind one table.
 *
 * Two implementations: driver_linux.c (epoll, Linux AIO on O_DIRECT, one helper thread for calls
 * that block) and driver_sim.c (deterministic: one seed orders, delays, loses, tears, fails and
 * crashes). The core owns no file descriptor, thread or clock of its own, so that every line of
 * it runs in both.
 *
 * A core object (engine, store) owns one driver and is driven by one thread: its reactor. All
 * functions here are "reactor thread only" except wake and notify. Completions run inside wait,
 * in that thread.
 */
#ifndef MILLPOND_DRIVER_H
#define MILLPOND_DRIVER_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* cdef: begin */
enum mp_op {
	MP_OP_READ = 1,   /* iov <- file at offset; whole length or an error (past the end: -EIO) */
	/* iov -> file at offset; whole length or an error; not durable before a SYNC */
	MP_OP_WRITE,
	/* fdatasync: every WRITE, PUNCH, ALLOCATE of the file completed before is durable */
	MP_OP_SYNC,
	MP_OP_PUNCH,      /* [offset, offset + length) reads as zeroes and is given back */
	MP_OP_ALLOCATE,   /* [offset, offset + length) is reserved: later writes meet no ENOSPC */
	/* file number comes into being, empty; durable (with its directory) when done */
	MP_OP_CREATE,
	MP_OP_REMOVE,     /* file number ceases to be; durable when done */
	/* run call(io) off the reactor thread: compression, checksums of large batches */
	MP_OP_CALL
};
enum { MP_SOCKET_READ = 1, MP_SOCKET_WRITE = 2, MP_SOCKET_HANGUP = 4 };

struct mp_driver;
/* driver_linux.c. fd or directory is opened by the caller (Python), ownership passes on success.
 * The device must have been opened O_DIRECT (else EINVAL). Any thread; NULL and errno on
 * failure. */
struct mp_driver *mp_driver_linux_device(int fd);
struct mp_driver *mp_driver_linux_directory(int directory_fd);
int mp_driver_linux_notify_fd(struct mp_driver *driver); /* eventfd to watch; the driver owns it */
void mp_driver_destroy(struct mp_driver *driver);
/* cdef: end */

/* One asynchronous operation. The submitter owns it, and every byte that iov points to, until
 * done runs. Buffers, offsets and lengths of READ and WRITE are multiples of MP_BLOCK_BYTES
 * (O_DIRECT). */
struct mp_io {
	uint32_t op;
	uint32_t iov_count;              /* at most MP_IOV_MAX */
	uint64_t file;                   /* a device: 0; a store directory: file number */
	uint64_t offset_bytes;
	uint64_t length_bytes;
	struct iovec *iov;
	void (*done)(struct mp_io *io);  /* may submit, may free io */
	void (*call)(struct mp_io *io);  /* MP_OP_CALL only */
	void *context;                   /* the submitter's */
	int64_t result;                  /* >= 0, or -errno */
	struct mp_io *next;              /* the driver's while submitted */
	uint64_t driver_private[10];     /* the driver's while submitted (holds a struct iocb) */
};

enum { MP_IOV_MAX = 512 };

struct mp_driver {
	void *self;
	uint64_t (*now_ns)(void *self);                  /* monotonic */
	void (*random_bytes)(void *self, void *buffer, size_t length);
	/* Disk. submit takes ownership of each io until its done; it never fails, a full queue
	 * waits inside. */
	void (*submit)(void *self, struct mp_io *const *ios, uint32_t count);
	int64_t (*file_length_bytes)(void *self, uint64_t file);              /* or -errno */
	/* count, or -errno */
	int64_t (*list_files)(void *self, uint64_t *numbers, uint64_t capacity);
	/* Sockets: non-blocking, -EAGAIN when they would. receive returns 0 at the end of the
	 * stream. */
	int64_t (*receive)(void *self, int socket, struct iovec *iov, int count);
	int64_t (*send)(void *self, int socket, const struct iovec *iov, int count);
	/* Again to change interest. 0: nothing is reported, not even a hangup. */
	int (*watch)(void *self, int socket, uint32_t interest, void *context);
	/* What the peer has given up, watched or not: 0, MP_SOCKET_READ (it sends no more), and
	 * MP_SOCKET_HANGUP (nor does it receive). */
	uint32_t (*closed_by_peer)(void *self, int socket);
	/* unwatches; no ready call for it after this */
	void (*close_socket)(void *self, int socket);
	/* it is the caller's: watched no more, and not closed */
	void (*release_socket)(void *self, int socket);
	/* set by the core before watch */
	void (*on_ready)(void *owner, void *context, uint32_t ready);
	void *owner;                                     /* passed to on_ready */
	/* How long wait may poll before it sleeps while the disk works; 0: sleep at once. Set by
	 * the core; a driver may ignore it. */
	uint64_t poll_ns;
	/* Run completions and ready sockets; sleep at most timeout_ns (0: poll, < 0: for ever)
	 * for the first. Returns the number of events handled, or -errno when the world has
	 * ended (simulated crash). */
	int64_t (*wait)(void *self, int64_t timeout_ns);
	void (*wake)(void *self);                        /* any thread: wait returns soon */
	/* any thread: tells the control plane to drain */
	void (*notify)(void *self);
	/* nothing may be in flight (real); frees the table */
	void (*destroy)(void *self);
};

/* helper.c: submit one io and wait until it is done; recovery only, never on a data path. */
int64_t mp_driver_do(struct mp_driver *driver, struct mp_io *io);
int64_t mp_driver_read(struct mp_driver *driver, uint64_t file, uint64_t offset_bytes, void *buffer,
		       uint64_t length_bytes);
int64_t mp_driver_write(struct mp_driver *driver, uint64_t file, uint64_t offset_bytes,
			const void *buffer, uint64_t length_bytes);
int64_t mp_driver_sync(struct mp_driver *driver, uint64_t file);

#endif
