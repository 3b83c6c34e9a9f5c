/* Extremes of groups for AVX-512, of words as they are or divided by powers of two. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"

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

void lynx_avx512_rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride) {
    const __m512i shift[2] = {load(shifts), load(shifts + 32)};
    for (int t = 0; t < tokens; t++, rows += stride, out += out_stride) {
        for (int i = 0; i < 2; i++) {
            store(out + 32 * i, rescaled_row(load(rows + 32 * i), shift[i], shifts + 32 * i));
        }
    }
}

/* Of up to 8 rows the least words and the complements of the largest, in the lower halves of lanes. Unless `out` is null it is for words
 * from which `shift` is taken away, which go there, and `small` says whether some of them are nearer to 0 than RESCALE_NEAR. */
INLINE __m512i range_of_octet(const __m512i shift[2], const uint16_t *rows, ptrdiff_t stride, int count, uint16_t *out,
                              __mmask32 *small) {
    const __m512i upper = _mm512_set1_epi16(-RESCALE_NEAR & 0x7fff); /* bits that others have one of */
    __mmask32 large = ~0u;
    __m512i r[8]; /* least words in the lower half, complements of the largest in the upper */
    for (int t = 0; t < 8; t++) {
        if (t >= count) {
            r[t] = r[count - 1];
            continue;
        }
        __m512i word[2];
        for (int i = 0; i < 2; i++) {
            word[i] = load(rows + t * stride + 32 * i);
            if (out != NULL) {
                word[i] = _mm512_sub_epi16(word[i], shift[i]);
                large = _mm512_mask_test_epi16_mask(large, word[i], upper);
                store(out + t * ROW + 32 * i, word[i]);
            }
        }
        const __m512i a = ordered16(word[0]), b = ordered16(word[1]), largest = _mm512_max_epi16(a, b);
        r[t] = FOLD(low_halves, high_halves, _mm512_min_epi16(a, b), _mm512_xor_si512(largest, _mm512_set1_epi32(-1)));
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
    *small = ~large;
    return _mm512_min_epi16(r[0], _mm512_srli_epi32(r[0], 16));
}

/* Of value groups, whose words are rescaled first, unless `shifts` is null. */
INLINE void range_of_values(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                            int16_t *low, int16_t *high) {
    const __m512i none = _mm512_setzero_si512(), farthest = _mm512_set1_epi16((int16_t)-RESCALE_FAR);
    const __m512i shift[2] = {shifts == NULL ? none : load(shifts), shifts == NULL ? none : load(shifts + 32)};
    for (int first = 0; first < tokens; first += 8) {
        const int count = tokens - first < 8 ? tokens - first : 8;
        uint16_t *const made = shifts == NULL ? NULL : out + first * ROW;
        __mmask32 small;
        __m512i both = range_of_octet(shift, rows + first * stride, stride, count, made, &small);
        if (made != NULL && __builtin_expect((small | (_mm512_cmplt_epi16_mask(both, farthest) & 0x55555555)) != 0, 0)) {
            for (int i = 0; i < 2 * count; i++) { /* the words themselves may have been where these are */
                const int16_t *const by = shifts + 32 * (i % 2);
                const __m512i word = _mm512_add_epi16(load(made + 32 * i), shift[i % 2]);
                store(made + 32 * i, rescaled_row(word, shift[i % 2], by));
            }
            both = range_of_octet(shift, made, ROW, count, NULL, &small);
        }
        const __m512i order = _mm512_setr_epi32(0, 8, 2, 10, 1, 9, 3, 11, 4, 12, 6, 14, 5, 13, 7, 15);
        const __m256i result = _mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(order, both));
        const __m128i largest = _mm_xor_si128(_mm256_extracti128_si256(result, 1), _mm_set1_epi32(-1));
        _mm_storeu_si128((__m128i *)(low + first), _mm256_castsi256_si128(result));
        _mm_storeu_si128((__m128i *)(high + first), largest);
    }
}

void lynx_avx512_range(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
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

void lynx_avx512_rescale_range(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out, int16_t *low,
                          int16_t *high) {
    range_of_values(shifts, rows, stride, tokens, out, low, high);
}

/* Words are put in order by a comparison: a shift would share the port of the extremes. */
INLINE void survey_row(const uint16_t *row, __m512i least[2], __m512i largest[2]) {
    for (int i = 0; i < 2; i++) {
        const __m512i word = load(row + 32 * i);
        const __mmask32 below = _mm512_cmplt_epi16_mask(word, _mm512_setzero_si512());
        const __m512i o = _mm512_mask_sub_epi16(word, below, _mm512_set1_epi16(0x7fff), word);
        least[i] = _mm512_min_epi16(least[i], o);
        largest[i] = _mm512_max_epi16(largest[i], o);
    }
}

void lynx_avx512_survey(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    __m512i least[2], largest[2];
    for (int i = 0; i < 2; i++) {
        least[i] = _mm512_set1_epi16(INT16_MAX);
        largest[i] = _mm512_set1_epi16(INT16_MIN);
    }
    for (int t = 0; t < tokens / 2; t++, rows += stride) {
        lynx_fetch_far(rows, stride);
        survey_row(rows, least, largest);
        lynx_fetch_far(rows + tokens / 2 * stride, stride);
        survey_row(rows + tokens / 2 * stride, least, largest);
    }
    if (tokens % 2 != 0) {
        survey_row(rows + tokens / 2 * stride, least, largest);
    }
    for (int i = 0; i < 2; i++) {
        store(low + 32 * i, least[i]);
        store(high + 32 * i, largest[i]);
    }
}

INLINE void size_row(const uint16_t *row, bool signs, __m512i largest[2], __m512i negative[2]) {
    for (int i = 0; i < 2; i++) {
        const __m512i word = load(row + 32 * i);
        largest[i] = _mm512_max_epi16(largest[i], _mm512_and_si512(word, _mm512_set1_epi16(0x7fff)));
        negative[i] = signs ? _mm512_sub_epi16(negative[i], _mm512_srai_epi16(word, 15)) : negative[i];
    }
}

#include "sizes.h"

void lynx_avx512_survey_sizes(const uint16_t *rows, ptrdiff_t stride, int tokens, bool fetched, uint16_t *most, uint16_t *signs) {
    sizes_of(rows, stride, tokens, fetched, most, signs);
}

AVX512_END
#endif
