/* extent.c - encode, verify and decode one extent: up to four blocks stored together.
 *
 * Happy path: encode chooses zero, LZ4 or raw and leaves a checksum that names the place (origin,
 * block); decode checks fields, then the checksum of the stored bytes, and only then looks at what
 * they mean.
 * Failure modes: -EPROTO fields that contradict each other or the bytes at hand; -ENOTSUP a codec
 * that is reserved; -EBADMSG bytes that are not those that were written here. Nothing is read
 * beyond stored_bytes, nothing written beyond block_count * 4096. After an error out means nothing.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include <lz4.h>

#include "record.h"

enum { EXTENT_RAW_MAX = MP_EXTENT_BLOCKS * MP_BLOCK_BYTES };

/* The highest end of an extent: byte offsets of guests (NBD, off_t) are signed 64-bit numbers. */
static const uint64_t block_limit = INT64_MAX / MP_BLOCK_BYTES;

int64_t mp_extent_encode(struct mp_extent *extent, const uint8_t *origin, uint64_t first_block,
			 uint32_t block_count, const void *data, void *out)
{
	uint32_t raw_bytes = block_count * MP_BLOCK_BYTES;
	uint64_t seed = mp_volume_seed(origin), sequence = extent->sequence;
	LZ4_stream_t state; /* 16 KiB, here because nothing may allocate */
	int packed_bytes = 0;

	assert(block_count >= 1 && block_count <= MP_EXTENT_BLOCKS);
	assert(first_block <= block_limit - block_count);
	memset(extent, 0, sizeof *extent);
	memcpy(extent->origin, origin, sizeof extent->origin);
	extent->first_block = first_block;
	extent->block_count = block_count;
	extent->sequence = sequence;
	if (mp_is_zero(data, raw_bytes)) {
		extent->codec = MP_CODEC_ZERO;
		return 0;
	}
	/* The bound makes LZ4 give up, with 0, as soon as it cannot save one eighth. */
	if (!mp_looks_random(data, raw_bytes))
		packed_bytes = LZ4_compress_fast_extState(&state, data, out, (int)raw_bytes,
							  (int)(raw_bytes - raw_bytes / 8), 1);
	if (packed_bytes > 0) {
		extent->codec = MP_CODEC_LZ4;
		extent->stored_length_bytes = (uint32_t)packed_bytes;
		extent->checksum[0] =
			mp_block_checksum(seed, first_block, out, (uint64_t)packed_bytes);
		return packed_bytes;
	}
	extent->codec = MP_CODEC_NONE;
	extent->stored_length_bytes = raw_bytes;
	memcpy(out, data, raw_bytes);
	/* Of the copy: what is checksummed is what is stored, whatever data does meanwhile. */
	for (uint32_t i = 0; i < block_count; i++)
		extent->checksum[i] = mp_block_checksum(
			seed, first_block + i, (const uint8_t *)out + (size_t)i * MP_BLOCK_BYTES,
			MP_BLOCK_BYTES);
	return raw_bytes;
}

/* How many checksums an extent with these fields has and whether its stored length can be true. */
static int expected_checksums(const struct mp_extent *extent)
{
	uint64_t blocks = extent->block_count, stored = extent->stored_length_bytes;

	switch (extent->codec) {
	case MP_CODEC_NONE:
		if (blocks > MP_EXTENT_BLOCKS || stored != blocks * MP_BLOCK_BYTES)
			return -EPROTO;
		return (int)blocks;
	case MP_CODEC_LZ4:
		if (blocks > MP_EXTENT_BLOCKS || stored == 0 || stored >= blocks * MP_BLOCK_BYTES)
			return -EPROTO;
		return 1;
	case MP_CODEC_ZERO:
	case MP_CODEC_TRIM:
		return stored == 0 ? 0 : -EPROTO;
	case MP_CODEC_ZSTD:
		return -ENOTSUP;
	default:
		return -EPROTO;
	}
}

int mp_extent_check(const struct mp_extent *extent)
{
	int checksums = expected_checksums(extent);
	uint8_t holes = 0;

	if (checksums < 0)
		return checksums;
	if (extent->block_count == 0 || extent->block_count > block_limit ||
	    extent->first_block > block_limit - extent->block_count)
		return -EPROTO;
	for (int i = 0; i < MP_EXTENT_BLOCKS; i++)
		if ((extent->checksum[i] != 0) != (i < checksums))
			return -EPROTO;
	for (size_t i = 0; i < sizeof extent->reserved0; i++)
		holes |= extent->reserved0[i];
	for (size_t i = 0; i < sizeof extent->nonce; i++)
		holes |= extent->nonce[i];
	for (size_t i = 0; i < sizeof extent->tag; i++)
		holes |= extent->tag[i];
	/* An all-zero id is nobody's: data without a writer cannot be. A hole may have none. */
	if (checksums > 0 && mp_is_zero(extent->origin, sizeof extent->origin))
		return -EPROTO;
	return holes ? -EPROTO : 0;
}

/* Raw: the blocks wanted are there and only they. */
static int verify_raw(const struct mp_extent *extent, uint32_t skip_blocks, uint32_t block_count,
		      const uint8_t *stored, uint64_t stored_bytes)
{
	uint64_t seed = mp_volume_seed(extent->origin);

	if (stored_bytes != (uint64_t)block_count * MP_BLOCK_BYTES)
		return -EPROTO;
	for (uint32_t i = skip_blocks; i < skip_blocks + block_count; i++, stored += MP_BLOCK_BYTES)
		if (mp_block_checksum(seed, extent->first_block + i, stored, MP_BLOCK_BYTES) !=
		    extent->checksum[i])
			return -EBADMSG;
	return 0;
}

int mp_extent_verify(const struct mp_extent *extent, uint32_t skip_blocks, uint32_t block_count,
		     const void *stored, uint64_t stored_bytes)
{
	int error = mp_extent_check(extent);

	if (error)
		return error;
	if (block_count == 0 || (uint64_t)skip_blocks + block_count > extent->block_count)
		return -EPROTO;
	if (extent->codec == MP_CODEC_NONE)
		return verify_raw(extent, skip_blocks, block_count, stored, stored_bytes);
	if (stored_bytes != extent->stored_length_bytes)
		return -EPROTO;
	if (extent->codec == MP_CODEC_LZ4 &&
	    mp_block_checksum(mp_volume_seed(extent->origin), extent->first_block, stored,
			      stored_bytes) != extent->checksum[0])
		return -EBADMSG;
	return 0;
}

/* stored was verified, so that a failure here means that the encoder lied; still an error, not an
 * assert: the encoder may be another machine. */
static int unpack(const struct mp_extent *extent, uint32_t skip_blocks, uint32_t block_count,
		  const void *stored, void *out)
{
	uint8_t whole[EXTENT_RAW_MAX];
	int raw_bytes = (int)extent->block_count * MP_BLOCK_BYTES;
	void *target = block_count == extent->block_count ? out : whole;

	if (LZ4_decompress_safe(stored, target, (int)extent->stored_length_bytes, raw_bytes) !=
	    raw_bytes)
		return -EBADMSG;
	if (target == whole)
		memcpy(out, whole + (size_t)skip_blocks * MP_BLOCK_BYTES,
		       (size_t)block_count * MP_BLOCK_BYTES);
	return 0;
}

int mp_extent_decode(const struct mp_extent *extent, uint32_t skip_blocks, uint32_t block_count,
		     const void *stored, uint64_t stored_bytes, void *out)
{
	int error = mp_extent_verify(extent, skip_blocks, block_count, stored, stored_bytes);

	if (error)
		return error;
	switch (extent->codec) {
	case MP_CODEC_NONE:
		memcpy(out, stored, stored_bytes);
		return 0;
	case MP_CODEC_LZ4:
		return unpack(extent, skip_blocks, block_count, stored, out);
	default:
		memset(out, 0, (size_t)block_count * MP_BLOCK_BYTES);
		return 0;
	}
}
