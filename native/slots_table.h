/* slots_table.h - the layout of the table, shared by slots*.c only. */
#ifndef MILLPOND_SLOTS_TABLE_H
#define MILLPOND_SLOTS_TABLE_H

#include "core_limits.h"
#include "policy.h"
#include "slots.h"

enum {
	CLOCK_LOOKS = 64,    /* slots looked at per eviction at most ... */
	CLOCK_CHOICE = 16,   /* ... until so many could go: the least frequent of them does */
	WINDOW_LOOKS = 8,    /* window entries examined per eviction at most */
	WINDOW_PERCENT = 10, /* of the slots; measured in README-slots.md */
	SLOTS_PER_HEAD = 3,  /* of the hash chains: 1.33 bytes per slot */
	PINS_BUSY = 192,     /* from here on find and reserve do not hand the slot out any more */
	PINS_FOLLOW = 64,    /* slots that may be pinned for the first time after one find */
	KEY_UNIT_BITS = 36,
	FREQUENCY_BITS = 4,
	FREQUENCY_MAX = 15,
	AGE_SLOTS = 64,      /* halved per access while everything is halved */
	VISITS = 256,        /* slots whose latest pass is remembered, see visit_begins */
};
#define SLOT_NONE 0x7fffffffU
#define KEY_NONE UINT64_MAX
#define ORIGIN_LIMIT ORIGINS_MAX /* the largest origin's last key would not fit, + 1 */

/* Both halves of (key + 1) << 4 | frequency, key: origin << 36 | block / slot_blocks; 0: not used.
 * Halves: 12 bytes without a hole, and a step along a chain is one cache miss. */
struct slot {
	uint32_t key_low, key_high;
	uint32_t link;       /* next in the hash chain or on the free list | LINK_WINDOW */
};
_Static_assert(sizeof(struct slot) == 12, "slot");
#define LINK_WINDOW 0x80000000U

/* What is known of a block: one of these, or 31 bits of its checksum, which are never one of
 * these. */
enum block_word {
	BLOCK_IDLE = 0,
	BLOCK_CLAIMED = 1, /* reserved; not again until the slot's pins are gone */
	BLOCK_STALE = 2,   /* invalidated under pins: what is being filled is not installed */
	BLOCK_ZEROES = 3,  /* valid, as all that follow: known zeroes, nothing stored */
	CHECKSUM_LEAST = 4,
};
#define BLOCK_RESTORED 0x80000000U /* and valid: of a checkpoint, not yet seen to verify */

struct visit { uint64_t key; uint64_t touched; };

/* What an origin holds, and may hold (slots_share.c). */
struct owner {
	uint32_t origin, is_used;
	uint32_t slots, least_slots, most_slots;
	uint32_t hand;       /* where it looks for a slot of its own */
};

/* I/O in flight (slots_pins.c). */
struct pin { uint32_t slot; uint16_t pins, has_fills; }; /* pins 0: empty place */

struct pins {
	struct pin *places;  /* by a hash of the slot, linear probing */
	uint32_t mask, used;
};

struct mp_slots {
	struct slot *table;
	uint32_t *heads;         /* of the hash chains */
	uint32_t *blocks;        /* slot_blocks per slot: enum block_word */
	uint32_t *window;        /* ring of slot indices, oldest at window_head */
	struct visit *visits;    /* NULL when a slot is one block */
	struct mp_sketch *sketch;
	struct pins pins;
	uint64_t hash_seed;
	uint64_t random;
	uint32_t slot_count, slot_blocks, head_count;
	uint32_t fresh;          /* slots from here on were never used: their memory is untouched */
	uint32_t free_head;
	uint32_t hand;
	uint32_t age_cursor;     /* next slot to halve; slot_count: no halving under way */
	uint32_t window_size, window_head, window_used;
	struct owner *owners;    /* by a hash of the origin */
	uint32_t owner_mask, owners_used;
	uint32_t minimums;       /* origins that have one */
	struct mp_slots_counters counters;
};

static inline uint64_t slot_word(const struct slot *slot)
{
	return (uint64_t)slot->key_high << 32 | slot->key_low;
}

static inline int slot_is_used(const struct slot *slot)
{
	return (slot->key_low | slot->key_high) != 0;
}

static inline uint64_t slot_key(const struct slot *slot) /* KEY_NONE: not used */
{
	return (slot_word(slot) >> FREQUENCY_BITS) - 1;
}

static inline uint32_t slot_origin(const struct slot *slot)
{
	return (uint32_t)(slot_key(slot) >> KEY_UNIT_BITS);
}

static inline unsigned int slot_frequency(const struct slot *slot)
{
	return slot->key_low & FREQUENCY_MAX;
}

static inline void slot_set_frequency(struct slot *slot, unsigned int frequency)
{
	slot->key_low = (slot->key_low & ~(uint32_t)FREQUENCY_MAX) | frequency;
}

static inline uint32_t slot_next(const struct slot *slot)
{
	return slot->link & SLOT_NONE;
}

static inline void slot_set_next(struct slot *slot, uint32_t next)
{
	slot->link = (slot->link & LINK_WINDOW) | next;
}

static inline int slot_is_in_window(const struct slot *slot)
{
	return (slot->link & LINK_WINDOW) != 0;
}

static inline int block_is_valid(uint32_t word)
{
	return (word & ~BLOCK_RESTORED) >= BLOCK_ZEROES;
}

static inline uint64_t slots_unit(uint64_t key)
{
	return key & ((1ULL << KEY_UNIT_BITS) - 1);
}

/* The words of this slot's blocks. */
static inline uint32_t *slots_blocks(const struct mp_slots *slots, uint64_t index)
{
	return &slots->blocks[index * slots->slot_blocks];
}

/* slots.c */
uint32_t slots_lookup(const struct mp_slots *slots, uint64_t key); /* SLOT_NONE: no such slot */
/* The slot, which is in no chain and on no list, becomes this key's, empty. */
void slots_occupy(struct mp_slots *slots, uint32_t index, uint64_t key);
void slots_vacate(struct mp_slots *slots, uint32_t index);  /* out of its chain; all forgotten */
void slots_release(struct mp_slots *slots, uint32_t index); /* vacate, and onto the free list */
uint32_t slots_take_free(struct mp_slots *slots);           /* SLOT_NONE: all are used */
void slots_skip_fresh(struct mp_slots *slots, uint32_t first); /* fresh ones before: free list */

/* slots_pins.c */
int slots_pins_new(struct pins *pins); /* -1: no memory */
struct pin *slots_pin_of(const struct pins *pins, uint32_t slot); /* NULL: not pinned */
/* Pinned once more; valid until the next call. */
struct pin *slots_pin_add(struct pins *pins, uint32_t slot);
void slots_pin_remove(struct pins *pins, struct pin *pin); /* which is the slot's last */
int slots_pins_have_room(const struct pins *pins);         /* for PINS_FOLLOW slots more */

/* The word of a valid block, from and to what the interface calls its checksum. */
uint32_t slots_block_word(uint32_t checksum);
uint32_t slots_block_checksum(uint32_t word);

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
