/* storesegment.c - segment files: opened ahead, sealed, punched, removed.
 *
 * Happy path: a spare segment is created and allocated before it is needed, so that an append never
 * meets ENOSPC. What died is punched, and segments without life are removed, once a durable
 * checkpoint knows of the death and no read is in flight there. A meta spare comes before any data
 * spare: a full store can still write checkpoints, and so give space back.
 * Failure modes: no space for a spare: -ENOSPC for a while, then tried again; any other error of
 * CREATE or ALLOCATE fails the store. A punch or removal that fails leaves space behind, no more.
 */
#include "store_internal.h"

/* Index of the first segment whose id is not below id. */
static uint64_t lower_bound(const struct mp_store *store, uint64_t id)
{
	uint64_t low = 0, high = store->segment_count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (store->segments[middle]->id < id)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

struct store_segment *store_segment_find(struct mp_store *store, uint64_t id)
{
	uint64_t index = lower_bound(store, id);

	if (index == store->segment_count || store->segments[index]->id != id)
		return NULL;
	return store->segments[index];
}

static struct store_segment *make(struct mp_store *store, uint64_t id, uint32_t kind)
{
	struct store_segment *segment = store_allocate(sizeof *segment);

	segment->id = id;
	segment->kind = (uint16_t)kind;
	segment->extents.leaf_bits = MP_EXTENT_LEAF_BITS;
	segment->extents.segment = id;
	if (id >= store->next_segment)
		store->next_segment = id + 1;
	return segment;
}

void store_segment_insert(struct mp_store *store, struct store_segment *segment)
{
	uint64_t index = lower_bound(store, segment->id);

	store->segments = store_grow(store->segments, &store->segment_capacity,
				     store->segment_count + 1, sizeof *store->segments);
	memmove(store->segments + index + 1, store->segments + index,
		(store->segment_count - index) * sizeof *store->segments);
	store->segments[index] = segment;
	store->segment_count++;
	store->counters.segments = store->segment_count;
}

struct store_segment *store_segment_add(struct mp_store *store, uint64_t id, uint32_t kind)
{
	struct store_segment *segment = make(store, id, kind);

	segment->created = 1;
	store_segment_insert(store, segment);
	return segment;
}

static int out_of_space(int64_t result)
{
	return result == -ENOSPC || result == -EDQUOT;
}

static void open_step(struct store_io *io);

static void open_next(struct mp_store *store)
{
	struct store_segment *segment = store->opening;

	store->opening_io.done = open_step;
	if (!segment->created)
		store_submit(store, &store->opening_io, MP_OP_CREATE, segment->id, 0, NULL, 0);
	else
		store_submit(store, &store->opening_io, MP_OP_ALLOCATE, segment->id, 0, NULL,
			     store->opening_bytes);
}

static void open_step(struct store_io *io)
{
	struct mp_store *store = io->store;
	struct store_segment *segment = store->opening;

	if (out_of_space(io->io.result)) {
		store->full_until_ns =
			store->driver->now_ns(store->driver->self) + STORE_FULL_RETRY_NS;
		store->counters.full = 1;
		store->opening_bytes = 0; /* the segment waits, created or not, for the next try */
		return;
	}
	if (io->io.result < 0) {
		store_fail(store, (int)io->io.result, "cannot open segment", segment->id, 0);
		store->opening_bytes = 0;
		return;
	}
	if (!segment->created) {
		segment->created = 1;
		open_next(store);
		return;
	}
	segment->capacity_bytes = store->opening_bytes;
	store->counters.full = 0;
	store->opening = NULL;
	store->opening_bytes = 0;
	if (segment->kind == MP_GROUP_META)
		store->spare_meta = segment;
	else
		store->spare = segment;
}

static void open_start(struct mp_store *store, struct store_segment **spare, uint32_t kind,
		       uint64_t bytes)
{
	if (*spare) { /* too small: make it longer */
		assert(!store->opening);
		store->opening = *spare;
		*spare = NULL;
	} else if (!store->opening) {
		store->opening = make(store, store->next_segment, kind);
	}
	store->opening->kind = (uint16_t)kind;
	store->opening_bytes = store_align(bytes, MP_BLOCK_BYTES);
	open_next(store);
}

/* 1: the spare of this kind has bytes; 0: it is on its way; -ENOSPC: full for now. */
int store_segment_want(struct mp_store *store, uint32_t kind, uint64_t bytes)
{
	struct store_segment **spare = kind == MP_GROUP_META ? &store->spare_meta : &store->spare;

	if (bytes < store->options.segment_bytes)
		bytes = store->options.segment_bytes;
	if (*spare && (*spare)->capacity_bytes >= bytes)
		return 1;
	if (store->opening_bytes || store->failure)
		return 0;
	if (store->driver->now_ns(store->driver->self) < store->full_until_ns)
		return -ENOSPC;
	/* A segment left over from a full disk is of either kind; a spare to lengthen has to wait
	 * for it. */
	if (kind == MP_GROUP_DATA && !store->spare_meta) {
		open_start(store, &store->spare_meta, MP_GROUP_META, store->options.segment_bytes);
		return 0;
	}
	if (store->opening && *spare)
		return -ENOSPC;
	open_start(store, spare, kind, bytes);
	return 0;
}

/* Nothing is appended to it any more, and all of it is on the device: give back what it did not
 * use. */
void store_segment_seal(struct mp_store *store, struct store_segment *segment)
{
	uint64_t end = segment->length_bytes;

	segment->sealed = 1;
	if (segment->capacity_bytes <= end)
		return;
	store->punchable.items = store_grow(store->punchable.items, &store->punchable.capacity,
					    store->punchable.count + 1, sizeof(struct store_range));
	store->punchable.items[store->punchable.count++] = (struct store_range){
		segment->id, (uint32_t)end, (uint32_t)(segment->capacity_bytes - end)};
}

/* At freeze: segments without life are in no checkpoint from here on; their files go once it is
 * durable. */
void store_segment_drop_dead(struct mp_store *store)
{
	uint64_t kept = 0;

	for (uint64_t i = 0; i < store->segment_count; i++) {
		struct store_segment *segment = store->segments[i];
		int current = segment->kind == MP_GROUP_META
				      ? segment == store->active_meta
				      : segment->id >= store->applied.segment;

		if (current || segment->live_bytes || segment->readers) {
			store->segments[kept++] = segment;
			continue;
		}
		store_bury(store, &segment->extents.root, segment->extents.height,
			   MP_GRAVE_EXTENTS);
		store->removable = store_grow(store->removable, &store->removable_capacity,
					      store->removable_count + 1, sizeof(void *));
		store->removable[store->removable_count++] = segment;
	}
	store->segment_count = kept;
	store->counters.segments = kept;
}

void store_dead_range(struct mp_store *store, uint64_t segment, uint64_t offset_bytes,
		      uint64_t length_bytes)
{
	struct store_ranges *dead = &store->dead;

	if (dead->count >= STORE_DEAD_RANGES_MAX)
		return;
	dead->items = store_grow(dead->items, &dead->capacity, dead->count + 1,
				 sizeof *dead->items);
	dead->items[dead->count++] =
		(struct store_range){segment, (uint32_t)offset_bytes, (uint32_t)length_bytes};
}

static int compare(const void *left, const void *right)
{
	const struct store_range *a = left, *b = right;

	if (a->segment != b->segment)
		return a->segment < b->segment ? -1 : 1;
	return a->offset_bytes < b->offset_bytes ? -1 : a->offset_bytes > b->offset_bytes;
}

static void merge(struct store_ranges *ranges)
{
	uint64_t kept = 0;

	if (!ranges->count)
		return;
	qsort(ranges->items, ranges->count, sizeof *ranges->items, compare);
	for (uint64_t i = 1; i < ranges->count; i++) {
		struct store_range *last = &ranges->items[kept], *item = &ranges->items[i];

		if (item->segment == last->segment &&
		    item->offset_bytes == last->offset_bytes + last->length_bytes)
			last->length_bytes += item->length_bytes;
		else
			ranges->items[++kept] = *item;
	}
	ranges->count = kept + 1;
}

/* These ranges may be punched: a durable checkpoint knows that they are dead. from is empty then.
 */
void store_ranges_release(struct mp_store *store, struct store_ranges *from)
{
	struct store_ranges *to = &store->punchable;

	to->count -= store->punch_next;
	if (to->count)
		memmove(to->items, to->items + store->punch_next, to->count * sizeof *to->items);
	store->punch_next = 0;
	to->items = store_grow(to->items, &to->capacity, to->count + from->count + 1,
			       sizeof *to->items);
	if (from->count)
		memcpy(to->items + to->count, from->items, from->count * sizeof *to->items);
	to->count += from->count;
	from->count = 0;
	merge(to);
}

static void punched(struct store_io *io)
{
	io->store->punches--;
	io->owner = NULL;
	if (io->io.result >= 0)
		io->store->counters.punched_bytes += io->io.length_bytes;
	else
		io->store->counters.io_errors++;
}

/* Whole blocks inside the range go; its edges wait for the death of their neighbours. */
static void punch(struct mp_store *store, const struct store_range *range)
{
	struct store_segment *segment = store_segment_find(store, range->segment);
	uint64_t end = (uint64_t)range->offset_bytes + range->length_bytes;
	uint64_t from = store_align(range->offset_bytes, MP_BLOCK_BYTES);
	uint64_t to = end / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	struct store_io *io = store->punch;

	if (!segment)
		return; /* removed as a whole */
	if (segment->readers || from >= to) {
		store_dead_range(store, range->segment, range->offset_bytes, range->length_bytes);
		return;
	}
	if (from > range->offset_bytes)
		store_dead_range(store, range->segment, range->offset_bytes,
				 from - range->offset_bytes);
	if (end > to)
		store_dead_range(store, range->segment, to, end - to);
	while (io->owner)
		io++;
	io->owner = io;
	io->done = punched;
	store->punches++;
	store_submit(store, io, MP_OP_PUNCH, range->segment, from, NULL, to - from);
}

static void removed(struct store_io *io)
{
	struct mp_store *store = io->store;

	store->counters.io_errors += io->io.result < 0;
	free(io->owner);
	io->owner = NULL;
	store->removing = 0;
}

static void remove_one(struct mp_store *store)
{
	for (uint64_t i = 0; i < store->removable_count; i++) {
		struct store_segment *segment = store->removable[i];

		if (segment->readers)
			continue;
		store->removable[i] = store->removable[--store->removable_count];
		store->removing = 1;
		store->remove_io.done = removed;
		store->remove_io.owner = segment;
		store->counters.punched_bytes += segment->length_bytes;
		store_submit(store, &store->remove_io, MP_OP_REMOVE, segment->id, 0, NULL, 0);
		return;
	}
}

void store_reclaim(struct mp_store *store)
{
	if (store_fault(store, MP_STORE_FAULT_PUNCH_EARLY))
		store_ranges_release(store, &store->dead);
	while (!store->failure && store->punches < STORE_PUNCHES_IN_FLIGHT &&
	       store->punch_next < store->punchable.count)
		punch(store, &store->punchable.items[store->punch_next++]);
	if (store->punch_next == store->punchable.count)
		store->punch_next = store->punchable.count = 0;
	/* What the running checkpoint leaves out is still in the durable one. */
	if (!store->failure && !store->checkpoint && !store->removing)
		remove_one(store);
}

int store_reclaiming(const struct mp_store *store)
{
	return store->punch_next < store->punchable.count || store->punches || store->removing;
}

void store_segments_free(struct mp_store *store)
{
	for (uint64_t i = 0; i < store->segment_count; i++)
		free(store->segments[i]);
	for (uint64_t i = 0; i < store->removable_count; i++)
		free(store->removable[i]);
	free(store->opening);
	free(store->spare);
	free(store->spare_meta);
	free(store->remove_io.owner);
	free(store->segments);
	free(store->removable);
	free(store->dead.items);
	free(store->dying.items);
	free(store->punchable.items);
}
