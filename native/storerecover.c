/* storerecover.c - open a store: checkpoint, roll-forward, the end of the log.
 *
 * Happy path: the newest checkpoint is loaded, then every group behind its position that chains on
 * (predecessor's checksum, next commit, an incarnation that does not go back) and verifies as a
 * whole is applied. The first that does not is the end of the log. Files that belong to nothing
 * (spares, an unfinished checkpoint) are removed, and a new incarnation is synced before the first
 * append.
 * Failure modes: a later group says that the broken one had been synced: this is damage, not the
 * end; the store is not opened and not changed. A device that cannot be read: likewise.
 */
#include <stdio.h>

#include "store_internal.h"

struct head { uint64_t segment; struct mp_group group; };
struct recovery {
	struct mp_store *store;
	uint64_t *files, file_count;
	struct head *heads;            /* first groups of segments that are in no checkpoint */
	uint64_t head_count;
	char *message;
	uint64_t message_bytes;
	uint64_t trouble_segment, trouble_offset_bytes;
};

int store_group_check(const struct mp_group *header, uint64_t segment, uint64_t offset_bytes)
{
	if (header->magic != MP_GROUP_MAGIC || header->version != MP_FORMAT_VERSION ||
	    header->segment != segment || header->offset_bytes != offset_bytes)
		return -EBADMSG;
	if (header->checksum != mp_xxh3((const uint8_t *)header + offsetof(struct mp_group,
									   version),
					sizeof *header - offsetof(struct mp_group, version)))
		return -EBADMSG;
	if (!header->length_bytes || header->length_bytes % MP_BLOCK_BYTES)
		return -EBADMSG;
	return 0;
}

static int unreadable(struct recovery *recovery, uint64_t segment, uint64_t offset_bytes,
		      int64_t error)
{
	snprintf(recovery->message, recovery->message_bytes,
		 "cannot read or sync segment %llu at offset %llu: error %lld; the store was not "
		 "changed", (unsigned long long)segment, (unsigned long long)offset_bytes,
		 (long long)-error);
	return (int)error;
}

static int list_files(struct recovery *recovery)
{
	struct mp_driver *driver = recovery->store->driver;
	uint64_t capacity = 1024;

	for (;;) {
		int64_t count;

		recovery->files = realloc(recovery->files, capacity * sizeof *recovery->files);
		assert(recovery->files);
		count = driver->list_files(driver->self, recovery->files, capacity);
		if (count < 0)
			return unreadable(recovery, 0, 0, count);
		recovery->file_count = (uint64_t)count;
		if ((uint64_t)count < capacity)
			return 0;
		capacity *= 4;
	}
}

static int all_present(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;

	for (uint64_t i = 0; i < store->segment_count; i++) {
		uint64_t id = store->segments[i]->id;

		if (store->driver->file_length_bytes(store->driver->self, id) >= 0)
			continue;
		snprintf(recovery->message, recovery->message_bytes,
			 "segment %llu is missing: the store is damaged, restore it from a replica",
			 (unsigned long long)id);
		return -EBADMSG;
	}
	return 0;
}

static uint64_t file_bytes(struct mp_store *store, uint64_t file)
{
	int64_t length = store->driver->file_length_bytes(store->driver->self, file);

	return length < 0 ? 0 : (uint64_t)length / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
}

static int read_header(struct recovery *recovery, uint64_t file, uint64_t offset_bytes,
		       struct mp_group *out)
{
	uint8_t *block;
	int64_t result;

	memset(out, 0, sizeof *out);
	if (!file || offset_bytes + MP_BLOCK_BYTES > file_bytes(recovery->store, file))
		return 0;
	block = store_allocate_aligned(MP_BLOCK_BYTES);
	result = mp_driver_read(recovery->store->driver, file, offset_bytes, block, MP_BLOCK_BYTES);
	memcpy(out, block, sizeof *out);
	free(block);
	if (result < 0)
		return unreadable(recovery, file, offset_bytes, result);
	if (store_group_check(out, file, offset_bytes))
		memset(out, 0, sizeof *out);
	return 0;
}

static int find_heads(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;

	recovery->heads = store_allocate((recovery->file_count + 1) * sizeof *recovery->heads);
	for (uint64_t i = 0; i < recovery->file_count; i++) {
		uint64_t file = recovery->files[i];
		struct head head = {.segment = file};
		int error;

		if (file >= store->next_segment)
			store->next_segment = file + 1;
		if (!file || file <= store->applied.segment || store_segment_find(store, file))
			continue;
		error = read_header(recovery, file, 0, &head.group);
		if (error)
			return error;
		if (head.group.magic && head.group.kind == MP_GROUP_DATA)
			recovery->heads[recovery->head_count++] = head;
	}
	return 0;
}

static int chains(const struct mp_store *store, const struct mp_group *group)
{
	return group->magic && group->kind == MP_GROUP_DATA &&
		group->commit == store->applied.commit &&
	       group->previous_checksum == store->applied.checksum &&
	       group->incarnation >= store->applied.incarnation &&
	       group->length_bytes <= STORE_GROUP_MAX_BYTES;
}

/* The header of the next group of the log, wherever it is; magic 0: there is none. */
static int find_next(struct recovery *recovery, struct mp_group *next)
{
	struct mp_store *store = recovery->store;
	int error = read_header(recovery, store->applied.segment, store->applied.offset_bytes,
				next);

	if (error)
		return error;
	if (!chains(store, next))
		memset(next, 0, sizeof *next);
	/* An earlier open may have ended the log here and gone on elsewhere: the newer one counts.
	 */
	for (uint64_t i = 0; i < recovery->head_count; i++)
		if (chains(store, &recovery->heads[i].group) &&
		    recovery->heads[i].group.incarnation >= next->incarnation)
			*next = recovery->heads[i].group;
	return 0;
}

/* Do all records verify? Returns how many do from the start; *end: behind them. */
static uint32_t verify_records(const uint8_t *buffer, uint64_t length_bytes, uint32_t count,
			       uint64_t *end)
{
	uint32_t verified = 0;

	*end = MP_GROUP_HEADER_BYTES;
	while (verified < count && *end < length_bytes) {
		int64_t bytes = mp_record_check(buffer + *end, length_bytes - *end);

		if (bytes < 0 || (uint64_t)bytes > length_bytes - *end ||
		    mp_record_check_payload(buffer + *end, (uint64_t)bytes))
			break;
		*end += store_align((uint64_t)bytes, 8);
		verified++;
	}
	return verified;
}

static int apply(struct recovery *recovery, const struct mp_group *header,
		 struct store_group *group)
{
	struct mp_store *store = recovery->store;
	struct store_segment *segment = store_segment_find(store, header->segment);
	int result;

	if (!segment) {
		segment = store_segment_add(store, header->segment, MP_GROUP_DATA);
		segment->first_commit = header->commit;
		segment->sealed = 1;
	}
	group->segment = segment;
	group->offset_bytes = header->offset_bytes;
	group->commit = header->commit;
	group->checksum = header->checksum;
	segment->length_bytes = header->offset_bytes + header->length_bytes;
	if (header->synced_commit > store->synced_commit)
		store->synced_commit = header->synced_commit;
	store->log_bytes += header->length_bytes;
	result = store_apply_group(store, group);
	store_pages_trim(store);
	if (result == 1)
		return 1;
	snprintf(recovery->message, recovery->message_bytes,
		 "a map page needed for segment %llu at offset %llu cannot be read: error %d; "
		 "the store is damaged, restore it from a replica",
		 (unsigned long long)segment->id, (unsigned long long)header->offset_bytes,
			-result);
	return result;
}

/* 1: one more group applied; 0: the log ends here; -errno. */
static int roll(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;
	struct store_group group = {0};
	struct mp_group next;
	int64_t result;
	uint64_t end;
	int error = find_next(recovery, &next);

	recovery->trouble_segment = next.magic ? next.segment : store->applied.segment;
	recovery->trouble_offset_bytes =
		next.magic ? next.offset_bytes : store->applied.offset_bytes;
	if (error || !next.magic ||
	    next.offset_bytes + next.length_bytes > file_bytes(store, next.segment))
		return error;
	group.buffer = store_allocate_aligned(next.length_bytes);
	group.length_bytes = next.length_bytes;
	result = mp_driver_read(store->driver, next.segment, next.offset_bytes, group.buffer,
				next.length_bytes);
	if (result < 0) {
		free(group.buffer);
		return unreadable(recovery, next.segment, next.offset_bytes, result);
	}
	group.record_count = verify_records(group.buffer, next.length_bytes, next.record_count,
					    &end);
	error = 0;
	if (group.record_count == next.record_count) {
		error = apply(recovery, &next, &group);
	} else if (group.record_count && store_fault(store, MP_STORE_FAULT_HALF_BATCH)) {
		/* The deliberate fault: what verifies of a torn group counts. */
		memset(group.buffer + end, 0, next.length_bytes - end);
		error = apply(recovery, &next, &group);
		error = error == 1 ? 0 : error;
	}
	free(group.buffer);
	return error;
}

static int damaged(struct recovery *recovery, uint64_t file, const struct mp_group *witness)
{
	snprintf(recovery->message, recovery->message_bytes,
		 "segment %llu is damaged at offset %llu: commit %llu does not verify, "
		 "but segment %llu at offset %llu proves that it was synced; "
		 "nothing was changed, restore the store from a replica",
		 (unsigned long long)recovery->trouble_segment,
		 (unsigned long long)recovery->trouble_offset_bytes,
		 (unsigned long long)recovery->store->applied.commit, (unsigned long long)file,
		 (unsigned long long)witness->offset_bytes);
	return -EBADMSG;
}

/* Is there, behind the end of the log, a group that says that the end is not the end? */
static int look_for_witness(struct recovery *recovery, uint64_t file, uint64_t from_bytes)
{
	struct mp_store *store = recovery->store;
	uint64_t end = file_bytes(store, file), chunk = 1 << 20;
	uint8_t *buffer = store_allocate_aligned(chunk);
	int error = 0;

	for (uint64_t at = from_bytes; at < end && !error; at += chunk) {
		uint64_t bytes = end - at < chunk ? end - at : chunk;
		int64_t result = mp_driver_read(store->driver, file, at, buffer, bytes);

		if (result < 0)
			error = unreadable(recovery, file, at, result);
		for (uint64_t i = 0; !error && i < bytes; i += MP_BLOCK_BYTES) {
			const struct mp_group *group = (const void *)(buffer + i);

			if (store_group_check(group, file, at + i) == 0 &&
			    group->kind == MP_GROUP_DATA &&
			    group->incarnation >= store->applied.incarnation &&
			    group->incarnation >> 32 <= (store->super.incarnation >> 32) + 1 &&
			    group->synced_commit >= store->applied.commit)
				error = damaged(recovery, file, group);
		}
	}
	free(buffer);
	return error;
}

static int check_end(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;
	int error = 0;

	if (store->applied.segment)
		error = look_for_witness(recovery, store->applied.segment,
					 store->applied.offset_bytes);
	for (uint64_t i = 0; i < recovery->file_count && !error; i++) {
		uint64_t file = recovery->files[i];

		if (file > store->applied.segment && !store_segment_find(store, file))
			error = look_for_witness(recovery, file, 0);
	}
	return error;
}

static int remove_strangers(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;

	for (uint64_t i = 0; i < recovery->file_count; i++) {
		struct mp_io io = {.op = MP_OP_REMOVE, .file = recovery->files[i]};
		int64_t result;

		if (!io.file || store_segment_find(store, io.file))
			continue;
		result = mp_driver_do(store->driver, &io);
		if (result < 0) {
			snprintf(recovery->message, recovery->message_bytes,
				 "cannot remove the unused segment %llu: error %lld",
				 (unsigned long long)io.file, (long long)-result);
			return (int)result;
		}
	}
	return 0;
}

/* Groups of this open differ from all that earlier ones left behind the end of the log. */
static int new_incarnation(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;
	uint64_t counter = store->super.incarnation >> 32, last = store->applied.incarnation >> 32;
	uint32_t chance;
	int64_t result;

	if (store_fault(store, MP_STORE_FAULT_NO_INCARNATION) && store->super.incarnation)
		return 0;
	store->driver->random_bytes(store->driver->self, &chance, sizeof chance);
	store->super.incarnation = ((counter > last ? counter : last) + 1) << 32 | chance;
	result = store_super_write(store);
	if (result >= 0)
		return 0;
	snprintf(recovery->message, recovery->message_bytes,
		 "cannot write the superblocks: error %lld",
		 (long long)-result);
	return (int)result;
}

/* What a crash of the daemon left was written, and perhaps never synced. The log goes on in another
 * file, whose syncs would not cover it: without this, a power cut would cut the chain below what is
 * acknowledged. */
static int sync_log(struct recovery *recovery, uint64_t first_segment)
{
	struct mp_store *store = recovery->store;

	for (uint64_t i = 0; i < store->segment_count; i++) {
		const struct store_segment *segment = store->segments[i];
		int64_t result;

		if (segment->id < first_segment || segment->kind != MP_GROUP_DATA)
			continue;
		result = mp_driver_sync(store->driver, segment->id);
		if (result < 0)
			return unreadable(recovery, segment->id, segment->length_bytes, result);
	}
	store->synced_commit = store->applied.commit - 1;
	return 0;
}

static int load(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;
	int error = store_super_load(store, recovery->message, recovery->message_bytes);

	store->applied.commit = 1;
	if (!error && store->super.checkpoint_segment)
		error = store_checkpoint_load(store, recovery->message, recovery->message_bytes);
	if (!error)
		error = list_files(recovery);
	return error;
}

static int roll_forward(struct recovery *recovery)
{
	int error = find_heads(recovery);

	while (!error && (error = roll(recovery)) == 1)
		error = 0;
	return error;
}

static int run(struct recovery *recovery)
{
	struct mp_store *store = recovery->store;
	int error = load(recovery);
	uint64_t first_segment = store->applied.segment;

	if (!error)
		error = all_present(recovery);
	if (!error)
		error = roll_forward(recovery);
	if (!error)
		error = check_end(recovery);
	if (!error)
		error = sync_log(recovery, first_segment);
	if (!error)
		error = remove_strangers(recovery);
	if (!error)
		error = new_incarnation(recovery);
	return error;
}

enum store_look store_recover_look(struct mp_store *store, char *message, uint64_t message_bytes)
{
	struct recovery recovery = {.store = store, .message = message,
				    .message_bytes = message_bytes};
	enum store_look look = STORE_LOOK_NOTHING;

	/* For good: pages are read blocking, and nothing is ever submitted but reads. */
	store->recovering = 1;
	if (!load(&recovery)) {
		look = STORE_LOOK_PARTLY;
		if (!roll_forward(&recovery)) {
			look = STORE_LOOK_WHOLE;
			(void)check_end(&recovery);
			if (!message[0])
				(void)all_present(&recovery);
		}
	}
	free(recovery.files);
	free(recovery.heads);
	return look;
}

int store_recover(struct mp_store *store, char *message, uint64_t message_bytes)
{
	struct recovery recovery = {.store = store, .message = message,
				    .message_bytes = message_bytes};
	struct store_segment *last;
	int error;

	store->recovering = 1;
	error = run(&recovery);
	store->recovering = 0;
	free(recovery.files);
	free(recovery.heads);
	if (error)
		return error;
	/* The log goes on in a segment of its own; what the last one had reserved is given back. */
	last = store_segment_find(store, store->applied.segment);
	if (last) {
		last->capacity_bytes = file_bytes(store, last->id);
		store_segment_seal(store, last);
	}
	store->position = store->applied;
	store->evidence_commit = store->synced_commit;
	for (uint32_t i = 0; i < STORE_VOLUME_BUCKETS; i++)
		for (struct store_volume *volume = store->volumes[i]; volume; volume = volume->next)
			volume->admitted = volume->state;
	return 0;
}
