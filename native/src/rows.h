/* Loops over rows of words that compilers vectorise: included by each instruction set. */
#ifndef LYNX_ROWS_H
#define LYNX_ROWS_H

#include "isa.h"
#include "params.h"
#include "words.h"

/* Of channels' extremes, the bfloat16 words not below their range and their largest magnitude. */
static void add_spreads(int dtype, const int16_t *low, const int16_t *high, lynx_spread *sums) {
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
        const uint32_t tame = ((high[c] < limit) & (low[c] >= -limit)) ? ~0u : 0;
        const uint32_t r = (float_bits(largest[c] - least[c]) + 0xffffu) >> 16, f = (float_bits(far) + 0xffffu) >> 16;
        /* 0x8000: nothing but -0 */
        sums->range[c] += (r < LEAST_SPREAD || r >= 0x8000 ? LEAST_SPREAD : r) & tame;
        sums->size[c] += (f < LEAST_SPREAD || f >= 0x8000 ? LEAST_SPREAD : f) & tame;
        sums->count[c] += tame & 1;
    }
}

/* Of channels' largest magnitudes the same bfloat16 words as above. */
static void add_sizes(int dtype, const uint16_t *most, lynx_spread *sums) {
    const uint16_t limit = (uint16_t)LYNX_DTYPES[dtype].special;
    uint16_t size[ROW];
    memcpy(size, most, sizeof size);
    for (int c = 0; c < ROW && dtype == LYNX_FLOAT16; c++) {
        size[c] = (uint16_t)((float_bits(half_magnitude(most[c])) + 0xffffu) >> 16);
    }
    for (int c = 0; c < ROW; c++) {
        const uint32_t tame = most[c] < limit ? ~0u : 0;
        sums->size[c] += (size[c] < LEAST_SPREAD ? LEAST_SPREAD : size[c]) & tame;
        sums->count[c] += tame & 1;
    }
}

#ifndef ROWS_SURVEY /* an instruction set may bring its own */
static void survey(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    for (int c = 0; c < ROW; c++) {
        low[c] = INT16_MAX;
        high[c] = INT16_MIN;
    }
    for (int t = 0; t < tokens; t++, rows += stride) {
        for (int c = 0; c < ROW; c++) {
            const int16_t o = ordered(rows[c]);
            low[c] = o < low[c] ? o : low[c];
            high[c] = o > high[c] ? o : high[c];
        }
    }
}

static void survey_sizes(const uint16_t *rows, ptrdiff_t stride, int tokens, bool fetched, uint16_t *most, uint16_t *signs) {
    (void)fetched;
    uint16_t negative[ROW] = {0};
    memset(most, 0, ROW * sizeof *most);
    for (int t = 0; t < tokens; t++, rows += stride) {
        for (int c = 0; c < ROW; c++) {
            const uint16_t magnitude = rows[c] & 0x7fff;
            most[c] = magnitude > most[c] ? magnitude : most[c];
            negative[c] = (uint16_t)(negative[c] + (rows[c] >> 15));
        }
    }
    if (signs != NULL) {
        memcpy(signs, negative, sizeof negative);
    }
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

/* Fields two and two, of 2 `bits` (up to 50) each, one behind the other: eight of them take as many bytes as they have bits. */
static void put_fields(const uint64_t *pairs, uint32_t bits, uint8_t *out) {
    const uint32_t second = 2 * bits, third = 4 * bits, fourth = 6 * bits; /* where pairs begin; whole bytes before that: */
    const uint32_t to_second = second & ~7u, to_third = (third & ~7u) - to_second, to_fourth = (fourth & ~7u) - (third & ~7u);
    for (int g = 0; g < ROW; g += 8, pairs += 4, out += bits) {
        store64(out, pairs[0]);
        uint64_t v = pairs[1] << (second & 7) | pairs[0] >> to_second;
        store64(out + (second >> 3), v);
        v = pairs[2] << (third & 7) | v >> to_third;
        store64(out + (third >> 3), v);
        v = pairs[3] << (fourth & 7) | v >> to_fourth;
        store64(out + (fourth >> 3), v);
    }
}

static lynx_packed packed_as(int s_low, int s_high, int z_low, int z_high) {
    const uint32_t s_most = (uint32_t)(s_high - s_low) / SCALE_UNIT, z_most = (uint32_t)(z_high - z_low);
    return (lynx_packed){.s_bits = s_most == 0 ? 0 : floor_log2(s_most) + 1,
                         .z_bits = z_most == 0 ? 0 : floor_log2(z_most) + 1,
                         .s_low = s_low,
                         .z_low = z_low};
}

#ifndef ROWS_PARAMS
static bool are_plain(int dtype, const int16_t *low, const int16_t *high) {
    const int16_t limit = LYNX_DTYPES[dtype].special;
    int16_t odd = 0;
    for (int g = 0; g < ROW; g++) {
        odd |= ((low[g] == high[g]) | (high[g] >= limit) | (low[g] < -limit)) ? -1 : 0;
    }
    return odd == 0;
}

static void pack_params(const lynx_params *params, lynx_packed *packed, uint8_t *out) {
    int s_low = UINT16_MAX, s_high = 0, z_low = INT16_MAX, z_high = INT16_MIN;
    for (int g = 0; g < ROW; g++) {
        const int s = params->s[g], z = params->z[g];
        s_low = s < s_low ? s : s_low;
        s_high = s > s_high ? s : s_high;
        z_low = z < z_low ? z : z_low;
        z_high = z > z_high ? z : z_high;
    }
    *packed = packed_as(s_low, s_high, z_low, z_high);
    const int s_bits = packed->s_bits, bits = s_bits + packed->z_bits;
    uint32_t field[ROW];
    for (int g = 0; g < ROW; g++) {
        field[g] = (uint32_t)(params->s[g] - s_low) / SCALE_UNIT | (uint32_t)(params->z[g] - z_low) << s_bits;
    }
    uint64_t pairs[ROW / 2];
    for (int g = 0; g < ROW / 2; g++) {
        pairs[g] = field[2 * g] | (uint64_t)field[2 * g + 1] << bits;
    }
    put_fields(pairs, (uint32_t)bits, out);
}
#endif

#ifndef ROWS_RESCALE
static void rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride) {
    for (int t = 0; t < tokens; t++, rows += stride, out += out_stride) {
        for (int c = 0; c < ROW; c++) {
            out[c] = rescaled(rows[c], shifts[c]);
        }
    }
}
#endif

#endif
