/* Words as numbers, and numbers as words, by integer arithmetic: the same on every machine and in every FP mode. */
#ifndef LYNX_WORDS_H
#define LYNX_WORDS_H

#include <stdint.h>
#include <string.h>

#include "lynxproto.h"

static inline uint32_t float_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float bits_float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline int16_t ordered(uint16_t word) {
    return (int16_t)(word ^ (((int16_t)word >> 15) & 0x7fff));
}

static inline uint16_t from_ordered(int16_t o) {
    return (uint16_t)(o ^ ((o >> 15) & 0x7fff));
}

/* The magnitude of a float16 word, exact: subnormals are integers times 2^-24. */
static inline float half_magnitude(uint16_t magnitude) {
    if (magnitude < 0x400) {
        return (float)magnitude * 0x1p-24f;
    }
    if (magnitude >= 0x7c00) {
        return bits_float(0x7f800000u | (uint32_t)(magnitude & 0x3ff) << 13);
    }
    return bits_float(((uint32_t)magnitude << 13) + 0x38000000u);
}

static inline float word_value(int dtype, uint16_t word) {
    if (dtype == LYNX_BFLOAT16) {
        return bits_float((uint32_t)word << 16);
    }
    const float m = half_magnitude(word & 0x7fff);
    return word & 0x8000 ? -m : m;
}

/* bfloat16: nearest, ties away from zero. */
static inline uint16_t to_bfloat16(float x) {
    return (uint16_t)((float_bits(x) + 0x8000u) >> 16);
}

/* float16: nearest, ties to even, saturating at the largest finite value. */
static inline uint16_t to_float16(float x) {
    const uint32_t bits = float_bits(x);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477fe000u) { /* 65504 and above */
        return sign | 0x7bff;
    }
    if (magnitude < 0x38800000u) { /* below 2^-14: an integer number of 2^-24, at most 1024 */
        const float scaled = bits_float(magnitude) * 0x1p24f;
        uint32_t n = (uint32_t)scaled;
        const float rest = scaled - (float)n;
        n += rest > 0.5f || (rest == 0.5f && (n & 1));
        return (uint16_t)(sign | n);
    }
    const uint32_t rebased = magnitude - 0x38000000u;
    return (uint16_t)(sign | ((rebased + 0xfffu + (rebased >> 13 & 1)) >> 13));
}

/* The smallest word whose magnitude is at least x (x positive; infinity when there is none). */
static inline uint32_t ceil_word(int dtype, float x) {
    const uint32_t bits = float_bits(x);
    if (dtype == LYNX_BFLOAT16) {
        return (bits + 0xffffu) >> 16;
    }
    if (bits < 0x38800000u) {
        const float scaled = x * 0x1p24f;
        const uint32_t n = (uint32_t)scaled;
        return n + ((float)n < scaled);
    }
    const uint32_t word = (bits - 0x38000000u + 0x1fffu) >> 13;
    return word < 0x7c00 ? word : 0x7c00;
}

/* Words that rescaling moves round: magnitude words from 2^-111 up to those that are special. */
#define RESCALE_FIRST 0x0800
#define RESCALE_COUNT (0x7e80 - RESCALE_FIRST)
/* Those that stay in that range, whatever the exponent: from INNER on, so many. */
#define RESCALE_INNER (RESCALE_FIRST + 1024)
#define RESCALE_SPAN (RESCALE_COUNT - 2048)
/* Words from which a shift was taken away, and which are of these magnitudes then, were in the range, and stay in it. Others are below
 * the first or from the second on: a sign that turned leaves what was too large near 0, and what was too small far away. */
#define RESCALE_NEAR 0x2000
#define RESCALE_FAR 0x7700

/* A bfloat16 word divided by 2^e; `shift` is e in units of the word's last place. */
static inline uint16_t rescaled(uint16_t word, int16_t shift) {
    const uint16_t from = (uint16_t)((word & 0x7fff) - RESCALE_FIRST); /* large for words below the first */
    int16_t to = (int16_t)((int16_t)from - shift);
    to = (int16_t)(to < 0 ? to + RESCALE_COUNT : to);
    to = (int16_t)(to >= RESCALE_COUNT ? to - RESCALE_COUNT : to);
    const uint16_t moved = (uint16_t)((word & 0x8000) | (to + RESCALE_FIRST));
    return from < RESCALE_COUNT ? moved : word;
}

static inline int floor_log2(uint32_t n) {
    return 31 - __builtin_clz(n);
}

/* What was stored in an array is read from memory: compilers would take it out of the register, on the ports that vectors need. */
#define IN_MEMORY(array) __asm__ volatile("" : "+m"(array))

/* Unaligned accesses; isa.h refuses big-endian machines. */
static inline uint16_t load16(const void *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t load32(const void *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint64_t load64(const void *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store16(void *p, uint32_t v) {
    const uint16_t low = (uint16_t)v;
    memcpy(p, &low, sizeof low);
}

static inline void store32(void *p, uint32_t v) {
    memcpy(p, &v, sizeof v);
}

static inline void store64(void *p, uint64_t v) {
    memcpy(p, &v, sizeof v);
}

/* Streams of bits, least significant first. put_bits wants zeros ahead. */
static inline void put_bits(uint8_t *stream, uint32_t position, uint32_t value) {
    uint8_t *p = stream + (position >> 3);
    store64(p, load64(p) | (uint64_t)value << (position & 7));
}

static inline uint32_t get_bits(const uint8_t *stream, uint32_t position, int width) {
    return (uint32_t)(load64(stream + (position >> 3)) >> (position & 7)) & ((1u << width) - 1);
}

static inline uint64_t get_bits64(const uint8_t *stream, uint32_t position) {
    const uint8_t *p = stream + (position >> 3);
    const int shift = position & 7;
    return load64(p) >> shift | (uint64_t)p[8] << 1 << (63 - shift);
}

/* The same for `count` bits; those above may be anything. */
static inline uint64_t get_few_bits64(const uint8_t *stream, uint32_t position, uint32_t count) {
    return __builtin_expect(count <= 57, 1) ? load64(stream + (position >> 3)) >> (position & 7) : get_bits64(stream, position);
}

#define ZERO_WORD 2046   /* stream W: the word is +0 or -0 */
#define ZERO_ESCAPE 2047 /* stream W: the word is in stream X */

/* Bits of a 64-bit word seen as an 8 x 8 matrix (byte = row), transposed: bit j of byte i becomes bit i of byte j. */
static inline uint64_t transpose8x8(uint64_t x) {
    uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aaull;
    x ^= t ^ t << 7;
    t = (x ^ x >> 14) & 0x0000cccc0000ccccull;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000f0f0f0f0ull;
    return x ^ t ^ t << 28;
}

#endif
