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

#include "isa.h"
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

#define VECTOR __m256i
#define NO_BITS _mm256_setzero_si256()
#include "transpose.h"

INLINE __m256i expand(const uint8_t *in, const uint8_t *shuffle, const uint8_t *rank) {
    const __m128i first = _mm_loadu_si128((const __m128i *)(in + rank[0]));
    const __m128i second = _mm_loadu_si128((const __m128i *)(in + rank[1]));
    return _mm256_shuffle_epi8(_mm256_set_m128i(second, first), load(shuffle));
}

/* Write the bytes of 32 channels that `compress` selects, 16 at a time; later stores cover what earlier ones overrun. */
INLINE void compress(__m256i v, const uint8_t *shuffle, const uint8_t *rank, uint8_t *out) {
    const __m256i packed = _mm256_shuffle_epi8(v, load(shuffle));
    _mm_storeu_si128((__m128i *)(out + rank[0]), _mm256_castsi256_si128(packed));
    _mm_storeu_si128((__m128i *)(out + rank[1]), _mm256_extracti128_si256(packed, 1));
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

/* 255 in the bytes of 8 channels of a mask. */
INLINE uint64_t byte_mask(uint64_t channels, int w) {
    return _pdep_u64(channels >> 8 * w & 255, 0x0101010101010101ull) * 255;
}

INLINE uint32_t bits_of(__m256i bytes) {
    return (uint32_t)_mm256_movemask_epi8(bytes);
}

/* Bytes of 0 or -1 from 32 bits. */
INLINE __m256i bytes_of(uint32_t bits) {
    const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
                                          3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), pick);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
}

INLINE uint64_t sum64(__m256i v) {
    uint64_t parts[4];
    store(parts, v);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

#define LEAST_BOUND 4 /* bits of level 2 that most_rank_bits leaves out */

/* At most so many bits of level 2 for 32 codes, and LEAST_BOUND: of an integer of size a, at most 512 / (2a + 1) + 1 words make a
 * cell, 214 for a = 1, and a zero cell takes at most 12 + 16 bits. Integers modulo 256 are no larger than those they stand for, and
 * their bits no fewer. */
INLINE __m256i most_rank_bits(__m256i codes, __m256i zero) {
    const __m256i below_16 = _mm256_broadcastsi128_si256(_mm_setr_epi8(24, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1));
    const __m256i size = _mm256_abs_epi8(_mm256_sub_epi8(codes, zero));
    return _mm256_shuffle_epi8(below_16, _mm256_adds_epu8(size, _mm256_set1_epi8(0x70))); /* 0 from 16 on */
}

/* Floats of 64 channels in unpacking order. */
INLINE void unpack_order(const float *in, float *out) {
    for (int i = 0; i < ROW; i += 16) {
        for (int j = 0; j < 4; j++) {
            out[i + j] = in[i + j];
            out[i + 4 + j] = in[i + 8 + j];
            out[i + 8 + j] = in[i + 4 + j];
            out[i + 12 + j] = in[i + 12 + j];
        }
    }
}

INLINE __m256i codes_minus_offset(int part, const uint8_t *codes, int i, const lynx_params *params,
                                  __m256i token_offset) {
    const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + 16 * i)));
    return _mm256_sub_epi16(code, part == LYNX_KEY ? load(params->offset + 16 * i) : token_offset);
}

/* Kernels of other files than avx2.c; isa.h says what they do. */
bool lynx_avx2_place(int part, const lynx_planes *planes, const lynx_params *params, const uint8_t *anchor,
                     const uint8_t *rest, const uint8_t *codes, bool full, int tokens, const int16_t *shifts,
                     const lynx_stretch *rows, ptrdiff_t stride, lynx_tail *tail);
void lynx_avx2_pack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *anchor,
                           uint8_t *rest, uint32_t entries[2]);
int lynx_avx2_unpack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *anchor, uint32_t anchor_entry,
                            const uint8_t *rest, uint32_t rest_entry, int tokens, uint8_t *codes);
void lynx_avx2_rank(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                    int channels, const lynx_params *params, lynx_streams *streams);
int lynx_avx2_unrank(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                     lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows);
uint64_t lynx_avx2_rank_bound(int part, const uint8_t *codes, int tokens, int channels, const lynx_params *params);
void lynx_avx2_pack_row(int word_bytes, const void *words, size_t count, uint8_t *const *planes);
void lynx_avx2_unpack_row(int word_bytes, const uint8_t *const *planes, size_t count, void *words);

#if defined(__clang__)
#define AVX2_END _Pragma("clang attribute pop")
#else
#define AVX2_END _Pragma("GCC pop_options")
#endif

#endif
