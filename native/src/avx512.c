/* AVX-512 kernels (F, BW, DQ, VL, VBMI, VBMI2: Ice Lake, Zen 4 and later). The same bytes as scalar.c; the comments
 * there say what is computed, here only how. A row of 64 codes is one register, a row of words two.
 *
 * k * s is computed as code * s - offset * s with one fused multiply-add: both products and the result are exact. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"

/* --- folding -------------------------------------------------------------------------------------------------- */

/* What the centres of 64 channels are made of: by zero points and biases, or by the codes before. */
typedef struct {
    __mmask64 three, two, one; /* channels that fold so */
    __m512i bias;              /* of value channels, plus 32 */
    bool values;
} centres;

INLINE centres centres_of(const lynx_planes *planes, bool values, bool anchor, bool rest) {
    const __m512i low = _mm512_permutex2var_epi8(load(planes->bias), FIRST_BYTES, load(planes->bias + 32));
    return (centres){.three = (anchor ? planes->fold[0].three : 0) | (rest ? planes->fold[1].three : 0),
                     .two = anchor ? planes->fold[0].two : 0,
                     .one = rest ? planes->fold[1].two : 0,
                     .bias = _mm512_add_epi8(low, _mm512_set1_epi8(32)),
                     .values = values};
}

INLINE uint8_t saturated(int x) {
    return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x);
}

/* (centre - 4) * 32, modulo 256. zero + bias + 16 is worked out in bytes: where they saturate, the centre does too. */
INLINE __m512i from_middle(const centres *c, int zero, __m512i before) {
    __m512i centre;
    if (c->values) {
        const __m512i sum = _mm512_adds_epu8(_mm512_set1_epi8((char)saturated(zero + 12)), c->bias);
        centre = _mm512_max_epu8(_mm512_subs_epu8(sum, _mm512_set1_epi8(28)), _mm512_set1_epi8(32));
    } else { /* half way from the middle to the code before: (before / 32 + 1) / 2 + 2 */
        const __m512i top = _mm512_and_si512(_mm512_srli_epi16(before, 5), _mm512_set1_epi8(7));
        const __m512i half = _mm512_add_epi8(_mm512_avg_epu8(top, _mm512_setzero_si512()), _mm512_set1_epi8(2));
        centre = _mm512_slli_epi16(half, 5);
    }
    return _mm512_xor_si512(_mm512_and_si512(centre, _mm512_set1_epi8((char)0xe0)), _mm512_set1_epi8((char)0x80));
}

/* Codes with their two top bits replaced by what a table has for them and the code before, of either half, or for a value's
 * zero in [0, 64), [64, 96), [96, 128), and mirrored, from row 1 on. */
INLINE __m512i replaced_two(const centres *c, __m512i code, int zero, __m512i before, __m128i by_code, __m256i by_zero) {
    const __m512i top = _mm512_and_si512(_mm512_srli_epi16(code, 6), _mm512_set1_epi8(3));
    __m512i place;
    if (c->values) {
        const __m512i sum = _mm512_adds_epu8(_mm512_set1_epi8((char)saturated(zero)), c->bias);
        const __m512i least = _mm512_max_epu8(_mm512_subs_epu8(sum, _mm512_set1_epi8(32)), _mm512_set1_epi8(32));
        const __m512i at = _mm512_min_epu8(least, _mm512_set1_epi8((char)223));
        const __m512i row = _mm512_and_si512(_mm512_srli_epi16(at, 3), _mm512_set1_epi8(0x1c));
        place = _mm512_permutexvar_epi8(_mm512_or_si512(row, top), _mm512_castsi256_si512(by_zero));
    } else {
        const __m512i half = _mm512_and_si512(_mm512_srli_epi16(before, 5), _mm512_set1_epi8(4));
        place = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(by_code), _mm512_or_si512(half, top));
    }
    return _mm512_or_si512(_mm512_and_si512(code, _mm512_set1_epi8(63)), _mm512_slli_epi16(place, 6));
}

/* Codes of 1 bit as their distance from the middle; its own reverse. */
INLINE __m512i replaced_one(__m512i code, __mmask64 channels) {
    return _mm512_xor_si512(code, _mm512_maskz_set1_epi8(channels & ~_mm512_movepi8_mask(code), 0x60));
}

INLINE __m512i centred_row(const centres *c, __m512i code, int zero, __m512i before) {
    const __m128i by_code = _mm_setr_epi8(2, 0, 1, 3, 3, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i by_zero = _mm256_setr_epi8(0, 0, 0, 0, 0, 1, 2, 3, 1, 0, 2, 3, 2, 0, 1, 3, 3, 1, 0, 2, 3, 2, 0, 1, 3, 2, 1, 0, 0, 0, 0, 0);
    __m512i out = _mm512_mask_sub_epi8(code, c->three, code, from_middle(c, zero, before));
    out = c->one == 0 ? out : replaced_one(out, c->one);
    return c->two == 0 ? out : _mm512_mask_mov_epi8(out, c->two, replaced_two(c, code, zero, before, by_code, by_zero));
}

INLINE __m512i uncentred_row(const centres *c, __m512i code, int zero, __m512i before) {
    const __m128i by_code = _mm_setr_epi8(1, 2, 0, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i by_zero = _mm256_setr_epi8(0, 0, 0, 0, 0, 1, 2, 3, 1, 0, 2, 3, 1, 2, 0, 3, 2, 1, 3, 0, 2, 3, 1, 0, 3, 2, 1, 0, 0, 0, 0, 0);
    __m512i out = _mm512_mask_add_epi8(code, c->three, code, from_middle(c, zero, before));
    out = c->one == 0 ? out : replaced_one(out, c->one);
    return c->two == 0 ? out : _mm512_mask_mov_epi8(out, c->two, replaced_two(c, code, zero, before, by_code, by_zero));
}

#define FOLD_AT_ONCE
#define COMPRESS64 _pext_u64
#define EXPAND64 _pdep_u64
#define POPCOUNT64 __builtin_popcountll
#include "fold.h"
#define ROWS_SURVEY
#define ROWS_RESCALE
#define ROWS_FIELDS
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

/* Magnitude words that stay in the range that exponents move, whatever the exponent: from INNER on, so many. */
#define RESCALE_INNER (RESCALE_FIRST + 1024)
#define RESCALE_SPAN (RESCALE_COUNT - 2048)

/* Words outside the range that exponents move stay; those that leave it come in again at the other end. */
static __attribute__((noinline)) __m512i rescaled_each(__m512i word, const int16_t *shifts) {
    uint16_t words[32];
    store(words, word);
    for (int c = 0; c < 32; c++) {
        words[c] = rescaled(words[c], shifts[c]);
    }
    return load(words);
}

INLINE __m512i rescaled_row(__m512i word, __m512i shift, const int16_t *shifts) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), inner = _mm512_set1_epi16(RESCALE_INNER);
    const __m512i from = _mm512_sub_epi16(_mm512_and_si512(word, magnitude), inner);
    const __mmask32 inside = _mm512_cmplt_epu16_mask(from, _mm512_set1_epi16(RESCALE_SPAN));
    if (__builtin_expect(_mm512_mask_test_epi16_mask((__mmask32)~inside, word, magnitude) != 0, 0)) {
        return rescaled_each(word, shifts);
    }
    return _mm512_mask_sub_epi16(word, inside, word, shift);
}

static void rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride) {
    const __m512i shift[2] = {load(shifts), load(shifts + 32)};
    for (int t = 0; t < tokens; t++, rows += stride, out += out_stride) {
        for (int i = 0; i < 2; i++) {
            store(out + 32 * i, rescaled_row(load(rows + 32 * i), shift[i], shifts + 32 * i));
        }
    }
}

/* Up to 8 rows, of which the words that do not simply move are looked for afterwards, in all at once. */
INLINE void rescale_octet(const __m512i shift[2], const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int count,
                          uint16_t *out) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), inner = _mm512_set1_epi16(RESCALE_INNER);
    __m512i farthest = _mm512_setzero_si512();
    for (int t = 0; t < count; t++) {
        for (int i = 0; i < 2; i++) {
            const __m512i word = load(rows + t * stride + 32 * i);
            farthest = _mm512_max_epu16(farthest, _mm512_sub_epi16(_mm512_and_si512(word, magnitude), inner));
            store(out + t * ROW + 32 * i, _mm512_sub_epi16(word, shift[i]));
        }
    }
    if (__builtin_expect(_mm512_cmpge_epu16_mask(farthest, _mm512_set1_epi16(RESCALE_SPAN)) != 0, 0)) {
        for (int t = 0; t < count; t++) {
            for (int i = 0; i < 2; i++) {
                uint16_t *at = out + t * ROW + 32 * i;
                store(at, rescaled_row(_mm512_add_epi16(load(at), shift[i]), shift[i], shifts + 32 * i));
            }
        }
    }
}

/* Of value groups, whose words are rescaled first, unless `shifts` is null. */
INLINE void range_of_values(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                            int16_t *low, int16_t *high) {
    const __m512i none = _mm512_setzero_si512();
    const __m512i shift[2] = {shifts == NULL ? none : load(shifts), shifts == NULL ? none : load(shifts + 32)};
    for (int first = 0; first < tokens; first += 8) {
        const int count = tokens - first < 8 ? tokens - first : 8;
        if (shifts != NULL) {
            rescale_octet(shift, shifts, rows + first * stride, stride, count, out + first * ROW);
        }
        __m512i r[8]; /* least words in the lower half, complements of the largest in the upper */
        for (int j = 0; j < 8; j++) {
            const int t = first + (j < count ? j : count - 1);
            const uint16_t *row = shifts == NULL ? rows + t * stride : out + t * ROW;
            const __m512i a = ordered16(load(row)), b = ordered16(load(row + 32));
            const __m512i largest = _mm512_max_epi16(a, b);
            r[j] = FOLD(low_halves, high_halves, _mm512_min_epi16(a, b), _mm512_xor_si512(largest, _mm512_set1_epi32(-1)));
        }
        for (int j = 0; j < 4; j++) { /* quarters: least and largest of token 2j, of 2j + 1 */
            r[j] = FOLD(even_quarters, odd_quarters, r[2 * j], r[2 * j + 1]);
        }
        for (int j = 0; j < 2; j++) { /* 64-bit units of tokens 4j and 4j + 2, or 4j + 1 and 4j + 3 */
            r[j] = FOLD(_mm512_unpacklo_epi64, _mm512_unpackhi_epi64, r[2 * j], r[2 * j + 1]);
        }
        /* 32-bit units of tokens 0, 4, 2, 6, or 1, 5, 3, 7 */
        r[0] = FOLD(_mm512_unpacklo_epi32, _mm512_unpackhi_epi32, _mm512_shuffle_epi32(r[0], _MM_PERM_DBCA),
                    _mm512_shuffle_epi32(r[1], _MM_PERM_DBCA));
        const __m512i both = _mm512_min_epi16(r[0], _mm512_srli_epi32(r[0], 16));
        const __m512i order = _mm512_setr_epi32(0, 8, 2, 10, 1, 9, 3, 11, 4, 12, 6, 14, 5, 13, 7, 15);
        const __m256i result = _mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(order, both));
        const __m128i largest = _mm_xor_si128(_mm256_extracti128_si256(result, 1), _mm_set1_epi32(-1));
        _mm_storeu_si128((__m128i *)(low + first), _mm256_castsi256_si128(result));
        _mm_storeu_si128((__m128i *)(high + first), largest);
    }
}

static void range(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    if (part == LYNX_VALUE) {
        range_of_values(NULL, rows, stride, tokens, NULL, low, high);
        return;
    }
    __m512i least[2], largest[2];
    for (int i = 0; i < 2; i++) {
        least[i] = largest[i] = ordered16(load(rows + 32 * i));
    }
    for (int t = 1; t < tokens; t++) {
        for (int i = 0; i < 2; i++) {
            const __m512i o = ordered16(load(rows + t * stride + 32 * i));
            least[i] = _mm512_min_epi16(least[i], o);
            largest[i] = _mm512_max_epi16(largest[i], o);
        }
    }
    for (int i = 0; i < 2; i++) {
        store(low + 32 * i, least[i]);
        store(high + 32 * i, largest[i]);
    }
}

static void rescale_range(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out, int16_t *low,
                          int16_t *high) {
    range_of_values(shifts, rows, stride, tokens, out, low, high);
}

#define PREFETCHED 64 /* rows ahead */

INLINE void survey_row(const uint16_t *row, const uint16_t *ahead, __m512i least[2], __m512i largest[2], __m512i negative[2]) {
    for (int i = 0; i < 2; i++) {
        __builtin_prefetch(ahead + 32 * i, 0, 2);
        const __m512i word = load(row + 32 * i), o = ordered16(word);
        least[i] = _mm512_min_epi16(least[i], o);
        largest[i] = _mm512_max_epi16(largest[i], o);
        negative[i] = _mm512_sub_epi16(negative[i], _mm512_srai_epi16(word, 15));
    }
}

/* Both halves in turn: two streams come from memory faster than one. Fetched into the cache that holds the tile until it is encoded. */
static void survey(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high, uint16_t *signs) {
    const int half = tokens / 2;
    __m512i least[2], largest[2], negative[2];
    for (int i = 0; i < 2; i++) {
        least[i] = _mm512_set1_epi16(INT16_MAX);
        largest[i] = _mm512_set1_epi16(INT16_MIN);
        negative[i] = _mm512_setzero_si512();
    }
    for (int t = 0; t < half; t++, rows += stride) {
        survey_row(rows, rows + PREFETCHED * stride, least, largest, negative);
        survey_row(rows + half * stride, rows + (half + PREFETCHED) * stride, least, largest, negative);
    }
    if (tokens % 2 != 0) {
        survey_row(rows + half * stride, rows, least, largest, negative);
    }
    for (int i = 0; i < 2; i++) {
        store(low + 32 * i, least[i]);
        store(high + 32 * i, largest[i]);
        if (signs != NULL) {
            store(signs + 32 * i, negative[i]);
        }
    }
}

static void choose(int dtype, const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params) {
    if (dtype == LYNX_BFLOAT16) {
        choose_as(LYNX_BFLOAT16, planes, low, high, params);
    } else {
        choose_as(LYNX_FLOAT16, planes, low, high, params);
    }
}

#define INTEGERS 0x1.8p23f /* binary32 near it holds integers only: what is added is rounded to one, in the lower bits */

/* At most so many bits of level 2 for integers of each size, the last also for larger ones; as in avx2.c, where the largest
 * have a bit less. */
#define RANK_BITS _mm512_set_epi8(3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 8, 28)

/* To the nearest integer, of products that are no ties: inverses are a little larger than 1 / s. Returns the bound on the bits
 * of level 2 if that is `wanted`. A row `ahead` is fetched with each: more at once would keep other loads waiting. */
INLINE uint64_t quantise_as(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_params *params,
                            __mmask64 used, bool wanted, const lynx_stretch *ahead, ptrdiff_t ahead_stride, uint8_t *codes) {
    __m512 inverse[4], offset[4];
    float offsets[ROW];
    uint32_t zeros[ROW]; /* offsets modulo 256, in each byte */
    for (int g = 0; g < ROW; g++) {
        offsets[g] = INTEGERS + (float)params->offset[g];
        zeros[g] = (uint32_t)(params->offset[g] & 255) * 0x01010101u;
    }
    for (int i = 0; i < 2; i++) {
        even_odd(params->inverse + 32 * i, &inverse[2 * i], &inverse[2 * i + 1]);
        even_odd(offsets + 32 * i, &offset[2 * i], &offset[2 * i + 1]);
    }
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i within = _mm512_setr_epi32(0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100,
                                             0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302);
    const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x08080808)), within);
    const __m512i lowest = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)); /* byte of 32 bits */
    const __m512i none = _mm512_setzero_si512(), bits_of = RANK_BITS, largest = _mm512_set1_epi8(63);
    __m512i zero = lower_bytes(load(params->offset), load(params->offset + 32)), few = none, sum = none;
    const uint16_t *next = ahead == NULL ? NULL : ahead->row;
    int left = ahead == NULL ? 0 : ahead->count;
    for (int t = 0; t < tokens; t++) {
        if (ahead != NULL) {
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(next + 32, 0, 2);
            next += ahead_stride;
            if (--left == 0) {
                ahead++;
                next = ahead->row;
                left = ahead->count;
            }
        }
        if (part == LYNX_VALUE) {
            inverse[0] = inverse[1] = inverse[2] = inverse[3] = _mm512_set1_ps(params->inverse[t]);
            offset[0] = offset[1] = offset[2] = offset[3] = _mm512_set1_ps(offsets[t]);
        }
        __m512i code[4];
        for (int i = 0; i < 2; i++) {
            const __m512i words = load(rows + t * stride + 32 * i);
            __m512 even, odd;
            if (dtype == LYNX_BFLOAT16) {
                even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
                odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
            } else {
                even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
                odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
            }
            code[2 * i] = _mm512_castps_si512(_mm512_fmadd_ps(even, inverse[2 * i], offset[2 * i]));
            code[2 * i + 1] = _mm512_castps_si512(_mm512_fmadd_ps(odd, inverse[2 * i + 1], offset[2 * i + 1]));
        }
        __m512i bytes = _mm512_mask_shuffle_epi8(code[0], 0x2222222222222222ull, code[1], lowest);
        bytes = _mm512_mask_shuffle_epi8(bytes, 0x4444444444444444ull, code[2], lowest);
        bytes = _mm512_mask_shuffle_epi8(bytes, 0x8888888888888888ull, code[3], lowest);
        bytes = _mm512_permutexvar_epi8(order, bytes);
        store(codes + t * ROW, bytes);
        if (wanted) { /* integers modulo 256 are no larger than those they stand for, and their bits no fewer */
            zero = part == LYNX_KEY ? zero : _mm512_set1_epi32((int)zeros[t]);
            const __m512i size = _mm512_min_epu8(_mm512_abs_epi8(_mm512_sub_epi8(bytes, zero)), largest);
            few = _mm512_add_epi8(few, _mm512_maskz_permutexvar_epi8(used, size, bits_of));
            if (t % 8 == 7 || t == tokens - 1) { /* 8 times 28 is a byte */
                sum = _mm512_add_epi64(sum, _mm512_sad_epu8(few, none));
                few = none;
            }
        }
    }
    return wanted ? (uint64_t)_mm512_reduce_add_epi64(sum) : 0;
}

static void quantise(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens,
                     const lynx_planes *planes, const lynx_params *params, uint8_t *codes) {
    (void)planes; /* codes of finite words are in range without clamping */
    if (dtype == LYNX_FLOAT16) {
        quantise_as(part, LYNX_FLOAT16, rows, stride, tokens, params, 0, false, NULL, 0, codes);
    } else if (part == LYNX_KEY) {
        quantise_as(LYNX_KEY, LYNX_BFLOAT16, rows, stride, tokens, params, 0, false, NULL, 0, codes);
    } else {
        quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, 0, false, NULL, 0, codes);
    }
}

static uint64_t quantise_ahead(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_planes *planes,
                               const lynx_params *params, bool bounded, const lynx_stretch *ahead, ptrdiff_t ahead_stride,
                               uint8_t *codes) {
    const __mmask64 used = planes->used;
    if (part == LYNX_KEY) {
        return quantise_as(LYNX_KEY, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, NULL, 0, codes);
    }
    return ahead == NULL ? quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, NULL, 0, codes)
           : bounded ? quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, ahead, ahead_stride, codes)
                     : quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, false, ahead, ahead_stride, codes);
}

/* Registers 4..7 as `transpose` makes them. */
INLINE void transpose_to_upper(__m512i *r) {
    for (int i = 0; i < 4; i++) {
        r[i + 4] = _mm512_ternarylogic_epi64(_mm512_srli_epi16(r[i], 4), r[i + 4], _mm512_set1_epi8(0x0f), 0xe4);
    }
    SWAP(r[4], r[6], 2, 0x33);
    SWAP(r[5], r[7], 2, 0x33);
    SWAP(r[4], r[5], 1, 0x55);
    SWAP(r[6], r[7], 1, 0x55);
}

static void pack(const lynx_planes *planes, const uint8_t *codes, int tokens, uint8_t *anchor, uint8_t *rest) {
    const int bits = planes->widths[0];
    const uint64_t *const masks = planes->in_anchor, used = planes->used;
    for (int first = 0; first < tokens; first += 8, codes += 8 * ROW) {
        __m512i r[8];
        for (int t = 0; t < 8; t++) {
            r[t] = load(codes + t * ROW);
        }
        if (rest == NULL && planes->in_anchor[4] == 0) {
            transpose_to_upper(r);
        } else {
            transpose(r, false);
        }
        if (planes->uniform) {
            for (int p = 0; p < 8; p++) {
                if (p < bits && anchor != NULL) {
                    store(anchor + ROW * p, r[7 - p]);
                } else if (p >= bits && rest != NULL) {
                    store(rest + ROW * (p - bits), r[7 - p]);
                }
            }
            anchor = anchor == NULL ? NULL : anchor + planes->anchor_octet;
            rest = rest == NULL ? NULL : rest + planes->rest_octet;
            continue;
        }
        for (int p = 0; p < 8; p++) {
            const int count = planes->anchor_count[p];
            if (anchor != NULL && count != 0) {
                store(anchor, _mm512_maskz_compress_epi8(masks[p], r[7 - p]));
                anchor += count;
            }
            if (rest != NULL && count != planes->channels) {
                store(rest, _mm512_maskz_compress_epi8(used & ~masks[p], r[7 - p]));
                rest += planes->channels - count;
            }
        }
    }
}

INLINE void unpack_uniform(int bits, const uint8_t *anchor, const uint8_t *rest, int octets, bool upper,
                           uint8_t *codes) {
    for (int octet = 0; octet < octets; octet++, codes += 8 * ROW) {
        __m512i r[8];
        for (int p = 0; p < (upper ? 4 : 8); p++) {
            if (p < bits) {
                r[7 - p] = load(anchor + (octet * bits + p) * ROW);
            } else {
                r[7 - p] = rest == NULL ? _mm512_setzero_si512() : load(rest + (octet * (8 - bits) + p - bits) * ROW);
            }
        }
        transpose(r, upper);
        for (int t = 0; t < 8; t++) {
            store(codes + t * ROW, r[t]);
        }
    }
}

static void unpack(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int tokens, uint8_t *codes) {
    const int octets = (tokens + 7) / 8;
    if (planes->uniform) {
        if (rest == NULL && planes->widths[0] <= 4) {
            unpack_uniform(planes->widths[0], anchor, rest, octets, true, codes);
        } else {
            unpack_uniform(planes->widths[0], anchor, rest, octets, false, codes);
        }
        return;
    }
    const uint64_t *const masks = planes->in_anchor, used = planes->used;
    for (int octet = 0; octet < octets; octet++, codes += 8 * ROW) {
        __m512i r[8];
        for (int p = 0; p < 8; p++) {
            r[7 - p] = _mm512_maskz_expand_epi8(masks[p], load(anchor));
            anchor += planes->anchor_count[p];
            if (rest != NULL) {
                r[7 - p] = _mm512_mask_expand_epi8(r[7 - p], used & ~masks[p], load(rest));
                rest += planes->channels - planes->anchor_count[p];
            }
        }
        transpose(r, false);
        for (int t = 0; t < 8; t++) {
            store(codes + t * ROW, r[t]);
        }
    }
}

/* Rows of a section's planes: in flat form, or folded with streams D2 and D3 read out of pairs. */
typedef struct {
    const lynx_fold *fold;
    const uint8_t *at;       /* of the next octet */
    __mmask64 rows[8];       /* channels with a byte in each row, flat */
    bool folded;
    _Alignas(64) uint64_t moved[ROW], far[ROW], farther[ROW]; /* D1, D2 and D3 in their places, 8 words an octet */
} section_reader;

/* Where D1 is, of a folded octet. */
INLINE __m512i moved_of(const lynx_fold *fold, const uint8_t *octet, __m512i valid) {
    const __m512i first = _mm512_maskz_expand_epi8(fold->folded_rows[0], load(octet));
    const __m512i second = _mm512_maskz_expand_epi8(fold->folded_rows[1], load(octet + _mm_popcnt_u64(fold->folded_rows[0])));
    const __m512i two = fold->two_row == 0 ? first : second;
    const __m512i moved = _mm512_mask_mov_epi8(second, fold->two, two);
    return _mm512_maskz_mov_epi8(fold->three | fold->two, _mm512_and_si512(moved, valid));
}

INLINE __m512i valid_tokens(int tokens) {
    return _mm512_set1_epi8((char)((1u << (tokens < 8 ? tokens : 8)) - 1));
}

INLINE bool start_section(section_reader *reader, const lynx_fold *fold, const uint8_t *in, uint32_t entry, int tokens) {
    reader->fold = fold;
    reader->at = in;
    reader->folded = entry != FLAT;
    if (!reader->folded) {
        return true;
    }
    const int octets = (tokens + 7) / 8;
    __m512i counts = _mm512_setzero_si512();
    for (int o = 0; o < octets; o++) {
        const __m512i moved = moved_of(fold, in + o * fold->folded_size, valid_tokens(tokens - 8 * o));
        store(reader->moved + 8 * o, moved);
        counts = _mm512_add_epi8(counts, _mm512_popcnt_epi8(moved)); /* at most 64 */
    }
    const uint32_t count = (uint32_t)_mm512_reduce_add_epi64(_mm512_sad_epu8(counts, _mm512_setzero_si512()));
    uint8_t unpaired[2][FAR_BYTES];
    const uint8_t *streams[2];
    if (!read_streams(in + octets * fold->folded_size, entry, count, unpaired, streams)) {
        return false;
    }
    uint32_t at = 0, at_farther = 0; /* all octets before any is loaded whole, for which what was stored must have settled */
    for (int w = 0; w < 8 * octets; w++) {
        const uint64_t moved = reader->moved[w], far = _pdep_u64(get_bits64(streams[0], at), moved);
        reader->far[w] = far;
        reader->farther[w] = _pdep_u64(get_bits64(streams[1], at_farther), far);
        at += (uint32_t)_mm_popcnt_u64(moved);
        at_farther += (uint32_t)_mm_popcnt_u64(far);
    }
    return true;
}

/* An octet's planes are added to `planes`. */
INLINE void read_octet(section_reader *reader, int octet, __m512i *planes) {
    const lynx_fold *fold = reader->fold;
    const uint8_t *in = reader->at;
    if (reader->folded) {
        __m512i row[3];
        for (int p = 0; p < 3; p++) {
            row[p] = _mm512_maskz_expand_epi8(fold->folded_rows[p], load(in));
            in += _mm_popcnt_u64(fold->folded_rows[p]);
        }
        const __m512i d1 = load(reader->moved + 8 * octet), high = load(reader->far + 8 * octet);
        const __m512i low = _mm512_or_si512(_mm512_andnot_si512(high, d1), load(reader->farther + 8 * octet));
        /* Of what has a sign, which is plane 0: the others' signs count as ones. 0xc3 is ~(x ^ y). */
        const __m512i sign = _mm512_mask_mov_epi8(_mm512_set1_epi8(-1), fold->three, row[0]);
        const __m512i upper = _mm512_ternarylogic_epi64(high, sign, sign, 0xc3), lower = _mm512_ternarylogic_epi64(low, sign, sign, 0xc3);
        if (fold->two_row == 0) {
            row[0] = _mm512_mask_mov_epi8(row[0], fold->two, upper);
            row[1] = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(fold->two, lower), fold->three, upper);
            row[2] = _mm512_mask_mov_epi8(row[2], fold->three, lower);
        } else {
            row[1] = _mm512_maskz_mov_epi8(fold->three | fold->two, upper);
            row[2] = _mm512_mask_mov_epi8(row[2], fold->three | fold->two, lower);
        }
        for (int p = 0; p < 3; p++) {
            planes[p] = _mm512_or_si512(planes[p], row[p]);
        }
    }
    for (int p = reader->folded ? 3 : 0; p < 8; p++) {
        planes[p] = _mm512_mask_expand_epi8(planes[p], reader->rows[p], load(in));
        in += _mm_popcnt_u64(reader->rows[p]);
    }
    reader->at = in;
}

static int unpack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *anchor, uint32_t anchor_entry,
                          const uint8_t *rest, uint32_t rest_entry, int tokens, uint8_t *codes) {
    section_reader readers[2];
    const uint64_t *const masks = planes->in_anchor, used = planes->used;
    for (int p = 0; p < 8; p++) {
        readers[0].rows[p] = masks[p];
        readers[1].rows[p] = used & ~masks[p];
    }
    if (!start_section(&readers[0], &planes->fold[0], anchor, anchor_entry, tokens)) {
        return IN_ANCHOR;
    }
    if (rest != NULL && !start_section(&readers[1], &planes->fold[1], rest, rest_entry, tokens)) {
        return IN_REST;
    }
    const centres c = centres_of(planes, zeros != NULL, anchor_entry != FLAT, rest != NULL && rest_entry != FLAT);
    __m512i before = _mm512_set1_epi8(96);
    for (int first = 0; first < tokens; first += 8) {
        __m512i in_order[8], r[8];
        for (int p = 0; p < 8; p++) {
            in_order[p] = _mm512_setzero_si512();
        }
        read_octet(&readers[0], first / 8, in_order);
        if (rest != NULL) {
            read_octet(&readers[1], first / 8, in_order);
        }
        for (int p = 0; p < 8; p++) {
            r[7 - p] = in_order[p];
        }
        transpose(r, false);
        for (int t = 0; t < 8; t++) {
            before = uncentred_row(&c, r[t], zeros == NULL ? 0 : zeros[first + t], before);
            store(codes + (first + t) * ROW, before);
        }
    }
    return -1;
}

/* An octet's rows of a section, folded; the streams' bits are added to those there are. Returns the end of the rows. */
INLINE uint8_t *fold_octet(const lynx_fold *fold, const __mmask64 *rows, const __m512i *planes, __m512i valid,
                           uint8_t streams[2][FAR_BYTES], uint32_t bits[2], uint8_t *out) {
    const __m512i sign = _mm512_mask_mov_epi8(_mm512_set1_epi8(-1), fold->three, planes[0]);
    const __m512i upper = _mm512_mask_mov_epi8(planes[1], fold->two, planes[fold->two_row]);
    const __m512i lower = _mm512_mask_mov_epi8(planes[2], fold->two, planes[fold->two_row + 1]);
    const __m512i folds = _mm512_maskz_mov_epi8(fold->three | fold->two, valid);
    const __m512i high = _mm512_and_si512(_mm512_ternarylogic_epi64(upper, sign, sign, 0xc3), folds);
    const __m512i low = _mm512_and_si512(_mm512_ternarylogic_epi64(lower, sign, sign, 0xc3), folds);
    _Alignas(64) uint64_t far[8], farther[8], moved[8];
    const __m512i d1 = _mm512_or_si512(high, low);
    store(far, high);
    store(farther, low);
    store(moved, d1);
    IN_MEMORY(far);
    IN_MEMORY(farther);
    IN_MEMORY(moved);
    for (int w = 0; w < 8; w++) {
        put_bits64(streams[0], bits[0], _pext_u64(far[w], moved[w]));
        put_bits64(streams[1], bits[1], _pext_u64(farther[w], far[w]));
        bits[0] += (uint32_t)_mm_popcnt_u64(moved[w]);
        bits[1] += (uint32_t)_mm_popcnt_u64(far[w]);
    }
    const __m512i row[3] = {fold->two_row == 0 ? _mm512_mask_mov_epi8(planes[0], fold->two, d1) : planes[0], d1, planes[2]};
    for (int p = 0; p < 8; p++) {
        const __mmask64 mask = p < 3 ? fold->folded_rows[p] : rows[p];
        store(out, _mm512_maskz_compress_epi8(mask, p < 3 ? row[p] : planes[p])); /* up to 64 bytes beyond */
        out += _mm_popcnt_u64(mask);
    }
    return out;
}

static void pack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens,
                        uint8_t *anchor, uint8_t *rest, uint32_t entries[2]) {
    const uint64_t *const masks = planes->in_anchor, used = planes->used;
    __mmask64 rows[2][8];
    for (int p = 0; p < 8; p++) {
        rows[0][p] = masks[p];
        rows[1][p] = used & ~masks[p];
    }
    uint8_t *out[2] = {anchor, rest};
    uint8_t streams[2][2][FAR_BYTES];
    uint32_t bits[2][2] = {{0}};
    for (int i = 0; i < 2; i++) {
        if (out[i] != NULL) {
            memset(streams[i], 0, sizeof streams[i]);
        }
    }
    const centres c = centres_of(planes, zeros != NULL, true, true);
    __m512i before = _mm512_set1_epi8(96);
    for (int first = 0; first < tokens; first += 8) {
        __m512i r[8], in_order[8];
        for (int t = 0; t < 8; t++) {
            const __m512i code = load(codes + (first + t) * ROW);
            r[t] = first + t < tokens ? centred_row(&c, code, zeros == NULL ? 0 : zeros[first + t], before)
                                      : _mm512_setzero_si512();
            before = code;
        }
        transpose(r, false);
        for (int p = 0; p < 8; p++) {
            in_order[p] = r[7 - p];
        }
        for (int i = 0; i < 2; i++) {
            if (out[i] != NULL) {
                out[i] = fold_octet(&planes->fold[i], rows[i], in_order, valid_tokens(tokens - first), streams[i], bits[i], out[i]);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        entries[i] = out[i] == NULL ? FLAT : write_streams(streams[i], bits[i], out[i]);
    }
}

static bool check(int part, const uint8_t *codes, int tokens, const lynx_planes *planes) {
    const __mmask64 used = planes->channels == ROW ? ~0ull : (1ull << planes->channels) - 1;
    __mmask64 bad = 0;
    __m512i low = load(planes->low), high = load(planes->high);
    for (int t = 0; t < tokens; t++) {
        const __m512i code = load(codes + t * ROW);
        if (part == LYNX_VALUE) {
            low = _mm512_set1_epi8((char)planes->low[t]);
            high = _mm512_set1_epi8((char)planes->high[t]);
        }
        bad |= _mm512_cmplt_epu8_mask(code, low) | _mm512_cmpgt_epu8_mask(code, high);
    }
    return (bad & used) == 0;
}

/* Scale, half of it, and offset, of 64 channels. */
typedef struct {
    __m512 scale[4], half[4], offset[4];
} lanes;

INLINE lanes of_channels(const lynx_params *params) {
    lanes l;
    for (int i = 0; i < 4; i++) {
        const __m512i offset = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(params->offset + 16 * i)));
        l.scale[i] = _mm512_loadu_ps(params->scale + 16 * i);
        l.half[i] = _mm512_mul_ps(l.scale[i], _mm512_set1_ps(0.5f));
        l.offset[i] = _mm512_cvtepi32_ps(offset);
    }
    return l;
}

INLINE lanes of_token(const lynx_params *params, int token) {
    const float s = params->scale[token];
    const __m512 scale = _mm512_set1_ps(s), half = _mm512_set1_ps(s * 0.5f);
    const __m512 offset = _mm512_set1_ps((float)params->offset[token]);
    return (lanes){{scale, scale, scale, scale}, {half, half, half, half}, {offset, offset, offset, offset}};
}

/* Subtract, then multiply: a fused code * scale - offset * scale would overflow for hostile parameters. */
INLINE __m512 integer_times_scale(const uint8_t *codes, __m512 scale, __m512 offset) {
    const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes)));
    return _mm512_mul_ps(_mm512_sub_ps(code, offset), scale);
}

INLINE __m512i words_of(int dtype, __m512 a, __m512 b) {
    if (dtype == LYNX_BFLOAT16) {
        const __m512i half = _mm512_set1_epi32(0x8000);
        return upper_words(_mm512_add_epi32(_mm512_castps_si512(a), half), _mm512_add_epi32(_mm512_castps_si512(b), half));
    }
    const __m512 top = _mm512_set1_ps(65504.0f), bottom = _mm512_set1_ps(-65504.0f);
    const __m256i first = _mm512_cvtps_ph(_mm512_max_ps(_mm512_min_ps(a, top), bottom), 0);
    const __m256i second = _mm512_cvtps_ph(_mm512_max_ps(_mm512_min_ps(b, top), bottom), 0);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

INLINE void dequantise_as(int part, int dtype, const uint8_t *codes, int tokens, const lynx_params *params,
                          const int16_t *shifts, uint16_t *const *rows) {
    const lanes channels = of_channels(params);
    const __m512i none = _mm512_setzero_si512();
    const __m512i shift[2] = {shifts == NULL ? none : load(shifts), shifts == NULL ? none : load(shifts + 32)};
    for (int t = 0; t < tokens; t++, codes += ROW) {
        if (part == LYNX_VALUE && _mm512_test_epi8_mask(load(codes), _mm512_set1_epi8(7)) == 0) {
            /* At most 5 bits: a table of all words of the token. */
            const __m512 step = _mm512_setr_ps(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
            const __m512 scale = _mm512_set1_ps(params->scale[t]), offset = _mm512_set1_ps((float)params->offset[t]);
            const __m512 k = _mm512_sub_ps(step, offset), upper = _mm512_add_ps(k, _mm512_set1_ps(128));
            const __m512i table = words_of(dtype, _mm512_mul_ps(k, scale), _mm512_mul_ps(upper, scale));
            for (int i = 0; i < 2; i++) {
                const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + 32 * i)));
                store(rows[t] + 32 * i, shifted(_mm512_permutexvar_epi16(_mm512_srli_epi16(code, 3), table), shift[i]));
            }
            continue;
        }
        const lanes l = part == LYNX_KEY ? channels : of_token(params, t);
        for (int i = 0; i < 4; i += 2) {
            const __m512i words = words_of(dtype, integer_times_scale(codes + 16 * i, l.scale[i], l.offset[i]),
                                           integer_times_scale(codes + 16 * i + 16, l.scale[i + 1], l.offset[i + 1]));
            store(rows[t] + 16 * i, part == LYNX_KEY ? words : shifted(words, shift[i / 2]));
        }
    }
}

static void dequantise(int part, int dtype, const uint8_t *codes, int tokens, const lynx_params *params,
                       const int16_t *shifts, uint16_t *const *rows) {
    if (dtype == LYNX_FLOAT16) {
        dequantise_as(part, LYNX_FLOAT16, codes, tokens, params, NULL, rows);
    } else if (part == LYNX_KEY) {
        dequantise_as(LYNX_KEY, LYNX_BFLOAT16, codes, tokens, params, NULL, rows);
    } else {
        dequantise_as(LYNX_VALUE, LYNX_BFLOAT16, codes, tokens, params, shifts, rows);
    }
}

static void stream(uint16_t *to, const uint16_t *rows, size_t words) {
    const size_t head = -((uintptr_t)to / 2) & 31; /* words up to a line of the cache */
    memcpy(to, rows, 2 * head);
    size_t at = head;
    for (; at + 32 <= words; at += 32) {
        _mm512_stream_si512((__m512i *)(to + at), load(rows + at));
    }
    memcpy(to + at, rows + at, 2 * (words - at));
}

static uint64_t rank_bound(int part, const uint8_t *codes, int tokens, int channels, const lynx_params *params) {
    return lynx_avx2.rank_bound(part, codes, tokens, channels, params);
}

static void pack_row(int word_bytes, const void *words, size_t count, uint8_t *const *planes) {
    lynx_avx2.pack_row(word_bytes, words, count, planes);
}

static void unpack_row(int word_bytes, const uint8_t *const *planes, size_t count, void *words) {
    lynx_avx2.unpack_row(word_bytes, planes, count, words);
}

const lynx_kernels lynx_avx512 = {
    .range = range,
    .survey = survey,
    .add_spreads = add_spreads,
    .params = params,
    .are_plain = are_plain,
    .choose = choose,
    .pack_params = pack_params,
    .quantise = quantise,
    .quantise_ahead = quantise_ahead,
    .pack = pack,
    .unpack = unpack,
    .check = check,
    .rescale = rescale,
    .rescale_range = rescale_range,
    .dequantise = dequantise,
    .place = lynx_avx512_place,
    .stream = stream,
    .unpack_folded = unpack_folded,
    .pack_folded = pack_folded,
    .rank = lynx_avx512_rank,
    .unrank = lynx_avx512_unrank,
    .rank_bound = rank_bound,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

AVX512_END
#endif
