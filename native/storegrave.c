/* storegrave.c - give back detached trees in slices: deleted volumes, trimmed ranges, old tables.
 *
 * A grave is the root of a tree that nothing refers to. Inner page: its children become graves and
 * the page is given back. Leaf of a map: its addresses die, all in one turn, and the page is given
 * back. Leaf of an extent table: given back unseen. Newest graves first, so that their number stays
 * near the height of the tree times 256. A checkpoint between two turns holds the graves left over.
 * Failure modes: a page that cannot be had stays buried; its space is not given back (never the
 * other way round), the error is counted and the grave goes to the end of the line.
 */
#include "store_internal.h"

void store_bury(struct mp_store *store, const struct mp_page_ref *root, uint32_t level,
		uint32_t kind)
{
	struct store_grave *grave;
	struct store_page *page;

	if (!root->place)
		return;
	grave = store_allocate(sizeof *grave);
	grave->root = *root;
	grave->level = level;
	grave->kind = kind;
	grave->next = store->graves;
	store->graves = grave;
	store->grave_count++;
	if (root->place & STORE_IN_MEMORY) {
		int error = store_page_get(store, &grave->root, &page);
		assert(!error);
		page->home = &grave->root;
	}
}

static int bury_children(struct mp_store *store, struct store_grave *grave)
{
	struct mp_page_ref *children;
	struct store_page *page;
	int error = store_page_get(store, &grave->root, &page);

	if (!error)
		error = store_page_check_inner(page);
	if (error)
		return error;
	children = (struct mp_page_ref *)(void *)page->data;
	for (uint32_t i = 0; i < 1 << MP_INNER_BITS; i++)
		store_bury(store, &children[i], grave->level - 1, grave->kind);
	return 0;
}

static int kill_leaf(struct mp_store *store, struct store_grave *grave)
{
	struct mp_extent_entry *entry;
	struct store_page *page;
	uint64_t *addresses;
	int missing = 0, error = store_page_get(store, &grave->root, &page);

	if (error)
		return error;
	addresses = (uint64_t *)(void *)page->data;
	for (uint32_t i = 0; i < 1 << MP_MAP_LEAF_BITS; i++) {
		if (!addresses[i])
			continue;
		error = store_extent_get(store, addresses[i], STORE_DIRTY, &entry);
		if (error && error != -EAGAIN)
			return error;
		missing |= error;
	}
	if (missing)
		return -EAGAIN;
	for (uint32_t i = 0; i < 1 << MP_MAP_LEAF_BITS; i++)
		if (addresses[i])
			store_extent_kill(store, NULL, addresses[i]);
	return 0;
}

/* The newest grave is emptied; it need not be the newest any more, its children are. */
static int empty(struct mp_store *store)
{
	struct store_grave *grave = store->graves, **link = &store->graves;
	int error = 0;

	if (grave->level)
		error = bury_children(store, grave);
	else if (grave->kind == MP_GRAVE_MAP)
		error = kill_leaf(store, grave);
	if (error)
		return error;
	store_page_release(store, &grave->root);
	while (*link != grave)
		link = &(*link)->next;
	*link = grave->next;
	free(grave);
	store->grave_count--;
	return 0;
}

static void to_the_end(struct mp_store *store)
{
	struct store_grave *grave = store->graves, **link = &grave->next;

	if (!grave->next)
		return;
	store->graves = grave->next;
	while (*link)
		link = &(*link)->next;
	*link = grave;
	grave->next = NULL;
}

static void ready(struct mp_store *store, struct store_wait *wait)
{
	(void)wait;
	store->grave_blocked = 0;
}

void store_graves_advance(struct mp_store *store)
{
	/* Dirty pages are bounded: what is buried can wait for the checkpoint. */
	for (uint32_t i = 0; i < STORE_GRAVE_PAGES_PER_TURN && store->graves; i++) {
		int error;

		if (store->grave_blocked || store->failure ||
		    store->dirty_pages >= store->dirty_limit)
			return;
		error = empty(store);
		if (error == -EAGAIN) {
			store->grave_blocked = 1;
			store->grave_wait.ready = ready;
			store_page_wait(store, &store->grave_wait);
		} else if (error) {
			store->counters.io_errors++;
			to_the_end(store);
			store->grave_blocked = 2; /* until the next checkpoint: no spinning */
			return;
		}
	}
}
