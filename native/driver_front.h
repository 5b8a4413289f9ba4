/* driver_front.h - a table in front of another driver: every call passes, unless it is taken over.
 *
 * For disks that are slower (driver_slow.c) or fail (driver_failing.c): whoever needs one embeds a
 * struct front as its first member, calls front_init, and puts functions of its own into the table.
 */
#ifndef MILLPOND_DRIVER_FRONT_H
#define MILLPOND_DRIVER_FRONT_H

#include "driver.h"

struct front {
	struct mp_driver table; /* table.self is this front */
	struct mp_driver *inner;
};

/* Owns inner from here: the table's destroy ends it, and frees the front. Any thread. */
void front_init(struct front *front, struct mp_driver *inner);
/* What the table's wait and destroy do unless they are taken over. Reactor thread only. */
int64_t front_wait(void *self, int64_t timeout_ns);
void front_destroy(void *self);

#endif
