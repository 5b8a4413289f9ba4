/* record.c - seal and verify records: header, extent table, payload.
 *
 * Happy path: magic and version say how to read on, lengths are held against the limits, the
 * checksum is held against header and table, and then every field against the rules of its type.
 * Failure modes: -EAGAIN not all there yet (never more than a header's maximum is asked for);
 * -ENOTSUP a newer format; -EPROTO a shape that no version of ours writes; -EBADMSG bytes changed.
 * Bytes may come from a hostile peer and at any alignment: fields are copied out before they are
 * looked at.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "record.h"

enum { CHECKED_FROM = offsetof(struct mp_record, checksum) + sizeof(uint64_t) };

/* What is true of every record of a type; everything else is the same for all. */
struct shape {
	uint8_t in_log;       /* of a cache: header padded to 4 KiB, chain link set */
	uint8_t has_extents;
	uint8_t has_payload;  /* other than that of extents: covered by payload_checksum */
	uint8_t has_volume;
};

static const struct shape *shape_of(uint16_t type)
{
	static const struct shape shapes[] = {
		[MP_RECORD_LOG] = {.in_log = 1, .has_extents = 1, .has_volume = 1},
		[MP_RECORD_BATCH] = {.has_extents = 1, .has_volume = 1},
		[MP_RECORD_SYNCED] = {.in_log = 1, .has_volume = 1},
		[MP_RECORD_VOLUME] = {.has_payload = 1, .has_volume = 1},
		[MP_RECORD_PAGES] = {.has_payload = 1},
		[MP_RECORD_CHECKPOINT] = {.has_payload = 1},
		[MP_RECORD_DELETE] = {.has_volume = 1},
	};

	return type >= MP_RECORD_LOG && type <= MP_RECORD_DELETE ? &shapes[type] : NULL;
}

static uint64_t table_end(uint32_t extent_count)
{
	return MP_RECORD_HEADER_BYTES + (uint64_t)extent_count * MP_EXTENT_BYTES;
}

static uint64_t header_length_bytes(const struct shape *shape, uint32_t extent_count)
{
	uint64_t end = table_end(extent_count);

	return shape->in_log ? (end + MP_BLOCK_BYTES - 1) / MP_BLOCK_BYTES * MP_BLOCK_BYTES : end;
}

static void read_extent(struct mp_extent *extent, const uint8_t *bytes, uint32_t index)
{
	memcpy(extent, bytes + table_end(index), sizeof *extent);
}

void mp_record_seal(struct mp_record *record)
{
	const struct shape *shape = shape_of(record->type);

	assert(shape);
	assert(record->extent_count <= MP_RECORD_EXTENTS_MAX);
	assert(record->header_length_bytes == header_length_bytes(shape, record->extent_count));
	assert(record->payload_length_bytes <= MP_RECORD_PAYLOAD_MAX);
	record->magic = MP_RECORD_MAGIC;
	record->version = MP_FORMAT_VERSION;
	record->checksum = mp_xxh3((const uint8_t *)record + CHECKED_FROM,
				   record->header_length_bytes - CHECKED_FROM);
}

/* Enough to know how many bytes the checksum covers, and that they are few. */
static int check_lengths(const struct mp_record *header)
{
	const struct shape *shape;

	if (header->magic != MP_RECORD_MAGIC)
		return -EPROTO;
	if (header->version != MP_FORMAT_VERSION)
		return -ENOTSUP;
	shape = shape_of(header->type);
	if (!shape || header->extent_count > MP_RECORD_EXTENTS_MAX ||
	    header->payload_length_bytes > MP_RECORD_PAYLOAD_MAX)
		return -EPROTO;
	if (header->header_length_bytes != header_length_bytes(shape, header->extent_count))
		return -EPROTO;
	return 0;
}

static int check_link(const struct mp_record *header, const struct shape *shape)
{
	if (shape->in_log)
		return header->segment_offset_bytes % MP_BLOCK_BYTES == 0 ? 0 : -EPROTO;
	if (header->incarnation || header->previous_checksum || header->segment_ordinal ||
	    header->segment_offset_bytes || header->synced_sequence)
		return -EPROTO;
	return 0;
}

static int check_fields(const struct mp_record *header, const struct shape *shape)
{
	int in_batch = header->type == MP_RECORD_BATCH;

	if (header->incompatible_features)
		return -ENOTSUP;
	if ((header->flags & ~(in_batch ? (uint32_t)MP_RECORD_LAST_OF_BATCH : 0)) ||
	    header->part_index >= (in_batch ? (uint32_t)MP_BATCH_PARTS_MAX : 1) || header->cipher ||
	    header->key_id || !mp_is_zero(header->reserved, sizeof header->reserved))
		return -EPROTO;
	/* Sequences count from 1, and after the last one there must be room for the next. */
	if (header->first_sequence > header->last_sequence || header->last_sequence == UINT64_MAX ||
	    (shape->has_extents && header->first_sequence == 0))
		return -EPROTO;
	if (shape->has_volume && mp_is_zero(header->volume, sizeof header->volume))
		return -EPROTO;
	if (!shape->has_extents &&
	    (header->extent_count || (!shape->has_payload && header->payload_length_bytes)))
		return -EPROTO;
	if (header->type == MP_RECORD_VOLUME &&
	    header->payload_length_bytes != sizeof(struct mp_volume_state))
		return -EPROTO;
	if ((header->payload_checksum != 0) != shape->has_payload)
		return -EPROTO;
	return check_link(header, shape);
}

/* The table: each extent by itself and within the record's sequences, all together the payload. */
static int check_table(const struct mp_record *header, const uint8_t *bytes)
{
	uint64_t stored_bytes = 0;

	for (uint32_t i = 0; i < header->extent_count; i++) {
		struct mp_extent extent;
		int error;

		read_extent(&extent, bytes, i);
		error = mp_extent_check(&extent);
		if (error)
			return error;
		if (extent.sequence < header->first_sequence ||
		    extent.sequence > header->last_sequence)
			return -EPROTO;
		if (header->type == MP_RECORD_LOG && extent.codec == MP_CODEC_LZ4)
			return -EPROTO;
		stored_bytes += extent.stored_length_bytes;
	}
	return stored_bytes == header->payload_length_bytes ? 0 : -EPROTO;
}

static int check_padding(const struct mp_record *header, const uint8_t *bytes)
{
	uint8_t holes = 0;

	for (uint64_t i = table_end(header->extent_count); i < header->header_length_bytes; i++)
		holes |= bytes[i];
	return holes ? -EPROTO : 0;
}

int64_t mp_record_check(const void *bytes, uint64_t length_bytes)
{
	struct mp_record header;
	const struct shape *shape;
	int error;

	if (length_bytes < sizeof header)
		return -EAGAIN;
	memcpy(&header, bytes, sizeof header);
	error = check_lengths(&header);
	if (error)
		return error;
	if (length_bytes < header.header_length_bytes)
		return -EAGAIN;
	if (mp_xxh3((const uint8_t *)bytes + CHECKED_FROM,
		    header.header_length_bytes - CHECKED_FROM) != header.checksum)
		return -EBADMSG;
	shape = shape_of(header.type);
	error = check_fields(&header, shape);
	if (!error && shape->has_extents)
		error = check_table(&header, bytes);
	if (!error)
		error = check_padding(&header, bytes);
	if (error)
		return error;
	return (int64_t)(header.header_length_bytes + header.payload_length_bytes);
}

/* Every byte of the payload is covered: check_table found that the extents fill it. */
static int check_extents(const struct mp_record *header, const uint8_t *bytes)
{
	const uint8_t *stored = bytes + header->header_length_bytes;
	uint64_t left_bytes = header->payload_length_bytes;

	for (uint32_t i = 0; i < header->extent_count; i++) {
		struct mp_extent extent;

		read_extent(&extent, bytes, i);
		if (extent.codec == MP_CODEC_ZERO || extent.codec == MP_CODEC_TRIM)
			continue;
		if (extent.stored_length_bytes > left_bytes ||
		    mp_extent_verify(&extent, 0, (uint32_t)extent.block_count, stored,
				     extent.stored_length_bytes))
			return -EBADMSG;
		stored += extent.stored_length_bytes;
		left_bytes -= extent.stored_length_bytes;
	}
	return left_bytes == 0 ? 0 : -EBADMSG;
}

int mp_record_check_payload(const void *bytes, uint64_t length_bytes)
{
	struct mp_record header;
	const struct shape *shape;

	if (length_bytes < sizeof header)
		return -EBADMSG;
	memcpy(&header, bytes, sizeof header);
	/* The caller's mp_record_check said so; repeated because memory safety hangs on it. */
	if (check_lengths(&header) ||
	    length_bytes < header.header_length_bytes + header.payload_length_bytes)
		return -EBADMSG;
	shape = shape_of(header.type);
	if (shape->has_extents)
		return check_extents(&header, bytes);
	if (shape->has_payload && mp_xxh3((const uint8_t *)bytes + header.header_length_bytes,
					  header.payload_length_bytes) != header.payload_checksum)
		return -EBADMSG;
	return 0;
}
