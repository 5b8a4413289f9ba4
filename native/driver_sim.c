/* driver_sim.c - the simulated world: what happens when, in virtual time, from one seed.
 *
 * Happy path: submit notes when each io is due; wait completes what is due (with reorder: in
 * random order and not all at once), offers ready sockets, and only with nothing to do moves the
 * clock to what is next. The effect of an io, on disk and in its buffers, happens at its
 * completion.
 * Failure modes, all chosen by the options: the nth io fails; after the nth mutation the world
 * crashes: what is in flight happens, does not, or half happens, without power what is unsynced
 * too (driver_sim_loss.c), nothing completes any more and wait is -ESHUTDOWN. A destroyed
 * driver's ios in flight never happen and are never touched: their memory may be gone.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "driver_sim_private.h"

/* A turn takes time: a core that polls until a deadline must reach it. */
enum { TURN_NS = 100 };

static void set_options(struct mp_sim *sim, const struct mp_sim_options *options)
{
	sim->options = *options;
	mp_sim_random_seed(&sim->schedule, options->seed, sim->generation, 1);
	mp_sim_random_seed(&sim->fate, options->seed, sim->generation, 2);
	mp_sim_random_seed(&sim->core, options->seed, sim->generation, 3);
	sim->generation++;
	sim->mutations = 0;
	sim->fail_counted = 0;
	sim->writes = 0;
	sim->disk.capacity_pages = options->capacity_bytes / MP_BLOCK_BYTES;
	memset(sim->completed, 0, sizeof sim->completed);
}

static bool is_mutation(uint32_t op)
{
	return op != MP_OP_READ && op != MP_OP_CALL;
}

static uint64_t sim_now_ns(void *self)
{
	const struct mp_sim *sim = self;
	return sim->now_ns;
}

static void sim_random_bytes(void *self, void *buffer, size_t length)
{
	struct mp_sim *sim = self;

	for (size_t at = 0; at < length; at++)
		((uint8_t *)buffer)[at] = (uint8_t)(mp_sim_random_next(&sim->core) >> 32);
}

/* Half to one and a half of the latency; in order: never before the one submitted before. */
static uint64_t due_ns(struct mp_sim *sim)
{
	uint64_t latency_ns = sim->options.latency_ns;
	uint64_t due = sim->now_ns + latency_ns / 2;

	due += mp_sim_random_below(&sim->schedule, latency_ns + 1);
	if (!sim->options.reorder && sim->pending_count > 0) {
		uint64_t before = sim->pending[sim->pending_count - 1].due_ns;
		due = due < before ? before : due;
	}
	return due;
}

static bool chosen_to_fail(struct mp_sim *sim, uint32_t op)
{
	const struct mp_sim_options *options = &sim->options;

	if (op == MP_OP_CALL || (options->fail_op != 0 && options->fail_op != op))
		return false;
	sim->fail_counted++;
	return options->fail_io > 0 && sim->fail_counted >= options->fail_io &&
	       sim->fail_counted - options->fail_io < options->fail_count;
}

static void sim_submit(void *self, struct mp_io *const *ios, uint32_t count)
{
	struct mp_sim *sim = self;

	for (uint32_t i = 0; i < count && !sim->crashed; i++) {
		struct mp_io *io = ios[i];
		mp_driver_check(io);
		struct mp_sim_pending pending = {.io = io, .covers = sim->disk.sequence};
		pending.due_ns = due_ns(sim);
		pending.fails = chosen_to_fail(sim, io->op);
		pending.strays = io->op == MP_OP_WRITE &&
				 ++sim->writes == sim->options.misdirect_io;
		sim->pending = mp_sim_grow(sim->pending, &sim->pending_capacity,
					   sim->pending_count + 1,
					   sizeof *sim->pending);
		sim->pending[sim->pending_count++] = pending;
		if (is_mutation(io->op) && ++sim->mutations == sim->options.crash_after_io)
			mp_sim_crash(sim);
	}
}

static int64_t sim_file_length_bytes(void *self, uint64_t number)
{
	const struct mp_sim *sim = self;
	const struct mp_sim_file *file = mp_sim_disk_find(&sim->disk, number);

	return file ? (int64_t)file->length_bytes : -ENOENT;
}

static int64_t sim_list_files(void *self, uint64_t *numbers, uint64_t capacity)
{
	const struct mp_sim *sim = self;

	for (uint64_t i = 0; i < sim->disk.file_count && i < capacity; i++)
		numbers[i] = sim->disk.files[i]->number;
	return (int64_t)sim->disk.file_count;
}

static enum mp_sim_extent fate_in_flight(struct mp_sim *sim)
{
	uint64_t dice = mp_sim_random_below(&sim->fate, 4);

	if (dice == 0 && sim->options.tear)
		return MP_SIM_TORN;
	return dice % 2 ? MP_SIM_WHOLE : MP_SIM_NOTHING;
}

/* The write lands in another place of its file, and says that all is well. */
static int64_t perform_stray(struct mp_sim *sim, const struct mp_io *io)
{
	const struct mp_sim_file *file = mp_sim_disk_find(&sim->disk, io->file);
	struct mp_io elsewhere = *io;
	uint64_t room_bytes;

	if (!file)
		return -ENOENT;
	room_bytes = file->length_bytes > io->length_bytes ? file->length_bytes - io->length_bytes
							   : 0;
	elsewhere.offset_bytes =
		mp_sim_random_below(&sim->fate, room_bytes / MP_BLOCK_BYTES + 1) * MP_BLOCK_BYTES;
	return mp_sim_disk_change(&sim->disk, &elsewhere, MP_SIM_WHOLE, &sim->fate);
}

/* The effect of an io, now. Extent: of WRITE, PUNCH and ALLOCATE. Not CALL. */
static int64_t perform(struct mp_sim *sim, const struct mp_sim_pending *pending,
		       enum mp_sim_extent extent)
{
	const struct mp_io *io = pending->io;

	switch (io->op) {
	case MP_OP_READ:
		return mp_sim_disk_read(&sim->disk, io);
	case MP_OP_SYNC:
		return mp_sim_disk_sync(&sim->disk, io->file, pending->covers, pending->fails);
	case MP_OP_CREATE:
		return mp_sim_disk_create(&sim->disk, io->file);
	case MP_OP_REMOVE:
		return mp_sim_disk_remove(&sim->disk, io->file);
	default:
		if (pending->strays)
			return perform_stray(sim, io);
		return mp_sim_disk_change(&sim->disk, io, extent, &sim->fate);
	}
}

static int64_t perform_failing(struct mp_sim *sim, const struct mp_sim_pending *pending)
{
	/* A WRITE that failed may have reached the disk, or half; a failed SYNC loses its
	 * promise for good. */
	if (pending->io->op == MP_OP_WRITE)
		perform(sim, pending, fate_in_flight(sim));
	else if (pending->io->op == MP_OP_SYNC)
		perform(sim, pending, MP_SIM_NOTHING);
	return -sim->options.fail_errno;
}

static struct mp_sim_pending take_pending(struct mp_sim *sim, uint64_t place)
{
	struct mp_sim_pending taken = sim->pending[place];

	sim->pending_count--;
	memmove(sim->pending + place, sim->pending + place + 1,
		(sim->pending_count - place) * sizeof *sim->pending);
	return taken;
}

static void complete(struct mp_sim *sim, uint64_t place)
{
	struct mp_sim_pending pending = take_pending(sim, place);
	struct mp_io *io = pending.io;

	sim->completed[io->op]++;
	if (io->op == MP_OP_CALL) {
		io->result = 0;
		io->call(io);
	} else {
		io->result = pending.fails ? perform_failing(sim, &pending)
					   : perform(sim, &pending, MP_SIM_WHOLE);
	}
	io->done(io);
}

/* The place of the io to complete now, or pending_count. */
static uint64_t choose_due(struct mp_sim *sim)
{
	uint64_t due_count = 0, count = sim->pending_count;

	if (!sim->options.reorder)
		return count > 0 && sim->pending[0].due_ns <= sim->now_ns ? 0 : count;
	for (uint64_t i = 0; i < sim->pending_count; i++)
		due_count += sim->pending[i].due_ns <= sim->now_ns;
	if (due_count == 0)
		return sim->pending_count;
	uint64_t skip = mp_sim_random_below(&sim->schedule, due_count);
	for (uint64_t i = 0;; i++) {
		if (sim->pending[i].due_ns <= sim->now_ns && skip-- == 0)
			return i;
	}
}

/* At most what is in flight now: done may submit what is due at once, and a turn must end. */
static int64_t run_due(struct mp_sim *sim)
{
	uint64_t limit = sim->pending_count;
	int64_t handled = 0;

	while (limit-- > 0 && !sim->crashed) {
		uint64_t place = choose_due(sim);
		if (place >= sim->pending_count)
			break;
		complete(sim, place);
		handled++;
		if (sim->options.reorder && mp_sim_random_below(&sim->schedule, 4) == 0)
			break;
	}
	return handled;
}

static int64_t run_turn(struct mp_sim *sim)
{
	bool sockets_first = sim->options.reorder && mp_sim_random_below(&sim->schedule, 2);
	int64_t handled = atomic_exchange(&sim->woken, false) ? 1 : 0;

	if (sockets_first)
		handled += mp_sim_sockets_run(sim);
	handled += run_due(sim);
	if (!sockets_first)
		handled += mp_sim_sockets_run(sim);
	return handled;
}

/* Sleep. True when something became due. */
static bool sleep_until_due(struct mp_sim *sim, int64_t timeout_ns)
{
	uint64_t next_ns = UINT64_MAX;

	for (uint64_t i = 0; i < sim->pending_count; i++) {
		uint64_t due = sim->pending[i].due_ns;
		next_ns = due < next_ns ? due : next_ns;
	}
	if (timeout_ns >= 0 && next_ns > sim->now_ns + (uint64_t)timeout_ns) {
		sim->now_ns += (uint64_t)timeout_ns;
		return false;
	}
	if (next_ns == UINT64_MAX)
		return false;
	sim->now_ns = next_ns > sim->now_ns ? next_ns : sim->now_ns;
	return true;
}

static int64_t sim_wait(void *self, int64_t timeout_ns)
{
	struct mp_sim *sim = self;

	assert(!sim->in_wait); /* done and on_ready must not wait */
	if (sim->crashed)
		return -ESHUTDOWN;
	sim->in_wait = true;
	sim->now_ns += TURN_NS;
	int64_t handled = run_turn(sim);
	if (handled == 0 && timeout_ns != 0 && !sim->crashed && sleep_until_due(sim, timeout_ns))
		handled = run_turn(sim);
	sim->in_wait = false;
	return sim->crashed ? -ESHUTDOWN : handled;
}

static void sim_wake(void *self)
{
	struct mp_sim *sim = self;
	atomic_store(&sim->woken, true);
}

static void sim_notify(void *self)
{
	struct mp_sim *sim = self;
	atomic_store(&sim->notified, true);
}

static void sim_destroy(void *self)
{
	struct mp_sim *sim = self;

	assert(!sim->in_wait);
	sim->pending_count = 0;
	mp_sim_sockets_kill(sim);
	free(sim->driver);
	sim->driver = NULL;
}

struct mp_sim *mp_sim_new(const struct mp_sim_options *options)
{
	struct mp_sim *sim = calloc(1, sizeof *sim);

	assert(sim);
	set_options(sim, options);
	mp_sim_disk_init(&sim->disk, options->device_bytes);
	return sim;
}

void mp_sim_free(struct mp_sim *sim)
{
	mp_sim_disk_free(&sim->disk);
	mp_sim_sockets_free(sim);
	free(sim->pending);
	free(sim->driver);
	free(sim);
}

void mp_sim_set(struct mp_sim *sim, const struct mp_sim_options *options)
{
	set_options(sim, options);
}

struct mp_driver *mp_sim_driver(struct mp_sim *sim)
{
	static const struct mp_driver TABLE = {
		.now_ns = sim_now_ns,
		.random_bytes = sim_random_bytes,
		.submit = sim_submit,
		.file_length_bytes = sim_file_length_bytes,
		.list_files = sim_list_files,
		.receive = mp_sim_receive,
		.send = mp_sim_send,
		.watch = mp_sim_watch,
		.closed_by_peer = mp_sim_closed_by_peer,
		.close_socket = mp_sim_close_socket,
		.release_socket = mp_sim_release_socket,
		.wait = sim_wait,
		.wake = sim_wake,
		.notify = sim_notify,
		.destroy = sim_destroy,
	};

	assert(!sim->driver); /* destroy the old one first */
	sim->driver = malloc(sizeof *sim->driver);
	assert(sim->driver);
	*sim->driver = TABLE;
	sim->driver->self = sim;
	sim->crashed = false;
	mp_sim_disk_reopen(&sim->disk);
	atomic_store(&sim->woken, false);
	atomic_store(&sim->notified, false);
	return sim->driver;
}

/* One io that was in flight when the world ended. Power loss decides about it with all that is
 * unsynced. */
static void end_in_flight(struct mp_sim *sim, const struct mp_sim_pending *pending)
{
	enum mp_sim_extent extent = fate_in_flight(sim);
	uint32_t op = pending->io->op;
	bool is_change = op == MP_OP_WRITE || op == MP_OP_PUNCH || op == MP_OP_ALLOCATE;

	if (!is_mutation(op) || (op == MP_OP_SYNC && pending->fails))
		return;
	if (is_change && sim->options.lose_unsynced)
		extent = MP_SIM_WHOLE;
	if (extent == MP_SIM_NOTHING || (!is_change && extent != MP_SIM_WHOLE))
		return;
	perform(sim, pending, extent);
}

void mp_sim_crash(struct mp_sim *sim)
{
	if (sim->crashed)
		return;
	sim->crashed = true;
	while (sim->pending_count > 0) {
		uint64_t place = 0;
		if (sim->options.reorder)
			place = mp_sim_random_below(&sim->fate, sim->pending_count);
		struct mp_sim_pending pending = take_pending(sim, place);
		end_in_flight(sim, &pending);
	}
	if (sim->options.lose_unsynced)
		mp_sim_disk_power_loss(&sim->disk, &sim->fate, sim->options.reorder != 0,
				       sim->options.tear != 0);
	mp_sim_sockets_kill(sim);
}

int mp_sim_crashed(const struct mp_sim *sim)
{
	return sim->crashed;
}

uint64_t mp_sim_io_count(const struct mp_sim *sim)
{
	return sim->mutations;
}

uint64_t mp_sim_count(const struct mp_sim *sim, uint32_t op)
{
	assert(op <= MP_OP_CALL);
	return sim->completed[op];
}

uint64_t mp_sim_now_ns(const struct mp_sim *sim)
{
	return sim->now_ns;
}

void mp_sim_advance_ns(struct mp_sim *sim, uint64_t duration_ns)
{
	sim->now_ns += duration_ns;
}

int mp_sim_notified(struct mp_sim *sim)
{
	return atomic_exchange(&sim->notified, false);
}

/* Walk [offset, offset + length) page by page; in or out is NULL. */
static int64_t access_bytes(struct mp_sim *sim, uint64_t number, uint64_t offset_bytes,
			    uint8_t *out,
			    const uint8_t *in, uint64_t length_bytes)
{
	struct mp_sim_file *file = mp_sim_disk_find(&sim->disk, number);
	uint8_t bytes[MP_BLOCK_BYTES];

	if (!file)
		return -ENOENT;
	if (offset_bytes > file->length_bytes || length_bytes > file->length_bytes - offset_bytes)
		return -EIO;
	for (uint64_t at = 0; at < length_bytes;) {
		uint64_t index = (offset_bytes + at) / MP_BLOCK_BYTES;
		uint64_t inside = (offset_bytes + at) % MP_BLOCK_BYTES;
		uint64_t left = length_bytes - at, here = MP_BLOCK_BYTES - inside;
		const uint8_t *page = mp_sim_page_get(file, index);
		here = here < left ? here : left;
		memcpy(bytes, page ? page : mp_sim_page_zero(), sizeof bytes);
		if (out) {
			memcpy(out + at, bytes + inside, here);
		} else {
			memcpy(bytes + inside, in + at, here);
			mp_sim_page_free(
				mp_sim_page_swap(&sim->disk, file, index, mp_sim_page_copy(bytes)));
		}
		at += here;
	}
	return (int64_t)length_bytes;
}

int64_t mp_sim_peek(struct mp_sim *sim, uint64_t file, uint64_t offset_bytes, void *out,
		    uint64_t length_bytes)
{
	return access_bytes(sim, file, offset_bytes, out, NULL, length_bytes);
}

int64_t mp_sim_poke(struct mp_sim *sim, uint64_t file, uint64_t offset_bytes, const void *in,
		    uint64_t length_bytes)
{
	return access_bytes(sim, file, offset_bytes, NULL, in, length_bytes);
}

uint64_t mp_sim_allocated_bytes(struct mp_sim *sim)
{
	return sim->disk.allocated_pages * MP_BLOCK_BYTES;
}
