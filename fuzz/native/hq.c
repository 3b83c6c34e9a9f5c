/* hq, both ways. A tile is encoded on every instruction set (same bytes) and decoded (exact). Then the input damages the
 * sections, by single bytes or by replacing them, and every instruction set must end the same: a refusal, or words. */
#include "common.h"

enum { FOLD_TABLE, ANCHOR, HEADERS, PARAMS, REST_TABLE, REST, RANK_TABLE, RANKS, SECTIONS };
#define MAX_CHANNELS (2 * 72)

typedef struct {
    uint8_t *at[SECTIONS];
    uint64_t size[SECTIONS];
} sections;

static void *scratch;

static sections encode(const lynx_hq_tile *tile, const lynx_hq_sizes *sizes, const uint16_t *words) {
    const bool rest_table = tile->fold && lynx_hq_folds_rest(tile);
    sections e = {.size = {tile->fold ? LYNX_HQ_FOLD_HEADER * sizes->blocks : 0, sizes->anchor,
                           LYNX_HQ_PARAM_HEADER * sizes->blocks, sizes->max_params,
                           rest_table ? LYNX_HQ_FOLD_HEADER * sizes->blocks : 0, sizes->rest,
                           LYNX_HQ_RANK_HEADER * sizes->blocks, sizes->max_rank}};
    for (int i = 0; i < SECTIONS; i++) {
        e.at[i] = bytes(e.size[i]);
        memset(e.at[i], 0, e.size[i]);
    }
    lynx_hq_encoded out = {.fold_table = e.at[FOLD_TABLE], .anchor = e.at[ANCHOR], .param_headers = e.at[HEADERS],
                           .params = e.at[PARAMS], .rest_table = e.at[REST_TABLE], .rest = e.at[REST],
                           .rank_table = e.at[RANK_TABLE], .rank = e.at[RANKS]};
    const ptrdiff_t row = tile->head_dim;
    REQUIRE(lynx_hq_encode(tile, words, row * (ptrdiff_t)tile->tokens, row, 0, sizes->blocks, &out, scratch) == LYNX_OK);
    REQUIRE(out.anchor_size <= e.size[ANCHOR] && out.params_size <= e.size[PARAMS] && out.rest_size <= e.size[REST] &&
            out.rank_size <= e.size[RANKS]);
    const uint64_t used[SECTIONS] = {e.size[FOLD_TABLE], out.anchor_size, e.size[HEADERS], out.params_size,
                                     e.size[REST_TABLE], out.rest_size, e.size[RANK_TABLE], out.rank_size};
    for (int i = 0; i < SECTIONS; i++) { /* exact sizes again */
        uint8_t *p = bytes(used[i]);
        memcpy(p, e.at[i], used[i]);
        free(e.at[i]);
        e.at[i] = p;
        e.size[i] = used[i];
    }
    return e;
}

static int decode(const lynx_hq_tile *tile, const lynx_hq_sizes *sizes, const sections *e, int levels, uint16_t *words) {
    const lynx_hq_levels l = {.fold_table = e->at[FOLD_TABLE], .anchor = e->at[ANCHOR], .param_headers = e->at[HEADERS],
                              .params = e->at[PARAMS], .rest_table = levels > 1 ? e->at[REST_TABLE] : NULL,
                              .rest = levels > 1 ? e->at[REST] : NULL,
                              .rank_table = levels > 2 ? e->at[RANK_TABLE] : NULL, .rank = e->at[RANKS],
                              .anchor_size = e->size[ANCHOR], .params_size = e->size[PARAMS],
                              .rest_size = e->size[REST], .rank_size = e->size[RANKS]};
    lynx_hq_fault fault;
    const int code = lynx_hq_check(tile, &l, &fault);
    const ptrdiff_t row = tile->head_dim;
    return code != LYNX_OK ? code
                           : lynx_hq_decode(tile, &l, words, row * (ptrdiff_t)tile->tokens, row, 0, sizes->blocks,
                                            scratch, &fault);
}

static void release(sections *e) {
    for (int i = 0; i < SECTIONS; i++) {
        free(e->at[i]);
    }
}

static bool equal(const sections *a, const sections *b) {
    for (int i = 0; i < SECTIONS; i++) {
        if (a->size[i] != b->size[i] || memcmp(a->at[i], b->at[i], a->size[i]) != 0) {
            return false;
        }
    }
    return true;
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

static void damage(script *s, sections *e, bool tables) {
    static const int first[8] = {PARAMS, HEADERS, ANCHOR, REST, RANK_TABLE, RANKS, FOLD_TABLE, REST_TABLE};
    for (uint32_t n = below(s, 6); n > 0; n--) {
        const int section = first[below(s, tables ? 8 : 6)];
        uint64_t *size = &e->size[section];
        switch (below(s, 8)) {
        case 0: { /* as long as the caller's other sections say, but with any content */
            for (uint64_t i = 0; i < *size && s->left > 0; i++) {
                e->at[section][i] = (uint8_t)take(s, 1);
            }
            break;
        }
        case 1: /* cut, where the size is the payload's to tell */
            if (section == PARAMS || section == RANKS || section == ANCHOR || section == REST) {
                const uint64_t shorter = *size == 0 ? 0 : take(s, 2) % *size;
                uint8_t *p = bytes(shorter);
                memcpy(p, e->at[section], shorter);
                free(e->at[section]);
                e->at[section] = p;
                *size = shorter;
            }
            break;
        default:
            if (*size > 0) {
                const uint64_t at = take(s, 2) % *size;
                e->at[section][at] = (uint8_t)take(s, 1);
            }
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (scratch == NULL) {
        scratch = bytes(lynx_hq_scratch_size());
    }
    script s = {data, size};
    uint8_t widths[MAX_CHANNELS];
    int8_t exponents[MAX_CHANNELS], biases[MAX_CHANNELS];
    static const uint32_t tokens[8] = {1, 7, 8, 9, 17, 33, 64, 67};
    lynx_hq_tile tile = {.dtype = (int32_t)below(&s, 2), .part = (int32_t)below(&s, 2), .heads = 1 + below(&s, 2),
                         .tokens = tokens[below(&s, 8)], .head_dim = 1 + below(&s, 72), .widths = widths,
                         .fold = (int32_t)below(&s, 2)};
    const uint32_t channels = tile.heads * tile.head_dim, mixed = below(&s, 2), width = below(&s, 9);
    uint64_t seed = take(&s, 2);
    for (uint32_t i = 0; i < channels; i++) {
        const bool alone = mixed && tile.part == LYNX_KEY; /* values of a group share their width */
        widths[i] = (uint8_t)(alone ? next_random(&seed) % 9 : width);
        exponents[i] = (int8_t)(next_random(&seed) % 16 - 8);
        biases[i] = (int8_t)(next_random(&seed) % 16 - 8);
    }
    tile.exponents = tile.part == LYNX_VALUE && tile.dtype == LYNX_BFLOAT16 && below(&s, 2) ? exponents : NULL;
    tile.biases = tile.part == LYNX_VALUE && tile.fold && below(&s, 2) ? biases : NULL;
    const size_t count = (size_t)channels * tile.tokens;
    lynx_hq_sizes sizes;
    if (lynx_hq_measure(&tile, &sizes) != LYNX_OK) {
        return 0;
    }
    uint16_t *words = bytes(2 * count);
    make_words(&s, words, count);

    int isas[4];
    const int available = instruction_sets(isas);
    sections reference = {{NULL}, {0}};
    for (int i = 0; i < available; i++) {
        REQUIRE(lynx_isa_select(isas[i]) == LYNX_OK);
        sections e = encode(&tile, &sizes, words);
        uint16_t *out = bytes(2 * count);
        REQUIRE(decode(&tile, &sizes, &e, 3, out) == LYNX_OK);
        REQUIRE(memcmp(words, out, 2 * count) == 0);
        free(out);
        if (i == 0) {
            reference = e;
        } else {
            REQUIRE(equal(&reference, &e));
            release(&e);
        }
    }

    const int levels = 1 + (int)below(&s, 3);
    damage(&s, &reference, tile.fold);
    uint16_t *expected = NULL;
    int refusal = LYNX_OK;
    for (int i = 0; i < available; i++) {
        REQUIRE(lynx_isa_select(isas[i]) == LYNX_OK);
        uint16_t *out = bytes(2 * count);
        memset(out, 0x5a, 2 * count);
        const int code = decode(&tile, &sizes, &reference, levels, out);
        REQUIRE(code != LYNX_ERR_ARGUMENT && code != LYNX_ERR_SPACE);
        if (i == 0) {
            expected = out;
            refusal = code;
            continue;
        }
        REQUIRE((code == LYNX_OK) == (refusal == LYNX_OK));
        REQUIRE(code != LYNX_OK || memcmp(expected, out, 2 * count) == 0);
        free(out);
    }
    free(expected);
    release(&reference);
    free(words);
    return 0;
}
