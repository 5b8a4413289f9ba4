/* index.c - the log index: open addressing over (volume number, block), sized once from the log.
 *
 * Happy path: find and put are one or two cache lines. Deleting leaves a mark, so that a checkpoint
 * may walk the table while it changes; index_rebuild clears the marks when they pile up.
 * Failure modes: the table cannot overflow, because the log cannot hold more blocks than it was
 * sized for, and the caller keeps blocks of zeroes, which take no log, below index_zeros_limit
 * (ledger.c).
 */
#include "engine_internal.h"

#include <sys/mman.h>

#define KEY_DELETED UINT64_MAX

static uint64_t mix(uint64_t key)
{
	key ^= key >> 32;
	key *= 0x9e3779b97f4a7c15ULL;
	key ^= key >> 29;
	return key;
}

static uint64_t make_key(uint32_t number, uint64_t block)
{
	assert(block < 1ULL << 40 && number < VOLUMES_MAX);
	return ((uint64_t)number << 40 | block) + 1;
}

static struct index_slot *map_slots(uint64_t capacity)
{
	/* Fresh pages are zero and take no memory before they are touched. */
	void *memory = mmap(NULL, capacity * sizeof(struct index_slot), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

int index_init(struct index *index, uint64_t entries_max)
{
	uint64_t capacity = 1024;

	while (capacity * 3 / 4 < entries_max)
		capacity *= 2;
	memset(index, 0, sizeof *index);
	index->capacity = capacity;
	index->slots = map_slots(capacity);
	return index->slots ? 0 : -ENOMEM;
}

void index_free(struct index *index)
{
	if (index->slots)
		munmap(index->slots, index->capacity * sizeof *index->slots);
	index->slots = NULL;
}

uint64_t index_limit(const struct index *index)
{
	return index->capacity / 16 * 15;
}

/* At most one entry per block of the log has an address; what is left below index_limit is for the
 * others. */
uint64_t index_zeros_limit(const struct index *index, uint64_t log_blocks)
{
	return index->capacity / 16 * 14 - log_blocks;
}

struct index_slot *index_find(struct index *index, uint32_t number, uint64_t block)
{
	uint64_t key = make_key(number, block), at = mix(key) & (index->capacity - 1);

	for (;;) {
		struct index_slot *slot = &index->slots[at];
		if (slot->key == key)
			return slot;
		if (slot->key == 0)
			return NULL;
		at = (at + 1) & (index->capacity - 1);
	}
}

struct index_slot *index_put(struct index *index, uint32_t number, uint64_t block, uint32_t address)
{
	uint64_t key = make_key(number, block), at = mix(key) & (index->capacity - 1);
	struct index_slot *reuse = NULL;

	if (index->deleted && index->used + index->deleted >= index_limit(index))
		index_rebuild(index);
	for (;;) {
		struct index_slot *slot = &index->slots[at];
		if (slot->key == key) {
			index->zeros -= slot->address == 0;
			index->zeros += address == 0;
			slot->address = address;
			return slot;
		}
		if (slot->key == KEY_DELETED && !reuse)
			reuse = slot;
		if (slot->key == 0) {
			if (reuse)
				index->deleted--;
			else
				reuse = slot;
			break;
		}
		at = (at + 1) & (index->capacity - 1);
	}
	assert(index->used + index->deleted < index->capacity - 1);
	index->used++;
	index->zeros += address == 0;
	reuse->key = key;
	reuse->address = address;
	return reuse;
}

void index_delete(struct index *index, struct index_slot *slot)
{
	assert(index_is_live(slot));
	slot->key = KEY_DELETED;
	index->zeros -= slot->address == 0;
	index->used--;
	index->deleted++;
}

void index_rebuild(struct index *index)
{
	struct index_slot *old = index->slots;
	uint64_t i;

	index->slots = map_slots(index->capacity);
	if (!index->slots) { /* no memory now: the marks stay for another try */
		index->slots = old;
		return;
	}
	index->used = index->deleted = index->zeros = 0;
	index->rebuilds++;
	for (i = 0; i < index->capacity; i++)
		if (index_is_live(&old[i])) {
			struct index_slot *slot =
				index_put(index, index_number(&old[i]), index_block(&old[i]),
					  old[i].address);
			*slot = old[i];
		}
	munmap(old, index->capacity * sizeof *old);
}
