/* AVX2 kernels. The same bytes as scalar.c; the comments there say what is computed, here only how.
 *
 * Words become 32-bit lanes by unpacking with zeros, which leaves them in the order of packing: channels 0-3, 8-11 in
 * one register and 4-7, 12-15 in the next. Per-channel floats are put in that order once a block. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx2.h"

#define ROWS_SURVEY
#define ROWS_RESCALE
#define ROWS_FIELDS
static void fields(const uint8_t *stream, int bits, uint32_t *out) {
    const __m256i lane = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3), _mm256_set1_epi32(bits));
    const __m256i at = _mm256_add_epi32(lane, _mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi32(4 * (bits & 1))));
    const __m256i byte = _mm256_mullo_epi32(_mm256_srli_epi32(at, 3), _mm256_set1_epi32(0x01010101));
    const __m256i pick = _mm256_add_epi8(byte, _mm256_set1_epi32(0x03020100));
    const __m256i shift = _mm256_and_si256(at, _mm256_set1_epi32(7)), ones = _mm256_set1_epi32((1 << bits) - 1);
    for (int g = 0; g < ROW; g += 8, stream += bits) { /* 4 fields lie within 13 bytes */
        const __m128i first = _mm_loadu_si128((const __m128i *)stream);
        const __m128i second = _mm_loadu_si128((const __m128i *)(stream + bits / 2));
        const __m256i found = _mm256_shuffle_epi8(_mm256_set_m128i(second, first), pick);
        store(out + g, _mm256_and_si256(_mm256_srlv_epi32(found, shift), ones));
    }
}
#include "rows.h"

INLINE __m256i ordered16(__m256i w) {
    return _mm256_xor_si256(w, _mm256_srli_epi16(_mm256_srai_epi16(w, 15), 1));
}

/* Words are compared as they are, with and without signs: the least is the largest without, if any has a sign; the largest the largest
 * with, if any has none. */
INLINE void survey_row(const uint16_t *row, __m256i first[4], __m256i last[4], __m256i most[4]) {
    for (int i = 0; i < 4; i++) {
        const __m256i word = load(row + 16 * i);
        first[i] = _mm256_min_epu16(first[i], word);
        last[i] = _mm256_max_epu16(last[i], word);
        most[i] = _mm256_max_epi16(most[i], word);
    }
}

static void survey(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    __m256i first[4], last[4], most[4];
    for (int i = 0; i < 4; i++) {
        first[i] = last[i] = most[i] = load(rows + 16 * i);
    }
    for (int t = 0; t < tokens / 2; t++, rows += stride) {
        lynx_fetch_far(rows, stride);
        survey_row(rows, first, last, most);
        lynx_fetch_far(rows + tokens / 2 * stride, stride);
        survey_row(rows + tokens / 2 * stride, first, last, most);
    }
    if (tokens % 2 != 0) {
        survey_row(rows + tokens / 2 * stride, first, last, most);
    }
    for (int i = 0; i < 4; i++) {
        const __m256i any = _mm256_srai_epi16(last[i], 15), all = _mm256_srai_epi16(most[i], 15); /* have signs */
        store(low + 16 * i, ordered16(_mm256_blendv_epi8(first[i], last[i], any)));
        store(high + 16 * i, ordered16(_mm256_blendv_epi8(most[i], first[i], all)));
    }
}

INLINE void size_row(const uint16_t *row, bool signs, __m256i largest[4], __m256i negative[4]) {
    for (int i = 0; i < 4; i++) {
        const __m256i word = load(row + 16 * i);
        largest[i] = _mm256_max_epi16(largest[i], _mm256_and_si256(word, _mm256_set1_epi16(0x7fff)));
        negative[i] = signs ? _mm256_add_epi16(negative[i], _mm256_srli_epi16(word, 15)) : negative[i];
    }
}

#include "sizes.h"

static void survey_sizes(const uint16_t *rows, ptrdiff_t stride, int tokens, bool fetched, uint16_t *most, uint16_t *signs) {
    sizes_of(rows, stride, tokens, fetched, most, signs);
}

/* Words outside the range stay; those that leave it come in again at the other end. */
static void rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff), count = _mm256_set1_epi16((short)(RESCALE_SPAN + INT16_MIN));
    const __m256i inner = _mm256_set1_epi16((short)(RESCALE_INNER + INT16_MIN)), nothing = _mm256_setzero_si256();
    for (int t = 0; t < tokens; t++, rows += stride, out += out_stride) {
        for (int i = 0; i < 4; i++) {
            const __m256i word = load(rows + 16 * i), size = _mm256_and_si256(word, magnitude);
            /* An unsigned comparison, of numbers less 2^15. Inside it is so for any exponent. */
            const __m256i inside = _mm256_cmpgt_epi16(count, _mm256_sub_epi16(size, inner));
            const __m256i still = _mm256_or_si256(inside, _mm256_cmpeq_epi16(size, nothing));
            store(out + 16 * i, _mm256_sub_epi16(word, _mm256_and_si256(load(shifts + 16 * i), inside)));
            if (__builtin_expect(_mm256_movemask_epi8(still) != -1, 0)) {
                uint16_t words[16];
                store(words, word);
                for (int c = 0; c < 16; c++) {
                    out[16 * i + c] = rescaled(words[c], shifts[16 * i + c]);
                }
            }
        }
    }
}

/* Least words of 8 rows, 8 lanes each in the lower halves of registers, and likewise in the upper ones. */
INLINE __m256i least_of_octet(__m256i r[8]) {
    for (int j = 0; j < 4; j++) {
        r[j] = _mm256_min_epi16(_mm256_unpacklo_epi64(r[2 * j], r[2 * j + 1]), _mm256_unpackhi_epi64(r[2 * j], r[2 * j + 1]));
    }
    for (int j = 0; j < 2; j++) {
        const __m256 a = _mm256_castsi256_ps(r[2 * j]), b = _mm256_castsi256_ps(r[2 * j + 1]);
        const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), odd = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
        const __m256i least = _mm256_min_epi16(even, odd);
        r[j] = _mm256_srai_epi32(_mm256_min_epi16(least, _mm256_slli_epi32(least, 16)), 16);
    }
    return _mm256_packs_epi32(r[0], r[1]);
}

/* Extremes of value groups; unless `shifts` is null, of their words divided by 2^e, which go to `out`. */
INLINE void range_of_values(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out, int16_t *low,
                            int16_t *high) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    for (int first = 0; first < tokens; first += 8) {
        const int count = tokens - first < 8 ? tokens - first : 8;
        const uint16_t *in = rows + first * stride;
        ptrdiff_t in_stride = stride;
        for (bool again = shifts != NULL;; again = false) {
            __m256i r[8], nearest = magnitude;
            for (int t = 0; t < 8; t++) {
                if (t >= count) {
                    r[t] = r[count - 1];
                    continue;
                }
                __m256i least, largest;
                for (int i = 0; i < 4; i++) {
                    __m256i word = load(in + t * in_stride + 16 * i);
                    if (again) {
                        word = _mm256_sub_epi16(word, load(shifts + 16 * i));
                        nearest = _mm256_min_epi16(nearest, _mm256_and_si256(word, magnitude));
                        store(out + (first + t) * ROW + 16 * i, word);
                    }
                    const __m256i o = ordered16(word);
                    least = i == 0 ? o : _mm256_min_epi16(least, o);
                    largest = i == 0 ? o : _mm256_max_epi16(largest, o);
                }
                const __m256i less = _mm256_xor_si256(largest, _mm256_set1_epi16(-1)); /* the least is the largest's */
                r[t] = _mm256_min_epi16(_mm256_permute2x128_si256(least, less, 0x20), _mm256_permute2x128_si256(least, less, 0x31));
            }
            const __m256i both = least_of_octet(r), largest = _mm256_xor_si256(both, _mm256_set1_epi16(-1));
            _mm_storeu_si128((__m128i *)(low + first), _mm256_castsi256_si128(both));
            _mm_storeu_si128((__m128i *)(high + first), _mm256_extracti128_si256(largest, 1));
            /* Words that do not simply move are looked for in all rows at once, and are rare. */
            const __m256i near = _mm256_cmpgt_epi16(_mm256_set1_epi16(RESCALE_NEAR), nearest);
            const __m256i odd = _mm256_or_si256(near, _mm256_cmpgt_epi16(_mm256_set1_epi16(-RESCALE_FAR), both));
            if (!again || __builtin_expect(_mm256_testz_si256(odd, odd), 1)) {
                break;
            }
            uint16_t *const made = out + first * ROW; /* where the words themselves may have been */
            for (int c = 0; c < count * ROW; c += 16) {
                store(made + c, _mm256_add_epi16(load(made + c), load(shifts + c % ROW)));
            }
            rescale(shifts, made, ROW, count, made, ROW);
            in = made;
            in_stride = ROW;
        }
    }
}

static void range(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    if (part == LYNX_KEY) {
        survey(rows, stride, tokens, low, high);
    } else {
        range_of_values(NULL, rows, stride, tokens, NULL, low, high);
    }
}

static void rescale_range(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out, int16_t *low,
                          int16_t *high) {
    range_of_values(shifts, rows, stride, tokens, out, low, high);
}

static void choose(int dtype, const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params) {
    if (dtype == LYNX_BFLOAT16) {
        choose_as(LYNX_BFLOAT16, planes, low, high, params);
    } else {
        choose_as(LYNX_FLOAT16, planes, low, high, params);
    }
}

#define INTEGERS 0x1.8p23f /* binary32 near it holds integers only: what is added is rounded to one, in the lower bits */

/* To the nearest integer, of products that are no ties: inverses are a little larger than 1 / s. Returns the bound on the bits of
 * level 2 of the channels in `used` if that is `wanted`. With each row one of those `ahead` is fetched. */
INLINE uint64_t quantise_as(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_params *params,
                            uint64_t used, bool wanted, const lynx_stretch *ahead, ptrdiff_t ahead_stride, uint8_t *codes) {
    _Alignas(32) float inverses[ROW], offsets[ROW], offset_of[ROW];
    _Alignas(32) uint8_t zeros[ROW];
    for (int g = 0; g < ROW; g++) {
        offset_of[g] = INTEGERS + (float)params->offset[g];
        zeros[g] = (uint8_t)params->offset[g];
    }
    for (int g = 0; g < ROW && part == LYNX_KEY; g++) { /* even channels of each 16, then odd ones */
        const int at = g / 16 * 16 + g % 2 * 8 + g % 16 / 2;
        inverses[at] = params->inverse[g];
        offsets[at] = offset_of[g];
    }
    const __m256i none = _mm256_setzero_si256();
    __m256i bits[2] = {none, none}, sum = none;
    lynx_scout scout = lynx_scout_of(ahead, ahead_stride);
    for (int t = 0; t < tokens; t++) {
        lynx_fetch_row(&scout);
        if (part == LYNX_KEY) { /* values were read for their range just now */
            lynx_fetch_near(rows + t * stride, stride);
        }
        const __m256 inverse = _mm256_set1_ps(params->inverse[t]), offset = _mm256_set1_ps(offset_of[t]);
        __m256i code[4];
        for (int i = 0; i < 4; i++) {
            const __m256i words = load(rows + t * stride + 16 * i);
            __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
            __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
            if (dtype == LYNX_FLOAT16) {
                const __m256i first = _mm256_and_si256(words, _mm256_set1_epi32(0xffff)), second = _mm256_srli_epi32(words, 16);
                const __m256i both = in_order(_mm256_packus_epi32(first, second));
                even = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
                odd = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
            }
            const bool key = part == LYNX_KEY;
            const __m256 x = _mm256_fmadd_ps(even, key ? _mm256_load_ps(inverses + 16 * i) : inverse,
                                             key ? _mm256_load_ps(offsets + 16 * i) : offset);
            const __m256 y = _mm256_fmadd_ps(odd, key ? _mm256_load_ps(inverses + 16 * i + 8) : inverse,
                                             key ? _mm256_load_ps(offsets + 16 * i + 8) : offset);
            const __m256i upper = _mm256_slli_epi32(_mm256_castps_si256(y), 16);
            code[i] = _mm256_blend_epi16(_mm256_castps_si256(x), upper, 0xaa); /* codes are bytes */
        }
        for (int half = 0; half < 2; half++) {
            const __m256i bytes = in_order(_mm256_packus_epi16(code[2 * half], code[2 * half + 1]));
            store(codes + t * ROW + 32 * half, bytes);
            if (wanted) {
                const __m256i zero = part == LYNX_KEY ? load(zeros + 32 * half) : _mm256_set1_epi8((char)zeros[t]);
                bits[half] = _mm256_add_epi8(bits[half], most_rank_bits(bytes, zero));
            }
        }
        for (int half = 0; half < 2 && wanted && (t % 8 == 7 || t == tokens - 1); half++) { /* 8 times 24 is a byte */
            sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_and_si256(bits[half], bytes_of((uint32_t)(used >> 32 * half))), none));
            bits[half] = none;
        }
    }
    return wanted ? sum64(sum) + (uint64_t)(LEAST_BOUND * tokens) * (uint64_t)_mm_popcnt_u64(used) : 0;
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
    const uint64_t used = planes->used;
    if (part == LYNX_KEY) {
        return quantise_as(LYNX_KEY, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, NULL, 0, codes);
    }
    return bounded ? quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, ahead, ahead_stride, codes)
                   : quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, false, ahead, ahead_stride, codes);
}

static void shuffles(lynx_planes *planes) {
    const uint64_t order = 0x0706050403020100ull, ones = 0x0101010101010101ull;
    for (int p = 0; p <= FOLDED_REST; p++) {
        const uint64_t two = planes->in_anchor[1] & ~planes->in_anchor[2], anchor = p == FOLDED_REST ? ~two : planes->in_anchor[p];
        const uint64_t masks[2] = {anchor, planes->used & ~anchor};
        uint8_t *const expand_by[2] = {planes->anchor_expand[p], planes->rest_expand[p]};
        uint8_t *const compress_by[2] = {planes->anchor_compress[p], planes->rest_compress[p]};
        uint8_t *const ranks[2] = {planes->anchor_rank[p], planes->rest_rank[p]};
        for (int i = 0; i < 2; i++) {
            for (int lane = 0; lane < ROW; lane += 16) {
                uint64_t count = 0; /* channels of the lane that are selected */
                store64(compress_by[i] + lane + 8, ~0ull);
                for (int eight = 0; eight < 2; eight++) {
                    const uint64_t bytes = byte_mask(masks[i], lane / 8 + eight);
                    const uint64_t places = _pdep_u64(order + count * ones, bytes), found = _pext_u64(order + 8 * (uint64_t)eight * ones, bytes);
                    store64(expand_by[i] + lane + 8 * eight, places | (~bytes & 0x80 * ones));
                    store64(compress_by[i] + lane + count, found | ~_pext_u64(~0ull, bytes));
                    count += (uint64_t)_mm_popcnt_u64(bytes) / 8;
                }
                ranks[i][lane / 16] = (uint8_t)_mm_popcnt_u64(lane == 0 ? 0 : masks[i] << (ROW - lane));
            }
        }
    }
}

static void pack(const lynx_planes *planes, const uint8_t *codes, int tokens, uint8_t *anchor, uint8_t *rest) {
    const int bits = planes->widths[0];
    for (int first = 0; first < tokens; first += 8, codes += 8 * ROW) {
        __m256i r[2][8];
        for (int half = 0; half < 2; half++) {
            for (int t = 0; t < 8; t++) {
                r[half][t] = load(codes + t * ROW + 32 * half);
            }
            transpose(r[half], false);
        }
        if (planes->uniform) {
            for (int p = 0; p < 8; p++) {
                uint8_t *out = p < bits ? (anchor == NULL ? NULL : anchor + ROW * p)
                                        : (rest == NULL ? NULL : rest + ROW * (p - bits));
                if (out != NULL) {
                    store(out, r[0][7 - p]);
                    store(out + 32, r[1][7 - p]);
                }
            }
            anchor = anchor == NULL ? NULL : anchor + planes->anchor_octet;
            rest = rest == NULL ? NULL : rest + planes->rest_octet;
            continue;
        }
        for (int p = 0; p < 8; p++) {
            for (int half = 0; half < 2 && anchor != NULL; half++) {
                compress(r[half][7 - p], planes->anchor_compress[p] + 32 * half, planes->anchor_rank[p] + 2 * half,
                         anchor);
            }
            for (int half = 0; half < 2 && rest != NULL; half++) {
                compress(r[half][7 - p], planes->rest_compress[p] + 32 * half, planes->rest_rank[p] + 2 * half, rest);
            }
            anchor = anchor == NULL ? NULL : anchor + planes->anchor_count[p];
            rest = rest == NULL ? NULL : rest + planes->channels - planes->anchor_count[p];
        }
    }
}

INLINE void unpack_uniform(int bits, const uint8_t *anchor, const uint8_t *rest, int octets, bool upper,
                           uint8_t *codes) {
    for (int octet = 0; octet < octets; octet++, codes += 8 * ROW) {
        for (int half = 0; half < 2; half++) {
            __m256i r[8];
            for (int p = 0; p < (upper ? 4 : 8); p++) {
                if (p < bits) {
                    r[7 - p] = load(anchor + (octet * bits + p) * ROW + 32 * half);
                } else {
                    r[7 - p] = rest == NULL ? _mm256_setzero_si256()
                                            : load(rest + (octet * (8 - bits) + p - bits) * ROW + 32 * half);
                }
            }
            transpose(r, upper);
            for (int t = 0; t < 8; t++) {
                store(codes + t * ROW + 32 * half, r[t]);
            }
        }
    }
}

static void unpack(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int tokens, uint8_t *codes) {
    const int octets = (tokens + 7) / 8;
    if (planes->uniform) {
        unpack_uniform(planes->widths[0], anchor, rest, octets, rest == NULL && planes->widths[0] <= 4, codes);
        return;
    }
    for (int octet = 0; octet < octets; octet++, codes += 8 * ROW) {
        __m256i r[2][8];
        for (int p = 0; p < 8; p++) {
            for (int half = 0; half < 2; half++) {
                __m256i v = expand(anchor, planes->anchor_expand[p] + 32 * half, planes->anchor_rank[p] + 2 * half);
                if (rest != NULL) {
                    v = _mm256_or_si256(
                        v, expand(rest, planes->rest_expand[p] + 32 * half, planes->rest_rank[p] + 2 * half));
                }
                r[half][7 - p] = v;
            }
            anchor += planes->anchor_count[p];
            rest = rest == NULL ? NULL : rest + planes->channels - planes->anchor_count[p];
        }
        for (int half = 0; half < 2; half++) {
            transpose(r[half], false);
            for (int t = 0; t < 8; t++) {
                store(codes + t * ROW + 32 * half, r[half][t]);
            }
        }
    }
}

static bool check(int part, const uint8_t *codes, int tokens, const lynx_planes *planes) {
    (void)part; /* value groups are all alike: their limits go for channels too */
    __m256i least[2] = {load(codes), load(codes + 32)}, most[2] = {least[0], least[1]}, bad = _mm256_setzero_si256();
    for (int t = 1; t < tokens; t++) {
        for (int half = 0; half < 2; half++) {
            const __m256i code = load(codes + t * ROW + 32 * half);
            least[half] = _mm256_min_epu8(least[half], code);
            most[half] = _mm256_max_epu8(most[half], code);
        }
    }
    for (int half = 0; half < 2; half++) {
        const __m256i low = load(planes->low + 32 * half), high = load(planes->high + 32 * half);
        const __m256i out = _mm256_or_si256(_mm256_subs_epu8(low, least[half]), _mm256_subs_epu8(most[half], high));
        bad = _mm256_or_si256(bad, _mm256_and_si256(out, bytes_of((uint32_t)(planes->used >> 32 * half))));
    }
    return _mm256_testz_si256(bad, bad);
}

INLINE bool at_most_4_bits(const uint8_t *codes) {
    return _mm256_testz_si256(_mm256_or_si256(load(codes), load(codes + 32)), _mm256_set1_epi8(15));
}

/* A token's codes that are multiples of 16, by a table of its 16 words. */
INLINE void dequantise_by_table(const uint8_t *codes, int offset, __m256 scale, uint16_t *row) {
    const __m256i nibble = _mm256_set1_epi8(15), half = _mm256_set1_epi32(0x8000);
    const __m256i k = _mm256_sub_epi32(_mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112), _mm256_set1_epi32(offset));
    const __m256 x1 = _mm256_mul_ps(_mm256_cvtepi32_ps(k), scale);
    const __m256 x2 = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(k, _mm256_set1_epi32(128))), scale);
    const __m256i words =
        in_order(_mm256_packus_epi32(_mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x1), half), 16),
                                     _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x2), half), 16)));
    const __m256i first = _mm256_permute4x64_epi64(words, 0x44), second = _mm256_permute4x64_epi64(words, 0xee);
    const __m256i byte = _mm256_set1_epi16(255);
    const __m256i low = _mm256_packus_epi16(_mm256_and_si256(first, byte), _mm256_and_si256(second, byte));
    const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
    for (int i = 0; i < ROW; i += 32) {
        const __m256i index = _mm256_and_si256(_mm256_srli_epi16(in_order(load(codes + i)), 4), nibble);
        const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
        store(row + i, _mm256_unpacklo_epi8(l, h));
        store(row + i + 16, _mm256_unpackhi_epi8(l, h));
    }
}

INLINE void dequantise_as(int part, int dtype, const uint8_t *codes, int tokens, const lynx_params *params,
                          const int16_t *shifts, uint16_t *const *rows) {
    _Alignas(32) float scales[ROW];
    if (part == LYNX_KEY) {
        unpack_order(params->scale, scales);
    }
    for (int t = 0; t < tokens; t++) {
        const __m256 of_token = _mm256_set1_ps(params->scale[t]);
        const __m256i token_offset = _mm256_set1_epi16(params->offset[t]);
        if (part == LYNX_VALUE && dtype == LYNX_BFLOAT16 && at_most_4_bits(codes + t * ROW)) {
            dequantise_by_table(codes + t * ROW, params->offset[t], of_token, rows[t]);
            for (int c = 0; c < ROW && shifts != NULL; c += 16) {
                store(rows[t] + c, shifted(load(rows[t] + c), load(shifts + c)));
            }
            continue;
        }
        for (int i = 0; i < 4; i++) {
            const __m256i k = codes_minus_offset(part, codes + t * ROW, i, params, token_offset);
            const __m256i first = _mm256_srai_epi32(_mm256_unpacklo_epi16(k, k), 16);
            const __m256i second = _mm256_srai_epi32(_mm256_unpackhi_epi16(k, k), 16);
            const __m256 x1 = _mm256_mul_ps(_mm256_cvtepi32_ps(first),
                                            part == LYNX_KEY ? _mm256_load_ps(scales + 16 * i) : of_token);
            const __m256 x2 = _mm256_mul_ps(_mm256_cvtepi32_ps(second),
                                            part == LYNX_KEY ? _mm256_load_ps(scales + 16 * i + 8) : of_token);
            __m256i words;
            if (dtype == LYNX_BFLOAT16) {
                const __m256i half = _mm256_set1_epi32(0x8000);
                words = _mm256_packus_epi32(_mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x1), half), 16),
                                            _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x2), half), 16));
            } else {
                const __m256 top = _mm256_set1_ps(65504.0f), bottom = _mm256_set1_ps(-65504.0f);
                const __m128i w1 = _mm256_cvtps_ph(_mm256_max_ps(_mm256_min_ps(x1, top), bottom), 0);
                const __m128i w2 = _mm256_cvtps_ph(_mm256_max_ps(_mm256_min_ps(x2, top), bottom), 0);
                words = in_order(_mm256_set_m128i(w2, w1));
            }
            store(rows[t] + 16 * i,
                  part == LYNX_KEY || shifts == NULL ? words : shifted(words, load(shifts + 16 * i)));
        }
    }
}

static void dequantise(int part, int dtype, const uint8_t *codes, int tokens, const lynx_params *params,
                       const int16_t *shifts, uint16_t *const *rows) {
    if (dtype == LYNX_BFLOAT16) {
        if (part == LYNX_KEY) {
            dequantise_as(LYNX_KEY, LYNX_BFLOAT16, codes, tokens, params, NULL, rows);
        } else {
            dequantise_as(LYNX_VALUE, LYNX_BFLOAT16, codes, tokens, params, shifts, rows);
        }
    } else {
        dequantise_as(part, LYNX_FLOAT16, codes, tokens, params, NULL, rows);
    }
}

static void stream(uint16_t *to, const uint16_t *rows, size_t words) {
    const size_t head = -((uintptr_t)to / 2) & 31; /* words up to a line of the cache */
    memcpy(to, rows, 2 * head);
    size_t at = head;
    for (; at + 32 <= words; at += 32) {
        _mm256_stream_si256((__m256i *)(to + at), load(rows + at));
        _mm256_stream_si256((__m256i *)(to + at + 16), load(rows + at + 16));
    }
    memcpy(to + at, rows + at, 2 * (words - at));
}

const lynx_kernels lynx_avx2 = {
    .shuffles = shuffles,
    .range = range,
    .survey = survey,
    .survey_sizes = survey_sizes,
    .add_spreads = add_spreads,
    .add_sizes = add_sizes,
    .params = params,
    .are_plain = are_plain,
    .choose = choose,
    .pack_params = pack_params,
    .quantise = quantise,
    .pack = pack,
    .unpack = unpack,
    .check = check,
    .pack_folded = lynx_avx2_pack_folded,
    .unpack_folded = lynx_avx2_unpack_folded,
    .rescale = rescale,
    .rescale_range = rescale_range,
    .dequantise = dequantise,
    .place = lynx_avx2_place,
    .stream = stream,
    .rank = lynx_avx2_rank,
    .unrank = lynx_avx2_unrank,
    .quantise_ahead = quantise_ahead,
    .rank_bound = lynx_avx2_rank_bound,
    .pack_row = lynx_avx2_pack_row,
    .unpack_row = lynx_avx2_unpack_row,
};

AVX2_END
#endif
