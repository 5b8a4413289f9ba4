/* frame.c - seal and verify a wire frame's header and the part of the payload it answers for.
 *
 * Happy path: seal before sending; check what has arrived until it says how long the frame is.
 * Failure modes: -EAGAIN more bytes are needed for the header or the checked part; -ENOTSUP another
 * wire version; -EPROTO limits, holes or an unknown type; -EBADMSG checksum. The payload behind
 * checked_bytes is neither read nor waited for.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "record.h"

enum { CHECKED_FROM = offsetof(struct mp_frame, checksum) + sizeof(uint64_t) };

/* Magic, version and type stand before the checksum: they are its seed, or a flipped bit of the
 * type would turn one good frame into another. */
static uint64_t checksum(const void *frame, uint32_t checked_bytes)
{
	uint64_t seed;

	memcpy(&seed, frame, sizeof seed);
	return mp_xxh3_seeded(seed, (const uint8_t *)frame + CHECKED_FROM,
			      sizeof(struct mp_frame) - CHECKED_FROM + checked_bytes);
}

/* May part of the payload be left to checksums of its own? */
static int carries_records(uint16_t type)
{
	return type == MP_FRAME_READ_REPLY || type == MP_FRAME_BATCH || type == MP_FRAME_PUT_VOLUME;
}

static int is_known(uint16_t type)
{
	return type >= MP_FRAME_HELLO && type <= MP_FRAME_BLOCK_STATUS_REPLY &&
	       type != MP_FRAME_ERROR + 1;
}

static int is_reply(uint16_t type)
{
	return type == MP_FRAME_ERROR || type % 2 == 0;
}

void mp_frame_seal(struct mp_frame *frame)
{
	assert(frame->payload_bytes <= MP_FRAME_PAYLOAD_MAX);
	assert(frame->checked_bytes == frame->payload_bytes ||
	       (carries_records(frame->type) && frame->checked_bytes < frame->payload_bytes));
	frame->magic = MP_FRAME_MAGIC;
	frame->version = MP_WIRE_VERSION;
	frame->checksum = checksum(frame, frame->checked_bytes);
}

int64_t mp_frame_check(const void *bytes, uint64_t length_bytes)
{
	struct mp_frame header;

	if (length_bytes < sizeof header)
		return -EAGAIN;
	memcpy(&header, bytes, sizeof header);
	if (header.magic != MP_FRAME_MAGIC)
		return -EPROTO;
	if (header.version != MP_WIRE_VERSION)
		return -ENOTSUP;
	if (header.payload_bytes > MP_FRAME_PAYLOAD_MAX ||
	    header.checked_bytes > header.payload_bytes)
		return -EPROTO;
	if (length_bytes < sizeof header + header.checked_bytes)
		return -EAGAIN;
	if (checksum(bytes, header.checked_bytes) != header.checksum)
		return -EBADMSG;
	if (!is_known(header.type) || header.flags || header.reserved)
		return -EPROTO;
	if (header.checked_bytes < header.payload_bytes && !carries_records(header.type))
		return -EPROTO;
	if (header.status && !is_reply(header.type))
		return -EPROTO;
	return (int64_t)(sizeof header + header.payload_bytes);
}
