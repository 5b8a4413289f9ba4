/* outbox.c - what the control plane takes from an engine: events, batches, counters. Any thread,
 * under the mutex. */
#include "engine_internal.h"

int64_t mp_engine_take_batch(struct mp_engine *engine, const uint8_t *id, void *out,
			     uint64_t capacity_bytes)
{
	struct volume *volume = NULL;
	uint64_t take = 0;
	uint32_t i;

	pthread_mutex_lock(&engine->mutex);
	for (i = 0; i < engine->volume_count && !volume; i++)
		if (engine->volumes[i] && memcmp(engine->volumes[i]->id, id, 16) == 0)
			volume = engine->volumes[i];
	if (volume && volume->batch) {
		take = volume->batch_bytes - volume->batch_taken;
		take = take < capacity_bytes ? take : capacity_bytes;
		memcpy(out, volume->batch + volume->batch_taken, take);
		volume->batch_taken += take;
	}
	pthread_mutex_unlock(&engine->mutex);
	return (int64_t)take;
}

void mp_engine_fetch_bytes(struct mp_engine *engine, uint32_t store, uint64_t *sent,
			   uint64_t *received)
{
	assert(store < STORES_MAX);
	*sent = atomic_load_explicit(&engine->stores[store].sent_bytes, memory_order_relaxed);
	*received = atomic_load_explicit(&engine->stores[store].received_bytes,
					 memory_order_relaxed);
}

int64_t mp_engine_events(struct mp_engine *engine, struct mp_event *out, uint64_t capacity)
{
	uint64_t count = 0;

	pthread_mutex_lock(&engine->mutex);
	while (engine->events && count < capacity) {
		struct event_node *node = engine->events;
		engine->events = node->next;
		if (!engine->events)
			engine->events_tail = &engine->events;
		out[count++] = node->event;
		engine->event_count--;
		free(node);
	}
	pthread_mutex_unlock(&engine->mutex);
	return (int64_t)count;
}

void mp_engine_counters(struct mp_engine *engine, struct mp_engine_counters *out)
{
	pthread_mutex_lock(&engine->mutex);
	*out = engine->published_counters;
	pthread_mutex_unlock(&engine->mutex);
}

int64_t mp_engine_list_volumes(struct mp_engine *engine, struct mp_engine_volume *out,
			       uint64_t capacity)
{
	uint64_t count;

	pthread_mutex_lock(&engine->mutex);
	count = engine->published_count < capacity ? engine->published_count : capacity;
	memcpy(out, engine->published, count * sizeof *out);
	pthread_mutex_unlock(&engine->mutex);
	return (int64_t)count;
}

int mp_engine_stopped(const struct mp_engine *engine)
{
	return engine->stopped;
}

void mp_engine_cache_id(const struct mp_engine *engine, uint8_t *out)
{
	memcpy(out, engine->super.cache_id, sizeof engine->super.cache_id);
}

/* Engine thread only, under the mutex. */
void volume_publish(const struct volume *volume, struct mp_engine_volume *out)
{
	const struct mp_engine *engine = volume->engine;
	uint32_t at = volume->tail_segment;

	*out = volume->counters;
	memcpy(out->id, volume->id, sizeof out->id);
	out->size_bytes = volume->size_bytes;
	out->epoch = volume->epoch;
	out->lineage = volume->lineage;
	out->destaged_sequence = volume->destaged_sequence;
	out->synced_sequence = volume->synced_sequence;
	out->last_sequence = volume->applied_sequence;
	out->connections = volume->connections;
	out->error = volume->failed ? -volume->error : 0;
	out->flags = (volume->open ? MP_VOLUME_OPEN : 0U) |
		     (volume->dirty_recorded ? MP_VOLUME_DIRTY_RECORDED : 0U) |
		     (volume->failed ? MP_VOLUME_FAILED : 0U);
	out->dirty_bytes = out->log_segments = 0;
	for (; at != NO_SEGMENT; at = engine->segments[at].next) {
		uint32_t next = engine->segments[at].next;
		uint64_t used = next == NO_SEGMENT ? volume->head_offset_bytes
						   : engine->super.log_segment_bytes;
		uint64_t last = next == NO_SEGMENT ? volume->applied_sequence
						   : engine->segments[next].first_sequence - 1;
		out->log_segments++;
		if (last <= volume->destaged_sequence)
			continue;
		out->dirty_bytes += used;
		if (at == volume->cut_segment && volume->cut_offset_bytes <= used)
			out->dirty_bytes -= volume->cut_offset_bytes;
	}
	out->oldest_dirty_ns = volume_age_ns(volume);
	out->slots_held = mp_slots_held(engine->slots, volume->origin);
	out->log_share_bytes = share_limit_bytes(volume);
	out->slowed_bytes_per_s = share_rate_bytes_per_s(volume);
	if (volume->share.starved && !list_is_empty(&volume->ready))
		out->slowed_bytes_per_s = 0;
}
