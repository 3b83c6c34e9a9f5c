/* What the AVX-512 files share: the target, and operations on rows of 64 bytes. Each file ends with AVX512_END. */
#ifndef LYNX_AVX512_H
#define LYNX_AVX512_H

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bitalg,avx2,bmi,bmi2,popcnt,f16c,lzcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bitalg,avx2,bmi,bmi2,popcnt,f16c,lzcnt,prefer-vector-width=512")
#endif

#include <immintrin.h>

#include "params.h"
#include "words.h"

#define INLINE static inline __attribute__((always_inline))

#define AHEAD 8 /* rows that are fetched: hardware does not foresee long strides and pages */

/* Of bytes of two registers, those of even positions. */
#define FIRST_BYTES _mm512_set_epi8(126, 124, 122, 120, 118, 116, 114, 112, 110, 108, 106, 104, 102, 100, 98, 96, 94, 92, 90, 88, 86, 84, 82, 80, 78, 76, 74, 72, 70, 68, 66, 64, 62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0)

INLINE __m512i load(const void *p) {
    return _mm512_loadu_si512(p);
}

INLINE void store(void *p, __m512i v) {
    _mm512_storeu_si512(p, v);
}

/* One stage of a bit-matrix transpose: the bits of `b` that `mask` selects and those of `a`, `shift` higher, change
 * places in every byte. 0xe4 is z ? x : y. */
#define SWAP(a, b, shift, mask)                                                                                        \
    do {                                                                                                               \
        const __m512i low = _mm512_srli_epi16(a, shift), high = _mm512_slli_epi16(b, shift);                           \
        b = _mm512_ternarylogic_epi64(low, b, _mm512_set1_epi8(mask), 0xe4);                                           \
        a = _mm512_ternarylogic_epi64(a, high, _mm512_set1_epi8(mask), 0xe4);                                          \
    } while (0)

#define VECTOR __m512i
#define NO_BITS _mm512_setzero_si512()
#include "transpose.h"

/* Of 32-bit lanes of a, then b: the upper or lower halves. */
INLINE __m512i upper_words(__m512i a, __m512i b) {
    const __m512i odd = _mm512_add_epi16(_mm512_slli_epi16(_mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 1), _mm512_set1_epi16(1));
    return _mm512_permutex2var_epi16(a, odd, b);
}

INLINE __m512i lower_bytes(__m512i a, __m512i b) {
    return _mm512_permutex2var_epi8(a, FIRST_BYTES, b);
}

/* A float of each even, or each odd 16-bit lane. */
INLINE void even_odd(const float *in, __m512 *even, __m512 *odd) {
    const __m512i first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 a = _mm512_loadu_ps(in), b = _mm512_loadu_ps(in + 16);
    *even = _mm512_permutex2var_ps(a, first, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_or_si512(first, _mm512_set1_epi32(1)), b);
}

/* Words that are not zero, with `shift` added. */
INLINE __m512i shifted(__m512i words, __m512i shift) {
    return _mm512_mask_add_epi16(words, _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x7fff)), words, shift);
}

/* --- numbers from codes ----------------------------------------------------------------------------------------
 * A code C becomes a number by a byte permutation alone: in bits 8..15 of 0x47000000 it is LIFT + C. One fused multiply-add takes
 * (LIFT + offset) * scale away: 16 bits times 8, which binary32 holds exactly, as it does the result. */

#define LIFT 32768 /* added to codes */

/* Scales of 64 groups, and what takes their offsets and LIFT away. */
INLINE void lift(const lynx_params *params, float *less) {
    for (int g = 0; g < ROW; g += 16) {
        const __m512i offset = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(params->offset + g)));
        const __m512 integer = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(-LIFT), offset));
        _mm512_storeu_ps(less + g, _mm512_mul_ps(integer, _mm512_loadu_ps(params->scale + g)));
    }
}

/* LIFT + C of 16 channels, of whose codes `place` has the positions in byte 1 of each lane. */
INLINE __m512 lifted(__m512i codes, __m512i place) {
    return _mm512_castsi512_ps(_mm512_mask_permutexvar_epi8(_mm512_set1_epi32(0x47000000), 0x2222222222222222ull, place, codes));
}

/* Of such codes the bits of integers times scales, plus `up`. */
INLINE __m512i numbers(__m512 codes, __m512 scale, __m512 less, int up) {
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_fmadd_ps(codes, scale, less)), _mm512_set1_epi32(up));
}

/* Words of which `even` and `odd` hold those in even and odd places, in the upper halves of lanes. */
INLINE __m512i joined(__m512i even, __m512i odd) {
    const __m512i upper = _mm512_set1_epi32(0x03020302);
    const __m512i lane = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    return _mm512_mask_shuffle_epi8(odd, 0x3333333333333333ull, even, _mm512_add_epi8(upper, lane));
}

/* For each lane, in byte 1, the place of channel first + 2 lane. */
INLINE __m512i places(int first) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_slli_epi32(_mm512_add_epi32(_mm512_add_epi32(lane, lane), _mm512_set1_epi32(first)), 8);
}

/* --- planes --------------------------------------------------------------------------------------------------- */

/* Bytes `count` to 63. */
INLINE __mmask64 from_byte(int count) {
    return count < 64 ? ~0ull << count : 0;
}

/* A plane of channels of several widths, from both sections or, with `rest` null, from the anchor alone. */
INLINE __m512i mixed_plane(const lynx_planes *planes, int p, const uint8_t *anchor, const uint8_t *rest) {
    const int count = planes->anchor_count[p];
    if (rest == NULL) {
        return _mm512_maskz_permutexvar_epi8(planes->in_anchor[p], load(planes->place[p]), load(anchor));
    }
    const __m512i both = _mm512_mask_loadu_epi8(load(anchor), from_byte(count), rest - count);
    return _mm512_maskz_permutexvar_epi8(planes->used, load(planes->place[p]), both);
}

/* --- reductions ----------------------------------------------------------------------------------------------- */

/* Of bfloat16 or float16 words, signed integers in the same order; and the reverse. */
INLINE __m512i ordered16(__m512i w) {
    return _mm512_ternarylogic_epi64(w, _mm512_srai_epi16(w, 15), _mm512_set1_epi16(0x7fff), 0x78); /* x ^ (y & z) */
}

/* The least of a and b, of which the halves in even and odd positions of `unit` bits are combined: a's results take
 * the even positions, b's the odd ones. */
#define FOLD(unpack_low, unpack_high, a, b) _mm512_min_epi16(unpack_low(a, b), unpack_high(a, b))

INLINE __m512i low_halves(__m512i a, __m512i b) {
    return _mm512_shuffle_i64x2(a, b, 0x44);
}

INLINE __m512i high_halves(__m512i a, __m512i b) {
    return _mm512_shuffle_i64x2(a, b, 0xee);
}

INLINE __m512i even_quarters(__m512i a, __m512i b) {
    return _mm512_shuffle_i64x2(a, b, 0x88);
}

INLINE __m512i odd_quarters(__m512i a, __m512i b) {
    return _mm512_shuffle_i64x2(a, b, 0xdd);
}

/* --- kernels, by file; isa.h says what they do ---------------------------------------------------------------- */

/* avx512_ranges.c */
void lynx_avx512_range(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high);
void lynx_avx512_rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                         ptrdiff_t out_stride);
void lynx_avx512_rescale_range(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                               int16_t *low, int16_t *high);
void lynx_avx512_survey(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high);
void lynx_avx512_survey_sizes(const uint16_t *rows, ptrdiff_t stride, int tokens, bool fetched, uint16_t *most, uint16_t *signs);

/* avx512_params.c */
void lynx_avx512_add_spreads(int dtype, const int16_t *low, const int16_t *high, lynx_spread *sums);
void lynx_avx512_add_sizes(int dtype, const uint16_t *most, lynx_spread *sums);
bool lynx_avx512_are_plain(int dtype, const int16_t *low, const int16_t *high);
void lynx_avx512_choose(int dtype, const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params);
void lynx_avx512_pack_params(const lynx_params *params, lynx_packed *packed, uint8_t *out);
bool lynx_avx512_params(const lynx_fields *in, const lynx_planes *planes, bool full, lynx_params *params);

/* avx512_planes.c */
void lynx_avx512_shuffles(lynx_planes *planes);
void lynx_avx512_quantise(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_planes *planes,
                          const lynx_params *params, uint8_t *codes);
uint64_t lynx_avx512_quantise_ahead(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_planes *planes,
                                    const lynx_params *params, bool bounded, const lynx_stretch *ahead, ptrdiff_t ahead_stride,
                                    uint8_t *codes);
void lynx_avx512_pack(const lynx_planes *planes, const uint8_t *codes, int tokens, uint8_t *anchor, uint8_t *rest);
void lynx_avx512_unpack(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int tokens, uint8_t *codes);

/* avx512_folds.c */
void lynx_avx512_pack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *anchor,
                             uint8_t *rest, uint32_t entries[2]);
int lynx_avx512_unpack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *anchor, uint32_t anchor_entry,
                              const uint8_t *rest, uint32_t rest_entry, int tokens, uint8_t *codes);

/* avx512_words.c, avx512_ranks.c */
bool lynx_avx512_place(int part, const lynx_planes *planes, const lynx_params *params, const uint8_t *anchor,
                       const uint8_t *rest, const uint8_t *codes, bool full, int tokens, const int16_t *shifts,
                       const lynx_stretch *rows, ptrdiff_t stride, lynx_tail *tail);
void lynx_avx512_rank(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                      int channels, const lynx_params *params, lynx_streams *streams);
int lynx_avx512_unrank(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                       lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows);

#if defined(__clang__)
#define AVX512_END _Pragma("clang attribute pop")
#else
#define AVX512_END _Pragma("GCC pop_options")
#endif

#endif
