/* hq there and back: every instruction set encodes a tile into the same bytes, and decodes them exactly. */
#include "hq.h"

static bool equal(const sections *a, const sections *b) {
    for (int i = 0; i < SECTIONS; i++) {
        if (a->size[i] != b->size[i] || memcmp(a->at[i], b->at[i], a->size[i]) != 0) {
            return false;
        }
    }
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (scratch == NULL) {
        scratch = bytes(lynx_hq_scratch_size());
    }
    script s = {data, size};
    shape x;
    if (!make_shape(&s, &x)) {
        return 0;
    }
    uint16_t *words = bytes(2 * x.words);
    make_words(&s, words, x.words);
    int isas[4];
    const int available = instruction_sets(isas);
    sections reference = {{NULL}, {0}};
    for (int i = 0; i < available; i++) {
        REQUIRE(lynx_isa_select(isas[i]) == LYNX_OK);
        sections e = encode(&x.tile, &x.sizes, words);
        uint16_t *out = bytes(2 * x.words);
        REQUIRE(decode(&x.tile, &x.sizes, &e, 3, out) == LYNX_OK);
        REQUIRE(memcmp(words, out, 2 * x.words) == 0);
        free(out);
        REQUIRE(i == 0 || equal(&reference, &e));
        if (i == 0) {
            reference = e;
        } else {
            release(&e);
        }
    }
    release(&reference);
    free(words);
    return 0;
}
