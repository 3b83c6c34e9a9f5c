/* Loops over rows of words that compilers vectorise: included by each instruction set. */
#ifndef LYNX_ROWS_H
#define LYNX_ROWS_H

#include "isa.h"
#include "words.h"

static void survey(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high, uint16_t *signs) {
    int16_t least[ROW], largest[ROW];
    uint16_t negative[ROW];
    for (int c = 0; c < ROW; c++) {
        least[c] = INT16_MAX;
        largest[c] = INT16_MIN;
        negative[c] = 0;
    }
    for (int t = 0; t < tokens; t++, rows += stride) {
        for (int c = 0; c < ROW; c++) {
            const int16_t o = ordered(rows[c]);
            least[c] = o < least[c] ? o : least[c];
            largest[c] = o > largest[c] ? o : largest[c];
            negative[c] = (uint16_t)(negative[c] + (rows[c] >> 15));
        }
    }
    memcpy(low, least, sizeof least);
    memcpy(high, largest, sizeof largest);
    memcpy(signs, negative, sizeof negative);
}

static void rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride) {
    for (int t = 0; t < tokens; t++, rows += stride, out += out_stride) {
        for (int c = 0; c < ROW; c++) {
            const uint16_t word = rows[c], magnitude = word & 0x7fff;
            const uint16_t from = (uint16_t)(magnitude - RESCALE_FIRST); /* large for words below the first */
            int16_t to = (int16_t)((int16_t)from - shifts[c]);
            to = (int16_t)(to < 0 ? to + RESCALE_COUNT : to);
            to = (int16_t)(to >= RESCALE_COUNT ? to - RESCALE_COUNT : to);
            const uint16_t moved = (uint16_t)((word & 0x8000) | (to + RESCALE_FIRST));
            out[c] = from < RESCALE_COUNT ? moved : word;
        }
    }
}

#endif
