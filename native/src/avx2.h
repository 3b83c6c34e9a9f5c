/* What the AVX2 files share: the target, and operations on half rows of 32 bytes. Each file ends with AVX2_END. */
#ifndef LYNX_AVX2_H
#define LYNX_AVX2_H

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,popcnt,f16c,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,f16c,lzcnt")
#endif

#include <immintrin.h>

#include "params.h"
#include "words.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m256i load(const void *p) {
    return _mm256_loadu_si256((const __m256i *)p);
}

INLINE void store(void *p, __m256i v) {
    _mm256_storeu_si256((__m256i *)p, v);
}

/* After a pack of two registers: their 64-bit quarters in order. */
INLINE __m256i in_order(__m256i v) {
    return _mm256_permute4x64_epi64(v, 0xd8);
}

/* One stage of a bit-matrix transpose: the bits of `b` that `mask` selects and those of `a`, `shift` higher, change
 * places in every byte. */
#define SWAP(a, b, shift, mask)                                                                                    \
    do {                                                                                                           \
        const __m256i difference =                                                                                 \
            _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(a, shift), b), _mm256_set1_epi8(mask));            \
        b = _mm256_xor_si256(b, difference);                                                                       \
        a = _mm256_xor_si256(a, _mm256_slli_epi16(difference, shift));                                             \
    } while (0)

/* 32 matrices of 8 x 8 bits, one per byte position, across 8 registers: bit j of register i to bit i of register j.
 * With `upper` only registers 4..7 hold anything on entry. */
INLINE void transpose(__m256i *r, bool upper) {
    for (int i = upper ? 4 : 0; i < 8; i += 4) {
        SWAP(r[i], r[i + 2], 2, 0x33);
        SWAP(r[i + 1], r[i + 3], 2, 0x33);
        SWAP(r[i], r[i + 1], 1, 0x55);
        SWAP(r[i + 2], r[i + 3], 1, 0x55);
    }
    for (int i = 0; i < 4; i++) {
        if (upper) {
            const __m256i low = _mm256_and_si256(r[i + 4], _mm256_set1_epi8(0x0f));
            r[i] = _mm256_slli_epi16(low, 4);
            r[i + 4] = _mm256_xor_si256(r[i + 4], low);
        } else {
            SWAP(r[i], r[i + 4], 4, 0x0f);
        }
    }
}

INLINE __m256i expand(const uint8_t *in, const uint8_t *shuffle, const uint8_t *rank) {
    const __m128i first = _mm_loadu_si128((const __m128i *)(in + rank[0]));
    const __m128i second = _mm_loadu_si128((const __m128i *)(in + rank[1]));
    return _mm256_shuffle_epi8(_mm256_set_m128i(second, first), load(shuffle));
}

/* Words that are not zero, with `shift` added. */
INLINE __m256i shifted(__m256i words, __m256i shift) {
    const __m256i zero = _mm256_cmpeq_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x7fff)), _mm256_setzero_si256());
    return _mm256_add_epi16(words, _mm256_andnot_si256(zero, shift));
}

#define LIFT 32768 /* added to codes, as in avx512.h */

/* Bits of integers times scales, plus `up`, of codes that are LIFT + C. */
INLINE __m256i number(__m256i lifted, __m256 scale, __m256 less, int up) {
    const __m256 x = _mm256_fmadd_ps(_mm256_castsi256_ps(lifted), scale, less);
    return _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(up));
}

#if defined(__clang__)
#define AVX2_END _Pragma("clang attribute pop")
#else
#define AVX2_END _Pragma("GCC pop_options")
#endif

#endif
