/* Damaged sections: a decoder refuses them or makes words of them, the same on every instruction set, and touches no byte
 * outside its buffers. Genuine tiles are made once and kept, so that nearly all the time goes into decoding. */
#include "hq.h"

#define TILES 512

typedef struct {
    shape x;
    sections e;
} genuine;

/* Tile `number`, the same in every run: its shape and words are drawn from the number. */
static const genuine *tile_of(uint32_t number) {
    static genuine *made[TILES];
    if (made[number] == NULL) {
        uint8_t random[64];
        uint64_t seed = number;
        for (size_t i = 0; i < sizeof random; i++) {
            random[i] = (uint8_t)next_random(&seed);
        }
        random[3] = (uint8_t)(number % 16 == 0 ? random[3] : random[3] % 5); /* mostly few tokens, which is fast */
        script s = {random, sizeof random};
        genuine *g = bytes(sizeof *g);
        REQUIRE(make_shape(&s, &g->x));
        uint16_t *words = bytes(2 * g->x.words);
        make_words(&s, words, g->x.words);
        g->e = encode(&g->x.tile, &g->x.sizes, words);
        free(words);
        made[number] = g;
    }
    return made[number];
}

static sections copy(const sections *from) {
    sections to = *from;
    for (int i = 0; i < SECTIONS; i++) {
        to.at[i] = bytes(to.size[i]);
        memcpy(to.at[i], from->at[i], to.size[i]);
    }
    return to;
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
    int isas[4];
    const int available = instruction_sets(isas);
    const genuine *g = tile_of(take(&s, 2) % TILES);
    const int levels = 1 + (int)below(&s, 3), first = (int)below(&s, (uint32_t)available);
    const bool compare = below(&s, 4) == 0;
    sections e = copy(&g->e);
    damage(&s, &e, g->x.tile.fold);
    uint16_t *expected = NULL;
    int refusal = LYNX_OK;
    for (int i = 0; i < (compare ? available : 1); i++) {
        REQUIRE(lynx_isa_select(isas[(first + i) % available]) == LYNX_OK);
        uint16_t *out = bytes(2 * g->x.words);
        memset(out, 0x5a, 2 * g->x.words);
        const int code = decode(&g->x.tile, &g->x.sizes, &e, levels, out);
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
    release(&e);
    return 0;
}
