/* storefscktail.c - what is behind the end of the log when a later group proves that it is no end.
 *
 * Happy path: an open replays the log up to the damage and refuses; here the groups behind it are
 * read, as far as they are proven to have been synced: each bad record is named, and of data the
 * volume and the blocks. Nothing there was ever applied by a checkpoint, so nothing may be punched.
 * Failure modes: what is behind the last group that proves anything may be torn: it is left alone.
 */
#include "storefsck_internal.h"

/* Groups in a part of a file, whatever is between them. group->length_bytes 0: no more. */
static uint64_t next_group(struct mp_fsck *fsck, const struct fsck_segment *segment,
			   uint64_t offset_bytes, struct mp_group *group)
{
	while (offset_bytes < segment->length_bytes && !fsck->ended) {
		if (fsck_group_at(fsck, segment, offset_bytes, group) &&
		    group->incarnation >= fsck->store->applied.incarnation)
			return offset_bytes;
		offset_bytes += MP_BLOCK_BYTES;
	}
	group->length_bytes = 0;
	return offset_bytes;
}

static void verify_group(struct mp_fsck *fsck, const struct fsck_segment *segment,
			 const struct mp_group *group)
{
	uint64_t at = MP_GROUP_HEADER_BYTES;

	for (uint32_t i = 0; i < group->record_count; i++) {
		uint64_t offset_bytes = group->offset_bytes + at;
		int error = -EPROTO;
		const struct mp_record *record =
			at < group->length_bytes
				? fsck_record_at(fsck, segment, offset_bytes,
						 group->length_bytes - at, &error) : NULL;
		const struct mp_extent *extent;

		if (!record) {
			fsck_report(fsck, MP_FSCK_RECORD,
				    (struct fsck_where){.segment = segment->id,
							.offset_bytes = offset_bytes},
				    "a record of commit %llu %s",
				    (unsigned long long)group->commit, fsck_why(error));
			return;
		}
		fsck->summary.records++;
		at += store_align(record->header_length_bytes + record->payload_length_bytes, 8);
		offset_bytes += record->header_length_bytes;
		extent = (const struct mp_extent *)(const void *)(record + 1);
		for (uint32_t n = 0; n < record->extent_count; n++, extent++) {
			fsck_verify_extent(fsck, record->volume, extent,
					   extent->stored_length_bytes ? UINT32_MAX : 0,
					   segment->id, offset_bytes);
			offset_bytes += extent->stored_length_bytes;
		}
	}
}

/* First for what is proven, then for what is wrong. */
static void walk(struct mp_fsck *fsck, const struct fsck_segment *segment, uint64_t from_bytes,
		 int survey)
{
	struct mp_group group;
	uint64_t at = from_bytes, next;

	for (;; at = next + group.length_bytes) {
		next = next_group(fsck, segment, at, &group);
		if (!group.length_bytes)
			return;
		if (survey) {
			if (group.synced_commit > fsck->synced_commit)
				fsck->synced_commit = group.synced_commit;
			continue;
		}
		if (next > at && group.commit <= fsck->synced_commit + 1)
			fsck_report(fsck, MP_FSCK_RECORD,
				    (struct fsck_where){.segment = segment->id,
							.offset_bytes = at},
				    "no group of the log verifies in %llu bytes",
				    (unsigned long long)(next - at));
		if (group.commit <= fsck->synced_commit)
			verify_group(fsck, segment, &group);
	}
}

void fsck_tail(struct mp_fsck *fsck)
{
	const struct store_position *end = &fsck->store->applied;
	uint64_t count, *files = fsck_files(fsck, &count);

	for (int survey = 1; survey >= 0; survey--)
		for (uint64_t i = 0; i < count; i++) {
			struct fsck_segment segment = {.id = files[i]};
			int missing;

			segment.length_bytes = fsck_file_bytes(fsck, files[i], &missing) /
					       MP_BLOCK_BYTES * MP_BLOCK_BYTES;
			if (segment.id == end->segment)
				walk(fsck, &segment, end->offset_bytes, survey);
			else if (segment.id > end->segment &&
				 !store_segment_find(fsck->store, segment.id))
				walk(fsck, &segment, 0, survey);
		}
	free(files);
}
