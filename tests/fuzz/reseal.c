/* reseal.c - checksums made right again, so that a fuzzer gets behind them.
 *
 * Rejected: a fuzz build whose checksum functions say yes to everything. It is shorter, but then
 * the code under test is not the one that ships, and what is told apart by its checksum (a page, a
 * predecessor in a chain) would be one and the same.
 */
#include "fuzz.h"

void reseal_extent(struct mp_extent *extent, const uint8_t *stored, uint64_t available_bytes)
{
	uint64_t seed = mp_volume_seed(extent->origin), i;

	if (extent->codec == MP_CODEC_LZ4 && extent->stored_length_bytes <= available_bytes)
		extent->checksum[0] = mp_block_checksum(seed, extent->first_block, stored,
							extent->stored_length_bytes);
	if (extent->codec != MP_CODEC_NONE || extent->block_count > MP_EXTENT_BLOCKS ||
	    extent->block_count * MP_BLOCK_BYTES > available_bytes)
		return;
	for (i = 0; i < extent->block_count; i++)
		extent->checksum[i] = mp_block_checksum(seed, extent->first_block + i,
							stored + i * MP_BLOCK_BYTES,
							MP_BLOCK_BYTES);
}

static void reseal_extents(const struct mp_record *header, uint8_t *record, uint64_t length_bytes)
{
	uint64_t stored = header->header_length_bytes, i;
	uint64_t count = header->extent_count;

	for (i = 0; i < count; i++) {
		uint64_t at = MP_RECORD_HEADER_BYTES + i * MP_EXTENT_BYTES;
		struct mp_extent extent;

		if (at + sizeof extent > length_bytes || stored > length_bytes)
			return;
		memcpy(&extent, record + at, sizeof extent);
		reseal_extent(&extent, record + stored, length_bytes - stored);
		memcpy(record + at, &extent, sizeof extent);
		stored += extent.stored_length_bytes;
	}
}

void reseal_record(uint8_t *record, uint64_t length_bytes)
{
	struct mp_record header;
	uint64_t sealed;

	if (length_bytes < sizeof header)
		return;
	memcpy(&header, record, sizeof header);
	reseal_extents(&header, record, length_bytes);
	if (header.payload_checksum && header.header_length_bytes <= length_bytes &&
	    header.payload_length_bytes <= length_bytes - header.header_length_bytes)
		header.payload_checksum = mp_xxh3(record + header.header_length_bytes,
						  header.payload_length_bytes);
	sealed = header.header_length_bytes < length_bytes ? header.header_length_bytes
							   : length_bytes;
	memcpy(record, &header, sizeof header);
	if (sealed < sizeof header)
		return;
	header.checksum = mp_xxh3(record + 16, sealed - 16);
	memcpy(record, &header, sizeof header);
}

void reseal_batch(uint8_t *payload, uint64_t length_bytes)
{
	uint64_t at = 0;

	while (length_bytes - at >= MP_RECORD_HEADER_BYTES) {
		struct mp_record header;
		uint64_t bytes;

		reseal_record(payload + at, length_bytes - at);
		memcpy(&header, payload + at, sizeof header);
		bytes = header.header_length_bytes + header.payload_length_bytes;
		bytes = (bytes + 7) / 8 * 8;
		if (header.header_length_bytes > length_bytes || bytes > length_bytes - at ||
		    bytes == 0)
			return;
		at += bytes;
	}
}

uint64_t frame_seal(uint8_t *frame, uint16_t type, uint32_t status, uint64_t request_id,
		    uint64_t payload_bytes, uint64_t checked_bytes)
{
	struct mp_frame header = {.magic = MP_FRAME_MAGIC, .version = MP_WIRE_VERSION,
				  .type = type, .status = status, .request_id = request_id,
				  .payload_bytes = (uint32_t)payload_bytes,
				  .checked_bytes = (uint32_t)checked_bytes};
	uint64_t seed;

	/* Not mp_frame_seal: that asserts what a peer may well do. */
	memcpy(&seed, &header, sizeof seed);
	memcpy(frame, &header, sizeof header);
	header.checksum = mp_xxh3_seeded(seed, frame + 16, sizeof header - 16 + checked_bytes);
	memcpy(frame, &header, sizeof header);
	return sizeof header + payload_bytes;
}
