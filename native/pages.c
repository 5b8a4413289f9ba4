/* pages.c - map and extent-table pages in memory: a bounded cache of clean ones, all dirty ones.
 *
 * Happy path: a reference names a place; the page there is in the table, or is read and verified
 * against the checksum in the reference. To change a page is to move it to a place in memory and to
 * give its old place back; a checkpoint gives it a new place on disk (freeze) and writes it.
 * Failure modes: a page that does not verify or cannot be read: whoever needs it gets -EBADMSG or
 * -errno, and the next one tries again. A page being written by a checkpoint is copied before it is
 * changed, so that what goes to disk is the state of the freeze.
 */
#include "poison.h"
#include "store_internal.h"

static struct store_page **bucket(struct mp_store *store, uint64_t place)
{
	return &store->pages[(place * UINT64_C(0x9E3779B97F4A7C15)) >> 50];
}

_Static_assert(STORE_PAGE_BUCKETS == 1 << 14, "bucket() keeps the upper 14 bits");

static struct store_page *find(struct mp_store *store, uint64_t place)
{
	struct store_page *page = *bucket(store, place);

	while (page && page->place != place)
		page = page->hash_next;
	return page;
}

static void hash(struct mp_store *store, struct store_page *page)
{
	struct store_page **head = bucket(store, page->place);

	page->hash_next = *head;
	*head = page;
}

static void unhash(struct mp_store *store, struct store_page *page)
{
	struct store_page **link = bucket(store, page->place);

	while (*link != page)
		link = &(*link)->hash_next;
	*link = page->hash_next;
}

static void use(struct mp_store *store, struct store_page *page)
{
	page->newer = NULL;
	page->older = store->newest;
	if (store->newest)
		store->newest->newer = page;
	else
		store->oldest = page;
	store->newest = page;
	store->clean_pages++;
}

static void unuse(struct mp_store *store, struct store_page *page)
{
	if (page->newer)
		page->newer->older = page->older;
	else
		store->newest = page->older;
	if (page->older)
		page->older->newer = page->newer;
	else
		store->oldest = page->newer;
	store->clean_pages--;
}

static void enlist(struct mp_store *store, struct store_page *page)
{
	struct store_page **head = &store->dirty[page->about.level];

	page->newer = NULL;
	page->older = *head;
	if (*head)
		(*head)->newer = page;
	*head = page;
	store->dirty_pages++;
}

static void delist(struct mp_store *store, struct store_page *page)
{
	if (page->newer)
		page->newer->older = page->older;
	else
		store->dirty[page->about.level] = page->older;
	if (page->older)
		page->older->newer = page->newer;
	store->dirty_pages--;
}

/* Pages are cut from slabs: aligned one by one, each costs the heap the 4 KiB in front of the next.
 * A slab stays until the end; a page that is given back is the next to be taken. */
static uint8_t *take(struct mp_store *store)
{
	struct store_page_memory *memory = &store->page_memory;
	uint8_t *data = memory->unused;

	if (data) {
		memcpy(&memory->unused, data, sizeof memory->unused);
		mp_unpoison(data, MP_PAGE_BYTES);
		return data;
	}
	if (memory->cut_pages == memory->slab_count * STORE_SLAB_PAGES) {
		memory->slabs = store_grow(memory->slabs, &memory->slab_capacity,
					   memory->slab_count + 1, sizeof *memory->slabs);
		memory->slabs[memory->slab_count++] =
			store_allocate_aligned(STORE_SLAB_PAGES * MP_PAGE_BYTES);
		mp_poison(memory->slabs[memory->slab_count - 1], STORE_SLAB_PAGES * MP_PAGE_BYTES);
	}
	data = memory->slabs[memory->slab_count - 1];
	data += memory->cut_pages++ % STORE_SLAB_PAGES * MP_PAGE_BYTES;
	mp_unpoison(data, MP_PAGE_BYTES);
	return data;
}

static void put_back(struct mp_store *store, uint8_t *data)
{
	struct store_page_memory *memory = &store->page_memory;

	memcpy(data, &memory->unused, sizeof memory->unused);
	memory->unused = data;
	mp_poison(data + sizeof memory->unused, MP_PAGE_BYTES - sizeof memory->unused);
}

static struct store_page *create(struct mp_store *store, uint64_t place)
{
	struct store_page *page = store_allocate(sizeof *page);

	page->place = place;
	page->data = take(store);
	page->refers_safely = 1;
	hash(store, page);
	return page;
}

static void destroy(struct mp_store *store, struct store_page *page)
{
	assert(!page->waiters);
	unhash(store, page);
	put_back(store, page->data);
	free(page->load);
	free(page);
}

/* The disk place of a page is no longer part of the newest state. */
static void give_back(struct mp_store *store, uint64_t place)
{
	struct store_segment *segment = store_segment_find(store, place >> MP_PLACE_PAGE_BITS);

	/* A reference and a count that a checkpoint had: both verify, and may yet be forged. */
	if (!segment || segment->kind != MP_GROUP_META || segment->live_bytes < MP_PAGE_BYTES) {
		store_fail(store, -EBADMSG, "a map page lies where none was counted: segment",
			   place >> MP_PLACE_PAGE_BITS,
			   (place & ((1 << MP_PLACE_PAGE_BITS) - 1)) * MP_PAGE_BYTES);
		return;
	}
	segment->live_bytes -= MP_PAGE_BYTES;
}

static void settle(struct mp_store *store, struct store_page *page, int64_t result)
{
	if (result < 0)
		page->error = (int)result;
	else if (mp_xxh3(page->data, MP_PAGE_BYTES) != page->checksum)
		page->error = -EBADMSG;
	if (page->error) {
		page->state = STORE_PAGE_FAILED;
		store->counters.checksum_errors += page->error == -EBADMSG;
		return;
	}
	page->state = STORE_PAGE_CLEAN;
	use(store, page);
}

static void loaded(struct store_io *io)
{
	struct mp_store *store = io->store;
	struct store_page *page = io->owner;
	struct store_wait *wait = page->waiters;

	settle(store, page, io->io.result);
	page->waiters = NULL;
	page->load = NULL;
	free(io);
	while (wait) {
		struct store_wait *next = wait->next;
		wait->ready(store, wait);
		wait = next;
	}
}

static void load(struct mp_store *store, struct store_page *page)
{
	uint64_t file = page->place >> MP_PLACE_PAGE_BITS;
	uint64_t offset_bytes = (page->place & ((1 << MP_PLACE_PAGE_BITS) - 1)) * MP_PAGE_BYTES;

	page->state = STORE_PAGE_LOADING;
	page->refers_safely = 0;
	if (store->recovering) {
		settle(store, page, mp_driver_read(store->driver, file, offset_bytes, page->data,
						   MP_PAGE_BYTES));
		return;
	}
	page->load = store_allocate(sizeof *page->load);
	page->load->done = loaded;
	page->load->owner = page;
	store_submit(store, page->load, MP_OP_READ, file, offset_bytes, page->data, MP_PAGE_BYTES);
}

/* 0; -EAGAIN and store->missing; or why the page cannot be had. The page stays until the turn
 * ends. */
int store_page_get(struct mp_store *store, const struct mp_page_ref *ref, struct store_page **out)
{
	struct store_page *page = find(store, ref->place);

	assert(ref->place);
	if (!page) {
		assert(!(ref->place & STORE_IN_MEMORY));
		page = create(store, ref->place);
		page->checksum = ref->checksum;
		load(store, page);
	}
	if (page->state == STORE_PAGE_LOADING) {
		store->missing = page;
		return -EAGAIN;
	}
	if (page->state == STORE_PAGE_FAILED) {
		int error = page->error;
		destroy(store, page);
		return error;
	}
	if (page->state == STORE_PAGE_CLEAN && store->newest != page) {
		unuse(store, page);
		use(store, page);
	}
	*out = page;
	return 0;
}

int store_page_check_inner(struct store_page *page)
{
	const struct mp_page_ref *refs = (const struct mp_page_ref *)(const void *)page->data;

	for (uint32_t i = 0; !page->refers_safely && i < 1 << MP_INNER_BITS; i++)
		if (refs[i].place & STORE_IN_MEMORY)
			return -EBADMSG;
	page->refers_safely = 1;
	return 0;
}

void store_page_wait(struct mp_store *store, struct store_wait *wait)
{
	struct store_page *page = store->missing;

	assert(page && page->state == STORE_PAGE_LOADING);
	wait->next = page->waiters;
	page->waiters = wait;
}

static uint64_t place_in_memory(struct mp_store *store)
{
	return STORE_IN_MEMORY | ++store->page_number;
}

static struct store_page *make_dirty(struct mp_store *store, struct store_page *page,
				     struct mp_page_ref *home,
					const struct mp_page_descriptor *about)
{
	page->state = STORE_PAGE_DIRTY;
	page->about = *about;
	page->home = home;
	home->place = page->place;
	home->checksum = 0;
	enlist(store, page);
	return page;
}

struct store_page *store_page_new(struct mp_store *store, struct mp_page_ref *home,
				  const struct mp_page_descriptor *about)
{
	struct store_page *page = create(store, place_in_memory(store));

	memset(page->data, 0, MP_PAGE_BYTES);
	return make_dirty(store, page, home, about);
}

/* Make a page changeable. home is the reference to it, in a page that is dirty itself or at a
 * root. */
struct store_page *store_page_dirty(struct mp_store *store, struct store_page *page,
				    struct mp_page_ref *home,
					const struct mp_page_descriptor *about)
{
	if (page->state == STORE_PAGE_DIRTY) {
		page->home = home;
		return page;
	}
	give_back(store, page->place);
	if (page->state == STORE_PAGE_WRITING) {
		struct store_page *copy = create(store, place_in_memory(store));
		memcpy(copy->data, page->data, MP_PAGE_BYTES);
		page->unreferenced = 1;
		return make_dirty(store, copy, home, about);
	}
	assert(page->state == STORE_PAGE_CLEAN);
	unuse(store, page);
	unhash(store, page);
	page->place = place_in_memory(store);
	hash(store, page);
	return make_dirty(store, page, home, about);
}

/* Nothing refers to the page any more. */
void store_page_release(struct mp_store *store, const struct mp_page_ref *ref)
{
	struct store_page *page = find(store, ref->place);

	if (!(ref->place & STORE_IN_MEMORY))
		give_back(store, ref->place);
	if (!page) {
		assert(!(ref->place & STORE_IN_MEMORY));
	} else if (page->state == STORE_PAGE_DIRTY) {
		delist(store, page);
		destroy(store, page);
	} else if (page->state == STORE_PAGE_CLEAN) {
		unuse(store, page);
		destroy(store, page);
	} else if (page->state == STORE_PAGE_WRITING) {
		page->unreferenced = 1;
	}
}

/* Checkpoint: the page's content is final, place is where it will be on disk. */
void store_page_freeze(struct mp_store *store, struct store_page *page, uint64_t place)
{
	assert(page->state == STORE_PAGE_DIRTY && page->home->place == page->place);
	delist(store, page);
	unhash(store, page);
	page->place = place;
	page->checksum = mp_xxh3(page->data, MP_PAGE_BYTES);
	page->about.checksum = page->checksum;
	hash(store, page);
	page->home->place = place;
	page->home->checksum = page->checksum;
	page->home = NULL;
	page->state = STORE_PAGE_WRITING;
	store->writing_pages++;
}

void store_page_written(struct mp_store *store, struct store_page *page)
{
	assert(page->state == STORE_PAGE_WRITING);
	store->writing_pages--;
	if (page->unreferenced) {
		destroy(store, page);
		return;
	}
	page->state = STORE_PAGE_CLEAN;
	use(store, page);
}

/* At the end of a turn, when nobody holds a page: back under the limit. */
void store_pages_trim(struct mp_store *store)
{
	while (store->clean_pages > store->clean_limit) {
		struct store_page *page = store->oldest;
		unuse(store, page);
		destroy(store, page);
	}
	store->counters.pages_in_memory =
		store->clean_pages + store->dirty_pages + store->writing_pages;
}

void store_pages_free(struct mp_store *store)
{
	struct store_page_memory *memory = &store->page_memory;

	for (uint32_t i = 0; i < STORE_PAGE_BUCKETS; i++) {
		while (store->pages[i]) {
			store->pages[i]->waiters = NULL;
			destroy(store, store->pages[i]);
		}
	}
	for (uint64_t i = 0; i < memory->slab_count; i++)
		free(memory->slabs[i]);
	free(memory->slabs);
}
