/* storelog.c - the log: requests become groups, groups are appended and synced, then applied.
 *
 * Happy path: what waits is put into one group (one write); while that is on its way the next one
 * fills. One sync covers all groups written before it, and waits for those that are on their way:
 * who sends more than one batch at a time does not pay for each. Durable groups are applied in
 * order and only then answered. Groups chain: each carries its predecessor's checksum, the
 * incarnation of this open and how far the log was synced, so that recovery can tell the end of the
 * log from damage in it. A group of a new segment is written only when everything in the old one is
 * durable.
 * Failure modes: a failed write or sync fails the store: nothing is acknowledged after it. No
 * space for the next segment: MP_STATUS_FULL, not admitted, nothing changed.
 */
#include "store_internal.h"

enum { RECORD_ALIGN = 8, META_RESERVE_MAX_BYTES = 1 << 20 };

/* Records of a request as they will be in the log. */
static uint64_t record_bytes(const struct store_request *request)
{
	if (request->frame.type == MP_FRAME_BATCH)
		return store_align(request->frame.payload_bytes, RECORD_ALIGN);
	if (request->frame.type == MP_FRAME_PUT_VOLUME)
		return MP_RECORD_HEADER_BYTES + sizeof(struct mp_volume_state);
	return MP_RECORD_HEADER_BYTES;
}

static uint64_t group_bytes(uint64_t records_bytes)
{
	return store_align(MP_GROUP_HEADER_BYTES + records_bytes, MP_BLOCK_BYTES);
}

/* The end of a segment that data leaves alone unless the next segment is there: deletions, trims
 * and volume states still fit when the disk is full. */
static uint64_t reserve_bytes(const struct mp_store *store)
{
	uint64_t reserve = store->options.segment_bytes / 8 / MP_BLOCK_BYTES * MP_BLOCK_BYTES;

	return reserve < META_RESERVE_MAX_BYTES ? reserve : META_RESERVE_MAX_BYTES;
}

static int fits(const struct mp_store *store, uint64_t bytes, uint32_t extents)
{
	const struct store_segment *active = store->active;
	uint64_t limit;

	if (!active || active->extents_planned + extents > 1 << MP_ADDRESS_EXTENT_BITS)
		return 0;
	limit = active->capacity_bytes;
	if (extents && !store->spare)
		limit -= reserve_bytes(store);
	return active->length_bytes + bytes <= limit;
}

static void switch_segment(struct mp_store *store)
{
	if (store->active)
		store_segment_seal(store, store->active);
	store->active = store->spare;
	store->spare = NULL;
	store->active->first_commit = store->position.commit;
	store_segment_insert(store, store->active);
}

static void synced(struct store_io *io);

static void sync_up_to(struct mp_store *store, const struct store_segment *segment, uint64_t commit)
{
	if (store->syncing)
		return;
	store->syncing = 1;
	store->sync_commit = commit;
	store->sync_io.done = synced;
	store_submit(store, &store->sync_io, MP_OP_SYNC, segment->id, 0, NULL, 0);
}

/* Evidence moves on without a sync. A later sync of the same file covers it; one of the next file
 * would not, and a power cut would then take a link out of the chain. */
static int tail_is_durable(const struct mp_store *store)
{
	return store->synced_commit + 1 >= store->position.commit ||
	       store_fault(store, MP_STORE_FAULT_SKIP_SYNC);
}

/* Room for the group in the active segment. 1; 0: not yet; -ENOSPC. */
static int make_room(struct mp_store *store, uint64_t bytes, uint32_t extents)
{
	int ready;

	if (fits(store, bytes, extents))
		return 1;
	ready = store_segment_want(store, MP_GROUP_DATA, bytes + reserve_bytes(store));
	if (ready != 1)
		return ready;
	if (store->groups)
		return 0;
	if (!tail_is_durable(store)) {
		sync_up_to(store, store->active, store->position.commit - 1);
		return 0;
	}
	switch_segment(store);
	return 1;
}

uint64_t store_group_seal(struct mp_group *group, uint32_t kind)
{
	group->magic = MP_GROUP_MAGIC;
	group->version = MP_FORMAT_VERSION;
	group->kind = (uint16_t)kind;
	group->checksum = mp_xxh3((uint8_t *)group + offsetof(struct mp_group, version),
				  sizeof *group - offsetof(struct mp_group, version));
	return group->checksum;
}

void store_group_free(struct mp_store *store, struct store_group *group)
{
	struct store_request *request;

	if (!group->in_request)
		free(group->buffer);
	while ((request = store_queue_pop(&group->requests)) ||
	       (request = store_queue_pop(&group->riders)))
		store_request_free(store, request);
	free(group);
}

static uint32_t append_records(struct store_group *group, uint64_t *at,
			       struct store_request *request)
{
	struct mp_record header = {.header_length_bytes = MP_RECORD_HEADER_BYTES};
	uint8_t *payload = request->buffer + MP_GROUP_HEADER_BYTES, *out = group->buffer + *at;
	uint32_t count = 0;

	*at += record_bytes(request);
	if (request->frame.type == MP_FRAME_BATCH) {
		if (!group->in_request)
			memcpy(out, payload, request->frame.payload_bytes);
		memset(out + request->frame.payload_bytes, 0,
		       record_bytes(request) - request->frame.payload_bytes);
		for (uint64_t offset = 0; offset < request->frame.payload_bytes; count++) {
			struct mp_record *record = (void *)(out + offset);
			offset += store_align(record->header_length_bytes +
						      record->payload_length_bytes,
					      RECORD_ALIGN);
		}
		return count;
	}
	if (request->frame.type == MP_FRAME_PUT_VOLUME) {
		header.type = MP_RECORD_VOLUME;
		memcpy(header.volume, request->volume.id, sizeof header.volume);
		header.epoch = request->volume.epoch;
		header.lineage = request->volume.lineage;
		header.payload_length_bytes = sizeof request->volume;
		header.payload_checksum = mp_xxh3(&request->volume, sizeof request->volume);
		memcpy(out + sizeof header, &request->volume, sizeof request->volume);
	} else {
		header.type = MP_RECORD_DELETE;
		memcpy(header.volume, payload, sizeof header.volume);
	}
	memcpy(out, &header, sizeof header);
	mp_record_seal((struct mp_record *)(void *)out);
	return 1;
}

/* Records into one buffer. A large batch alone becomes a group where it is: no copy. */
static void fill(struct mp_store *store, struct store_group *group, uint64_t records_bytes)
{
	struct store_request *only = group->requests.head;
	uint64_t at = MP_GROUP_HEADER_BYTES;

	group->length_bytes = group_bytes(records_bytes);
	group->in_request = only && !only->next && only->frame.type == MP_FRAME_BATCH &&
			    !store_fault(store, MP_STORE_FAULT_ACK_BEFORE_SYNC);
	group->buffer = group->in_request ? only->buffer
					  : store_allocate_aligned(group->length_bytes);
	memset(group->buffer, 0, MP_GROUP_HEADER_BYTES);
	if (!group->in_request)
		memset(group->buffer + MP_GROUP_HEADER_BYTES, 0,
		       group->length_bytes - MP_GROUP_HEADER_BYTES);
	for (struct store_request *request = only; request; request = request->next)
		group->record_count += append_records(group, &at, request);
	memset(group->buffer + at, 0, group->length_bytes - at);
}

static void written(struct store_io *io);

static void submit_group(struct mp_store *store, struct store_group *group)
{
	struct mp_group *header = (struct mp_group *)(void *)group->buffer;
	struct store_segment *segment = store->active;

	group->segment = segment;
	group->offset_bytes = segment->length_bytes;
	group->commit = store->position.commit;
	header->record_count = group->record_count;
	header->incarnation = store->super.incarnation;
	header->commit = group->commit;
	header->segment = segment->id;
	header->offset_bytes = group->offset_bytes;
	header->length_bytes = group->length_bytes;
	header->previous_checksum = store->position.checksum;
	header->synced_commit = store->synced_commit;
	group->checksum = store_group_seal(header, MP_GROUP_DATA);
	segment->length_bytes += group->length_bytes;
	store->position = (struct store_position){segment->id, segment->length_bytes,
						  group->commit + 1,
						  group->checksum, header->incarnation};
	store->evidence_commit = store->synced_commit;
	store->log_bytes += group->length_bytes;
	store->counters.groups++;
	store->counters.appended_bytes += group->length_bytes;
	if (store->groups_last)
		store->groups_last->next = group;
	else
		store->groups = group;
	store->groups_last = group;
	store->groups_writing++;
	store->groups_unapplied++;
	group->io.owner = group;
	group->io.done = written;
	store_submit(store, &group->io, MP_OP_WRITE, segment->id, group->offset_bytes,
		     group->buffer,
		     group->length_bytes);
}

static void take(struct mp_store *store, struct store_group *group, uint64_t *bytes)
{
	struct store_request *request = store_queue_pop(&store->queue);

	store_admit(store, request);
	*bytes += record_bytes(request);
	store->active->extents_planned += request->batch.data_extents;
	store_queue_push(&group->requests, request);
}

/* Answered when everything admitted before it is durable and applied. */
static void ride_along(struct mp_store *store, struct store_request *request)
{
	struct store_group *last = store->building;

	if (!last)
		last = store->groups_last ? store->groups_last : store->durable_last;
	store->counters.repeated_batches++;
	if (last)
		store_queue_push(&last->riders, request);
	else
		store_reply(store, request, MP_STATUS_OK);
}

/* Answer what the log need not see, until the head of the queue is something for it. */
static struct store_request *sort_out(struct mp_store *store)
{
	while (store->queue.head) {
		struct store_request *head = store->queue.head;
		uint32_t status = store_admission(store, head);

		if (status != MP_STATUS_OK) {
			store->counters.refused_batches += head->frame.type == MP_FRAME_BATCH;
			store_reply(store, store_queue_pop(&store->queue), status);
		} else if (head->frame.type == MP_FRAME_BATCH &&
			   head->batch.last_sequence <= store_volume_find(store, head->batch.volume)
							       ->admitted.applied_sequence) {
			ride_along(store, store_queue_pop(&store->queue));
		} else {
			return head;
		}
	}
	return NULL;
}

/* 1: a group is on its way; 0: nothing to do, or not now. */
static int build(struct mp_store *store)
{
	struct store_request *head = sort_out(store);
	struct store_group *group;
	uint64_t bytes = 0;
	int room;

	if (!head)
		return 0;
	room = make_room(store, group_bytes(record_bytes(head)), head->batch.data_extents);
	if (room == -ENOSPC)
		store_reply(store, store_queue_pop(&store->queue), MP_STATUS_FULL);
	if (room != 1)
		return room == -ENOSPC;
	group = store->building = store_allocate(sizeof *group);
	do {
		take(store, group, &bytes);
		head = sort_out(store);
	} while (head && bytes + record_bytes(head) <= STORE_GROUP_TARGET_BYTES &&
		 fits(store, group_bytes(bytes + record_bytes(head)), head->batch.data_extents));
	store->building = NULL;
	fill(store, group, bytes);
	submit_group(store, group);
	return 1;
}

/* Groups that are durable move on: all up to commit. */
static void move_on(struct mp_store *store, uint64_t commit)
{
	while (store->groups && store->groups->commit <= commit) {
		struct store_group *group = store->groups;

		store->groups = group->next;
		if (!store->groups)
			store->groups_last = NULL;
		group->next = NULL;
		if (store->durable_last)
			store->durable_last->next = group;
		else
			store->durable = group;
		store->durable_last = group;
	}
}

static void try_sync(struct mp_store *store)
{
	struct store_group *group = store->groups, *last = NULL;
	uint64_t bytes = 0;
	uint32_t records = 0;

	if (store->syncing || store->failure)
		return;
	for (; group && group->state == STORE_GROUP_WRITTEN; group = group->next) {
		records += group->record_count;
		bytes += group->length_bytes;
		last = group;
	}
	if (!last || (store->groups_writing && bytes < STORE_SYNC_BYTES))
		return;
	if (!records || store_fault(store, MP_STORE_FAULT_SKIP_SYNC)) {
		move_on(store, last->commit);
		return;
	}
	sync_up_to(store, last->segment, last->commit);
}

static void synced(struct store_io *io)
{
	struct mp_store *store = io->store;

	store->syncing = 0;
	if (io->io.result < 0 && !store_fault(store, MP_STORE_FAULT_FAILED_SYNC_IS_GOOD)) {
		store_fail(store, (int)io->io.result, "cannot sync segment", io->io.file, 0);
		return;
	}
	store->counters.syncs++;
	store->synced_commit = store->sync_commit;
	store->evidence_due_ns = store->driver->now_ns(store->driver->self) + STORE_EVIDENCE_NS;
	move_on(store, store->sync_commit);
	try_sync(store);
}

static void written(struct store_io *io)
{
	struct mp_store *store = io->store;
	struct store_group *group = io->owner;
	struct store_request *request;

	group->state = STORE_GROUP_WRITTEN;
	store->groups_writing--;
	if (io->io.result < 0) {
		store_fail(store, (int)io->io.result, "cannot write segment", io->io.file,
			   io->io.offset_bytes);
		return;
	}
	if (store_fault(store, MP_STORE_FAULT_ACK_BEFORE_SYNC))
		while ((request = store_queue_pop(&group->requests)))
			store_reply(store, request, MP_STATUS_OK);
	try_sync(store);
}

static int may_build(const struct mp_store *store)
{
	/* Pages changed while a checkpoint runs are bounded by waiting for it. */
	if (store->dirty_pages >= 2 * store->dirty_limit && store->checkpoint)
		return 0;
	if (store->groups_unapplied >= STORE_GROUPS_UNAPPLIED ||
	    store->groups_writing >= STORE_GROUPS_IN_FLIGHT)
		return 0;
	return !store->groups_writing || store->queue.bytes >= STORE_GROUP_TARGET_BYTES / 4;
}

/* On record that the last groups were synced, for a recovery that finds them damaged. Not synced
 * itself. */
static void write_evidence(struct mp_store *store)
{
	struct store_group *group;

	if (store->evidence_commit >= store->synced_commit || store->groups || store->durable)
		return;
	if (!__atomic_load_n(&store->stopping, __ATOMIC_RELAXED) &&
	    store->turn_ns < store->evidence_due_ns)
		return;
	store->evidence_commit = store->synced_commit;
	if (!fits(store, MP_BLOCK_BYTES, 0))
		return;
	group = store_allocate(sizeof *group);
	fill(store, group, 0);
	submit_group(store, group);
}

static void fail_queue(struct mp_store *store, struct store_queue *queue)
{
	struct store_request *request;

	while ((request = store_queue_pop(queue)))
		store_reply(store, request, MP_STATUS_IO);
}

static void fail_group(struct mp_store *store, struct store_group *group)
{
	fail_queue(store, &group->requests);
	fail_queue(store, &group->riders);
}

void store_log_advance(struct mp_store *store)
{
	if (store->failure) {
		fail_queue(store, &store->queue);
		/* Buffers of requests may be in flight: answer from those that are not. */
		for (struct store_group *group = store->groups; group; group = group->next)
			if (group->state == STORE_GROUP_WRITTEN)
				fail_group(store, group);
		for (struct store_group *group = store->durable; group; group = group->next)
			fail_group(store, group);
		return;
	}
	while (store->queue.head && may_build(store) && build(store))
		;
	if (store->active && store->active->length_bytes > store->active->capacity_bytes / 2)
		store_segment_want(store, MP_GROUP_DATA, 0);
	if (!store->queue.head)
		write_evidence(store);
}

int store_log_idle(const struct mp_store *store)
{
	return !store->queue.head && !store->groups && !store->durable;
}

void store_log_free(struct mp_store *store)
{
	struct store_request *request;
	struct store_group *lists[] = {store->groups, store->durable};

	for (int i = 0; i < 2; i++) {
		while (lists[i]) {
			struct store_group *next = lists[i]->next;
			store_group_free(store, lists[i]);
			lists[i] = next;
		}
	}
	while ((request = store_queue_pop(&store->queue)))
		store_request_free(store, request);
	while ((request = store_queue_pop(&store->checkpoint_requests)))
		store_request_free(store, request);
}
