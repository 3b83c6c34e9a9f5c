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

/* The bytes of folded channels in plane `p` of an octet, and where that plane ends. */
static inline const uint8_t *gather_plane(const lynx_planes *planes, int p, const uint8_t *octet, uint8_t *row) {
    if (planes->folded == planes->channels) {
        memcpy(row, octet, (size_t)planes->folded);
        return octet + planes->folded;
    }
    for (int c = 0; c < planes->channels; c++) {
        if (planes->fold_mask[c]) {
            *row++ = *octet++;
        } else if (p < planes->widths[c]) {
            octet++;
        }
    }
    return octet;
}

static inline uint8_t *scatter_plane(const lynx_planes *planes, int p, const uint8_t *row, uint8_t *octet) {
    if (planes->folded == planes->channels) {
        memcpy(octet, row, (size_t)planes->folded);
        return octet + planes->folded;
    }
    for (int c = 0; c < planes->channels; c++) {
        if (planes->fold_mask[c]) {
            *octet++ = *row++;
        } else if (p < planes->widths[c]) {
            octet++;
        }
    }
    return octet;
}

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
    uint8_t far[ROW * 8 + SLACK], farther[ROW * 8 + SLACK]; /* D2, D3 */
    memset(far, 0, sizeof far);
    memset(farther, 0, sizeof farther);
    uint32_t far_bits = 0, farther_bits = 0;
    for (int first = 0; first < tokens; first += 8, flat += planes->anchor_octet) {
        uint8_t top[3][ROW] = {{0}};
        const uint8_t *second = gather_plane(planes, 0, flat, top[0]);
        const uint8_t *third = gather_plane(planes, 1, second, top[1]);
        memcpy(top[2], third, (size_t)planes->folded); /* nobody else has plane 2 */
        const size_t front = (size_t)(third - flat), back = planes->anchor_octet - front - (size_t)planes->folded;
        for (int w = 0; 8 * w < planes->folded; w++) {
            const uint64_t valid = fold_valid(planes->folded, w, tokens - first);
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
        memcpy(folded, flat, front);
        scatter_plane(planes, 1, top[1], scatter_plane(planes, 0, top[0], folded));
        memcpy(folded + front, third + planes->folded, back);
        folded += front + back;
    }
    const uint32_t far_size = (far_bits + 7) / 8, farther_size = (farther_bits + 7) / 8;
    memcpy(folded, far, far_size);
    memcpy(folded + far_size, farther, farther_size);
    return far_size + farther_size;
}

static bool unfold(const lynx_planes *planes, const uint8_t *folded, uint32_t streams, int tokens, uint8_t *flat) {
    const size_t octet = (size_t)(planes->anchor_octet - planes->folded);
    const uint8_t *far = folded + octet * (size_t)((tokens + 7) / 8);
    /* Both streams' sizes, before anything is read from them. */
    uint32_t far_bits = 0, farther_bits = 0;
    const uint8_t *in = folded;
    for (int first = 0; first < tokens; first += 8, in += octet) {
        uint8_t row[ROW] = {0};
        gather_plane(planes, 1, gather_plane(planes, 0, in, row), row);
        for (int w = 0; 8 * w < planes->folded; w++) {
            far_bits += (uint32_t)POPCOUNT64(load64(row + 8 * w) & fold_valid(planes->folded, w, tokens - first));
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
    for (int first = 0; first < tokens; first += 8, folded += octet, flat += planes->anchor_octet) {
        uint8_t top[3][ROW] = {{0}};
        const uint8_t *second = gather_plane(planes, 0, folded, top[0]);
        const size_t front = (size_t)(gather_plane(planes, 1, second, top[1]) - folded);
        for (int w = 0; 8 * w < planes->folded; w++) {
            const uint64_t sign = load64(top[0] + 8 * w);
            const uint64_t moved = load64(top[1] + 8 * w) & fold_valid(planes->folded, w, tokens - first);
            const uint64_t high = EXPAND64(get_bits64(far, far_bits), moved);
            const uint64_t low = (moved & ~high) | EXPAND64(get_bits64(farther, farther_bits), high);
            far_bits += (uint32_t)POPCOUNT64(moved);
            farther_bits += (uint32_t)POPCOUNT64(high);
            store64(top[1] + 8 * w, high ^ ~sign);
            store64(top[2] + 8 * w, low ^ ~sign);
        }
        memcpy(flat, folded, front);
        scatter_plane(planes, 1, top[1], flat + (second - folded));
        memcpy(flat + front, top[2], (size_t)planes->folded);
        memcpy(flat + front + planes->folded, folded + front, octet - front);
    }
    return true;
}

/* The centre that a token's top bits t give the next: half way to the middle. */
static inline uint8_t next_centre(uint8_t top) {
    return (uint8_t)(2 + ((top + 1) >> 1));
}

static void centre(const lynx_planes *planes, const uint8_t *centres, const uint8_t *codes, int tokens,
                   uint8_t *centred) {
    uint8_t at[ROW];
    memset(at, 4, sizeof at);
    for (int t = 0; t < tokens; t++, codes += ROW, centred += ROW) {
        for (int c = 0; c < ROW; c++) {
            const uint8_t top = codes[c] >> 5;
            const uint8_t from = centres == NULL ? at[c] : centres[t];
            const uint8_t moved = (uint8_t)((codes[c] & 31) | (top - from + 4) * 32);
            centred[c] = (uint8_t)((moved & planes->fold_mask[c]) | (codes[c] & ~planes->fold_mask[c]));
            at[c] = next_centre(top);
        }
    }
    memset(centred, 0, (size_t)(-tokens & 7) * ROW);
}

static void uncentre(const lynx_planes *planes, const uint8_t *centres, int tokens, uint8_t *codes) {
    uint8_t at[ROW];
    memset(at, 4, sizeof at);
    for (int t = 0; t < tokens; t++, codes += ROW) {
        for (int c = 0; c < ROW; c++) {
            const uint8_t from = centres == NULL ? at[c] : centres[t];
            const uint8_t moved = (uint8_t)(codes[c] + (from - 4) * 32);
            codes[c] = (uint8_t)((moved & planes->fold_mask[c]) | (codes[c] & ~planes->fold_mask[c]));
            at[c] = next_centre(codes[c] >> 5);
        }
    }
}

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
