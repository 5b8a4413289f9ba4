/* storescrub.c - read in the background what the store keeps, and see whether it still verifies.
 *
 * Happy path: a pass goes through the segments of the log in order of id, from one that chance
 * chooses, round to the one before it. In each, the extents that are alive are read by the extent
 * table, neighbours together, and verified as a READ would; then the headers of groups and records
 * and their tables are read and verified. One read at a time, at the budgeted rate; one pass per
 * interval at most. Nothing is changed.
 * Clients go first: a read waits until no client has asked for anything for a while, but not for
 * ever: a busy store is scrubbed at an eighth of the rate, and at 12 MiB/s at most.
 * Failure modes: what does not verify is counted, and told once per pass (a bounded list, which
 * the daemon takes); reading it stays the error that it is. Segments may go and ranges be punched
 * at any time but while they are read: everything is looked up again for each read.
 */
#include "store_internal.h"

enum { WINDOW_BYTES = 128 << 10,            /* of one read, but for longer tables */
	BUFFER_BYTES = (1 << 20) + 2 * MP_BLOCK_BYTES,
	CLIENTS_SHARE = 8 };
#define CLIENTS_QUIET_NS 10000000ULL
#define EMPTY_RETRY_NS 60000000000ULL       /* of a store that has no log yet */

_Static_assert(BUFFER_BYTES >= MP_RECORD_HEADER_BYTES + MP_RECORD_EXTENTS_MAX * MP_EXTENT_BYTES +
	       2 * MP_BLOCK_BYTES, "a whole table");

static void tell(struct mp_store *store, const struct mp_scrub_finding *finding)
{
	struct store_scrub *scrub = &store->scrub;

	store->counters.scrub_bad++;
	pthread_mutex_lock(&store->mutex);
	if (scrub->finding_count < STORE_SCRUB_FINDINGS)
		scrub->findings[scrub->finding_count++] = *finding;
	pthread_mutex_unlock(&store->mutex);
	store->driver->notify(store->driver->self);
}

int64_t mp_store_scrub_findings(struct mp_store *store, struct mp_scrub_finding *out,
				uint64_t capacity)
{
	struct store_scrub *scrub = &store->scrub;
	uint64_t count;

	pthread_mutex_lock(&store->mutex);
	count = scrub->finding_count < capacity ? scrub->finding_count : capacity;
	memcpy(out, scrub->findings, count * sizeof *out);
	scrub->finding_count -= (uint32_t)count;
	memmove(scrub->findings, scrub->findings + count,
		scrub->finding_count * sizeof *scrub->findings);
	pthread_mutex_unlock(&store->mutex);
	return (int64_t)count;
}

/* ---- which segment ---- */

/* How much of it is log that is durable and applied. */
static uint64_t log_bytes(const struct mp_store *store, const struct store_segment *segment)
{
	if (segment->id == store->applied.segment)
		return store->applied.offset_bytes;
	return segment->id < store->applied.segment ? segment->length_bytes : 0;
}

static struct store_segment *segment_behind(struct mp_store *store, uint64_t id)
{
	for (uint64_t i = 0; i < store->segment_count; i++) {
		struct store_segment *segment = store->segments[i];

		if (segment->id > id && segment->kind == MP_GROUP_DATA && log_bytes(store, segment))
			return segment;
	}
	return NULL;
}

static void enter(struct store_scrub *scrub, const struct store_segment *segment)
{
	scrub->segment = segment->id;
	scrub->index = scrub->one_by_one = 0;
	scrub->in_headers = 0;
	scrub->offset_bytes = scrub->group_bytes = 0;
	scrub->window_to = scrub->window_from = 0;
}

static void begin_pass(struct mp_store *store)
{
	struct store_scrub *scrub = &store->scrub;
	struct store_segment *segment = NULL;
	uint64_t chance;

	scrub->pass_due_ns = store->turn_ns + store->options.scrub_interval_ns;
	/* A daemon that is often started anew must not always scrub the same. */
	store->driver->random_bytes(store->driver->self, &chance, sizeof chance);
	chance %= store->segment_count + 1;
	if (chance < store->segment_count)
		segment = segment_behind(store, store->segments[chance]->id - 1);
	if (!segment)
		segment = segment_behind(store, 0);
	if (!segment) {
		scrub->pass_due_ns = store->turn_ns + EMPTY_RETRY_NS;
		return;
	}
	scrub->running = 1;
	scrub->wrapped = 0;
	scrub->first_segment = segment->id;
	store->counters.scrub_bad = 0;
	enter(scrub, segment);
}

static void end_pass(struct mp_store *store)
{
	store->scrub.running = 0;
	store->scrub.segment = 0;
	store->counters.scrub_passes++;
	store->counters.scrub_bad_last_pass = store->counters.scrub_bad;
	store->counters.scrub_finished_ns = store->turn_ns;
}

static void next_segment(struct mp_store *store)
{
	struct store_scrub *scrub = &store->scrub;
	struct store_segment *segment = segment_behind(store, scrub->segment);

	if (!segment && !scrub->wrapped) {
		scrub->wrapped = 1;
		segment = segment_behind(store, 0);
	}
	if (!segment || (scrub->wrapped && segment->id >= scrub->first_segment))
		end_pass(store);
	else
		enter(scrub, segment);
}

/* ---- reading ---- */

static void submit(struct mp_store *store, struct store_segment *segment, uint64_t from,
		   uint64_t to, void (*done)(struct store_io *io))
{
	struct store_scrub *scrub = &store->scrub;
	uint64_t bytes = to - from;

	assert(bytes && bytes <= BUFFER_BYTES && !scrub->reading);
	if (!scrub->buffer)
		scrub->buffer = store_allocate_aligned(BUFFER_BYTES);
	scrub->reading = 1;
	scrub->window_from = from;
	scrub->window_to = to;
	scrub->cost_ns = bytes * 1000000000ULL / store->options.scrub_bytes_per_s;
	scrub->due_ns = store->turn_ns + scrub->cost_ns;
	scrub->io.done = done;
	scrub->io.owner = segment;
	segment->readers++;
	store->counters.scrub_read_bytes += bytes;
	store_submit(store, &scrub->io, MP_OP_READ, segment->id, from, scrub->buffer, bytes);
}

/* 1: the read brought what it was to bring. */
static int arrived(struct store_io *io)
{
	struct store_segment *segment = io->owner;
	struct store_scrub *scrub = &io->store->scrub;

	assert(segment->readers); /* or it might be gone */
	segment->readers--;
	scrub->reading = 0;
	return io->io.result >= 0;
}

static void ready(struct mp_store *store, struct store_wait *wait)
{
	(void)wait;
	store->scrub.blocked = 0;
}

static void wait_for_page(struct mp_store *store)
{
	struct store_scrub *scrub = &store->scrub;

	scrub->blocked = 1;
	scrub->wait.ready = ready;
	/* The page is part of the budget. */
	scrub->due_ns += MP_PAGE_BYTES * 1000000000ULL / store->options.scrub_bytes_per_s;
	store_page_wait(store, &scrub->wait);
}

/* ---- extents ---- */

/* Which blocks of a live extent do not verify: bits. */
static uint32_t bad_blocks(struct mp_store *store, const struct mp_extent_entry *entry,
			   const uint8_t *stored)
{
	struct mp_extent extent;
	uint32_t bad = 0;

	if (store_extent_describe(store, entry, &extent))
		return entry->live;
	if (extent.codec != MP_CODEC_NONE)
		return mp_extent_verify(&extent, 0, (uint32_t)extent.block_count, stored,
					extent.stored_length_bytes) ? entry->live : 0;
	for (uint32_t i = 0; i < extent.block_count; i++)
		if (entry->live & 1U << i &&
		    mp_extent_verify(&extent, i, 1, stored + (uint64_t)i * MP_BLOCK_BYTES,
				     MP_BLOCK_BYTES))
			bad |= 1U << i;
	return bad;
}

/* It may have died while it was read: then nobody misses it. */
static uint32_t still_alive(struct mp_store *store, uint64_t segment, uint32_t index)
{
	struct mp_extent_entry *entry;
	uint64_t address = (segment << MP_ADDRESS_EXTENT_BITS | index) << MP_ADDRESS_BLOCK_BITS;

	return store_segment_find(store, segment) &&
	       store_extent_get(store, address, STORE_LOOK, &entry) == 0 ? entry->live
									   : UINT32_MAX;
}

static void bad_extent(struct mp_store *store, const struct mp_extent_entry *entry, uint32_t index,
		       uint32_t bad, int unreadable)
{
	struct mp_scrub_finding finding = {
		.kind = unreadable ? MP_SCRUB_UNREADABLE : MP_SCRUB_EXTENT,
		.segment = store->scrub.segment, .offset_bytes = entry->offset_bytes};
	struct mp_extent extent;
	uint32_t first, last;

	bad &= still_alive(store, store->scrub.segment, index);
	if (!bad)
		return;
	first = (uint32_t)__builtin_ctz(bad);
	last = 31 - (uint32_t)__builtin_clz(bad);
	if (!store_extent_describe(store, entry, &extent))
		memcpy(finding.volume, extent.origin, sizeof finding.volume);
	finding.first_block = entry->first_block + first;
	finding.block_count = last - first + 1;
	tell(store, &finding);
}

static void extents_read(struct store_io *io)
{
	struct mp_store *store = io->store;
	struct store_scrub *scrub = &store->scrub;
	int whole = arrived(io);

	/* One bad sector must not hide its neighbours: again, one by one. */
	if (!whole && scrub->count > 1) {
		scrub->index = scrub->indices[0];
		scrub->one_by_one = scrub->indices[scrub->count - 1] + 1;
		return;
	}
	for (uint32_t i = 0; i < scrub->count; i++) {
		const struct mp_extent_entry *entry = &scrub->entries[i];
		uint32_t bad = whole ? bad_blocks(store, entry,
						  scrub->buffer + (entry->offset_bytes -
								   scrub->window_from))
				     : entry->live;

		if (bad)
			bad_extent(store, entry, scrub->indices[i], bad, !whole);
		else
			store->counters.scrub_verified_bytes += entry->stored_length_bytes;
	}
}

/* Live extents of a leaf from index on that one read brings. */
static void collect(struct store_scrub *scrub, const struct mp_extent_entry *entries,
		    uint64_t *from, uint64_t *to)
{
	uint32_t mask = (1 << MP_EXTENT_LEAF_BITS) - 1;

	scrub->count = 0;
	do {
		const struct mp_extent_entry *entry = &entries[scrub->index & mask];
		uint64_t begin = entry->offset_bytes / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
		uint64_t end = store_align((uint64_t)entry->offset_bytes +
						   entry->stored_length_bytes, MP_BLOCK_BYTES);

		if (!entry->live)
			continue;
		if (scrub->count && (begin < *from || end > *from + WINDOW_BYTES ||
				     scrub->index < scrub->one_by_one))
			return;
		if (!scrub->count)
			*from = begin;
		*to = end;
		scrub->entries[scrub->count] = *entry;
		scrub->indices[scrub->count++] = scrub->index;
	} while (++scrub->index & mask);
}

static void bad_table(struct mp_store *store)
{
	const struct mp_scrub_finding finding = {.kind = MP_SCRUB_TABLE,
						 .segment = store->scrub.segment,
						 .block_count = 1 << MP_EXTENT_LEAF_BITS,
						 .first_block = store->scrub.index};

	tell(store, &finding);
}

/* 0: nothing more to do in this turn. */
static int scrub_extents(struct mp_store *store, struct store_segment *segment)
{
	struct store_scrub *scrub = &store->scrub;
	uint64_t end, from = 0, to = 0;
	uint8_t *leaf;
	int error;

	if (scrub->index >= segment->extent_count) {
		scrub->in_headers = 1;
		scrub->window_to = scrub->window_from = 0;
		return 1;
	}
	error = store_tree_span(store, &segment->extents, scrub->index, &leaf, &end);
	if (error == -EAGAIN) {
		wait_for_page(store);
		return 0;
	}
	if (error || !leaf) {
		if (error)
			bad_table(store);
		end = error ? (scrub->index | ((1U << MP_EXTENT_LEAF_BITS) - 1)) + 1ULL : end;
		scrub->index = end < segment->extent_count ? (uint32_t)end : segment->extent_count;
		return 1;
	}
	collect(scrub, (const struct mp_extent_entry *)(const void *)leaf, &from, &to);
	if (!scrub->count)
		return 1;
	submit(store, segment, from, to, extents_read);
	return 0;
}

/* ---- headers ---- */

static void bad_record(struct mp_store *store, uint64_t offset_bytes, int unreadable)
{
	const struct mp_scrub_finding finding = {
		.kind = unreadable ? MP_SCRUB_UNREADABLE : MP_SCRUB_RECORD,
		.segment = store->scrub.segment, .offset_bytes = offset_bytes};

	tell(store, &finding);
}

/* Behind a record that tells nothing: its group does, or the segment is left. */
static void leave_group(struct store_scrub *scrub)
{
	if (scrub->group_bytes)
		scrub->offset_bytes = scrub->group_offset_bytes + scrub->group_bytes;
	else
		scrub->offset_bytes = UINT64_MAX;
	scrub->group_bytes = 0;
}

static void headers_read(struct store_io *io)
{
	struct store_scrub *scrub = &io->store->scrub;

	if (arrived(io))
		return;
	scrub->window_to = scrub->window_from = 0;
	bad_record(io->store, scrub->offset_bytes, 1);
	leave_group(scrub);
}

/* bytes of the segment from offset on, if they are in memory; else they are being read. */
static const uint8_t *window(struct mp_store *store, struct store_segment *segment, uint64_t bytes)
{
	struct store_scrub *scrub = &store->scrub;
	uint64_t from = scrub->offset_bytes / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	uint64_t to = store_align(scrub->offset_bytes + bytes, MP_BLOCK_BYTES);
	uint64_t end = log_bytes(store, segment);

	if (scrub->window_from <= from && to <= scrub->window_to)
		return scrub->buffer + (scrub->offset_bytes - scrub->window_from);
	if (to < from + WINDOW_BYTES)
		to = from + WINDOW_BYTES < end ? from + WINDOW_BYTES : end;
	submit(store, segment, from, to, headers_read);
	return NULL;
}

/* The group at offset. 1: go on; 0: it is being read. */
static int scrub_group(struct mp_store *store, struct store_segment *segment)
{
	struct store_scrub *scrub = &store->scrub;
	uint64_t left_bytes = log_bytes(store, segment) - scrub->offset_bytes;
	const uint8_t *bytes = window(store, segment, MP_BLOCK_BYTES);
	const struct mp_group *group = (const void *)bytes;

	if (!bytes)
		return 0;
	/* A group without records that a power cut took back; see storefscklog.c. */
	if (mp_is_zero(bytes, MP_BLOCK_BYTES)) {
		scrub->offset_bytes += MP_BLOCK_BYTES;
		return 1;
	}
	if (store_group_check(group, segment->id, scrub->offset_bytes) ||
	    group->length_bytes > left_bytes) {
		bad_record(store, scrub->offset_bytes, 0);
		leave_group(scrub);
		return 1;
	}
	scrub->group_offset_bytes = scrub->offset_bytes;
	scrub->group_bytes = group->length_bytes;
	scrub->records_left = group->record_count;
	scrub->offset_bytes += MP_GROUP_HEADER_BYTES;
	scrub->table_bytes = MP_RECORD_HEADER_BYTES;
	return 1;
}

/* The record at offset. 1: go on; 0: it is being read. */
static int scrub_record(struct mp_store *store, struct store_segment *segment)
{
	struct store_scrub *scrub = &store->scrub;
	uint64_t end = scrub->group_offset_bytes + scrub->group_bytes;
	const struct mp_record *record;
	int64_t whole;
	int error;

	if (scrub->offset_bytes + scrub->table_bytes > end) {
		bad_record(store, scrub->offset_bytes, 0);
		leave_group(scrub);
		return 1;
	}
	record = (const void *)window(store, segment, scrub->table_bytes);
	if (!record)
		return 0;
	whole = mp_record_check(record, scrub->table_bytes);
	if (whole == -EAGAIN) {
		scrub->table_bytes = record->header_length_bytes;
		return 1;
	}
	error = whole < 0 || scrub->offset_bytes + (uint64_t)whole > end;
	/* A state is small, and is no extent: it is verified here, when all of it is there. */
	if (!error && record->type == MP_RECORD_VOLUME && scrub->table_bytes < (uint64_t)whole) {
		scrub->table_bytes = (uint64_t)whole;
		return 1;
	}
	if (!error && record->type == MP_RECORD_VOLUME)
		error = mp_record_check_payload(record, (uint64_t)whole);
	if (error) {
		bad_record(store, scrub->offset_bytes, 0);
		leave_group(scrub);
		return 1;
	}
	store->counters.scrub_verified_bytes += scrub->table_bytes;
	scrub->offset_bytes += store_align((uint64_t)whole, 8);
	scrub->table_bytes = MP_RECORD_HEADER_BYTES;
	scrub->records_left--;
	return 1;
}

static int scrub_headers(struct mp_store *store, struct store_segment *segment)
{
	struct store_scrub *scrub = &store->scrub;

	if (scrub->group_bytes && scrub->records_left)
		return scrub_record(store, segment);
	if (scrub->group_bytes)
		leave_group(scrub);
	if (scrub->offset_bytes < log_bytes(store, segment))
		return scrub_group(store, segment);
	next_segment(store);
	return scrub->running;
}

/* ---- when ---- */

static int clients_busy(const struct mp_store *store)
{
	return store->reads_in_flight || store->reads_waiting.head || store->statuses_in_flight ||
	       store->statuses_waiting.head || !store_log_idle(store) ||
	       store->turn_ns < store->client_ns + CLIENTS_QUIET_NS;
}

/* What a read may be put off for clients, at most. Whatever the rate, not a hundred reads per
 * second come between them. */
static uint64_t deadline_ns(const struct store_scrub *scrub)
{
	uint64_t patience_ns = (CLIENTS_SHARE - 1) * scrub->cost_ns;

	return scrub->due_ns + (patience_ns > CLIENTS_QUIET_NS ? patience_ns : CLIENTS_QUIET_NS);
}

static int is_on(const struct mp_store *store)
{
	return store->options.scrub_bytes_per_s && !store->failure && !store->winding_down;
}

void store_scrub_advance(struct mp_store *store)
{
	struct store_scrub *scrub = &store->scrub;

	if (!is_on(store) || scrub->reading || scrub->blocked || store->turn_ns < scrub->due_ns)
		return;
	if (!scrub->running && store->turn_ns >= scrub->pass_due_ns)
		begin_pass(store);
	if (!scrub->running)
		return;
	if (clients_busy(store) && store->turn_ns < deadline_ns(scrub)) {
		store->counters.scrub_yields += !scrub->yielding;
		scrub->yielding = 1;
		return;
	}
	scrub->yielding = 0;
	/* Bounded: what is in memory of a window, and holes of a table. */
	for (uint32_t i = 0; i < STORE_SCRUB_STEPS && scrub->running; i++) {
		struct store_segment *segment = store_segment_find(store, scrub->segment);

		if (!segment || !log_bytes(store, segment))
			next_segment(store);
		else if (!(scrub->in_headers ? scrub_headers(store, segment)
					     : scrub_extents(store, segment)))
			break;
	}
	store->counters.scrub_segment = scrub->segment;
	store->counters.scrub_offset_bytes = scrub->running ? scrub->window_from : 0;
}

/* When there is something to do that no completion announces. UINT64_MAX: nothing. */
uint64_t store_scrub_wake_ns(const struct mp_store *store)
{
	const struct store_scrub *scrub = &store->scrub;
	uint64_t at = scrub->running ? scrub->due_ns : scrub->pass_due_ns;
	uint64_t quiet = store->client_ns + CLIENTS_QUIET_NS, late = deadline_ns(scrub);

	if (!is_on(store) || scrub->reading || scrub->blocked)
		return UINT64_MAX;
	if (scrub->running && clients_busy(store) && store->turn_ns >= at)
		return quiet > store->turn_ns && quiet < late ? quiet : late;
	return at;
}

void store_scrub_free(struct mp_store *store)
{
	free(store->scrub.buffer);
}
