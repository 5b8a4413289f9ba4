/* scrub.c - background verification of what lies on the cache device: the pass, its budget, slots.
 *
 * A pass reads what is still needed, and nothing else: log segments with undestaged records first,
 * because they are the only copy; then the rest of the log (both in scrublog.c), then every slot
 * with something valid in it. It writes nothing, so a crash leaves nothing of it.
 *
 * Happy path: the budget allows a read (a token bucket on the driver's clock) and for some time no
 * guest waited for the device or for buffers -> the slots in it are pinned and their checksums
 * noted -> read -> each block that is still the one that was noted is verified -> unpinned. A pass
 * takes at least as long as SCRUB_PASS_BYTES would, so that a cache with little in it is not read
 * all day.
 *
 * Failure modes: guests are never quiet: after SCRUB_PATIENCE_NS one read goes all the same, or a
 * busy cache would never be verified. A block does not verify: it is dropped, which makes a
 * miss of the next read; told and counted, apart from what reads of guests find. A read fails: slot
 * by slot once more; what cannot be read is dropped, as when a guest reads it.
 */
#include "scrub_internal.h"

#include <stdarg.h>
#include <stdio.h>

static const uint64_t second_ns = 1000000000ULL;

int scrub_new(struct mp_engine *engine)
{
	struct scrub *scrub;

	if (!engine->options.scrub_bytes_per_s)
		return 0;
	scrub = engine->scrub = calloc(1, sizeof *scrub);
	if (!scrub)
		return -ENOMEM;
	engine->counters.scrub_stage = scrub->stage = MP_SCRUB_RESTS;
	scrub->due_ns = engine->now_ns;
	scrub->memory = aligned_alloc(MP_BLOCK_BYTES, SCRUB_READ_BYTES);
	scrub->scan.memory = aligned_alloc(MP_BLOCK_BYTES, engine->super.log_segment_bytes);
	scrub->scan.step_bytes = SCRUB_READ_BYTES;
	return scrub->memory && scrub->scan.memory ? 0 : -ENOMEM;
}

void scrub_free(struct mp_engine *engine)
{
	if (!engine->scrub)
		return;
	free(engine->scrub->memory);
	free(engine->scrub->scan.memory);
	free(engine->scrub);
	engine->scrub = NULL;
}

void scrub_found(struct volume *volume, int status, const char *format, ...)
{
	struct mp_event event;
	va_list arguments;

	memset(&event, 0, sizeof event);
	event.type = MP_EVENT_SCRUB_FOUND;
	event.status = status;
	memcpy(event.volume, volume->id, sizeof event.volume);
	va_start(arguments, format);
	vsnprintf(event.message, sizeof event.message, format, arguments);
	va_end(arguments);
	engine_event(volume->engine, &event);
}

/* ---- the budget ---- */

static uint64_t duration_ns(const struct mp_engine *engine, uint64_t bytes)
{
	uint64_t rate = engine->options.scrub_bytes_per_s;

	return bytes / rate * second_ns + bytes % rate * second_ns / rate;
}

/* A bucket that holds SCRUB_BURST_BYTES: due_ns is when it will have had what was taken. */
void scrub_charge(struct mp_engine *engine, uint64_t length_bytes)
{
	struct scrub *scrub = engine->scrub;
	uint64_t full_ns = duration_ns(engine, SCRUB_BURST_BYTES);

	if (scrub->due_ns + full_ns < engine->now_ns)
		scrub->due_ns = engine->now_ns - full_ns;
	scrub->due_ns += duration_ns(engine, length_bytes);
}

static bool is_stopped(const struct mp_engine *engine)
{
	const struct scrub *scrub = engine->scrub;

	return !scrub || scrub->busy || scrub->scan.busy || engine->stopping || engine->failed ||
	       engine->rescue.stage;
}

static bool guests_wait(const struct mp_engine *engine)
{
	return engine->guest_ios || engine->sync.running || engine->paused;
}

static bool must_yield(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;

	if (engine->now_ns - scrub->guests_ns >= SCRUB_QUIET_NS)
		return false;
	if (!scrub->held_ns)
		scrub->held_ns = engine->now_ns;
	return engine->now_ns - scrub->held_ns < engine->options.scrub_patience_ns;
}

/* While it yields: what a guest waits for ends in a turn, which looks again by itself. */
uint64_t scrub_timer_ns(const struct mp_engine *engine)
{
	const struct scrub *scrub = engine->scrub;
	uint64_t patient_ns, quiet_ns;

	if (is_stopped(engine))
		return UINT64_MAX;
	if (!scrub->held_ns)
		return scrub->due_ns;
	patient_ns = scrub->held_ns + engine->options.scrub_patience_ns;
	quiet_ns = guests_wait(engine) ? UINT64_MAX : scrub->guests_ns + SCRUB_QUIET_NS;
	return quiet_ns < patient_ns ? quiet_ns : patient_ns;
}

/* ---- slots ---- */

static struct volume *volume_of_origin(const struct mp_engine *engine, uint32_t origin)
{
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i] && engine->volumes[i]->origin == origin)
			return engine->volumes[i];
	return NULL; /* nobody can read it any more */
}

static bool take(struct mp_engine *engine, uint64_t slot, struct scrub_slot *out)
{
	out->pinned = mp_slots_stored(engine->slots, slot, &out->origin, &out->first_block,
				      out->checksums) > 0 &&
		      volume_of_origin(engine, out->origin);
	if (out->pinned)
		mp_slots_pin(engine->slots, (int64_t)slot);
	return out->pinned;
}

static void drop(struct volume *volume, uint64_t block, uint64_t slot, int status)
{
	struct mp_engine *engine = volume->engine;

	engine->counters.scrub_slot_errors++;
	mp_slots_invalidate(engine->slots, volume->origin, block, 1);
	scrub_found(volume, status, "block %llu: read slot %llu %s; dropped, the store has it",
		    (unsigned long long)block, (unsigned long long)slot,
		    status == -EIO ? "cannot be read" : "does not verify");
}

/* One block of a slot that was read; data is NULL when that failed. */
static void verify_block(struct volume *volume, uint64_t block, uint64_t slot, uint32_t checksum,
			 const uint8_t *data)
{
	struct mp_engine *engine = volume->engine;
	uint32_t now_checksum = 0;
	int restored = 0;

	/* Overwritten, trimmed or dropped meanwhile: what was read is of no use to anybody. It
	 * cannot have been filled again, the slot is pinned. */
	if (mp_slots_find(engine->slots, volume->origin, block, &now_checksum, &restored) !=
		    (int64_t)slot ||
	    now_checksum != checksum)
		return;
	if (!data) {
		drop(volume, block, slot, -EIO);
		return;
	}
	engine->counters.scrub_verified_bytes += MP_BLOCK_BYTES;
	if (mp_slots_checksum(mp_block_checksum(volume->seed, block, data, MP_BLOCK_BYTES)) ==
	    checksum) {
		mp_slots_verified(engine->slots, (int64_t)slot, block);
	} else if (restored && !engine->was_clean) {
		engine->counters.slot_stale_after_restart++; /* as reads.c has it: no damage */
		mp_slots_invalidate(engine->slots, volume->origin, block, 1);
	} else
		drop(volume, block, slot, -EBADMSG);
}

static void verify_slot(struct mp_engine *engine, uint64_t slot, const struct scrub_slot *noted,
			const uint8_t *data)
{
	struct volume *volume = volume_of_origin(engine, noted->origin);
	uint64_t i;

	for (i = 0; volume && i < engine->slot_blocks; i++)
		if (noted->checksums[i])
			verify_block(volume, noted->first_block + i, slot, noted->checksums[i],
				     data ? data + i * MP_BLOCK_BYTES : NULL);
	mp_slots_unpin(engine->slots, (int64_t)slot);
}

static void slots_done(struct mp_io *io)
{
	struct mp_engine *engine = io->context;
	struct scrub *scrub = engine->scrub;
	bool failed = io->result < 0, again = failed && scrub->slot_count > 1;
	uint32_t i;

	engine->ios_inflight--;
	scrub->busy = false;
	engine->counters.device_errors += failed;
	if (again)
		scrub->careful_end = scrub->slot + scrub->slot_count;
	for (i = 0; i < scrub->slot_count; i++) {
		const uint8_t *data = scrub->memory + (uint64_t)i * engine->super.slot_bytes;

		if (!scrub->slots[i].pinned)
			continue;
		if (again)
			mp_slots_unpin(engine->slots, (int64_t)(scrub->slot + i));
		else
			verify_slot(engine, scrub->slot + i, &scrub->slots[i],
				    failed ? NULL : data);
	}
	if (!again)
		scrub->slot += scrub->slot_count;
}

static void slots_read(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;

	memset(&scrub->io, 0, sizeof scrub->io);
	scrub->iov.iov_base = scrub->memory;
	scrub->iov.iov_len = scrub->slot_count * engine->super.slot_bytes;
	scrub->io.op = MP_OP_READ;
	scrub->io.iov = &scrub->iov;
	scrub->io.iov_count = 1;
	scrub->io.offset_bytes =
		engine->super.slots_offset_bytes + scrub->slot * engine->super.slot_bytes;
	scrub->io.length_bytes = scrub->iov.iov_len;
	scrub->io.done = slots_done;
	scrub->io.context = engine;
	scrub->busy = true;
	scrub_charge(engine, scrub->iov.iov_len);
	engine->counters.scrub_read_bytes += scrub->iov.iov_len;
	engine_submit(engine, &scrub->io);
}

/* Read the next slots with something to verify, over those between them that have nothing. False:
 * there are none. */
static bool slots_step(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;
	uint64_t end = mp_slots_fresh(engine->slots);
	uint32_t most = (uint32_t)(SCRUB_READ_BYTES / engine->super.slot_bytes), looks = 0, i;

	while (scrub->slot < end && !take(engine, scrub->slot, &scrub->slots[0])) {
		scrub->slot++;
		if (++looks == SCRUB_LOOKS) { /* looking costs, too */
			scrub_charge(engine, SCRUB_READ_BYTES);
			return true;
		}
	}
	if (scrub->slot >= end)
		return false;
	if (scrub->slot < scrub->careful_end)
		most = 1;
	scrub->slot_count = 1;
	for (i = 1; i < most && scrub->slot + i < end; i++)
		if (take(engine, scrub->slot + i, &scrub->slots[i]))
			scrub->slot_count = i + 1;
	slots_read(engine);
	return true;
}

/* ---- the pass ---- */

static void pass_begin(struct mp_engine *engine)
{
	engine->scrub->stage = MP_SCRUB_DIRTY;
	engine->scrub->began_ns = engine->now_ns;
	scrub_log_begin(engine);
}

static void pass_end(struct mp_engine *engine)
{
	struct mp_event event = {.type = MP_EVENT_SCRUB_PASS};
	struct scrub *scrub = engine->scrub;
	uint64_t next_ns = scrub->began_ns + duration_ns(engine, SCRUB_PASS_BYTES);

	scrub->stage = MP_SCRUB_RESTS;
	scrub->due_ns = next_ns > scrub->due_ns ? next_ns : scrub->due_ns;
	engine->counters.scrub_passes++;
	engine_event(engine, &event);
}

static void stage_end(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;

	if (scrub->stage == MP_SCRUB_DIRTY) {
		scrub->stage = MP_SCRUB_CLEAN;
		scrub_log_begin(engine);
	} else if (scrub->stage == MP_SCRUB_CLEAN) {
		scrub->stage = MP_SCRUB_SLOTS;
		scrub->slot = scrub->careful_end = 0;
	} else
		pass_end(engine);
}

/* False: nothing is left to read in this stage. */
static bool stage_step(struct mp_engine *engine)
{
	return engine->scrub->stage == MP_SCRUB_SLOTS ? slots_step(engine)
						      : scrub_log_step(engine);
}

void scrub_step(struct mp_engine *engine)
{
	struct scrub *scrub = engine->scrub;

	if (scrub && guests_wait(engine))
		scrub->guests_ns = engine->now_ns;
	if (is_stopped(engine) || scrub->due_ns > engine->now_ns || must_yield(engine))
		return;
	scrub->held_ns = 0;
	if (scrub->stage == MP_SCRUB_RESTS)
		pass_begin(engine);
	while (scrub->stage != MP_SCRUB_RESTS && !stage_step(engine))
		stage_end(engine);
	engine->counters.scrub_stage = scrub->stage;
	engine->counters.scrub_slot = scrub->stage == MP_SCRUB_SLOTS ? scrub->slot : 0;
}
