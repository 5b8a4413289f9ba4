/* image.c - a simulated disk kept as its pages, made again for every input, and patched. */
#include "fuzz.h"

static struct image_page *page_new(struct image *image)
{
	if (image->page_count == image->page_capacity) {
		image->page_capacity = image->page_capacity * 2 + 64;
		image->pages = realloc(image->pages,
				       image->page_capacity * sizeof *image->pages);
		CHECK(image->pages);
	}
	return &image->pages[image->page_count];
}

static void take_file(struct image *image, struct mp_sim *sim, uint64_t number, uint64_t length)
{
	for (uint64_t index = 0; index < length / MP_BLOCK_BYTES; index++) {
		struct image_page *page = page_new(image);

		page->file = number;
		page->index = index;
		CHECK(mp_sim_peek(sim, number, index * MP_BLOCK_BYTES, page->bytes,
				  MP_BLOCK_BYTES) == MP_BLOCK_BYTES);
		if (!mp_is_zero(page->bytes, MP_BLOCK_BYTES))
			image->page_count++;
	}
}

void image_take(struct image *image, struct mp_sim *sim, struct mp_driver *driver,
		uint64_t device_bytes)
{
	uint64_t numbers[64];
	int64_t count = driver->list_files(driver->self, numbers, 64);

	CHECK(count > 0 && count <= 64);
	memset(image, 0, sizeof *image);
	image->device_bytes = device_bytes;
	image->file_count = (uint64_t)count;
	for (int64_t i = 0; i < count; i++) {
		int64_t length = driver->file_length_bytes(driver->self, numbers[i]);

		CHECK(length >= 0 && length % MP_BLOCK_BYTES == 0);
		image->files[i].number = numbers[i];
		image->files[i].length_bytes = (uint64_t)length;
		take_file(image, sim, numbers[i], (uint64_t)length);
	}
}

static void make_file(struct mp_driver *driver, uint64_t number, uint64_t length_bytes)
{
	struct mp_io create = {.op = MP_OP_CREATE, .file = number};
	struct mp_io allocate = {.op = MP_OP_ALLOCATE, .file = number,
				 .length_bytes = length_bytes};

	CHECK(mp_driver_do(driver, &create) >= 0);
	CHECK(length_bytes == 0 || mp_driver_do(driver, &allocate) >= 0);
	CHECK(mp_driver_sync(driver, number) >= 0);
}

struct mp_sim *image_world(const struct image *image)
{
	struct mp_sim_options options = {.seed = 1, .device_bytes = image->device_bytes,
					 .latency_ns = 1000};
	struct mp_sim *sim = mp_sim_new(&options);

	if (!image->device_bytes) {
		struct mp_driver *driver = mp_sim_driver(sim);

		for (uint64_t i = 0; i < image->file_count; i++)
			make_file(driver, image->files[i].number, image->files[i].length_bytes);
		mp_driver_destroy(driver);
	}
	for (uint64_t i = 0; i < image->page_count; i++) {
		const struct image_page *page = &image->pages[i];

		CHECK(mp_sim_poke(sim, page->file, page->index * MP_BLOCK_BYTES, page->bytes,
				  MP_BLOCK_BYTES) == MP_BLOCK_BYTES);
	}
	return sim;
}

void places_add(struct places *places, struct place place)
{
	if (places->count % 64 == 0) {
		places->items = realloc(places->items,
					(places->count + 64) * sizeof *places->items);
		CHECK(places->items);
	}
	places->items[places->count++] = place;
}

/* Upper byte: the kind; lower: which of them. Of a kind that the image has none of: any. */
static const struct place *choose(const struct places *places, uint64_t number)
{
	uint64_t count = 0, wanted;

	for (uint64_t i = 0; i < places->count; i++)
		count += places->items[i].kind == number >> 8;
	if (!count)
		return &places->items[number % places->count];
	wanted = (number & 255) % count;
	for (uint64_t i = 0;; i++)
		if (places->items[i].kind == number >> 8 && wanted-- == 0)
			return &places->items[i];
}

void places_patch(const struct places *places, struct mp_sim *sim, struct input *input,
		  uint32_t patches_max)
{
	for (uint32_t i = 0; i < patches_max && input->left_bytes; i++) {
		const struct place *place = choose(places, input_number(input, 2));
		uint8_t bytes[MP_BLOCK_BYTES];

		CHECK(place->length_bytes <= sizeof bytes);
		CHECK(mp_sim_peek(sim, place->file, place->offset_bytes, bytes,
				  place->length_bytes) >= 0);
		input_patch(input, bytes, place->length_bytes);
		CHECK(mp_sim_poke(sim, place->file, place->offset_bytes, bytes,
				  place->length_bytes) >= 0);
	}
}
