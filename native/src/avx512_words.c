/* Words straight from planes, or from codes, for AVX-512: what an anchor or an 8-bit level decodes to, in one pass and, where
 * that is asked for, past the caches.
 *
 * A code C becomes a number by a byte permutation alone: in bits 8..15 of 0x47000000 it is 32768 + C. One fused multiply-add
 * takes (32768 + offset) * scale away: 16 bits times 8, which binary32 holds exactly, as it does the result. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"

/* --- where words go ------------------------------------------------------------------------------------------- */

typedef struct {
    const lynx_stretch *rows; /* stretches that come next */
    int left;         /* rows of this one, when not streamed */
    uint16_t *at;     /* of the next row, or of the line where it begins */
    ptrdiff_t stride; /* words */
    lynx_tail *tail;  /* not null: past the caches, in whole lines */
    int before;       /* words of the line that come before, when streamed */
    __mmask32 own;    /* words of the next line that are ours */
    __m512i last;     /* words that are still to be written, at its end */
    __m512i turn;     /* which of those and the next 32 make a line */
} row_writer;

INLINE row_writer write_rows(const lynx_stretch *stretches, ptrdiff_t stride, lynx_tail *tail) {
    uint16_t *rows = stretches->row;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int before = (int)((uintptr_t)rows / 2 & 31);
    /* Rows at odd words or bytes, and rows apart that are not at lines, go through the caches. */
    const bool whole = before == 0 ? stride % 32 == 0 : stride == ROW && before % 2 == 0;
    const bool streamed = tail != NULL && (uintptr_t)rows % 2 == 0 && whole;
    row_writer out = {.rows = stretches + 1,
                      .left = stretches->count,
                      .at = rows,
                      .stride = stride,
                      .tail = streamed ? tail : NULL,
                      .before = before,
                      .own = ~0u << before,
                      .last = _mm512_setzero_si512(),
                      .turn = _mm512_add_epi32(lane, _mm512_set1_epi32(16 - before / 2))};
    if (streamed && before != 0) {
        out.at -= before;
        if (tail->count == before && tail->end == rows) {
            out.own = ~0u;
            out.last = load(tail->words);
            tail->count = 0;
        }
    }
    return out;
}

INLINE void write_row(row_writer *out, __m512i first, __m512i second) {
    if (out->tail == NULL) {
        const uint16_t *ahead = out->left > AHEAD      ? out->at + AHEAD * out->stride
                                : out->rows->count > 0 ? out->rows->row + (AHEAD - out->left) * out->stride
                                                       : out->at;
        __builtin_prefetch(ahead, 1);
        __builtin_prefetch(ahead + 32, 1);
        store(out->at, first);
        store(out->at + 32, second);
        out->at += out->stride;
        if (--out->left == 0) {
            out->at = out->rows->row;
            out->left = out->rows->count;
            out->rows++;
        }
    } else if (out->before == 0) {
        _mm512_stream_si512((__m512i *)out->at, first);
        _mm512_stream_si512((__m512i *)(out->at + 32), second);
        out->at += out->stride;
    } else {
        const __m512i line = _mm512_permutex2var_epi32(out->last, out->turn, first);
        if (__builtin_expect(out->own != ~0u, 0)) {
            _mm512_mask_storeu_epi16(out->at, out->own, line);
            out->own = ~0u;
        } else {
            _mm512_stream_si512((__m512i *)out->at, line);
        }
        _mm512_stream_si512((__m512i *)(out->at + 32), _mm512_permutex2var_epi32(first, out->turn, second));
        out->last = second;
        out->at += ROW;
    }
}

INLINE void end_rows(const row_writer *out) {
    lynx_tail *tail = out->tail;
    if (tail != NULL && out->before != 0) {
        lynx_end_tail(tail);
        tail->end = out->at + out->before;
        tail->count = out->before;
        store(tail->words, out->last);
    }
}

/* --- codes ---------------------------------------------------------------------------------------------------- */

/* Planes of 64 channels, octet by octet. */
typedef struct {
    const lynx_planes *planes;
    const uint8_t *anchor, *rest; /* of the next octet; `rest` may be null */
    bool upper;                   /* no planes but the first four */
} plane_reader;

INLINE plane_reader read_planes(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest) {
    return (plane_reader){.planes = planes, .anchor = anchor, .rest = rest, .upper = rest == NULL && planes->in_anchor[4] == 0};
}

INLINE void codes_of_octet(plane_reader *in, __m512i r[8]) {
    for (int p = 0; p < 8; p++) {
        const int count = in->planes->anchor_count[p];
        if (count == ROW) {
            r[7 - p] = load(in->anchor);
        } else if (count == 0) {
            r[7 - p] = in->rest == NULL ? _mm512_setzero_si512() : load(in->rest);
        } else {
            r[7 - p] = mixed_plane(in->planes, p, in->anchor, in->rest);
        }
        in->anchor += count;
        in->rest = in->rest == NULL ? NULL : in->rest + ROW - count;
    }
    if (in->upper) {
        transpose(r, true);
    } else {
        transpose(r, false);
    }
}

/* --- words ---------------------------------------------------------------------------------------------------- */

/* Whether codes are outside their range. */
INLINE __mmask64 outside(__m512i codes, __m512i low, __m512i high) {
    return _mm512_cmplt_epu8_mask(codes, low) | _mm512_cmpgt_epu8_mask(codes, high);
}

/* Codes as they come: from planes, or from memory. */
INLINE void next_octet(plane_reader *in, const uint8_t *codes, int first, __m512i r[8]) {
    if (codes == NULL) {
        codes_of_octet(in, r);
        return;
    }
    for (int t = 0; t < 8; t++) {
        r[t] = load(codes + (first + t) * ROW);
    }
}

/* By products, of any codes. */
INLINE bool words_as(int part, const lynx_planes *planes, const lynx_params *params, plane_reader *in, const uint8_t *codes,
                     bool full, int tokens, const int16_t *shifts, row_writer *out) {
    float less_of[ROW];
    lift(params, less_of);
    __m512 scale[4], less[4];
    if (part == LYNX_KEY) {
        for (int i = 0; i < 2; i++) {
            even_odd(params->scale + 32 * i, &scale[2 * i], &scale[2 * i + 1]);
            even_odd(less_of + 32 * i, &less[2 * i], &less[2 * i + 1]);
        }
    }
    const __m512i low = load(planes->low), high = load(planes->high); /* of value groups all are alike */
    const __m512i none = _mm512_setzero_si512();
    const __m512i shift[2] = {shifts == NULL ? none : load(shifts), shifts == NULL ? none : load(shifts + 32)};
    __mmask64 bad = 0;
    for (int first = 0; first < tokens; first += 8) {
        __m512i r[8];
        next_octet(in, codes, first, r);
        for (int t = 0; t < 8 && first + t < tokens; t++) {
            if (full) {
                bad |= outside(r[t], low, high);
            }
            if (part == LYNX_VALUE) {
                scale[0] = scale[1] = scale[2] = scale[3] = _mm512_set1_ps(params->scale[first + t]);
                less[0] = less[1] = less[2] = less[3] = _mm512_set1_ps(less_of[first + t]);
            }
            __m512i x[4];
            for (int i = 0; i < 4; i++) {
                x[i] = numbers(lifted(r[t], places(32 * (i / 2) + i % 2)), scale[i], less[i], 0x8000);
            }
            const __m512i a = joined(x[0], x[1]), b = joined(x[2], x[3]);
            if (part == LYNX_KEY) {
                write_row(out, a, b);
            } else {
                write_row(out, shifted(a, shift[0]), shifted(b, shift[1]));
            }
        }
    }
    return bad == 0;
}

/* Values of at most 4 bits: a token has 8 or 16 words. Tables hold those of four or two tokens, and codes say which. */
INLINE void words_by_table(int bits, const lynx_params *params, const uint8_t *anchor, int tokens, const int16_t *shifts,
                           row_writer *out) {
    float less_of[ROW + 2]; /* the last two tokens are loaded with two more */
    lift(params, less_of);
    /* Of codes, those of channel j in byte 2 j, and of channel 32 + j in the next. */
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i apart = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x02020202)), _mm512_set1_epi32(0x21012000));
    /* In lane i of a table's first float register the word of code 2 i, of the first token, then of the next; in the second
     * register that of code 2 i + 1. */
    const int lanes = bits <= 3 ? 4 : 8, held = 16 / lanes;
    const __m512i token = _mm512_srli_epi32(lane, bits <= 3 ? 2 : 3);
    const __m512i step = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(lanes - 1)), 9 - bits);
    const __m512 even = _mm512_cvtepi32_ps(_mm512_add_epi32(step, _mm512_set1_epi32(LIFT)));
    const __m512 odd = _mm512_add_ps(even, _mm512_set1_ps((float)(256 >> bits)));
    /* Exponents are taken away in unsigned saturation from words that have the largest of them more, so that zero stays. */
    const __m512i most = _mm512_set1_epi16(8 * 128);
    const __m512i less[2] = {shifts == NULL ? most : _mm512_sub_epi16(most, load(shifts)),
                             shifts == NULL ? most : _mm512_sub_epi16(most, load(shifts + 32))};
    for (int first = 0; first < tokens; first += 8) {
        __m512i r[8], tables[4];
        for (int p = 0; p < 4; p++) {
            r[p] = _mm512_setzero_si512();
        }
        for (int p = 0; p < bits; p++, anchor += ROW) {
            r[bits - 1 - p] = _mm512_permutexvar_epi8(apart, load(anchor));
        }
        SWAP(r[0], r[2], 2, 0x33);
        SWAP(r[1], r[3], 2, 0x33);
        SWAP(r[0], r[1], 1, 0x55);
        SWAP(r[2], r[3], 1, 0x55);
        for (int t = 4; t < 8; t++) {
            r[t] = _mm512_srli_epi16(r[t - 4], 4);
        }
        for (int i = 0; i < 8 / held; i++) {
            const int at = first + held * i;
            const __m512 scale = _mm512_permutexvar_ps(token, _mm512_castps128_ps512(_mm_loadu_ps(params->scale + at)));
            const __m512 minus = _mm512_permutexvar_ps(token, _mm512_castps128_ps512(_mm_loadu_ps(less_of + at)));
            const __m512i a = numbers(even, scale, minus, 0x8000), b = numbers(odd, scale, minus, 0x8000);
            const __m512i words = joined(a, b);
            tables[i] = _mm512_mask_add_epi16(words, _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x7fff)), words, most);
        }
        for (int t = 0; t < 8 && first + t < tokens; t++) {
            /* 0xec is (x & z) | y. */
            const __m512i which = _mm512_set1_epi8((char)(t % held * 2 * lanes));
            const __m512i index = _mm512_ternarylogic_epi64(r[t], which, _mm512_set1_epi8(15), 0xec);
            const __m512i a = _mm512_permutexvar_epi16(index, tables[t / held]);
            const __m512i b = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), tables[t / held]);
            write_row(out, _mm512_subs_epu16(a, less[0]), _mm512_subs_epu16(b, less[1]));
        }
    }
}

bool lynx_avx512_place(int part, const lynx_planes *planes, const lynx_params *params, const uint8_t *anchor,
                       const uint8_t *rest, const uint8_t *codes, bool full, int tokens, const int16_t *shifts,
                       const lynx_stretch *rows, ptrdiff_t stride, lynx_tail *tail) {
    row_writer out = write_rows(rows, stride, tail);
    bool good = true;
    if (part == LYNX_VALUE && codes == NULL && !full && planes->widths[0] == 3) {
        words_by_table(3, params, anchor, tokens, shifts, &out);
    } else if (part == LYNX_VALUE && codes == NULL && !full && planes->widths[0] == 4) {
        words_by_table(4, params, anchor, tokens, shifts, &out);
    } else {
        plane_reader in = codes == NULL ? read_planes(planes, anchor, rest) : (plane_reader){0};
        good = part == LYNX_KEY ? words_as(LYNX_KEY, planes, params, &in, codes, full, tokens, NULL, &out)
                                : words_as(LYNX_VALUE, planes, params, &in, codes, full, tokens, shifts, &out);
    }
    end_rows(&out);
    return good;
}

AVX512_END
#endif
