/* Kernels around the prefix code of the top three planes, in registers of 64 bits or in loops that compilers vectorise:
 * included by each instruction set, which says first what COMPRESS64 (bits of x where mask is set, moved down),
 * EXPAND64 (the reverse) and POPCOUNT64 are. spec/codec-hq.md, "Folding". */
#ifndef LYNX_FOLD_H
#define LYNX_FOLD_H

#include "isa.h"
#include "words.h"

/* Bits of an octet that are values, in word `w` of eight channels of `folded`. */
static inline uint64_t fold_valid(int folded, int w, int tokens) {
    const uint64_t octet = 0x0101010101010101ull * ((1u << (tokens < 8 ? tokens : 8)) - 1);
    const int channels = folded - 8 * w;
    return channels < 8 ? octet & ((1ull << 8 * channels) - 1) : octet;
}

static inline fold_layout layout_of(const lynx_planes *planes) {
    int counts[3] = {0}; /* channels of 1, 2, 3 bits and more */
    for (int c = 0; c < planes->channels; c++) {
        for (int p = 0; p < 3; p++) {
            counts[p] += planes->widths[c] > p;
        }
    }
    const int rest = counts[0] + counts[1] + counts[2];
    return (fold_layout){counts[0], counts[0] + counts[1], rest, counts[0], rest - planes->folded,
                         planes->anchor_octet, planes->anchor_octet - planes->folded};
}

#ifndef FOLD_BYTES /* an instruction set may bring its own of these five */

/* The top bits of folded channels, in `top`: sign, high and low. Channels of 2 bits have no sign: all ones. */
static inline void gather_top(const lynx_planes *planes, const fold_layout *at, const uint8_t *octet, uint8_t top[3][ROW]) {
    if (at->second == planes->folded && at->rest == 3 * planes->folded) {
        for (int p = 0; p < 3; p++) {
            memcpy(top[p], octet + p * planes->folded, (size_t)planes->folded);
        }
        return;
    }
    const uint8_t *first = octet, *second = octet + at->second, *third = octet + at->third;
    for (int c = 0, n = 0; c < planes->channels; c++) {
        if (planes->fold_three[c]) {
            top[0][n] = *first++;
            top[1][n] = *second++;
            top[2][n++] = *third++;
        } else if (planes->fold_two[c]) {
            top[0][n] = 255;
            top[1][n] = *first++;
            top[2][n++] = *second++;
        } else {
            first += planes->widths[c] == 1;
        }
    }
}

static inline void scatter_top(const lynx_planes *planes, const fold_layout *at, uint8_t top[3][ROW], uint8_t *octet) {
    uint8_t *first = octet, *second = octet + at->second, *third = octet + at->third;
    for (int c = 0, n = 0; c < planes->channels; c++) {
        if (planes->fold_three[c]) {
            *first++ = top[0][n];
            *second++ = top[1][n];
            *third++ = top[2][n++];
        } else if (planes->fold_two[c]) {
            *first++ = top[1][n];
            *second++ = top[2][n++];
        } else {
            first += planes->widths[c] == 1;
        }
    }
}

/* The planes of sign and D1 in a folded octet. */
static inline void gather_folded(const lynx_planes *planes, const fold_layout *at, const uint8_t *octet,
                                 uint8_t top[2][ROW]) {
    const uint8_t *first = octet, *second = octet + at->folded_second;
    for (int c = 0, n = 0; c < planes->channels; c++) {
        if (planes->fold_three[c]) {
            top[0][n] = *first++;
            top[1][n++] = *second++;
        } else if (planes->fold_two[c]) {
            top[0][n] = 255;
            top[1][n++] = *first++;
        } else {
            first += planes->widths[c] == 1;
        }
    }
}

static inline void scatter_folded(const lynx_planes *planes, const fold_layout *at, uint8_t top[3][ROW],
                                  const uint8_t *flat, uint8_t *octet) {
    uint8_t *first = octet, *second = octet + at->folded_second;
    for (int c = 0, n = 0; c < planes->channels; c++) {
        if (planes->fold_three[c]) {
            *first++ = top[0][n];
            *second++ = top[1][n++];
        } else if (planes->fold_two[c]) {
            *first++ = top[1][n++];
        } else if (planes->widths[c] == 1) {
            *first++ = *flat;
        }
        flat += planes->widths[c] > 0; /* plane 0 */
    }
}

/* The only plane of channels of 1 bit, from a folded octet into its flat form. */
static inline void copy_singles(const lynx_planes *planes, const uint8_t *octet, uint8_t *flat) {
    for (int c = 0, n = 0; c < planes->channels; c++) {
        if (planes->widths[c] == 1) {
            flat[n] = octet[n];
        }
        n += planes->widths[c] > 0;
    }
}

#endif

static inline void put_bits64(uint8_t *stream, uint32_t position, uint64_t value) {
    uint8_t *p = stream + (position >> 3);
    const int shift = position & 7;
    store64(p, load64(p) | value << shift);
    p[8] = (uint8_t)(shift == 0 ? 0 : value >> (64 - shift));
}

static inline uint64_t get_bits64(const uint8_t *stream, uint32_t position) {
    const uint8_t *p = stream + (position >> 3);
    const int shift = position & 7;
    return load64(p) >> shift | (shift == 0 ? 0 : (uint64_t)p[8] << (64 - shift));
}

static uint32_t fold(const lynx_planes *planes, const uint8_t *flat, int tokens, uint8_t *folded) {
    const fold_layout at = layout_of(planes);
    uint8_t far[ROW * 8 + SLACK], farther[ROW * 8 + SLACK]; /* D2, D3 */
    memset(far, 0, sizeof far);
    memset(farther, 0, sizeof farther);
    uint32_t far_bits = 0, farther_bits = 0;
    for (int token = 0; token < tokens; token += 8, flat += at.size, folded += at.folded_size) {
        uint8_t top[3][ROW] = {{0}};
        gather_top(planes, &at, flat, top);
        for (int w = 0; 8 * w < planes->folded; w++) {
            const uint64_t valid = fold_valid(planes->folded, w, tokens - token);
            const uint64_t sign = load64(top[0] + 8 * w);
            const uint64_t high = load64(top[1] + 8 * w) ^ ~sign, low = load64(top[2] + 8 * w) ^ ~sign;
            const uint64_t moved = (high | low) & valid, more = high & valid;
            store64(top[0] + 8 * w, sign & valid);
            store64(top[1] + 8 * w, moved);
            put_bits64(far, far_bits, COMPRESS64(high, moved));
            put_bits64(farther, farther_bits, COMPRESS64(low, more));
            far_bits += (uint32_t)POPCOUNT64(moved);
            farther_bits += (uint32_t)POPCOUNT64(more);
        }
        scatter_folded(planes, &at, top, flat, folded);
        memcpy(folded + at.folded_rest, flat + at.rest, (size_t)(at.size - at.rest));
    }
    const uint32_t far_size = (far_bits + 7) / 8, farther_size = (farther_bits + 7) / 8;
    memcpy(folded, far, far_size);
    memcpy(folded + far_size, farther, farther_size);
    return far_size + farther_size;
}

static bool unfold(const lynx_planes *planes, const uint8_t *folded, uint32_t streams, int tokens, uint8_t *flat) {
    const fold_layout at = layout_of(planes);
    const int octets = (tokens + 7) / 8;
    const uint8_t *far = folded + at.folded_size * octets;
    uint8_t planes_of[8][2][ROW]; /* sign and D1 of each octet */
    memset(planes_of, 0, sizeof planes_of);
    /* Both streams' sizes, before anything is read from them. */
    uint32_t far_bits = 0, farther_bits = 0;
    for (int o = 0; o < octets; o++) {
        gather_folded(planes, &at, folded + at.folded_size * o, planes_of[o]);
        for (int w = 0; 8 * w < planes->folded; w++) {
            const uint64_t moved = load64(planes_of[o][1] + 8 * w) & fold_valid(planes->folded, w, tokens - 8 * o);
            store64(planes_of[o][1] + 8 * w, moved);
            far_bits += (uint32_t)POPCOUNT64(moved);
        }
    }
    const uint32_t far_size = (far_bits + 7) / 8;
    if (far_size > streams) {
        return false;
    }
    for (uint32_t position = 0; position < far_bits; position += 64) {
        const uint32_t left = far_bits - position;
        const uint64_t word = get_bits64(far, position);
        farther_bits += (uint32_t)POPCOUNT64(left < 64 ? word & ((1ull << left) - 1) : word);
    }
    if (far_size + (farther_bits + 7) / 8 != streams) {
        return false;
    }
    const uint8_t *farther = far + far_size;
    far_bits = farther_bits = 0;
    for (int o = 0; o < octets; o++, folded += at.folded_size, flat += at.size) {
        uint8_t top[3][ROW];
        memcpy(top, planes_of[o], sizeof planes_of[o]);
        for (int w = 0; 8 * w < planes->folded; w++) {
            const uint64_t sign = load64(top[0] + 8 * w), moved = load64(top[1] + 8 * w);
            const uint64_t high = EXPAND64(get_bits64(far, far_bits), moved);
            const uint64_t low = (moved & ~high) | EXPAND64(get_bits64(farther, farther_bits), high);
            far_bits += (uint32_t)POPCOUNT64(moved);
            farther_bits += (uint32_t)POPCOUNT64(high);
            store64(top[1] + 8 * w, high ^ ~sign);
            store64(top[2] + 8 * w, low ^ ~sign);
        }
        copy_singles(planes, folded, flat);
        scatter_top(planes, &at, top, flat);
        memcpy(flat + at.rest, folded + at.folded_rest, (size_t)(at.size - at.rest));
    }
    return true;
}

/* The code before a block's first token, as centres go. */
#define FIRST_BEFORE 96

/* A channel's top three bits as distance from a centre that lies half way between the middle and the code before. */
static inline int key_centre(int before) {
    return 2 + (((before >> 5) + 1) >> 1);
}

static inline int value_centre(int zero, int bias) {
    const int centre = (zero + bias + 16) >> 5;
    return centre < 1 ? 1 : centre > 7 ? 7 : centre;
}

/* The rank of a channel's two top bits, by what is likely after a code of the lower half: 1, 2, 0, 3. The upper half
 * mirrors it. */
static inline int rank_two(int top, int before) {
    const int mirrored = before < 128 ? top : 3 - top;
    return mirrored == 3 ? 3 : mirrored == 0 ? 2 : mirrored - 1;
}

static inline int unrank_two(int rank_of, int before) {
    const int mirrored = rank_of == 3 ? 3 : rank_of == 2 ? 0 : rank_of + 1;
    return before < 128 ? mirrored : 3 - mirrored;
}

static inline uint8_t blend(uint8_t a, uint8_t mask_a, uint8_t b, uint8_t mask_b, uint8_t other) {
    return (uint8_t)((a & mask_a) | (b & mask_b) | (other & ~(mask_a | mask_b)));
}

#ifndef FOLD_CENTRES
static void centre(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *centred) {
    uint8_t before[ROW];
    memset(before, FIRST_BEFORE, sizeof before);
    for (int t = 0; t < tokens; t++, codes += ROW, centred += ROW) {
        for (int c = 0; c < ROW; c++) {
            const uint8_t code = codes[c];
            const int from = zeros == NULL ? key_centre(before[c]) : value_centre(zeros[t], planes->bias[c]);
            const uint8_t three = (uint8_t)(code + (4 - from) * 32);
            const uint8_t two = (uint8_t)((code & 63) | rank_two(code >> 6, before[c]) << 6);
            centred[c] = blend(three, planes->fold_three[c], two, planes->fold_two[c], code);
            before[c] = code;
        }
    }
    memset(centred, 0, (size_t)(-tokens & 7) * ROW);
}

static void uncentre(const lynx_planes *planes, const int16_t *zeros, int tokens, uint8_t *codes) {
    uint8_t before[ROW];
    memset(before, FIRST_BEFORE, sizeof before);
    for (int t = 0; t < tokens; t++, codes += ROW) {
        for (int c = 0; c < ROW; c++) {
            const uint8_t code = codes[c];
            const int from = zeros == NULL ? key_centre(before[c]) : value_centre(zeros[t], planes->bias[c]);
            const uint8_t three = (uint8_t)(code + (from - 4) * 32);
            const uint8_t two = (uint8_t)((code & 63) | unrank_two(code >> 6, before[c]) << 6);
            before[c] = codes[c] = blend(three, planes->fold_three[c], two, planes->fold_two[c], code);
        }
    }
}
#endif

static void rescale(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride) {
    for (int t = 0; t < tokens; t++, rows += stride, out += out_stride) {
        for (int c = 0; c < ROW; c++) {
            const uint16_t word = rows[c], magnitude = word & 0x7fff;
            const uint16_t from = (uint16_t)(magnitude - RESCALE_FIRST); /* large for words below the first */
            int16_t to = (int16_t)((int16_t)from - shifts[c]);
            to = (int16_t)(to < 0 ? to + RESCALE_COUNT : to);
            to = (int16_t)(to >= RESCALE_COUNT ? to - RESCALE_COUNT : to);
            const uint16_t moved = (uint16_t)((word & 0x8000) | (to + RESCALE_FIRST));
            out[c] = from < RESCALE_COUNT ? moved : word;
        }
    }
}

#endif
