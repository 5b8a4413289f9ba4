/* storesuper.c - file 0: two superblocks, the newer valid one counts.
 *
 * Happy path: both copies are written and synced one after the other, the older one first, so that
 * a crash at any point leaves one that is whole, and damage to one copy later loses nothing.
 * Failure modes: no valid copy, a newer format: refused with one line.
 */
#include <stdio.h>

#include "store_internal.h"

static uint64_t checksum(const struct mp_store_super *super)
{
	return mp_xxh3((const uint8_t *)super + offsetof(struct mp_store_super, version),
		       sizeof *super - offsetof(struct mp_store_super, version));
}

void store_super_seal(struct mp_store_super *super)
{
	super->magic = MP_STORE_SUPER_MAGIC;
	super->version = MP_FORMAT_VERSION;
	super->checksum = checksum(super);
}

int mp_store_format(struct mp_driver *driver, const uint8_t *store_id, uint64_t segment_bytes)
{
	struct mp_io create = {.op = MP_OP_CREATE};
	struct mp_store_super *supers;
	int64_t result;

	if (segment_bytes < 16 * MP_BLOCK_BYTES || segment_bytes > STORE_SEGMENT_MAX_BYTES ||
	    segment_bytes % MP_BLOCK_BYTES)
		return -EINVAL;
	if (driver->file_length_bytes(driver->self, 0) >= 0)
		return -EEXIST;
	supers = store_allocate_aligned(2 * sizeof *supers);
	memset(supers, 0, 2 * sizeof *supers);
	memcpy(supers->store_id, store_id, sizeof supers->store_id);
	supers->generation = 1;
	supers->segment_bytes = segment_bytes;
	store_super_seal(supers);
	supers[1] = supers[0];
	result = mp_driver_do(driver, &create);
	if (result >= 0)
		result = mp_driver_write(driver, 0, 0, supers, 2 * sizeof *supers);
	if (result >= 0)
		result = mp_driver_sync(driver, 0);
	free(supers);
	return result < 0 ? (int)result : 0;
}

int store_super_valid(const struct mp_store_super *super)
{
	return super->magic == MP_STORE_SUPER_MAGIC && super->checksum == checksum(super);
}

/* A checksum does not make it possible. */
static int is_possible(const struct mp_store_super *super)
{
	return super->segment_bytes >= 16 * MP_BLOCK_BYTES &&
	       super->segment_bytes <= STORE_SEGMENT_MAX_BYTES &&
	       super->segment_bytes % MP_BLOCK_BYTES == 0 && super->generation < UINT64_MAX / 2 &&
	       super->incarnation >> 32 < UINT32_MAX / 2 &&
	       super->checkpoint_segment < STORE_SEGMENTS_MAX &&
	       super->checkpoint_offset_bytes < STORE_FILE_MAX_BYTES &&
	       super->checkpoint_offset_bytes % MP_BLOCK_BYTES == 0;
}

int store_super_load(struct mp_store *store, char *message, uint64_t message_bytes)
{
	struct mp_store_super *supers = store_allocate_aligned(2 * sizeof *supers);
	int64_t result = mp_driver_read(store->driver, 0, 0, supers, 2 * sizeof *supers);
	int best = -1;

	for (int i = 0; result >= 0 && i < 2; i++)
		if (store_super_valid(&supers[i]) &&
		    (best < 0 || supers[i].generation > supers[best].generation))
			best = i;
	if (best >= 0) {
		store->super = supers[best];
		store->super_copy = (uint32_t)best;
	}
	free(supers);
	if (result < 0) {
		snprintf(message, message_bytes, "cannot read the superblocks (file 0): error %d",
			 (int)-result);
		return (int)result;
	}
	if (best < 0) {
		snprintf(message, message_bytes,
			 "file 0 holds no valid Millpond superblock: "
			 "not a store, or both copies damaged");
		return -EBADMSG;
	}
	if (store->super.version != MP_FORMAT_VERSION || store->super.incompatible_features) {
		snprintf(message, message_bytes,
			 "the store has format %u with features 0x%x, "
			 "this program knows format %d with 0x0",
			 store->super.version, store->super.incompatible_features,
				MP_FORMAT_VERSION);
		return -ENOTSUP;
	}
	if (!is_possible(&store->super)) {
		snprintf(message, message_bytes,
			 "the superblocks (file 0) make no sense: not written by this program");
		return -EPROTO;
	}
	return 0;
}

int64_t store_super_write(struct mp_store *store)
{
	struct mp_store_super *super = store_allocate_aligned(sizeof *super);
	int64_t result = 0;

	store->super.generation++;
	store_super_seal(&store->super);
	*super = store->super;
	for (int i = 0; i < 2 && result >= 0; i++) {
		store->super_copy = 1 - store->super_copy;
		result = mp_driver_write(store->driver, 0, store->super_copy * sizeof *super, super,
					 sizeof *super);
		if (result >= 0)
			result = mp_driver_sync(store->driver, 0);
	}
	free(super);
	return result;
}
