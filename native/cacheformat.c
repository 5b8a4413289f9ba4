/* cacheformat.c - the cache device's layout and superblocks: make, check, load, write.
 *
 * Layout: superblock copies at byte 0 and 65536 | 1 MiB | checkpoint area 0 | checkpoint area 1 |
 * log segments | slots.
 * Happy path of format: clear both superblocks, sync -> write the log once (unwritten extents of a
 * file would add a journal commit to every sync), sync -> superblock, sync. A crash before the last
 * step leaves a device without superblock.
 * Failure modes: too small; a failed write: one line, and the device is not a cache.
 */
#include <inttypes.h>
#include <stdio.h>

#include "engine_internal.h"

enum { FIRST_AREA_BYTES = 1024 * 1024, SEGMENTS_MIN = 6, SEGMENTS_USUAL = 64 };

void super_seal(struct mp_cache_super *super)
{
	super->magic = MP_CACHE_SUPER_MAGIC;
	super->version = MP_FORMAT_VERSION;
	super->checksum = mp_xxh3(&super->version,
				  sizeof *super - offsetof(struct mp_cache_super, version));
}

static bool is_zero(const uint8_t *bytes, size_t length)
{
	while (length && *bytes == 0) {
		bytes++;
		length--;
	}
	return length == 0;
}

static bool inside(uint64_t offset, uint64_t count, uint64_t each, uint64_t end)
{
	return offset % MP_BLOCK_BYTES == 0 && each && offset <= end &&
	       count <= (end - offset) / each;
}

/* Recovery and scans read a segment in whole steps. */
static bool segment_is_possible(uint64_t bytes)
{
	return bytes >= SEGMENT_BYTES_MIN && bytes <= MP_CACHE_SEGMENT_BYTES &&
	       bytes % SCAN_STEP_BYTES == 0;
}

int super_check(const struct mp_cache_super *super, uint64_t device_bytes, char *message,
		uint64_t message_bytes)
{
	uint64_t end = super->device_bytes;

	if (super->version != MP_FORMAT_VERSION || super->incompatible_features) {
		snprintf(message, message_bytes,
			 "the cache device has format version %" PRIu32 " (features %#" PRIx32
			 "), this millpond reads version %d (features 0): upgrade millpond",
			 super->version, super->incompatible_features, MP_FORMAT_VERSION);
		return -ENOTSUP;
	}
	if (end > device_bytes) {
		snprintf(message, message_bytes,
			 "the cache device is shorter (%" PRIu64 " bytes) than it was formatted "
			 "for "
			 "(%" PRIu64 " bytes)", device_bytes, end);
		return -EPROTO;
	}
	if (super->reserved0 || !is_zero(super->reserved, sizeof super->reserved) ||
	    super->shard_index >= super->shard_count || super->checkpoint_area > 1 ||
	    !segment_is_possible(super->log_segment_bytes) ||
	    super->log_segment_count < SEGMENTS_MIN || super->log_segment_count > UINT32_MAX - 1 ||
	    super->slot_bytes < MP_BLOCK_BYTES || (super->slot_bytes & (super->slot_bytes - 1)) ||
	    super->slot_bytes > MP_SLOT_BLOCKS_MAX * MP_BLOCK_BYTES || super->slot_count == 0 ||
	    super->slot_count > INT32_MAX || end / MP_BLOCK_BYTES > UINT32_MAX ||
	    !inside(super->log_offset_bytes, super->log_segment_count, super->log_segment_bytes,
		    end) ||
	    !inside(super->slots_offset_bytes, super->slot_count, super->slot_bytes, end) ||
	    !inside(super->checkpoint_offset_bytes[0], 1, super->checkpoint_capacity_bytes, end) ||
	    !inside(super->checkpoint_offset_bytes[1], 1, super->checkpoint_capacity_bytes, end)) {
		snprintf(message, message_bytes,
			 "the superblock of the cache device makes no sense");
		return -EPROTO;
	}
	return 0;
}

int super_load(struct mp_driver *driver, struct mp_cache_super *out, uint32_t *copy, char *message,
	       uint64_t message_bytes)
{
	struct mp_cache_super *block = aligned_alloc(MP_BLOCK_BYTES, sizeof *block);
	bool found = false;
	uint32_t i;

	if (!block)
		return -ENOMEM;
	for (i = 0; i < 2; i++) {
		int64_t rc = mp_driver_read(driver, 0, i * (uint64_t)SUPER_COPY_BYTES, block,
					    sizeof *block);

		if (rc < 0) { /* it may be the newer one, and the log goes by that */
			snprintf(message, message_bytes, "a superblock cannot be read: %s",
				 strerror((int)-rc));
			free(block);
			return (int)rc;
		}
		if (block->magic != MP_CACHE_SUPER_MAGIC ||
		    block->checksum !=
			    mp_xxh3(&block->version, sizeof *block - offsetof(struct mp_cache_super,
									      version)))
			continue;
		if (!found || block->generation > out->generation) {
			*out = *block;
			*copy = i;
		}
		found = true;
	}
	free(block);
	if (found)
		return 0;
	snprintf(message, message_bytes,
		 "no cache superblock that verifies: not a cache device, or damaged "
		 "(millpond cache format makes a new one)");
	return -EPROTO;
}

int super_write(struct mp_driver *driver, struct mp_cache_super *super, uint32_t *copy)
{
	struct mp_cache_super *block = aligned_alloc(MP_BLOCK_BYTES, sizeof *block);
	int64_t rc;

	if (!block)
		return -ENOMEM;
	super->generation++;
	super_seal(super);
	*block = *super;
	*copy ^= 1; /* never over the newest */
	rc = mp_driver_write(driver, 0, *copy * (uint64_t)SUPER_COPY_BYTES, block, sizeof *block);
	if (rc >= 0)
		rc = mp_driver_sync(driver, 0);
	if (rc >= 0) /* the same over the old copy: one damaged copy loses nothing */
		rc = mp_driver_write(driver, 0, (*copy ^ 1) * (uint64_t)SUPER_COPY_BYTES, block,
				     sizeof *block);
	free(block);
	return rc < 0 ? (int)rc : 0;
}

static uint64_t round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) / unit * unit;
}

/* Room for the largest checkpoint: every index entry, tombstone, segment, volume and slot at
 * once. */
static uint64_t checkpoint_bytes(uint64_t segments, uint64_t log_bytes, uint64_t slots,
				 uint64_t slot_bytes)
{
	uint64_t blocks = log_bytes / MP_BLOCK_BYTES, index = 1024;
	uint64_t slot_entry = sizeof(struct mp_slot_entry) + slot_bytes / MP_BLOCK_BYTES * 4;

	while (index * 3 / 4 < blocks)
		index *= 2;
	return round_up(2 * MP_BLOCK_BYTES + VOLUMES_MAX * sizeof(struct mp_cache_volume) +
				segments * sizeof(struct mp_segment_entry) +
				TOMBSTONES_MAX * sizeof(struct mp_tombstone) +
				index * sizeof(struct mp_index_entry) + slots * slot_entry,
			1024 * 1024);
}

/* Volumes share the log by segments: a small one has smaller ones, or they could not take turns. */
static uint64_t usual_segment_bytes(uint64_t log_bytes)
{
	uint64_t bytes = MP_CACHE_SEGMENT_BYTES;

	while (log_bytes / bytes < SEGMENTS_USUAL && segment_is_possible(bytes / 2))
		bytes /= 2;
	return bytes;
}

static int plan(struct mp_cache_super *super, const struct mp_cache_format_options *options)
{
	uint64_t segment = options->segment_bytes ? options->segment_bytes
						  : usual_segment_bytes(options->log_bytes);
	uint64_t segments = options->log_bytes / segment, log = segments * segment;
	uint64_t device = options->device_bytes / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	uint64_t left, slots, area;

	if (!segment_is_possible(segment) || segments < SEGMENTS_MIN ||
	    segments > UINT32_MAX / 2048 || device < FIRST_AREA_BYTES + log)
		return -EINVAL;
	left = device - FIRST_AREA_BYTES - log;
	slots = left / options->slot_bytes;
	area = checkpoint_bytes(segments, log, slots, options->slot_bytes);
	if (left < 2 * area + options->slot_bytes * 16)
		return -EINVAL;
	memset(super, 0, sizeof *super);
	memcpy(super->cache_id, options->cache_id, sizeof super->cache_id);
	super->shard_count = 1;
	super->device_bytes = device;
	super->checkpoint_offset_bytes[0] = FIRST_AREA_BYTES;
	super->checkpoint_offset_bytes[1] = FIRST_AREA_BYTES + area;
	super->checkpoint_capacity_bytes = area;
	super->log_offset_bytes = FIRST_AREA_BYTES + 2 * area;
	super->log_segment_bytes = segment;
	super->log_segment_count = segments;
	super->slots_offset_bytes = super->log_offset_bytes + log;
	super->slot_bytes = options->slot_bytes;
	super->slot_count = (device - super->slots_offset_bytes) / options->slot_bytes;
	return 0;
}

static int write_zeroes(struct mp_driver *driver, uint64_t begin, uint64_t end, uint64_t *progress)
{
	uint64_t step = 1024 * 1024;
	uint8_t *zeroes = aligned_alloc(MP_BLOCK_BYTES, step);
	int64_t rc = zeroes ? 0 : -ENOMEM;

	if (zeroes)
		memset(zeroes, 0, step);
	for (; rc >= 0 && begin < end; begin += step) {
		step = end - begin < step ? end - begin : step;
		rc = mp_driver_write(driver, 0, begin, zeroes, step);
		if (progress)
			*progress += step;
	}
	free(zeroes);
	return rc < 0 ? (int)rc : 0;
}

int mp_cache_format(struct mp_driver *driver, const struct mp_cache_format_options *options,
		    uint64_t *progress, char *message, uint64_t message_bytes)
{
	uint64_t ignored = 0, slot = options->slot_bytes;
	struct mp_cache_super super;
	uint32_t copy = 0;
	int64_t rc;

	if (slot < MP_BLOCK_BYTES || slot > MP_SLOT_BLOCKS_MAX * MP_BLOCK_BYTES ||
	    (slot & (slot - 1)) || plan(&super, options)) {
		snprintf(message, message_bytes,
			 "%" PRIu64 " bytes with a log of %" PRIu64 " bytes are too small for a "
			 "cache: "
			 "the log needs %d segments of at least %d bytes, and slots the rest",
			 options->device_bytes, options->log_bytes, SEGMENTS_MIN,
			 SEGMENT_BYTES_MIN);
		return -EINVAL;
	}
	rc = write_zeroes(driver, 0, FIRST_AREA_BYTES, &ignored);
	rc = rc < 0 ? rc : mp_driver_sync(driver, 0);
	rc = rc < 0 ? rc
		    : write_zeroes(driver, super.log_offset_bytes, super.slots_offset_bytes,
				   progress);
	rc = rc < 0 ? rc : mp_driver_sync(driver, 0);
	rc = rc < 0 ? rc : super_write(driver, &super, &copy);
	rc = rc < 0 ? rc : mp_driver_sync(driver, 0);
	if (rc < 0)
		snprintf(message, message_bytes, "formatting the cache device failed: %s",
			 strerror((int)-rc));
	return rc < 0 ? (int)rc : 0;
}
