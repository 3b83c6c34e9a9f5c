/* Bit planes of any tile, its rows with gaps, in a row or in pages: every instruction set packs the same bytes, and unpacking gives
 * the words back. */
#include "common.h"

#define MAX_PAGES 16

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    script s = {data, size};
    const int width = 1 << below(&s, 3);
    const bool large = below(&s, 16) == 0; /* mostly few words, which is fast */
    const uint32_t heads = 1 + below(&s, 2), tokens = 1 + below(&s, large ? 15 : 4);
    const uint32_t dim = 1 + below(&s, large ? 700 : 40), page = 1 + below(&s, 5), first_token = below(&s, page);
    const ptrdiff_t row = (ptrdiff_t)(dim + below(&s, 9));
    const bool is_paged = below(&s, 2), heads_first = below(&s, 2);
    const uint32_t room_tokens = is_paged ? (first_token + tokens + page - 1) / page * page : tokens;
    int64_t table[MAX_PAGES];
    for (uint32_t i = 0; i < room_tokens / page && i < MAX_PAGES; i++) {
        table[i] = (int64_t)(room_tokens / page - 1 - i);
    }
    REQUIRE(!is_paged || room_tokens / page <= MAX_PAGES);
    const int first = (int)below(&s, (uint32_t)(8 * width)), last = first + 1 + (int)below(&s, (uint32_t)(8 * width - first));
    const size_t extent = (size_t)row * room_tokens * heads * (size_t)width;
    const ptrdiff_t together = is_paged ? (ptrdiff_t)page : (ptrdiff_t)tokens; /* tokens of a head that lie together */
    lynx_view view = {.head_stride = heads_first ? row * together : row, .token_stride = heads_first ? row : row * (ptrdiff_t)heads};
    if (is_paged) {
        view.pages = table;
        view.page_stride = row * (ptrdiff_t)(page * heads);
        view.page_tokens = page;
        view.first_token = first_token;
    }
    uint8_t *words = bytes(extent);
    uint64_t seed = take(&s, 2);
    for (size_t i = 0; i < extent; i++) {
        words[i] = s.left > 0 ? (uint8_t)take(&s, 1) : (uint8_t)next_random(&seed);
    }
    const size_t count = (size_t)heads * tokens * dim, plane = (count + 7) / 8, packed = plane * (size_t)(last - first);
    int isas[4];
    const int available = instruction_sets(isas);
    uint8_t *reference = NULL;
    for (int i = 0; i < available; i++) {
        REQUIRE(lynx_isa_select(isas[i]) == LYNX_OK);
        uint8_t *planes = bytes(packed);
        view.words = words;
        uint8_t *to[32] = {NULL};
        const uint8_t *pointers[32] = {NULL};
        for (int p = first; p < last; p++) {
            pointers[p] = to[p] = planes + plane * (size_t)(p - first);
        }
        REQUIRE(lynx_bitplane_pack(&view, width, heads, tokens, dim, to) == LYNX_OK);
        REQUIRE(reference == NULL || memcmp(reference, planes, packed) == 0);
        uint8_t *out = bytes(extent), *was = bytes(count * (size_t)width), *is = bytes(count * (size_t)width);
        memcpy(out, words, extent);
        REQUIRE(lynx_view_gather(&view, width, heads, tokens, dim, was) == LYNX_OK);
        view.words = out;
        REQUIRE(lynx_bitplane_unpack(pointers, &view, width, heads, tokens, dim) == LYNX_OK);
        REQUIRE(lynx_view_gather(&view, width, heads, tokens, dim, is) == LYNX_OK);
        uint32_t mask = 0;
        for (int p = first; p < last; p++) {
            mask |= 1u << (8 * width - 1 - p);
        }
        for (size_t w = 0; w < count; w++) {
            uint32_t before = 0, after = 0;
            memcpy(&before, was + w * (size_t)width, (size_t)width);
            memcpy(&after, is + w * (size_t)width, (size_t)width);
            REQUIRE(after == (before & mask));
        }
        REQUIRE(lynx_view_scatter(&view, width, heads, tokens, dim, was) == LYNX_OK);
        REQUIRE(memcmp(out, words, extent) == 0); /* what lies between rows stayed */
        free(out);
        free(was);
        free(is);
        if (reference == NULL) {
            reference = planes;
        } else {
            free(planes);
        }
    }
    free(reference);
    free(words);
    return 0;
}
