/* driver_sim.h - the simulated world: one disk (device or directory), sockets, clock and chance.
 *
 * Deterministic: everything follows from the seed and from the calls made. A world survives its
 * drivers: crash ends the running driver (nothing completes any more, wait returns -ESHUTDOWN),
 * and a new driver may be made on the same world, which then holds what a real disk would hold.
 * All functions: the one test thread.
 */
#ifndef MILLPOND_DRIVER_SIM_H
#define MILLPOND_DRIVER_SIM_H

#include "driver.h"

/* cdef: begin */
struct mp_sim;
struct mp_sim_options {
	uint64_t seed;
	uint64_t device_bytes;          /* > 0: file 0 exists with this length; 0: a directory */
	/* 1: power loss; 0: a crash of the daemon alone (all completed stays) */
	uint32_t lose_unsynced;
	uint32_t tear;                  /* 1: unsynced writes survive in random 512-byte pieces */
	/* 1: completions in random order, in flight and unsynced alike */
	uint32_t reorder;
	uint32_t latency_ns;            /* of an I/O, in virtual time; varied by the seed */
	/* crash when this many WRITE, SYNC, PUNCH, ALLOCATE, CREATE, REMOVE were submitted;
	 * the last one is in flight; 0: never */
	uint64_t crash_after_io;
	/* the nth READ/WRITE/SYNC... fails with fail_errno, and so many from it on; 0: never */
	uint64_t fail_io, fail_count;
	int32_t fail_errno;
	uint32_t fail_op;               /* enum mp_op counted by fail_io; 0: all */
	uint64_t misdirect_io;          /* the nth WRITE lands elsewhere in its file; 0: never */
	uint64_t capacity_bytes;        /* a directory's disk has no more than this; 0: no limit */
};
struct mp_sim *mp_sim_new(const struct mp_sim_options *options);
void mp_sim_free(struct mp_sim *sim);
/* counters start again; the disk stays; device_bytes is ignored */
void mp_sim_set(struct mp_sim *sim, const struct mp_sim_options *options);
struct mp_driver *mp_sim_driver(struct mp_sim *sim); /* one at a time; destroy it before the next */
void mp_sim_crash(struct mp_sim *sim);               /* now */
int mp_sim_crashed(const struct mp_sim *sim);
uint64_t mp_sim_io_count(const struct mp_sim *sim);  /* mutating I/Os submitted since new or set */
uint64_t mp_sim_count(const struct mp_sim *sim, uint32_t op); /* completed I/Os of one enum mp_op */
uint64_t mp_sim_now_ns(const struct mp_sim *sim);
void mp_sim_advance_ns(struct mp_sim *sim, uint64_t duration_ns);
/* 1 if notify was called since the last time */
int mp_sim_notified(struct mp_sim *sim);
int64_t mp_sim_peek(struct mp_sim *sim, uint64_t file, uint64_t offset_bytes, void *out,
		    uint64_t length_bytes);
int64_t mp_sim_poke(struct mp_sim *sim, uint64_t file, uint64_t offset_bytes, const void *in,
		    uint64_t length_bytes);
uint64_t mp_sim_allocated_bytes(struct mp_sim *sim); /* of the whole disk; punched ranges are not */
int mp_sim_socket(struct mp_sim *sim);               /* a new socket number for the core */
/* to core */
int64_t mp_sim_socket_push(struct mp_sim *sim, int socket, const void *bytes, uint64_t length);
/* from core; 0: nothing now; -EPIPE: nothing, and the core closed it */
int64_t mp_sim_socket_pop(struct mp_sim *sim, int socket, void *out, uint64_t capacity);
/* what was pushed and the core has not received */
uint64_t mp_sim_socket_take_back(struct mp_sim *sim, int socket, void *out, uint64_t capacity);
/* unread bytes before -EAGAIN */
void mp_sim_socket_limit(struct mp_sim *sim, int socket, uint64_t bytes);
void mp_sim_socket_hangup(struct mp_sim *sim, int socket);
/* cdef: end */

#endif
