/* Folding for AVX2, from codes to a section's bytes and back; spec/codec-hq.md, "Folding". Both sections at once: a channel folds in
 * one of them.
 *
 * Distances from centres are made in two steps. What depends on the token before, or on where zero lies, is taken away from
 * codes; what is left is a matter of planes, of 8 tokens at a time: a sign is plane 0 as it is, of channels of 3 bits and more
 * the complement (so that a centre can be added without another constant), and the two bits of 2-bit key channels are one
 * permutation, its mirror image an exclusive or. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx2.h"

#define COMPRESS64 _pext_u64
#define EXPAND64 _pdep_u64
#define POPCOUNT64 __builtin_popcountll
#define FOLD_AT_ONCE
#include "fold.h"
#include "ranks.h"
#include "selected.h"

enum { KEYS, VALUES, NARROW_VALUES }; /* values of 2 bits are narrow */

INLINE int kind_of(const lynx_planes *planes, const int16_t *zeros) {
    return zeros == NULL ? KEYS : planes->fold[0].two == 0 ? VALUES : NARROW_VALUES;
}

/* --- centres -------------------------------------------------------------------------------------------------- */

/* Half of a row's channels that fold, as bytes of 255. */
typedef struct {
    __m256i three, two, one; /* 3 bits and more, or 0; 2; 1 */
    __m256i bias;            /* of value channels, plus 32 */
} half_folds;

INLINE __m256i channels_of(uint64_t mask, int half) {
    return bytes_of((uint32_t)(mask >> 32 * half));
}

INLINE half_folds folds_of(const lynx_planes *planes, int half, bool anchor, bool rest) {
    const lynx_fold *fold = planes->fold;
    const uint64_t first = anchor ? fold[0].three | fold[0].two : 0, second = rest ? fold[1].three | fold[1].two : 0;
    const __m256i bias = _mm256_packs_epi16(load(planes->bias + 32 * half), load(planes->bias + 32 * half + 16));
    return (half_folds){.three = channels_of((fold[0].three & first) | (fold[1].three & second), half),
                        .two = channels_of(fold[0].two & first, half),
                        .one = channels_of(fold[1].two & second, half),
                        .bias = _mm256_add_epi8(in_order(bias), _mm256_set1_epi8(32))};
}

/* Where zero lies for each token, in bytes, and for centres 12 further: where they saturate, what is made of them does too. */
INLINE void saturate(int kind, const int16_t *zeros, uint8_t *out) {
    const __m256i more = _mm256_set1_epi16(kind == VALUES ? 12 : 0);
    for (int t = 0; t < ROW && kind != KEYS; t += 32) {
        const __m256i a = _mm256_adds_epi16(load(zeros + t), more), b = _mm256_adds_epi16(load(zeros + t + 16), more);
        store(out + t, in_order(_mm256_packus_epi16(a, b)));
    }
}

/* Centres * 32, in channels that fold so. */
INLINE __m256i centre_of(int kind, const half_folds *f, uint8_t zero, __m256i before) {
    const __m256i top = _mm256_and_si256(f->three, _mm256_set1_epi8((char)0xe0));
    if (kind == KEYS) { /* half way from the middle to the code before: (before / 32 + 1) / 2 + 2 */
        return _mm256_and_si256(_mm256_avg_epu8(before, _mm256_set1_epi8((char)159)), top);
    }
    const __m256i sum = _mm256_subs_epu8(_mm256_adds_epu8(_mm256_set1_epi8((char)zero), f->bias), _mm256_set1_epi8(28));
    return _mm256_and_si256(_mm256_max_epu8(sum, _mm256_set1_epi8(32)), top);
}

/* Of 2-bit key channels: both bits where the code before is of the upper half. */
INLINE __m256i mirror_of(const half_folds *f, __m256i before) {
    const __m256i both = _mm256_and_si256(f->two, _mm256_set1_epi8((char)0xc0));
    return _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), before), both);
}

/* Values' codes with their two top bits replaced by what a table has for them and for zero: in [0, 64), [64, 96), [96, 128), and
 * mirrored, from row 1 on. */
INLINE __m256i replaced_two(const half_folds *f, __m256i code, uint8_t zero, const uint8_t table[32]) {
    const __m256i sum = _mm256_adds_epu8(_mm256_set1_epi8((char)zero), f->bias);
    const __m256i least = _mm256_max_epu8(_mm256_subs_epu8(sum, _mm256_set1_epi8(32)), _mm256_set1_epi8(32));
    const __m256i at = _mm256_min_epu8(least, _mm256_set1_epi8((char)223));
    const __m256i row = _mm256_and_si256(_mm256_srli_epi16(at, 3), _mm256_set1_epi8(0x1c));
    const __m256i index = _mm256_or_si256(row, _mm256_and_si256(_mm256_srli_epi16(code, 6), _mm256_set1_epi8(3)));
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16)));
    const __m256i place = _mm256_blendv_epi8(_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index), _mm256_slli_epi16(index, 3));
    const __m256i replaced = _mm256_or_si256(_mm256_and_si256(code, _mm256_set1_epi8(63)), _mm256_slli_epi16(place, 6));
    return _mm256_blendv_epi8(code, replaced, f->two);
}

INLINE __m256i centred(int kind, const half_folds *f, __m256i code, uint8_t zero, __m256i before) {
    static const uint8_t PLACES[32] = {0, 0, 0, 0, 0, 1, 2, 3, 1, 0, 2, 3, 2, 0, 1, 3, 3, 1, 0, 2, 3, 2, 0, 1, 3, 2, 1, 0};
    if (kind == NARROW_VALUES) {
        return replaced_two(f, code, zero, PLACES);
    }
    const __m256i out = _mm256_sub_epi8(code, centre_of(kind, f, zero, before));
    return kind == KEYS ? _mm256_xor_si256(out, mirror_of(f, before)) : out;
}

INLINE __m256i uncentred(int kind, const half_folds *f, __m256i code, uint8_t zero, __m256i before) {
    static const uint8_t TOPS[32] = {0, 0, 0, 0, 0, 1, 2, 3, 1, 0, 2, 3, 1, 2, 0, 3, 2, 1, 3, 0, 2, 3, 1, 0, 3, 2, 1, 0};
    if (kind == NARROW_VALUES) {
        return replaced_two(f, code, zero, TOPS);
    }
    const __m256i out = _mm256_add_epi8(code, centre_of(kind, f, zero, before));
    return kind == KEYS ? _mm256_xor_si256(out, mirror_of(f, before)) : out;
}

/* --- rows of sections ----------------------------------------------------------------------------------------- */

/* A plane's bytes in each octet of a section. */
typedef struct {
    const uint8_t *expand, *compress, *rank; /* of lynx_planes; not used where all channels or none have the plane */
    int at, count;
} plane_row;

/* `folded`: of plane 1 the place of D1, and of plane 2 what does not fold. Returns the bytes of an octet. */
INLINE int rows_of(const lynx_planes *planes, int section, bool folded, plane_row rows[8]) {
    int at = 0;
    for (int p = 0; p < 8; p++) {
        const bool anchor = section == ANCHOR_SECTION;
        int which = p; /* plane whose channels these are: D1 is there for those that have plane 2 in the anchor */
        which = folded && anchor && p == 1 ? 2 : which;
        which = folded && !anchor && p == 2 ? FOLDED_REST : which;
        const int count = folded && anchor && p == 2     ? 0
                          : anchor                       ? planes->anchor_count[which]
                          : which == FOLDED_REST         ? planes->anchor_count[1] - planes->anchor_count[2]
                                                         : planes->channels - planes->anchor_count[which];
        rows[p] = anchor ? (plane_row){planes->anchor_expand[which], planes->anchor_compress[which], planes->anchor_rank[which], at, count}
                         : (plane_row){planes->rest_expand[which], planes->rest_compress[which], planes->rest_rank[which], at, count};
        at += count;
    }
    return at;
}

INLINE __m256i read_row(const plane_row *row, const uint8_t *octet, int half) {
    if (row->count == 0) {
        return _mm256_setzero_si256();
    }
    const uint8_t *in = octet + row->at;
    return row->count == ROW ? load(in + 32 * half) : expand(in, row->expand + 32 * half, row->rank + 2 * half);
}

/* In ascending order: what is written too much will be covered. */
INLINE void write_row(const plane_row *row, uint8_t *octet, const __m256i halves[2]) {
    uint8_t *out = octet + row->at;
    for (int half = 0; half < 2 && row->count != 0; half++) {
        if (row->count == ROW) {
            store(out + 32 * half, halves[half]);
        } else {
            compress(halves[half], row->compress + 32 * half, row->rank + 2 * half, out);
        }
    }
}

INLINE __m256i valid_tokens(int tokens) {
    return _mm256_set1_epi8((char)((1u << (tokens < 8 ? tokens : 8)) - 1));
}

/* --- decoder -------------------------------------------------------------------------------------------------- */

#define WORDS (BLOCK_VALUES / 64) /* of 8 channels, 8 tokens each */

typedef struct {
    const uint8_t *at; /* of the next octet */
    bool folded;
    int size; /* of an octet */
    plane_row rows[8];
    _Alignas(32) uint64_t moved[WORDS], far[WORDS], farther[WORDS]; /* D1; D2, D3 where their bits belong; if folded */
} section_reader;

static bool start_section(section_reader *reader, const lynx_planes *planes, int section, const uint8_t *in, uint32_t entry,
                          int tokens) {
    const lynx_fold *fold = &planes->fold[section];
    reader->at = in;
    reader->folded = entry != FLAT;
    reader->size = rows_of(planes, section, reader->folded, reader->rows);
    if (!reader->folded) {
        return true;
    }
    const int octets = (tokens + 7) / 8;
    for (int half = 0; half < 2; half++) {
        const __m256i two = channels_of(section == ANCHOR_SECTION ? fold->two : 0, half);
        const __m256i rest = channels_of((fold->three | fold->two), half);
        for (int o = 0; o < octets; o++, in += reader->size) {
            const __m256i first = read_row(&reader->rows[0], in, half), second = read_row(&reader->rows[1], in, half);
            const __m256i moved = _mm256_or_si256(_mm256_and_si256(first, two), _mm256_and_si256(second, rest));
            store(reader->moved + 8 * o + 4 * half, _mm256_and_si256(moved, valid_tokens(tokens - 8 * o)));
        }
        in = reader->at;
    }
    const int words = 8 * octets;
    uint32_t count = 0;
    for (int w = 0; w < words; w++) {
        count += (uint32_t)_mm_popcnt_u64(reader->moved[w]);
    }
    uint8_t unpaired[2][FAR_BYTES];
    const uint8_t *streams[2];
    if (!read_streams(in + octets * reader->size, entry, count, unpaired, streams)) {
        return false;
    }
    uint32_t at = 0, at_farther = 0;
    for (int w = 0; w < words; w++) {
        const uint64_t moved = reader->moved[w];
        const uint32_t near = (uint32_t)_mm_popcnt_u64(moved);
        const uint64_t far = _pdep_u64(get_few_bits64(streams[0], at, near), moved);
        const uint32_t more = (uint32_t)_mm_popcnt_u64(far);
        reader->far[w] = far;
        reader->farther[w] = _pdep_u64(get_few_bits64(streams[1], at_farther, more), far);
        at += near;
        at_farther += more;
    }
    return true;
}

/* The first three planes of half an octet from what a section or both have of them, and their distances. */
INLINE void unfold_planes(int kind, const half_folds *f, const section_reader *readers, int sections, int octet, int half,
                          __m256i planes[3]) {
    __m256i moved = _mm256_setzero_si256(), far = moved, farther = moved;
    for (int i = 0; i < sections; i++) {
        if (readers[i].folded) {
            const int at = 8 * octet + 4 * half;
            moved = _mm256_or_si256(moved, load(readers[i].moved + at));
            far = _mm256_or_si256(far, load(readers[i].far + at));
            farther = _mm256_or_si256(farther, load(readers[i].farther + at));
        }
    }
    const __m256i near = _mm256_or_si256(_mm256_andnot_si256(far, moved), farther); /* the lower bit of a distance */
    if (kind == NARROW_VALUES) {
        planes[0] = far;
        planes[1] = near;
        return;
    }
    const __m256i less = _mm256_andnot_si256(planes[0], _mm256_or_si256(f->three, f->one));
    const __m256i high = _mm256_xor_si256(far, less), low = _mm256_xor_si256(near, less);
    planes[0] = _mm256_xor_si256(_mm256_andnot_si256(f->two, planes[0]), f->three);
    planes[0] = _mm256_or_si256(planes[0], _mm256_and_si256(low, f->two));
    planes[1] = _mm256_or_si256(planes[1], _mm256_xor_si256(high, _mm256_andnot_si256(low, f->two)));
    planes[2] = _mm256_or_si256(planes[2], _mm256_andnot_si256(f->two, low));
}

/* `upper`: there are no planes but the first four. */
INLINE void unpack_as(int kind, bool upper, const lynx_planes *planes, const int16_t *zeros, section_reader *readers, int sections,
                      int tokens, uint8_t *codes) {
    uint8_t zero[ROW];
    saturate(kind, zeros, zero);
    for (int half = 0; half < 2; half++) {
        const half_folds f = folds_of(planes, half, readers[0].folded, sections == 2 && readers[1].folded);
        __m256i before = _mm256_set1_epi8(FIRST_BEFORE);
        for (int first = 0; first < tokens; first += 8) {
            __m256i plane[8], r[8];
            for (int p = 0; p < (upper ? 4 : 8); p++) {
                const bool distance = p == 1; /* not a plane where a section is folded */
                __m256i v = _mm256_setzero_si256();
                for (int i = 0; i < sections; i++) {
                    if (!(distance && readers[i].folded)) {
                        v = _mm256_or_si256(v, read_row(&readers[i].rows[p], readers[i].at + first / 8 * readers[i].size, half));
                    }
                }
                plane[p] = v;
            }
            unfold_planes(kind, &f, readers, sections, first / 8, half, plane);
            for (int p = 0; p < (upper ? 4 : 8); p++) {
                r[7 - p] = plane[p];
            }
            transpose(r, upper);
            for (int t = 0; t < 8; t++) {
                before = uncentred(kind, &f, r[t], kind == KEYS ? 0 : zero[first + t], before);
                store(codes + (first + t) * ROW + 32 * half, before);
            }
        }
    }
}

int lynx_avx2_unpack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *anchor, uint32_t anchor_entry,
                            const uint8_t *rest, uint32_t rest_entry, int tokens, uint8_t *codes) {
    section_reader readers[2];
    if (!start_section(&readers[0], planes, ANCHOR_SECTION, anchor, anchor_entry, tokens)) {
        return IN_ANCHOR;
    }
    if (rest != NULL && !start_section(&readers[1], planes, REST_SECTION, rest, rest_entry, tokens)) {
        return IN_REST;
    }
    const int sections = rest == NULL ? 1 : 2;
    switch (kind_of(planes, zeros)) {
    case KEYS:
        unpack_as(KEYS, false, planes, zeros, readers, sections, tokens, codes);
        break;
    case VALUES:
        if (sections == 1 && planes->anchor_count[4] == 0) {
            unpack_as(VALUES, true, planes, zeros, readers, 1, tokens, codes);
        } else {
            unpack_as(VALUES, false, planes, zeros, readers, sections, tokens, codes);
        }
        break;
    default:
        unpack_as(NARROW_VALUES, false, planes, zeros, readers, sections, tokens, codes);
    }
    return -1;
}

/* --- encoder -------------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *at; /* of the next octet; null: not made */
    int size;
    uint64_t folds; /* channels */
    plane_row rows[8];
    bit_writer streams[2]; /* D2, D3 */
    uint8_t bytes[2][FAR_BYTES];
} section_writer;

static void start_writer(section_writer *writer, const lynx_planes *planes, int section, uint8_t *out) {
    writer->at = out;
    writer->size = rows_of(planes, section, true, writer->rows);
    writer->folds = planes->fold[section].three | planes->fold[section].two;
    for (int i = 0; i < 2; i++) {
        writer->streams[i] = (bit_writer){writer->bytes[i], 0, 0};
    }
}

/* Distances from the first three planes of half an octet: D1, and D2 and D3 where they are sent. Plane 0 is made what is sent. */
INLINE void fold_planes(int kind, const half_folds *f, __m256i valid, __m256i planes[8], __m256i *moved, __m256i *far,
                        __m256i *farther) {
    __m256i high = planes[0], low = planes[1];
    if (kind != NARROW_VALUES) {
        const __m256i with_sign = _mm256_or_si256(f->three, f->one);
        const __m256i less = _mm256_and_si256(_mm256_xor_si256(planes[0], f->one), with_sign);
        high = _mm256_xor_si256(_mm256_xor_si256(planes[1], less), _mm256_andnot_si256(planes[0], f->two));
        low = _mm256_xor_si256(_mm256_andnot_si256(f->two, planes[2]), less);
        low = _mm256_or_si256(low, _mm256_and_si256(planes[0], f->two));
    }
    *far = _mm256_and_si256(high, valid);
    *farther = _mm256_and_si256(low, valid);
    *moved = _mm256_or_si256(*far, *farther);
    const __m256i first = _mm256_andnot_si256(f->two, _mm256_xor_si256(planes[0], f->three));
    planes[0] = _mm256_or_si256(_mm256_and_si256(first, valid), _mm256_and_si256(*moved, f->two));
}

/* An octet's D2 and D3 of a section, of which the planes are in `words`: D1, then D2 and D3 of all channels. */
INLINE void put_octet(section_writer *out, uint64_t words[3][8]) {
    bit_writer far = out->streams[0], farther = out->streams[1];
    for (int w = 0; w < 8; w++) {
        const uint64_t folds = byte_mask(out->folds, w);
        if (folds != 0) {
            put_word(&far, words[1][w], words[0][w] & folds);
            put_word(&farther, words[2][w], words[1][w] & folds);
        }
    }
    out->streams[0] = far;
    out->streams[1] = farther;
}

INLINE void pack_as(int kind, const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens,
                    section_writer *writers) {
    uint8_t zero[ROW];
    saturate(kind, zeros, zero);
    half_folds f[2];
    __m256i before[2];
    for (int half = 0; half < 2; half++) {
        f[half] = folds_of(planes, half, writers[0].at != NULL, writers[1].at != NULL);
        before[half] = _mm256_set1_epi8(FIRST_BEFORE);
    }
    for (int first = 0; first < tokens; first += 8, codes += 8 * ROW) {
        __m256i plane[8][2], moved[2];
        _Alignas(32) uint64_t words[3][8];
        for (int half = 0; half < 2; half++) {
            __m256i r[8], in[8], far, farther;
            for (int t = 0; t < 8; t++) {
                const __m256i code = load(codes + t * ROW + 32 * half);
                r[t] = centred(kind, &f[half], code, kind == KEYS ? 0 : zero[first + t], before[half]);
                before[half] = code;
            }
            transpose(r, false);
            for (int p = 0; p < 8; p++) {
                in[p] = r[7 - p];
            }
            fold_planes(kind, &f[half], valid_tokens(tokens - first), in, &moved[half], &far, &farther);
            store(words[0] + 4 * half, moved[half]);
            store(words[1] + 4 * half, far);
            store(words[2] + 4 * half, farther);
            for (int p = 0; p < 8; p++) {
                plane[p][half] = in[p];
            }
        }
        for (int i = 0; i < 2; i++) {
            section_writer *out = &writers[i];
            if (out->at != NULL) {
                put_octet(out, words);
                for (int p = 0; p < 8; p++) {
                    write_row(&out->rows[p], out->at, p == 1 ? moved : plane[p]);
                }
                out->at += out->size;
            }
        }
    }
}

void lynx_avx2_pack_folded(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *anchor,
                           uint8_t *rest, uint32_t entries[2]) {
    section_writer writers[2];
    start_writer(&writers[0], planes, ANCHOR_SECTION, anchor);
    start_writer(&writers[1], planes, REST_SECTION, rest);
    switch (kind_of(planes, zeros)) {
    case KEYS:
        pack_as(KEYS, planes, zeros, codes, tokens, writers);
        break;
    case VALUES:
        pack_as(VALUES, planes, zeros, codes, tokens, writers);
        break;
    default:
        pack_as(NARROW_VALUES, planes, zeros, codes, tokens, writers);
    }
    for (int i = 0; i < 2; i++) {
        section_writer *made = &writers[i];
        const uint32_t bits[2] = {position(&made->streams[0], made->bytes[0]), position(&made->streams[1], made->bytes[1])};
        entries[i] = made->at == NULL ? FLAT : write_streams(made->bytes, bits, made->at);
    }
}

AVX2_END
#endif
