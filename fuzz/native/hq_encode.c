/* hq there and back: every instruction set encodes a tile into the same payloads, from words in a row and from pages, in one
 * piece or two, and decodes them exactly into either. */
#include "hq.h"

/* The same words in pages of a few tokens, in a scrambled order, with a gap between rows. */
typedef struct {
    lynx_view view;
    uint16_t *memory;
    size_t size;
    int64_t table[MAX_PAGES];
} paged;

static void make_pages(script *s, const shape *x, paged *p) {
    const uint32_t page_tokens = 1 + below(s, 20), first = below(s, page_tokens), gap = below(s, 3);
    const uint32_t pages = (first + x->config.tokens + page_tokens - 1) / page_tokens;
    REQUIRE(pages <= MAX_PAGES);
    const bool heads_first = below(s, 2);
    const ptrdiff_t row = (ptrdiff_t)(x->config.head_dim + gap);
    const ptrdiff_t page = row * page_tokens * (ptrdiff_t)x->config.heads;
    p->size = 2 * (size_t)page * pages;
    p->memory = bytes(p->size);
    memset(p->memory, 0x77, p->size);
    for (uint32_t i = 0; i < pages; i++) {
        p->table[i] = (int64_t)(pages - 1 - i);
    }
    p->view = (lynx_view){.words = p->memory, .pages = p->table, .page_stride = page, .page_tokens = page_tokens,
                          .first_token = first, .head_stride = heads_first ? row * page_tokens : row,
                          .token_stride = heads_first ? row : row * (ptrdiff_t)x->config.heads};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (scratch == NULL) {
        scratch = bytes(lynx_hq_scratch_size());
    }
    script s = {data, size};
    shape x;
    paged pages;
    if (!make_shape(&s, &x)) {
        return 0;
    }
    make_pages(&s, &x, &pages);
    const bool halves = below(&s, 2);
    uint16_t *words = bytes(2 * x.words), *out = bytes(2 * x.words);
    make_words(&s, words, x.words);
    const lynx_view row = row_view(&x, words), row_out = row_view(&x, out);
    REQUIRE(lynx_view_scatter(&pages.view, 2, x.config.heads, x.config.tokens, x.config.head_dim, words) == LYNX_OK);
    uint16_t *before = bytes(pages.size);
    memcpy(before, pages.memory, pages.size);

    int isas[4];
    const int available = instruction_sets(isas);
    payloads reference = {.count = 0};
    bool coded = false;
    for (int i = 0; i < available; i++) {
        REQUIRE(lynx_isa_select(isas[i]) == LYNX_OK);
        payloads p;
        const bool now = encode(&x, i % 2 ? &pages.view : &row, halves && i > 0, &p);
        REQUIRE(i == 0 || now == coded);
        if (now) {
            REQUIRE(decode(&x, &p, p.count, &row_out) == LYNX_OK);
            REQUIRE(p.count == 1 || memcmp(words, out, 2 * x.words) == 0);
            if (p.count > 1) { /* exact in place: what lies between rows stays */
                REQUIRE(decode(&x, &p, p.count, &pages.view) == LYNX_OK);
                REQUIRE(memcmp(before, pages.memory, pages.size) == 0);
            }
        }
        for (int level = 0; i > 0 && level < p.count; level++) {
            REQUIRE(p.size[level] == reference.size[level]);
            REQUIRE(memcmp(p.at[level], reference.at[level], p.size[level]) == 0);
        }
        if (i == 0) {
            reference = p;
            coded = now;
        } else {
            release(&p);
        }
    }
    release(&reference);
    free(before);
    free(pages.memory);
    free(words);
    free(out);
    return 0;
}
