/* AVX-512 kernels (F, BW, DQ, VL, VBMI, VBMI2: Ice Lake, Zen 4 and later). The same bytes as scalar.c; the comments
 * there say what is computed, here only how. A row of 64 codes is one register, a row of words two.
 *
 * k * s is computed as code * s - offset * s with one fused multiply-add: both products and the result are exact. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"

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
    .shuffles = lynx_avx512_shuffles,
    .range = lynx_avx512_range,
    .survey = lynx_avx512_survey,
    .survey_sizes = lynx_avx512_survey_sizes,
    .add_spreads = lynx_avx512_add_spreads,
    .add_sizes = lynx_avx512_add_sizes,
    .params = lynx_avx512_params,
    .are_plain = lynx_avx512_are_plain,
    .choose = lynx_avx512_choose,
    .pack_params = lynx_avx512_pack_params,
    .quantise = lynx_avx512_quantise,
    .quantise_ahead = lynx_avx512_quantise_ahead,
    .pack = lynx_avx512_pack,
    .unpack = lynx_avx512_unpack,
    .check = check,
    .rescale = lynx_avx512_rescale,
    .rescale_range = lynx_avx512_rescale_range,
    .dequantise = dequantise,
    .place = lynx_avx512_place,
    .stream = stream,
    .unpack_folded = lynx_avx512_unpack_folded,
    .pack_folded = lynx_avx512_pack_folded,
    .rank = lynx_avx512_rank,
    .unrank = lynx_avx512_unrank,
    .rank_bound = rank_bound,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

AVX512_END
#endif
