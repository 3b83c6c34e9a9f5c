/* What the native fuzz targets share. Every buffer has its exact size on the heap, so that AddressSanitizer sees a byte
 * read or written beyond it. */
#ifndef FUZZ_COMMON_H
#define FUZZ_COMMON_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lynxproto.h"

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Decisions out of the fuzzer's bytes; zeros once they are used up. */
typedef struct {
    const uint8_t *data;
    size_t left;
} script;

static inline uint32_t take(script *s, int bytes) {
    uint32_t value = 0;
    for (int i = 0; i < bytes && s->left > 0; i++, s->left--) {
        value |= (uint32_t)*s->data++ << (8 * i);
    }
    return value;
}

static inline uint32_t below(script *s, uint32_t limit) {
    return take(s, limit <= 256 ? 1 : 2) % limit;
}

static inline uint32_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    return (uint32_t)((z ^ (z >> 27)) * 0x94d049bb133111ebull >> 33);
}

static inline void *bytes(uint64_t n) {
    void *p = malloc(n == 0 ? 1 : (size_t)n);
    REQUIRE(p != NULL);
    return p;
}

/* The instruction sets of this machine: scalar first. */
static inline int instruction_sets(int isas[4]) {
    static int found[4], count;
    if (count == 0) {
        for (int isa = 0; isa < 4; isa++) {
            if (lynx_isa_select(isa) == LYNX_OK) {
                found[count++] = isa;
            }
        }
    }
    memcpy(isas, found, sizeof found);
    return count;
}

#endif
