/* slots.h - the read cache's table in RAM and its policy: which blocks are in which slot, which
 * stay.
 *
 * Pure state, no I/O: the engine reads and writes slots and tells the table. Engine thread only.
 * A slot holds slot_blocks consecutive blocks of one origin, aligned to slot_blocks, validity per
 * block. RAM: at most 16 bytes per slot + 4 bytes per block, all of it, beside some KiB. Checksum 0
 * means: known to be zeroes, nothing stored. Policy: frequency decides and fades: a 4-bit counter
 * per slot, a counting sketch for what has no slot, an admission duel (candidate against CLOCK's
 * victim); O(1) per access.
 */
#ifndef MILLPOND_SLOTS_H
#define MILLPOND_SLOTS_H

#include "format.h"

/* cdef: begin */
struct mp_slots;
struct mp_slots_counters { uint64_t used_slots, valid_blocks, evictions, admitted, rejected,
	invalidated,
	ages, looks; }; /* looks: slots examined to find victims */
/* NULL: errno */
struct mp_slots *mp_slots_new(uint32_t slot_count, uint32_t slot_blocks, uint64_t seed);
void mp_slots_free(struct mp_slots *slots);
/* What a slot keeps of a block's checksum: 31 bits, never 0. Whoever compares, compares this. */
uint32_t mp_slots_checksum(uint64_t checksum);
/* The slot that holds this block validly, or -1. checksum: see mp_slots_checksum; restored: 1 when
 * the entry came from a checkpoint and was not yet seen to verify (a mismatch is then staleness,
 * not corruption). */
int64_t mp_slots_find(const struct mp_slots *slots, uint32_t origin, uint64_t block,
		      uint32_t *checksum, int *restored);
/* What who verifies this slot (below mp_slots_fresh) should find stored in it: its origin, its
 * first block, and of each block what mp_slots_checksum made, 0 where nothing valid is stored.
 * Returns how many are; 0 also while it must not be pinned. */
uint32_t mp_slots_stored(const struct mp_slots *slots, uint64_t slot, uint32_t *origin,
			 uint64_t *first_block, uint32_t *checksums);
/* no longer restored; nothing where it is no longer valid */
void mp_slots_verified(struct mp_slots *slots, int64_t slot, uint64_t block);
/* one access, hit or miss */
void mp_slots_touch(struct mp_slots *slots, uint32_t origin, uint64_t block);
/* How often it was asked for lately, 0 to 15: reads count, writes do not. */
unsigned int mp_slots_frequency(const struct mp_slots *slots, uint32_t origin, uint64_t block);
/* Make room for this block: its slot if it has one, else a free one, else a victim's. The slot is
 * pinned for the caller and the block is claimed: one reserve per block to be filled. -1: not
 * admitted, everything looked at is pinned, the block is valid already, or it may still be read or
 * filled (claimed, or invalidated while pinned, until the slot's pins are gone). A fill that failed
 * is just unpinned. */
int64_t mp_slots_reserve(struct mp_slots *slots, uint32_t origin, uint64_t block);
/* The data is in the slot: the block becomes valid, unless it was invalidated since its reserve.
 * checksum: 0 for zeroes, else mp_slots_checksum of it is kept.
 * Slot must be reserved (pinned) for this key; the pin stays. */
void mp_slots_install(struct mp_slots *slots, int64_t slot, uint64_t block, uint32_t checksum);
/* I/O in flight: not evicted, not refilled. find and reserve say -1 from 192 pins on, so up to 63
 * pins, of as many slots, may follow one find. */
void mp_slots_pin(struct mp_slots *slots, int64_t slot);
void mp_slots_unpin(struct mp_slots *slots, int64_t slot);
int mp_slots_pins(const struct mp_slots *slots, int64_t slot);
void mp_slots_invalidate(struct mp_slots *slots, uint32_t origin, uint64_t first_block,
			 uint64_t block_count);
/* Invalidate a large range in slices of at most budget steps. Start with cursor 0; returns the next
 * cursor, or UINT64_MAX when done. Chooses per-range or per-table order by which is shorter. */
uint64_t mp_slots_sweep(struct mp_slots *slots, uint32_t origin, uint64_t first_block,
			uint64_t block_count, uint64_t cursor, uint32_t budget);
/* Checkpoint: entries [first, first + count) as struct mp_slot_entry each followed by slot_blocks
 * uint32 checksums. load: entries are marked restored; malformed ones are skipped. load
 * only into a new table, ascending, without overlap. */
uint64_t mp_slots_entry_bytes(const struct mp_slots *slots);
uint64_t mp_slots_fresh(const struct mp_slots *slots); /* from here on none was ever used */
void mp_slots_save(const struct mp_slots *slots, uint64_t first, uint64_t count, void *out);
void mp_slots_load(struct mp_slots *slots, uint64_t first, uint64_t count, const void *in);
/* Slots that others cannot take from this origin, and most that it may hold (UINT32_MAX: any). For
 * the smaller maximum the next fills are refused until its own slots made room. */
void mp_slots_share(struct mp_slots *slots, uint32_t origin, uint32_t least_slots,
		    uint32_t most_slots);
uint64_t mp_slots_held(struct mp_slots *slots, uint32_t origin); /* by this origin */
void mp_slots_counters(const struct mp_slots *slots, struct mp_slots_counters *out);
uint64_t mp_slots_memory_bytes(const struct mp_slots *slots);
/* cdef: end */

#endif
