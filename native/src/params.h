/* Scales and zero points from extremes, written so that compilers vectorise it: included by each instruction set. */
#ifndef LYNX_PARAMS_H
#define LYNX_PARAMS_H

#include "isa.h"
#include "words.h"

/* Per dtype: the least and largest scale as bfloat16 words, and the magnitude word from which on a value is special
 * (not finite, or so large that sums and products could overflow). */
static const struct {
    uint16_t least, largest;
    int16_t special;
} LYNX_DTYPES[2] = {
    [LYNX_BFLOAT16] = {0x0580 /* 2^-116 */, 0x7e00 /* 2^125 */, 0x7e80 /* 2^126 */},
    [LYNX_FLOAT16] = {0x3380 /* 2^-24 */, 0x4480 /* 2^10 */, 0x7c00 /* infinity */},
};

#define LEAST_SPREAD 0x2000 /* 2^-63 */

/* round(|x| / s), ties away from zero: exact for |x| / s up to 1290 (spec/codec-hq.md, "Quantising"). */
static inline int quantised(float magnitude, float inverse) {
    return (int)(magnitude * inverse + 0.5f);
}

static inline void choose_as(int dtype, const lynx_planes *restrict planes, const int16_t *restrict low,
                             const int16_t *restrict high, lynx_params *restrict params) {
    for (int g = 0; g < ROW; g++) {
        const float least = word_value(dtype, from_ordered(low[g]));
        const float largest = word_value(dtype, from_ordered(high[g]));
        const float below = least < 0 ? -least : least, above = largest < 0 ? -largest : largest;
        const float wide = (largest - least) / planes->steps[g], far = (below > above ? below : above) * 0x1p-10f;
        const uint32_t rounded = (float_bits(wide > far ? wide : far) + 0x3ffffu) >> 18 << 2;
        const uint32_t floor_word = LYNX_DTYPES[dtype].least;
        const uint32_t word = rounded > floor_word ? rounded : floor_word;
        const float inverse = 1.0f / bits_float(word << 16) * (1.0f + 0x1.8p-22f);
        const int a_low = quantised(below, inverse), a_high = quantised(above, inverse), base = planes->base[g];
        const int zero = least < 0 ? a_low : -a_low;
        const int z = (a_low | a_high) == 0 ? base : zero;
        params->s[g] = (uint16_t)word;
        params->scale[g] = bits_float(word << 16);
        params->inverse[g] = inverse;
        params->z[g] = (int16_t)z;
        params->offset[g] = (int16_t)(z + planes->full[g]);
    }
}

#endif
