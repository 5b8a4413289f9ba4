/* storefsckread.c - groups, records and stored bytes of a store's log, read and verified.
 *
 * Happy path: a header is checked before its length is believed, a table before its extents are.
 * Failure modes: each says why; what does not verify of an extent is reported here, block by block.
 * Without a table of extents nobody knows what was punched: a block of zeroes among stored bytes
 * that do not verify is then taken for it.
 */
#include "storefsck_internal.h"

/* The header of a group of the log at this place? */
int fsck_group_at(struct mp_fsck *fsck, const struct fsck_segment *segment, uint64_t offset_bytes,
		    struct mp_group *group)
{
	const uint8_t *bytes = fsck_window_get(fsck, &fsck->head, segment->id, offset_bytes,
					       sizeof *group);

	if (!bytes)
		return 0;
	memcpy(group, bytes, sizeof *group);
	return store_group_check(group, segment->id, offset_bytes) == 0 &&
	       group->kind == MP_GROUP_DATA && group->length_bytes <= STORE_GROUP_MAX_BYTES &&
	       group->length_bytes <= segment->length_bytes - offset_bytes;
}

const char *fsck_why(int error)
{
	if (error == -EBADMSG)
		return "does not verify";
	if (error == -EPROTO || error == -EAGAIN || error == -ENOTSUP)
		return "is malformed";
	return "cannot be read: I/O error";
}

/* Of a record whose header and table verify: is its type at home in the log, and its payload, if it
 * is not extents, right? */
static int check_rest(const struct mp_record *record, uint64_t bytes)
{
	if (record->type == MP_RECORD_BATCH)
		return 0;
	if (record->type != MP_RECORD_VOLUME && record->type != MP_RECORD_DELETE)
		return -EPROTO;
	return mp_record_check_payload(record, bytes);
}

/* Header, table, and of a volume's state the payload: in memory, verified. NULL and *error. */
const struct mp_record *fsck_record_at(struct mp_fsck *fsck, const struct fsck_segment *segment,
				       uint64_t offset_bytes, uint64_t room_bytes, int *error)
{
	uint64_t bytes = 0, wanted = MP_RECORD_HEADER_BYTES;

	while (bytes < wanted) {
		const struct mp_record *record;
		int64_t whole;

		*error = -EPROTO;
		if (wanted > room_bytes || wanted > FSCK_WINDOW_BYTES - 2 * MP_BLOCK_BYTES)
			return NULL;
		bytes = wanted;
		record = (const void *)fsck_window_get(fsck, &fsck->head, segment->id, offset_bytes,
						       bytes);
		whole = record ? mp_record_check(record, bytes) : fsck->head.error;
		if (!record || (whole < 0 && whole != -EAGAIN)) {
			*error = (int)whole;
			return NULL;
		}
		/* The header's own length is known to be sane; the checksum comes with the table.
		 */
		wanted = record->header_length_bytes;
		if (record->type != MP_RECORD_BATCH)
			wanted += record->payload_length_bytes;
		if (whole > (int64_t)room_bytes)
			return NULL;
		if (whole >= 0 && bytes >= wanted) {
			*error = check_rest(record, bytes);
			return *error ? NULL : record;
		}
	}
	*error = -EPROTO;
	return NULL;
}

/* Without a table nobody knows what was punched: zeroes on the disk are no finding. */
static int may_be_punched(struct mp_fsck *fsck, uint64_t file, uint64_t offset_bytes,
			  uint64_t length_bytes)
{
	uint64_t first = offset_bytes / MP_BLOCK_BYTES * MP_BLOCK_BYTES;

	if (fsck->store)
		return 0;
	for (uint64_t at = first; at < offset_bytes + length_bytes; at += MP_BLOCK_BYTES) {
		const uint8_t *block = fsck_window_get(fsck, &fsck->data, file, at, MP_BLOCK_BYTES);

		if (block && mp_is_zero(block, MP_BLOCK_BYTES))
			return 1;
	}
	return 0;
}

/* Some blocks of an extent that are verified together. */
static void verify(struct mp_fsck *fsck, const uint8_t *volume, const struct mp_extent *extent,
		   uint32_t skip_blocks, uint32_t block_count, uint64_t file, uint64_t offset_bytes)
{
	uint64_t length_bytes = extent->codec == MP_CODEC_NONE
					? (uint64_t)block_count * MP_BLOCK_BYTES
					: extent->stored_length_bytes;
	const uint8_t *stored = fsck_window_get(fsck, &fsck->data, file, offset_bytes,
						length_bytes);
	int error = stored ? mp_extent_verify(extent, skip_blocks, block_count, stored,
					      length_bytes)
			   : (int)fsck->data.error;

	if (!error) {
		fsck->summary.verified_bytes += length_bytes;
		return;
	}
	if (may_be_punched(fsck, file, offset_bytes, length_bytes))
		return;
	fsck->summary.bad_bytes += length_bytes;
	fsck_report(fsck, MP_FSCK_DATA,
		    (struct fsck_where){volume, extent->first_block + skip_blocks, block_count,
					file, offset_bytes},
		    stored ? "the stored bytes do not verify: reading them is an I/O error"
			   : "the stored bytes cannot be read: I/O error");
}

void fsck_verify_extent(struct mp_fsck *fsck, const uint8_t *volume, const struct mp_extent *extent,
			uint32_t live, uint64_t file, uint64_t offset_bytes)
{
	if (extent->codec != MP_CODEC_NONE) {
		if (live)
			verify(fsck, volume, extent, 0, (uint32_t)extent->block_count, file,
			       offset_bytes);
		return;
	}
	for (uint32_t i = 0; i < extent->block_count; i++)
		if (live & 1U << i)
			verify(fsck, volume, extent, i, 1, file,
			       offset_bytes + (uint64_t)i * MP_BLOCK_BYTES);
}
