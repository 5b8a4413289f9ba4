/* buffers.h - aligned I/O buffers of five sizes under one byte budget.
 *
 * Engine thread only. Pages that nobody wrote to cost no memory, and memory that was written to
 * never exceeds the budget, whatever sizes were in fashion before. get and put are O(1); a get that
 * needs another size than those that lie free hands at most 2 MiB of them back to the kernel.
 */
#ifndef MILLPOND_BUFFERS_H
#define MILLPOND_BUFFERS_H

#include <stdint.h>

/* cdef: begin */
enum { MP_BUFFER_ALIGNMENT_BYTES = 4096, MP_BUFFER_MAX_BYTES = 1048576 };
struct mp_buffers;
/* budget_bytes bounds what is out at one time, in whole buffers. NULL: errno. */
struct mp_buffers *mp_buffers_new(uint64_t budget_bytes);
/* Rounded up to 4, 16, 64, 256 or 1024 KiB. The content is undefined: it may be an older request's.
 * NULL: over budget now, no memory now, or longer than MP_BUFFER_MAX_BYTES (never served). */
void *mp_buffers_get(struct mp_buffers *buffers, uint64_t length_bytes);
/* length_bytes: as in get, or anything that rounds to the same size. */
void mp_buffers_put(struct mp_buffers *buffers, void *buffer, uint64_t length_bytes);
uint64_t mp_buffers_used_bytes(const struct mp_buffers *buffers);     /* out, rounded up */
uint64_t mp_buffers_resident_bytes(const struct mp_buffers *buffers); /* out, or free but warm */
/* Unmaps everything. Returns the bytes still out: above 0 is a leak, or a simulated crash. */
uint64_t mp_buffers_free(struct mp_buffers *buffers);
/* cdef: end */

#endif
