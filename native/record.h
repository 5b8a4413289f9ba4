/* record.h - encode and verify records, extents and frames; the only code that knows their layout.
 *
 * All functions: any thread, no state, no allocation, no I/O. Lengths from outside are checked
 * against the limits of format.h before anything is read. Returns >= 0 or -errno: -EBADMSG bad
 * checksum, -EPROTO malformed (bad magic, limits, holes not zero), -ENOTSUP unknown version or
 * incompatible bits.
 */
#ifndef MILLPOND_RECORD_H
#define MILLPOND_RECORD_H

#include "format.h"

/* cdef: begin */
/* Seed of a data checksum. volume_seed is mp_volume_seed(origin): compute once per volume. */
uint64_t mp_volume_seed(const uint8_t *volume);
uint64_t mp_block_checksum(uint64_t volume_seed, uint64_t block, const void *data,
			   uint64_t length_bytes);
/* Whole, aligned-or-not buffer of zeroes? Length a multiple of 8. */
int mp_is_zero(const void *data, uint64_t length_bytes);
/* Cheap estimate from a sample of bytes: 1 when LZ4 is not worth trying. */
int mp_looks_random(const void *data, uint64_t length_bytes);

/* Encode block_count (1 to MP_EXTENT_BLOCKS) raw blocks as one extent: all zero -> MP_CODEC_ZERO;
 * shrinks by at least one eighth -> LZ4; else raw with a checksum per block. Fills all of extent
 * but sequence; writes the stored bytes to out (capacity >= block_count * 4096). Returns the stored
 * length. */
int64_t mp_extent_encode(struct mp_extent *extent, const uint8_t *origin, uint64_t first_block,
			 uint32_t block_count, const void *data, void *out);
/* Verify the stored bytes of an extent: whole (wanted_skip 0, wanted_blocks = block_count) or, raw
 * only, the wanted blocks. -EBADMSG when a checksum differs. */
int mp_extent_verify(const struct mp_extent *extent, uint32_t skip_blocks, uint32_t block_count,
		     const void *stored, uint64_t stored_bytes);
/* Verify and decode the wanted blocks of an extent to out (block_count * 4096). stored holds what a
 * READ_REPLY ships: raw: just the wanted blocks; compressed: the whole extent; zero or trim:
 * nothing. */
int mp_extent_decode(const struct mp_extent *extent, uint32_t skip_blocks, uint32_t block_count,
		     const void *stored, uint64_t stored_bytes, void *out);
/* Fields of an extent that are checkable without data: codec, counts, lengths, holes, no
 * wrap-around. */
int mp_extent_check(const struct mp_extent *extent);

/* Seal a record whose header fields and table are filled: sets magic, version, and checksum.
 * header_length_bytes, extent_count and the payload length must be set; table and padding follow
 * the header in memory. */
void mp_record_seal(struct mp_record *record);
/* Verify header and table of the record at bytes; length is what is available. Returns the whole
 * record's length in bytes (header_length + payload_length), which may exceed length: the payload
 * is not looked at. -EAGAIN: length is shorter than the header needs. */
int64_t mp_record_check(const void *bytes, uint64_t length_bytes);
/* Verify every data extent of a whole record that passed mp_record_check. 0 or -EBADMSG. Also the
 * payload checksum of VOLUME, PAGES and CHECKPOINT records. */
int mp_record_check_payload(const void *bytes, uint64_t length_bytes);
uint64_t mp_xxh3(const void *data, uint64_t length_bytes);  /* unseeded XXH3-64; 0 is mapped to 1 */

/* Frames. mp_frame_seal sets magic, version and checksum over header and checked_bytes of payload
 * (which must follow in memory). mp_frame_check: total frame length, -EAGAIN when more bytes are
 * needed for header or checked part, else as above. */
void mp_frame_seal(struct mp_frame *frame);
int64_t mp_frame_check(const void *bytes, uint64_t length_bytes);

/* A whole BATCH payload from a flat list of block ranges (import, tests): parts of at most
 * MP_RECORD_PAYLOAD_MAX. data holds block_count blocks starting at first_block; sequence numbers
 * first_sequence.. one per extent. Returns bytes written to out, or -ENOSPC. */
int64_t mp_batch_encode(const uint8_t *volume, uint64_t lineage, uint64_t epoch,
			uint64_t first_sequence, uint64_t first_block, uint64_t block_count,
			const void *data, void *out, uint64_t capacity_bytes,
			uint64_t *last_sequence);
/* cdef: end */

uint64_t mp_xxh3_seeded(uint64_t seed, const void *data, uint64_t length_bytes); /* never 0 */

#endif
