/* slots_table.h - the layout of the table, shared by slots.c, slots_evict.c and
 * slots_checkpoint.c only. */
#ifndef MILLPOND_SLOTS_TABLE_H
#define MILLPOND_SLOTS_TABLE_H

#include "core_limits.h"
#include "policy.h"
#include "slots.h"

enum {
	HEAT_MAX = 3,        /* 2-bit counter: each CLOCK pass takes one */
	CLOCK_LOOKS = 64,    /* slots examined per eviction at most */
	WINDOW_LOOKS = 8,    /* window entries examined per eviction at most */
	WINDOW_PERCENT = 10, /* of the slots; measured in README-slots.md */
	PINS_BUSY = 192,     /* from here on find and reserve do not hand the slot out any more */
	KEY_UNIT_BITS = 40,
	VISITS = 256,        /* slots whose latest pass is remembered, see visit_begins */
};
#define SLOT_NONE UINT32_MAX
#define KEY_NONE UINT64_MAX
#define ORIGIN_LIMIT ORIGINS_MAX /* the largest origin's last key would be KEY_NONE */

enum slot_flag { SLOT_USED = 1, SLOT_WINDOW = 2, SLOT_CLAIMED = 4 };

struct slot {
	uint64_t key;        /* origin << 40 | block / slot_blocks */
	uint32_t next;       /* in the hash chain or on the free list */
	uint16_t valid;      /* bit per block */
	uint8_t heat_flags;  /* heat: 2 bits | enum slot_flag << 2 */
	uint8_t pins;
};
_Static_assert(sizeof(struct slot) == 16, "slot");

struct visit { uint64_t key; uint64_t touched; };

/* What an origin holds, and may hold (slots_share.c). */
struct owner {
	uint32_t origin, is_used;
	uint32_t slots, least_slots, most_slots;
	uint32_t hand;       /* where it looks for a slot of its own */
};

struct mp_slots {
	struct slot *table;
	uint32_t *heads;         /* of the hash chains; a power of two, at most one per slot */
	uint32_t *checksums;     /* slot_blocks per slot; of a block that is not valid: enum fill */
	uint8_t *restored;       /* bit per block: came from a checkpoint, not yet seen to verify */
	uint32_t *window;        /* ring of slot indices, oldest at window_head */
	struct visit *visits;    /* NULL when a slot is one block */
	struct mp_sketch *sketch;
	uint64_t hash_seed;
	uint64_t random;
	uint32_t slot_count, slot_blocks, head_mask;
	uint32_t fresh;          /* slots from here on were never used: their memory is untouched */
	uint32_t free_head;
	uint32_t hand;
	uint32_t window_size, window_head, window_used;
	struct owner *owners;    /* by a hash of the origin */
	uint32_t owner_mask, owners_used;
	uint32_t minimums;       /* origins that have one */
	struct mp_slots_counters counters;
};

static inline unsigned int slot_heat(const struct slot *slot)
{
	return slot->heat_flags & HEAT_MAX;
}

static inline int slot_is(const struct slot *slot, enum slot_flag flag)
{
	return (slot->heat_flags >> 2 & (unsigned int)flag) != 0;
}

static inline void slot_flag(struct slot *slot, enum slot_flag flag, int on)
{
	unsigned int bit = (unsigned int)flag << 2;

	slot->heat_flags = (uint8_t)(on ? slot->heat_flags | bit : slot->heat_flags & ~bit);
}

static inline uint64_t slots_unit(uint64_t key)
{
	return key & ((1ULL << KEY_UNIT_BITS) - 1);
}

static inline int slots_is_key(uint64_t key)
{
	return key >> KEY_UNIT_BITS < ORIGIN_LIMIT;
}

static inline uint64_t slots_restored_bytes(uint64_t slot_count, uint32_t slot_blocks)
{
	return (slot_count * slot_blocks + 7) / 8;
}

/* slots.c */
uint32_t slots_lookup(const struct mp_slots *slots, uint64_t key); /* SLOT_NONE: no such slot */
/* The slot, which is in no chain and on no list, becomes this key's, empty. */
void slots_occupy(struct mp_slots *slots, uint32_t index, uint64_t key);
void slots_vacate(struct mp_slots *slots, uint32_t index);  /* out of its chain; all forgotten */
void slots_release(struct mp_slots *slots, uint32_t index); /* vacate, and onto the free list */
uint32_t slots_take_free(struct mp_slots *slots);           /* SLOT_NONE: all are used */
void slots_skip_fresh(struct mp_slots *slots, uint32_t first); /* fresh ones before: free list */
void slots_set_restored(struct mp_slots *slots, uint64_t at, int on); /* at: of its checksum */

/* slots_share.c */
int slots_owners_new(struct mp_slots *slots); /* -1: no memory */
struct owner *slots_owner(struct mp_slots *slots, uint32_t origin); /* valid until the next call */
/* Does a minimum keep this slot from being taken for a key of from_origin? */
int slots_is_protected(struct mp_slots *slots, uint32_t index, uint32_t from_origin);

/* slots_evict.c */
/* A vacated slot for a key of this origin, or SLOT_NONE. */
uint32_t slots_evict(struct mp_slots *slots, uint32_t origin);
uint32_t slots_evict_own(struct mp_slots *slots, uint32_t origin); /* one that origin holds */
void slots_enter_window(struct mp_slots *slots, uint32_t index);

#endif
