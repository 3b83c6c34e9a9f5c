/* Damaged payloads: a decoder refuses them or makes words of them, the same on every instruction set, and touches no byte
 * outside its buffers. Genuine tiles are made once and kept, so that nearly all the time goes into decoding. */
#include "hq.h"

#define TILES 512

typedef struct {
    shape x;
    payloads p;
} genuine;

/* Tile `number`, the same in every run: its shape and words are drawn from the number. */
static const genuine *tile_of(uint32_t number) {
    static genuine *made[TILES];
    uint64_t seed = number;
    while (made[number] == NULL) {
        uint8_t random[64];
        for (size_t i = 0; i < sizeof random; i++) {
            random[i] = (uint8_t)next_random(&seed);
        }
        random[3] = (uint8_t)(number % 16 == 0 ? random[3] : random[3] % 5); /* mostly few tokens, which is fast */
        script s = {random, sizeof random};
        genuine *g = bytes(sizeof *g);
        bool coded = make_shape(&s, &g->x);
        if (coded) {
            g->x.config.widths = g->x.config.widths == NULL ? NULL : g->x.widths;
            uint16_t *words = bytes(2 * g->x.words);
            make_words(&s, words, g->x.words);
            const lynx_view view = row_view(&g->x, words);
            coded = encode(&g->x, &view, false, &g->p);
            free(words);
            if (!coded) {
                release(&g->p);
            }
        }
        if (coded) {
            made[number] = g;
        } else {
            free(g);
        }
    }
    return made[number];
}

static payloads copy(const payloads *from) {
    payloads to = *from;
    for (int i = 0; i < to.count; i++) {
        to.at[i] = bytes(to.size[i]);
        memcpy(to.at[i], from->at[i], to.size[i]);
    }
    return to;
}

static void damage(script *s, payloads *p) {
    for (uint32_t n = below(s, 6); n > 0; n--) {
        const int level = (int)below(s, (uint32_t)p->count);
        uint64_t *size = &p->size[level];
        const uint32_t what = below(s, 16);
        if (what == 0) { /* cut */
            const uint64_t shorter = *size == 0 ? 0 : take(s, 2) % *size;
            uint8_t *less = bytes(shorter);
            memcpy(less, p->at[level], shorter);
            free(p->at[level]);
            p->at[level] = less;
            *size = shorter;
        } else if (what == 1) { /* as long, with any content from somewhere on */
            for (uint64_t i = *size == 0 ? 0 : take(s, 2) % *size; i < *size && s->left > 0; i++) {
                p->at[level][i] = (uint8_t)take(s, 1);
            }
        } else if (*size > 0) { /* one byte: half of the time in the headers and tables at the beginning */
            const uint64_t at = (what < 8 ? take(s, 1) : take(s, 2)) % *size;
            p->at[level][at] = (uint8_t)take(s, 1);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (scratch == NULL) {
        scratch = bytes(lynx_hq_scratch_size());
    }
    script s = {data, size};
    int isas[4];
    const int available = instruction_sets(isas);
    const genuine *g = tile_of(take(&s, 2) % TILES);
    const int levels = 1 + (int)below(&s, (uint32_t)g->p.count), first = (int)below(&s, (uint32_t)available);
    const bool compare = below(&s, 4) == 0;
    payloads p = copy(&g->p);
    damage(&s, &p);
    uint16_t *expected = NULL;
    int refusal = LYNX_OK;
    for (int i = 0; i < (compare ? available : 1); i++) {
        REQUIRE(lynx_isa_select(isas[(first + i) % available]) == LYNX_OK);
        uint16_t *out = bytes(2 * g->x.words);
        memset(out, 0x5a, 2 * g->x.words);
        const lynx_view view = row_view(&g->x, out);
        const int code = decode(&g->x, &p, levels, &view);
        REQUIRE(code != LYNX_ERR_ARGUMENT && code != LYNX_ERR_SPACE);
        REQUIRE(i == 0 || (code == LYNX_OK) == (refusal == LYNX_OK));
        REQUIRE(i == 0 || code != LYNX_OK || memcmp(expected, out, 2 * g->x.words) == 0);
        if (i == 0) {
            expected = out;
            refusal = code;
        } else {
            free(out);
        }
    }
    free(expected);
    release(&p);
    return 0;
}
