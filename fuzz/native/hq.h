/* Tiles of the hq targets: made from a script, encoded into sections of exact size, decoded. */
#ifndef FUZZ_HQ_H
#define FUZZ_HQ_H

#include "../../native/src/hq.h"
#include "common.h"

enum { FOLD_TABLE, ANCHOR, HEADERS, PARAMS, REST_TABLE, REST, RANK_TABLE, RANKS, SECTIONS };
#define MAX_CHANNELS (2 * 72)

typedef struct {
    uint8_t *at[SECTIONS];
    uint64_t size[SECTIONS];
} sections;

static void *scratch; /* made by the target */

/* Tiles that do not fold have no such table. */
static uint8_t *table(const sections *e, int section) {
    return e->size[section] > 0 ? e->at[section] : NULL;
}

static lynx_view dense(const lynx_tile *tile, const uint16_t *words) {
    return (lynx_view){.words = (uint16_t *)(uintptr_t)words, .token_stride = tile->head_dim,
                       .head_stride = (ptrdiff_t)tile->head_dim * (ptrdiff_t)tile->tokens};
}

static sections encode(const lynx_tile *tile, const lynx_sizes *sizes, const uint16_t *words) {
    const bool rest_table = lynx_folds_rest(tile);
    sections e = {.size = {tile->fold ? FOLD_HEADER * sizes->blocks : 0, sizes->anchor,
                           PARAM_HEADER * sizes->blocks, sizes->max_params,
                           rest_table ? FOLD_HEADER * sizes->blocks : 0, sizes->rest,
                           RANK_HEADER * sizes->blocks, sizes->max_rank}};
    for (int i = 0; i < SECTIONS; i++) {
        e.at[i] = bytes(e.size[i]);
        memset(e.at[i], 0, e.size[i]);
    }
    lynx_encoded out = {.fold_table = table(&e, FOLD_TABLE), .anchor = e.at[ANCHOR], .param_headers = e.at[HEADERS],
                           .params = e.at[PARAMS], .rest_table = table(&e, REST_TABLE), .rest = e.at[REST],
                           .rank_table = e.at[RANK_TABLE], .rank = e.at[RANKS]};
    const lynx_view view = dense(tile, words);
    lynx_encode(tile, &view, 0, sizes->blocks, &out, scratch);
    const lynx_hq_piece *made = &out.made;
    REQUIRE(made->anchor <= e.size[ANCHOR] && made->params <= e.size[PARAMS] && made->rest <= e.size[REST] &&
            made->rank <= e.size[RANKS]);
    const uint64_t used[SECTIONS] = {e.size[FOLD_TABLE], made->anchor, e.size[HEADERS], made->params,
                                     e.size[REST_TABLE], made->rest, e.size[RANK_TABLE], made->rank};
    for (int i = 0; i < SECTIONS; i++) { /* exact sizes again */
        uint8_t *p = bytes(used[i]);
        memcpy(p, e.at[i], used[i]);
        free(e.at[i]);
        e.at[i] = p;
        e.size[i] = used[i];
    }
    return e;
}

static int decode(const lynx_tile *tile, const lynx_sizes *sizes, const sections *e, int levels, uint16_t *words) {
    const lynx_levels l = {.fold_table = table(e, FOLD_TABLE), .anchor = e->at[ANCHOR], .param_headers = e->at[HEADERS],
                              .params = e->at[PARAMS], .rest_table = levels > 1 ? table(e, REST_TABLE) : NULL,
                              .rest = levels > 1 ? e->at[REST] : NULL,
                              .rank_table = levels > 2 ? e->at[RANK_TABLE] : NULL, .rank = e->at[RANKS],
                              .anchor_size = e->size[ANCHOR], .params_size = e->size[PARAMS],
                              .rest_size = e->size[REST], .rank_size = e->size[RANKS]};
    lynx_hq_fault fault;
    const int code = lynx_check(tile, &l, &fault);
    const lynx_view view = dense(tile, words);
    return code != LYNX_OK ? code : lynx_decode(tile, &l, &view, 0, sizes->blocks, scratch, &fault);
}

static void release(sections *e) {
    for (int i = 0; i < SECTIONS; i++) {
        free(e->at[i]);
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

/* What a script makes a tile of. `tile` points into this structure. */
typedef struct {
    lynx_tile tile;
    lynx_sizes sizes;
    size_t words;
    uint8_t widths[MAX_CHANNELS];
    int8_t exponents[MAX_CHANNELS], biases[MAX_CHANNELS];
} shape;

static bool make_shape(script *s, shape *x) {
    static const uint32_t tokens[8] = {1, 7, 8, 9, 17, 33, 64, 67};
    lynx_tile *tile = &x->tile;
    *tile = (lynx_tile){.dtype = (int32_t)below(s, 2), .part = (int32_t)below(s, 2), .heads = 1 + below(s, 2),
                           .tokens = tokens[below(s, 8)], .head_dim = 1 + below(s, 72), .widths = x->widths,
                           .fold = (int32_t)below(s, 2)};
    const uint32_t channels = tile->heads * tile->head_dim, mixed = below(s, 2), width = below(s, 9);
    uint64_t seed = take(s, 2);
    for (uint32_t i = 0; i < channels; i++) {
        const bool alone = mixed && tile->part == LYNX_KEY; /* values of a group share their width */
        x->widths[i] = (uint8_t)(alone ? next_random(&seed) % 9 : width);
        x->exponents[i] = (int8_t)(next_random(&seed) % 16 - 8);
        x->biases[i] = (int8_t)(next_random(&seed) % 16 - 8);
    }
    tile->exponents = tile->part == LYNX_VALUE && tile->dtype == LYNX_BFLOAT16 && below(s, 2) ? x->exponents : NULL;
    tile->biases = tile->part == LYNX_VALUE && tile->fold && below(s, 2) ? x->biases : NULL;
    x->words = (size_t)channels * tile->tokens;
    if (lynx_tile_is_bad(tile)) {
        return false;
    }
    lynx_measure(tile, 0, lynx_count_blocks(tile), &x->sizes);
    return true;
}

#endif
