/* storesweep.c - move the last live pages out of old meta segments, so that these can go.
 *
 * Happy path: after a checkpoint, meta segments that are mostly dead are visited in order of id;
 * the descriptors beside their pages tell which page of which tree each was; those that a tree
 * still refers to are made dirty, and the next checkpoint writes them elsewhere. A bounded number
 * each time.
 * Failure modes: a descriptor that does not lead back to its page is passed over, a page or
 * segment that cannot be read too: space is kept, nothing is lost. The next round tries again.
 */
#include "store_internal.h"

enum { HEAD_BYTES = 16384, DEAD_SHARE = 4, BUDGET_MIN_PAGES = 16 };

_Static_assert(MP_GROUP_HEADER_BYTES + MP_RECORD_HEADER_BYTES +
	       MP_PAGES_PER_GROUP * sizeof(struct mp_page_descriptor) <= HEAD_BYTES,
		"head of a group");

static void stop(struct store_sweep *sweep)
{
	free(sweep->head);
	sweep->head = NULL;
	sweep->budget_pages = 0;
}

/* A checkpoint is durable: another round. */
void store_sweep_start(struct mp_store *store)
{
	uint64_t quarter = store->dirty_limit / 4;

	if (!store->sweep.budget_pages)
		store->sweep.budget_pages = quarter < BUDGET_MIN_PAGES ? BUDGET_MIN_PAGES : quarter;
}

static struct store_segment *next_victim(struct mp_store *store, uint64_t behind_id)
{
	for (uint64_t i = 0; i < store->segment_count; i++) {
		struct store_segment *segment = store->segments[i];

		if (segment->id > behind_id && segment->kind == MP_GROUP_META &&
		    segment != store->active_meta && segment->live_bytes &&
		    segment->id != store->super.checkpoint_segment &&
		    segment->live_bytes * DEAD_SHARE < segment->length_bytes)
			return segment;
	}
	return NULL;
}

static void head_read(struct store_io *io)
{
	struct store_sweep *sweep = &io->store->sweep;
	const struct mp_group *group = (const void *)sweep->head;
	const struct mp_record *record = (const void *)(group + 1);

	sweep->reading = 0;
	sweep->count = sweep->index = 0;
	sweep->group_bytes = 0;
	if (io->io.result < 0 || store_group_check(group, sweep->segment, sweep->offset_bytes))
		return;
	sweep->group_bytes = group->length_bytes;
	if (mp_record_check(record, sizeof *record) < 0 || record->type != MP_RECORD_PAGES)
		return;
	/* As many as fit beside their descriptors: the head is whole blocks, a page each the rest.
	 */
	sweep->count = MP_PAGES_PER_GROUP;
}

static void read_head(struct mp_store *store, const struct store_segment *segment)
{
	struct store_sweep *sweep = &store->sweep;
	uint64_t left = segment->length_bytes - sweep->offset_bytes;

	if (!sweep->head)
		sweep->head = store_allocate_aligned(HEAD_BYTES);
	memset(sweep->head, 0, HEAD_BYTES);
	sweep->reading = 1;
	sweep->io.done = head_read;
	store_submit(store, &sweep->io, MP_OP_READ, segment->id, sweep->offset_bytes, sweep->head,
		     left < HEAD_BYTES ? left : HEAD_BYTES);
}

static struct store_tree *tree_of(struct mp_store *store, const struct mp_page_descriptor *about)
{
	struct store_segment *segment;
	struct store_volume *volume;

	if (mp_is_zero(about->volume, sizeof about->volume)) {
		segment = store_segment_find(store, about->segment);
		return segment ? &segment->extents : NULL;
	}
	volume = store_volume_find(store, about->volume);
	return volume && volume->visible ? &volume->map : NULL;
}

/* -EAGAIN: a page is missing; else the descriptor is dealt with. */
static int move(struct mp_store *store, const struct mp_page_descriptor *about)
{
	struct store_tree *tree = about->checksum ? tree_of(store, about) : NULL;
	int moved = tree ? store_tree_move(store, tree, about, store->sweep.segment) : 0;

	if (moved == 1 && store->sweep.budget_pages > 1)
		store->sweep.budget_pages--;
	else if (moved == 1)
		stop(&store->sweep);
	return moved;
}

static void ready(struct mp_store *store, struct store_wait *wait)
{
	(void)wait;
	store->sweep.blocked = 0;
}

/* The group whose head was read. 1: done with it. */
static int move_group(struct mp_store *store)
{
	struct store_sweep *sweep = &store->sweep;
	const struct mp_page_descriptor *about =
		(const void *)(sweep->head + MP_GROUP_HEADER_BYTES + MP_RECORD_HEADER_BYTES);

	for (; sweep->index < sweep->count; sweep->index++) {
		if (move(store, &about[sweep->index]) == -EAGAIN) {
			sweep->blocked = 1;
			sweep->wait.ready = ready;
			store_page_wait(store, &sweep->wait);
			return 0;
		}
		if (!sweep->head)
			return 0;
	}
	return 1;
}

void store_sweep_advance(struct mp_store *store)
{
	struct store_sweep *sweep = &store->sweep;
	struct store_segment *segment;

	if (!sweep->budget_pages || sweep->blocked || sweep->reading || store->checkpoint ||
	    store->failure || store->winding_down)
		return;
	if (sweep->head) {
		if (!move_group(store))
			return;
		sweep->offset_bytes += sweep->group_bytes;
	}
	segment = store_segment_find(store, sweep->segment);
	if (!sweep->head || !segment || !sweep->group_bytes ||
	    sweep->offset_bytes >= segment->length_bytes) {
		segment = next_victim(store, sweep->segment);
		sweep->segment = segment ? segment->id : 0;
		sweep->offset_bytes = 0;
	}
	if (segment)
		read_head(store, segment);
	else
		stop(sweep);
}
