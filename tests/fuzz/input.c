/* input.c - what a fuzzer's bytes say, and how a harness says what it found. */
#include <stdio.h>

#include "fuzz.h"

enum { SET, ADD, FLIP, COPY };

_Noreturn void fuzz_broken(const char *file, int line, const char *condition)
{
	fprintf(stderr, "%s:%d: not so: %s\n", file, line, condition);
	abort();
}

uint64_t input_number(struct input *input, uint32_t bytes)
{
	uint64_t number = 0, have = input->left_bytes < bytes ? input->left_bytes : bytes;

	memcpy(&number, input->at, have);
	input->at += have;
	input->left_bytes -= have;
	return number;
}

uint64_t input_bytes(struct input *input, uint64_t most_bytes, const uint8_t **bytes)
{
	uint64_t have = input->left_bytes < most_bytes ? input->left_bytes : most_bytes;

	*bytes = input->at;
	input->at += have;
	input->left_bytes -= have;
	return have;
}

void input_patch(struct input *input, uint8_t *bytes, uint64_t length_bytes)
{
	uint64_t offset = input_number(input, 2), how = input_number(input, 1);
	uint64_t value = input_number(input, 8), width = 1ULL << (how & 3), old = 0;

	if (length_bytes < width)
		return;
	offset = offset % length_bytes / width * width;
	if (offset > length_bytes - width)
		offset = 0;
	memcpy(&old, bytes + offset, width);
	switch (how >> 2 & 3) {
	case ADD:
		value += old;
		break;
	case FLIP:
		value ^= old;
		break;
	case COPY: /* from another place of the same structure */
		memcpy(&value, bytes + value % length_bytes / width * width % length_bytes, width);
		break;
	default:
		break;
	}
	memcpy(bytes + offset, &value, width);
}
