/* buffers.c - aligned I/O buffers of five sizes under one byte budget.
 *
 * Happy path: each size has an address range of its own, as long as the budget, so sizes cannot
 * fragment each other. get takes the warmest free buffer of its size; only when there is none it
 * takes one whose pages were given back, or the next one that was never used. Free lists are arrays
 * beside the buffers: a buffer that comes back is not written to.
 *
 * Failure modes: above the budget get returns NULL and the caller waits. A put of what is not out
 * (twice, a wrong size, a stray pointer) is our own error and asserts. Address space beyond what is
 * in use is mapped without access, so that strict overcommit accounting does not count it.
 */
#include "buffers.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "poison.h"

enum { SIZES = 5, CHUNK_BYTES = 4194304 };

/* One size: its range and its free buffers, by index within the range. */
struct size_class {
	uint8_t *base;
	uint64_t size_bytes;
	uint32_t count;       /* how many the budget allows */
	uint32_t fresh;       /* from here on never handed out */
	uint64_t open_bytes;  /* of the range that may be accessed */
	uint32_t *warm;       /* stack: free, may be backed by memory */
	uint32_t *cold;       /* stack: free, given back to the kernel */
	uint32_t warm_count, cold_count;
	uint8_t *is_out;      /* per buffer */
};

struct mp_buffers {
	struct size_class classes[SIZES];
	uint64_t budget_bytes;
	uint64_t used_bytes;
	uint64_t warm_bytes;
};

static uint64_t range_bytes(const struct size_class *class)
{
	uint64_t bytes = class->count * class->size_bytes;

	return (bytes + CHUNK_BYTES - 1) / CHUNK_BYTES * CHUNK_BYTES;
}

static int class_open(struct size_class *class, uint64_t size_bytes, uint64_t budget_bytes)
{
	void *base;

	class->size_bytes = size_bytes;
	class->count = (uint32_t)(budget_bytes / size_bytes);
	if (class->count == 0)
		return 0;
	/* calloc of this much is lazily zero: what is not used yet costs nothing. */
	class->warm = calloc(class->count, sizeof(*class->warm));
	class->cold = calloc(class->count, sizeof(*class->cold));
	class->is_out = calloc(class->count, sizeof(*class->is_out));
	if (class->warm == NULL || class->cold == NULL || class->is_out == NULL)
		return -ENOMEM;
	base = mmap(NULL, range_bytes(class), PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return -ENOMEM;
	/* A huge page would back 2 MiB for one buffer of 4 KiB, and come again after make_room.
	 * Refused only by kernels without huge pages. */
	(void)madvise(base, range_bytes(class), MADV_NOHUGEPAGE);
	class->base = base;
	return 0;
}

static void class_close(struct size_class *class)
{
	if (class->base != NULL) {
		mp_unpoison(class->base, class->open_bytes);
		munmap(class->base, range_bytes(class));
	}
	free(class->warm);
	free(class->cold);
	free(class->is_out);
}

struct mp_buffers *mp_buffers_new(uint64_t budget_bytes)
{
	struct mp_buffers *buffers;
	uint64_t size_bytes = MP_BUFFER_ALIGNMENT_BYTES;

	if (budget_bytes < MP_BUFFER_ALIGNMENT_BYTES ||
	    budget_bytes / MP_BUFFER_ALIGNMENT_BYTES > UINT32_MAX) {
		errno = EINVAL;
		return NULL;
	}
	buffers = calloc(1, sizeof(*buffers));
	if (buffers == NULL)
		return NULL;
	buffers->budget_bytes = budget_bytes;
	for (unsigned int n = 0; n < SIZES; n++, size_bytes *= 4) {
		if (class_open(&buffers->classes[n], size_bytes, budget_bytes) < 0) {
			mp_buffers_free(buffers);
			errno = ENOMEM;
			return NULL;
		}
	}
	return buffers;
}

uint64_t mp_buffers_free(struct mp_buffers *buffers)
{
	uint64_t out_bytes;

	if (buffers == NULL)
		return 0;
	out_bytes = buffers->used_bytes;
	for (unsigned int n = 0; n < SIZES; n++)
		class_close(&buffers->classes[n]);
	free(buffers);
	return out_bytes;
}

/* NULL: longer than any. */
static struct size_class *class_for(struct mp_buffers *buffers, uint64_t length_bytes)
{
	for (unsigned int n = 0; n < SIZES; n++)
		if (length_bytes <= buffers->classes[n].size_bytes)
			return &buffers->classes[n];
	return NULL;
}

/* Give free buffers back until size_bytes more fit into the budget; large ones first. */
static void make_room(struct mp_buffers *buffers, uint64_t size_bytes)
{
	unsigned int n = SIZES;

	while (buffers->used_bytes + buffers->warm_bytes + size_bytes > buffers->budget_bytes) {
		struct size_class *class;
		uint32_t index;

		while (buffers->classes[n - 1].warm_count == 0) {
			n--;
			assert(n > 0); /* used + size is within the budget, so something is warm */
		}
		class = &buffers->classes[n - 1];
		index = class->warm[--class->warm_count];
		/* Fails on locked memory only, which then stays: better that than no engine. */
		(void)madvise(class->base + index * class->size_bytes, class->size_bytes,
			      MADV_DONTNEED);
		class->cold[class->cold_count++] = index;
		buffers->warm_bytes -= class->size_bytes;
	}
}

/* The next buffer that was never used; its chunk becomes accessible first. Index, or -errno. */
static int64_t open_fresh(struct size_class *class)
{
	uint64_t end_bytes = (class->fresh + 1ULL) * class->size_bytes;

	assert(class->fresh < class->count);
	if (end_bytes > class->open_bytes) {
		if (mprotect(class->base + class->open_bytes, CHUNK_BYTES,
			     PROT_READ | PROT_WRITE) != 0)
			return -errno;
		mp_poison(class->base + class->open_bytes, CHUNK_BYTES);
		class->open_bytes += CHUNK_BYTES;
	}
	return class->fresh++;
}

void *mp_buffers_get(struct mp_buffers *buffers, uint64_t length_bytes)
{
	struct size_class *class = class_for(buffers, length_bytes);
	int64_t index;

	if (class == NULL || class->size_bytes > buffers->budget_bytes - buffers->used_bytes)
		return NULL;
	if (class->warm_count > 0) {
		index = class->warm[--class->warm_count];
		buffers->warm_bytes -= class->size_bytes;
	} else {
		make_room(buffers, class->size_bytes);
		if (class->cold_count > 0)
			index = class->cold[--class->cold_count];
		else
			index = open_fresh(class);
		if (index < 0)
			return NULL;
	}
	assert(!class->is_out[index]);
	class->is_out[index] = 1;
	buffers->used_bytes += class->size_bytes;
	mp_unpoison(class->base + (uint64_t)index * class->size_bytes, class->size_bytes);
	return class->base + (uint64_t)index * class->size_bytes;
}

void mp_buffers_put(struct mp_buffers *buffers, void *buffer, uint64_t length_bytes)
{
	struct size_class *class = class_for(buffers, length_bytes);
	uint64_t offset_bytes, index;

	assert(class != NULL && class->base != NULL && (uint8_t *)buffer >= class->base);
	offset_bytes = (uint64_t)((uint8_t *)buffer - class->base);
	index = offset_bytes / class->size_bytes;
	assert(offset_bytes % class->size_bytes == 0 && index < class->fresh);
	assert(class->is_out[index]);
	class->is_out[index] = 0;
	mp_poison(buffer, class->size_bytes);
	class->warm[class->warm_count++] = (uint32_t)index;
	buffers->used_bytes -= class->size_bytes;
	buffers->warm_bytes += class->size_bytes;
}

uint64_t mp_buffers_used_bytes(const struct mp_buffers *buffers)
{
	return buffers->used_bytes;
}

uint64_t mp_buffers_resident_bytes(const struct mp_buffers *buffers)
{
	return buffers->used_bytes + buffers->warm_bytes;
}
