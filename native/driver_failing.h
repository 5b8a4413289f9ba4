/* driver_failing.h - a disk that fails when it is told to, for tests.
 *
 * No product code makes one: tests/torture/failing.py puts it between a daemon and its disk, and
 * tests/test_tidy.py sees to it that nobody else does.
 */
#ifndef MILLPOND_DRIVER_FAILING_H
#define MILLPOND_DRIVER_FAILING_H

#include "driver.h"

/* cdef: begin */
/* Which operations fail from now on. They are counted from the moment the rule is set. */
struct mp_failing_rule {
	uint32_t op;                     /* enum mp_op; 0: none */
	uint32_t error;                  /* errno: EIO, ENOSPC */
	/* Only those that begin in [first_byte, end_byte) of their file; SYNC has no place. */
	uint64_t first_byte, end_byte;
	uint64_t skip;                   /* so many pass */
	uint64_t count;                  /* then so many fail, and the rest passes */
};
/* In front of inner, which it owns. NULL: no memory. */
struct mp_driver *mp_driver_failing(struct mp_driver *inner);
/* any thread */
void mp_driver_failing_set(struct mp_driver *driver, const struct mp_failing_rule *rule);
/* How many have failed since the rule was set; any thread. */
uint64_t mp_driver_failing_count(struct mp_driver *driver);
/* cdef: end */

#endif
