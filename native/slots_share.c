/* slots_share.c - how many slots each origin holds, and may hold.
 *
 * Happy path: every slot that is occupied or vacated is counted at its origin, found in a small
 * open-addressed table; a minimum and a maximum are two more numbers there. Nothing is kept per
 * slot: its key names its origin.
 * Failure modes: no memory to grow the table: it fills up further; full (as many origins with slots
 * as the table has places, and no memory) is out of memory for good: assert.
 */
#include "slots_table.h"

#include <assert.h>
#include <stdlib.h>

enum { OWNERS_FIRST = 256 };

static struct owner *place_of(struct owner *owners, uint32_t mask, uint32_t origin)
{
	uint32_t at = (uint32_t)mp_mix(origin) & mask;

	while (owners[at].is_used && owners[at].origin != origin)
		at = (at + 1) & mask;
	return &owners[at];
}

static int is_needless(const struct owner *owner)
{
	return !owner->is_used ||
	       (owner->slots == 0 && owner->least_slots == 0 && owner->most_slots == UINT32_MAX);
}

/* Move to a table twice as large as what is still needed. */
static void rebuild(struct mp_slots *slots)
{
	uint32_t needed = 0, capacity = OWNERS_FIRST;
	struct owner *owners;

	for (uint32_t i = 0; i <= slots->owner_mask; i++)
		needed += !is_needless(&slots->owners[i]);
	while (capacity < needed * 4)
		capacity *= 2;
	owners = calloc(capacity, sizeof(*owners));
	if (owners == NULL)
		return;
	for (uint32_t i = 0; i <= slots->owner_mask; i++)
		if (!is_needless(&slots->owners[i]))
			*place_of(owners, capacity - 1, slots->owners[i].origin) =
				slots->owners[i];
	free(slots->owners);
	slots->owners = owners;
	slots->owner_mask = capacity - 1;
	slots->owners_used = needed;
}

int slots_owners_new(struct mp_slots *slots)
{
	slots->owners = calloc(OWNERS_FIRST, sizeof(*slots->owners));
	slots->owner_mask = OWNERS_FIRST - 1;
	return slots->owners != NULL ? 0 : -1;
}

struct owner *slots_owner(struct mp_slots *slots, uint32_t origin)
{
	struct owner *owner = place_of(slots->owners, slots->owner_mask, origin);

	if (owner->is_used)
		return owner;
	if (slots->owners_used >= slots->owner_mask / 2) {
		rebuild(slots);
		owner = place_of(slots->owners, slots->owner_mask, origin);
	}
	assert(slots->owners_used < slots->owner_mask); /* a place is always empty: probes end */
	slots->owners_used++;
	*owner = (struct owner){ .origin = origin, .is_used = 1, .most_slots = UINT32_MAX };
	return owner;
}

int slots_is_protected(struct mp_slots *slots, uint32_t index, uint32_t from_origin)
{
	uint32_t origin = slot_origin(&slots->table[index]);
	const struct owner *owner;

	if (slots->minimums == 0)
		return 0;
	owner = slots_owner(slots, origin);
	/* Below its minimum it takes from others, and spares its own. */
	return origin == from_origin ? owner->slots < owner->least_slots
				     : owner->slots <= owner->least_slots;
}

void mp_slots_share(struct mp_slots *slots, uint32_t origin, uint32_t least_slots,
		    uint32_t most_slots)
{
	struct owner *owner = slots_owner(slots, origin);

	assert(most_slots > 0 && least_slots <= most_slots);
	slots->minimums -= owner->least_slots > 0;
	slots->minimums += least_slots > 0;
	owner->least_slots = least_slots;
	owner->most_slots = most_slots;
}

uint64_t mp_slots_held(struct mp_slots *slots, uint32_t origin)
{
	return slots_owner(slots, origin)->slots;
}
