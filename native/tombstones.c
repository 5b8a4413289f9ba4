/* tombstones.c - ranges of blocks that were trimmed or zeroed, newest wins, sorted and disjoint.
 *
 * Happy path: find is a binary search; put cuts what it overlaps and inserts itself (sequences come
 * in ascending order, so the new range always wins).
 * Failure modes: -ENOMEM, nothing changed.
 */
#include "engine_internal.h"

static uint32_t first_ending_after(const struct tombstones *tombstones, uint64_t block)
{
	uint32_t low = 0, high = tombstones->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct tombstone *item = &tombstones->items[middle];
		if (item->first_block + item->block_count > block)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

uint64_t tombstones_find(const struct tombstones *tombstones, uint64_t block)
{
	uint32_t at;

	if (tombstones->count == 0)
		return 0;
	at = first_ending_after(tombstones, block);
	if (at < tombstones->count && tombstones->items[at].first_block <= block)
		return tombstones->items[at].sequence;
	return 0;
}

static int reserve(struct tombstones *tombstones, uint32_t more)
{
	uint32_t capacity = tombstones->capacity ? tombstones->capacity : 16;
	struct tombstone *items;

	while (capacity < tombstones->count + more)
		capacity *= 2;
	if (capacity == tombstones->capacity)
		return 0;
	items = realloc(tombstones->items, capacity * sizeof *items);
	if (!items)
		return -ENOMEM;
	tombstones->items = items;
	tombstones->capacity = capacity;
	return 0;
}

static void restart_sweep(struct tombstone *item)
{
	item->cursor = 0;
	item->phase = 0;
}

int tombstones_put(struct tombstones *tombstones, uint64_t first_block, uint64_t block_count,
		   uint64_t sequence)
{
	uint64_t end = first_block + block_count;
	struct tombstone left, right, *items;
	uint32_t from, to, keep = 0, tail;
	bool has_left = false, has_right = false;

	if (reserve(tombstones, 2))
		return -ENOMEM;
	items = tombstones->items;
	from = first_ending_after(tombstones, first_block);
	for (to = from; to < tombstones->count && items[to].first_block < end; to++)
		;
	if (from < to && items[from].first_block < first_block) {
		left = items[from];
		left.block_count = first_block - left.first_block;
		restart_sweep(&left);
		has_left = true;
	}
	if (from < to && items[to - 1].first_block + items[to - 1].block_count > end) {
		right = items[to - 1];
		right.block_count = right.first_block + right.block_count - end;
		right.first_block = end;
		restart_sweep(&right);
		has_right = true;
	}
	tail = tombstones->count - to;
	memmove(&items[from + has_left + 1 + has_right], &items[to], tail * sizeof *items);
	if (has_left)
		items[from + keep++] = left;
	memset(&items[from + keep], 0, sizeof *items);
	items[from + keep].first_block = first_block;
	items[from + keep].block_count = block_count;
	items[from + keep].sequence = sequence;
	keep++;
	if (has_right)
		items[from + keep++] = right;
	tombstones->count = from + keep + tail;
	return 0;
}
