/* shares.c - how the volumes of a shard share its write log, and how a guest is slowed before its
 * share is full.
 *
 * The log less a small reserve is shared like this. Every open volume has a minimum that nobody
 * else can take: what the operator set, else an equal part of half of the rest. Of what no minimum
 * covers, a volume may fill three quarters of what the others have left: one alone gets most of
 * the log, and however many are stuck, there is always something left for the next. Only
 * undestaged data counts: destaged segments are given back when anybody wants them.
 *
 * Slowing: from three quarters of its share on, each byte logged costs its volume time, during
 * which its next data waits in `ready`, holding no log space: nothing there, doubling at every
 * twelfth of the rest, 64 KiB/s at the end. So the guest's rate falls until it is the rate of
 * destage, whatever that is, and stays there: the fill integrates the difference, the law is
 * monotone, so there is nothing to oscillate and nothing to measure. When destage stands still the
 * rate falls by half again and again until the share is full; when it goes on, so does the guest.
 * With a strict bound the age of the oldest undestaged write works in the same way, from half of
 * the bound on, and stops data at the bound.
 * Reads, flushes, trims and zeroes of ranges are not slowed; ranges wait when they have filled a
 * segment beyond the share.
 *
 * Failure modes: no share left: data waits for destage, checkpoint or release. More volumes than
 * segments: those without any wait for a free one, in turn.
 */
#include "engine_internal.h"

/* In 1/65536 of the slow part, which begins at so many quarters of the share, or of the bound. */
enum { PRESSURE_FULL = 65536, FILL_QUARTERS = 3, AGE_QUARTERS = 2 };

static uint64_t usable_segments(const struct mp_engine *engine)
{
	return engine->segment_count > SEGMENTS_RESERVED ? engine->segment_count - SEGMENTS_RESERVED
							 : 0;
}

/* ---- what is held, and what is reserved ---- */

static bool is_dirty(const struct mp_engine *engine, const struct segment *segment,
		     const struct volume *volume)
{
	uint32_t next = segment->next;
	uint64_t end = next == NO_SEGMENT ? volume->last_sequence + 1
					  : engine->segments[next].first_sequence;

	return end > volume->destaged_sequence + 1;
}

static void count_segments(struct mp_engine *engine)
{
	uint64_t segment_bytes = engine->super.log_segment_bytes;
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		if (!volume)
			continue;
		volume->share.held_segments = volume->share.dirty_segments = 0;
		volume->share.dirty_base_bytes = 0;
	}
	for (i = 0; i < engine->segment_count; i++) {
		const struct segment *segment = &engine->segments[i];
		struct volume *volume;

		if (segment->state != SEGMENT_CHAIN)
			continue;
		volume = engine->volumes[segment->number];
		if (!volume)
			continue;
		volume->share.held_segments++;
		if (!is_dirty(engine, segment, volume))
			continue;
		volume->share.dirty_segments++;
		if (i != volume->head_segment)
			volume->share.dirty_base_bytes += (int64_t)segment_bytes;
		if (i == volume->cut_segment &&
		    volume->cut_sequence <= volume->destaged_sequence + 1)
			volume->share.dirty_base_bytes -= (int64_t)volume->cut_offset_bytes;
	}
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		if (volume && volume->share.dirty_segments == 0)
			volume->share.dirty_base_bytes = -(int64_t)volume->head_offset_bytes;
	}
}

static uint64_t most_segments(const struct volume *volume)
{
	uint64_t most = volume->share.set.log_max_bytes / volume->engine->super.log_segment_bytes;

	if (volume->share.set.log_max_bytes == 0)
		return UINT64_MAX;
	return most > SHARE_SEGMENTS_MIN ? most : SHARE_SEGMENTS_MIN;
}

static uint64_t set_least(const struct volume *volume)
{
	uint64_t bytes = volume->engine->super.log_segment_bytes;

	return volume->open ? (volume->share.set.log_min_bytes + bytes - 1) / bytes : 0;
}

/* Minimums, as far as the log allows: those that were set, then equal parts of half of the rest. */
static void reserve_segments(struct mp_engine *engine)
{
	uint64_t usable = usable_segments(engine), set = 0, others = 0, equal;
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++) {
		const struct volume *volume = engine->volumes[i];
		uint64_t least = volume ? set_least(volume) : 0;
		set += least;
		others += volume && volume->open && !least;
	}
	equal = others && set < usable ? (usable - set) / 2 / others : 0;
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		uint64_t least, most;

		if (!volume)
			continue;
		least = set_least(volume);
		if (least && set > usable)
			least = least * usable / set;
		else if (!least && volume->open)
			least = equal;
		most = most_segments(volume);
		volume->share.least_segments = least < most ? least : most;
	}
}

static uint64_t need_of(const struct volume *volume)
{
	const struct volume_share *share = &volume->share;

	return share->dirty_segments > share->least_segments ? share->dirty_segments
							     : share->least_segments;
}

static void limit_volume(struct volume *volume, uint64_t needed)
{
	struct volume_share *share = &volume->share;
	uint64_t taken = needed - need_of(volume) + share->least_segments;
	uint64_t usable = usable_segments(volume->engine), most = most_segments(volume);
	uint64_t limit = share->least_segments;

	if (usable > taken)
		limit += (usable - taken) * SHARE_PART / SHARE_PARTS;
	limit = limit < most ? limit : most;
	share->limit_segments = limit > 1 ? limit : 1;
	if (!share_is_slowed(volume))
		share->paced_until_ns = 0;
}

void shares_update(struct mp_engine *engine)
{
	uint64_t needed = 0;
	uint32_t i;

	engine->shares_stale = false;
	count_segments(engine);
	reserve_segments(engine);
	engine->unmet_segments = 0;
	for (i = 0; i < engine->volume_count; i++) {
		const struct volume *volume = engine->volumes[i];
		if (!volume)
			continue;
		needed += need_of(volume);
		if (volume->share.least_segments > volume->share.held_segments)
			engine->unmet_segments +=
				volume->share.least_segments - volume->share.held_segments;
	}
	engine->release_pressed = false;
	for (i = 0; i < engine->volume_count; i++) {
		struct volume *volume = engine->volumes[i];
		if (!volume)
			continue;
		limit_volume(volume, needed);
		/* Near its most, what it has destaged must not stand in its own way. */
		if (volume->share.held_segments > volume->share.dirty_segments &&
		    volume->share.held_segments + 1 >= most_segments(volume))
			engine->release_pressed = true;
	}
}

uint64_t shares_spare_segments(const struct mp_engine *engine)
{
	uint64_t kept = SEGMENTS_RESERVED + engine->unmet_segments;

	return engine->segments_free > kept ? engine->segments_free - kept : 0;
}

/* A share that is full of data still has room to delete. */
static uint64_t beyond(enum log_use use)
{
	return use == LOG_RANGE ? RANGE_SEGMENTS : 0;
}

/* Only destage helps, not giving back what is destaged. */
static bool is_full(const struct volume *volume, enum log_use use)
{
	return volume->share.dirty_segments + 1 > volume->share.limit_segments + beyond(use);
}

static bool has_room(const struct volume *volume, enum log_use use)
{
	const struct mp_engine *engine = volume->engine;
	const struct volume_share *share = &volume->share;
	uint64_t most = most_segments(volume);

	if (most != UINT64_MAX && share->held_segments + 1 > most + beyond(use))
		return false;
	/* Below its minimum, or without any, nobody's reservation comes first. */
	if (share->held_segments == 0 || share->held_segments < share->least_segments)
		return engine->segments_free > SEGMENTS_RESERVED;
	return shares_spare_segments(engine) > 0;
}

bool share_allows_segment(struct volume *volume, enum log_use use)
{
	struct mp_engine *engine = volume->engine;
	bool full, allowed;

	if (engine->shares_stale)
		shares_update(engine);
	full = is_full(volume, use);
	allowed = !full && has_room(volume, use);
	if (use == LOG_DATA)
		volume->share.starved = !allowed;
	if (!allowed && !full) {
		engine->checkpoint.wanted |= checkpoint_would_free(engine) > 0;
		engine->release_pressed = true;
	}
	return allowed;
}

/* ---- slowing ---- */

uint64_t share_dirty_bytes(const struct volume *volume)
{
	int64_t bytes = volume->share.dirty_base_bytes + (int64_t)volume->head_offset_bytes;

	return bytes > 0 ? (uint64_t)bytes : 0;
}

uint64_t share_limit_bytes(const struct volume *volume)
{
	return volume->share.limit_segments * volume->engine->super.log_segment_bytes;
}

/* 0 up to so many quarters, PRESSURE_FULL at the whole, straight between. */
static uint64_t pressure_from(uint64_t quarters, uint64_t part, uint64_t whole)
{
	uint64_t from = whole / 4 * quarters;

	if (part <= from)
		return 0;
	if (part >= whole)
		return PRESSURE_FULL;
	return (part - from) * PRESSURE_FULL / (whole - from);
}

static uint64_t age_pressure(const struct volume *volume)
{
	uint64_t bound_ns = volume->share.set.strict_bound_ns;

	/* In microseconds: a bound of a year times PRESSURE_FULL fits. */
	return bound_ns ? pressure_from(AGE_QUARTERS, volume_age_ns(volume) / 1000,
					bound_ns / 1000 + 1)
			: 0;
}

static uint64_t pressure(const struct volume *volume)
{
	uint64_t fill = pressure_from(FILL_QUARTERS, share_dirty_bytes(volume),
				      share_limit_bytes(volume));
	uint64_t age = age_pressure(volume);

	return fill > age ? fill : age;
}

bool share_is_slowed(const struct volume *volume)
{
	return pressure(volume) != 0;
}

/* 65536 * (2^(RATE_HALVINGS * pressure) - 1), straight between powers of two: what a byte costs, in
 * parts of what it takes at RATE_SLOWED_FIRST. 0 for no pressure, and no jump anywhere. */
static uint64_t price(uint64_t pressure)
{
	uint64_t exponent = pressure * RATE_HALVINGS;

	return ((65536 + exponent % 65536) << exponent / 65536) - 65536;
}

uint64_t share_rate_bytes_per_s(const struct volume *volume)
{
	uint64_t cost = price(pressure(volume));

	if (age_pressure(volume) == PRESSURE_FULL)
		return 0;
	return cost ? (uint64_t)RATE_SLOWED_FIRST * 65536 / cost : UINT64_MAX;
}

bool share_admits(const struct volume *volume)
{
	return volume->share.paced_until_ns <= volume->engine->now_ns &&
	       age_pressure(volume) < PRESSURE_FULL;
}

uint64_t share_timer_ns(const struct volume *volume)
{
	bool waits = !list_is_empty(&volume->ready) && volume->appends_inflight < APPENDS_MAX &&
		     volume->share.paced_until_ns > volume->engine->now_ns;

	return waits ? volume->share.paced_until_ns : UINT64_MAX;
}

uint64_t share_record_bytes(const struct volume *volume)
{
	uint64_t cost = price(pressure(volume)), bytes;

	if (cost == 0)
		return APPEND_BYTES_MAX;
	bytes = (uint64_t)RATE_SLOWED_FIRST / (1000000000 / PACE_STEP_NS) * 65536 / cost;
	return bytes < APPEND_BYTES_MAX ? bytes : APPEND_BYTES_MAX;
}

void share_charge(struct volume *volume, uint64_t bytes)
{
	uint64_t cost = price(pressure(volume)), now = volume->engine->now_ns;
	uint64_t from = now > PACE_CREDIT_NS ? now - PACE_CREDIT_NS : 0;
	struct volume_share *share = &volume->share;

	if (cost == 0)
		return;
	/* A wake-up that came a little late is no reason to be slower. */
	from = share->paced_until_ns > from ? share->paced_until_ns : from;
	share->paced_until_ns =
		from + (bytes * cost / 65536) * 1000000000 / (uint64_t)RATE_SLOWED_FIRST;
}

/* ---- slots ---- */

static uint64_t slots_least(const struct volume *volume)
{
	const struct mp_cache_super *super = &volume->engine->super;
	uint64_t least = volume->share.set.slots_min_bytes / super->slot_bytes;

	return least < super->slot_count ? least : super->slot_count;
}

void shares_of_slots(struct mp_engine *engine)
{
	/* What is not reserved keeps eviction from looking in vain. */
	uint64_t sum = 0, all = engine->super.slot_count * SHARE_PART / SHARE_PARTS;
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i])
			sum += slots_least(engine->volumes[i]);
	for (i = 0; i < engine->volume_count; i++) {
		const struct volume *volume = engine->volumes[i];
		uint64_t least, most;

		if (!volume)
			continue;
		least = slots_least(volume);
		if (sum > all)
			least = least * all / sum;
		most = volume->share.set.slots_max_bytes / engine->super.slot_bytes;
		most = most > least ? most : least;
		if (volume->share.set.slots_max_bytes == 0 || most > engine->super.slot_count)
			most = UINT32_MAX;
		mp_slots_share(engine->slots, volume->origin, (uint32_t)least,
			       most ? (uint32_t)most : 1);
	}
}
