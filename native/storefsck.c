/* storefsck.c - check a store that nobody serves: the order of the work, findings, reading.
 *
 * Happy path: the store is opened as always but for what an open changes; every record of its log
 * is verified and replayed into maps of our own; then maps, extent tables, counts and catalogue of
 * the store are held against that. Each difference is a finding.
 * Failure modes: damage is what this is for: whatever cannot be read is reported and passed over,
 * and what hangs on it is not compared. Without a superblock and a checkpoint only records are
 * verified. Nothing is ever written: no function here submits anything but READ.
 */
#include "storefsck_internal.h"

#include <stdarg.h>
#include <stdio.h>

_Static_assert(FSCK_WINDOW_BYTES >= MP_RECORD_HEADER_BYTES +
	       MP_RECORD_EXTENTS_MAX * MP_EXTENT_BYTES + 2 * MP_BLOCK_BYTES, "a whole table");

static int same_run(const struct mp_fsck_finding *last, const struct mp_fsck_finding *next)
{
	return next->block_count && last->kind == next->kind && last->segment == next->segment &&
	       !memcmp(last->volume, next->volume, sizeof last->volume) &&
	       last->first_block + last->block_count == next->first_block &&
	       !strcmp(last->text, next->text);
}

void fsck_report(struct mp_fsck *fsck, uint32_t kind, struct fsck_where where, const char *format,
		 ...)
{
	struct fsck_note *note = store_allocate(sizeof *note);
	struct mp_fsck_finding *finding = &note->finding;
	va_list arguments;

	finding->kind = kind;
	finding->first_block = where.first_block;
	finding->block_count = where.block_count;
	finding->segment = where.segment;
	finding->offset_bytes = where.offset_bytes;
	if (where.volume)
		memcpy(finding->volume, where.volume, sizeof finding->volume);
	va_start(arguments, format);
	vsnprintf(finding->text, sizeof finding->text, format, arguments);
	va_end(arguments);
	if (fsck->notes_last && same_run(&fsck->notes_last->finding, finding)) {
		fsck->notes_last->finding.block_count += finding->block_count;
		free(note);
		return;
	}
	fsck->summary.findings++;
	if (fsck->notes_last)
		fsck->notes_last->next = note;
	else
		fsck->notes = note;
	fsck->notes_last = note;
}

uint64_t fsck_file_bytes(const struct mp_fsck *fsck, uint64_t file, int *missing)
{
	int64_t length = fsck->driver->file_length_bytes(fsck->driver->self, file);

	*missing = length < 0;
	return length < 0 ? 0 : (uint64_t)length;
}

uint64_t *fsck_files(const struct mp_fsck *fsck, uint64_t *count)
{
	uint64_t *files = NULL, capacity = 0;
	int64_t found;

	do {
		files = store_grow(files, &capacity, capacity + 1024, sizeof *files);
		found = fsck->driver->list_files(fsck->driver->self, files, capacity);
	} while (found >= (int64_t)capacity);
	*count = found < 0 ? 0 : (uint64_t)found;
	return files;
}

static int64_t fill(struct mp_fsck *fsck, struct fsck_window *window, uint64_t file, uint64_t from,
		    uint64_t to)
{
	int64_t result = mp_driver_read(fsck->driver, file, from, window->buffer, to - from);

	fsck->ended |= result == -ESHUTDOWN;
	window->file = file;
	window->from = from;
	window->to = result < 0 ? from : to;
	return result;
}

const uint8_t *fsck_window_get(struct mp_fsck *fsck, struct fsck_window *window, uint64_t file,
			       uint64_t offset_bytes, uint64_t length_bytes)
{
	uint64_t from = offset_bytes / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	uint64_t to = store_align(offset_bytes + length_bytes, MP_BLOCK_BYTES), end, ahead;
	int missing;

	assert(to - from <= FSCK_WINDOW_BYTES);
	if (window->file == file && window->from <= from && to <= window->to)
		return window->buffer + (offset_bytes - window->from);
	end = fsck_file_bytes(fsck, file, &missing) / MP_BLOCK_BYTES * MP_BLOCK_BYTES;
	window->error = missing ? -ENOENT : -EIO;
	if (to > end)
		return NULL;
	if (!window->buffer)
		window->buffer = store_allocate_aligned(FSCK_WINDOW_BYTES);
	ahead = from + FSCK_AHEAD_BYTES < end ? from + FSCK_AHEAD_BYTES : end;
	window->error = fill(fsck, window, file, from, ahead > to ? ahead : to);
	/* One bad sector must not hide what is beside it. */
	if (window->error < 0 && ahead > to)
		window->error = fill(fsck, window, file, from, to);
	return window->error < 0 ? NULL : window->buffer + (offset_bytes - from);
}

static void check_supers(struct mp_fsck *fsck)
{
	struct mp_store_super *supers = store_allocate_aligned(2 * sizeof *supers);
	int64_t result = mp_driver_read(fsck->driver, 0, 0, supers, 2 * sizeof *supers);

	for (uint32_t i = 0; result >= 0 && i < 2; i++)
		if (!store_super_valid(&supers[i]))
			fsck_report(fsck, MP_FSCK_SUPER,
				    (struct fsck_where){.offset_bytes = i * sizeof *supers},
				    "superblock copy %u does not verify", i);
	free(supers);
}

/* Files of what the tables name; those of the log are looked at when they are scanned. */
static void check_meta_files(struct mp_fsck *fsck)
{
	for (uint64_t i = 0; i < fsck->store->segment_count; i++) {
		const struct store_segment *segment = fsck->store->segments[i];
		struct fsck_where where = {.segment = segment->id};
		uint64_t bytes;
		int missing;

		if (segment->kind != MP_GROUP_META)
			continue;
		bytes = fsck_file_bytes(fsck, segment->id, &missing);
		where.offset_bytes = bytes;
		if (missing)
			fsck_report(fsck, MP_FSCK_FILE, where, "the file is missing: it has pages");
		else if (bytes < segment->length_bytes)
			fsck_report(fsck, MP_FSCK_FILE, where,
				    "the file ends at %llu, its pages at %llu",
				    (unsigned long long)bytes,
				    (unsigned long long)segment->length_bytes);
	}
}

static void open_store(struct mp_fsck *fsck)
{
	static const struct mp_store_options options;
	char message[MP_FSCK_TEXT_BYTES] = "";
	enum store_look look;
	struct mp_store *store = store_open_to_look(fsck->driver, &options, &look, message,
						    sizeof message);

	check_supers(fsck);
	if (message[0])
		fsck_report(fsck, MP_FSCK_OPEN, (struct fsck_where){0}, "%s", message);
	if (look == STORE_LOOK_NOTHING) {
		mp_store_free(store);
	} else {
		fsck->store = store;
		fsck->comparable = look == STORE_LOOK_WHOLE && !store->failure;
		fsck->refused = look == STORE_LOOK_WHOLE && message[0];
		if (store->failure)
			fsck_report(fsck, MP_FSCK_OPEN, (struct fsck_where){0}, "%s",
				    store->failure_message);
		fsck->page_bytes =
			store_allocate((store->segment_count + 1) * sizeof *fsck->page_bytes);
		check_meta_files(fsck);
	}
	fsck->summary.compared = fsck->comparable;
	fsck_log_prepare(fsck);
}

static void go_to(struct mp_fsck *fsck, enum fsck_task task)
{
	fsck->task = task;
	fsck->at = 0;
	if (task == FSCK_SCAN) {
		fsck->summary.passes++;
		fsck_log_begin(fsck);
		fsck_map_begin(fsck);
	}
}

/* The scan of the log is over: of the first pass, what it says as a whole; else only its maps. */
static void end_scan(struct mp_fsck *fsck)
{
	if (fsck->summary.passes == 1) {
		fsck_log_end(fsck);
		if (fsck->refused)
			fsck_tail(fsck);
		fsck_volumes_end(fsck);
	}
	fsck->counting = fsck->summary.passes == 1;
	go_to(fsck, fsck->comparable ? FSCK_MAPS : FSCK_DONE);
}

static void end_maps(struct mp_fsck *fsck)
{
	fsck_map_drop(fsck);
	fsck->counting = 1;
	go_to(fsck, fsck_map_more(fsck) ? FSCK_SCAN : FSCK_GRAVES);
}

static void step(struct mp_fsck *fsck)
{
	uint64_t at = fsck->at++;

	switch (fsck->task) {
	case FSCK_OPEN:
		open_store(fsck);
		go_to(fsck, FSCK_SCAN);
		break;
	case FSCK_SCAN:
		if (at < fsck->segment_count)
			fsck_log_scan(fsck, &fsck->segments[at]);
		else
			end_scan(fsck);
		break;
	case FSCK_MAPS:
		if (at == STORE_VOLUME_BUCKETS)
			end_maps(fsck);
		else
			for (struct store_volume *volume = fsck->store->volumes[at]; volume;
			     volume = volume->next)
				fsck_map_compare(fsck, volume);
		break;
	case FSCK_GRAVES:
		fsck_graves_mark(fsck);
		go_to(fsck, FSCK_TABLES);
		break;
	case FSCK_TABLES:
		if (at < fsck->segment_count)
			fsck_table_compare(fsck, &fsck->segments[at]);
		else
			go_to(fsck, FSCK_COUNTS);
		break;
	case FSCK_COUNTS:
		fsck_counts_compare(fsck);
		fsck_volumes_compare(fsck);
		go_to(fsck, FSCK_DONE);
		break;
	case FSCK_DONE:
		break;
	}
}

struct mp_fsck *mp_fsck_new(struct mp_driver *driver, uint64_t memory_bytes)
{
	struct mp_fsck *fsck = store_allocate(sizeof *fsck);

	fsck->driver = driver;
	fsck->leaf_limit = memory_bytes / sizeof(struct fsck_leaf);
	if (fsck->leaf_limit < FSCK_LEAVES_MIN)
		fsck->leaf_limit = FSCK_LEAVES_MIN;
	fsck->high = UINT64_MAX;
	return fsck;
}

int mp_fsck_step(struct mp_fsck *fsck)
{
	if (fsck->ended)
		return -ESHUTDOWN;
	if (fsck->task == FSCK_DONE)
		return 0;
	/* Empty buckets are no work worth a call. */
	do
		step(fsck);
	while (fsck->task == FSCK_MAPS && fsck->at < STORE_VOLUME_BUCKETS &&
	       !fsck->store->volumes[fsck->at]);
	return fsck->ended ? -ESHUTDOWN : 1;
}

int mp_fsck_take(struct mp_fsck *fsck, struct mp_fsck_finding *out)
{
	struct fsck_note *note = fsck->notes;

	if (!note)
		return 0;
	*out = note->finding;
	fsck->notes = note->next;
	if (!fsck->notes)
		fsck->notes_last = NULL;
	free(note);
	return 1;
}

void mp_fsck_summary(const struct mp_fsck *fsck, struct mp_fsck_summary *out)
{
	*out = fsck->summary;
}

int mp_fsck_volume(const struct mp_fsck *fsck, const uint8_t *id, struct mp_volume_state *out)
{
	const struct store_volume *mine = fsck->store ? store_volume_find(fsck->store, id) : NULL;
	const struct fsck_volume *logged = fsck_volume_find(fsck, id);

	if (!mine && !(logged && logged->state_commit))
		return -ENOENT;
	*out = mine ? mine->state : logged->state;
	return 0;
}

void mp_fsck_free(struct mp_fsck *fsck)
{
	struct mp_fsck_finding finding;

	while (mp_fsck_take(fsck, &finding))
		;
	fsck_map_drop(fsck);
	fsck_volumes_free(fsck);
	for (uint64_t i = 0; i < fsck->segment_count; i++)
		free(fsck->segments[i].marks);
	free(fsck->segments);
	free(fsck->missing);
	free(fsck->leaves);
	free(fsck->page_bytes);
	free(fsck->head.buffer);
	free(fsck->data.buffer);
	if (fsck->store)
		mp_store_free(fsck->store);
	free(fsck);
}
