/* Portable kernels: the meaning of every other instruction set's. */
#include "isa.h"
#include "params.h"
#include "words.h"

static inline uint64_t compress64(uint64_t x, uint64_t mask) {
    uint64_t out = 0;
    for (int n = 0; mask != 0; mask &= mask - 1, n++) {
        out |= (uint64_t)((x & mask & (0 - mask)) != 0) << n;
    }
    return out;
}

static inline uint64_t expand64(uint64_t x, uint64_t mask) {
    uint64_t out = 0;
    for (; mask != 0; mask &= mask - 1, x >>= 1) {
        out |= (x & 1) * (mask & (0 - mask));
    }
    return out;
}

#define COMPRESS64 compress64
#define EXPAND64 expand64
#define POPCOUNT64 __builtin_popcountll
#include "fold.h"
#include "ranks.h"
#include "rows.h"

static inline int group_of(int part, int token, int channel) {
    return part == LYNX_KEY ? channel : token;
}

static void range(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    for (int g = 0; g < ROW; g++) {
        low[g] = INT16_MAX;
        high[g] = INT16_MIN;
    }
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < ROW; c++) {
            const int g = group_of(part, t, c);
            const int16_t o = ordered(rows[t * stride + c]);
            low[g] = o < low[g] ? o : low[g];
            high[g] = o > high[g] ? o : high[g];
        }
    }
}

static void choose(int dtype, const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params) {
    choose_as(dtype, planes, low, high, params);
}

static void quantise(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens,
                     const lynx_planes *planes, const lynx_params *params, uint8_t *codes) {
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < ROW; c++) {
            const int g = group_of(part, t, c);
            const uint16_t word = rows[t * stride + c];
            float scaled = word_value(dtype, word & 0x7fff) * params->inverse[g] + 0.5f;
            scaled = scaled < 4095.0f ? scaled : 4095.0f; /* also for NaN */
            const int magnitude = (int)scaled;
            int code = (word & 0x8000 ? -magnitude : magnitude) + params->offset[g];
            code = code < planes->low[g] ? planes->low[g] : code; /* only special words get here */
            code = code > planes->high[g] ? planes->high[g] : code;
            code = params->constant >> g & 1 ? planes->low[g] : code;
            codes[t * ROW + c] = (uint8_t)code;
        }
    }
}

static void pack(const lynx_planes *planes, const uint8_t *codes, int tokens, uint8_t *anchor, uint8_t *rest) {
    for (int first = 0; first < tokens; first += 8) {
        uint8_t bits[8][ROW];
        for (int c = 0; c < planes->channels; c++) {
            uint64_t matrix = 0;
            for (int t = 0; t < 8; t++) {
                matrix |= (uint64_t)codes[(first + t) * ROW + c] << 8 * t;
            }
            matrix = transpose8x8(matrix);
            for (int p = 0; p < 8; p++) {
                bits[p][c] = (uint8_t)(matrix >> 8 * (7 - p));
            }
        }
        for (int p = 0; p < 8; p++) {
            for (int c = 0; c < planes->channels; c++) {
                if (p < planes->widths[c]) {
                    if (anchor != NULL) {
                        *anchor++ = bits[p][c];
                    }
                } else if (rest != NULL) {
                    *rest++ = bits[p][c];
                }
            }
        }
    }
}

static void unpack(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int tokens, uint8_t *codes) {
    for (int first = 0; first < tokens; first += 8) {
        uint64_t matrix[ROW] = {0};
        for (int p = 0; p < 8; p++) {
            for (int c = 0; c < planes->channels; c++) {
                if (p < planes->widths[c]) {
                    matrix[c] |= (uint64_t)*anchor++ << 8 * (7 - p);
                } else if (rest != NULL) {
                    matrix[c] |= (uint64_t)*rest++ << 8 * (7 - p);
                }
            }
        }
        for (int c = 0; c < ROW; c++) {
            const uint64_t bytes = transpose8x8(matrix[c]);
            for (int t = 0; t < 8; t++) {
                codes[(first + t) * ROW + c] = (uint8_t)(bytes >> 8 * t);
            }
        }
    }
}

static bool check(int part, const uint8_t *codes, int tokens, const lynx_planes *planes) {
    bool good = true;
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < planes->channels; c++) {
            const int g = group_of(part, t, c);
            const uint8_t code = codes[t * ROW + c];
            good &= code >= planes->low[g] && code <= planes->high[g];
        }
    }
    return good;
}

static void dequantise(int part, int dtype, const uint8_t *codes, int tokens, const lynx_params *params,
                       const int16_t *shifts, uint16_t *const *rows) {
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < ROW; c++) {
            const int g = group_of(part, t, c);
            const float value = (float)(codes[t * ROW + c] - params->offset[g]) * params->scale[g];
            const uint16_t word = dtype == LYNX_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
            rows[t][c] = (uint16_t)(shifts == NULL || (word & 0x7fff) == 0 ? word : word + shifts[c]);
        }
    }
}

typedef struct {
    uint32_t low, count; /* the cell's least magnitude word and number of words */
} cell;

static inline cell cell_of(int dtype, int magnitude, float half_scale) {
    const uint32_t low = ceil_word(dtype, (float)(2 * magnitude - 1) * half_scale);
    const uint32_t high = ceil_word(dtype, (float)(2 * magnitude + 1) * half_scale);
    return (cell){low, high - low};
}

static void rank(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                 int channels, const lynx_params *params, lynx_streams *streams) {
    memset(streams, 0, sizeof *streams);
    zero_list zeros;
    zeros.count = 0;
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < channels; c++) {
            const int g = group_of(part, t, c);
            if (params->constant >> g & 1) {
                continue;
            }
            const int k = codes[t * ROW + c] - params->offset[g];
            const int a = k < 0 ? -k : k;
            if (a == 0) {
                zeros.at[zeros.count++] = (uint16_t)(ROW * t + c);
            } else {
                const cell in = cell_of(dtype, a, params->scale[g] * 0.5f);
                const uint32_t r = (rows[t * stride + c] & 0x7fffu) - in.low;
                const int width = floor_log2(in.count);
                const uint32_t low_bits = r & ((1u << width) - 1);
                put_bits(streams->a, streams->a_bits, low_bits);
                streams->a_bits += (uint32_t)width;
                if (low_bits < in.count - (1u << width)) {
                    put_bits(streams->b, streams->b_bits++, r >> width);
                }
            }
        }
    }
    rank_zeros(part, dtype, &zeros, rows, stride, params, streams);
}

static int unrank(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                  lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    streams->a_bits = streams->b_bits = 0;
    zero_list zeros;
    zeros.count = 0;
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < channels; c++) {
            const int g = group_of(part, t, c);
            uint16_t *out = rows[t] + c;
            if (params->constant >> g & 1) {
                *out = params->word[g];
                continue;
            }
            const int k = codes[t * ROW + c] - params->offset[g];
            const int a = k < 0 ? -k : k;
            if (a == 0) {
                zeros.at[zeros.count++] = (uint16_t)(ROW * t + c);
            } else {
                const cell in = cell_of(dtype, a, params->scale[g] * 0.5f);
                if (in.count == 0) {
                    return LYNX_ERR_RANK;
                }
                const int width = floor_log2(in.count);
                uint32_t r = get_bits(streams->a, streams->a_bits, width);
                streams->a_bits += (uint32_t)width;
                if (r < in.count - (1u << width)) {
                    r |= get_bits(streams->more, streams->b_bits++, 1) << width;
                }
                *out = (uint16_t)(((in.low + r) | (k < 0 ? 0x8000u : 0u)) + (uint32_t)(shifts == NULL ? 0 : shifts[c]));
            }
        }
    }
    return unrank_zeros(part, dtype, &zeros, shifts, rows, params, streams) ? LYNX_OK : LYNX_ERR_RANK;
}

static inline uint32_t load_word(int word_bytes, const uint8_t *words, size_t i) {
    switch (word_bytes) {
    case 1:
        return words[i];
    case 2:
        return load16(words + 2 * i);
    default:
        return load32(words + 4 * i);
    }
}

static void pack_row(int word_bytes, const void *words, size_t count, uint8_t *const *planes) {
    const int bits = 8 * word_bytes;
    for (size_t i = 0; i < count; i += 8) {
        const size_t n = count - i < 8 ? count - i : 8;
        for (int byte = 0; byte < word_bytes; byte++) {
            uint64_t matrix = 0;
            for (size_t j = 0; j < n; j++) {
                matrix |= (uint64_t)(load_word(word_bytes, words, i + j) >> 8 * byte & 255) << 8 * j;
            }
            matrix = transpose8x8(matrix);
            for (int bit = 0; bit < 8; bit++) {
                const int plane = bits - 1 - 8 * byte - bit;
                if (planes[plane] != NULL) {
                    planes[plane][i / 8] = (uint8_t)(matrix >> 8 * bit);
                }
            }
        }
    }
}

static void unpack_row(int word_bytes, const uint8_t *const *planes, size_t count, void *words) {
    const int bits = 8 * word_bytes;
    uint8_t *out = words;
    for (size_t i = 0; i < count; i += 8) {
        const size_t n = count - i < 8 ? count - i : 8;
        for (int byte = 0; byte < word_bytes; byte++) {
            uint64_t matrix = 0;
            for (int bit = 0; bit < 8; bit++) {
                const uint8_t *plane = planes[bits - 1 - 8 * byte - bit];
                if (plane != NULL) {
                    matrix |= (uint64_t)plane[i / 8] << 8 * bit;
                }
            }
            matrix = transpose8x8(matrix);
            for (size_t j = 0; j < n; j++) {
                out[(i + j) * (size_t)word_bytes + (size_t)byte] = (uint8_t)(matrix >> 8 * j);
            }
        }
    }
}

const lynx_kernels lynx_scalar = {
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
    .centre = centre,
    .uncentre = uncentre,
    .fold = fold,
    .unfold = unfold,
    .rescale = rescale,
    .check = check,
    .dequantise = dequantise,
    .rank = rank,
    .unrank = unrank,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};
