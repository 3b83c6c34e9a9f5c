/* Loops over rows of words that compilers vectorise: included by each instruction set. */
#ifndef LYNX_ROWS_H
#define LYNX_ROWS_H

#include "isa.h"
#include "params.h"
#include "words.h"

/* Of channels' extremes, the bfloat16 words not below their range and their largest magnitude; 0 for special words. */
static void spread_words(int dtype, const int16_t *low, const int16_t *high, uint16_t *range, uint16_t *size) {
    const int16_t limit = LYNX_DTYPES[dtype].special;
    float least[ROW], largest[ROW];
    if (dtype == LYNX_BFLOAT16) {
        for (int c = 0; c < ROW; c++) {
            least[c] = bits_float((uint32_t)from_ordered(low[c]) << 16);
            largest[c] = bits_float((uint32_t)from_ordered(high[c]) << 16);
        }
    } else {
        for (int c = 0; c < ROW; c++) {
            least[c] = word_value(LYNX_FLOAT16, from_ordered(low[c]));
            largest[c] = word_value(LYNX_FLOAT16, from_ordered(high[c]));
        }
    }
    for (int c = 0; c < ROW; c++) {
        const float far = -least[c] > largest[c] ? -least[c] : largest[c];
        const int tame = (high[c] < limit) & (low[c] >= -limit);
        const uint32_t r = (float_bits(largest[c] - least[c]) + 0xffffu) >> 16, f = (float_bits(far) + 0xffffu) >> 16;
        /* 0x8000: nothing but -0 */
        range[c] = (uint16_t)(tame ? r < LEAST_SPREAD || r >= 0x8000 ? LEAST_SPREAD : r : 0);
        size[c] = (uint16_t)(tame ? f < LEAST_SPREAD || f >= 0x8000 ? LEAST_SPREAD : f : 0);
    }
}

#ifndef ROWS_SURVEY /* an instruction set may bring its own */
static void survey(int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *range, uint16_t *size,
                   uint16_t *signs) {
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
    spread_words(dtype, least, largest, range, size);
    memcpy(signs, negative, sizeof negative);
}
#endif

#ifndef ROWS_FIELDS
static void fields(const uint8_t *stream, int bits, uint32_t *out) {
    const uint32_t ones = (1u << bits) - 1;
    for (int g = 0; g < ROW; g++) {
        out[g] = load32(stream + (g * bits >> 3)) >> (g * bits & 7) & ones;
    }
}
#endif

#ifndef ROWS_RESCALE
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

#endif
