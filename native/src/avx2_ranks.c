/* Level 2 for AVX2: bfloat16 with scales that encoders choose, an octet of rows at once; float16 and other scales, which only
 * hostile payloads have, by halves of rows. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx2.h"
#include "ranks.h"
#include "selected.h"

/* The least magnitude words not below x (positive), in natural order. */
INLINE __m256i ceil_words(int dtype, __m256 x1, __m256 x2) {
    if (dtype == LYNX_FLOAT16) {
        return in_order(_mm256_set_m128i(_mm256_cvtps_ph(x2, _MM_FROUND_TO_POS_INF), _mm256_cvtps_ph(x1, _MM_FROUND_TO_POS_INF)));
    }
    const __m256i up = _mm256_set1_epi32(0xffff);
    return _mm256_packus_epi32(_mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x1), up), 16),
                               _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x2), up), 16));
}

/* Cells of 16 integers k: least magnitude word and number of words; zero cells count 1. */
INLINE void cells(int dtype, __m256i k, __m256 scale1, __m256 scale2, __m256i *low, __m256i *count, __m256i *zero) {
    const __m256i a = _mm256_abs_epi16(k), nothing = _mm256_setzero_si256();
    const __m256 half = _mm256_set1_ps(0.5f);
    const __m256 middle1 = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_unpacklo_epi16(a, nothing)), scale1);
    const __m256 middle2 = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_unpackhi_epi16(a, nothing)), scale2);
    const __m256 h1 = _mm256_mul_ps(scale1, half), h2 = _mm256_mul_ps(scale2, half);
    *low = ceil_words(dtype, _mm256_sub_ps(middle1, h1), _mm256_sub_ps(middle2, h2));
    const __m256i high = ceil_words(dtype, _mm256_add_ps(middle1, h1), _mm256_add_ps(middle2, h2));
    *zero = _mm256_cmpeq_epi16(a, nothing);
    *count = _mm256_blendv_epi8(_mm256_sub_epi16(high, *low), _mm256_set1_epi16(1), *zero);
}

/* 2^floor(log2 n) - 1 of each byte n. */
INLINE __m256i width_mask8(__m256i n) {
    const __m256i nibble = _mm256_set1_epi8(15); /* that there are bits above does not matter for the lower one */
    const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 1, 1, 3, 3, 3, 3, 7, 7, 7, 7, 7, 7, 7, 7));
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 15, 31, 31, 63, 63, 63, 63, 127, 127, 127, 127, 127, 127, 127, 127));
    return _mm256_max_epu8(_mm256_shuffle_epi8(low, n),
                           _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(n, 4), nibble)));
}

/* The same of each 16-bit n below 2048. */
INLINE __m256i width_mask16(__m256i n) {
    n = _mm256_srli_epi16(n, 1);
    n = _mm256_or_si256(n, _mm256_srli_epi16(n, 1));
    n = _mm256_or_si256(n, _mm256_srli_epi16(n, 2));
    n = _mm256_or_si256(n, _mm256_srli_epi16(n, 4));
    return _mm256_or_si256(n, _mm256_srli_epi16(n, 8));
}

/* One bit per 16-bit lane of two registers of 0 or -1. */
INLINE uint32_t bits_of16(__m256i first, __m256i second) {
    return bits_of(in_order(_mm256_packs_epi16(first, second)));
}

INLINE __m256i half_of(__m256i bytes, int i) { /* 16 of 32 signed bytes as 16-bit lanes */
    return _mm256_cvtepi8_epi16(i == 0 ? _mm256_castsi256_si128(bytes) : _mm256_extracti128_si256(bytes, 1));
}

/* The bits that `mask` selects in each of four 64-bit lanes of `v`. */
INLINE void put_lanes(bit_writer *out, __m256i v, __m256i mask) {
    _Alignas(32) uint64_t values[4], masks[4];
    store(values, v);
    store(masks, mask);
    IN_MEMORY(values);
    IN_MEMORY(masks);
    put_selected(out, values, masks, 4);
}

INLINE __m256i get_lanes(const uint8_t *stream, uint32_t *bits, __m256i mask) {
    _Alignas(32) uint64_t masks[4];
    uint64_t values[4];
    store(masks, mask);
    IN_MEMORY(masks);
    for (int i = 0; i < 4; i++) {
        values[i] = _pdep_u64(load64(stream + (*bits >> 3)) >> (*bits & 7), masks[i]);
        *bits += (uint32_t)_mm_popcnt_u64(masks[i]);
    }
    return _mm256_set_epi64x((long long)values[3], (long long)values[2], (long long)values[1], (long long)values[0]);
}

INLINE uint32_t get_flagged(const uint8_t *stream, uint32_t *bits, uint32_t flagged) {
    const uint32_t values = _pdep_u32((uint32_t)(load64(stream + (*bits >> 3)) >> (*bits & 7)), flagged);
    *bits += (uint32_t)_mm_popcnt_u32(flagged);
    return values;
}

/* Zero cells of a row, token * 64 + channel, to the end of a zero_list, and its new end. Three without a branch; rows with more
 * are rare. */
INLINE uint16_t *add_zeros(uint16_t *end, uint64_t zeros, int token) {
    uint16_t *const next = end + _mm_popcnt_u64(zeros);
    do {
        for (int i = 0; i < 3; i++, zeros &= zeros - 1) {
            *end++ = (uint16_t)(ROW * token + (int)_tzcnt_u64(zeros));
        }
    } while (__builtin_expect(zeros != 0, 0));
    return next;
}

/* What rank and unrank need of 32 channels of a row: integers and cells. */
typedef struct {
    __m256i k[2], low[2], count[2];
    uint32_t zeros;
} half_row;

/* `scales`: of key channels, in unpacking order. */
INLINE half_row half_row_of(int part, int dtype, const uint8_t *codes, int token, int half, const float *scales,
                            const lynx_params *params) {
    half_row row;
    __m256i zero[2];
    const __m256 of_token = _mm256_set1_ps(params->scale[token]);
    for (int i = 0; i < 2; i++) {
        const int at = 2 * half + i;
        const bool key = part == LYNX_KEY;
        row.k[i] = codes_minus_offset(part, codes + token * ROW, at, params, _mm256_set1_epi16(params->offset[token]));
        cells(dtype, row.k[i], key ? _mm256_loadu_ps(scales + 16 * at) : of_token,
              key ? _mm256_loadu_ps(scales + 16 * at + 8) : of_token, &row.low[i], &row.count[i], &zero[i]);
    }
    row.zeros = bits_of16(zero[0], zero[1]);
    return row;
}

/* All ones in the channels that a block has. */
INLINE __m256i kept_channels(int channels, int half) {
    const int n = channels - 32 * half;
    return bytes_of(n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1);
}

INLINE void rank_any(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens, int channels,
                     const lynx_params *params, lynx_streams *streams) {
    float scales[ROW];
    unpack_order(params->scale, scales);
    const __m256i keep[2] = {kept_channels(channels, 0), kept_channels(channels, 1)};
    const __m256i magnitude_bits = _mm256_set1_epi16(0x7fff);
    zero_list all_zeros;
    uint16_t *end = all_zeros.at;
    bit_writer a = {streams->a, 0, 0}, b = {streams->b, 0, 0};
    for (int t = 0; t < tokens; t++) {
        const uint16_t *row = rows + t * stride;
        uint64_t zeros = 0;
        for (int half = 0; half < 2; half++) {
            const half_row in = half_row_of(part, dtype, codes, t, half, scales, params);
            zeros |= (uint64_t)(in.zeros & bits_of(keep[half])) << 32 * half;
            __m256i r[2];
            for (int i = 0; i < 2; i++) {
                const __m256i word = load(row + 32 * half + 16 * i);
                r[i] = _mm256_sub_epi16(_mm256_and_si256(word, magnitude_bits), in.low[i]);
            }
            uint32_t flagged, above; /* ranks of which B holds a bit, and the bit */
            if (dtype == LYNX_BFLOAT16) {
                const __m256i n = in_order(_mm256_packus_epi16(in.count[0], in.count[1]));
                const __m256i rank8 = in_order(_mm256_packus_epi16(r[0], r[1]));
                const __m256i mask = width_mask8(n), field = _mm256_and_si256(rank8, mask);
                const __m256i extra = _mm256_sub_epi8(_mm256_sub_epi8(n, mask), _mm256_set1_epi8(1));
                flagged = ~bits_of(_mm256_cmpeq_epi8(_mm256_max_epu8(field, extra), field)); /* field < extra */
                above = ~bits_of(_mm256_cmpeq_epi8(field, rank8));
                put_lanes(&a, field, _mm256_and_si256(mask, keep[half]));
            } else {
                __m256i has[2], same[2];
                for (int i = 0; i < 2; i++) {
                    const __m256i mask = width_mask16(in.count[i]), field = _mm256_and_si256(r[i], mask);
                    const __m256i extra = _mm256_sub_epi16(_mm256_sub_epi16(in.count[i], mask), _mm256_set1_epi16(1));
                    has[i] = _mm256_cmpgt_epi16(extra, field);
                    same[i] = _mm256_cmpeq_epi16(field, r[i]);
                    put_lanes(&a, field, _mm256_and_si256(mask, half_of(keep[half], i)));
                }
                flagged = bits_of16(has[0], has[1]);
                above = ~bits_of16(same[0], same[1]);
            }
            flagged &= bits_of(keep[half]);
            put(&b, _pext_u32(above, flagged), (uint32_t)_mm_popcnt_u32(flagged));
        }
        end = add_zeros(end, zeros, t);
    }
    streams->a_bits = position(&a, streams->a);
    streams->b_bits = position(&b, streams->b);
    all_zeros.count = (uint32_t)(end - all_zeros.at);
    rank_zeros(part, dtype, &all_zeros, rows, stride, params, streams);
}

INLINE int unrank_any(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                      lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    float scales[ROW];
    unpack_order(params->scale, scales);
    const __m256i keep[2] = {kept_channels(channels, 0), kept_channels(channels, 1)};
    zero_list all_zeros;
    uint16_t *end = all_zeros.at;
    uint32_t a_bits = 0, b_bits = 0;
    __m256i empty = _mm256_setzero_si256();
    for (int t = 0; t < tokens; t++) {
        uint16_t *row = rows[t];
        uint64_t zeros = 0;
        for (int half = 0; half < 2; half++) {
            const half_row in = half_row_of(part, dtype, codes, t, half, scales, params);
            zeros |= (uint64_t)(in.zeros & bits_of(keep[half])) << 32 * half;
            __m256i ranks[2];
            if (dtype == LYNX_BFLOAT16) {
                const __m256i one = _mm256_set1_epi8(1);
                const __m256i n = _mm256_blendv_epi8(one, in_order(_mm256_packus_epi16(in.count[0], in.count[1])),
                                                     keep[half]);
                empty = _mm256_or_si256(empty, _mm256_cmpeq_epi8(n, _mm256_setzero_si256()));
                const __m256i mask = width_mask8(n), field = get_lanes(streams->a, &a_bits, mask);
                const __m256i extra = _mm256_sub_epi8(_mm256_sub_epi8(n, mask), one);
                const uint32_t flagged = ~bits_of(_mm256_cmpeq_epi8(_mm256_max_epu8(field, extra), field));
                const __m256i above = bytes_of(get_flagged(streams->more, &b_bits, flagged));
                const __m256i rank8 = _mm256_add_epi8(field, _mm256_and_si256(above, _mm256_add_epi8(mask, one)));
                ranks[0] = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(rank8));
                ranks[1] = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(rank8, 1));
            } else {
                const __m256i one = _mm256_set1_epi16(1);
                __m256i mask[2], field[2], has[2];
                for (int i = 0; i < 2; i++) {
                    const __m256i n = _mm256_blendv_epi8(one, in.count[i], half_of(keep[half], i));
                    empty = _mm256_or_si256(empty, _mm256_cmpeq_epi16(n, _mm256_setzero_si256()));
                    mask[i] = width_mask16(n);
                    field[i] = get_lanes(streams->a, &a_bits, mask[i]);
                    const __m256i extra = _mm256_sub_epi16(_mm256_sub_epi16(n, mask[i]), one);
                    has[i] = _mm256_cmpgt_epi16(extra, field[i]);
                }
                const __m256i above = bytes_of(get_flagged(streams->more, &b_bits, bits_of16(has[0], has[1])));
                for (int i = 0; i < 2; i++) {
                    const __m256i high = _mm256_and_si256(half_of(above, i), _mm256_add_epi16(mask[i], one));
                    ranks[i] = _mm256_add_epi16(field[i], high);
                }
            }
            for (int i = 0; i < 2; i++) {
                const __m256i sign = _mm256_and_si256(in.k[i], _mm256_set1_epi16(INT16_MIN));
                const __m256i word = _mm256_or_si256(_mm256_add_epi16(in.low[i], ranks[i]), sign);
                const __m256i shift = shifts == NULL ? _mm256_setzero_si256() : load(shifts + 32 * half + 16 * i);
                store(row + 32 * half + 16 * i, _mm256_add_epi16(word, shift));
            }
        }
        end = add_zeros(end, zeros, t);
    }
    streams->a_bits = a_bits;
    streams->b_bits = b_bits;
    all_zeros.count = (uint32_t)(end - all_zeros.at);
    const bool good = unrank_zeros(part, dtype, &all_zeros, shifts, rows, params, streams);
    return good && _mm256_testz_si256(empty, empty) ? LYNX_OK : LYNX_ERR_RANK;
}

/* --- scales that encoders choose ------------------------------------------------------------------------------- */

/* A register of 16-bit lanes has channels 0..7 and 16..23 of half a row, or 8..15 and 24..31: what bytes in their order unpack to,
 * and what packs to that. Of 32-bit lanes a register has the even or the odd ones of these. */

/* What makes cells of codes, in binary32: an integer's size is |code - offset| with the offset within a byte, plus what that leaves
 * of it, which is part of the sums. Of channels in the order of lanes, or, of values, of tokens. */
typedef struct {
    _Alignas(32) float scale[ROW], lower[ROW], upper[ROW];
    _Alignas(32) uint8_t offset[4 * ROW], sign[4 * ROW]; /* 128 where integers can be negative; of tokens in 4 bytes each */
    __m256i none[2]; /* 1 in channels that there are none of, */
    __m256i keep[2]; /* 255 in others */
    bool whole;      /* all are there */
} cell_scales;

/* Floats of 64 channels in the order of lanes of cells_of_half. */
INLINE void lane_order(const float *in, float *out) {
    for (int at = 0; at < ROW; at += 16, out += 16) {
        const float *first = in + at / 32 * 32 + at % 32 / 2;
        const __m256 a = _mm256_loadu_ps(first), b = _mm256_loadu_ps(first + 16);
        const __m256 x = _mm256_permute2f128_ps(a, b, 0x20), y = _mm256_permute2f128_ps(a, b, 0x31);
        _mm256_store_ps(out, _mm256_shuffle_ps(x, y, 0x88));
        _mm256_store_ps(out + 8, _mm256_shuffle_ps(x, y, 0xdd));
    }
}

/* False if binary32 does not hold all products. */
static bool start_cells(int part, int channels, const lynx_params *params, cell_scales *l) {
    uint32_t wild = 0;
    float lower[ROW], upper[ROW];
    for (int g = 0; g < ROW; g++) {
        const uint32_t s = params->s[g];
        wild |= (s % SCALE_UNIT) | (MOST_PLACED - s) >> 31;
    }
    for (int g = 0; g < ROW; g++) {
        const int offset = params->offset[g], inside = offset < 0 ? 0 : offset > 255 ? 255 : offset;
        const int twice = 2 * (offset < inside ? inside - offset : offset - inside);
        /* Ends of cells less an eighth of what all of them are multiples of: the words below them. */
        const float half = params->scale[g] * 0.5f, little = bits_float((uint32_t)(params->s[g] & 0x7f80) << 16) * 0x1p-9f;
        lower[g] = (float)(twice - 1) * half - little;
        upper[g] = (float)(twice + 1) * half - little;
    }
    uint8_t inside[ROW], sign[ROW];
    for (int g = 0; g < ROW; g++) {
        const int16_t offset = params->offset[g];
        inside[g] = (uint8_t)(offset < 0 ? 0 : offset > 255 ? 255 : offset);
        sign[g] = offset < 0 ? 0 : 128;
    }
    if (part == LYNX_KEY) {
        lane_order(params->scale, l->scale);
        lane_order(lower, l->lower);
        lane_order(upper, l->upper);
        memcpy(l->offset, inside, sizeof inside);
        memcpy(l->sign, sign, sizeof sign);
    } else {
        memcpy(l->scale, params->scale, sizeof l->scale);
        memcpy(l->lower, lower, sizeof lower);
        memcpy(l->upper, upper, sizeof upper);
        for (int t = 0; t < ROW; t++) {
            store32(l->offset + 4 * t, inside[t] * 0x01010101u);
            store32(l->sign + 4 * t, sign[t] * 0x01010101u);
        }
    }
    l->whole = channels == ROW;
    for (int half = 0; half < 2; half++) {
        l->keep[half] = kept_channels(channels, half);
        l->none[half] = _mm256_andnot_si256(l->keep[half], _mm256_set1_epi8(1));
    }
    return wild == 0;
}

/* Cells of half a row: the words below their least ones, without signs; how many words they have, 0 in zero cells; which those are;
 * and signs of integers, in bytes. */
typedef struct {
    __m256i below[2], count, sign;
    uint32_t zeros;
} half_cells;

INLINE __m256i of_group(int part, const uint8_t *bytes, int token, int half) {
    return part == LYNX_KEY ? load(bytes + 32 * half) : _mm256_set1_epi32((int)load32(bytes + 4 * token));
}

/* `least`: of cells but zero cells. */
INLINE half_cells cells_of_half(int part, const uint8_t *codes, int token, int half, const cell_scales *l, __m256i *least) {
    const __m256i code = load(codes + token * ROW + 32 * half), offset = of_group(part, l->offset, token, half);
    const __m256i above = _mm256_subs_epu8(code, offset), size = _mm256_or_si256(above, _mm256_subs_epu8(offset, code));
    half_cells cells;
    __m256i n[2];
    for (int i = 0; i < 2; i++) {
        __m256i lower[2], upper[2];
        for (int odd = 0; odd < 2; odd++) {
            const int c = 8 * i + odd, at = 32 * half + 16 * i + 8 * odd;
            const __m256i pick = _mm256_broadcastsi128_si256(_mm_setr_epi8((char)c, -1, -1, -1, (char)(c + 2), -1, -1, -1, (char)(c + 4), -1, -1, -1, (char)(c + 6), -1, -1, -1));
            const __m256 x = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(size, pick));
            const bool key = part == LYNX_KEY;
            const __m256 scale = key ? _mm256_load_ps(l->scale + at) : _mm256_set1_ps(l->scale[token]);
            lower[odd] = _mm256_castps_si256(_mm256_fmadd_ps(x, scale, key ? _mm256_load_ps(l->lower + at) : _mm256_set1_ps(l->lower[token])));
            upper[odd] = _mm256_castps_si256(_mm256_fmadd_ps(x, scale, key ? _mm256_load_ps(l->upper + at) : _mm256_set1_ps(l->upper[token])));
        }
        cells.below[i] = _mm256_blend_epi16(_mm256_srli_epi32(lower[0], 16), lower[1], 0xaa);
        n[i] = _mm256_sub_epi16(_mm256_blend_epi16(_mm256_srli_epi32(upper[0], 16), upper[1], 0xaa), cells.below[i]);
    }
    __m256i count = _mm256_packus_epi16(n[0], n[1]); /* of 0, whose lower end is negative, 32767 and so 255 */
    if (!l->whole) {
        count = _mm256_or_si256(_mm256_and_si256(count, l->keep[half]), l->none[half]);
    }
    *least = _mm256_min_epu8(*least, count);
    const __m256i zero = _mm256_cmpeq_epi8(count, _mm256_set1_epi8(-1));
    cells.count = _mm256_sub_epi8(count, zero);
    cells.zeros = bits_of(zero);
    cells.sign = _mm256_and_si256(_mm256_cmpeq_epi8(above, _mm256_setzero_si256()), of_group(part, l->sign, token, half));
    return cells;
}

/* Ranks of which B holds a bit: those whose lower bits are below the words that there are beyond a power of two, or none: -1. */
INLINE uint64_t flagged_of(const __m256i extra[2], const __m256i field[2]) {
    return bits_of(_mm256_cmpgt_epi8(extra[0], field[0])) | (uint64_t)bits_of(_mm256_cmpgt_epi8(extra[1], field[1])) << 32;
}

INLINE void rank_as(int part, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens, const lynx_params *params,
                    const cell_scales *l, lynx_streams *streams) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    bit_writer a = {streams->a, 0, 0}, b = {streams->b, 0, 0};
    zero_list all_zeros;
    uint16_t *end = all_zeros.at;
    __m256i least = magnitude; /* encoders choose scales with which none is empty */
    for (int first = 0; first < tokens; first += 8) {
        const int count = tokens - first < 8 ? tokens - first : 8;
        _Alignas(32) uint64_t fields[8 * 8], masks[8 * 8];
        for (int t = 0; t < count; t++) {
            const uint16_t *row = rows + (first + t) * stride;
            lynx_fetch(&streams->ahead, (uint32_t)(first + t));
            __m256i field[2], extra[2];
            uint64_t zeros = 0, same = 0;
            for (int half = 0; half < 2; half++) {
                const half_cells in = cells_of_half(part, codes, first + t, half, l, &least);
                __m256i r[2];
                for (int i = 0; i < 2; i++) {
                    const __m128i low = _mm_loadu_si128((const __m128i *)(row + 32 * half + 8 * i));
                    const __m128i high = _mm_loadu_si128((const __m128i *)(row + 32 * half + 16 + 8 * i));
                    r[i] = _mm256_sub_epi16(_mm256_and_si256(_mm256_set_m128i(high, low), magnitude), in.below[i]);
                }
                const __m256i rank = _mm256_add_epi8(_mm256_packus_epi16(r[0], r[1]), _mm256_set1_epi8(-1));
                const __m256i mask = width_mask8(in.count);
                field[half] = _mm256_and_si256(rank, mask);
                extra[half] = _mm256_sub_epi8(in.count, _mm256_sub_epi8(mask, _mm256_set1_epi8(-1)));
                store(fields + 8 * t + 4 * half, field[half]);
                store(masks + 8 * t + 4 * half, mask);
                same |= (uint64_t)bits_of(_mm256_cmpeq_epi8(field[half], rank)) << 32 * half;
                zeros |= (uint64_t)in.zeros << 32 * half;
            }
            const uint64_t flagged = flagged_of(extra, field);
            put64(&b, _pext_u64(~same, flagged), (uint32_t)_mm_popcnt_u64(flagged));
            end = add_zeros(end, zeros, first + t);
        }
        for (int w = 0; w < 8 * count; w += 2) { /* two lanes at once where they fit, which is nearly always */
            const uint64_t low = _pext_u64(fields[w], masks[w]), high = _pext_u64(fields[w + 1], masks[w + 1]);
            const uint32_t bits = (uint32_t)_mm_popcnt_u64(masks[w]), more = (uint32_t)_mm_popcnt_u64(masks[w + 1]);
            if (__builtin_expect(bits + more <= 56, 1)) {
                put(&a, low | high << bits, bits + more);
            } else {
                put(&a, low, bits);
                put(&a, high, more);
            }
        }
    }
    streams->a_bits = position(&a, streams->a);
    streams->b_bits = position(&b, streams->b);
    all_zeros.count = (uint32_t)(end - all_zeros.at);
    rank_zeros(part, LYNX_BFLOAT16, &all_zeros, rows, stride, params, streams);
}

/* Fields of two lanes: of one piece of the stream, where they fit, as they were put. Returns where they end. */
INLINE uint32_t get_pair(const uint8_t *stream, uint32_t at, const uint64_t *masks, uint64_t *fields) {
    const uint32_t bits = (uint32_t)_mm_popcnt_u64(masks[0]), end = at + bits + (uint32_t)_mm_popcnt_u64(masks[1]);
    const uint64_t first = load64(stream + (at >> 3)) >> (at & 7);
    uint64_t second = first >> bits; /* at most 56 */
    if (__builtin_expect(end - at > 57, 0)) {
        second = load64(stream + ((at + bits) >> 3)) >> ((at + bits) & 7);
    }
    fields[0] = _pdep_u64(first, masks[0]);
    fields[1] = _pdep_u64(second, masks[1]);
    return end;
}

/* A row of words in registers of cells. Rows that are half a register off, as allocators place them, go in pieces none of which
 * crosses a line. */
INLINE void put_words(uint16_t *row, const __m256i words[4]) {
    if (((uintptr_t)row & 31) == 16) {
        _mm_storeu_si128((__m128i *)row, _mm256_castsi256_si128(words[0]));
        store(row + 8, _mm256_blend_epi32(words[1], words[0], 0xf0));
        store(row + 24, _mm256_permute2x128_si256(words[1], words[2], 0x21));
        store(row + 40, _mm256_blend_epi32(words[3], words[2], 0xf0));
        _mm_storeu_si128((__m128i *)(row + 56), _mm256_extracti128_si256(words[3], 1));
    } else {
        for (int i = 0; i < 4; i += 2) {
            store(row + 16 * i, _mm256_permute2x128_si256(words[i], words[i + 1], 0x20));
            store(row + 16 * i + 16, _mm256_permute2x128_si256(words[i], words[i + 1], 0x31));
        }
    }
}

INLINE int unrank_as(int part, const uint8_t *codes, int tokens, const lynx_params *params, const cell_scales *l,
                     lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    zero_list all_zeros;
    uint16_t *end = all_zeros.at;
    uint32_t a_bits = 0, b_bits = 0;
    const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    __m256i least = _mm256_set1_epi8(-1), shift[2][2];
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 2; i++) {
            const int16_t *at = shifts == NULL ? NULL : shifts + 32 * half + 8 * i;
            shift[half][i] = at == NULL ? _mm256_setzero_si256()
                                        : _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(at + 16)), _mm_loadu_si128((const __m128i *)at));
            shift[half][i] = _mm256_add_epi16(shift[half][i], _mm256_set1_epi16(1));
        }
    }
    for (int first = 0; first < tokens; first += 8) {
        const int count = tokens - first < 8 ? tokens - first : 8;
        _Alignas(32) uint64_t fields[8 * 8], masks[8 * 8];
        uint64_t *field_of = fields;
        __m256i low[8][2][2], extra[8][2], more[8][2], sign[8][2];
        for (int t = 0; t < count; t++) {
            uint64_t zeros = 0;
            lynx_fetch(&streams->ahead, (uint32_t)(first + t));
            if (first + 8 + t < tokens) {
                __builtin_prefetch(rows[first + 8 + t], 1);
                __builtin_prefetch(rows[first + 8 + t] + 32, 1);
            }
            for (int half = 0; half < 2; half++) {
                const half_cells in = cells_of_half(part, codes, first + t, half, l, &least);
                const __m256i mask = width_mask8(in.count);
                sign[t][half] = in.sign;
                store(masks + 8 * t + 4 * half, mask);
                more[t][half] = _mm256_sub_epi8(mask, _mm256_set1_epi8(-1));
                extra[t][half] = _mm256_sub_epi8(in.count, more[t][half]);
                for (int i = 0; i < 2; i++) {
                    low[t][half][i] = part == LYNX_KEY ? in.below[i] : _mm256_add_epi16(in.below[i], shift[half][i]);
                }
                zeros |= (uint64_t)in.zeros << 32 * half;
            }
            end = add_zeros(end, zeros, first + t);
        }
        for (const uint64_t *mask = masks, *const last = masks + 8 * count; mask < last; mask += 4, field_of += 4) {
            a_bits = get_pair(streams->a, a_bits, mask, field_of);
            a_bits = get_pair(streams->a, a_bits, mask + 2, field_of + 2);
        }
        for (int t = 0; t < count; t++) {
            const __m256i field[2] = {load(fields + 8 * t), load(fields + 8 * t + 4)};
            const uint64_t flagged = flagged_of(extra[t], field);
            const uint32_t flags_here = (uint32_t)_mm_popcnt_u64(flagged);
            uint64_t above = _pdep_u64(get_few_bits64(streams->more, b_bits, flags_here), flagged);
            b_bits += flags_here;
            IN_MEMORY(above);
            const __m256i flags = _mm256_set1_epi64x((long long)above);
            __m256i words[4];
            for (int half = 0; half < 2; half++) {
                const __m256i spread = _mm256_shuffle_epi8(flags, _mm256_add_epi8(pick, _mm256_set1_epi8((char)(4 * half))));
                const __m256i high = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), more[t][half]);
                const __m256i rank = _mm256_add_epi8(part == LYNX_KEY ? _mm256_add_epi8(field[half], _mm256_set1_epi8(1)) : field[half], high);
                words[2 * half] = _mm256_add_epi16(low[t][half][0], _mm256_unpacklo_epi8(rank, sign[t][half]));
                words[2 * half + 1] = _mm256_add_epi16(low[t][half][1], _mm256_unpackhi_epi8(rank, sign[t][half]));
            }
            put_words(rows[first + t], words);
        }
    }
    streams->a_bits = a_bits;
    streams->b_bits = b_bits;
    all_zeros.count = (uint32_t)(end - all_zeros.at);
    const bool empty = bits_of(_mm256_cmpeq_epi8(least, _mm256_setzero_si256())) != 0;
    return unrank_zeros(part, LYNX_BFLOAT16, &all_zeros, shifts, rows, params, streams) && !empty ? LYNX_OK : LYNX_ERR_RANK;
}

void lynx_avx2_rank(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                 int channels, const lynx_params *params, lynx_streams *streams) {
    cell_scales l;
    if (dtype == LYNX_FLOAT16) {
        rank_any(part, LYNX_FLOAT16, rows, stride, codes, tokens, channels, params, streams);
    } else if (!start_cells(part, channels, params, &l)) {
        rank_any(part, LYNX_BFLOAT16, rows, stride, codes, tokens, channels, params, streams);
    } else if (part == LYNX_KEY) {
        rank_as(LYNX_KEY, rows, stride, codes, tokens, params, &l, streams);
    } else {
        rank_as(LYNX_VALUE, rows, stride, codes, tokens, params, &l, streams);
    }
}

int lynx_avx2_unrank(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                  lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    cell_scales l;
    if (dtype == LYNX_FLOAT16) {
        return unrank_any(part, LYNX_FLOAT16, codes, tokens, channels, params, streams, NULL, rows);
    }
    if (!start_cells(part, channels, params, &l)) {
        return unrank_any(part, LYNX_BFLOAT16, codes, tokens, channels, params, streams, shifts, rows);
    }
    if (part == LYNX_KEY) {
        return unrank_as(LYNX_KEY, codes, tokens, params, &l, streams, NULL, rows);
    }
    return unrank_as(LYNX_VALUE, codes, tokens, params, &l, streams, shifts, rows);
}

uint64_t lynx_avx2_rank_bound(int part, const uint8_t *codes, int tokens, int channels, const lynx_params *params) {
    _Alignas(32) uint8_t zeros[ROW];
    for (int g = 0; g < ROW; g++) {
        zeros[g] = (uint8_t)params->offset[g];
    }
    __m256i sum = _mm256_setzero_si256();
    for (int half = 0; half < 2; half++) {
        const __m256i keep = kept_channels(channels, half);
        for (int t = 0; t < tokens; t++) {
            const __m256i zero = part == LYNX_KEY ? load(zeros + 32 * half) : _mm256_set1_epi8((char)zeros[t]);
            const __m256i bits = most_rank_bits(load(codes + t * ROW + 32 * half), zero);
            sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_and_si256(bits, keep), _mm256_setzero_si256()));
        }
    }
    return sum64(sum) + (uint64_t)(LEAST_BOUND * tokens * channels);
}

AVX2_END
#endif
