/* storefscklog.c - read the log of a store, segment by segment: verify, number, hand on.
 *
 * Happy path: in each segment of the store's table the groups follow one another up to where the
 * log ends in it. Group, records and tables are verified; extents are numbered in order and held
 * against their entries; of those that are alive every stored byte is verified. Later passes only
 * replay.
 * What may be missing: segments that are not in the table (their commits are then missing between
 * two that are), and the bytes of dead extents: those may be punched, wholly or in part. Headers
 * and tables of a segment that is there may never be.
 * Failure modes: behind a record that does not verify the numbers of extents are lost; the extent
 * table tells where they go on. Without a table, what no later group proves to have been synced may
 * be a torn end: it is not reported.
 */
#include "storefsck_internal.h"

static uint64_t file_log_bytes(struct mp_fsck *fsck, uint64_t file)
{
	int missing;

	return fsck_file_bytes(fsck, file, &missing) / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
}

static void add_segment(struct mp_fsck *fsck, uint64_t id, uint64_t length_bytes,
			uint64_t head_commit)
{
	fsck->segments = store_grow(fsck->segments, &fsck->segment_capacity,
				    fsck->segment_count + 1, sizeof *fsck->segments);
	fsck->segments[fsck->segment_count++] =
		(struct fsck_segment){.id = id, .length_bytes = length_bytes,
				      .head_commit = head_commit};
}

/* No table to say where the log ends: how far the groups say that it was synced. */
static void survey_segment(struct mp_fsck *fsck, const struct fsck_segment *segment)
{
	struct mp_group group;

	for (uint64_t at = 0; at < segment->length_bytes; at += group.length_bytes) {
		if (!fsck_group_at(fsck, segment, at, &group))
			return;
		if (group.synced_commit > fsck->synced_commit)
			fsck->synced_commit = group.synced_commit;
	}
}

static void take_files(struct mp_fsck *fsck)
{
	uint64_t count, *files = fsck_files(fsck, &count);

	for (uint64_t i = 0; i < count; i++) {
		struct fsck_segment segment = {.id = files[i],
					       .length_bytes = file_log_bytes(fsck, files[i])};
		struct mp_group group;

		if (!segment.id || !fsck_group_at(fsck, &segment, 0, &group))
			continue;
		add_segment(fsck, segment.id, segment.length_bytes, group.commit);
		survey_segment(fsck, &segment);
	}
	free(files);
}

void fsck_log_prepare(struct mp_fsck *fsck)
{
	if (!fsck->store) {
		take_files(fsck);
		return;
	}
	for (uint64_t i = 0; i < fsck->store->segment_count; i++) {
		const struct store_segment *segment = fsck->store->segments[i];

		if (segment->kind == MP_GROUP_DATA)
			add_segment(fsck, segment->id, segment->length_bytes, 0);
	}
}

void fsck_log_begin(struct mp_fsck *fsck)
{
	fsck->next_commit = 1;
	fsck->last_checksum = 0;
}

struct fsck_segment *fsck_segment_find(struct mp_fsck *fsck, uint64_t id)
{
	uint64_t low = 0, high = fsck->segment_count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (fsck->segments[middle].id < id)
			low = middle + 1;
		else
			high = middle;
	}
	return low < fsck->segment_count && fsck->segments[low].id == id ? &fsck->segments[low]
									  : NULL;
}

static void add_missing(struct mp_fsck *fsck, uint64_t first, uint64_t end)
{
	if (fsck->summary.passes > 1 || first >= end)
		return;
	fsck->missing = store_grow(fsck->missing, &fsck->missing_capacity, fsck->missing_count + 1,
				   sizeof *fsck->missing);
	fsck->missing[fsck->missing_count++] = (struct fsck_missing){first, end};
	fsck->summary.missing_commits += end - first;
}

int fsck_is_missing(const struct mp_fsck *fsck, uint64_t commit)
{
	for (uint64_t i = 0; i < fsck->missing_count; i++)
		if (commit >= fsck->missing[i].first && commit < fsck->missing[i].end)
			return 1;
	return 0;
}

int fsck_missing_after(const struct mp_fsck *fsck, uint64_t commit)
{
	return fsck->missing_count && fsck->missing[fsck->missing_count - 1].end > commit + 1;
}

/* Is what lies here part of the log for certain? */
static int is_certain(const struct mp_fsck *fsck, uint64_t commit)
{
	return fsck->store || commit <= fsck->synced_commit;
}

static uint32_t is_first_pass(const struct mp_fsck *fsck)
{
	return fsck->summary.passes == 1;
}

/* A group without records is not synced by itself, and yet a checkpoint may be behind it: a power
 * cut takes it back and leaves a block of zeroes, perhaps in front of a group that was not synced
 * either and lived. Where any group of the segment proves a sync behind it, that is no excuse. */
static int is_lost_evidence(struct mp_fsck *fsck, const struct fsck_segment *segment,
			    uint64_t offset_bytes)
{
	uint64_t at = offset_bytes + MP_BLOCK_BYTES, commit = fsck->next_commit + 1;
	const uint8_t *block;
	struct mp_group group;

	block = fsck_window_get(fsck, &fsck->head, segment->id, offset_bytes, MP_BLOCK_BYTES);
	if (!fsck->store || !block || !mp_is_zero(block, MP_BLOCK_BYTES))
		return 0;
	for (; at < segment->length_bytes; at += group.length_bytes)
		if (!fsck_group_at(fsck, segment, at, &group) || group.commit != commit++ ||
		    group.synced_commit >= fsck->next_commit)
			return 0;
	return 1;
}

/* Without a table: what lies behind the last group of a segment is nobody's. It may hold groups
 * that an earlier open had given up. */
static int log_ends(const struct mp_fsck *fsck, const struct fsck_segment *segment)
{
	const struct fsck_segment *end = fsck->segments + fsck->segment_count;

	if (fsck->store)
		return 0;
	return segment + 1 < end ? segment[1].head_commit <= fsck->next_commit
				 : fsck->next_commit > fsck->synced_commit;
}

/* No group at offset: report it, and go on with the next one there is. */
static uint64_t skip(struct mp_fsck *fsck, struct fsck_segment *segment, uint64_t offset_bytes)
{
	uint64_t next = offset_bytes + MP_BLOCK_BYTES;
	struct mp_group group;

	if (log_ends(fsck, segment))
		return segment->length_bytes;
	if (is_lost_evidence(fsck, segment, offset_bytes)) {
		fsck->next_commit++; /* not missing: there was nothing in it */
		fsck->last_checksum = 0;
		return next;
	}
	while (next < segment->length_bytes && !fsck_group_at(fsck, segment, next, &group))
		next += MP_BLOCK_BYTES;
	segment->damaged = 1;
	segment->next_index = FSCK_NUMBER_LOST;
	if (is_first_pass(fsck))
		fsck_report(fsck, MP_FSCK_RECORD,
			    (struct fsck_where){.segment = segment->id,
						.offset_bytes = offset_bytes},
			    "no group of the log verifies in %llu bytes; commit %llu should be "
			    "there", (unsigned long long)(next - offset_bytes),
			    (unsigned long long)fsck->next_commit);
	return next;
}

/* Does the group chain on to the one before it? Segments may be gone between two, groups not. */
static void follow(struct mp_fsck *fsck, struct fsck_segment *segment, const struct mp_group *group)
{
	struct fsck_where where = {.segment = segment->id, .offset_bytes = group->offset_bytes};
	int first = !segment->first_commit;

	if (group->commit > fsck->next_commit) {
		add_missing(fsck, fsck->next_commit, group->commit);
		if (is_first_pass(fsck) && !first && !segment->damaged)
			fsck_report(fsck, MP_FSCK_RECORD, where,
				    "commit %llu follows: those from %llu on are not there",
				    (unsigned long long)group->commit,
				    (unsigned long long)fsck->next_commit);
	} else if (is_first_pass(fsck) && fsck->store &&
		   (group->commit < fsck->next_commit ||
		    (fsck->last_checksum && group->previous_checksum != fsck->last_checksum))) {
		fsck_report(fsck, MP_FSCK_RECORD, where,
			    "commit %llu does not chain on to the group before it",
			    (unsigned long long)group->commit);
	}
	if (first)
		segment->first_commit = group->commit;
	segment->last_commit = group->commit;
	fsck->next_commit = group->commit + 1;
	fsck->last_checksum = group->checksum;
}

void fsck_mark(struct fsck_segment *segment, uint32_t index, uint8_t mark)
{
	if (index >= segment->mark_count) {
		uint32_t count = index + index / 2 + 64;

		segment->marks = realloc(segment->marks, count);
		assert(segment->marks);
		memset(segment->marks + segment->mark_count, 0, count - segment->mark_count);
		segment->mark_count = count;
	}
	segment->marks[index] |= mark;
}

static int same(const struct mp_fsck *fsck, const struct mp_extent_entry *entry,
		const struct mp_extent *extent, uint64_t commit, uint64_t segment,
		uint64_t offset_bytes)
{
	uint64_t origin = entry->segment_origin & ((1 << MP_ORIGIN_BITS) - 1);

	return entry->segment_origin >> MP_ORIGIN_BITS == segment &&
	       origin < fsck->store->origin_count &&
	       !memcmp(fsck->store->origins[origin], extent->origin, sizeof extent->origin) &&
	       entry->first_block == extent->first_block && entry->offset_bytes == offset_bytes &&
	       entry->stored_length_bytes == extent->stored_length_bytes &&
	       entry->codec_blocks == (extent->codec << 4 | extent->block_count) &&
	       entry->born_commit == commit &&
	       !memcmp(entry->checksum, extent->checksum, sizeof entry->checksum);
}

/* One data extent of the log against its entry, and its live bytes against their checksums. */
static void check_extent(struct mp_fsck *fsck, struct fsck_segment *segment,
			 const struct fsck_volume *volume, const struct mp_extent *extent,
			 uint64_t offset_bytes)
{
	const struct mp_extent_entry *entry;
	struct fsck_where where = {volume->state.id, extent->first_block, extent->block_count,
				   segment->id, offset_bytes};
	int error;

	fsck->summary.extents++;
	if (!fsck->store) {
		fsck_verify_extent(fsck, volume->state.id, extent, UINT32_MAX, segment->id,
				   offset_bytes);
		return;
	}
	if (segment->next_index == FSCK_NUMBER_LOST)
		return;
	entry = fsck_entry(fsck, segment->id, segment->next_index, &error);
	fsck_mark(segment, segment->next_index, FSCK_MARK_SEEN);
	if (error)
		return; /* its page is a finding of its own */
	if (!entry)
		fsck_report(fsck, MP_FSCK_EXTENTS, where, "the extent table has no entry for it");
	else if (!same(fsck, entry, extent, segment->last_commit, segment->id, offset_bytes))
		fsck_report(fsck, MP_FSCK_EXTENTS, where,
			    "its entry in the extent table is not what the log says");
	else
		fsck_verify_extent(fsck, volume->state.id, extent, entry->live, segment->id,
				   offset_bytes);
}

static void scan_batch(struct mp_fsck *fsck, struct fsck_segment *segment,
		       const struct mp_record *record, uint64_t offset_bytes)
{
	struct fsck_volume *volume = fsck_volume_get(fsck, record->volume);
	const struct mp_extent *extent = (const struct mp_extent *)(const void *)(record + 1);

	if (is_first_pass(fsck))
		fsck_volume_batch(fsck, volume, record, segment->last_commit);
	offset_bytes += record->header_length_bytes;
	for (uint32_t i = 0; i < record->extent_count; i++, extent++) {
		if (!extent->stored_length_bytes) {
			fsck_map_clear(fsck, volume, extent->first_block,
				       extent->first_block + extent->block_count);
			continue;
		}
		if (segment->next_index == FSCK_NUMBER_LOST && fsck->store)
			segment->next_index = fsck_entry_at(fsck, segment->id, 0, offset_bytes);
		if (is_first_pass(fsck))
			check_extent(fsck, segment, volume, extent, offset_bytes);
		if (segment->next_index != FSCK_NUMBER_LOST)
			fsck_map_put(fsck, volume, extent->first_block, extent->block_count,
				     (segment->id << MP_ADDRESS_EXTENT_BITS | segment->next_index++)
					     << MP_ADDRESS_BLOCK_BITS);
		offset_bytes += extent->stored_length_bytes;
	}
}

static void scan_state(struct mp_fsck *fsck, const struct fsck_segment *segment,
		       const struct mp_record *record)
{
	const struct mp_volume_state *state = (const void *)(record + 1);
	struct fsck_volume *volume = fsck_volume_get(fsck, state->id);
	uint64_t blocks = state->size_bytes / MP_BLOCK_BYTES +
			  (state->size_bytes % MP_BLOCK_BYTES != 0);

	if (is_first_pass(fsck))
		fsck_volume_state(fsck, volume, state, segment->last_commit);
	/* What a shrunk volume no longer has; else there is nothing. */
	fsck_map_clear(fsck, volume, blocks, UINT64_MAX);
}

static void bad_record(struct mp_fsck *fsck, struct fsck_segment *segment,
		       const struct mp_group *group, uint64_t offset_bytes, int error)
{
	if (!is_certain(fsck, group->commit))
		return;
	segment->damaged = 1;
	segment->next_index = FSCK_NUMBER_LOST;
	add_missing(fsck, group->commit, group->commit + 1);
	if (is_first_pass(fsck))
		fsck_report(fsck, MP_FSCK_RECORD,
			    (struct fsck_where){.segment = segment->id,
						.offset_bytes = offset_bytes},
			    "a record of commit %llu %s", (unsigned long long)group->commit,
			    fsck_why(error));
}

static void scan_group(struct mp_fsck *fsck, struct fsck_segment *segment,
		       const struct mp_group *group)
{
	uint64_t at = MP_GROUP_HEADER_BYTES;

	fsck->summary.groups += is_first_pass(fsck);
	for (uint32_t i = 0; i < group->record_count; i++) {
		uint64_t offset_bytes = group->offset_bytes + at;
		const struct mp_record *record;
		uint64_t bytes;
		int error = -EPROTO;

		record = at < group->length_bytes
				 ? fsck_record_at(fsck, segment, offset_bytes,
					     group->length_bytes - at, &error)
				 : NULL;
		if (!record) {
			bad_record(fsck, segment, group, offset_bytes, error);
			return;
		}
		bytes = record->header_length_bytes + record->payload_length_bytes;
		fsck->summary.records += is_first_pass(fsck);
		if (record->type == MP_RECORD_BATCH) {
			scan_batch(fsck, segment, record, offset_bytes);
		} else if (record->type == MP_RECORD_VOLUME) {
			scan_state(fsck, segment, record);
		} else {
			struct fsck_volume *volume = fsck_volume_get(fsck, record->volume);

			fsck_map_clear(fsck, volume, 0, UINT64_MAX);
			fsck_volume_delete(volume, group->commit);
		}
		at += store_align(bytes, 8);
	}
}

/* Is the file there, and as long as its log? */
static int check_file(struct mp_fsck *fsck, struct fsck_segment *segment)
{
	struct fsck_where where = {.segment = segment->id};
	int missing;

	where.offset_bytes = fsck_file_bytes(fsck, segment->id, &missing);
	segment->missing = missing != 0;
	if (is_first_pass(fsck) && missing)
		fsck_report(fsck, MP_FSCK_FILE, where, "the file is missing: it has log");
	else if (is_first_pass(fsck) && where.offset_bytes < segment->length_bytes)
		fsck_report(fsck, MP_FSCK_FILE, where, "the file ends at %llu, its log at %llu",
			    (unsigned long long)where.offset_bytes,
			    (unsigned long long)segment->length_bytes);
	return !missing;
}

void fsck_log_scan(struct mp_fsck *fsck, struct fsck_segment *segment)
{
	uint64_t offset_bytes = 0;

	fsck->summary.segments += is_first_pass(fsck);
	segment->next_index = 0;
	segment->first_commit = segment->last_commit = 0;
	if (!check_file(fsck, segment)) {
		segment->damaged = 1;
		return;
	}
	while (offset_bytes < segment->length_bytes && !fsck->ended) {
		struct mp_group group;

		if (!fsck_group_at(fsck, segment, offset_bytes, &group)) {
			offset_bytes = skip(fsck, segment, offset_bytes);
			continue;
		}
		follow(fsck, segment, &group);
		scan_group(fsck, segment, &group);
		offset_bytes += group.length_bytes;
	}
}

void fsck_log_end(struct mp_fsck *fsck)
{
	uint64_t end;
	int damaged = 0;

	if (!fsck->store)
		return;
	end = fsck->store->applied.commit;
	add_missing(fsck, fsck->next_commit, end);
	for (uint64_t i = 0; i < fsck->segment_count; i++)
		damaged |= fsck->segments[i].damaged;
	if (fsck->next_commit != end && !damaged)
		fsck_report(fsck, MP_FSCK_RECORD,
			    (struct fsck_where){.segment = fsck->store->applied.segment,
						.offset_bytes = fsck->store->applied.offset_bytes},
			    "the log ends in front of commit %llu, what it led to in front of %llu",
			    (unsigned long long)fsck->next_commit, (unsigned long long)end);
}
