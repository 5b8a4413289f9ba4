/* index.c - the log index: open addressing over (volume number, block), sized once from the log.
 *
 * An entry sits in the first free slot from its home on; the home is the key's mixed bits, scaled
 * to the capacity, which therefore need not be a power of two: 24 bytes x 1.32 slots per block of
 * the log, below the 32 bytes that a block may cost. Deleting moves what follows back, towards its
 * home and never past it, so there are no marks to clear and no table to rebuild.
 *
 * Happy path: find and put are one or two cache lines; where the log is full of blocks that were
 * written once, three.
 * Walks (checkpoint, sweep) go on while entries come and go. They pause only behind an empty slot:
 * what lies beyond it then has its home beyond it, so nothing moves to where the walk has been. It
 * may meet twice what was put meanwhile.
 * Failure modes: the table cannot overflow, because the log cannot hold more blocks than it was
 * sized for, and the caller keeps blocks of zeroes, which take no log, below index_zeros_limit
 * (ledger.c).
 */
#include "index.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "core_limits.h"
#include "policy.h"

__extension__ typedef unsigned __int128 wide;

enum { SLOTS_MIN = 1024 };
/* Slots per block of the log: 24 x 33 / 25 = 31.7 bytes. */
#define SLOTS_OF(blocks) ((blocks) / 25 * 33 + 33)

_Static_assert(sizeof(struct index_slot) * 33 < 32 * 25, "an entry costs less than 32 bytes");

static uint64_t home(const struct index *index, uint64_t key)
{
	return (uint64_t)((wide)mp_mix(key ^ index->seed) * index->capacity >> 64);
}

static uint64_t make_key(uint32_t number, uint64_t block)
{
	assert(block < VOLUME_BLOCKS_MAX && number < VOLUMES_MAX);
	return ((uint64_t)number << 40 | block) + 1;
}

static uint64_t after(const struct index *index, uint64_t at)
{
	return at + 1 == index->capacity ? 0 : at + 1;
}

static int set_capacity(struct index *index, uint64_t capacity)
{
	/* Fresh pages are zero and take no memory before they are touched. */
	void *memory = mmap(NULL, capacity * sizeof(struct index_slot), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		return -ENOMEM;
	index->slots = memory;
	index->capacity = capacity;
	index->used = index->zeros = 0;
	return 0;
}

int index_init(struct index *index, uint64_t log_blocks, uint64_t seed)
{
	uint64_t capacity = SLOTS_OF(log_blocks);

	memset(index, 0, sizeof *index);
	index->seed = seed;
	return set_capacity(index, capacity < SLOTS_MIN ? SLOTS_MIN : capacity);
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

uint64_t index_memory_bytes(const struct index *index)
{
	return index->capacity * sizeof *index->slots;
}

struct index_slot *index_find(struct index *index, uint32_t number, uint64_t block)
{
	uint64_t key = make_key(number, block), at = home(index, key);

	for (;;) {
		struct index_slot *slot = &index->slots[at];
		if (slot->key == key)
			return slot;
		if (slot->key == 0)
			return NULL;
		at = after(index, at);
	}
}

struct index_slot *index_put(struct index *index, uint32_t number, uint64_t block, uint32_t address)
{
	uint64_t key = make_key(number, block), at = home(index, key);
	struct index_slot *slot = &index->slots[at];

	while (slot->key && slot->key != key) {
		at = after(index, at);
		slot = &index->slots[at];
	}
	if (slot->key == 0) {
		assert(index->used < index->capacity - 1);
		index->used++;
		slot->key = key;
	} else
		index->zeros -= slot->address == 0;
	index->zeros += address == 0;
	slot->address = address;
	return slot;
}

/* May the entry at `at`, whose home is `from`, go to the free slot `hole` before it? Only if its
 * home is not behind the hole, around the table's end. */
static bool reaches(uint64_t from, uint64_t hole, uint64_t at)
{
	return hole <= at ? from <= hole || from > at : from <= hole && from > at;
}

void index_delete(struct index *index, struct index_slot *slot)
{
	uint64_t hole = (uint64_t)(slot - index->slots), at = hole;

	assert(hole < index->capacity && index_is_live(slot));
	index->zeros -= slot->address == 0;
	index->used--;
	for (;;) {
		at = after(index, at);
		slot = &index->slots[at];
		if (slot->key == 0)
			break;
		if (!reaches(home(index, slot->key), hole, at))
			continue;
		index->slots[hole] = *slot;
		index->moves++;
		hole = at;
	}
	memset(&index->slots[hole], 0, sizeof index->slots[hole]);
}

int index_reserve(struct index *index, uint64_t entries)
{
	struct index old = *index;
	uint64_t i;

	if (entries <= index_limit(index))
		return 0;
	if (set_capacity(index, SLOTS_OF(entries)))
		return -ENOMEM;
	for (i = 0; i < old.capacity; i++)
		if (index_is_live(&old.slots[i]))
			*index_put(index, index_number(&old.slots[i]), index_block(&old.slots[i]),
				   old.slots[i].address) = old.slots[i];
	index->moves += old.used;
	index_free(&old);
	return 0;
}

/* ---- walks ---- */

uint64_t index_walk_start(const struct index *index)
{
	uint64_t at = 0;

	while (index->slots[at].key) /* never full */
		at++;
	return at;
}

/* The first step is the empty slot itself: the walk ends with what leads up to it. */
struct index_slot *index_walk(struct index *index, uint64_t start, uint64_t step)
{
	uint64_t at = start + step;

	assert(start < index->capacity && step < index->capacity);
	return &index->slots[at < index->capacity ? at : at - index->capacity];
}

bool index_may_pause(struct index *index, uint64_t start, uint64_t step)
{
	return step == 0 || !index_is_live(index_walk(index, start, step - 1));
}
