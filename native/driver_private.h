/* driver_private.h - what the two drivers share: the check every operation passes.
 *
 * Both drivers assert the same facts, so that a core that runs in the simulator cannot meet its
 * first EINVAL from O_DIRECT on a real disk. A violation is our bug, never the peer's: assert.
 */
#ifndef MILLPOND_DRIVER_PRIVATE_H
#define MILLPOND_DRIVER_PRIVATE_H

#include <assert.h>

#include "driver.h"
#include "format.h"

static inline void mp_driver_check_transfer(const struct mp_io *io)
{
	uint64_t total_bytes = 0;

	assert(io->iov_count <= MP_IOV_MAX);
	for (uint32_t i = 0; i < io->iov_count; i++) {
		assert((uintptr_t)io->iov[i].iov_base % MP_BLOCK_BYTES == 0);
		assert(io->iov[i].iov_len % MP_BLOCK_BYTES == 0);
		total_bytes += io->iov[i].iov_len;
	}
	assert(total_bytes == io->length_bytes);
}

static inline void mp_driver_check(const struct mp_io *io)
{
	assert(io->op >= MP_OP_READ && io->op <= MP_OP_CALL);
	assert(io->done != NULL);
	if (io->op == MP_OP_CALL)
		assert(io->call != NULL);
	if (io->op == MP_OP_READ || io->op == MP_OP_WRITE)
		mp_driver_check_transfer(io);
	if (io->op == MP_OP_READ || io->op == MP_OP_WRITE || io->op == MP_OP_PUNCH ||
	    io->op == MP_OP_ALLOCATE) {
		assert(io->offset_bytes % MP_BLOCK_BYTES == 0);
		assert(io->length_bytes % MP_BLOCK_BYTES == 0);
		assert(io->offset_bytes <= INT64_MAX);
		assert(io->length_bytes <= INT64_MAX - io->offset_bytes);
	}
}

#endif
