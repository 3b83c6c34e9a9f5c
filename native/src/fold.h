/* Kernels around the prefix code of the top planes, in registers of 64 bits or in loops that compilers vectorise:
 * included by each instruction set, which says first what COMPRESS64 (bits of x where mask is set, moved down),
 * EXPAND64 (the reverse) and POPCOUNT64 are. spec/codec-hq.md, "Folding". */
#ifndef LYNX_FOLD_H
#define LYNX_FOLD_H

#include "isa.h"
#include "ranks.h"
#include "words.h"

/* Bits of an octet that are values, in each byte. */
static inline uint64_t fold_valid(int tokens) {
    return 0x0101010101010101ull * ((1u << (tokens < 8 ? tokens : 8)) - 1);
}

#ifndef FOLD_AT_ONCE /* with planes and centres, as some instruction sets do it; only the streams are needed then */

/* A row's bytes to the places of their channels, with zeros elsewhere; and the reverse, which writes no byte more. Both
 * return the row's end. */
static inline const uint8_t *load_row(uint64_t mask, const uint8_t *in, uint8_t *row) {
    if (mask == ~0ull) {
        memcpy(row, in, ROW);
        return in + ROW;
    }
    memset(row, 0, ROW);
    for (; mask != 0; mask &= mask - 1) {
        row[__builtin_ctzll(mask)] = *in++;
    }
    return in;
}

static inline uint8_t *store_row(uint64_t mask, const uint8_t *row, uint8_t *out) {
    if (mask == ~0ull) {
        memcpy(out, row, ROW);
        return out + ROW;
    }
    for (; mask != 0; mask &= mask - 1) {
        *out++ = row[__builtin_ctzll(mask)];
    }
    return out;
}

/* A bit for each of 8 channels as 255 in its byte. */
static inline uint64_t byte_mask(uint64_t channels, int w) {
    const uint64_t bits = (channels >> 8 * w & 255) * 0x0101010101010101ull & 0x8040201008040201ull;
    return ((bits + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull) * 255; /* no carries: at most one bit a byte */
}

#endif

static inline uint64_t choose64(uint64_t mask, uint64_t a, uint64_t b) {
    return (a & mask) | (b & ~mask);
}

static inline void put_bits64(uint8_t *stream, uint32_t position, uint64_t value) {
    uint8_t *p = stream + (position >> 3);
    const int shift = position & 7;
    store64(p, load64(p) | value << shift);
    p[8] = (uint8_t)(value >> 1 >> (63 - shift));
}

/* 64 bits, or the `left` that there are. */
static inline uint64_t some_bits64(const uint8_t *stream, uint32_t position, uint32_t left) {
    const uint64_t bits = get_bits64(stream, position);
    return left < 64 ? bits & ((1ull << left) - 1) : bits;
}

/* Of the first `count` bits, those that are 1. */
static inline uint32_t count_bits(const uint8_t *stream, uint32_t count) {
    uint32_t ones = 0;
    for (; count >= 64; stream += 8, count -= 64) {
        ones += (uint32_t)POPCOUNT64(load64(stream));
    }
    return ones + (uint32_t)POPCOUNT64(load64(stream) & ((1ull << count) - 1));
}

/* The stream in pairs, if that takes fewer bits: returns how many, or `count`. Up to 16 bytes beyond the stream are read, and
 * may be anything. */
static inline uint32_t pair_stream(const uint8_t *stream, uint32_t count, uint8_t *paired) {
    const uint32_t half = (count + 1) / 2, words = (half + 63) / 64;
    uint64_t x[BLOCK_VALUES / 128], y[BLOCK_VALUES / 128];
    uint32_t either = 0, first = 0;
    for (uint32_t w = 0; w < words; w++) {
        x[w] = some_bits64(stream, 64 * w, half - 64 * w);
        y[w] = some_bits64(stream, half + 64 * w, count - half - 64 * w);
        either += (uint32_t)POPCOUNT64(x[w] | y[w]);
        first += (uint32_t)POPCOUNT64(x[w]);
    }
    if (half + either + first >= count) {
        return count;
    }
    bit_writer out = {paired, 0, 0};
    for (uint32_t w = 0; w < words; w++) {
        put64(&out, x[w] | y[w], half - 64 * w < 64 ? half - 64 * w : 64);
    }
    for (uint32_t w = 0; w < words; w++) {
        put64(&out, COMPRESS64(x[w], x[w] | y[w]), (uint32_t)POPCOUNT64(x[w] | y[w]));
    }
    for (uint32_t w = 0; w < words; w++) {
        put64(&out, COMPRESS64(y[w], x[w]), (uint32_t)POPCOUNT64(x[w]));
    }
    return position(&out, paired);
}

/* The reverse. Returns the bits that the pairs take; more than `limit` if there are not so many, and nothing is read from there
 * on, but up to 16 bytes. What is behind the stream's end is not defined. */
static inline uint32_t unpair_stream(const uint8_t *paired, uint32_t limit, uint32_t count, uint8_t *stream) {
    const uint32_t half = (count + 1) / 2, shift = half & 63;
    if (half > limit) {
        return half;
    }
    uint64_t x = 0, second[BLOCK_VALUES / 128];
    uint32_t x_at = half, y_at = half + count_bits(paired, half);
    for (uint32_t i = 0; i < half; i += 64) {
        if (y_at > limit) { /* x_at is no further */
            return y_at;
        }
        const uint64_t whole = load64(paired + i / 8), either = half - i < 64 ? whole & ((1ull << shift) - 1) : whole;
        const uint32_t some = (uint32_t)POPCOUNT64(either);
        x = EXPAND64(get_few_bits64(paired, x_at, some), either);
        const uint32_t both = (uint32_t)POPCOUNT64(x);
        second[i / 64] = (either & ~x) | EXPAND64(get_few_bits64(paired, y_at, both), x);
        x_at += some;
        y_at += both;
        store64(stream + i / 8, x);
    }
    stream += half / 64 * 8;
    uint64_t before = shift == 0 ? 0 : x; /* bits of the word that the second half begins in */
    for (uint32_t i = 0; i < half; i += 64, stream += 8) {
        store64(stream, before | second[i / 64] << shift);
        before = second[i / 64] >> 1 >> (63 - shift);
    }
    store64(stream, before);
    return y_at;
}

#define FAR_BYTES (BLOCK_VALUES / 8 + SLACK) /* of a stream D2 or D3 */

/* Write D2 and D3, in pairs where that takes fewer bits. Returns the block's entry in the fold table. */
static inline uint32_t write_streams(uint8_t streams[2][FAR_BYTES], const uint32_t bits[2], uint8_t *out) {
    uint32_t entry = 0;
    for (int i = 0; i < 2; i++) {
        uint8_t paired[FAR_BYTES];
        const uint32_t count = pair_stream(streams[i], bits[i], paired), size = (count + 7) / 8;
        memcpy(out, count < bits[i] ? paired : streams[i], size);
        out += size;
        entry += size | (count < bits[i] ? (uint32_t)FOLD_PAIRED << i : 0);
    }
    return entry;
}

/* Where D2, of `count` bits, and D3 are, in `in` or taken out of pairs; false if they do not take what the entry says. Sizes are
 * checked before anything is read, but the bytes just behind. */
static inline bool read_streams(const uint8_t *in, uint32_t entry, uint32_t count, uint8_t unpaired[2][FAR_BYTES],
                                const uint8_t *streams[2]) {
    uint32_t left = 8 * (entry & FOLD_SIZE);
    for (int i = 0; i < 2; i++) {
        const bool paired = (entry & (uint32_t)FOLD_PAIRED << i) != 0;
        const uint32_t bits = paired ? unpair_stream(in, left, count, unpaired[i]) : count, size = (bits + 7) / 8;
        if (8 * size > left) {
            return false;
        }
        streams[i] = paired ? unpaired[i] : in;
        in += size;
        left -= 8 * size;
        count = i == 0 ? count_bits(streams[0], count) : 0;
    }
    return left == 0;
}

/* The code before a block's first token, as centres go. */
#define FIRST_BEFORE 96

#ifndef FOLD_AT_ONCE

static inline uint32_t fold(const lynx_fold *fold, const uint8_t *flat, int tokens, uint8_t *folded) {
    uint8_t streams[2][FAR_BYTES]; /* D2, D3 */
    memset(streams, 0, sizeof streams);
    uint32_t bits[2] = {0, 0};
    for (int token = 0; token < tokens; token += 8) {
        uint8_t rows[3][ROW];
        for (int p = 0; p < 3; p++) {
            flat = load_row(fold->rows[p], flat, rows[p]);
        }
        const uint64_t valid = fold_valid(tokens - token);
        for (int w = 0; w < ROW / 8; w++) {
            const uint64_t three = byte_mask(fold->three, w), two = byte_mask(fold->two, w);
            const uint64_t upper = load64(rows[fold->two_row] + 8 * w), lower = load64(rows[fold->two_row + 1] + 8 * w);
            const uint64_t sign = load64(rows[0] + 8 * w) | ~three; /* so that what has no sign stays as it is */
            const uint64_t high = choose64(three, load64(rows[1] + 8 * w), upper) ^ ~sign;
            const uint64_t low = choose64(three, load64(rows[2] + 8 * w), lower) ^ ~sign;
            const uint64_t folds = (three | two) & valid, moved = (high | low) & folds, more = high & folds;
            put_bits64(streams[0], bits[0], COMPRESS64(high, moved));
            put_bits64(streams[1], bits[1], COMPRESS64(low, more));
            bits[0] += (uint32_t)POPCOUNT64(moved);
            bits[1] += (uint32_t)POPCOUNT64(more);
            store64(rows[1] + 8 * w, moved);
            if (fold->two_row == 0) {
                store64(rows[0] + 8 * w, choose64(two, moved, load64(rows[0] + 8 * w)));
            }
        }
        for (int p = 0; p < 3; p++) {
            folded = store_row(fold->folded_rows[p], rows[p], folded);
        }
        memcpy(folded, flat, (size_t)fold->others);
        flat += fold->others;
        folded += fold->others;
    }
    return write_streams(streams, bits, folded);
}

static inline bool unfold(const lynx_fold *fold, const uint8_t *folded, uint32_t entry, int tokens, uint8_t *flat) {
    const int octets = (tokens + 7) / 8;
    uint64_t moved_of[ROW / 8][ROW / 8]; /* D1 of each octet */
    uint32_t count = 0;
    for (int o = 0; o < octets; o++) {
        uint8_t rows[2][ROW];
        const uint8_t *in = folded + o * fold->folded_size;
        in = load_row(fold->folded_rows[0], in, rows[0]);
        load_row(fold->folded_rows[1], in, rows[1]);
        const uint64_t valid = fold_valid(tokens - 8 * o);
        for (int w = 0; w < ROW / 8; w++) {
            const uint64_t three = byte_mask(fold->three, w), two = byte_mask(fold->two, w);
            const uint64_t moved = choose64(three, load64(rows[1] + 8 * w), load64(rows[fold->two_row] + 8 * w));
            moved_of[o][w] = moved & (three | two) & valid;
            count += (uint32_t)POPCOUNT64(moved_of[o][w]);
        }
    }
    uint8_t unpaired[2][FAR_BYTES];
    const uint8_t *streams[2];
    if (!read_streams(folded + octets * fold->folded_size, entry, count, unpaired, streams)) {
        return false;
    }
    uint32_t at[2] = {0, 0};
    for (int o = 0; o < octets; o++) {
        uint8_t rows[3][ROW];
        for (int p = 0; p < 3; p++) {
            folded = load_row(fold->folded_rows[p], folded, rows[p]);
        }
        for (int w = 0; w < ROW / 8; w++) {
            const uint64_t three = byte_mask(fold->three, w), two = byte_mask(fold->two, w), moved = moved_of[o][w];
            const uint64_t sign = load64(rows[0] + 8 * w) | ~three;
            const uint64_t far = EXPAND64(get_bits64(streams[0], at[0]), moved);
            const uint64_t farther = (moved & ~far) | EXPAND64(get_bits64(streams[1], at[1]), far);
            at[0] += (uint32_t)POPCOUNT64(moved);
            at[1] += (uint32_t)POPCOUNT64(far);
            const uint64_t high = far ^ ~sign, low = farther ^ ~sign;
            const uint64_t first = load64(rows[0] + 8 * w), third = load64(rows[2] + 8 * w);
            if (fold->two_row == 0) {
                store64(rows[0] + 8 * w, choose64(two, high, first));
                store64(rows[1] + 8 * w, choose64(three, high, low));
                store64(rows[2] + 8 * w, choose64(three, low, third));
            } else {
                store64(rows[1] + 8 * w, high);
                store64(rows[2] + 8 * w, choose64(three | two, low, third));
            }
        }
        for (int p = 0; p < 3; p++) {
            flat = store_row(fold->rows[p], rows[p], flat);
        }
        memcpy(flat, folded, (size_t)fold->others);
        flat += fold->others;
        folded += fold->others;
    }
    return true;
}

/* A channel's top three bits as distance from a centre that lies half way between the middle and the code before. */
static inline int key_centre(int before) {
    return 2 + (((before >> 5) + 1) >> 1);
}

static inline int clamped(int x, int least, int most) {
    return x < least ? least : x > most ? most : x;
}

static inline int value_centre(int zero, int bias) {
    return clamped((zero + bias + 16) >> 5, 1, 7);
}

/* The place of a key's two top bits by what is likely after a code of the lower half: 1, 2, 0, 3. The upper half
 * mirrors it. */
static inline uint8_t rank_two(uint8_t top, uint8_t before) {
    const uint8_t mirrored = before < 128 ? top : (uint8_t)(3 - top);
    return mirrored == 3 ? 3 : mirrored == 0 ? 2 : (uint8_t)(mirrored - 1);
}

static inline uint8_t unrank_two(uint8_t rank_of, uint8_t before) {
    const uint8_t mirrored = rank_of == 3 ? 3 : rank_of == 2 ? 0 : (uint8_t)(rank_of + 1);
    return before < 128 ? mirrored : (uint8_t)(3 - mirrored);
}

/* A value's two top bits by their distance from zero, which lies in [0, 64), [64, 96), [96, 128), or mirrored: the
 * place of each, and which is at each place. Two bits each. */
#define VALUE_PLACES (0xe4u | 0xe1u << 8 | 0xd2u << 16) /* 0 1 2 3, 1 0 2 3, 2 0 1 3 */
#define VALUE_TOPS (0xe4u | 0xe1u << 8 | 0xc9u << 16)   /* 0 1 2 3, 1 0 2 3, 1 2 0 3 */

static inline int value_cell(int zero, int bias) { /* 0 to 5 */
    return clamped((zero + bias) >> 5, 1, 6) - 1;
}

static inline int value_place(int top, int cell) {
    return cell < 3 ? (int)(VALUE_PLACES >> (8 * cell + 2 * top)) & 3
                    : (int)(VALUE_PLACES >> (8 * (5 - cell) + 2 * (3 - top))) & 3;
}

static inline int value_top(int place, int cell) {
    return cell < 3 ? (int)(VALUE_TOPS >> (8 * cell + 2 * place)) & 3
                    : 3 - ((int)(VALUE_TOPS >> (8 * (5 - cell) + 2 * place)) & 3);
}

/* 255 for channels of a mask. */
static inline void mask_bytes(uint64_t mask, uint8_t *bytes) {
    for (int w = 0; w < ROW / 8; w++) {
        store64(bytes + 8 * w, byte_mask(mask, w));
    }
}

/* Values of 2 bits fold in whole blocks. */
static inline void replace_two(const lynx_planes *planes, int zero, uint64_t mask, bool back, const uint8_t *codes,
                               uint8_t *out) {
    for (int c = 0; c < ROW; c++) {
        const int cell = value_cell(zero, planes->bias[c]), top = codes[c] >> 6;
        const int place = back ? value_top(top, cell) : value_place(top, cell);
        const uint8_t replaced = (uint8_t)((codes[c] & 63) | place << 6);
        out[c] = mask >> c & 1 ? replaced : codes[c];
    }
}

/* (centre - 4) * 32 of 64 channels, modulo 256. */
static inline void from_middle(const lynx_planes *planes, const int16_t *zero, const uint8_t *before, uint8_t *out) {
    for (int c = 0; c < ROW && zero != NULL; c++) {
        out[c] = (uint8_t)((value_centre(*zero, planes->bias[c]) - 4) * 32);
    }
    for (int c = 0; c < ROW && zero == NULL; c++) {
        out[c] = (uint8_t)((key_centre(before[c]) - 4) * 32);
    }
}

static inline void centre(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *centred) {
    uint8_t before[ROW], three[ROW], two[ROW], one[ROW], moved[ROW];
    memset(before, FIRST_BEFORE, sizeof before);
    mask_bytes(planes->fold[0].three | planes->fold[1].three, three);
    mask_bytes(planes->fold[0].two, two);
    mask_bytes(planes->fold[1].two, one);
    for (int t = 0; t < tokens; t++, codes += ROW, centred += ROW) {
        if (zeros != NULL && planes->fold[0].two != 0) {
            replace_two(planes, zeros[t], planes->fold[0].two, false, codes, centred);
            continue;
        }
        from_middle(planes, zeros == NULL ? NULL : zeros + t, before, moved);
        for (int c = 0; c < ROW; c++) {
            const uint8_t code = codes[c], place = rank_two(code >> 6, before[c]);
            uint8_t out = (uint8_t)(code - (moved[c] & three[c]));
            const uint8_t by_place = (uint8_t)((code & 63) | place << 6), mirrored = (uint8_t)(code ^ 0x60);
            out = two[c] ? by_place : out;
            out = one[c] & (code < 128 ? 255 : 0) ? mirrored : out; /* of 1 bit: distance from the middle */
            centred[c] = out;
            before[c] = code;
        }
    }
    memset(centred, 0, (size_t)(-tokens & 7) * ROW);
}

static inline void uncentre(const lynx_planes *planes, const int16_t *zeros, int tokens, bool anchor, bool rest,
                     uint8_t *codes) {
    uint8_t before[ROW], three[ROW], two[ROW], one[ROW], moved[ROW];
    const uint64_t twos = anchor ? planes->fold[0].two : 0;
    memset(before, FIRST_BEFORE, sizeof before);
    mask_bytes((anchor ? planes->fold[0].three : 0) | (rest ? planes->fold[1].three : 0), three);
    mask_bytes(twos, two);
    mask_bytes(rest ? planes->fold[1].two : 0, one);
    for (int t = 0; t < tokens; t++, codes += ROW) {
        if (zeros != NULL && twos != 0) {
            replace_two(planes, zeros[t], twos, true, codes, codes);
            continue;
        }
        from_middle(planes, zeros == NULL ? NULL : zeros + t, before, moved);
        for (int c = 0; c < ROW; c++) {
            const uint8_t code = codes[c], top = unrank_two(code >> 6, before[c]);
            uint8_t out = (uint8_t)(code + (moved[c] & three[c]));
            const uint8_t by_top = (uint8_t)((code & 63) | top << 6), mirrored = (uint8_t)(code ^ 0x60);
            out = two[c] ? by_top : out;
            out = one[c] & (code < 128 ? 255 : 0) ? mirrored : out;
            before[c] = codes[c] = out;
        }
    }
}
#endif

#endif
