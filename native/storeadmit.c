/* storeadmit.c - may this go into the log? Batches, volume states, deletions. And may this be told?
 *
 * Happy path: a batch verifies byte for byte, comes from the writer of the newest epoch, in a
 * lineage that is on record, and continues what is in the log already. The answer is found against
 * the admitted state, which runs ahead of the durable one by what is in the log behind it.
 * Failure modes are the statuses of format.h. Nothing here is undone later: a request is admitted
 * only when its place in the log is certain, and a log that fails fails the store.
 */
#include "store_internal.h"

static int follows(const struct mp_record *record, const struct mp_record *first, uint32_t index)
{
	return record->type == MP_RECORD_BATCH && record->part_index == index &&
	       record->lineage == first->lineage && record->epoch == first->epoch &&
	       record->first_sequence == first->first_sequence &&
	       record->last_sequence == first->last_sequence &&
	       !memcmp(record->volume, first->volume, sizeof record->volume);
}

/* What the table says about the batch as a whole. mp_record_check has looked at each extent. */
static void survey(const struct mp_record *record, struct store_batch *batch)
{
	const struct mp_extent *extent = (const struct mp_extent *)(const void *)(record + 1);

	for (uint32_t i = 0; i < record->extent_count; i++, extent++) {
		if (extent->first_block + extent->block_count > batch->end_block)
			batch->end_block = extent->first_block + extent->block_count;
		batch->data_extents += extent->stored_length_bytes != 0;
		batch->is_foreign |= extent->stored_length_bytes &&
				     memcmp(extent->origin, record->volume, sizeof record->volume);
	}
}

/* All parts of one batch, whole and verified? bytes are 8-byte aligned. Any thread. */
uint32_t store_batch_check(struct mp_store *store, const uint8_t *bytes, uint64_t length_bytes,
			   struct store_batch *batch)
{
	const struct mp_record *first = (const struct mp_record *)(const void *)bytes;
	uint64_t offset_bytes = 0;
	uint32_t last = 0;

	memset(batch, 0, sizeof *batch);
	for (uint32_t index = 0; offset_bytes < length_bytes; index++) {
		const struct mp_record *record = (const void *)(bytes + offset_bytes);
		int64_t record_bytes = mp_record_check(record, length_bytes - offset_bytes);

		if (record_bytes == -EBADMSG)
			return MP_STATUS_CORRUPT;
		if (record_bytes < 0 || (uint64_t)record_bytes > length_bytes - offset_bytes)
			return MP_STATUS_INVALID;
		if (last || index == MP_BATCH_PARTS_MAX || !follows(record, first, index))
			return MP_STATUS_INVALID;
		if (!store_fault(store, MP_STORE_FAULT_SKIP_CHECKSUM) &&
		    mp_record_check_payload(record, (uint64_t)record_bytes))
			return MP_STATUS_CORRUPT;
		survey(record, batch);
		last = record->flags & MP_RECORD_LAST_OF_BATCH;
		offset_bytes += store_align((uint64_t)record_bytes, 8);
	}
	if (!last && !(offset_bytes && store_fault(store, MP_STORE_FAULT_HALF_BATCH)))
		return MP_STATUS_INVALID;
	/* Who writes is the origin of what is written. Else one batch of made-up origins after the
	 * other would fill the table of origins, for good. */
	if (batch->is_foreign)
		return MP_STATUS_INVALID;
	batch->volume = first->volume;
	batch->first_sequence = first->first_sequence;
	batch->last_sequence = first->last_sequence;
	batch->epoch = first->epoch;
	batch->lineage = first->lineage;
	return MP_STATUS_OK;
}

static int lineage_index(const struct mp_volume_state *state, uint64_t lineage)
{
	for (int i = MP_LINEAGES - 1; i >= 0; i--)
		if (lineage && state->lineages[i].id == lineage)
			return i;
	return -1;
}

static uint32_t batch_admission(struct mp_store *store, const struct store_batch *batch)
{
	struct store_volume *volume = store_volume_find(store, batch->volume);
	const struct mp_volume_state *state;
	uint64_t blocks;

	if (!volume || volume->deleted)
		return MP_STATUS_UNKNOWN_VOLUME;
	state = &volume->admitted;
	blocks = state->size_bytes / MP_BLOCK_BYTES + (state->size_bytes % MP_BLOCK_BYTES != 0);
	if (batch->epoch > state->epoch || batch->last_sequence >= STORE_SEQUENCES_MAX)
		return MP_STATUS_INVALID;
	if (batch->epoch < state->epoch && !store_fault(store, MP_STORE_FAULT_OLD_EPOCH))
		return MP_STATUS_STALE_EPOCH;
	if ((lineage_index(state, batch->lineage) < 0 ||
	     lineage_index(state, batch->lineage) < lineage_index(state, state->lineage)) &&
	    !store_fault(store, MP_STORE_FAULT_OLD_LINEAGE))
		return MP_STATUS_LINEAGE;
	/* A newer writer cannot repeat what an older one did. */
	if (!store_fault(store, MP_STORE_FAULT_OLD_LINEAGE) &&
	    batch->last_sequence <= state->applied_sequence && batch->lineage != state->lineage)
		return MP_STATUS_CONFLICT;
	if (batch->first_sequence > state->applied_sequence + 1 &&
	    !store_fault(store, MP_STORE_FAULT_APPLY_GAP))
		return MP_STATUS_GAP;
	if (batch->end_block > blocks)
		return MP_STATUS_RANGE;
	return MP_STATUS_OK;
}

static uint32_t volume_admission(struct mp_store *store, struct store_request *request)
{
	const struct mp_volume_state *wanted =
		(const void *)(request->buffer + MP_GROUP_HEADER_BYTES);
	struct store_volume *volume;

	if (request->frame.payload_bytes != sizeof *wanted ||
	    request->frame.checked_bytes != sizeof *wanted)
		return MP_STATUS_INVALID;
	if (mp_is_zero(wanted->id, sizeof wanted->id) || wanted->name[MP_NAME_BYTES - 1] ||
	    !mp_is_zero(wanted->reserved, sizeof wanted->reserved) ||
	    wanted->applied_sequence >= STORE_SEQUENCES_MAX)
		return MP_STATUS_INVALID;
	volume = store_volume_find(store, wanted->id);
	request->volume = *wanted;
	if (!volume) {
		request->volume.created_commit = store->position.commit;
		return MP_STATUS_OK;
	}
	if (volume->deleted)
		return MP_STATUS_UNKNOWN_VOLUME;
	if (wanted->epoch < volume->admitted.epoch)
		return MP_STATUS_STALE_EPOCH;
	/* Batches and states race; the position belongs to the batches. */
	request->volume.applied_sequence = volume->admitted.applied_sequence;
	request->volume.lineage = volume->admitted.lineage;
	request->volume.created_commit = volume->admitted.created_commit;
	return MP_STATUS_OK;
}

static uint32_t delete_admission(struct mp_store *store, struct store_request *request)
{
	struct store_volume *volume;

	if (request->frame.payload_bytes != MP_VOLUME_ID_BYTES)
		return MP_STATUS_INVALID;
	volume = store_volume_find(store, request->buffer + MP_GROUP_HEADER_BYTES);
	return volume && !volume->deleted ? MP_STATUS_OK : MP_STATUS_UNKNOWN_VOLUME;
}

uint32_t store_admission(struct mp_store *store, struct store_request *request)
{
	if (request->status != MP_STATUS_OK)
		return request->status;
	if (request->frame.type == MP_FRAME_BATCH)
		return batch_admission(store, &request->batch);
	if (request->frame.type == MP_FRAME_PUT_VOLUME)
		return volume_admission(store, request);
	return delete_admission(store, request);
}

/* It is in the log now: later requests are held against the state with it. */
void store_admit(struct mp_store *store, struct store_request *request)
{
	struct store_volume *volume;

	if (request->frame.type == MP_FRAME_BATCH) {
		volume = store_volume_find(store, request->batch.volume);
		if (request->batch.last_sequence > volume->admitted.applied_sequence)
			volume->admitted.applied_sequence = request->batch.last_sequence;
		volume->admitted.lineage = request->batch.lineage;
	} else if (request->frame.type == MP_FRAME_PUT_VOLUME) {
		volume = store_volume_find(store, request->volume.id);
		if (!volume)
			volume = store_volume_add(store, request->volume.id);
		volume->admitted = request->volume;
	} else {
		volume = store_volume_find(store, request->buffer + MP_GROUP_HEADER_BYTES);
		volume->deleted = 1;
	}
}

/* A READ or a BLOCK_STATUS. Any but a stale writer may ask, and only of what is applied. */
uint32_t store_query_admit(struct mp_store *store, const struct store_query *query,
			   uint64_t *lineage, uint64_t *sequence)
{
	struct store_volume *volume = store_volume_find(store, query->volume);
	uint64_t blocks;

	if (query->block_count == 0)
		return MP_STATUS_INVALID;
	if (!volume || !volume->visible)
		return MP_STATUS_UNKNOWN_VOLUME;
	*lineage = volume->state.lineage;
	*sequence = volume->state.applied_sequence;
	if (query->epoch < volume->state.epoch)
		return MP_STATUS_STALE_EPOCH;
	if (query->minimum_sequence > volume->state.applied_sequence)
		return MP_STATUS_BEHIND;
	blocks = volume->state.size_bytes / MP_BLOCK_BYTES +
		 (volume->state.size_bytes % MP_BLOCK_BYTES != 0);
	if (query->first_block > blocks || query->block_count > blocks - query->first_block)
		return MP_STATUS_RANGE;
	return MP_STATUS_OK;
}
