/* storefsckvolume.c - the catalogue as the log tells it, and the store's held against it.
 *
 * Happy path: a volume is what its newest VOLUME record says, at the position of its newest batch.
 * What may differ: a segment that is gone may have held the VOLUME record that made a volume, one
 * that changed it, its DELETE, or batches of it (all of whose data is dead). So where commits are
 * missing behind what the log knows of a volume, the store may know more; never less: neither an
 * epoch nor a position goes back. A volume remembers the commit of its birth: that record is in
 * the log or its commit is missing.
 */
#include "storefsck_internal.h"

static struct fsck_volume **bucket(const struct mp_fsck *fsck, const uint8_t *id)
{
	uint64_t hash = mp_xxh3(id, MP_VOLUME_ID_BYTES);

	return (struct fsck_volume **)&fsck->volumes[hash % FSCK_VOLUME_BUCKETS];
}

struct fsck_volume *fsck_volume_find(const struct mp_fsck *fsck, const uint8_t *id)
{
	struct fsck_volume *volume = *bucket(fsck, id);

	while (volume && memcmp(volume->state.id, id, MP_VOLUME_ID_BYTES) != 0)
		volume = volume->next;
	return volume;
}

struct fsck_volume *fsck_volume_get(struct mp_fsck *fsck, const uint8_t *id)
{
	struct fsck_volume *volume = fsck_volume_find(fsck, id);

	if (volume)
		return volume;
	volume = store_allocate(sizeof *volume);
	memcpy(volume->state.id, id, MP_VOLUME_ID_BYTES);
	volume->next = *bucket(fsck, id);
	*bucket(fsck, id) = volume;
	return volume;
}

static void heard_of(struct fsck_volume *volume, uint64_t epoch, uint64_t commit)
{
	if (epoch > volume->epoch)
		volume->epoch = epoch;
	volume->last_commit = commit;
}

void fsck_volume_batch(struct mp_fsck *fsck, struct fsck_volume *volume,
		       const struct mp_record *record, uint64_t commit)
{
	if (record->first_sequence > volume->applied_sequence + 1) {
		if (!fsck_missing_after(fsck, volume->last_commit) && fsck->store)
			fsck_report(fsck, MP_FSCK_CATALOGUE,
				    (struct fsck_where){.volume = volume->state.id},
				    "its log has a gap: sequence %llu follows %llu in commit %llu",
				    (unsigned long long)record->first_sequence,
				    (unsigned long long)volume->applied_sequence,
				    (unsigned long long)commit);
		volume->gap_commit = commit;
	}
	/* An epoch that no record here began: the one that did is gone, and may have shrunk it. */
	if (record->epoch != volume->epoch)
		volume->gap_commit = commit;
	if (record->last_sequence > volume->applied_sequence)
		volume->applied_sequence = record->last_sequence;
	volume->lineage = record->lineage;
	heard_of(volume, record->epoch, commit);
}

void fsck_volume_state(struct mp_fsck *fsck, struct fsck_volume *volume,
		       const struct mp_volume_state *state, uint64_t commit)
{
	int lost = fsck_missing_after(fsck, volume->last_commit);

	if (state->epoch < volume->epoch || state->applied_sequence < volume->applied_sequence)
		fsck_report(fsck, MP_FSCK_CATALOGUE, (struct fsck_where){.volume = state->id},
			    "its epoch or its position goes back in commit %llu",
			    (unsigned long long)commit);
	/* Only what takes an epoch (an open, a shrinking) or a batch changes the map. */
	if (lost && (state->epoch != volume->epoch ||
		     state->applied_sequence != volume->applied_sequence))
		volume->gap_commit = commit;
	volume->state = *state;
	volume->state_commit = commit;
	volume->applied_sequence = state->applied_sequence;
	volume->lineage = state->lineage;
	heard_of(volume, state->epoch, commit);
}

void fsck_volume_delete(struct fsck_volume *volume, uint64_t commit)
{
	volume->deleted = 1;
	volume->last_commit = commit;
}

void fsck_volumes_end(struct mp_fsck *fsck)
{
	for (uint32_t i = 0; fsck->store && i < STORE_VOLUME_BUCKETS; i++)
		for (struct store_volume *mine = fsck->store->volumes[i]; mine; mine = mine->next) {
			struct fsck_volume *volume = fsck_volume_get(fsck, mine->map.volume);

			if (mine->state.applied_sequence != volume->applied_sequence ||
			    mine->state.epoch != volume->epoch)
				volume->gap_commit = UINT64_MAX;
		}
}

static void complain(struct mp_fsck *fsck, const struct fsck_volume *volume, const char *text)
{
	fsck_report(fsck, MP_FSCK_CATALOGUE, (struct fsck_where){.volume = volume->state.id}, "%s",
		    text);
}

static int differs(const struct mp_volume_state *mine, const struct fsck_volume *volume)
{
	struct mp_volume_state expected = volume->state;

	/* The position is compared by itself. */
	expected.applied_sequence = mine->applied_sequence;
	expected.lineage = mine->lineage;
	return memcmp(&expected, mine, sizeof expected) != 0;
}

static void compare(struct mp_fsck *fsck, const struct mp_volume_state *mine,
		    const struct fsck_volume *volume)
{
	fsck->summary.volumes++;
	if (volume->deleted) {
		complain(fsck, volume, "the log deleted it, the catalogue has it");
		return;
	}
	if (mine->epoch < volume->epoch)
		complain(fsck, volume, "its epoch in the catalogue is older than in the log");
	if (mine->applied_sequence < volume->applied_sequence)
		complain(fsck, volume, "its position in the catalogue is older than in the log");
	else if ((mine->applied_sequence > volume->applied_sequence ||
		  mine->lineage != volume->lineage) &&
		 !fsck_missing_after(fsck, volume->last_commit))
		complain(fsck, volume, "its position in the catalogue is one the log never had");
	if (!volume->state_commit) {
		if (!fsck_is_missing(fsck, mine->created_commit))
			complain(fsck, volume, "the catalogue has it, the log never made it");
	} else if (differs(mine, volume) && !fsck_missing_after(fsck, volume->state_commit)) {
		complain(fsck, volume, "its state in the catalogue is not what the log says");
	}
}

void fsck_volumes_compare(struct mp_fsck *fsck)
{
	for (uint32_t i = 0; i < STORE_VOLUME_BUCKETS; i++)
		for (struct store_volume *mine = fsck->store->volumes[i]; mine; mine = mine->next)
			compare(fsck, &mine->state, fsck_volume_get(fsck, mine->map.volume));
	for (uint32_t i = 0; i < FSCK_VOLUME_BUCKETS; i++)
		for (struct fsck_volume *volume = fsck->volumes[i]; volume; volume = volume->next)
			if (!volume->deleted && !store_volume_find(fsck->store, volume->state.id) &&
			    !fsck_missing_after(fsck, volume->last_commit))
				complain(fsck, volume, "the log has it, the catalogue has not");
}

void fsck_volumes_free(struct mp_fsck *fsck)
{
	for (uint32_t i = 0; i < FSCK_VOLUME_BUCKETS; i++)
		while (fsck->volumes[i]) {
			struct fsck_volume *next = fsck->volumes[i]->next;

			free(fsck->volumes[i]);
			fsck->volumes[i] = next;
		}
}
