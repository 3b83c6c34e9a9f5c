/* Round trips and hostile payloads on every instruction set of the machine. Meant to run under sanitizers: every buffer
 * has its exact size on the heap, so that a byte read or written beyond it is found. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../src/hq.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

static uint64_t state = 88172645463325252ull;

/* Of all bytes made and words decoded: the same on every instruction set and architecture. */
static uint64_t digest;

static void digest_bytes(const void *p, uint64_t n) { /* FNV-1a */
    for (uint64_t i = 0; i < n; i++) {
        digest = (digest ^ ((const uint8_t *)p)[i]) * 0x100000001b3ull;
    }
}

static uint32_t draw(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 33) % below;
}

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static void *bytes(uint64_t n) {
    void *p = malloc(n == 0 ? 1 : (size_t)n);
    CHECK(p != NULL);
    return p;
}

static void *copy(const void *from, uint64_t n) {
    return from == NULL ? NULL : memcpy(bytes(n), from, (size_t)n); /* sections that are not there stay so */
}

static bool same(const void *a, const void *b, uint64_t n) {
    return n == 0 || memcmp(a, b, (size_t)n) == 0;
}

enum { ANCHOR, HEADERS, PARAMS, REST, RANK_TABLE, RANKS, FOLD_TABLE, REST_TABLE, SECTIONS };

typedef struct {
    uint8_t *section[SECTIONS];
    uint64_t size[SECTIONS];
} encoded;

/* Sections that tiles do not have are null. */
static bool is_there(const lynx_tile *tile, int section) {
    return (section != FOLD_TABLE || tile->fold) && (section != REST_TABLE || lynx_folds_rest(tile));
}

static bool is_variable(int section) {
    return section == ANCHOR || section == PARAMS || section == REST || section == RANKS;
}

static lynx_levels levels_of(const encoded *e, int count) {
    lynx_levels levels = {.fold_table = e->section[FOLD_TABLE],
                             .anchor = e->section[ANCHOR],
                             .param_headers = e->section[HEADERS],
                             .params = e->section[PARAMS],
                             .rest_table = count > 1 ? e->section[REST_TABLE] : NULL,
                             .rest = count > 1 ? e->section[REST] : NULL,
                             .rank_table = count > 2 ? e->section[RANK_TABLE] : NULL,
                             .rank = e->section[RANKS],
                             .anchor_size = e->size[ANCHOR],
                             .params_size = e->size[PARAMS],
                             .rest_size = e->size[REST],
                             .rank_size = e->size[RANKS]};
    return levels;
}

static lynx_view dense(uint32_t tokens, uint32_t dim, const uint16_t *words) {
    return (lynx_view){.words = (uint16_t *)(uintptr_t)words, .token_stride = dim, .head_stride = (ptrdiff_t)dim * (ptrdiff_t)tokens};
}

/* In two ranges, as threads do; the second first. */
static encoded encode(const lynx_tile *tile, const uint16_t *words, uint64_t cut, void *scratch) {
    lynx_sizes all;
    lynx_measure(tile, 0, lynx_count_blocks(tile), &all);
    const uint64_t cuts[3] = {0, cut % (all.blocks + 1), all.blocks};
    const lynx_view view = dense(tile->tokens, tile->head_dim, words);
    encoded parts[2];
    for (int part = 1; part >= 0; part--) {
        lynx_sizes own;
        lynx_measure(tile, cuts[part], cuts[part + 1], &own);
        encoded *e = &parts[part];
        *e = (encoded){.size = {own.anchor, PARAM_HEADER * own.blocks, own.max_params, own.rest,
                                RANK_HEADER * own.blocks, own.max_rank,
                                tile->fold ? FOLD_HEADER * own.blocks : 0,
                                lynx_folds_rest(tile) ? FOLD_HEADER * own.blocks : 0}};
        for (int i = 0; i < SECTIONS; i++) {
            e->section[i] = is_there(tile, i) ? bytes(e->size[i]) : NULL;
        }
        lynx_encoded out = {.fold_table = e->section[FOLD_TABLE],
                               .anchor = e->section[ANCHOR],
                               .param_headers = e->section[HEADERS],
                               .params = e->section[PARAMS],
                               .rest_table = e->section[REST_TABLE],
                               .rest = e->section[REST],
                               .rank_table = e->section[RANK_TABLE],
                               .rank = e->section[RANKS],
                               .anchor_left = own.anchor,
                               .rest_left = own.rest};
        lynx_encode(tile, &view, cuts[part], cuts[part + 1], NULL, false, &out, scratch);
        lynx_encoded bound = {.wants_rank_bound = 1};
        lynx_encode(tile, &view, cuts[part], cuts[part + 1], NULL, false, &bound, scratch);
        lynx_encoded enough = {.wants_rank_bound = 1,
                               .rank_most = RANK_HEADER * own.blocks + own.max_rank,
                               .rank_room = bound.made.rank_bound + 1 + own.max_rank / 4};
        lynx_encode(tile, &view, cuts[part], cuts[part + 1], NULL, false, &enough, scratch);
        const lynx_hq_piece *made = &out.made;
        CHECK(enough.made.rank_bound >= made->rank_bound && enough.made.rank_bound < enough.rank_room &&
              enough.made.rank_bound == enough.rank_most);
        CHECK(bound.made.rank_bound >= made->rank_bound && bound.made.params == made->params);
        CHECK(made->rank_bound == made->rank + RANK_HEADER * own.blocks);
        CHECK(made->rest <= e->size[REST] && (e->section[REST_TABLE] != NULL || made->rest == e->size[REST]));
        CHECK(made->anchor <= e->size[ANCHOR] && (tile->fold || made->anchor == e->size[ANCHOR]));
        e->size[ANCHOR] = made->anchor;
        e->size[PARAMS] = made->params;
        e->size[REST] = made->rest;
        e->size[RANKS] = made->rank;
    }
    encoded joined;
    for (int i = 0; i < SECTIONS; i++) {
        joined.size[i] = parts[0].size[i] + parts[1].size[i];
        joined.section[i] = is_there(tile, i) ? bytes(joined.size[i]) : NULL;
        for (int part = 0; part < 2 && is_there(tile, i); part++) {
            memcpy(joined.section[i] + part * parts[0].size[i], parts[part].section[i], parts[part].size[i]);
        }
        free(parts[0].section[i]);
        free(parts[1].section[i]);
    }
    return joined;
}

static void release(encoded *e) {
    for (int i = 0; i < SECTIONS; i++) {
        free(e->section[i]);
    }
}

static int decode(const lynx_tile *tile, const encoded *e, int count, uint16_t *words, void *scratch) {
    const lynx_levels levels = levels_of(e, count);
    const lynx_view view = dense(tile->tokens, tile->head_dim, words);
    lynx_hq_fault fault;
    const int error = lynx_check(tile, &levels, &fault);
    return error != LYNX_OK ? error
                            : lynx_decode(tile, &levels, &view, 0, lynx_count_blocks(tile), scratch, &fault);
}

static uint16_t word_of(int kind, uint32_t i) {
    switch (kind) {
    case 0: /* around one, both signs */
        return (uint16_t)(0x3e00 + draw(0x280) + (draw(2) << 15));
    case 1: /* anything */
        return (uint16_t)draw(1 << 16);
    case 2: /* mostly tame, now and then a NaN, an infinity or a zero */
        return draw(200) == 0 ? (uint16_t)(0x7f80 + draw(0x8080)) : (uint16_t)(0x3f00 + draw(0x100));
    case 3: /* constant runs */
        return (uint16_t)(i / 700 % 3 == 0 ? 0x7fc1 : 0x3f80 + draw(3));
    case 4: /* many binades */
        return (uint16_t)(draw(0x7e00) + (draw(2) << 15));
    default: /* far from zero */
        return (uint16_t)(0x42c0 + draw(16));
    }
}

/* Bytes and words do not change when denormals are flushed to zero, on input and output. */
static void flush_to_zero(const lynx_tile *tile, const encoded *plain, const uint16_t *words, uint16_t *out,
                          void *scratch) {
#if defined(__x86_64__)
    const uint32_t before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    encoded e = encode(tile, words, 0, scratch);
    for (int i = 0; i < SECTIONS; i++) {
        CHECK(e.size[i] == plain->size[i] && same(e.section[i], plain->section[i], e.size[i]));
    }
    const uint64_t values = (uint64_t)tile->heads * tile->tokens * tile->head_dim;
    uint16_t *flushed = bytes(2 * values);
    for (int count = 1; count <= 3; count++) {
        _mm_setcsr(before);
        CHECK(decode(tile, &e, count, out, scratch) == LYNX_OK);
        _mm_setcsr(before | 0x8040);
        CHECK(decode(tile, &e, count, flushed, scratch) == LYNX_OK);
        CHECK(memcmp(out, flushed, 2 * (size_t)values) == 0);
    }
    _mm_setcsr(before);
    free(flushed);
    release(&e);
#else
    (void)tile, (void)plain, (void)words, (void)out, (void)scratch;
#endif
}

/* The quantiser's one-step rounding is exact: every significand of s against every one of x, of 8 and of 11 bits. */
static void quantiser(void) {
    for (int64_t s = 128; s < 256; s++) {
        const float inverse = 1.0f / (float)(s << 12) * (1.0f + 0x1.8p-22f);
        for (int bits = 8; bits <= 11; bits += 3) {
            for (int64_t x = 1ll << (bits - 1); x < 1ll << bits; x++) {
                for (int shift = 0; shift < 24; shift++) {
                    const int64_t k = (2 * (x << shift) + (s << 12)) / (2 * (s << 12));
                    CHECK(k > 1290 || quantised((float)(x << shift), inverse) == k);
                }
            }
        }
    }
}

static const uint32_t DIMS[] = {1, 8, 40, 64, 80, 96, 128}, TOKENS[] = {1, 7, 33, 64, 65, 130};

static void hq(int isa, int round, void *scratch) {
    const uint32_t heads = 1 + draw(2), tokens = TOKENS[draw(6)], dim = DIMS[draw(7)];
    const uint64_t values = (uint64_t)heads * tokens * dim;
    uint8_t *widths = bytes((uint64_t)heads * dim);
    int8_t *exponents = bytes((uint64_t)heads * dim);
    lynx_tile tile = {(int32_t)draw(2), (int32_t)draw(2), heads, tokens, dim, widths, NULL, NULL, (int32_t)draw(2)};
    const bool mixed = tile.part == LYNX_KEY && draw(2);
    const uint8_t width = (uint8_t)draw(9);
    for (uint32_t i = 0; i < heads * dim; i++) {
        widths[i] = mixed ? (uint8_t)draw(9) : width;
    }
    if (tile.dtype == LYNX_BFLOAT16 && draw(2)) {
        for (uint32_t i = 0; i < heads * dim; i++) {
            exponents[i] = (int8_t)((int)draw(16) - 8);
        }
        tile.exponents = exponents;
        tile.biases = draw(2) ? exponents : NULL; /* any numbers do */
    }
    uint16_t *words = bytes(2 * values), *out = bytes(2 * values), *other = bytes(2 * values);
    const int kind = round % 6;
    for (uint64_t i = 0; i < values; i++) {
        words[i] = word_of(kind, (uint32_t)i);
    }
    const uint64_t cut = draw(1000);
    CHECK(lynx_isa_select(LYNX_ISA_SCALAR) == LYNX_OK);
    encoded plain = encode(&tile, words, cut, scratch);
    CHECK(lynx_isa_select(isa) == LYNX_OK);
    encoded e = encode(&tile, words, cut, scratch);
    for (int i = 0; i < SECTIONS; i++) {
        CHECK(e.size[i] == plain.size[i] && same(e.section[i], plain.section[i], e.size[i]));
    }
    for (int count = 1; count <= 3; count++) {
        CHECK(lynx_isa_select(LYNX_ISA_SCALAR) == LYNX_OK);
        CHECK(decode(&tile, &e, count, other, scratch) == LYNX_OK);
        CHECK(lynx_isa_select(isa) == LYNX_OK);
        CHECK(decode(&tile, &e, count, out, scratch) == LYNX_OK);
        CHECK(memcmp(out, other, 2 * (size_t)values) == 0);
        digest_bytes(out, 2 * values);
    }
    CHECK(memcmp(out, words, 2 * (size_t)values) == 0);
    for (int i = 0; i < SECTIONS; i++) {
        digest_bytes(e.section[i], e.size[i]);
    }
    flush_to_zero(&tile, &plain, words, out, scratch);
    for (int mutation = 0; mutation < 12; mutation++) {
        encoded bad = plain;
        for (int i = 0; i < SECTIONS; i++) {
            uint64_t size = plain.size[i];
            if (draw(8) == 0 && is_variable(i)) { /* the other sections' sizes follow from the tile */
                size = draw((uint32_t)size + 1);
            }
            bad.section[i] = copy(plain.section[i], size);
            bad.size[i] = size;
            for (uint32_t hits = size == 0 ? 0 : draw(4); hits > 0; hits--) {
                bad.section[i][draw((uint32_t)size)] = (uint8_t)draw(256); /* sections that are not there have no size */
            }
        }
        const int count = 1 + (int)draw(3);
        CHECK(lynx_isa_select(LYNX_ISA_SCALAR) == LYNX_OK);
        const int expected = decode(&tile, &bad, count, other, scratch);
        CHECK(lynx_isa_select(isa) == LYNX_OK);
        const int got = decode(&tile, &bad, count, out, scratch);
        CHECK(got == expected);
        CHECK(got != LYNX_OK || memcmp(out, other, 2 * (size_t)values) == 0);
        release(&bad);
    }
    release(&plain);
    release(&e);
    free(widths);
    free(exponents);
    free(words);
    free(out);
    free(other);
}

/* Payloads: the same from contiguous words and from pages, and back to either; and hostile ones. */
static void payloads(int isa, void *scratch) {
    const uint32_t heads = 1 + draw(2), tokens = TOKENS[draw(6)], dim = DIMS[draw(7)];
    const uint64_t values = (uint64_t)heads * tokens * dim;
    uint8_t *widths = bytes((uint64_t)heads * dim);
    memset(widths, (int)draw(9), (size_t)heads * dim);
    lynx_hq_config config = {(int32_t)draw(2), (int32_t)draw(2), heads, tokens, dim, 1 + (int32_t)draw(3), (int32_t)draw(2),
                             (int32_t)draw(2), widths, 0};
    if (config.part == LYNX_KEY && draw(2)) {
        config.widths = NULL;
        config.range_bits = draw(8 * heads * dim);
    }
    /* Pages in reversed order, with a gap behind each token, and the first tokens of the first page not the tile's. */
    const uint32_t page = 1 + draw(40), first = draw(page), pages = (first + tokens + page - 1) / page;
    const ptrdiff_t token_stride = (ptrdiff_t)dim + 3, head_stride = token_stride * page, page_stride = head_stride * heads;
    int64_t *ids = bytes(8 * (uint64_t)pages);
    for (uint32_t i = 0; i < pages; i++) {
        ids[i] = pages - 1 - i;
    }
    const uint64_t room = 2 * (uint64_t)page_stride * pages;
    uint16_t *words = bytes(2 * values), *out = bytes(2 * values), *paged = bytes(room), *other = bytes(room);
    const int kind = (int)draw(6);
    for (uint64_t i = 0; i < values; i++) {
        words[i] = word_of(kind, (uint32_t)i);
    }
    const lynx_view plain = dense(tokens, dim, words), back = dense(tokens, dim, out);
    const lynx_view view = {paged, head_stride, token_stride, ids, page_stride, page, first};
    const lynx_view there = {other, head_stride, token_stride, ids, page_stride, page, first};
    memset(paged, 7, (size_t)room);
    memset(other, 7, (size_t)room);
    CHECK(lynx_view_scatter(&view, 2, heads, tokens, dim, words) == LYNX_OK);
    CHECK(lynx_view_gather(&view, 2, heads, tokens, dim, out) == LYNX_OK && memcmp(out, words, 2 * (size_t)values) == 0);
    lynx_hq_bounds bounds;
    CHECK(lynx_hq_measure(&config, &bounds) == LYNX_OK);
    void *plan = bytes(bounds.plan);
    uint8_t *levels[2][3];
    uint64_t sizes[2][3] = {{0}};
    int found[2];
    for (int i = 0; i < 2; i++) { /* pages all at once, contiguous words in two pieces */
        CHECK(lynx_isa_select(i ? isa : LYNX_ISA_SCALAR) == LYNX_OK);
        for (int level = 0; level < 3; level++) {
            levels[i][level] = level < config.levels ? bytes(bounds.level[level]) : NULL;
        }
        const lynx_view *from = i ? &view : &plain;
        if (i) {
            found[i] = lynx_hq_encode_tile(&config, from, levels[i], sizes[i], plan, scratch);
            continue;
        }
        lynx_hq_piece pieces[2];
        CHECK(lynx_hq_prepare(&config, from, plan, scratch) == LYNX_OK);
        const uint64_t cut = draw((uint32_t)bounds.blocks + 1);
        CHECK(lynx_hq_encode(plan, from, cut, bounds.blocks, levels[i], &pieces[1], scratch) == LYNX_OK);
        CHECK(lynx_hq_encode(plan, from, 0, cut, levels[i], &pieces[0], scratch) == LYNX_OK);
        found[i] = lynx_hq_assemble(plan, levels[i], pieces, 2, sizes[i]);
    }
    CHECK(found[0] == found[1] && (found[0] == LYNX_OK || found[0] == LYNX_STORED));
    if (found[0] == LYNX_STORED) {
        uint8_t *stored[3] = {NULL};
        uint64_t stored_sizes[3];
        for (int level = 0; level < config.levels; level++) {
            stored[level] = bytes(8 + (level == 0 ? 2 * values : 0));
            CHECK(lynx_hq_store(&config, &view, level, stored[level], &stored_sizes[level]) == LYNX_OK);
            CHECK(stored_sizes[level] == 8 + (level == 0 ? 2 * values : 0));
        }
        lynx_hq_fault fault;
        const uint8_t *const in[3] = {stored[0], stored[1], stored[2]};
        CHECK(lynx_hq_open(&config, in, stored_sizes, config.levels, plan, &fault) == LYNX_STORED);
        CHECK(memcmp(stored[0] + 8, words, 2 * (size_t)values) == 0);
        CHECK(lynx_hq_store(&config, &view, config.levels, stored[0], stored_sizes) == LYNX_ERR_ARGUMENT);
        for (int level = 0; level < config.levels; level++) {
            free(stored[level]);
        }
    }
    for (int count = 1; count <= config.levels && found[0] == LYNX_OK; count++) {
        const uint8_t *in[3] = {NULL};
        for (int level = 0; level < count; level++) {
            CHECK(sizes[0][level] == sizes[1][level] && sizes[0][level] <= bounds.level[level]);
            CHECK(memcmp(levels[0][level], levels[1][level], (size_t)sizes[0][level]) == 0);
            in[level] = copy(levels[0][level], sizes[0][level]);
        }
        lynx_hq_fault fault;
        CHECK(lynx_hq_open(&config, in, sizes[0], count, plan, &fault) == LYNX_OK);
        CHECK(lynx_hq_decode(plan, &there, 0, bounds.blocks, scratch, &fault) == LYNX_OK);
        CHECK(lynx_hq_decode_tile(&config, in, sizes[0], count, &back, plan, scratch, &fault) == LYNX_OK);
        uint16_t *gathered = bytes(2 * values);
        CHECK(lynx_view_gather(&there, 2, heads, tokens, dim, gathered) == LYNX_OK);
        CHECK(memcmp(gathered, out, 2 * (size_t)values) == 0);
        free(gathered);
        if (count == config.levels && count > 1) {
            CHECK(memcmp(out, words, 2 * (size_t)values) == 0 && memcmp(other, paged, (size_t)room) == 0);
        }
        for (int mutation = 0; mutation < 6; mutation++) {
            uint8_t *bad[3] = {NULL};
            uint64_t bad_sizes[3] = {0};
            for (int level = 0; level < count; level++) {
                bad_sizes[level] = sizes[0][level] - (draw(6) == 0 ? draw((uint32_t)sizes[0][level] + 1) : 0);
                bad[level] = copy(in[level], bad_sizes[level]);
                for (uint32_t hits = bad_sizes[level] == 0 ? 0 : draw(4); hits > 0; hits--) {
                    bad[level][draw(draw(2) ? 40 : 1u << 30) % bad_sizes[level]] = (uint8_t)draw(256);
                }
            }
            const uint8_t *const broken[3] = {bad[0], bad[1], bad[2]};
            int error = lynx_hq_open(&config, broken, bad_sizes, count, plan, &fault);
            error = error != LYNX_OK ? error : lynx_hq_decode(plan, &there, 0, bounds.blocks, scratch, &fault);
            const bool good = error == LYNX_OK || error == LYNX_STORED;
            CHECK(good || (error >= LYNX_ERR_TRUNCATED && fault.level < count && fault.offset <= bad_sizes[fault.level]));
            for (int level = 0; level < count; level++) {
                free(bad[level]);
            }
        }
        for (int level = 0; level < count; level++) {
            free((void *)(uintptr_t)in[level]);
        }
    }
    for (int i = 0; i < 6; i++) {
        free(levels[i / 3][i % 3]);
    }
    free(plan);
    free(ids);
    free(words);
    free(out);
    free(paged);
    free(other);
    free(widths);
}

/* Planes: the same from rows and from pages, and back to either. */
static void bitplane(int isa) {
    const int word_bytes = 1 << draw(3);
    const uint32_t heads = 1 + draw(3), tokens = 1 + draw(30), dim = 1 + draw(draw(8) == 0 ? 3000 : 150);
    const uint64_t values = (uint64_t)heads * tokens * dim, n = values * (uint64_t)word_bytes;
    const size_t plane = (size_t)(values + 7) / 8;
    const uint32_t page = 1 + draw(20), first_token = draw(page), pages = (first_token + tokens + page - 1) / page;
    const ptrdiff_t row = (ptrdiff_t)dim + (ptrdiff_t)draw(2), page_stride = row * page * heads;
    const bool heads_first = draw(2);
    int64_t *ids = bytes(8 * (uint64_t)pages);
    for (uint32_t i = 0; i < pages; i++) {
        ids[i] = pages - 1 - i;
    }
    const uint64_t room = (uint64_t)page_stride * pages * (uint64_t)word_bytes;
    uint8_t *words = bytes(n), *out = bytes(n), *paged = bytes(room), *other = bytes(room);
    for (uint64_t i = 0; i < n; i++) {
        words[i] = (uint8_t)draw(256);
    }
    memset(paged, 7, (size_t)room);
    memset(other, 7, (size_t)room);
    const lynx_view flat = {words, (ptrdiff_t)dim * tokens, dim, NULL, 0, 0, 0};
    lynx_view view = {paged, heads_first ? row * page : row, heads_first ? row : row * heads, ids, page_stride, page,
                      first_token};
    CHECK(lynx_view_scatter(&view, word_bytes, heads, tokens, dim, words) == LYNX_OK);
    const int all = 8 * word_bytes, cut = (int)draw((uint32_t)all + 1);
    uint8_t *first[2], *second[2];
    for (int i = 0; i < 2; i++) {
        CHECK(lynx_isa_select(i ? isa : LYNX_ISA_SCALAR) == LYNX_OK);
        first[i] = bytes(plane * (size_t)cut);
        second[i] = bytes(plane * (size_t)(all - cut));
        const lynx_view *from = i ? &view : &flat;
        uint8_t *upper[32] = {NULL}, *lower[32] = {NULL};
        const uint8_t *planes[32] = {NULL};
        for (int p = 0; p < all; p++) {
            uint8_t **half = p < cut ? upper : lower;
            planes[p] = half[p] = p < cut ? first[i] + plane * (size_t)p : second[i] + plane * (size_t)(p - cut);
        }
        CHECK(lynx_bitplane_pack(from, word_bytes, heads, tokens, dim, upper) == LYNX_OK);
        CHECK(lynx_bitplane_pack(from, word_bytes, heads, tokens, dim, lower) == LYNX_OK);
        lynx_view to = flat;
        to.words = out;
        CHECK(lynx_bitplane_unpack(planes, &to, word_bytes, heads, tokens, dim) == LYNX_OK);
        CHECK(memcmp(out, words, (size_t)n) == 0);
        to = view;
        to.words = other;
        CHECK(lynx_bitplane_unpack(planes, &to, word_bytes, heads, tokens, dim) == LYNX_OK);
        CHECK(memcmp(other, paged, (size_t)room) == 0); /* what lies between rows stays */
    }
    CHECK(memcmp(first[0], first[1], plane * (size_t)cut) == 0);
    CHECK(memcmp(second[0], second[1], plane * (size_t)(all - cut)) == 0);
    view.page_tokens = 0;
    uint8_t *none[32] = {NULL};
    CHECK(lynx_bitplane_pack(&view, word_bytes, heads, tokens, dim, none) == LYNX_ERR_ARGUMENT);
    CHECK(lynx_bitplane_pack(&flat, 3, heads, tokens, dim, none) == LYNX_ERR_ARGUMENT);
    CHECK(lynx_bitplane_pack(&flat, word_bytes, heads, 0, dim, none) == LYNX_ERR_ARGUMENT);
    for (int i = 0; i < 2; i++) {
        free(first[i]);
        free(second[i]);
    }
    free(ids);
    free(words);
    free(out);
    free(paged);
    free(other);
}

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 300;
    void *scratch = bytes(lynx_hq_scratch_size());
    CHECK(lynx_abi_version() == LYNX_ABI_VERSION);
    CHECK(lynx_isa_select(99) == LYNX_ERR_ARGUMENT);
    quantiser();
    const uint64_t seed = state;
    uint64_t first = 0;
    int tested = 0;
    for (int isa = LYNX_ISA_SCALAR; isa <= LYNX_ISA_NEON; isa++) {
        if (lynx_isa_select(isa) != LYNX_OK) {
            continue;
        }
        state = seed;
        digest = 0xcbf29ce484222325ull;
        for (int round = 0; round < rounds; round++) {
            hq(isa, round, scratch);
            bitplane(isa);
            payloads(isa, scratch);
        }
        first = tested++ == 0 ? digest : first;
        CHECK(digest == first);
    }
    free(scratch);
    printf("ok: %d rounds on %d instruction set(s); digest:\n%016llx\n", rounds, tested, (unsigned long long)first);
    return 0;
}
