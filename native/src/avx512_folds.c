/* Folding for AVX-512, from codes to a section's bytes and back; spec/codec-hq.md, "Folding". */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"

#define FOLD_AT_ONCE
#define COMPRESS64 _pext_u64
#define EXPAND64 _pdep_u64
#define POPCOUNT64 __builtin_popcountll
#include "fold.h"
#include "selected.h"

/* --- centres -------------------------------------------------------------------------------------------------- */

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

/* --- sections ------------------------------------------------------------------------------------------------- */

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

int lynx_avx512_unpack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *anchor, uint32_t anchor_entry,
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
                           bit_writer streams[2], uint8_t *out) {
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
    bit_writer high_bits = streams[0], low_bits = streams[1];
    for (int w = 0; w < 8; w++) {
        put_word(&high_bits, far[w], moved[w]);
        put_word(&low_bits, farther[w], far[w]);
    }
    streams[0] = high_bits;
    streams[1] = low_bits;
    const __m512i row[3] = {fold->two_row == 0 ? _mm512_mask_mov_epi8(planes[0], fold->two, d1) : planes[0], d1, planes[2]};
    for (int p = 0; p < 8; p++) {
        const __mmask64 mask = p < 3 ? fold->folded_rows[p] : rows[p];
        store(out, _mm512_maskz_compress_epi8(mask, p < 3 ? row[p] : planes[p])); /* up to 64 bytes beyond */
        out += _mm_popcnt_u64(mask);
    }
    return out;
}

void lynx_avx512_pack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens,
                        uint8_t *anchor, uint8_t *rest, uint32_t entries[2]) {
    const uint64_t *const masks = planes->in_anchor, used = planes->used;
    __mmask64 rows[2][8];
    for (int p = 0; p < 8; p++) {
        rows[0][p] = masks[p];
        rows[1][p] = used & ~masks[p];
    }
    uint8_t *out[2] = {anchor, rest};
    uint8_t bytes[2][2][FAR_BYTES];
    bit_writer streams[2][2];
    for (int i = 0; i < 4; i++) {
        streams[i / 2][i % 2] = (bit_writer){bytes[i / 2][i % 2], 0, 0};
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
                out[i] = fold_octet(&planes->fold[i], rows[i], in_order, valid_tokens(tokens - first), streams[i], out[i]);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        const uint32_t bits[2] = {position(&streams[i][0], bytes[i][0]), position(&streams[i][1], bytes[i][1])};
        entries[i] = out[i] == NULL ? FLAT : write_streams(bytes[i], bits, out[i]);
    }
}

AVX512_END
#endif
