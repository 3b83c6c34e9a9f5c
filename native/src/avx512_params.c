/* Parameters of groups for AVX-512: scales and zero points from extremes, and their fields. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"

#define ROWS_SURVEY
#define ROWS_RESCALE
#define ROWS_FIELDS
#define ROWS_PARAMS
static void fields(const uint8_t *stream, int bits, uint32_t *out) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i ones = _mm512_set1_epi32((1 << bits) - 1), steps = _mm512_set1_epi32(0x03020100);
    for (int i = 0; i < 4; i++) { /* 16 fields lie within 51 bytes */
        const int first = 16 * i * bits;
        const __m512i at = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(bits)), _mm512_set1_epi32(first & 7));
        const __m512i spread = _mm512_mullo_epi32(_mm512_srli_epi32(at, 3), _mm512_set1_epi32(0x01010101));
        const __m512i found = _mm512_permutexvar_epi8(_mm512_add_epi8(spread, steps), load(stream + (first >> 3)));
        const __m512i field = _mm512_srlv_epi32(found, _mm512_and_si512(at, _mm512_set1_epi32(7)));
        store(out + 16 * i, _mm512_and_si512(field, ones));
    }
}
#include "rows.h"

/* --- encoder -------------------------------------------------------------------------------------------------- */

/* 1 / m, a little more, of m = 32/32, 33/32... 63/32, which scales of 6 bits are times powers of two. */
#define INVERSE(m) (1.0f / ((float)(m) / 32.0f) * (1.0f + 0x1.8p-22f))
#define INVERSES(m)                                                                                                    \
    _mm512_setr_ps(INVERSE(m), INVERSE(m + 1), INVERSE(m + 2), INVERSE(m + 3), INVERSE(m + 4), INVERSE(m + 5),         \
                   INVERSE(m + 6), INVERSE(m + 7), INVERSE(m + 8), INVERSE(m + 9), INVERSE(m + 10), INVERSE(m + 11),   \
                   INVERSE(m + 12), INVERSE(m + 13), INVERSE(m + 14), INVERSE(m + 15))

/* bfloat16 words in order, of 16 groups, as numbers. */
INLINE __m512 numbers_of(const int16_t *ordered) {
    const __m512i o = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)ordered));
    const __m512i upper = _mm512_slli_epi32(o, 16), sign = _mm512_srai_epi32(o, 31);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(upper, sign, _mm512_set1_epi32(0x7fff0000), 0x78)); /* x ^ (y & z) */
}

/* 32-bit integers of 32 groups that fit in 16 bits, signed. */
INLINE __m512i narrowed(__m512i a, __m512i b) {
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(a, b));
}

/* As choose_as, without a division: quotients of known divisors are right after one correction (Markstein), as long as its
 * remainder is no subnormal number. False for ranges where it could be. */
static bool choose_quickly(const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params) {
    const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff)), half = _mm512_set1_ps(0.5f);
    const __m512i exponent = _mm512_set1_epi32((int)0xff800000), one = _mm512_set1_epi32(0x3f800000);
    const __m512i least_scale = _mm512_set1_epi32(LYNX_DTYPES[LYNX_BFLOAT16].least << 16);
    __mmask16 tiny = 0;
    for (int i = 0; i < ROW; i += 32) {
        __m512i words[2], zeros[2], any[2];
        for (int j = 0; j < 2; j++) {
            const int g = i + 16 * j;
            const __m512 least = numbers_of(low + g), largest = numbers_of(high + g);
            const __m512 below = _mm512_and_ps(least, magnitude), above = _mm512_and_ps(largest, magnitude);
            const __m512 range = _mm512_sub_ps(largest, least), far = _mm512_mul_ps(_mm512_max_ps(below, above), _mm512_set1_ps(0x1p-10f));
            const __m512 steps = _mm512_loadu_ps(planes->steps + g), per_step = _mm512_loadu_ps(planes->per_step + g);
            const __m512 nearly = _mm512_mul_ps(range, per_step);
            const __m512 wide = _mm512_fmadd_ps(_mm512_fnmadd_ps(nearly, steps, range), per_step, nearly);
            tiny |= _mm512_cmp_ps_mask(range, _mm512_set1_ps(0x1p-80f), _CMP_LT_OQ);
            const __m512i up = _mm512_add_epi32(_mm512_castps_si512(_mm512_max_ps(wide, far)), _mm512_set1_epi32(0x3ffff));
            const __m512i scale = _mm512_max_epu32(_mm512_and_si512(up, _mm512_set1_epi32((int)0xfffc0000)), least_scale);
            const __m512i mantissa = _mm512_srli_epi32(scale, 18);
            const __m512i quotient = _mm512_castps_si512(_mm512_permutex2var_ps(INVERSES(32), mantissa, INVERSES(48)));
            const __m512i power = _mm512_sub_epi32(_mm512_and_si512(scale, exponent), one);
            const __m512 inverse = _mm512_castsi512_ps(_mm512_sub_epi32(quotient, power));
            _mm512_storeu_ps(params->scale + g, _mm512_castsi512_ps(scale));
            _mm512_storeu_ps(params->inverse + g, inverse);
            const __m512i a_low = _mm512_cvttps_epi32(_mm512_fmadd_ps(below, inverse, half));
            const __m512i a_high = _mm512_cvttps_epi32(_mm512_fmadd_ps(above, inverse, half));
            const __mmask16 positive = (__mmask16)~_mm512_movepi32_mask(_mm512_castps_si512(least));
            words[j] = _mm512_srli_epi32(scale, 16);
            zeros[j] = _mm512_mask_sub_epi32(a_low, positive, _mm512_setzero_si512(), a_low);
            any[j] = _mm512_or_si512(a_low, a_high);
        }
        const __mmask32 none = _mm512_testn_epi16_mask(narrowed(any[0], any[1]), _mm512_set1_epi32(-1));
        const __m512i z = _mm512_mask_mov_epi16(narrowed(zeros[0], zeros[1]), none, load(planes->base + i));
        store(params->s + i, narrowed(words[0], words[1]));
        store(params->z + i, z);
        store(params->offset + i, _mm512_add_epi16(z, load(planes->full + i)));
    }
    return tiny == 0;
}

void lynx_avx512_choose(int dtype, const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params) {
    if (dtype == LYNX_FLOAT16) {
        choose_as(LYNX_FLOAT16, planes, low, high, params);
    } else if (!choose_quickly(planes, low, high, params)) {
        choose_as(LYNX_BFLOAT16, planes, low, high, params);
    }
}

bool lynx_avx512_are_plain(int dtype, const int16_t *low, const int16_t *high) {
    const __m512i limit = _mm512_set1_epi16(LYNX_DTYPES[dtype].special), less = _mm512_set1_epi16((int16_t)-LYNX_DTYPES[dtype].special);
    __mmask32 odd = 0;
    for (int i = 0; i < 2; i++) {
        const __m512i l = load(low + 32 * i), h = load(high + 32 * i);
        odd |= _mm512_cmpeq_epi16_mask(l, h) | _mm512_cmpge_epi16_mask(h, limit) | _mm512_cmplt_epi16_mask(l, less);
    }
    return odd == 0;
}

/* Of each 128-bit lane, the least signed word. */
INLINE __m512i least_of_lanes(__m512i v) {
    v = _mm512_min_epi16(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
    v = _mm512_min_epi16(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
    return _mm512_min_epi16(v, _mm512_srli_epi32(v, 16));
}

void lynx_avx512_pack_params(const lynx_params *params, lynx_packed *packed, uint8_t *out) {
    const __m512i ones = _mm512_set1_epi32(-1), s[2] = {load(params->s), load(params->s + 32)}; /* no word is negative */
    const __m512i z[2] = {load(params->z), load(params->z + 32)};
    const __m512i s_ends = FOLD(low_halves, high_halves, _mm512_min_epi16(s[0], s[1]), _mm512_xor_si512(_mm512_max_epi16(s[0], s[1]), ones));
    const __m512i z_ends = FOLD(low_halves, high_halves, _mm512_min_epi16(z[0], z[1]), _mm512_xor_si512(_mm512_max_epi16(z[0], z[1]), ones));
    const __m512i ends = least_of_lanes(FOLD(even_quarters, odd_quarters, s_ends, z_ends));
    int16_t least[32];
    store(least, ends);
    *packed = packed_as(least[0], ~least[8], least[16], ~least[24]);
    const __m512i s_low = _mm512_set1_epi16((int16_t)packed->s_low), z_low = _mm512_set1_epi16((int16_t)packed->z_low);
    /* Scales and zero points of two groups in each 64 bits: channels 8 i to 8 i + 3 in the lower half of lane i of `first`. */
    _Alignas(64) uint64_t first[ROW / 4], second[ROW / 4];
    for (int i = 0; i < 2; i++) {
        const __m512i scale = _mm512_srli_epi16(_mm512_sub_epi16(s[i], s_low), 2), zero = _mm512_sub_epi16(z[i], z_low);
        store(first + 8 * i, _mm512_unpacklo_epi16(scale, zero));
        store(second + 8 * i, _mm512_unpackhi_epi16(scale, zero));
    }
    IN_MEMORY(first);
    IN_MEMORY(second);
    const uint64_t field = ((1ull << packed->s_bits) - 1) | ((1ull << packed->z_bits) - 1) << 16, pair = field | field << 32;
    uint64_t pairs[ROW / 2];
    for (int i = 0; i < ROW / 4; i += 2) {
        pairs[2 * i] = _pext_u64(first[i], pair);
        pairs[2 * i + 1] = _pext_u64(first[i + 1], pair);
        pairs[2 * i + 2] = _pext_u64(second[i], pair);
        pairs[2 * i + 3] = _pext_u64(second[i + 1], pair);
    }
    put_fields(pairs, (uint32_t)(packed->s_bits + packed->z_bits), out);
}

void lynx_avx512_add_spreads(int dtype, const int16_t *low, const int16_t *high, lynx_spread *sums) {
    add_spreads(dtype, low, high, sums);
}

void lynx_avx512_add_sizes(int dtype, const uint16_t *most, lynx_spread *sums) {
    add_sizes(dtype, most, sums);
}

bool lynx_avx512_params(const lynx_fields *in, const lynx_planes *planes, bool full, lynx_params *out) {
    return params(in, planes, full, out);
}

AVX512_END
#endif
