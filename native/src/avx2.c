/* AVX2 kernels. The same bytes as scalar.c; the comments there say what is computed, here only how.
 *
 * Words become 32-bit lanes by unpacking with zeros, which leaves them in the order of packing: channels 0-3, 8-11 in
 * one register and 4-7, 12-15 in the next. Per-channel floats are put in that order once a block. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx2.h"

/* --- folding -------------------------------------------------------------------------------------------------- */

INLINE uint64_t byte_mask(uint64_t channels, int w) {
    return _pdep_u64(channels >> 8 * w & 255, 0x0101010101010101ull) * 255;
}

INLINE const uint8_t *load_row(uint64_t mask, const uint8_t *in, uint8_t *row) {
    if (mask == ~0ull) {
        memcpy(row, in, ROW);
        return in + ROW;
    }
    for (int w = 0; w < ROW / 8; w++, row += 8) {
        store64(row, _pdep_u64(load64(in), byte_mask(mask, w)));
        in += _mm_popcnt_u32((uint32_t)(mask >> 8 * w & 255));
    }
    return in;
}

/* May write 8 bytes beyond, where the next row or nothing is. */
INLINE uint8_t *store_row(uint64_t mask, const uint8_t *row, uint8_t *out) {
    if (mask == ~0ull) {
        memcpy(out, row, ROW);
        return out + ROW;
    }
    for (int w = 0; w < ROW / 8; w++, row += 8) {
        store64(out, _pext_u64(load64(row), byte_mask(mask, w)));
        out += _mm_popcnt_u32((uint32_t)(mask >> 8 * w & 255));
    }
    return out;
}

#define FOLD_ROWS
#define FOLD_CENTRES
#define COMPRESS64 _pext_u64
#define EXPAND64 _pdep_u64
#define POPCOUNT64 __builtin_popcountll
#include "fold.h"
#include "ranks.h"
#define ROWS_SURVEY
#define ROWS_RESCALE
#define ROWS_FIELDS
static void fields(const uint8_t *stream, int bits, uint32_t *out) {
    const __m256i ones = _mm256_set1_epi32((1 << bits) - 1), step = _mm256_set1_epi32(8 * bits);
    __m256i at = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    for (int g = 0; g < ROW; g += 8, at = _mm256_add_epi32(at, step)) {
        const __m256i found = _mm256_i32gather_epi32((const int *)stream, _mm256_srli_epi32(at, 3), 1);
        store(out + g, _mm256_and_si256(_mm256_srlv_epi32(found, _mm256_and_si256(at, _mm256_set1_epi32(7))), ones));
    }
}
#include "rows.h"

/* Half of what the centres of a row's channels are made of: by zero points and biases, or by the codes before. */
typedef struct {
    __m256i three, two, one; /* channels that fold so */
    __m256i bias;            /* of value channels, plus 32 */
    bool values, any_two, any_one;
} centres;

INLINE __m256i channels_of(uint64_t mask, int half) {
    return _mm256_set_epi64x((long long)byte_mask(mask, 4 * half + 3), (long long)byte_mask(mask, 4 * half + 2),
                             (long long)byte_mask(mask, 4 * half + 1), (long long)byte_mask(mask, 4 * half));
}

INLINE centres centres_of(const lynx_planes *planes, int half, bool values, bool anchor, bool rest) {
    const uint64_t three = (anchor ? planes->fold[0].three : 0) | (rest ? planes->fold[1].three : 0);
    const uint64_t two = anchor ? planes->fold[0].two : 0, one = rest ? planes->fold[1].two : 0;
    const __m256i bias = _mm256_packs_epi16(load(planes->bias + 32 * half), load(planes->bias + 32 * half + 16));
    return (centres){channels_of(three, half), channels_of(two, half), channels_of(one, half),
                     _mm256_add_epi8(_mm256_permute4x64_epi64(bias, 0xd8), _mm256_set1_epi8(32)), values, two != 0, one != 0};
}

INLINE __m256i saturated(int x) {
    return _mm256_set1_epi8((char)(x < 0 ? 0 : x > 255 ? 255 : x));
}

/* As in avx512.c, for 32 channels. */
INLINE __m256i from_middle(const centres *c, int zero, __m256i before) {
    __m256i centre;
    if (c->values) {
        const __m256i sum = _mm256_adds_epu8(saturated(zero + 12), c->bias);
        centre = _mm256_max_epu8(_mm256_subs_epu8(sum, _mm256_set1_epi8(28)), _mm256_set1_epi8(32));
    } else {
        const __m256i top = _mm256_and_si256(_mm256_srli_epi16(before, 5), _mm256_set1_epi8(7));
        const __m256i half = _mm256_add_epi8(_mm256_avg_epu8(top, _mm256_setzero_si256()), _mm256_set1_epi8(2));
        centre = _mm256_slli_epi16(half, 5);
    }
    return _mm256_xor_si256(_mm256_and_si256(centre, _mm256_set1_epi8((char)0xe0)), _mm256_set1_epi8((char)0x80));
}

/* `table`: 8 entries by the code before, or 32 by zero. */
INLINE __m256i replaced_two(const centres *c, __m256i code, int zero, __m256i before, const uint8_t table[2][32]) {
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(code, 6), _mm256_set1_epi8(3));
    __m256i place;
    if (c->values) {
        const __m256i sum = _mm256_adds_epu8(saturated(zero), c->bias);
        const __m256i least = _mm256_max_epu8(_mm256_subs_epu8(sum, _mm256_set1_epi8(32)), _mm256_set1_epi8(32));
        const __m256i at = _mm256_min_epu8(least, _mm256_set1_epi8((char)223));
        const __m256i row = _mm256_and_si256(_mm256_srli_epi16(at, 3), _mm256_set1_epi8(0x1c));
        const __m256i index = _mm256_or_si256(row, top);
        const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table[1]));
        const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table[1] + 16)));
        place = _mm256_blendv_epi8(_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index), _mm256_slli_epi16(index, 3));
    } else {
        const __m256i half = _mm256_and_si256(_mm256_srli_epi16(before, 5), _mm256_set1_epi8(4));
        const __m256i by_code = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table[0]));
        place = _mm256_shuffle_epi8(by_code, _mm256_or_si256(half, top));
    }
    return _mm256_or_si256(_mm256_and_si256(code, _mm256_set1_epi8(63)), _mm256_slli_epi16(place, 6));
}

INLINE __m256i replaced_one(__m256i code, __m256i channels) {
    const __m256i upper = _mm256_cmpgt_epi8(_mm256_setzero_si256(), code); /* codes of 128 and more */
    return _mm256_xor_si256(code, _mm256_and_si256(_mm256_andnot_si256(upper, channels), _mm256_set1_epi8(0x60)));
}

static const uint8_t PLACES[2][32] = {
    {2, 0, 1, 3, 3, 1, 0, 2},
    {0, 0, 0, 0, 0, 1, 2, 3, 1, 0, 2, 3, 2, 0, 1, 3, 3, 1, 0, 2, 3, 2, 0, 1, 3, 2, 1, 0}};
static const uint8_t TOPS[2][32] = {
    {1, 2, 0, 3, 2, 1, 3, 0},
    {0, 0, 0, 0, 0, 1, 2, 3, 1, 0, 2, 3, 1, 2, 0, 3, 2, 1, 3, 0, 2, 3, 1, 0, 3, 2, 1, 0}};

static void centre(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *centred) {
    for (int half = 0; half < 2; half++) {
        const centres c = centres_of(planes, half, zeros != NULL, true, true);
        __m256i before = _mm256_set1_epi8(FIRST_BEFORE);
        for (int t = 0; t < tokens; t++) {
            const __m256i code = load(codes + t * ROW + 32 * half);
            const int zero = zeros == NULL ? 0 : zeros[t];
            __m256i out = _mm256_sub_epi8(code, _mm256_and_si256(from_middle(&c, zero, before), c.three));
            out = c.any_one ? replaced_one(out, c.one) : out;
            out = c.any_two ? _mm256_blendv_epi8(out, replaced_two(&c, code, zero, before, PLACES), c.two) : out;
            store(centred + t * ROW + 32 * half, out);
            before = code;
        }
    }
    memset(centred + tokens * ROW, 0, (size_t)(-tokens & 7) * ROW);
}

static void uncentre(const lynx_planes *planes, const int16_t *zeros, int tokens, bool anchor, bool rest,
                     uint8_t *codes) {
    for (int half = 0; half < 2; half++) {
        const centres c = centres_of(planes, half, zeros != NULL, anchor, rest);
        __m256i before = _mm256_set1_epi8(FIRST_BEFORE);
        for (int t = 0; t < tokens; t++) {
            const __m256i code = load(codes + t * ROW + 32 * half);
            const int zero = zeros == NULL ? 0 : zeros[t];
            __m256i out = _mm256_add_epi8(code, _mm256_and_si256(from_middle(&c, zero, before), c.three));
            out = c.any_one ? replaced_one(out, c.one) : out;
            before = c.any_two ? _mm256_blendv_epi8(out, replaced_two(&c, code, zero, before, TOPS), c.two) : out;
            store(codes + t * ROW + 32 * half, before);
        }
    }
}


/* Floats of 64 channels in unpacking order. */
INLINE void unpack_order(const float *in, float *out) {
    for (int i = 0; i < ROW; i += 16) {
        for (int j = 0; j < 4; j++) {
            out[i + j] = in[i + j];
            out[i + 4 + j] = in[i + 8 + j];
            out[i + 8 + j] = in[i + 4 + j];
            out[i + 12 + j] = in[i + 12 + j];
        }
    }
}

INLINE __m256i ordered16(__m256i w) {
    return _mm256_xor_si256(w, _mm256_srli_epi16(_mm256_srai_epi16(w, 15), 1));
}

static void survey(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high, uint16_t *signs) {
    __m256i least[4], largest[4], negative[4];
    for (int i = 0; i < 4; i++) {
        least[i] = _mm256_set1_epi16(INT16_MAX);
        largest[i] = _mm256_set1_epi16(INT16_MIN);
        negative[i] = _mm256_setzero_si256();
    }
    for (int t = 0; t < tokens; t++, rows += stride) {
        __builtin_prefetch(rows + 16 * stride);
        __builtin_prefetch(rows + 16 * stride + 32);
        for (int i = 0; i < 4; i++) {
            const __m256i word = load(rows + 16 * i), sign = _mm256_srai_epi16(word, 15);
            const __m256i o = _mm256_xor_si256(word, _mm256_srli_epi16(sign, 1));
            least[i] = _mm256_min_epi16(least[i], o);
            largest[i] = _mm256_max_epi16(largest[i], o);
            negative[i] = _mm256_sub_epi16(negative[i], sign);
        }
    }
    for (int i = 0; i < 4; i++) {
        store(low + 16 * i, least[i]);
        store(high + 16 * i, largest[i]);
        if (signs != NULL) {
            store(signs + 16 * i, negative[i]);
        }
    }
}

/* Words outside the range stay; those that leave it come in again at the other end. */
static void rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff), count = _mm256_set1_epi16((short)(RESCALE_COUNT - 2048 + INT16_MIN));
    const __m256i inner = _mm256_set1_epi16((short)(RESCALE_FIRST + 1024 + INT16_MIN)), nothing = _mm256_setzero_si256();
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

INLINE int16_t least_of(__m256i v) { /* signed */
    const __m128i bias = _mm_set1_epi16(INT16_MIN);
    const __m128i half = _mm_min_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return (int16_t)(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, bias))) ^ INT16_MIN);
}

INLINE int16_t largest_of(__m256i v) {
    return (int16_t)~least_of(_mm256_xor_si256(v, _mm256_set1_epi16(-1)));
}

static void range(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    if (part == LYNX_KEY) {
        __m256i least[4], largest[4];
        for (int i = 0; i < 4; i++) {
            least[i] = largest[i] = ordered16(load(rows + 16 * i));
        }
        for (int t = 1; t < tokens; t++) {
            for (int i = 0; i < 4; i++) {
                const __m256i o = ordered16(load(rows + t * stride + 16 * i));
                least[i] = _mm256_min_epi16(least[i], o);
                largest[i] = _mm256_max_epi16(largest[i], o);
            }
        }
        for (int i = 0; i < 4; i++) {
            store(low + 16 * i, least[i]);
            store(high + 16 * i, largest[i]);
        }
    } else {
        for (int t = 0; t < tokens; t++) {
            __m256i least = ordered16(load(rows + t * stride)), largest = least;
            for (int i = 1; i < 4; i++) {
                const __m256i o = ordered16(load(rows + t * stride + 16 * i));
                least = _mm256_min_epi16(least, o);
                largest = _mm256_max_epi16(largest, o);
            }
            low[t] = least_of(least);
            high[t] = largest_of(largest);
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

/* To the nearest integer, of products that are no ties: inverses are a little larger than 1 / s. */
INLINE void quantise_as(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens,
                        const lynx_params *params, uint8_t *codes) {
    _Alignas(32) float inverses[ROW], offsets[ROW], offset_of[ROW];
    for (int g = 0; g < ROW; g++) {
        offset_of[g] = INTEGERS + (float)params->offset[g];
    }
    for (int g = 0; g < ROW && part == LYNX_KEY; g++) { /* even channels of each 16, then odd ones */
        const int at = g / 16 * 16 + g % 2 * 8 + g % 16 / 2;
        inverses[at] = params->inverse[g];
        offsets[at] = offset_of[g];
    }
    const __m256i low = _mm256_set1_epi16(255);
    for (int t = 0; t < tokens; t++) {
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
            code[i] = _mm256_and_si256(_mm256_blend_epi16(_mm256_castps_si256(x), upper, 0xaa), low);
        }
        store(codes + t * ROW, in_order(_mm256_packus_epi16(code[0], code[1])));
        store(codes + t * ROW + 32, in_order(_mm256_packus_epi16(code[2], code[3])));
    }
}

static void quantise(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens,
                     const lynx_planes *planes, const lynx_params *params, uint8_t *codes) {
    (void)planes; /* codes of finite words are in range without clamping */
    if (dtype == LYNX_BFLOAT16) {
        if (part == LYNX_KEY) {
            quantise_as(LYNX_KEY, LYNX_BFLOAT16, rows, stride, tokens, params, codes);
        } else {
            quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, codes);
        }
    } else {
        quantise_as(part, LYNX_FLOAT16, rows, stride, tokens, params, codes);
    }
}

/* Write the bytes of 32 channels that `compress` selects, 16 at a time; later stores cover what earlier ones overrun. */
INLINE void compress(__m256i v, const uint8_t *shuffle, const uint8_t *rank, uint8_t *out) {
    const __m256i packed = _mm256_shuffle_epi8(v, load(shuffle));
    _mm_storeu_si128((__m128i *)(out + rank[0]), _mm256_castsi256_si128(packed));
    _mm_storeu_si128((__m128i *)(out + rank[1]), _mm256_extracti128_si256(packed, 1));
}

static void shuffles(lynx_planes *planes) {
    const uint64_t order = 0x0706050403020100ull, ones = 0x0101010101010101ull;
    for (int p = 0; p < 8; p++) {
        const uint64_t masks[2] = {planes->in_anchor[p], planes->used & ~planes->in_anchor[p]};
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
    _Alignas(32) uint8_t valid[ROW];
    for (int c = 0; c < ROW; c++) {
        valid[c] = c < planes->channels ? 255 : 0;
    }
    __m256i bad = _mm256_setzero_si256();
    for (int t = 0; t < tokens; t++) {
        for (int half = 0; half < ROW; half += 32) {
            const __m256i code = load(codes + t * ROW + half);
            const __m256i low = part == LYNX_KEY ? load(planes->low + half) : _mm256_set1_epi8((char)planes->low[t]);
            const __m256i high = part == LYNX_KEY ? load(planes->high + half) : _mm256_set1_epi8((char)planes->high[t]);
            const __m256i out = _mm256_or_si256(_mm256_subs_epu8(low, code), _mm256_subs_epu8(code, high));
            bad = _mm256_or_si256(bad, _mm256_and_si256(out, load(valid + half)));
        }
    }
    return _mm256_testz_si256(bad, bad);
}

INLINE __m256i codes_minus_offset(int part, const uint8_t *codes, int i, const lynx_params *params,
                                  __m256i token_offset) {
    const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + 16 * i)));
    return _mm256_sub_epi16(code, part == LYNX_KEY ? load(params->offset + 16 * i) : token_offset);
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

/* --- level 2 ---------------------------------------------------------------------------------------------------- */

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
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 1, 1, 3, 3, 3, 3, 7, 7, 7, 7, 7, 7, 7, 7));
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 15, 31, 31, 63, 63, 63, 63, 127, 127, 127, 127, 127, 127, 127, 127));
    return _mm256_max_epu8(_mm256_shuffle_epi8(low, _mm256_and_si256(n, nibble)),
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

INLINE uint32_t bits_of(__m256i bytes) {
    return (uint32_t)_mm256_movemask_epi8(bytes);
}

/* One bit per 16-bit lane of two registers of 0 or -1. */
INLINE uint32_t bits_of16(__m256i first, __m256i second) {
    return bits_of(in_order(_mm256_packs_epi16(first, second)));
}

/* Bytes of 0 or -1 from 32 bits. */
INLINE __m256i bytes_of(uint32_t bits) {
    const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
                                          3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), pick);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
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
    for (int i = 0; i < 4; i += 2) { /* two lanes at once where they fit, which is nearly always */
        const uint64_t first = _pext_u64(values[i], masks[i]), second = _pext_u64(values[i + 1], masks[i + 1]);
        const uint32_t bits = (uint32_t)_mm_popcnt_u64(masks[i]), more = (uint32_t)_mm_popcnt_u64(masks[i + 1]);
        if (__builtin_expect(bits + more <= 56, 1)) {
            put(out, first | second << bits, bits + more);
        } else {
            put(out, first, bits);
            put(out, second, more);
        }
    }
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

/* Four at once without a branch; rows with more are rare. */
INLINE void add_zeros(zero_list *list, uint64_t zeros, int token) {
    uint16_t *at = list->at + list->count;
    list->count += (uint32_t)_mm_popcnt_u64(zeros);
    do {
        for (int i = 0; i < 4; i++, zeros &= zeros - 1) {
            *at++ = (uint16_t)(ROW * token + (int)(_tzcnt_u64(zeros) & 63));
        }
    } while (__builtin_expect(zeros != 0, 0));
}

/* What rank and unrank need of 32 channels of a row: integers and cells. */
typedef struct {
    __m256i k[2], low[2], count[2];
    uint32_t zeros;
} half_row;

/* Of scales that encoders choose: their products with twice LIFT and one more fit in binary32 (avx512_ranks.c). Of 16 channels each,
 * first of even ones, then of odd ones; or, of values, of tokens. */
typedef struct {
    _Alignas(32) float scale[ROW], lower[ROW], upper[ROW];
    bool tame;
} cell_scales;

static void start_cells(int part, int dtype, const lynx_params *params, cell_scales *l) {
    bool tame = dtype == LYNX_BFLOAT16;
    for (int g = 0; g < ROW; g++) {
        tame &= params->s[g] <= MOST_PLACED && params->s[g] % SCALE_UNIT == 0;
    }
    l->tame = tame;
    if (!tame) {
        unpack_order(params->scale, l->scale);
        return;
    }
    for (int g = 0; g < ROW; g++) {
        const int at = part == LYNX_KEY ? g / 16 * 16 + g % 2 * 8 + g % 16 / 2 : g;
        const float half = params->scale[g] * 0.5f;
        const int twice = -2 * (LIFT + params->offset[g]);
        l->scale[at] = params->scale[g];
        l->lower[at] = (float)(twice - 1) * half;
        l->upper[at] = (float)(twice + 1) * half;
    }
}

/* Ends of the cells of 16 channels, least in magnitude first, with the integers' signs, and their counts; 1 in zero cells. */
INLINE __m256i tame_cells(int part, const uint8_t *codes, int token, int at, const cell_scales *l, __m256i *low, __m256i *count) {
    const __m256i magic = _mm256_set1_epi32(0x47000000);
    const __m256i code = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes + at))), 8);
    const __m256i lifted[2] = {_mm256_blend_epi16(code, magic, 0xaa), _mm256_or_si256(_mm256_srli_epi32(code, 16), magic)};
    __m256i lower[2], upper[2];
    for (int i = 0; i < 2; i++) {
        const bool key = part == LYNX_KEY;
        const __m256 scale = key ? _mm256_load_ps(l->scale + at + 8 * i) : _mm256_set1_ps(l->scale[token]);
        const __m256 less = key ? _mm256_load_ps(l->lower + at + 8 * i) : _mm256_set1_ps(l->lower[token]);
        const __m256 more = key ? _mm256_load_ps(l->upper + at + 8 * i) : _mm256_set1_ps(l->upper[token]);
        lower[i] = number(lifted[i], scale, less, 0xffff);
        upper[i] = number(lifted[i], scale, more, 0xffff);
    }
    const __m256i first = _mm256_blend_epi16(_mm256_srli_epi32(lower[0], 16), lower[1], 0xaa);
    const __m256i second = _mm256_blend_epi16(_mm256_srli_epi32(upper[0], 16), upper[1], 0xaa);
    const __m256i n = _mm256_abs_epi16(_mm256_sub_epi16(second, first)), zero = _mm256_cmpeq_epi16(n, _mm256_set1_epi16(INT16_MIN));
    *low = _mm256_min_epu16(first, second);
    *count = _mm256_blendv_epi8(n, _mm256_set1_epi16(1), zero);
    return zero;
}

/* `low` has the signs of tame cells; of others those of k count. */
INLINE half_row half_row_of(int part, int dtype, bool tame, const uint8_t *codes, int token, int half, const cell_scales *l,
                            const lynx_params *params) {
    half_row row;
    __m256i zero[2];
    for (int i = 0; i < 2; i++) {
        const int at = 2 * half + i;
        if (tame) {
            zero[i] = tame_cells(part, codes + token * ROW, token, 16 * at, l, &row.low[i], &row.count[i]);
            continue;
        }
        const __m256 of_token = _mm256_set1_ps(params->scale[token]);
        row.k[i] = codes_minus_offset(part, codes + token * ROW, at, params, _mm256_set1_epi16(params->offset[token]));
        cells(dtype, row.k[i], part == LYNX_KEY ? _mm256_load_ps(l->scale + 16 * at) : of_token,
              part == LYNX_KEY ? _mm256_load_ps(l->scale + 16 * at + 8) : of_token, &row.low[i], &row.count[i], &zero[i]);
    }
    row.zeros = bits_of16(zero[0], zero[1]);
    return row;
}

/* All ones in the channels that a block has. */
INLINE __m256i kept_channels(int channels, int half) {
    const int n = channels - 32 * half;
    return bytes_of(n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1);
}

INLINE void rank_as(int part, int dtype, bool tame, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                    int channels, const lynx_params *params, const cell_scales *scales, lynx_streams *streams) {
    const __m256i keep[2] = {kept_channels(channels, 0), kept_channels(channels, 1)};
    const __m256i magnitude_bits = _mm256_set1_epi16(0x7fff);
    zero_list all_zeros;
    all_zeros.count = 0;
    bit_writer a = {streams->a, 0, 0}, b = {streams->b, 0, 0};
    for (int t = 0; t < tokens; t++) {
        const uint16_t *row = rows + t * stride;
        uint64_t zeros = 0;
        for (int half = 0; half < 2; half++) {
            const half_row in = half_row_of(part, dtype, tame, codes, t, half, scales, params);
            zeros |= (uint64_t)(in.zeros & bits_of(keep[half])) << 32 * half;
            __m256i r[2];
            for (int i = 0; i < 2; i++) {
                const __m256i word = load(row + 32 * half + 16 * i);
                r[i] = _mm256_sub_epi16(tame ? word : _mm256_and_si256(word, magnitude_bits), in.low[i]);
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
        add_zeros(&all_zeros, zeros, t);
    }
    streams->a_bits = position(&a, streams->a);
    streams->b_bits = position(&b, streams->b);
    rank_zeros(part, dtype, &all_zeros, rows, stride, params, streams);
}

INLINE int unrank_as(int part, int dtype, bool tame, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                     const cell_scales *scales, lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    const __m256i keep[2] = {kept_channels(channels, 0), kept_channels(channels, 1)};
    zero_list all_zeros;
    all_zeros.count = 0;
    uint32_t a_bits = 0, b_bits = 0;
    __m256i empty = _mm256_setzero_si256();
    for (int t = 0; t < tokens; t++) {
        uint16_t *row = rows[t];
        uint64_t zeros = 0;
        for (int half = 0; half < 2; half++) {
            const half_row in = half_row_of(part, dtype, tame, codes, t, half, scales, params);
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
                __m256i word = _mm256_add_epi16(in.low[i], ranks[i]);
                if (!tame) {
                    word = _mm256_or_si256(word, _mm256_and_si256(in.k[i], _mm256_set1_epi16(INT16_MIN)));
                }
                const __m256i shift = shifts == NULL ? _mm256_setzero_si256() : load(shifts + 32 * half + 16 * i);
                store(row + 32 * half + 16 * i, _mm256_add_epi16(word, shift));
            }
        }
        add_zeros(&all_zeros, zeros, t);
    }
    streams->a_bits = a_bits;
    streams->b_bits = b_bits;
    const bool good = unrank_zeros(part, dtype, &all_zeros, shifts, rows, params, streams);
    return good && _mm256_testz_si256(empty, empty) ? LYNX_OK : LYNX_ERR_RANK;
}

static void rank(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                 int channels, const lynx_params *params, lynx_streams *streams) {
    cell_scales l;
    start_cells(part, dtype, params, &l);
    if (dtype == LYNX_FLOAT16) {
        rank_as(part, LYNX_FLOAT16, false, rows, stride, codes, tokens, channels, params, &l, streams);
    } else if (!l.tame) {
        rank_as(part, LYNX_BFLOAT16, false, rows, stride, codes, tokens, channels, params, &l, streams);
    } else if (part == LYNX_KEY) {
        rank_as(LYNX_KEY, LYNX_BFLOAT16, true, rows, stride, codes, tokens, channels, params, &l, streams);
    } else {
        rank_as(LYNX_VALUE, LYNX_BFLOAT16, true, rows, stride, codes, tokens, channels, params, &l, streams);
    }
}

static int unrank(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                  lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    cell_scales l;
    start_cells(part, dtype, params, &l);
    if (dtype == LYNX_FLOAT16) {
        return unrank_as(part, LYNX_FLOAT16, false, codes, tokens, channels, params, &l, streams, NULL, rows);
    }
    if (!l.tame) {
        return unrank_as(part, LYNX_BFLOAT16, false, codes, tokens, channels, params, &l, streams, shifts, rows);
    }
    if (part == LYNX_KEY) {
        return unrank_as(LYNX_KEY, LYNX_BFLOAT16, true, codes, tokens, channels, params, &l, streams, NULL, rows);
    }
    return unrank_as(LYNX_VALUE, LYNX_BFLOAT16, true, codes, tokens, channels, params, &l, streams, shifts, rows);
}

/* ceil(log2) of the largest cell of an integer of magnitude a: at most 512 / (2a + 1) + 1 words, 214 for a = 1. A zero
 * cell takes at most 12 + 16 bits. */
static uint64_t rank_bound(int part, const uint8_t *codes, int tokens, int channels, const lynx_params *params) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i below_16 =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(28, 8, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 5, 5, 5, 5));
    const __m256i from_16 = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1));
    _Alignas(32) uint8_t offsets[ROW], valid[ROW];
    for (int g = 0; g < ROW; g++) { /* an offset outside a byte makes integers larger than they count here */
        const int offset = params->offset[g];
        offsets[g] = (uint8_t)(offset < 0 ? 0 : offset > 255 ? 255 : offset);
        valid[g] = g < channels ? 255 : 0;
    }
    __m256i sum = _mm256_setzero_si256();
    for (int t = 0; t < tokens; t++) {
        for (int half = 0; half < ROW; half += 32) {
            const __m256i code = load(codes + t * ROW + half);
            const __m256i offset = part == LYNX_KEY ? load(offsets + half) : _mm256_set1_epi8((char)offsets[t]);
            const __m256i a = _mm256_or_si256(_mm256_subs_epu8(code, offset), _mm256_subs_epu8(offset, code));
            const __m256i low = _mm256_shuffle_epi8(below_16, _mm256_and_si256(a, nibble));
            const __m256i high = _mm256_shuffle_epi8(from_16, _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble));
            const __m256i bits = _mm256_and_si256(_mm256_min_epu8(low, high), load(valid + half));
            sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bits, _mm256_setzero_si256()));
        }
    }
    _Alignas(32) uint64_t parts[4];
    store(parts, sum);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

/* --- bitplane --------------------------------------------------------------------------------------------------- */

/* 32 words as one register per byte of a word, least significant first. */
INLINE void split(int word_bytes, const uint8_t *words, __m256i *bytes) {
    if (word_bytes == 1) {
        bytes[0] = load(words);
    } else if (word_bytes == 2) {
        const __m256i a = load(words), b = load(words + 32), low = _mm256_set1_epi16(255);
        bytes[0] = in_order(_mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low)));
        bytes[1] = in_order(_mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
    } else {
        const __m256i gather = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i x[4];
        for (int i = 0; i < 4; i++) {
            x[i] = _mm256_shuffle_epi8(load(words + 32 * i), gather);
        }
        const __m256i low1 = _mm256_unpacklo_epi32(x[0], x[1]), low2 = _mm256_unpacklo_epi32(x[2], x[3]);
        const __m256i high1 = _mm256_unpackhi_epi32(x[0], x[1]), high2 = _mm256_unpackhi_epi32(x[2], x[3]);
        bytes[0] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(low1, low2), order);
        bytes[1] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(low1, low2), order);
        bytes[2] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(high1, high2), order);
        bytes[3] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(high1, high2), order);
    }
}

INLINE void join(int word_bytes, const __m256i *bytes, uint8_t *words) {
    if (word_bytes == 1) {
        store(words, bytes[0]);
        return;
    }
    const __m256i first = in_order(bytes[0]), second = in_order(bytes[1]);
    const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
    if (word_bytes == 2) {
        store(words, low);
        store(words + 32, high);
        return;
    }
    const __m256i third = in_order(bytes[2]), fourth = in_order(bytes[3]);
    const __m256i halves[2][2] = {{low, _mm256_unpacklo_epi8(third, fourth)}, {high, _mm256_unpackhi_epi8(third, fourth)}};
    for (int i = 0; i < 2; i++) {
        const __m256i a = _mm256_unpacklo_epi16(halves[i][0], halves[i][1]);
        const __m256i b = _mm256_unpackhi_epi16(halves[i][0], halves[i][1]);
        store(words + 64 * i, _mm256_permute2x128_si256(a, b, 0x20));
        store(words + 64 * i + 32, _mm256_permute2x128_si256(a, b, 0x31));
    }
}

INLINE void pack_row_as(int word_bytes, const uint8_t *words, size_t count, uint8_t *const *planes) {
    bool wanted[4] = {false};
    for (int p = 0; p < 8 * word_bytes; p++) {
        wanted[word_bytes - 1 - p / 8] |= planes[p] != NULL;
    }
    for (size_t i = 0; i < count; i += 32) {
        __m256i bytes[4];
        split(word_bytes, words + i * (size_t)word_bytes, bytes);
        for (int byte = 0; byte < word_bytes; byte++) {
            if (!wanted[byte]) {
                continue;
            }
            __m256i v = bytes[byte];
            const int top = 8 * (word_bytes - 1 - byte); /* the plane of this byte's highest bit */
            for (int p = top; p < top + 8; p++) {
                if (planes[p] != NULL) {
                    const uint32_t bits = bits_of(v);
                    memcpy(planes[p] + i / 8, &bits, sizeof bits);
                }
                v = _mm256_add_epi8(v, v);
            }
        }
    }
}

INLINE void unpack_row_as(int word_bytes, const uint8_t *const *planes, size_t count, uint8_t *words) {
    for (size_t i = 0; i < count; i += 32) {
        __m256i bytes[4];
        for (int byte = 0; byte < word_bytes; byte++) {
            __m256i v = _mm256_setzero_si256();
            const int top = 8 * (word_bytes - 1 - byte);
            for (int p = top; p < top + 8; p++) {
                v = _mm256_add_epi8(v, v);
                if (planes[p] != NULL) {
                    uint32_t bits;
                    memcpy(&bits, planes[p] + i / 8, sizeof bits);
                    v = _mm256_sub_epi8(v, bytes_of(bits));
                }
            }
            bytes[byte] = v;
        }
        join(word_bytes, bytes, words + i * (size_t)word_bytes);
    }
}

static void pack_row(int word_bytes, const void *words, size_t count, uint8_t *const *planes) {
    const size_t whole = count / 32 * 32;
    switch (word_bytes) {
    case 1:
        pack_row_as(1, words, whole, planes);
        break;
    case 2:
        pack_row_as(2, words, whole, planes);
        break;
    default:
        pack_row_as(4, words, whole, planes);
    }
    if (whole < count) {
        uint8_t *rest[32] = {NULL};
        for (int p = 0; p < 8 * word_bytes; p++) {
            rest[p] = planes[p] == NULL ? NULL : planes[p] + whole / 8;
        }
        lynx_scalar.pack_row(word_bytes, (const uint8_t *)words + whole * (size_t)word_bytes, count - whole, rest);
    }
}

static void unpack_row(int word_bytes, const uint8_t *const *planes, size_t count, void *words) {
    const size_t whole = count / 32 * 32;
    switch (word_bytes) {
    case 1:
        unpack_row_as(1, planes, whole, words);
        break;
    case 2:
        unpack_row_as(2, planes, whole, words);
        break;
    default:
        unpack_row_as(4, planes, whole, words);
    }
    if (whole < count) {
        const uint8_t *rest[32] = {NULL};
        for (int p = 0; p < 8 * word_bytes; p++) {
            rest[p] = planes[p] == NULL ? NULL : planes[p] + whole / 8;
        }
        lynx_scalar.unpack_row(word_bytes, rest, count - whole, (uint8_t *)words + whole * (size_t)word_bytes);
    }
}

const lynx_kernels lynx_avx2 = {
    .shuffles = shuffles,
    .range = range,
    .survey = survey,
    .add_spreads = add_spreads,
    .params = params,
    .are_plain = are_plain,
    .choose = choose,
    .pack_params = pack_params,
    .quantise = quantise,
    .pack = pack,
    .unpack = unpack,
    .check = check,
    .centre = centre,
    .uncentre = uncentre,
    .fold = fold,
    .unfold = unfold,
    .rescale = rescale,
    .dequantise = dequantise,
    .place = lynx_avx2_place,
    .stream = stream,
    .rank = rank,
    .unrank = unrank,
    .rank_bound = rank_bound,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};

AVX2_END
#endif
