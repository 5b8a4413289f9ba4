/* slots_pins.c - which slots have I/O in flight, and how much: a small table beside the slots.
 *
 * Happy path: open addressing with linear probing, at most half full; a slot is in it from its
 * first pin to its last. So the pins of millions of slots cost what is in flight, not a byte each.
 * Failure modes: no memory to grow: it fills up further, and find and reserve hand nothing out
 * (a miss is always correct) before those that were told a slot could fill it. Never smaller again:
 * what was in flight once will be again.
 */
#include "slots_table.h"

#include <assert.h>
#include <stdlib.h>

enum { PLACES_FIRST = 4 * PINS_FOLLOW };

static uint32_t home_of(uint32_t mask, uint32_t slot)
{
	return (uint32_t)mp_mix(slot) & mask;
}

static struct pin *place_of(struct pin *places, uint32_t mask, uint32_t slot)
{
	uint32_t at = home_of(mask, slot);

	while (places[at].pins > 0 && places[at].slot != slot)
		at = (at + 1) & mask;
	return &places[at];
}

int slots_pins_new(struct pins *pins)
{
	pins->places = calloc(PLACES_FIRST, sizeof(*pins->places));
	pins->mask = PLACES_FIRST - 1;
	return pins->places != NULL ? 0 : -1;
}

struct pin *slots_pin_of(const struct pins *pins, uint32_t slot)
{
	struct pin *pin;

	if (pins->used == 0)
		return NULL;
	pin = place_of(pins->places, pins->mask, slot);
	return pin->pins > 0 ? pin : NULL;
}

int slots_pins_have_room(const struct pins *pins)
{
	return pins->used + PINS_FOLLOW <= pins->mask;
}

static void grow(struct pins *pins)
{
	uint32_t mask = pins->mask * 2 + 1;
	struct pin *places = calloc(mask + 1ULL, sizeof(*places));

	if (places == NULL)
		return;
	for (uint32_t at = 0; at <= pins->mask; at++)
		if (pins->places[at].pins > 0)
			*place_of(places, mask, pins->places[at].slot) = pins->places[at];
	free(pins->places);
	pins->places = places;
	pins->mask = mask;
}

struct pin *slots_pin_add(struct pins *pins, uint32_t slot)
{
	struct pin *pin = place_of(pins->places, pins->mask, slot);

	if (pin->pins == 0) {
		if (pins->used > pins->mask / 2) {
			grow(pins);
			pin = place_of(pins->places, pins->mask, slot);
		}
		assert(pins->used < pins->mask); /* a place is always empty: probes end */
		pins->used++;
		*pin = (struct pin){ .slot = slot };
	}
	assert(pin->pins < UINT8_MAX); /* 63 beyond PINS_BUSY */
	pin->pins++;
	return pin;
}

/* What stands behind the gap moves into it, unless its probes begin behind the gap too. */
void slots_pin_remove(struct pins *pins, struct pin *pin)
{
	uint32_t gap = (uint32_t)(pin - pins->places), at = gap;

	assert(pins->used > 0);
	for (;;) {
		at = (at + 1) & pins->mask;
		if (pins->places[at].pins == 0)
			break;
		if (((at - home_of(pins->mask, pins->places[at].slot)) & pins->mask) >=
		    ((at - gap) & pins->mask)) {
			pins->places[gap] = pins->places[at];
			gap = at;
		}
	}
	pins->places[gap] = (struct pin){ 0 };
	pins->used--;
}
