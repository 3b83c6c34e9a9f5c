/* Writing streams of bits; and what the kernels of level 2 share: zero cells, whose words follow in W and X. */
#ifndef LYNX_RANKS_H
#define LYNX_RANKS_H

#include "isa.h"
#include "words.h"

typedef struct {
    uint8_t *at;
    uint64_t pending;
    uint32_t filled; /* bits of `pending`, fewer than 8 between calls */
} bit_writer;

static inline void put(bit_writer *out, uint64_t value, uint32_t bits) { /* at most 56 bits */
    out->pending |= value << out->filled;
    out->filled += bits;
    store64(out->at, out->pending);
    out->at += out->filled >> 3;
    out->pending >>= out->filled & ~7u;
    out->filled &= 7;
}

static inline void put64(bit_writer *out, uint64_t value, uint32_t bits) { /* at most 64 */
    const uint64_t all = out->pending | value << out->filled, over = value >> 1 >> (63 - out->filled);
    store64(out->at, all);
    out->at[8] = (uint8_t)over; /* this may be the last call */
    out->filled += bits;
    out->pending = out->filled < 64 ? all >> (out->filled & ~7u) : over;
    out->at += out->filled >> 3;
    out->filled &= 7;
}

static inline uint32_t position(const bit_writer *out, const uint8_t *start) {
    return (uint32_t)(8 * (out->at - start)) + out->filled;
}

/* Zero cells as token * 64 + channel, in order. */
typedef struct {
    uint32_t count;
    uint16_t at[BLOCK_VALUES + ROW];
} zero_list;

/* Largest magnitude word in the zero cell of each group. */
static inline void tops_of(int dtype, const lynx_params *params, uint16_t *tops) {
    for (int g = 0; g < ROW; g++) {
        tops[g] = (uint16_t)(ceil_word(dtype, params->scale[g] * 0.5f) - 1);
    }
}

/* A zero cell's field of 12 bits; in streams X what that does not hold. */
static inline uint32_t zero_field(int part, uint32_t at, const uint16_t *rows, ptrdiff_t stride, const uint16_t *tops,
                                  lynx_streams *streams) {
    const uint32_t t = at / ROW, c = at % ROW, word = rows[(ptrdiff_t)t * stride + c], magnitude = word & 0x7fff;
    uint32_t code = tops[part == LYNX_KEY ? c : t] - magnitude;
    if (__builtin_expect(code >= ZERO_WORD || magnitude == 0, 0)) {
        code = magnitude == 0 ? ZERO_WORD : ZERO_ESCAPE;
        if (magnitude != 0) {
            streams->x[streams->x_count++] = (uint16_t)word;
        }
    }
    return code | word >> 15 << 11;
}

/* The fields of zero cells, two to three bytes, and the words that W does not hold. */
static inline void rank_zeros(int part, int dtype, const zero_list *zeros, const uint16_t *rows, ptrdiff_t stride,
                       const lynx_params *params, lynx_streams *streams) {
    const uint32_t count = zeros->count;
    streams->w_count = dtype == LYNX_BFLOAT16 ? count : 0;
    streams->x_count = 0;
    if (dtype == LYNX_FLOAT16) {
        for (uint32_t i = 0; i < count; i++) {
            streams->x[i] = rows[zeros->at[i] / ROW * stride + zeros->at[i] % ROW];
        }
        streams->x_count = count;
        return;
    }
    uint16_t tops[ROW];
    tops_of(LYNX_BFLOAT16, params, tops);
    uint8_t *w = streams->w;
    for (uint32_t i = 0; i + 2 <= count; i += 2, w += 3) {
        const uint32_t first = zero_field(part, zeros->at[i], rows, stride, tops, streams);
        const uint32_t second = zero_field(part, zeros->at[i + 1], rows, stride, tops, streams);
        store32(w, first | second << 12);
    }
    if (count % 2 != 0) {
        store32(w, zero_field(part, zeros->at[count - 1], rows, stride, tops, streams));
    }
}

/* The reverse; streams W and X start behind B, whose size is known by now. False for a word outside its cell. */
static inline bool unrank_zeros(int part, int dtype, const zero_list *zeros, const int16_t *shifts, uint16_t *const *rows, const lynx_params *params, lynx_streams *streams) {
    streams->w_count = dtype == LYNX_BFLOAT16 ? zeros->count : 0;
    streams->x_count = 0;
    const uint8_t *w = streams->more + (streams->b_bits + 7) / 8, *x = w + (12 * streams->w_count + 7) / 8;
    for (uint32_t i = 0; i < zeros->count; i++) {
        const int t = zeros->at[i] / ROW, c = zeros->at[i] % ROW;
        uint16_t *word = rows[t] + c;
        if (dtype == LYNX_FLOAT16) {
            *word = load16(x + 2 * streams->x_count++);
            continue;
        }
        const uint32_t field = get_bits(w, 12 * i, 12), code = field & 2047, sign = field >> 11 << 15;
        const uint32_t top = ceil_word(LYNX_BFLOAT16, params->scale[part == LYNX_KEY ? c : t] * 0.5f) - 1;
        if (__builtin_expect(code < ZERO_WORD, 1)) {
            if (code >= top) {
                return false;
            }
            *word = (uint16_t)((top - code) | sign);
        } else {
            *word = code == ZERO_WORD ? (uint16_t)sign : load16(x + 2 * streams->x_count++);
        }
        *word = shifts == NULL ? *word : rescaled(*word, (int16_t)-shifts[c]);
    }
    return true;
}

#endif
