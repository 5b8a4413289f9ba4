/* ledger.c - how many zero blocks and ranges recovery may have to hold in memory, and in its next
 * checkpoint.
 *
 * A trim of many blocks takes 120 bytes of log. The log therefore does not bound what a guest's
 * trims and zeroes put into the index and the tombstones, and what was swept and released since the
 * last checkpoint comes back when the log is replayed. So each record is counted before it is
 * appended: what the last checkpoint holds, and everything since it began, stays within the limits
 * that a checkpoint has room for.
 * Failure modes: no room: the mutation waits; a checkpoint is begun when that would make room.
 */
#include "engine_internal.h"

void needs_add(struct needs *sum, struct needs more)
{
	sum->zeros += more.zeros;
	sum->ranges += more.ranges;
}

static struct needs needs_of_run(uint64_t block_count)
{
	struct needs needs = {0, 0};

	/* A new range may split one: itself, and one more piece. */
	if (block_count >= RANGE_BLOCKS_MIN)
		needs.ranges = 2;
	else
		needs.zeros = block_count;
	return needs;
}

struct needs needs_of_extent(const struct mp_extent *extent)
{
	return needs_of_run(extent->codec == MP_CODEC_NONE ? 0 : extent->block_count);
}

struct needs needs_of_mutation(const struct mutation *mutation)
{
	struct needs sum = {0, 0};
	uint64_t i, run = 0;

	if (mutation->kind != MUTATION_DATA)
		return needs_of_run(mutation->block_count);
	for (i = 0; i < mutation->block_count; i++) {
		if (mutation->checksums[i] == 0) {
			run++;
			continue;
		}
		needs_add(&sum, needs_of_run(run));
		run = 0;
	}
	needs_add(&sum, needs_of_run(run));
	return sum;
}

static bool fit(const struct mp_engine *engine, struct needs sum, struct needs more)
{
	return sum.zeros + more.zeros <= engine->zeros_max &&
	       sum.ranges + more.ranges <= TOMBSTONES_MAX;
}

bool ledger_allows(struct mp_engine *engine, struct needs needs)
{
	const struct ledger *ledger = &engine->ledger;
	struct needs sum = ledger->saved, live = ledger->inflight;

	needs_add(&sum, ledger->since);
	if ((!needs.zeros && !needs.ranges) || fit(engine, sum, needs))
		return true;
	live.zeros += engine->index.zeros;
	live.ranges += engine->tombstone_count;
	if (fit(engine, live, needs))
		engine->checkpoint.wanted = true;
	return false;
}

void ledger_appended(struct mp_engine *engine, struct needs needs)
{
	needs_add(&engine->ledger.since, needs);
	needs_add(&engine->ledger.since_running, needs);
	needs_add(&engine->ledger.inflight, needs);
}

void ledger_applied(struct mp_engine *engine, struct needs needs)
{
	engine->ledger.inflight.zeros -= needs.zeros;
	engine->ledger.inflight.ranges -= needs.ranges;
}

/* Its position is behind what is applied: what is in flight is replayed over it. */
void ledger_checkpoint_begins(struct mp_engine *engine)
{
	engine->ledger.since_running = engine->ledger.inflight;
}

void ledger_checkpoint_ends(struct mp_engine *engine)
{
	engine->ledger.saved.zeros = engine->checkpoint.zeros;
	engine->ledger.saved.ranges = engine->checkpoint.header.tombstone_count;
	engine->ledger.since = engine->ledger.since_running;
}
