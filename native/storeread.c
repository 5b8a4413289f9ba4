/* storeread.c - READ frames: map, extent table, device, verify, reply with stored bytes.
 *
 * Happy path: all addresses of the range are looked up in one turn, so that no batch is seen in
 * part; their segments are pinned against punching and removal. Then the extent entries, then the
 * device, near ranges in one I/O, then every stored byte is verified before it leaves.
 * Failure modes: a page or extent that does not verify answers MP_STATUS_CORRUPT, a device error
 * MP_STATUS_IO; never data. Reads do not wait for batches; at most STORE_READS_IN_FLIGHT at a
 * time.
 */
#include "store_internal.h"

struct piece {
	struct mp_piece wire;
	struct store_segment *segment;     /* pinned; NULL: a hole */
	uint64_t address;                  /* of the first wanted block */
	uint64_t offset_bytes;             /* of the shipped bytes in the file */
	uint32_t run;
	uint32_t skip_blocks;
};

struct run {
	struct store_io io;
	uint64_t file, from, to;
	uint8_t *buffer;
};

struct store_read {
	struct store_read *next, *previous;
	struct store_request *request;
	struct mp_read_request wanted;
	struct store_wait wait;
	struct mp_store *store;
	struct mp_read_reply reply;
	struct piece *pieces;
	struct run *runs;
	uint32_t piece_count, resolved, run_count, runs_left;
	uint32_t status;
};

static void finish(struct mp_store *store, struct store_read *read);

static uint32_t admit(struct mp_store *store, struct store_read *read)
{
	const struct mp_read_request *wanted = &read->wanted;

	memcpy(read->reply.volume, wanted->volume, sizeof read->reply.volume);
	read->reply.first_block = wanted->first_block;
	read->reply.block_count = wanted->block_count;
	if (wanted->block_count > MP_READ_BLOCKS_MAX || wanted->reserved)
		return MP_STATUS_INVALID;
	return store_query_admit(store,
				 &(struct store_query){wanted->volume, wanted->epoch,
						       wanted->minimum_sequence,
						       wanted->first_block, wanted->block_count},
				 &read->reply.lineage, &read->reply.sequence);
}

/* One more block at the end of the pieces: part of the last one, or a new one. */
static int add_block(struct mp_store *store, struct store_read *read, uint64_t block,
		     uint64_t address)
{
	struct piece *last = read->piece_count ? &read->pieces[read->piece_count - 1] : NULL;
	uint64_t within = MP_EXTENT_BLOCKS - 1;

	if (last && ((!address && !last->address) ||
		     (address && last->address &&
		      address / MP_EXTENT_BLOCKS == last->address / MP_EXTENT_BLOCKS &&
		      address == last->address + last->wire.block_count))) {
		last->wire.block_count++;
		return 0;
	}
	last = &read->pieces[read->piece_count++];
	memset(last, 0, sizeof *last);
	last->wire.first_block = block;
	last->wire.block_count = 1;
	last->address = address;
	last->skip_blocks = (uint32_t)(address & within);
	if (address) {
		last->segment = store_segment_find(
			store, address >> (MP_ADDRESS_EXTENT_BITS + MP_ADDRESS_BLOCK_BITS));
		/* The page's checksum is right, and yet the address may be forged. */
		if (!last->segment)
			return -EBADMSG;
		last->segment->readers++;
	}
	return 0;
}

/* All addresses, in one turn. */
static int look_up(struct mp_store *store, struct store_read *read)
{
	struct store_volume *volume = store_volume_find(store, read->wanted.volume);
	uint8_t *leaves[2];
	uint64_t first = read->wanted.first_block, mask = (1 << MP_MAP_LEAF_BITS) - 1;
	uint64_t last = first + read->wanted.block_count - 1;
	int error = store_tree_leaf(store, &volume->map, first, STORE_LOOK, &leaves[0]);

	leaves[1] = leaves[0];
	if (!error && last >> MP_MAP_LEAF_BITS != first >> MP_MAP_LEAF_BITS)
		error = store_tree_leaf(store, &volume->map, last, STORE_LOOK, &leaves[1]);
	if (error)
		return error;
	for (uint64_t block = first; block <= last && !error; block++) {
		int second = block >> MP_MAP_LEAF_BITS != first >> MP_MAP_LEAF_BITS;
		const uint8_t *leaf = leaves[second];

		error = add_block(store, read, block,
				  leaf ? ((const uint64_t *)(const void *)leaf)[block & mask] : 0);
	}
	return error;
}

int store_extent_describe(const struct mp_store *store, const struct mp_extent_entry *entry,
			  struct mp_extent *extent)
{
	uint64_t origin = entry->segment_origin & ((1 << MP_ORIGIN_BITS) - 1);

	if (origin >= store->origin_count)
		return -EBADMSG;
	memset(extent, 0, sizeof *extent);
	memcpy(extent->origin, store->origins[origin], sizeof extent->origin);
	extent->first_block = entry->first_block;
	extent->block_count = entry->codec_blocks & 15;
	extent->codec = entry->codec_blocks >> 4;
	extent->stored_length_bytes = entry->stored_length_bytes;
	memcpy(extent->checksum, entry->checksum, sizeof extent->checksum);
	return 0;
}

static int describe(struct mp_store *store, struct piece *piece)
{
	struct mp_extent *extent = &piece->wire.extent;
	struct mp_extent_entry *entry;
	int error;

	if (!piece->address) {
		extent->codec = MP_CODEC_ZERO;
		extent->first_block = piece->wire.first_block;
		extent->block_count = piece->wire.block_count;
		return 0;
	}
	error = store_extent_get(store, piece->address, STORE_LOOK, &entry);
	if (error)
		return error;
	if (entry->first_block + piece->skip_blocks != piece->wire.first_block ||
	    store_extent_describe(store, entry, extent))
		return -EBADMSG;
	piece->offset_bytes = entry->offset_bytes;
	piece->wire.shipped_bytes = entry->stored_length_bytes;
	if (extent->codec == MP_CODEC_NONE) {
		piece->offset_bytes += (uint64_t)piece->skip_blocks * MP_BLOCK_BYTES;
		piece->wire.shipped_bytes = piece->wire.block_count * MP_BLOCK_BYTES;
	}
	return 0;
}

static void read_done(struct store_io *io)
{
	struct store_read *read = io->owner;

	if (io->io.result < 0 && read->status == MP_STATUS_OK) {
		read->status = MP_STATUS_IO;
		io->store->counters.io_errors++;
	}
	if (--read->runs_left == 0)
		finish(io->store, read);
}

/* Which I/O brings which piece: neighbours on the device come together. */
static void plan(struct store_read *read)
{
	struct run *run = NULL;

	read->runs = store_allocate((read->piece_count + 1) * sizeof *read->runs);
	for (uint32_t i = 0; i < read->piece_count; i++) {
		struct piece *piece = &read->pieces[i];
		uint64_t from = piece->offset_bytes / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
		uint64_t to = store_align(piece->offset_bytes + piece->wire.shipped_bytes,
					  MP_BLOCK_BYTES);

		if (!piece->wire.shipped_bytes)
			continue;
		if (!run || run->file != piece->segment->id || from < run->from ||
		    from > run->to + STORE_MERGE_GAP_BYTES) {
			run = &read->runs[read->run_count++];
			run->file = piece->segment->id;
			run->from = from;
			run->to = to;
		}
		if (to > run->to)
			run->to = to;
		piece->run = read->run_count - 1;
	}
}

static void start_runs(struct mp_store *store, struct store_read *read)
{
	plan(read);
	read->runs_left = read->run_count;
	if (!read->run_count) {
		finish(store, read);
		return;
	}
	for (uint32_t i = 0, count = read->run_count; i < count; i++) {
		struct run *run = &read->runs[i];

		run->buffer = store_allocate_aligned(run->to - run->from);
		run->io.owner = read;
		run->io.done = read_done;
		store_submit(store, &run->io, MP_OP_READ, run->file, run->from, run->buffer,
			     run->to - run->from);
	}
}

/* As far as pages allow; goes on when the missing one is there. */
static void advance(struct mp_store *store, struct store_wait *wait)
{
	struct store_read *read =
		(struct store_read *)(void *)((uint8_t *)wait - offsetof(struct store_read, wait));
	int error = 0;

	if (!read->piece_count) {
		/* The volume may have gone, or moved on, while a page was read. */
		read->status = admit(store, read);
		if (read->status == MP_STATUS_OK)
			error = look_up(store, read);
	}
	while (!error && read->status == MP_STATUS_OK && read->resolved < read->piece_count) {
		error = describe(store, &read->pieces[read->resolved]);
		read->resolved += !error;
	}
	if (error == -EAGAIN) {
		store_page_wait(store, &read->wait);
		return;
	}
	if (error)
		read->status = error == -EBADMSG ? MP_STATUS_CORRUPT : MP_STATUS_IO;
	if (read->status != MP_STATUS_OK)
		finish(store, read);
	else
		start_runs(store, read);
}

static const uint8_t *bytes_of(const struct store_read *read, const struct piece *piece)
{
	const struct run *run = &read->runs[piece->run];

	return run->buffer + (piece->offset_bytes - run->from);
}

static void verify(struct mp_store *store, struct store_read *read)
{
	if (store_fault(store, MP_STORE_FAULT_SKIP_CHECKSUM))
		return;
	for (uint32_t i = 0; i < read->piece_count; i++) {
		struct piece *piece = &read->pieces[i];
		int raw;

		if (!piece->wire.shipped_bytes)
			continue;
		raw = piece->wire.extent.codec == MP_CODEC_NONE;
		if (mp_extent_verify(&piece->wire.extent, raw ? piece->skip_blocks : 0,
				     raw ? piece->wire.block_count
					 : (uint32_t)piece->wire.extent.block_count,
				     bytes_of(read, piece), piece->wire.shipped_bytes)) {
			read->status = MP_STATUS_CORRUPT;
			store->counters.checksum_errors++;
		}
	}
}

static void reply(struct mp_store *store, struct store_read *read)
{
	uint64_t payload_bytes = sizeof read->reply, checked_bytes;
	struct store_chunk *chunk;
	uint8_t *at;

	if (read->status != MP_STATUS_OK)
		read->piece_count = 0;
	read->reply.piece_count = read->piece_count;
	payload_bytes += read->piece_count * sizeof(struct mp_piece);
	checked_bytes = payload_bytes;
	for (uint32_t i = 0; i < read->piece_count; i++)
		payload_bytes += read->pieces[i].wire.shipped_bytes;
	chunk = store_reply_start(read->request, payload_bytes, checked_bytes, read->status, &at);
	memcpy(at, &read->reply, sizeof read->reply);
	at += sizeof read->reply;
	for (uint32_t i = 0; i < read->piece_count; i++, at += sizeof(struct mp_piece))
		memcpy(at, &read->pieces[i].wire, sizeof(struct mp_piece));
	for (uint32_t i = 0; i < read->piece_count; i++) {
		const struct piece *piece = &read->pieces[i];

		if (piece->wire.shipped_bytes)
			memcpy(at, bytes_of(read, piece), piece->wire.shipped_bytes);
		at += piece->wire.shipped_bytes;
		store->counters.read_bytes += piece->wire.shipped_bytes;
	}
	store_reply_finish(store, read->request, chunk);
}

static void release(struct mp_store *store, struct store_read *read)
{
	if (read->previous)
		read->previous->next = read->next;
	else
		store->reads = read->next;
	if (read->next)
		read->next->previous = read->previous;
	for (uint32_t i = 0; read->runs && i < read->run_count; i++)
		free(read->runs[i].buffer);
	free(read->runs);
	free(read->pieces);
	free(read);
}

static void finish(struct mp_store *store, struct store_read *read)
{
	for (uint32_t i = 0; i < read->piece_count; i++)
		if (read->pieces[i].segment)
			read->pieces[i].segment->readers--;
	if (read->status == MP_STATUS_OK && read->run_count)
		verify(store, read);
	store->reads_in_flight--;
	reply(store, read);
	release(store, read);
}

static void begin(struct mp_store *store, struct store_request *request)
{
	struct store_read *read = store_allocate(sizeof *read);

	read->store = store;
	read->request = request;
	read->next = store->reads;
	if (store->reads)
		store->reads->previous = read;
	store->reads = read;
	store->reads_in_flight++;
	store->counters.reads++;
	if (request->frame.payload_bytes == sizeof read->wanted)
		memcpy(&read->wanted, request->buffer + MP_GROUP_HEADER_BYTES, sizeof read->wanted);
	if (read->wanted.block_count <= MP_READ_BLOCKS_MAX)
		read->pieces =
			store_allocate((read->wanted.block_count + 1) * sizeof *read->pieces);
	read->wait.ready = advance;
	advance(store, &read->wait);
}

void store_read_start(struct mp_store *store, struct store_request *request)
{
	store_queue_push(&store->reads_waiting, request);
	store_reads_advance(store);
}

void store_reads_advance(struct mp_store *store)
{
	while (store->reads_waiting.head && store->reads_in_flight < STORE_READS_IN_FLIGHT)
		begin(store, store_queue_pop(&store->reads_waiting));
}

void store_reads_free(struct mp_store *store)
{
	struct store_request *request;

	while (store->reads) {
		store_request_free(store, store->reads->request);
		release(store, store->reads);
	}
	while ((request = store_queue_pop(&store->reads_waiting)))
		store_request_free(store, request);
}
