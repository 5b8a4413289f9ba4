/* index.h - the log index: (volume number, block) -> newest place in the log.
 *
 * Pure state, no I/O. Engine thread only (one owner, no locks).
 */
#ifndef MILLPOND_INDEX_H
#define MILLPOND_INDEX_H

#include <stdbool.h>
#include <stdint.h>

/* cdef: begin */
struct index_slot {
	uint64_t key;         /* number << 40 | block, + 1; 0: empty */
	uint64_t checksum;
	uint32_t address;     /* 4 KiB units from the start of the device; 0: zeroes */
	uint32_t sequence;    /* low 32 bits; the log never spans 2^31 sequences of one volume */
};
struct index {
	struct index_slot *slots;
	uint64_t capacity, seed;
	uint64_t used;
	uint64_t zeros;       /* of used: with address 0; they take no room in the log */
	uint64_t moves;       /* entries that left their slot for another */
};
/* Room for a log of so many blocks; the seed hides which keys collide. 0 or -ENOMEM. */
int index_init(struct index *index, uint64_t log_blocks, uint64_t seed);
void index_free(struct index *index);
/* Valid until the next index_put, index_delete or index_reserve. */
struct index_slot *index_find(struct index *index, uint32_t number, uint64_t block);
/* Insert or replace. The caller keeps zeros below index_zeros_limit; the log bounds the others. */
struct index_slot *index_put(struct index *index, uint32_t number, uint64_t block,
			     uint32_t address);
void index_delete(struct index *index, struct index_slot *slot);
/* Make room for so many entries, if there is none: recovery of a device whose log was filled under
 * wider limits. Not while anything walks. 0 or -ENOMEM. */
int index_reserve(struct index *index, uint64_t entries);
uint64_t index_limit(const struct index *index);
uint64_t index_zeros_limit(const struct index *index, uint64_t log_blocks);
uint64_t index_memory_bytes(const struct index *index);

/* A walk meets, in capacity steps, every entry that is there all the time, whatever else comes and
 * goes, if it pauses only in front of a step for which index_may_pause. When index_delete took
 * the entry of a step, the same step is next. */
uint64_t index_walk_start(const struct index *index);
struct index_slot *index_walk(struct index *index, uint64_t start, uint64_t step);
bool index_may_pause(struct index *index, uint64_t start, uint64_t step);
/* cdef: end */

static inline uint64_t index_block(const struct index_slot *slot)
{
	return (slot->key - 1) & ((1ULL << 40) - 1);
}
static inline uint32_t index_number(const struct index_slot *slot)
{
	return (uint32_t)((slot->key - 1) >> 40);
}
static inline bool index_is_live(const struct index_slot *slot)
{
	return slot->key != 0;
}

#endif
