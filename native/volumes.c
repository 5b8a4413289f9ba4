/* volumes.c - the volumes a shard knows: made known, opened, closed, forgotten.
 *
 * Happy path: open -> a chain that starts at the store's position, or the one of an earlier life
 * that goes on -> a checkpoint that remembers it -> MP_EVENT_OPENED (engine.c). A closed volume
 * stays known, with its slots, until its number is needed.
 * Failure modes: something of it is under way: -EBUSY, ask again. The store's image is not the one
 * that dirty records continue: -ESTALE. Too many volumes that cannot be forgotten: -ENOSPC.
 */
#include "engine_internal.h"

struct volume *volume_by_id(struct mp_engine *engine, const uint8_t *id)
{
	uint32_t i;

	for (i = 0; i < engine->volume_count; i++)
		if (engine->volumes[i] && memcmp(engine->volumes[i]->id, id, 16) == 0)
			return engine->volumes[i];
	return NULL;
}

struct volume *volume_new(struct mp_engine *engine, const uint8_t *id, uint32_t number)
{
	struct volume *volume = calloc(1, sizeof *volume);

	if (!volume)
		return NULL;
	volume->engine = engine;
	memcpy(volume->id, id, sizeof volume->id);
	volume->seed = mp_volume_seed(id);
	volume->number = number;
	volume->origin = engine->next_origin++;
	volume->tail_segment = volume->head_segment = volume->cut_segment = NO_SEGMENT;
	volume->doomed_segment = NO_SEGMENT;
	list_init(&volume->mutations);
	list_init(&volume->ready);
	list_init(&volume->ready_ranges);
	list_init(&volume->appends);
	list_init(&volume->held);
	list_init(&volume->syncs);
	pthread_mutex_lock(&engine->mutex);
	engine->volumes[number] = volume;
	if (number >= engine->volume_count)
		engine->volume_count = number + 1;
	pthread_mutex_unlock(&engine->mutex);
	return volume;
}

static void free_mutations(struct link *list, size_t link_offset)
{
	while (!list_is_empty(list)) {
		struct link *link = list->next;
		list_remove(link);
		free((uint8_t *)link - link_offset);
	}
}

void volume_free(struct volume *volume)
{
	if (!volume)
		return;
	/* Only after a simulated crash: what was in flight. Buffers go with their pool. */
	free_mutations(&volume->held, offsetof(struct mutation, in_queue));
	free_mutations(&volume->mutations, offsetof(struct mutation, in_volume));
	free_mutations(&volume->appends, offsetof(struct append, in_volume));
	/* The control plane looks for batches under the mutex: after this it finds none here. */
	pthread_mutex_lock(&volume->engine->mutex);
	volume->engine->volumes[volume->number] = NULL;
	pthread_mutex_unlock(&volume->engine->mutex);
	free(volume->tombstones.items);
	free(volume->batch);
	free(volume);
}

bool volume_is_idle(const struct volume *volume)
{
	const struct mp_engine *engine = volume->engine;

	return volume->connections == 0 && list_is_empty(&volume->mutations) &&
	       list_is_empty(&volume->held) && volume->appends_inflight == 0 &&
	       volume->fills_inflight == 0 && volume->fetch_count == 0 &&
	       engine->release.volume != volume && engine->cut.volume != volume &&
	       !volume->cut_queued && !scrub_is_reading(volume);
}

/* Forget what the log holds of an idle volume; its slots too when its origin changes. */
static void volume_purge(struct volume *volume)
{
	struct mp_engine *engine = volume->engine;
	uint32_t at = volume->tail_segment;
	uint64_t start = index_walk_start(&engine->index), step = 0;

	while (step < engine->index.capacity) {
		struct index_slot *slot = index_walk(&engine->index, start, step);
		if (index_is_live(slot) && index_number(slot) == volume->number)
			index_delete(&engine->index, slot);
		else
			step++;
	}
	while (at != NO_SEGMENT) {
		struct segment *segment = &engine->segments[at];
		at = segment->next;
		segment->state = SEGMENT_WAITING;
		segment->next = NO_SEGMENT;
		segment->released_serial = engine->checkpoint.serial;
		engine->segments_waiting++;
	}
	engine->tombstone_count -= volume->tombstones.count;
	volume->tombstones.count = 0;
	volume->tail_segment = volume->head_segment = volume->cut_segment = NO_SEGMENT;
	volume->release_generation++;
	scrub_forget(engine, volume);
	readahead_forget(engine, volume);
	pthread_mutex_lock(&engine->mutex);
	cut_reset(volume);
	pthread_mutex_unlock(&engine->mutex);
	volume->age_count = 0;
	engine->shares_stale = true;
}

/* A chain that starts anew: its first record names a random predecessor, so that no old segment
 * continues it. */
static void chain_start(struct volume *volume, uint64_t sequence)
{
	struct mp_engine *engine = volume->engine;

	engine->driver->random_bytes(engine->driver->self, &volume->head_checksum,
				     sizeof volume->head_checksum);
	volume->head_offset_bytes = 0;
	volume->head_incarnation = engine->super.incarnation;
	volume->last_sequence = volume->applied_sequence = volume->synced_sequence = sequence;
	volume->destaged_sequence = volume->logged_synced_sequence = sequence;
	volume->syncing_sequence = sequence; /* a sync under way is of the old chain */
	volume->applied_offset_bytes = 0;
	volume->applied_checksum = volume->head_checksum;
	volume->applied_incarnation = volume->head_incarnation;
	volume->applied_ordinal = volume->head_ordinal;
	volume->synced_position = volume->syncing_position = log_applied_position(volume);
	volume->syncing_sequence = sequence;
}

static struct volume *volume_create(struct mp_engine *engine, const uint8_t *id)
{
	uint32_t number;

	for (number = 0; number < VOLUMES_MAX; number++)
		if (!engine->volumes[number])
			return volume_new(engine, id, number);
	for (number = 0; number < VOLUMES_MAX; number++) {
		struct volume *old = engine->volumes[number];
		if (!old->open && !old->failed && volume_is_idle(old) &&
		    old->applied_sequence == old->destaged_sequence) {
			volume_purge(old);
			volume_free(old);
			return volume_new(engine, id, number);
		}
	}
	return NULL;
}

/* What the slots hold under the old one is nobody's, and any new volume may take it. */
static void volume_new_origin(struct volume *volume)
{
	mp_slots_share(volume->engine->slots, volume->origin, 0, UINT32_MAX);
	volume->origin = volume->engine->next_origin++;
	shares_of_slots(volume->engine);
}

static void opened(struct volume *volume, const struct command *command)
{
	struct mp_engine *engine = volume->engine;

	/* Another epoch: what was read ahead may be of another writer's image. */
	readahead_forget(engine, volume);
	memset(volume->streams, 0, sizeof volume->streams);
	volume->size_bytes = command->size_bytes;
	volume->epoch = command->epoch;
	volume->lineage = command->lineage;
	volume->store = command->store;
	volume->open = true;
	volume->dirty_asked = volume->dirty_ready_told = false;
	/* Dirty records of an earlier life do not prove that it is on record: they may be ones that
	 * were never acknowledged, because the crash came before the record. Who opens knows, and
	 * tells. */
	volume->dirty_recorded = false;
	if (volume->applied_sequence > volume->destaged_sequence) {
		volume->dirty_ready_told = true;
		engine_volume_event(volume, MP_EVENT_DIRTY_READY, 0, 0);
	}
	/* The start of a chain must be on the device before its first record: recovery begins
	 * there. And the device remembers every epoch, so that after a crash it is known whether
	 * slots missed somebody else's writes. */
	volume->open_pending = true;
	volume->open_cookie = command->cookie;
	volume->open_serial = engine->checkpoint.serial + 1;
	engine->checkpoint.wanted = true;
	engine->shares_stale = true;
}

int volume_open(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);
	uint64_t at = command->sequence;
	bool dirty, same;

	if (command->size_bytes > VOLUME_BYTES_MAX)
		return -EFBIG;
	if (engine->next_origin >= ORIGINS_MAX && (!volume || !command->flag))
		return -ENOSPC; /* 16 million opens that dropped the slots: format the cache anew */
	if (!volume) {
		volume = volume_create(engine, command->volume);
		if (!volume)
			return -ENOSPC;
		chain_start(volume, at);
		opened(volume, command);
		return 0;
	}
	if (volume->failed)
		return -volume->error;
	if (!volume_is_idle(volume) || volume->open_pending || engine->rescue.stage)
		return -EBUSY;
	dirty = volume->applied_sequence > volume->destaged_sequence;
	if (dirty && (at < volume->destaged_sequence || at > volume->applied_sequence ||
		      command->size_bytes < volume->size_bytes))
		return -ESTALE; /* the store's image is not the one these records continue */
	/* When slots are not to be trusted, neither is what the log still has: a volume that shrank
	 * and grew again stands where it stood, and its end is zeroes. */
	same = dirty || (at == volume->applied_sequence &&
			 (command->flag || fault(engine, MP_FAULT_KEEP_STALE_SLOTS)));
	if (!command->flag && !fault(engine, MP_FAULT_KEEP_STALE_SLOTS))
		volume_new_origin(volume);
	if (same) {
		destaged(volume, at);
		opened(volume, command);
	} else {
		volume_purge(volume);
		chain_start(volume, at);
		opened(volume, command);
	}
	return 0;
}

void volume_grow(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);

	if (volume && volume->open && command->size_bytes > volume->size_bytes &&
	    command->size_bytes <= VOLUME_BYTES_MAX)
		volume->size_bytes = command->size_bytes;
}

int volume_close(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);

	if (!volume)
		return -ENOENT;
	if (!volume_is_idle(volume) || volume->open_pending || engine->rescue.stage ||
	    volume->applied_sequence > volume->destaged_sequence)
		return -EBUSY;
	volume->open = volume->dirty_recorded = volume->dirty_asked = false;
	readahead_forget(engine, volume);
	memset(&volume->share.set, 0, sizeof volume->share.set);
	shares_of_slots(engine);
	engine->shares_stale = true;
	if (command->flag) {
		volume_purge(volume);
		volume_free(volume);
	}
	return 0;
}

uint64_t volume_age_ns(const struct volume *volume)
{
	if (!volume->age_count || volume->applied_sequence <= volume->destaged_sequence)
		return 0;
	return volume->engine->now_ns - volume->ages[volume->age_first].time_ns;
}

void volume_configure(struct mp_engine *engine, const struct command *command)
{
	struct volume *volume = volume_by_id(engine, command->volume);

	if (!volume)
		return;
	memcpy(&volume->share.set, command->bytes, sizeof volume->share.set);
	shares_of_slots(engine);
	engine->shares_stale = true;
}
