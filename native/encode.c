/* encode.c - turn a stretch of log records in memory into one BATCH frame. Runs on the helper
 * thread.
 *
 * Coalescing: each block travels once, as its newest mutation left it. Long trims and zeroes come
 * first, in order of sequence; then blocks (data, and short trims and zeroes), sorted, each newer
 * than any long range over it. A store that applies extents in order gets the state at the batch's
 * last sequence.
 * Failure modes: -EBADMSG a record or block does not verify: nothing is shipped; -ENOMEM.
 */
#include "encode.h"

struct item {
	uint64_t block, sequence;
	const uint8_t *data;      /* NULL: zero or trim */
	uint8_t codec;
};
struct range { uint64_t first_block, block_count, sequence; uint8_t codec; };
struct plan {
	struct item *items;
	struct range *ranges;
	uint64_t item_count, item_capacity, range_count, range_capacity;
};

static int grow(void **memory, uint64_t *capacity, uint64_t count, size_t item_bytes)
{
	uint64_t more = *capacity ? *capacity * 2 : 1024;
	void *larger;

	if (count < *capacity)
		return 0;
	larger = realloc(*memory, more * item_bytes);
	if (!larger)
		return -ENOMEM;
	*memory = larger;
	*capacity = more;
	return 0;
}

static int add_item(struct plan *plan, uint64_t block, const struct mp_extent *extent,
		    const uint8_t *data)
{
	if (grow((void **)&plan->items, &plan->item_capacity, plan->item_count,
		 sizeof *plan->items))
		return -ENOMEM;
	plan->items[plan->item_count++] = (struct item){
		.block = block, .sequence = extent->sequence, .data = data, .codec = extent->codec};
	return 0;
}

static int add_extent(struct plan *plan, const struct mp_extent *extent, const uint8_t *data)
{
	uint64_t i;

	if (!data && extent->block_count >= RANGE_BLOCKS_MIN) {
		if (grow((void **)&plan->ranges, &plan->range_capacity, plan->range_count,
			 sizeof *plan->ranges))
			return -ENOMEM;
		plan->ranges[plan->range_count++] =
			(struct range){.first_block = extent->first_block,
				       .block_count = extent->block_count,
				       .sequence = extent->sequence,
				       .codec = extent->codec};
		return 0;
	}
	for (i = 0; i < extent->block_count; i++)
		if (add_item(plan, extent->first_block + i, extent,
			     data ? data + i * MP_BLOCK_BYTES : NULL))
			return -ENOMEM;
	return 0;
}

static int collect(const struct cut *cut, struct plan *plan)
{
	uint64_t at = cut->begin_offset_bytes;

	while (at < cut->end_offset_bytes) {
		const uint8_t *bytes = cut->scan.memory + at;
		const struct mp_record *record = (const struct mp_record *)(const void *)bytes;
		uint64_t length = record->header_length_bytes + record->payload_length_bytes;
		const struct mp_extent *table =
			(const struct mp_extent *)(const void *)(bytes + MP_RECORD_HEADER_BYTES);
		const uint8_t *data = bytes + record->header_length_bytes;
		bool skip = (cut->faults & MP_FAULT_CUT_WITHOUT_LAST) &&
			    record->last_sequence == cut->last_sequence;
		uint32_t i;

		if (!(cut->faults & MP_FAULT_SKIP_DATA_CHECKSUM) &&
		    mp_record_check_payload(bytes, length))
			return -EBADMSG;
		for (i = 0; i < record->extent_count && !skip; i++) {
			bool has_data = table[i].codec == MP_CODEC_NONE;
			if (add_extent(plan, &table[i], has_data ? data : NULL))
				return -ENOMEM;
			data += table[i].stored_length_bytes;
		}
		at += length;
	}
	return 0;
}

static int by_block_newest_first(const void *left, const void *right)
{
	const struct item *a = left, *b = right;

	if (a->block != b->block)
		return a->block < b->block ? -1 : 1;
	return a->sequence > b->sequence ? -1 : a->sequence < b->sequence;
}

static bool hidden(const struct plan *plan, const struct item *item)
{
	uint64_t i;

	for (i = 0; i < plan->range_count; i++)
		if (plan->ranges[i].sequence > item->sequence &&
		    item->block >= plan->ranges[i].first_block &&
		    item->block - plan->ranges[i].first_block < plan->ranges[i].block_count)
			return true;
	return false;
}

static void coalesce(struct plan *plan)
{
	uint64_t i, kept = 0;

	if (plan->item_count)
		qsort(plan->items, plan->item_count, sizeof *plan->items, by_block_newest_first);
	for (i = 0; i < plan->item_count; i++)
		if ((kept == 0 || plan->items[kept - 1].block != plan->items[i].block))
			plan->items[kept++] = plan->items[i];
	plan->item_count = kept;
	for (i = kept = 0; plan->range_count && i < plan->item_count; i++)
		if (!hidden(plan, &plan->items[i]))
			plan->items[kept++] = plan->items[i];
	if (plan->range_count)
		plan->item_count = kept;
}

/* ---- output: parts of a batch, each a record ---- */

struct output {
	const struct cut *cut;
	uint8_t *bytes;
	uint64_t length, capacity;
	/* of the part being filled; its table and payload are kept apart */
	uint64_t record_at;
	struct mp_extent *table;
	uint32_t extents, parts;
	uint8_t *payload;
	uint64_t payload_bytes;
};
/* A part is closed early enough that one more extent always fits. */
enum { PART_EXTENTS = 2048, PART_BYTES = 1024 * 1024 };

static int close_part(struct output *output, bool last)
{
	struct mp_record record;
	uint64_t table_bytes = (uint64_t)output->extents * MP_EXTENT_BYTES;
	uint64_t total = sizeof record + table_bytes + output->payload_bytes;
	uint64_t padded = (total + 7) / 8 * 8;

	if (output->length + padded > output->capacity) {
		uint64_t capacity = (output->length + padded) * 2;
		uint8_t *larger = realloc(output->bytes, capacity);
		if (!larger)
			return -ENOMEM;
		output->bytes = larger;
		output->capacity = capacity;
	}
	memset(&record, 0, sizeof record);
	record.type = MP_RECORD_BATCH;
	record.flags = last ? MP_RECORD_LAST_OF_BATCH : 0;
	memcpy(record.volume, output->cut->volume_id, sizeof record.volume);
	record.lineage = output->cut->lineage;
	record.first_sequence = output->cut->first_sequence;
	record.last_sequence = output->cut->last_sequence;
	record.epoch = output->cut->epoch;
	record.part_index = output->parts++;
	record.extent_count = output->extents;
	record.header_length_bytes = sizeof record + table_bytes;
	record.payload_length_bytes = output->payload_bytes;
	memcpy(output->bytes + output->length, &record, sizeof record);
	memcpy(output->bytes + output->length + sizeof record, output->table, table_bytes);
	memcpy(output->bytes + output->length + sizeof record + table_bytes, output->payload,
	       output->payload_bytes);
	memset(output->bytes + output->length + total, 0, padded - total);
	mp_record_seal((struct mp_record *)(void *)(output->bytes + output->length));
	output->length += padded;
	output->extents = 0;
	output->payload_bytes = 0;
	return 0;
}

static int make_room(struct output *output)
{
	if (output->extents < PART_EXTENTS &&
	    output->payload_bytes + MP_EXTENT_BLOCKS * MP_BLOCK_BYTES <= PART_BYTES)
		return 0;
	return close_part(output, false);
}

static int put_range(struct output *output, uint64_t first, uint64_t count, uint64_t sequence,
		     uint8_t codec)
{
	struct mp_extent *extent;

	if (make_room(output))
		return -ENOMEM;
	extent = &output->table[output->extents++];
	memset(extent, 0, sizeof *extent);
	memcpy(extent->origin, output->cut->volume_id, sizeof extent->origin);
	extent->first_block = first;
	extent->block_count = count;
	extent->sequence = sequence;
	extent->codec = codec;
	return 0;
}

static bool groups(const struct item *first, const struct item *next, uint32_t run)
{
	return next->block == first->block + run && (next->data != NULL) == (first->data != NULL) &&
	       (first->data ? next->block / MP_EXTENT_BLOCKS == first->block / MP_EXTENT_BLOCKS
			    : next->codec == first->codec);
}

static int put_items(struct output *output, const struct item *items, uint32_t run)
{
	uint8_t raw[MP_EXTENT_BLOCKS * MP_BLOCK_BYTES];
	struct mp_extent *extent;
	uint64_t sequence = 0;
	int64_t stored;
	uint32_t i;

	for (i = 0; i < run; i++)
		sequence = items[i].sequence > sequence ? items[i].sequence : sequence;
	if (!items[0].data)
		return put_range(output, items[0].block, run, sequence, items[0].codec);
	if (make_room(output))
		return -ENOMEM;
	for (i = 0; i < run; i++)
		memcpy(raw + (uint64_t)i * MP_BLOCK_BYTES, items[i].data, MP_BLOCK_BYTES);
	extent = &output->table[output->extents];
	stored = mp_extent_encode(extent, output->cut->volume_id, items[0].block, run, raw,
				  output->payload + output->payload_bytes);
	if (stored < 0)
		return (int)stored;
	extent->sequence = sequence;
	output->extents++;
	output->payload_bytes += (uint64_t)stored;
	return 0;
}

static int write_plan(struct output *output, const struct plan *plan)
{
	uint64_t i;
	uint32_t run;
	int rc = 0;

	for (i = 0; i < plan->range_count && !rc; i++)
		rc = put_range(output, plan->ranges[i].first_block, plan->ranges[i].block_count,
			       plan->ranges[i].sequence, plan->ranges[i].codec);
	for (i = 0; i < plan->item_count && !rc; i += run) {
		const struct item *first = &plan->items[i];
		uint32_t limit = first->data ? MP_EXTENT_BLOCKS : RANGE_BLOCKS_MIN * 1024;

		for (run = 1; run < limit && i + run < plan->item_count &&
			      groups(first, first + run, run);
		     run++)
			;
		rc = put_items(output, first, run);
	}
	return rc ? rc : close_part(output, true);
}

static int64_t write_frame(struct output *output, const struct plan *plan)
{
	struct mp_frame frame;
	int rc;

	output->capacity = sizeof frame + PART_BYTES;
	output->bytes = malloc(output->capacity);
	output->table = malloc((uint64_t)PART_EXTENTS * MP_EXTENT_BYTES);
	output->payload = malloc(PART_BYTES);
	output->length = sizeof frame;
	rc = output->bytes && output->table && output->payload ? write_plan(output, plan) : -ENOMEM;
	free(output->table);
	free(output->payload);
	if (rc) {
		free(output->bytes);
		return rc;
	}
	memset(&frame, 0, sizeof frame);
	frame.type = MP_FRAME_BATCH;
	frame.payload_bytes = (uint32_t)(output->length - sizeof frame);
	frame.request_id = output->cut->last_sequence;
	memcpy(output->bytes, &frame, sizeof frame);
	mp_frame_seal((struct mp_frame *)(void *)output->bytes);
	return (int64_t)output->length;
}

int64_t batch_encode_log(const struct cut *cut, uint8_t **frame)
{
	struct plan plan = {0};
	struct output output = {.cut = cut};
	int64_t length = collect(cut, &plan);

	if (length == 0) {
		coalesce(&plan);
		length = write_frame(&output, &plan);
	}
	free(plan.items);
	free(plan.ranges);
	*frame = length < 0 ? NULL : output.bytes;
	return length;
}
