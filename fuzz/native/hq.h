/* Tiles of the hq targets: made from a script, encoded into payloads of exact size, decoded. */
#ifndef FUZZ_HQ_H
#define FUZZ_HQ_H

#include "common.h"

#define MAX_CHANNELS (2 * 72)
#define MAX_PAGES 90

static void *scratch; /* made by the target */

/* What a script makes a tile of. `config` and `view` point into this structure. */
typedef struct {
    lynx_hq_config config;
    lynx_hq_bounds bounds;
    uint8_t widths[MAX_CHANNELS];
    size_t words;
} shape;

typedef struct {
    uint8_t *at[3];
    uint64_t size[3];
    int count;
} payloads;

static bool make_shape(script *s, shape *x) {
    static const uint32_t tokens[8] = {1, 7, 8, 9, 17, 33, 64, 67};
    lynx_hq_config *c = &x->config;
    *c = (lynx_hq_config){.dtype = (int32_t)below(s, 2), .part = (int32_t)below(s, 2), .heads = 1 + below(s, 2),
                          .tokens = tokens[below(s, 8)], .head_dim = 1 + below(s, 72), .levels = 1 + (int32_t)below(s, 3),
                          .fold = (int32_t)below(s, 2), .scaling = (int32_t)below(s, 2)};
    const uint32_t channels = c->heads * c->head_dim, kind = below(s, 3), width = below(s, 9);
    uint64_t seed = take(s, 2);
    for (uint32_t i = 0; i < channels; i++) {
        const bool alone = kind == 1 && c->part == LYNX_KEY; /* values of a group share their width */
        x->widths[i] = (uint8_t)(alone ? next_random(&seed) % 9 : width);
    }
    const bool by_range = kind == 2 && c->part == LYNX_KEY;
    c->widths = by_range ? NULL : x->widths;
    c->range_bits = by_range ? (uint64_t)channels * (width % 8) : 0;
    x->words = (size_t)channels * c->tokens;
    return lynx_hq_measure(c, &x->bounds) == LYNX_OK;
}

/* The tile's words [head, token, dim] in a row. */
static lynx_view row_view(const shape *x, uint16_t *words) {
    const ptrdiff_t row = x->config.head_dim;
    return (lynx_view){.words = words, .head_stride = row * (ptrdiff_t)x->config.tokens, .token_stride = row};
}

/* At once or in two pieces; false for tiles that have to be stored. */
static bool encode(const shape *x, const lynx_view *view, bool halves, payloads *p) {
    p->count = x->config.levels;
    void *plan = bytes(x->bounds.plan);
    uint8_t *levels[3] = {NULL, NULL, NULL};
    for (int i = 0; i < p->count; i++) {
        levels[i] = bytes(x->bounds.level[i]);
    }
    int code;
    if (halves) { /* the second first, as threads may */
        const uint64_t cut = x->bounds.blocks / 2;
        lynx_hq_piece pieces[2];
        REQUIRE(lynx_hq_prepare(&x->config, view, plan, scratch) == LYNX_OK);
        REQUIRE(lynx_hq_encode(plan, view, cut, x->bounds.blocks, levels, &pieces[1], scratch) == LYNX_OK);
        REQUIRE(lynx_hq_encode(plan, view, 0, cut, levels, &pieces[0], scratch) == LYNX_OK);
        code = lynx_hq_assemble(plan, levels, pieces, 2, p->size);
    } else {
        code = lynx_hq_encode_tile(&x->config, view, levels, p->size, plan, scratch);
    }
    REQUIRE(code == LYNX_OK || code == LYNX_STORED);
    for (int i = 0; i < p->count; i++) { /* exact sizes again */
        p->size[i] = code == LYNX_OK ? p->size[i] : 0;
        REQUIRE(p->size[i] <= x->bounds.level[i]);
        p->at[i] = bytes(p->size[i]);
        memcpy(p->at[i], levels[i], p->size[i]);
        free(levels[i]);
    }
    free(plan);
    return code == LYNX_OK;
}

static int decode(const shape *x, const payloads *p, int count, const lynx_view *view) {
    void *plan = bytes(x->bounds.plan);
    lynx_hq_fault fault;
    const uint8_t *at[3] = {p->at[0], p->at[1], p->at[2]};
    int code = lynx_hq_open(&x->config, at, p->size, count, plan, &fault);
    if (code == LYNX_OK) {
        code = lynx_hq_decode(plan, view, 0, x->bounds.blocks, scratch, &fault);
    }
    free(plan);
    return code;
}

static void release(payloads *p) {
    for (int i = 0; i < p->count; i++) {
        free(p->at[i]);
    }
}

static void make_words(script *s, uint16_t *words, size_t count) {
    const uint32_t kind = below(s, 5), centre = take(s, 2);
    uint64_t seed = take(s, 2);
    for (size_t i = 0; i < count; i++) {
        const uint32_t r = next_random(&seed);
        switch (kind) {
        case 0: words[i] = (uint16_t)r; break;
        case 1: words[i] = (uint16_t)(centre + r % 80); break;
        case 2: words[i] = (uint16_t)(r % 50 == 0 ? r >> 8 : centre); break;
        case 3: words[i] = (uint16_t)((0x3e00 + r % 0x280) | (r & 0x8000)); break;
        default: words[i] = (uint16_t)take(s, 2); break;
        }
    }
}

#endif
