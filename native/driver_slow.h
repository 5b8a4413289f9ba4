/* driver_slow.h - a disk that is slower than the one there is, for benchmarks. */
#ifndef MILLPOND_DRIVER_SLOW_H
#define MILLPOND_DRIVER_SLOW_H

#include "driver.h"

/* cdef: begin */
enum { MP_SLOW_ARMS_MAX = 64 };
/* In front of inner: READs are served by so many arms, each of which takes latency_ns for one;
 * everything else passes. Owns inner. NULL and errno: EINVAL, ENOMEM. */
struct mp_driver *mp_driver_slow(struct mp_driver *inner, uint32_t arms, uint64_t latency_ns);
void mp_driver_slow_set(struct mp_driver *driver, uint64_t latency_ns); /* any thread */
/* cdef: end */

#endif
