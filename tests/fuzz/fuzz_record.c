/* fuzz_record.c - frames, records and extents by themselves: as they came, and sealed again.
 *
 * Every buffer ends where its bytes end, so that one byte too far is seen. What passes the checks
 * is used as the cores use it.
 */
#include "fuzz.h"

enum { FRAME, SEALED_FRAME, RECORD, SEALED_RECORD, EXTENT, BATCH, KINDS };

static uint8_t *copy_of(const uint8_t *bytes, uint64_t length_bytes)
{
	uint8_t *copy = malloc(length_bytes ? length_bytes : 1);

	CHECK(copy);
	if (length_bytes)
		memcpy(copy, bytes, length_bytes);
	return copy;
}

static void frame(uint8_t *bytes, uint64_t length_bytes, bool seal)
{
	struct mp_frame header;
	int64_t total;

	if (seal && length_bytes >= sizeof header) {
		memcpy(&header, bytes, sizeof header);
		if (header.checked_bytes <= length_bytes - sizeof header)
			frame_seal(bytes, header.type, header.status, header.request_id,
				   header.payload_bytes, header.checked_bytes);
	}
	total = mp_frame_check(bytes, length_bytes);
	CHECK(total >= (int64_t)sizeof header || total == -EAGAIN || total == -EPROTO ||
	      total == -ENOTSUP || total == -EBADMSG);
	CHECK(total <= (int64_t)sizeof header + MP_FRAME_PAYLOAD_MAX);
}

static void extent(const struct mp_extent *extent, const uint8_t *stored, uint64_t stored_bytes)
{
	uint64_t blocks = extent->block_count < 16 ? extent->block_count : 16, skip, count;

	for (skip = 0; skip <= blocks; skip++)
		for (count = 0; count <= blocks + 1; count++) {
			uint8_t *out = malloc(count * MP_BLOCK_BYTES + 1);
			int rc;

			CHECK(out);
			rc = mp_extent_decode(extent, (uint32_t)skip, (uint32_t)count, stored,
					      stored_bytes, out);
			CHECK(rc == 0 || rc == -EPROTO || rc == -EBADMSG || rc == -ENOTSUP);
			CHECK(rc != 0 || skip + count <= extent->block_count);
			free(out);
		}
}

/* What passed must be usable to its last extent. */
static void use(const uint8_t *bytes, uint64_t length_bytes)
{
	struct mp_record header;
	uint64_t stored;

	memcpy(&header, bytes, sizeof header);
	stored = header.header_length_bytes;
	for (uint32_t i = 0; i < header.extent_count; i++) {
		uint8_t out[MP_EXTENT_BLOCKS * MP_BLOCK_BYTES];
		struct mp_extent each;

		memcpy(&each, bytes + MP_RECORD_HEADER_BYTES + i * sizeof each, sizeof each);
		CHECK(mp_extent_check(&each) == 0);
		CHECK(stored + each.stored_length_bytes <= length_bytes);
		if (each.stored_length_bytes) {
			int rc = mp_extent_decode(&each, 0, (uint32_t)each.block_count,
						  bytes + stored, each.stored_length_bytes, out);
			/* a codec may still find that the encoder lied */
			CHECK(rc == 0 || (rc == -EBADMSG && each.codec == MP_CODEC_LZ4));
		}
		stored += each.stored_length_bytes;
	}
	CHECK(!header.extent_count || stored == length_bytes);
}

static void record(uint8_t *bytes, uint64_t length_bytes, bool seal)
{
	int64_t total;

	if (seal)
		reseal_record(bytes, length_bytes);
	total = mp_record_check(bytes, length_bytes);
	CHECK(total >= MP_RECORD_HEADER_BYTES || total == -EAGAIN || total == -EPROTO ||
	      total == -ENOTSUP || total == -EBADMSG);
	if (total < 0)
		return;
	if ((uint64_t)total > length_bytes)
		CHECK(mp_record_check_payload(bytes, length_bytes) == -EBADMSG);
	else if (mp_record_check_payload(bytes, (uint64_t)total) == 0)
		use(bytes, (uint64_t)total);
}

static void batch(struct input *input)
{
	uint64_t first = input_number(input, 8), count = input_number(input, 1) % 24;
	uint64_t sequence = input_number(input, 8), last = 0, capacity = input_number(input, 3);
	uint8_t *data = calloc(count + 1, MP_BLOCK_BYTES), *out = malloc(capacity + 1);
	const uint8_t *bytes;
	int64_t length;

	CHECK(data && out);
	for (uint64_t i = 0; i < count; i++) {
		uint64_t have = input_bytes(input, 16, &bytes);

		for (uint32_t at = 0; have && at < MP_BLOCK_BYTES; at += 16)
			memcpy(data + i * MP_BLOCK_BYTES + at, bytes, have);
	}
	length = mp_batch_encode((const uint8_t *)"volume of a test", 1, 1, sequence, first, count,
				 data, out, capacity, &last);
	CHECK(length > 0 || length == -EINVAL || length == -ENOSPC);
	if (length > 0)
		CHECK(mp_record_check(out, (uint64_t)length) > 0 &&
		      last >= sequence && (uint64_t)length <= capacity);
	free(data);
	free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
	struct input input = {data, length_bytes};
	uint64_t kind = input_number(&input, 1) % KINDS;
	uint8_t *bytes;

	if (kind == BATCH) {
		batch(&input);
		return 0;
	}
	if (kind == EXTENT && input.left_bytes >= sizeof(struct mp_extent)) {
		struct mp_extent each;

		memcpy(&each, input.at, sizeof each);
		bytes = copy_of(input.at + sizeof each, input.left_bytes - sizeof each);
		reseal_extent(&each, bytes, input.left_bytes - sizeof each);
		extent(&each, bytes, input.left_bytes - sizeof each);
		free(bytes);
		return 0;
	}
	bytes = copy_of(input.at, input.left_bytes);
	if (kind == FRAME || kind == SEALED_FRAME)
		frame(bytes, input.left_bytes, kind == SEALED_FRAME);
	else
		record(bytes, input.left_bytes, kind == SEALED_RECORD);
	free(bytes);
	return 0;
}
