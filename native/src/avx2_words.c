/* Words straight from planes, or from codes, for AVX2: as avx512_words.c does it, for halves of rows.
 *
 * The codes of a half are put in an order where a 16-bit lane has that of channel j in its lower byte and that of channel 16 + j
 * in the upper one: then two shifts and blends make numbers of them, and words come out in order. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx2.h"

/* --- where words go ------------------------------------------------------------------------------------------- */

/* Rows past the caches go in chunks of 16 words at multiples of 32 bytes. Rows that are 8 words off that are turned: a chunk is the
 * upper half of the words before and the lower half of the next ones. */
enum { CACHED, STREAMED, TURNED };
typedef struct {
    const lynx_stretch *rows; /* stretches that come next */
    int left;                 /* rows of this one */
    uint16_t *at;             /* of the next row */
    ptrdiff_t stride;         /* words */
    int way;
    bool begun;               /* TURNED: `last` holds the words before */
    __m256i last;
} row_writer;

#define AHEAD 8 /* rows that are fetched: long strides and pages are not foreseen by hardware */

INLINE void write_rows(row_writer *out, const lynx_stretch *stretches, ptrdiff_t stride, lynx_tail *tail) {
    uint16_t *rows = stretches->row;
    const unsigned before = (unsigned)((uintptr_t)rows & 31);
    out->rows = stretches + 1;
    out->left = stretches->count;
    out->at = rows;
    out->stride = stride;
    out->way = tail == NULL                       ? CACHED
               : before == 0 && stride % 16 == 0  ? STREAMED
               : before == 16 && stride == ROW    ? TURNED
                                                  : CACHED;
    out->begun = out->way == TURNED && tail->count == 8 && tail->end == rows;
    out->last = out->begun ? load(tail->words + 16) : _mm256_setzero_si256();
    if (out->way == TURNED) {
        tail->count = out->begun ? 0 : tail->count;
        lynx_end_tail(tail);
    }
}

INLINE void write_row(row_writer *out, const __m256i words[4]) {
    uint16_t *row = out->at;
    out->at += out->stride;
    if (out->way == STREAMED) {
        for (int i = 0; i < 4; i++) {
            _mm256_stream_si256((__m256i *)(row + 16 * i), words[i]);
        }
    } else if (out->way == TURNED) {
        if (__builtin_expect(out->begun, 1)) {
            _mm256_stream_si256((__m256i *)(row - 8), _mm256_permute2x128_si256(out->last, words[0], 0x21));
        } else { /* what comes before is not ours */
            _mm_storeu_si128((__m128i *)row, _mm256_castsi256_si128(words[0]));
            out->begun = true;
        }
        for (int i = 1; i < 4; i++) {
            _mm256_stream_si256((__m256i *)(row - 8 + 16 * i), _mm256_permute2x128_si256(words[i - 1], words[i], 0x21));
        }
        out->last = words[3];
    } else {
        const uint16_t *ahead = out->left > AHEAD      ? row + AHEAD * out->stride
                                : out->rows->count > 0 ? out->rows->row + (AHEAD - out->left) * out->stride
                                                       : row;
        __builtin_prefetch(ahead, 1);
        __builtin_prefetch(ahead + 32, 1);
        for (int i = 0; i < 4; i++) {
            store(row + 16 * i, words[i]);
        }
        if (--out->left == 0) {
            out->at = out->rows->row;
            out->left = out->rows->count;
            out->rows++;
        }
    }
}

/* The words of a chunk that is not whole wait for the next block. */
INLINE void end_rows(const row_writer *out, lynx_tail *tail) {
    if (out->way == TURNED) {
        tail->end = out->at;
        tail->count = 8;
        store(tail->words + 16, out->last);
    }
}

/* --- codes ---------------------------------------------------------------------------------------------------- */

/* Bytes of channels 0..15 in even places, of 16..31 in odd ones. */
INLINE __m256i interleaved(__m256i codes) {
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(codes, 0xd8), pairs);
}

/* The codes of an octet, half a row each, interleaved. */
INLINE void codes_of_octet(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int half, bool upper,
                           __m256i r[8]) {
    for (int p = 0; p < 8; p++) {
        const int count = planes->anchor_count[p];
        __m256i v = _mm256_setzero_si256();
        if (count == ROW) {
            v = load(anchor + 32 * half);
        } else if (count != 0) {
            v = expand(anchor, planes->anchor_expand[p] + 32 * half, planes->anchor_rank[p] + 2 * half);
        }
        anchor += count;
        if (rest != NULL && count == 0) {
            v = load(rest + 32 * half);
        } else if (rest != NULL && count != ROW) {
            v = _mm256_or_si256(v, expand(rest, planes->rest_expand[p] + 32 * half, planes->rest_rank[p] + 2 * half));
        }
        rest = rest == NULL ? NULL : rest + ROW - count;
        r[7 - p] = count == 0 && rest == NULL ? v : interleaved(v);
    }
    if (upper) {
        transpose(r, true);
    } else {
        transpose(r, false);
    }
}

/* --- words ---------------------------------------------------------------------------------------------------- */

/* What takes offsets and LIFT away. */
INLINE void lift(const lynx_params *params, float *less) {
    for (int g = 0; g < ROW; g++) {
        less[g] = (float)(-LIFT - params->offset[g]) * params->scale[g];
    }
}

/* Floats of even channels, then of odd ones, of 16 each. */
INLINE void even_odd(const float *in, float *out) {
    for (int i = 0; i < ROW; i += 16) {
        for (int j = 0; j < 8; j++) {
            out[i + j] = in[i + 2 * j];
            out[i + 8 + j] = in[i + 2 * j + 1];
        }
    }
}

/* Words of 16 channels from their codes in the upper bytes of 16-bit lanes. */
INLINE __m256i words_of(__m256i codes, __m256 scale1, __m256 less1, __m256 scale2, __m256 less2) {
    const __m256i magic = _mm256_set1_epi32(0x47000000);
    const __m256i even = number(_mm256_blend_epi16(codes, magic, 0xaa), scale1, less1, 0x8000);
    const __m256i odd = number(_mm256_or_si256(_mm256_srli_epi32(codes, 16), magic), scale2, less2, 0x8000);
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

INLINE bool words_as(int part, const lynx_planes *planes, const lynx_params *params, const uint8_t *anchor,
                     const uint8_t *rest, const uint8_t *codes, bool full, int tokens, const int16_t *shifts,
                     row_writer *out) {
    _Alignas(32) float scales[ROW], less[ROW], less_of[ROW];
    lift(params, less_of);
    if (part == LYNX_KEY) {
        even_odd(params->scale, scales);
        even_odd(less_of, less);
    }
    const bool upper = rest == NULL && planes->anchor_count[4] == 0;
    __m256i low[2], high[2], bad = _mm256_setzero_si256();
    for (int half = 0; half < 2; half++) {
        low[half] = interleaved(load(planes->low + 32 * half));
        high[half] = interleaved(load(planes->high + 32 * half));
    }
    for (int first = 0; first < tokens; first += 8) {
        __m256i r[2][8];
        const int count = tokens - first < 8 ? tokens - first : 8;
        for (int half = 0; half < 2; half++) {
            if (codes != NULL) {
                for (int t = 0; t < 8; t++) {
                    r[half][t] = interleaved(load(codes + (first + t) * ROW + 32 * half));
                }
            } else {
                codes_of_octet(planes, anchor, rest, half, upper, r[half]);
            }
        }
        anchor += planes->anchor_octet;
        rest = rest == NULL ? NULL : rest + planes->rest_octet;
        for (int t = 0; t < count; t++) {
            __m256i words[4];
            const __m256 scale = _mm256_set1_ps(params->scale[first + t]), minus = _mm256_set1_ps(less_of[first + t]);
            for (int half = 0; half < 2; half++) {
                const __m256i x = r[half][t];
                if (full) {
                    bad = _mm256_or_si256(bad, _mm256_or_si256(_mm256_subs_epu8(low[half], x), _mm256_subs_epu8(x, high[half])));
                }
                const __m256i part_of[2] = {_mm256_slli_epi16(x, 8), _mm256_and_si256(x, _mm256_set1_epi16((short)0xff00))};
                for (int i = 0; i < 2; i++) {
                    const int at = 32 * half + 16 * i;
                    const __m256i made =
                        part == LYNX_KEY ? words_of(part_of[i], _mm256_load_ps(scales + at), _mm256_load_ps(less + at),
                                                    _mm256_load_ps(scales + at + 8), _mm256_load_ps(less + at + 8))
                                         : words_of(part_of[i], scale, minus, scale, minus);
                    words[2 * half + i] = part == LYNX_KEY || shifts == NULL ? made : shifted(made, load(shifts + at));
                }
            }
            write_row(out, words);
        }
    }
    return _mm256_testz_si256(bad, bad);
}

/* Values of 3 bits: a token has 8 words, of which one register holds the lower bytes, then the upper ones. */
INLINE void words_by_table(const lynx_params *params, const uint8_t *anchor, const uint8_t *codes, int tokens,
                           const int16_t *shifts, row_writer *out) {
    float less_of[ROW];
    lift(params, less_of);
    const __m256 step = _mm256_setr_ps(LIFT, LIFT + 32, LIFT + 64, LIFT + 96, LIFT + 128, LIFT + 160, LIFT + 192, LIFT + 224);
    const __m256i most = _mm256_set1_epi16(8 * 128), byte = _mm256_set1_epi16(255); /* as in avx512_words.c */
    __m256i less[4];
    for (int i = 0; i < 4; i++) {
        less[i] = shifts == NULL ? most : _mm256_sub_epi16(most, load(shifts + 16 * i));
    }
    for (int first = 0; first < tokens; first += 8) {
        const int count = tokens - first < 8 ? tokens - first : 8;
        __m256i r[2][8], tables[8];
        for (int half = 0; half < 2; half++) {
            __m256i *v = r[half]; /* in such an order that unpacking leaves words in theirs */
            for (int t = 0; t < 8 && codes != NULL; t++) {
                const __m256i code = in_order(load(codes + (first + t) * ROW + 32 * half));
                v[t] = _mm256_and_si256(_mm256_srli_epi16(code, 5), _mm256_set1_epi8(7));
            }
            if (codes != NULL) {
                continue;
            }
            for (int p = 0; p < 3; p++) {
                v[2 - p] = in_order(load(anchor + (3 * first / 8 + p) * ROW + 32 * half));
            }
            v[3] = _mm256_setzero_si256();
            SWAP(v[0], v[2], 2, 0x33);
            SWAP(v[1], v[3], 2, 0x33);
            SWAP(v[0], v[1], 1, 0x55);
            SWAP(v[2], v[3], 1, 0x55);
            for (int t = 0; t < 4; t++) {
                v[t + 4] = _mm256_and_si256(_mm256_srli_epi16(v[t], 4), _mm256_set1_epi8(7));
                v[t] = _mm256_and_si256(v[t], _mm256_set1_epi8(7));
            }
        }
        for (int t = 0; t < 8; t += 2) {
            __m256i x[2];
            for (int i = 0; i < 2; i++) {
                const __m256 scale = _mm256_set1_ps(params->scale[first + t + i]), minus = _mm256_set1_ps(less_of[first + t + i]);
                x[i] = _mm256_srli_epi32(number(_mm256_castps_si256(step), scale, minus, 0x8000), 16);
            }
            const __m256i words = in_order(_mm256_packus_epi32(x[0], x[1]));
            const __m256i more = shifted(words, most);
            const __m256i split = _mm256_packus_epi16(_mm256_and_si256(more, byte), _mm256_srli_epi16(more, 8));
            tables[t] = _mm256_permute4x64_epi64(split, 0x44);
            tables[t + 1] = _mm256_permute4x64_epi64(split, 0xee);
        }
        for (int t = 0; t < count; t++) {
            __m256i words[4];
            for (int half = 0; half < 2; half++) {
                const __m256i l = _mm256_shuffle_epi8(tables[t], r[half][t]);
                const __m256i h = _mm256_shuffle_epi8(tables[t], _mm256_or_si256(r[half][t], _mm256_set1_epi8(8)));
                words[2 * half] = _mm256_subs_epu16(_mm256_unpacklo_epi8(l, h), less[2 * half]);
                words[2 * half + 1] = _mm256_subs_epu16(_mm256_unpackhi_epi8(l, h), less[2 * half + 1]);
            }
            write_row(out, words);
        }
    }
}

bool lynx_avx2_place(int part, const lynx_planes *planes, const lynx_params *params, const uint8_t *anchor,
                     const uint8_t *rest, const uint8_t *codes, bool full, int tokens, const int16_t *shifts,
                     const lynx_stretch *rows, ptrdiff_t stride, lynx_tail *tail) {
    row_writer out;
    write_rows(&out, rows, stride, tail);
    bool good = true;
    if (part == LYNX_VALUE && !full && planes->widths[0] == 3) {
        if (codes == NULL) {
            words_by_table(params, anchor, NULL, tokens, shifts, &out);
        } else {
            words_by_table(params, NULL, codes, tokens, shifts, &out);
        }
    } else if (part == LYNX_KEY) {
        good = words_as(LYNX_KEY, planes, params, anchor, rest, codes, full, tokens, NULL, &out);
    } else {
        good = words_as(LYNX_VALUE, planes, params, anchor, rest, codes, full, tokens, shifts, &out);
    }
    end_rows(&out, tail);
    return good;
}

AVX2_END
#endif
