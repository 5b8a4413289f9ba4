/* storecheckpoint.c - make the derived state durable: pages, then their root, then the superblock.
 *
 * Happy path: freeze takes the state as it is between two groups, in one turn: every dirty page
 * gets its place on disk, bottom-up, so that references carry checksums; pages changed later are
 * copies. Then the pages are written, some hundred at a time between other I/O, then the root
 * structure, one sync, and the superblock twice. Only then is what died before the freeze given
 * back.
 * Order: the superblock before the pages are synced would point at pages that a power cut takes
 * back; a punch before the superblock is synced would destroy what the old checkpoint still refers
 * to.
 * Failure modes: any write or sync fails the store; the previous checkpoint and the log stay
 * whole. No space: nothing is frozen, the spare meta segment is kept for this; later tries may
 * succeed.
 */
#include "store_internal.h"

enum step { WRITE_PAGES, WRITE_ROOT, SYNC_META, WRITE_SUPER, SYNC_SUPER, WRITE_SUPER_2,
	   SYNC_SUPER_2 };

struct store_checkpoint {
	struct store_page **pages;         /* in order of place */
	uint64_t page_count, pages_written, pages_in_group;
	uint8_t *root;                     /* the encoded payload */
	uint64_t root_bytes;
	uint8_t *buffer;                   /* of the write in flight */
	struct store_segment *segment;
	uint64_t offset_bytes;             /* of the next group */
	uint64_t commit;
	struct store_queue requests;       /* answered at the end */
	struct store_io io;
	enum step step;
};

/* Group header, record header and descriptors, up to where the first page lies. */
static uint64_t pages_head_bytes(uint64_t page_count)
{
	return store_align(MP_GROUP_HEADER_BYTES + MP_RECORD_HEADER_BYTES +
				   page_count * sizeof(struct mp_page_descriptor), MP_BLOCK_BYTES);
}

static uint64_t pages_group_bytes(uint64_t page_count)
{
	return pages_head_bytes(page_count) + page_count * MP_PAGE_BYTES;
}

static uint64_t root_group_bytes(uint64_t payload_bytes)
{
	uint64_t records = (payload_bytes + MP_RECORD_PAYLOAD_MAX - 1) / MP_RECORD_PAYLOAD_MAX;

	return store_align(MP_GROUP_HEADER_BYTES + records * MP_RECORD_HEADER_BYTES + payload_bytes,
			   MP_BLOCK_BYTES);
}

static uint64_t root_payload_bytes(const struct mp_store *store, uint64_t segment_count)
{
	return sizeof(struct mp_checkpoint) +
	       store->counters.volumes * sizeof(struct mp_checkpoint_volume) +
	       segment_count * sizeof(struct mp_checkpoint_segment) +
	       store->origin_count * MP_VOLUME_ID_BYTES +
	       store->grave_count * sizeof(struct mp_checkpoint_grave);
}

static uint64_t needed_bytes(const struct mp_store *store)
{
	uint64_t full = store->dirty_pages / MP_PAGES_PER_GROUP;
	/* Dropping a dead segment adds at most a grave; switching the meta segment adds an entry.
	 */
	uint64_t root = root_payload_bytes(store, store->segment_count + 1) +
			store->segment_count * sizeof(struct mp_checkpoint_grave);

	return full * pages_group_bytes(MP_PAGES_PER_GROUP) +
	       pages_group_bytes(store->dirty_pages % MP_PAGES_PER_GROUP) + root_group_bytes(root);
}

static int make_room(struct mp_store *store)
{
	uint64_t needed = needed_bytes(store);
	struct store_segment *meta = store->active_meta;

	if (meta && meta->length_bytes + needed <= meta->capacity_bytes)
		return 1;
	if (store_segment_want(store, MP_GROUP_META, needed) != 1)
		return 0;
	if (meta)
		store_segment_seal(store, meta);
	store->active_meta = store->spare_meta;
	store->spare_meta = NULL;
	store_segment_insert(store, store->active_meta);
	return 1;
}

/* Give every dirty page its place, children before parents. */
static void freeze_pages(struct mp_store *store, struct store_checkpoint *checkpoint)
{
	uint64_t left = store->dirty_pages, in_group = 0, at = 0;

	checkpoint->pages = store_allocate((left + 1) * sizeof *checkpoint->pages);
	checkpoint->offset_bytes = checkpoint->segment->length_bytes;
	for (uint32_t level = 0; level < STORE_LEVELS; level++) {
		while (store->dirty[level]) {
			struct store_page *page = store->dirty[level];

			if (!in_group) {
				in_group = left < MP_PAGES_PER_GROUP ? left : MP_PAGES_PER_GROUP;
				at = checkpoint->segment->length_bytes + pages_head_bytes(in_group);
				checkpoint->segment->length_bytes += pages_group_bytes(in_group);
			}
			store_page_freeze(store, page,
					  checkpoint->segment->id << MP_PLACE_PAGE_BITS |
							       at / MP_PAGE_BYTES);
			checkpoint->pages[checkpoint->page_count++] = page;
			checkpoint->segment->live_bytes += MP_PAGE_BYTES;
			at += MP_PAGE_BYTES;
			in_group--;
			left--;
		}
	}
	assert(!left && !in_group && !store->dirty_pages);
}

static void freeze(struct mp_store *store)
{
	struct store_checkpoint *checkpoint = store_allocate(sizeof *checkpoint);
	struct store_segment *old = store_segment_find(store, store->super.checkpoint_segment);
	struct store_ranges emptied;
	uint64_t group_bytes;

	checkpoint->segment = store->active_meta;
	checkpoint->requests = store->checkpoint_requests;
	store->checkpoint_requests = (struct store_queue){0};
	if (old)
		old->live_bytes -= store->super.checkpoint_length_bytes;
	store_segment_drop_dead(store);
	freeze_pages(store, checkpoint);
	group_bytes = root_group_bytes(root_payload_bytes(store, store->segment_count));
	checkpoint->segment->length_bytes += group_bytes;
	checkpoint->segment->live_bytes += group_bytes;
	assert(checkpoint->segment->length_bytes <= checkpoint->segment->capacity_bytes);
	checkpoint->root = store_checkpoint_encode(store, &checkpoint->root_bytes);
	assert(root_group_bytes(checkpoint->root_bytes) == group_bytes);
	checkpoint->commit = store->applied.commit;
	/* The array of the last checkpoint's, empty since it was durable, takes what dies next. */
	assert(!store->dying.count);
	emptied = store->dying;
	store->dying = store->dead;
	store->dead = emptied;
	store->checkpoint_log_bytes = store->log_bytes;
	store->checkpoint = checkpoint;
}

static void done(struct store_io *io);

static void write_group(struct mp_store *store, uint64_t length_bytes, uint32_t record_count)
{
	struct store_checkpoint *checkpoint = store->checkpoint;
	struct mp_group *header = (struct mp_group *)(void *)checkpoint->buffer;

	/* No link of the log's chain: references lead here, each with a checksum. */
	header->record_count = record_count;
	header->incarnation = store->super.incarnation;
	header->commit = checkpoint->commit;
	header->segment = checkpoint->segment->id;
	header->offset_bytes = checkpoint->offset_bytes;
	header->length_bytes = length_bytes;
	store_group_seal(header, MP_GROUP_META);
	checkpoint->offset_bytes += length_bytes;
	store->counters.appended_bytes += length_bytes;
	store_submit(store, &checkpoint->io, MP_OP_WRITE, checkpoint->segment->id,
		     header->offset_bytes,
		     checkpoint->buffer, length_bytes);
}

static void seal(uint8_t *at, uint32_t type, uint32_t part, uint64_t payload_bytes)
{
	struct mp_record *record = (struct mp_record *)(void *)at;

	assert(part == 0 || type == MP_RECORD_CHECKPOINT);
	record->type = (uint16_t)type;
	record->header_length_bytes = MP_RECORD_HEADER_BYTES;
	record->payload_length_bytes = payload_bytes;
	record->payload_checksum = mp_xxh3(record + 1, payload_bytes);
	/* Parts are in order of their sequence; part_index is for batches. */
	record->first_sequence = record->last_sequence = part;
	mp_record_seal(record);
}

static void write_pages(struct mp_store *store)
{
	struct store_checkpoint *checkpoint = store->checkpoint;
	struct store_page **pages = checkpoint->pages + checkpoint->pages_written;
	uint64_t left = checkpoint->page_count - checkpoint->pages_written;
	uint64_t count = left < MP_PAGES_PER_GROUP ? left : MP_PAGES_PER_GROUP;
	uint64_t head = pages_head_bytes(count);
	uint8_t *record, *descriptor;

	checkpoint->buffer = store_allocate_aligned(pages_group_bytes(count));
	memset(checkpoint->buffer, 0, head);
	record = checkpoint->buffer + MP_GROUP_HEADER_BYTES;
	descriptor = record + MP_RECORD_HEADER_BYTES;
	for (uint64_t i = 0; i < count; i++) {
		memcpy(descriptor + i * sizeof pages[i]->about, &pages[i]->about,
		       sizeof pages[i]->about);
		memcpy(checkpoint->buffer + head + i * MP_PAGE_BYTES, pages[i]->data,
		       MP_PAGE_BYTES);
	}
	seal(record, MP_RECORD_PAGES, 0,
	     pages_group_bytes(count) - MP_GROUP_HEADER_BYTES - MP_RECORD_HEADER_BYTES);
	checkpoint->pages_in_group = count;
	write_group(store, pages_group_bytes(count), 1);
}

static void write_root(struct mp_store *store)
{
	struct store_checkpoint *checkpoint = store->checkpoint;
	uint64_t length_bytes = root_group_bytes(checkpoint->root_bytes), done_bytes = 0;
	uint8_t *at;
	uint32_t part = 0;

	checkpoint->buffer = store_allocate_aligned(length_bytes);
	memset(checkpoint->buffer, 0, length_bytes);
	at = checkpoint->buffer + MP_GROUP_HEADER_BYTES;
	while (done_bytes < checkpoint->root_bytes) {
		uint64_t bytes = checkpoint->root_bytes - done_bytes;

		if (bytes > MP_RECORD_PAYLOAD_MAX)
			bytes = MP_RECORD_PAYLOAD_MAX;
		memcpy(at + MP_RECORD_HEADER_BYTES, checkpoint->root + done_bytes, bytes);
		seal(at, MP_RECORD_CHECKPOINT, part++, bytes);
		at += MP_RECORD_HEADER_BYTES + bytes;
		done_bytes += bytes;
	}
	store->super.checkpoint_segment = checkpoint->segment->id;
	store->super.checkpoint_offset_bytes = checkpoint->offset_bytes;
	store->super.checkpoint_length_bytes = length_bytes;
	write_group(store, length_bytes, part);
	store->super.checkpoint_checksum =
		((struct mp_group *)(void *)checkpoint->buffer)->checksum;
}

static void write_super(struct mp_store *store, int first)
{
	struct store_checkpoint *checkpoint = store->checkpoint;

	store->super.generation += first != 0;
	store_super_seal(&store->super);
	checkpoint->buffer = store_allocate_aligned(sizeof store->super);
	memcpy(checkpoint->buffer, &store->super, sizeof store->super);
	store->super_copy = 1 - store->super_copy;
	store_submit(store, &checkpoint->io, MP_OP_WRITE, 0,
		     store->super_copy * sizeof store->super,
		     checkpoint->buffer, sizeof store->super);
}

static void start_step(struct mp_store *store)
{
	struct store_checkpoint *checkpoint = store->checkpoint;

	checkpoint->io.done = done;
	switch (checkpoint->step) {
	case WRITE_PAGES:
		write_pages(store);
		break;
	case WRITE_ROOT:
		write_root(store);
		break;
	case WRITE_SUPER:
	case WRITE_SUPER_2:
		write_super(store, checkpoint->step == WRITE_SUPER);
		break;
	default:
		store_submit(store, &checkpoint->io, MP_OP_SYNC,
			     checkpoint->step == SYNC_META ? checkpoint->segment->id : 0, 0, NULL,
				0);
	}
}

static void finish(struct mp_store *store)
{
	struct store_checkpoint *checkpoint = store->checkpoint;
	struct store_request *request;

	store->counters.checkpoints++;
	store_ranges_release(store, &store->dying);
	store_sweep_start(store);
	if (store->grave_blocked == 2)
		store->grave_blocked = 0;
	while ((request = store_queue_pop(&checkpoint->requests)))
		store_reply(store, request, MP_STATUS_OK);
	if (store->final_checkpoint == 1)
		store->final_checkpoint = 2;
	store->checkpoint = NULL;
	free(checkpoint->pages);
	free(checkpoint->root);
	free(checkpoint);
}

static enum step next_step(struct mp_store *store)
{
	struct store_checkpoint *checkpoint = store->checkpoint;

	if (checkpoint->step == WRITE_PAGES && checkpoint->pages_written < checkpoint->page_count)
		return WRITE_PAGES;
	/* The deliberate fault: a superblock that may outlive what it points to. */
	if (checkpoint->step == WRITE_ROOT && store_fault(store,
							  MP_STORE_FAULT_CHECKPOINT_BEFORE_DATA))
		return WRITE_SUPER;
	return checkpoint->step + 1;
}

static void done(struct store_io *io)
{
	struct mp_store *store = io->store;
	struct store_checkpoint *checkpoint = store->checkpoint;

	free(checkpoint->buffer);
	checkpoint->buffer = NULL;
	if (io->io.result < 0) {
		store_fail(store, (int)io->io.result, "cannot write a checkpoint to segment",
			   io->io.file, io->io.offset_bytes);
		return;
	}
	if (checkpoint->step == WRITE_PAGES)
		for (uint64_t i = 0; i < checkpoint->pages_in_group; i++)
			store_page_written(store, checkpoint->pages[checkpoint->pages_written++]);
	if (checkpoint->step == SYNC_SUPER_2) {
		finish(store);
		return;
	}
	checkpoint->step = next_step(store);
	start_step(store);
}

static int wanted(const struct mp_store *store)
{
	int full = store->full_until_ns > store->turn_ns && store->dead.count;

	return store->checkpoint_requests.head || store->dirty_pages >= store->dirty_limit ||
	       store->final_checkpoint == 1 || full ||
	       store->log_bytes - store->checkpoint_log_bytes >=
		       store->options.checkpoint_every_bytes;
}

void store_checkpoint_advance(struct mp_store *store)
{
	struct store_request *request;

	if (store->failure) {
		struct store_checkpoint *running = store->checkpoint;
		while ((request = store_queue_pop(&store->checkpoint_requests)) ||
		       (running && (request = store_queue_pop(&running->requests))))
			store_reply(store, request, MP_STATUS_IO);
		return;
	}
	/* A checkpoint is a state between two groups. */
	if (store->checkpoint || (store->durable && store->durable->apply_offset) ||
	    !wanted(store) ||
	    !make_room(store))
		return;
	freeze(store);
	store->checkpoint->step = store->checkpoint->page_count ? WRITE_PAGES : WRITE_ROOT;
	start_step(store);
}

void store_checkpoint_free(struct mp_store *store)
{
	struct store_checkpoint *checkpoint = store->checkpoint;
	struct store_request *request;

	if (!checkpoint)
		return;
	while ((request = store_queue_pop(&checkpoint->requests)))
		store_request_free(store, request);
	free(checkpoint->pages);
	free(checkpoint->root);
	free(checkpoint->buffer);
	free(checkpoint);
}
