/* Folding for AVX2: codes around their centres, and the prefix code of their top planes. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx2.h"

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

void lynx_avx2_centre(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *centred) {
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

void lynx_avx2_uncentre(const lynx_planes *planes, const int16_t *zeros, int tokens, bool anchor, bool rest,
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

uint32_t lynx_avx2_fold(const lynx_fold *how, const uint8_t *flat, int tokens, uint8_t *folded) {
    return fold(how, flat, tokens, folded);
}

bool lynx_avx2_unfold(const lynx_fold *how, const uint8_t *folded, uint32_t entry, int tokens, uint8_t *flat) {
    return unfold(how, folded, entry, tokens, flat);
}

AVX2_END
#endif
