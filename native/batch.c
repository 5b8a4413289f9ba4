/* batch.c - a whole BATCH payload from one flat range of blocks: import, tests; no data path.
 *
 * Happy path, part by part: walk the range once to count extents (what is zero decides, compression
 * does not), which tells where the payload starts; walk it again to encode; seal all parts at the
 * end, when the last sequence is known. Zero blocks are not stored: a run of them is one extent.
 * Failure modes: -EINVAL arguments that no batch can carry; -ENOSPC out, a frame or the number of
 * parts is exhausted (give it fewer blocks). Nothing is kept: the caller throws out away.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "record.h"

struct range {
	uint64_t first_block;
	uint64_t block_count;
	const uint8_t *data;
};

static uint64_t align8(uint64_t value)
{
	return (value + 7) & ~UINT64_C(7);
}

/* Blocks of the next extent at the head of range: a whole run of zero blocks, or data blocks up to
 * a zero block or to the next multiple of MP_EXTENT_BLOCKS. */
static uint64_t next_run(const struct range *range, int *zero)
{
	uint64_t limit = MP_EXTENT_BLOCKS - range->first_block % MP_EXTENT_BLOCKS, count = 1;

	*zero = mp_is_zero(range->data, MP_BLOCK_BYTES);
	if (*zero || limit > range->block_count)
		limit = range->block_count;
	while (count < limit &&
	       mp_is_zero(range->data + count * MP_BLOCK_BYTES, MP_BLOCK_BYTES) == *zero)
		count++;
	return count;
}

static void advance(struct range *range, uint64_t block_count)
{
	range->first_block += block_count;
	range->block_count -= block_count;
	range->data += block_count * MP_BLOCK_BYTES;
}

/* How many extents the next part takes: as many as fit when nothing shrinks. */
static uint32_t count_extents(struct range range)
{
	uint64_t raw_bytes = 0;
	uint32_t count = 0;

	while (range.block_count && count < MP_RECORD_EXTENTS_MAX) {
		int zero;
		uint64_t blocks = next_run(&range, &zero);

		if (!zero)
			raw_bytes += blocks * MP_BLOCK_BYTES;
		if (raw_bytes > MP_RECORD_PAYLOAD_MAX)
			break;
		advance(&range, blocks);
		count++;
	}
	return count;
}

/* Encode one part, but for what only the end of the batch tells. Returns its padded length. */
static int64_t encode_part(struct mp_record *header, struct range *range, uint64_t *sequence,
			   uint8_t *out, uint64_t capacity_bytes)
{
	uint64_t end = MP_RECORD_HEADER_BYTES, payload_start;

	header->extent_count = count_extents(*range);
	payload_start = end + (uint64_t)header->extent_count * MP_EXTENT_BYTES;
	header->header_length_bytes = payload_start;
	end = payload_start;
	for (uint32_t i = 0; i < header->extent_count; i++) {
		struct mp_extent extent = {.sequence = (*sequence)++};
		int zero;
		uint64_t blocks = next_run(range, &zero);
		uint64_t raw_bytes = zero ? 0 : blocks * MP_BLOCK_BYTES;

		if (align8(end + raw_bytes) > capacity_bytes)
			return -ENOSPC;
		/* A run of zeroes is encoded as its first block and then lengthened. */
		end += (uint64_t)mp_extent_encode(&extent, header->volume, range->first_block,
						  zero ? 1 : (uint32_t)blocks, range->data,
						  out + end);
		extent.block_count = blocks;
		memcpy(out + MP_RECORD_HEADER_BYTES + (size_t)i * MP_EXTENT_BYTES, &extent,
		       sizeof extent);
		advance(range, blocks);
	}
	header->payload_length_bytes = end - payload_start;
	memset(out + end, 0, align8(end) - end);
	memcpy(out, header, sizeof *header);
	return (int64_t)align8(end);
}

static void seal_parts(uint8_t *out, uint64_t length_bytes, uint64_t last_sequence)
{
	for (uint64_t offset = 0; offset < length_bytes;) {
		struct mp_record *header = (struct mp_record *)(void *)(out + offset);

		offset += align8(header->header_length_bytes + header->payload_length_bytes);
		header->last_sequence = last_sequence;
		if (offset == length_bytes)
			header->flags = MP_RECORD_LAST_OF_BATCH;
		mp_record_seal(header);
	}
}

int64_t mp_batch_encode(const uint8_t *volume, uint64_t lineage, uint64_t epoch,
			uint64_t first_sequence, uint64_t first_block, uint64_t block_count,
			const void *data, void *out, uint64_t capacity_bytes,
			uint64_t *last_sequence)
{
	struct mp_record header = {.type = MP_RECORD_BATCH, .lineage = lineage, .epoch = epoch,
				   .first_sequence = first_sequence};
	struct range range = {first_block, block_count, data};
	uint64_t sequence = first_sequence, length_bytes = 0;

	assert((uintptr_t)out % _Alignof(struct mp_record) == 0);
	if (mp_is_zero(volume, MP_VOLUME_ID_BYTES) || block_count == 0 || first_sequence == 0 ||
	    block_count > UINT64_MAX - first_sequence ||
	    block_count > INT64_MAX / MP_BLOCK_BYTES ||
	    first_block > INT64_MAX / MP_BLOCK_BYTES - block_count)
		return -EINVAL;
	memcpy(header.volume, volume, sizeof header.volume);
	if (capacity_bytes > MP_FRAME_PAYLOAD_MAX)
		capacity_bytes = MP_FRAME_PAYLOAD_MAX;
	for (; range.block_count; header.part_index++) {
		int64_t part_bytes;

		if (header.part_index == MP_BATCH_PARTS_MAX)
			return -ENOSPC;
		part_bytes = encode_part(&header, &range, &sequence, (uint8_t *)out + length_bytes,
					 capacity_bytes - length_bytes);
		if (part_bytes < 0)
			return part_bytes;
		length_bytes += (uint64_t)part_bytes;
	}
	seal_parts(out, length_bytes, sequence - 1);
	*last_sequence = sequence - 1;
	return (int64_t)length_bytes;
}
