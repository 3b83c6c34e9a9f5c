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
/* The first 64 fields of `bits` (up to 25) of a stream. */
static void fields(const uint8_t *stream, int bits, uint32_t *out) {
    const uint32_t ones = (1u << bits) - 1;
    for (int g = 0; g < ROW; g++) {
        out[g] = load32(stream + (g * bits >> 3)) >> (g * bits & 7) & ones;
    }
}
#endif

static bool params(const lynx_fields *in, const lynx_planes *planes, bool full, lynx_params *params) {
    uint32_t field[ROW];
    fields(in->stream, in->s_bits + in->z_bits, field);
    const uint32_t s_mask = (1u << in->s_bits) - 1;
    const int s_bits = in->s_bits, s_low = in->s_low, z_low = in->z_low, groups = in->groups;
    int least = INT32_MAX, most = 0, far = 0;
    for (int g = 0; g < ROW; g++) {
        const int used = g < groups ? -1 : 0;
        const int scale = s_low + SCALE_UNIT * (int)(field[g] & s_mask), zero = (z_low + (int)(field[g] >> s_bits)) & used;
        const int in_least = scale | (~used & INT32_MAX), in_most = scale & used, distance = zero < 0 ? -zero : zero;
        least = in_least < least ? in_least : least;
        most = in_most > most ? in_most : most;
        far = distance > far ? distance : far;
        params->scale[g] = bits_float((uint32_t)in_most << 16);
        params->s[g] = (uint16_t)in_most;
        params->z[g] = (int16_t)zero;
        params->offset[g] = (int16_t)(zero + (full ? planes->full[g] : -planes->base[g]));
    }
    params->s_least = (uint16_t)least;
    params->s_most = (uint16_t)most;
    params->constant = 0;
    return least >= in->least && most <= in->largest && far <= MAX_ZERO_POINT;
}

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
