/* poison.h - tells the address sanitizer which parts of our own pools are free.
 *
 * malloc's memory it watches by itself; a pool looks to it like one large object. Nothing of this
 * is compiled without the sanitizer.
 */
#ifndef MILLPOND_POISON_H
#define MILLPOND_POISON_H

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MP_ADDRESS_SANITIZER 1 /* clang */
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define MP_ADDRESS_SANITIZER 1 /* gcc */
#endif

#ifdef MP_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#define mp_poison(address, length_bytes) __asan_poison_memory_region(address, length_bytes)
#define mp_unpoison(address, length_bytes) __asan_unpoison_memory_region(address, length_bytes)
#else
#define mp_poison(address, length_bytes) ((void)(address), (void)(length_bytes))
#define mp_unpoison(address, length_bytes) ((void)(address), (void)(length_bytes))
#endif

#endif
