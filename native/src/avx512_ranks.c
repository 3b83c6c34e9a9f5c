/* Level 2 of bfloat16 for AVX-512. What is left to the AVX2 kernels: float16, and scales that only hostile payloads have.
 */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"
#include "ranks.h"
#include "selected.h"

/* Scales, and what takes (2 (LIFT + offset) + 1) / 2 scales away, or one scale less: of even and odd channels in turn, or, of
 * values, one of each token. 17 bits times 6. */
typedef struct {
    __m512 scale[4], lower[4], upper[4];
    float lower_of[ROW], upper_of[ROW];
    __m512i zero;   /* codes of the integer 0, */
    __mmask64 none; /* but of those channels there are none */
} cell_lanes;

INLINE void start_cells(int part, const lynx_params *params, cell_lanes *l) {
    const __m512i one = _mm512_set1_epi32(1);
    for (int g = 0; g < ROW; g += 16) {
        const __m512i offset = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(params->offset + g)));
        const __m512i twice = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(-LIFT), offset), 1);
        const __m512 half = _mm512_mul_ps(_mm512_loadu_ps(params->scale + g), _mm512_set1_ps(0.5f));
        _mm512_storeu_ps(l->lower_of + g, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(twice, one)), half));
        _mm512_storeu_ps(l->upper_of + g, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(twice, one)), half));
    }
    if (part == LYNX_KEY) {
        const __m512i a = load(params->offset), b = load(params->offset + 32), most = _mm512_set1_epi16(255);
        for (int i = 0; i < 2; i++) {
            even_odd(params->scale + 32 * i, &l->scale[2 * i], &l->scale[2 * i + 1]);
            even_odd(l->lower_of + 32 * i, &l->lower[2 * i], &l->lower[2 * i + 1]);
            even_odd(l->upper_of + 32 * i, &l->upper[2 * i], &l->upper[2 * i + 1]);
        }
        l->zero = lower_bytes(a, b);
        l->none = _mm512_cmpgt_epu16_mask(a, most) | (__mmask64)_mm512_cmpgt_epu16_mask(b, most) << 32;
    }
}

/* Cells of a row of 64 channels. */
typedef struct {
    __m512i low[2]; /* least words by magnitude, with the integers' signs */
    __m512i count;  /* words in the cell; 1 in zero cells */
    __mmask64 zeros;
} row_cells;

/* `none`: channels that there are none of. */
INLINE row_cells cells_of(int part, __m512i codes, int token, const lynx_params *params, cell_lanes *l, __mmask64 none) {
    row_cells cells;
    __m512i count[2];
    if (part == LYNX_VALUE) {
        l->scale[0] = l->scale[1] = l->scale[2] = l->scale[3] = _mm512_set1_ps(params->scale[token]);
        l->lower[0] = l->lower[1] = l->lower[2] = l->lower[3] = _mm512_set1_ps(l->lower_of[token]);
        l->upper[0] = l->upper[1] = l->upper[2] = l->upper[3] = _mm512_set1_ps(l->upper_of[token]);
        l->zero = _mm512_set1_epi8((char)params->offset[token]);
        l->none = (params->offset[token] & ~255) == 0 ? 0 : ~0ull;
    }
    for (int i = 0; i < 2; i++) {
        __m512i lower[2], upper[2];
        for (int j = 0; j < 2; j++) {
            const int at = 2 * i + j;
            const __m512 code = lifted(codes, places(32 * i + j));
            lower[j] = numbers(code, l->scale[at], l->lower[at], 0xffff);
            upper[j] = numbers(code, l->scale[at], l->upper[at], 0xffff);
        }
        /* Ends of the cell as words with signs: of negative integers in reverse order. */
        const __m512i first = joined(lower[0], lower[1]), second = joined(upper[0], upper[1]);
        cells.low[i] = _mm512_min_epu16(first, second);
        count[i] = _mm512_abs_epi16(_mm512_sub_epi16(second, first));
    }
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i packed = _mm512_permutexvar_epi64(order, _mm512_packus_epi16(count[0], count[1]));
    cells.zeros = _mm512_cmpeq_epi8_mask(codes, l->zero) & ~(l->none | none);
    cells.count = _mm512_mask_mov_epi8(packed, cells.zeros | none, _mm512_set1_epi8(1));
    return cells;
}

/* 2^floor(log2 n) - 1 of bytes n up to 255; 0 of 0. */
INLINE __m512i width_mask(__m512i n) {
    const __m512i by_quarter = _mm512_setr_epi32(0x07070300, 0x0f0f0f0f, 0x1f1f1f1f, 0x1f1f1f1f, 0x3f3f3f3f, 0x3f3f3f3f, 0x3f3f3f3f, 0x3f3f3f3f,
                                                 0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f, 0x7f7f7f7f);
    const __m512i two = _mm512_and_si512(_mm512_srli_epi16(n, 1), _mm512_set1_epi8(1)); /* matters below 4 only */
    return _mm512_max_epu8(_mm512_permutexvar_epi8(_mm512_srli_epi16(n, 2), by_quarter), two);
}

/* Width of 2^v - 1: v. */
INLINE __m512i mask_width(__m512i mask) {
    return _mm512_popcnt_epi8(mask);
}

/* Zero cells of a block in order, from a mask for each token. Few tokens have some, and few of those more than one. */
INLINE void list_zeros(const uint64_t *masks, int tokens, zero_list *list) {
    uint64_t found[ROW + 8], token_of[ROW + 8];
    uint32_t rows = 0;
    for (int first = 0; first < tokens; first += 8) {
        const __m512i token = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        const __mmask8 there = (__mmask8)(tokens - first < 8 ? (1 << (tokens - first)) - 1 : 255);
        const __m512i some = _mm512_maskz_loadu_epi64(there, masks + first);
        const __mmask8 any = _mm512_test_epi64_mask(some, some);
        store(found + rows, _mm512_maskz_compress_epi64(any, some));
        store(token_of + rows, _mm512_maskz_compress_epi64(any, token));
        rows += (uint32_t)_mm_popcnt_u32(any);
    }
    list->count = 0;
    for (uint32_t i = 0; i < rows; i++) {
        for (uint64_t left = found[i]; left != 0; left = _blsr_u64(left)) {
            list->at[list->count++] = (uint16_t)(ROW * token_of[i] + _tzcnt_u64(left));
        }
    }
}

INLINE void rank_as(int part, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens, int channels,
                    const lynx_params *params, lynx_streams *streams) {
    const __m512i one = _mm512_set1_epi8(1), order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __mmask64 none = channels == ROW ? 0 : ~0ull << channels;
    cell_lanes l;
    start_cells(part, params, &l);
    bit_writer a = {streams->a, 0, 0}, b = {streams->b, 0, 0};
    uint64_t zeros_of_row[ROW];
    for (int t = 0; t < tokens; t++) {
        lynx_fetch(&streams->ahead, (uint32_t)t);
        const row_cells cells = cells_of(part, load(codes + t * ROW), t, params, &l, none);
        __m512i rank16[2];
        for (int i = 0; i < 2; i++) {
            rank16[i] = _mm512_sub_epi16(load(rows + t * stride + 32 * i), cells.low[i]);
        }
        const __m512i rank8 = _mm512_permutexvar_epi64(order, _mm512_packus_epi16(rank16[0], rank16[1])), n = cells.count;
        const __m512i mask = width_mask(n);
        const __m512i field = _mm512_and_si512(rank8, mask);
        const __m512i extra = _mm512_sub_epi8(_mm512_sub_epi8(n, mask), one);
        const uint64_t flagged = _mm512_cmplt_epu8_mask(field, extra); /* ranks of which B holds a bit */
        const uint64_t above = _mm512_cmpneq_epu8_mask(field, rank8);
        _Alignas(64) uint64_t values[8], bits[8];
        store(values, field);
        store(bits, mask);
        IN_MEMORY(values);
        IN_MEMORY(bits);
        put_selected(&a, values, bits, 8);
        if (__builtin_expect(_mm_popcnt_u64(flagged) <= 56, 1)) {
            put(&b, _pext_u64(above, flagged), (uint32_t)_mm_popcnt_u64(flagged));
        } else {
            const uint32_t first = (uint32_t)flagged, second = (uint32_t)(flagged >> 32);
            put(&b, _pext_u32((uint32_t)above, first), (uint32_t)_mm_popcnt_u32(first));
            put(&b, _pext_u32((uint32_t)(above >> 32), second), (uint32_t)_mm_popcnt_u32(second));
        }
        zeros_of_row[t] = cells.zeros;
    }
    streams->a_bits = position(&a, streams->a);
    streams->b_bits = position(&b, streams->b);
    zero_list zeros;
    list_zeros(zeros_of_row, tokens, &zeros);
    rank_zeros(part, LYNX_BFLOAT16, &zeros, rows, stride, params, streams);
}

INLINE int unrank_as(int part, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                     lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    const __m512i one = _mm512_set1_epi8(1), nothing = _mm512_setzero_si512();
    const __m512i seven = _mm512_set1_epi64(7);
    const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8));
    const __m512i steps = _mm512_set1_epi64(0x0706050403020100ll);
    const __mmask64 none = channels == ROW ? 0 : ~0ull << channels;
    const __m512i shift[2] = {shifts == NULL ? nothing : load(shifts), shifts == NULL ? nothing : load(shifts + 32)};
    cell_lanes l;
    start_cells(part, params, &l);
    uint64_t zeros_of_row[ROW];
    uint32_t a_bits = 0, b_bits = 0;
    __mmask64 empty = 0;
    for (int t = 0; t < tokens; t++) {
        lynx_fetch(&streams->ahead, (uint32_t)t);
        if (t + AHEAD < tokens) {
            __builtin_prefetch(rows[t + AHEAD], 1);
            __builtin_prefetch(rows[t + AHEAD] + 32, 1);
        }
        const row_cells cells = cells_of(part, load(codes + t * ROW), t, params, &l, none);
        const __m512i n = cells.count, mask = width_mask(n), width = mask_width(mask);
        empty |= _mm512_testn_epi8_mask(n, n);
        /* Where each field begins: sums of widths within 64-bit lanes, then over lanes. A row has at most 448 bits, so
         * that one window of 64 bytes holds them. */
        const __m512i sums = _mm512_mullo_epi64(width, _mm512_set1_epi64(0x0101010101010101ll));
        const __m512i totals = _mm512_srli_epi64(sums, 56);
        __m512i through = _mm512_add_epi64(totals, _mm512_alignr_epi64(totals, nothing, 7));
        through = _mm512_add_epi64(through, _mm512_alignr_epi64(through, nothing, 6));
        through = _mm512_add_epi64(through, _mm512_alignr_epi64(through, nothing, 4));
        const __m512i start = _mm512_add_epi64(_mm512_sub_epi64(through, totals), _mm512_set1_epi64(a_bits & 7));
        const __m512i byte = _mm512_add_epi8(_mm512_shuffle_epi8(_mm512_srli_epi64(start, 3), spread), steps);
        const __m512i bit = _mm512_add_epi8(_mm512_shuffle_epi8(_mm512_and_si512(start, seven), spread),
                                            _mm512_slli_epi64(sums, 8));
        const __m512i window = _mm512_permutexvar_epi8(byte, load(streams->a + (a_bits >> 3)));
        const __m512i field = _mm512_and_si512(_mm512_multishift_epi64_epi8(bit, window), mask);
        a_bits += (uint32_t)_mm_extract_epi16(_mm512_extracti32x4_epi32(through, 3), 4);
        const __m512i extra = _mm512_sub_epi8(_mm512_sub_epi8(n, mask), one);
        const uint64_t flagged = _mm512_cmplt_epu8_mask(field, extra);
        const uint8_t *in = streams->more + (b_bits >> 3);
        const uint64_t stream = load64(in) >> (b_bits & 7) | (uint64_t)in[8] << 1 << (63 - (b_bits & 7));
        b_bits += (uint32_t)_mm_popcnt_u64(flagged);
        const __m512i ranks = _mm512_mask_add_epi8(field, _pdep_u64(stream, flagged), field, _mm512_add_epi8(mask, one));
        for (int i = 0; i < 2; i++) {
            const __m256i rank8 = i == 0 ? _mm512_castsi512_si256(ranks) : _mm512_extracti64x4_epi64(ranks, 1);
            const __m512i least = part == LYNX_KEY ? cells.low[i] : _mm512_add_epi16(cells.low[i], shift[i]);
            store(rows[t] + 32 * i, _mm512_add_epi16(least, _mm512_cvtepu8_epi16(rank8)));
        }
        zeros_of_row[t] = cells.zeros;
    }
    streams->a_bits = a_bits;
    streams->b_bits = b_bits;
    zero_list zeros;
    list_zeros(zeros_of_row, tokens, &zeros);
    const bool good = unrank_zeros(part, LYNX_BFLOAT16, &zeros, shifts, rows, params, streams);
    return good && empty == 0 ? LYNX_OK : LYNX_ERR_RANK;
}

/* Whether binary32 holds all products: encoders' scales are such. */
INLINE bool is_tame(const lynx_params *params) {
    const __m512i most = _mm512_set1_epi16(MOST_PLACED), more = _mm512_set1_epi16(SCALE_UNIT - 1);
    __mmask32 bad = 0;
    for (int i = 0; i < 2; i++) {
        const __m512i s = load(params->s + 32 * i);
        bad |= _mm512_cmpgt_epu16_mask(s, most) | _mm512_test_epi16_mask(s, more);
    }
    return bad == 0;
}

void lynx_avx512_rank(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                      int channels, const lynx_params *params, lynx_streams *streams) {
    if (dtype == LYNX_FLOAT16 || !is_tame(params)) {
        lynx_avx2.rank(part, dtype, rows, stride, codes, tokens, channels, params, streams);
    } else if (part == LYNX_KEY) {
        rank_as(LYNX_KEY, rows, stride, codes, tokens, channels, params, streams);
    } else {
        rank_as(LYNX_VALUE, rows, stride, codes, tokens, channels, params, streams);
    }
}

int lynx_avx512_unrank(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                       lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    if (dtype == LYNX_FLOAT16 || !is_tame(params)) {
        return lynx_avx2.unrank(part, dtype, codes, tokens, channels, params, streams, shifts, rows);
    }
    if (part == LYNX_KEY) {
        return unrank_as(LYNX_KEY, codes, tokens, channels, params, streams, NULL, rows);
    }
    return unrank_as(LYNX_VALUE, codes, tokens, channels, params, streams, shifts, rows);
}

AVX512_END
#endif
