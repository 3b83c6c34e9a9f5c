/* NEON kernels (aarch64). The same bytes as scalar.c; the comments there say what is computed, here only how. What is
 * bound by single bits or rare stays with the portable kernels. */
#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "params.h"
#include "words.h"

/* Bits of x where mask is set, moved down; and the reverse. */
static inline uint64_t compress64(uint64_t x, uint64_t mask) {
    uint64_t out = 0;
    for (int n = 0; mask != 0; mask &= mask - 1, n++) {
        out |= (x >> __builtin_ctzll(mask) & 1) << n;
    }
    return out;
}

static inline uint64_t expand64(uint64_t x, uint64_t mask) {
    uint64_t out = 0;
    for (; mask != 0; mask &= mask - 1, x >>= 1) {
        out |= (x & 1) << __builtin_ctzll(mask);
    }
    return out;
}

#define COMPRESS64 compress64
#define EXPAND64 expand64
#define POPCOUNT64 __builtin_popcountll
#include "fold.h"
#include "ranks.h"
#include "rows.h"

#define INLINE static inline __attribute__((always_inline))

INLINE int16x8_t ordered16(const uint16_t *words) {
    const int16x8_t w = vreinterpretq_s16_u16(vld1q_u16(words));
    return veorq_s16(w, vandq_s16(vshrq_n_s16(w, 15), vdupq_n_s16(0x7fff)));
}

static void range(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high) {
    int16x8_t least[8], largest[8];
    for (int t = 0; t < tokens; t++, rows += stride) {
        for (int i = 0; i < 8; i++) {
            const int16x8_t o = ordered16(rows + 8 * i);
            const bool first = part == LYNX_KEY && t == 0;
            const int at = part == LYNX_KEY ? i : 0;
            const bool starts = part == LYNX_KEY ? first : i == 0;
            least[at] = starts ? o : vminq_s16(least[at], o);
            largest[at] = starts ? o : vmaxq_s16(largest[at], o);
        }
        if (part == LYNX_VALUE) {
            low[t] = vminvq_s16(least[0]);
            high[t] = vmaxvq_s16(largest[0]);
        }
    }
    for (int i = 0; i < 8 && part == LYNX_KEY; i++) {
        vst1q_s16(low + 8 * i, least[i]);
        vst1q_s16(high + 8 * i, largest[i]);
    }
}

static void choose(int dtype, const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params) {
    if (dtype == LYNX_BFLOAT16) {
        choose_as(LYNX_BFLOAT16, planes, low, high, params);
    } else {
        choose_as(LYNX_FLOAT16, planes, low, high, params);
    }
}

INLINE int32x4_t rounded(float32x4_t magnitude, float32x4_t inverse) {
    return vcvtq_s32_f32(vaddq_f32(vmulq_f32(magnitude, inverse), vdupq_n_f32(0.5f)));
}

/* Eight words as two registers of magnitudes. */
INLINE void magnitudes(int dtype, uint16x8_t words, float32x4_t *first, float32x4_t *second) {
    const uint16x8_t magnitude = vandq_u16(words, vdupq_n_u16(0x7fff));
    if (dtype == LYNX_BFLOAT16) {
        *first = vreinterpretq_f32_u16(vzip1q_u16(vdupq_n_u16(0), magnitude));
        *second = vreinterpretq_f32_u16(vzip2q_u16(vdupq_n_u16(0), magnitude));
    } else {
        *first = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(magnitude)));
        *second = vcvt_high_f32_f16(vreinterpretq_f16_u16(magnitude));
    }
}

static void quantise(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens,
                     const lynx_planes *planes, const lynx_params *params, uint8_t *codes) {
    (void)planes; /* codes of finite words are in range without clamping */
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < ROW; c += 8) {
            const uint16x8_t words = vld1q_u16(rows + t * stride + c);
            const bool key = part == LYNX_KEY;
            float32x4_t first, second;
            magnitudes(dtype, words, &first, &second);
            const int32x4_t k1 = rounded(first, key ? vld1q_f32(params->inverse + c) : vdupq_n_f32(params->inverse[t]));
            const int32x4_t k2 = rounded(second, key ? vld1q_f32(params->inverse + c + 4) : vdupq_n_f32(params->inverse[t]));
            const int16x8_t a = vcombine_s16(vmovn_s32(k1), vmovn_s32(k2));
            const int16x8_t sign = vshrq_n_s16(vreinterpretq_s16_u16(words), 15);
            const int16x8_t k = vsubq_s16(veorq_s16(a, sign), sign);
            const int16x8_t offset = key ? vld1q_s16(params->offset + c) : vdupq_n_s16(params->offset[t]);
            vst1_u8(codes + t * ROW + c, vmovn_u16(vreinterpretq_u16_s16(vaddq_s16(k, offset))));
        }
    }
}

/* One stage of a bit-matrix transpose: the bits of `b` that `mask` selects and those of `a`, `shift` higher, change
 * places in every byte. */
#define SWAP(a, b, shift, mask)                                                                                        \
    do {                                                                                                               \
        const uint8x16_t difference = vandq_u8(veorq_u8(vshrq_n_u8(a, shift), b), vdupq_n_u8(mask));                   \
        b = veorq_u8(b, difference);                                                                                   \
        a = veorq_u8(a, vshlq_n_u8(difference, shift));                                                                \
    } while (0)

#define VECTOR uint8x16_t
#define NO_BITS vdupq_n_u8(0)
#include "transpose.h"

static void pack(const lynx_planes *planes, const uint8_t *codes, int tokens, uint8_t *anchor, uint8_t *rest) {
    const int bits = planes->widths[0];
    for (int first = 0; first < tokens; first += 8, codes += 8 * ROW) {
        uint8x16_t r[4][8];
        for (int lane = 0; lane < 4; lane++) {
            for (int t = 0; t < 8; t++) {
                r[lane][t] = vld1q_u8(codes + t * ROW + 16 * lane);
            }
            transpose(r[lane], false);
        }
        for (int p = 0; p < 8; p++) {
            for (int lane = 0; lane < 4; lane++) { /* later stores cover what earlier ones overrun */
                const uint8x16_t v = r[lane][7 - p];
                if (!planes->uniform) {
                    if (anchor != NULL) {
                        vst1q_u8(anchor + planes->anchor_rank[p][lane],
                                 vqtbl1q_u8(v, vld1q_u8(planes->anchor_compress[p] + 16 * lane)));
                    }
                    if (rest != NULL) {
                        vst1q_u8(rest + planes->rest_rank[p][lane],
                                 vqtbl1q_u8(v, vld1q_u8(planes->rest_compress[p] + 16 * lane)));
                    }
                } else if (p < bits && anchor != NULL) {
                    vst1q_u8(anchor + ROW * p + 16 * lane, v);
                } else if (p >= bits && rest != NULL) {
                    vst1q_u8(rest + ROW * (p - bits) + 16 * lane, v);
                }
            }
            if (!planes->uniform) {
                anchor = anchor == NULL ? NULL : anchor + planes->anchor_count[p];
                rest = rest == NULL ? NULL : rest + planes->channels - planes->anchor_count[p];
            }
        }
        if (planes->uniform) {
            anchor = anchor == NULL ? NULL : anchor + planes->anchor_octet;
            rest = rest == NULL ? NULL : rest + planes->rest_octet;
        }
    }
}

static void unpack(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int tokens, uint8_t *codes) {
    const int bits = planes->widths[0];
    for (int first = 0; first < tokens; first += 8, codes += 8 * ROW) {
        uint8x16_t r[4][8];
        for (int p = 0; p < 8; p++) {
            for (int lane = 0; lane < 4; lane++) {
                uint8x16_t v = vdupq_n_u8(0);
                if (!planes->uniform) {
                    v = vqtbl1q_u8(vld1q_u8(anchor + planes->anchor_rank[p][lane]),
                                   vld1q_u8(planes->anchor_expand[p] + 16 * lane));
                    if (rest != NULL) {
                        v = vorrq_u8(v, vqtbl1q_u8(vld1q_u8(rest + planes->rest_rank[p][lane]),
                                                   vld1q_u8(planes->rest_expand[p] + 16 * lane)));
                    }
                } else if (p < bits) {
                    v = vld1q_u8(anchor + ROW * p + 16 * lane);
                } else if (rest != NULL) {
                    v = vld1q_u8(rest + ROW * (p - bits) + 16 * lane);
                }
                r[lane][7 - p] = v;
            }
            if (!planes->uniform) {
                anchor += planes->anchor_count[p];
                rest = rest == NULL ? NULL : rest + planes->channels - planes->anchor_count[p];
            }
        }
        if (planes->uniform) {
            anchor += planes->anchor_octet;
            rest = rest == NULL ? NULL : rest + planes->rest_octet;
        }
        for (int lane = 0; lane < 4; lane++) {
            transpose(r[lane], false);
            for (int t = 0; t < 8; t++) {
                vst1q_u8(codes + t * ROW + 16 * lane, r[lane][t]);
            }
        }
    }
}

static bool check(int part, const uint8_t *codes, int tokens, const lynx_planes *planes) {
    uint8_t valid[ROW];
    for (int c = 0; c < ROW; c++) {
        valid[c] = c < planes->channels ? 255 : 0;
    }
    uint8x16_t bad = vdupq_n_u8(0);
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < ROW; c += 16) {
            const uint8x16_t code = vld1q_u8(codes + t * ROW + c);
            const uint8x16_t low = part == LYNX_KEY ? vld1q_u8(planes->low + c) : vdupq_n_u8(planes->low[t]);
            const uint8x16_t high = part == LYNX_KEY ? vld1q_u8(planes->high + c) : vdupq_n_u8(planes->high[t]);
            const uint8x16_t out = vorrq_u8(vcltq_u8(code, low), vcgtq_u8(code, high));
            bad = vorrq_u8(bad, vandq_u8(out, vld1q_u8(valid + c)));
        }
    }
    return vmaxvq_u8(bad) == 0;
}

/* k * s of eight codes. */
INLINE void scaled(int part, const uint8_t *codes, int token, int c, const lynx_params *params, float32x4_t *first,
                   float32x4_t *second) {
    const bool key = part == LYNX_KEY;
    const int16x8_t code = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(codes + token * ROW + c)));
    const int16x8_t k = vsubq_s16(code, key ? vld1q_s16(params->offset + c) : vdupq_n_s16(params->offset[token]));
    *first = vmulq_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(k))),
                       key ? vld1q_f32(params->scale + c) : vdupq_n_f32(params->scale[token]));
    *second = vmulq_f32(vcvtq_f32_s32(vmovl_high_s16(k)),
                        key ? vld1q_f32(params->scale + c + 4) : vdupq_n_f32(params->scale[token]));
}

/* The upper halves of x + `more`. */
INLINE uint16x8_t words_above(float32x4_t first, float32x4_t second, uint32_t more) {
    return vcombine_u16(vaddhn_u32(vreinterpretq_u32_f32(first), vdupq_n_u32(more)),
                        vaddhn_u32(vreinterpretq_u32_f32(second), vdupq_n_u32(more)));
}

static void dequantise(int part, int dtype, const uint8_t *codes, int tokens, const lynx_params *params,
                       const int16_t *shifts, uint16_t *const *rows) {
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < ROW; c += 8) {
            float32x4_t first, second;
            scaled(part, codes, t, c, params, &first, &second);
            if (dtype == LYNX_BFLOAT16) {
                uint16x8_t words = words_above(first, second, 0x8000);
                if (shifts != NULL) { /* of words that are not zero */
                    const uint16x8_t some = vtstq_u16(words, vdupq_n_u16(0x7fff));
                    words = vaddq_u16(words, vandq_u16(some, vreinterpretq_u16_s16(vld1q_s16(shifts + c))));
                }
                vst1q_u16(rows[t] + c, words);
            } else {
                const float32x4_t top = vdupq_n_f32(65504.0f), bottom = vdupq_n_f32(-65504.0f);
                const float16x4_t w1 = vcvt_f16_f32(vmaxq_f32(vminq_f32(first, top), bottom));
                const float16x8_t w = vcvt_high_f16_f32(w1, vmaxq_f32(vminq_f32(second, top), bottom));
                vst1q_u16(rows[t] + c, vreinterpretq_u16_f16(w));
            }
        }
    }
}

/* --- level 2 of bfloat16 ---------------------------------------------------------------------------------------- */

/* Cells of a row: least magnitude words, numbers of words (0 for zero cells), signs. */
INLINE void cells_of(int part, const uint8_t *codes, int token, const lynx_params *params, uint16_t *low,
                     uint16_t *count, uint16_t *sign) {
    for (int c = 0; c < ROW; c += 8) {
        const bool key = part == LYNX_KEY;
        float32x4_t x1, x2;
        scaled(part, codes, token, c, params, &x1, &x2);
        const float32x4_t s1 = key ? vld1q_f32(params->scale + c) : vdupq_n_f32(params->scale[token]);
        const float32x4_t s2 = key ? vld1q_f32(params->scale + c + 4) : s1;
        const float32x4_t h1 = vmulq_n_f32(s1, 0.5f), h2 = vmulq_n_f32(s2, 0.5f);
        const uint16x8_t word = words_above(x1, x2, 0);
        x1 = vabsq_f32(x1);
        x2 = vabsq_f32(x2);
        const uint16x8_t least = words_above(vsubq_f32(x1, h1), vsubq_f32(x2, h2), 0xffff);
        const uint16x8_t next = words_above(vaddq_f32(x1, h1), vaddq_f32(x2, h2), 0xffff);
        const uint16x8_t zero = vceqq_u16(vshlq_n_u16(word, 1), vdupq_n_u16(0));
        vst1q_u16(low + c, least);
        vst1q_u16(count + c, vorrq_u16(vsubq_u16(next, least), zero)); /* 0xffff */
        vst1q_u16(sign + c, vandq_u16(word, vdupq_n_u16(0x8000)));
    }
}

#define ZERO_CELL 0xffff

static void rank(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                 int channels, const lynx_params *params, lynx_streams *streams) {
    if (dtype == LYNX_FLOAT16) {
        lynx_scalar.rank(part, dtype, rows, stride, codes, tokens, channels, params, streams);
        return;
    }
    zero_list zeros;
    zeros.count = 0;
    bit_writer a = {streams->a, 0, 0}, b = {streams->b, 0, 0};
    for (int t = 0; t < tokens; t++) {
        lynx_fetch(&streams->ahead, (uint32_t)t);
        uint16_t low[ROW], count[ROW], sign[ROW];
        cells_of(part, codes, t, params, low, count, sign);
        for (int c = 0; c < channels; c++) {
            if (__builtin_expect(count[c] == ZERO_CELL, 0)) {
                zeros.at[zeros.count++] = (uint16_t)(ROW * t + c);
                continue;
            }
            const uint32_t magnitude = rows[t * stride + c] & 0x7fff;
            const uint32_t r = magnitude - low[c], width = (uint32_t)floor_log2(count[c]);
            const uint32_t field = r & ((1u << width) - 1);
            put(&a, field, width);
            put(&b, r >> width, field < count[c] - (1u << width));
        }
    }
    streams->a_bits = position(&a, streams->a);
    streams->b_bits = position(&b, streams->b);
    rank_zeros(part, dtype, &zeros, rows, stride, params, streams);
}

static int unrank(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                  lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows) {
    if (dtype == LYNX_FLOAT16) {
        return lynx_scalar.unrank(part, dtype, codes, tokens, channels, params, streams, shifts, rows);
    }
    uint32_t a_bits = 0, b_bits = 0;
    zero_list zeros;
    zeros.count = 0;
    for (int t = 0; t < tokens; t++) {
        lynx_fetch(&streams->ahead, (uint32_t)t);
        uint16_t low[ROW], count[ROW], sign[ROW];
        cells_of(part, codes, t, params, low, count, sign);
        for (int c = 0; c < channels; c++) {
            if (__builtin_expect(count[c] == ZERO_CELL, 0)) {
                zeros.at[zeros.count++] = (uint16_t)(ROW * t + c);
                continue;
            }
            if (count[c] == 0) {
                return LYNX_ERR_RANK;
            }
            const int width = floor_log2(count[c]);
            const uint32_t field = get_bits(streams->a, a_bits, width);
            const uint32_t more = field < count[c] - (1u << width);
            const uint32_t above = (streams->more[b_bits >> 3] >> (b_bits & 7) & more) << width;
            a_bits += (uint32_t)width;
            b_bits += more;
            rows[t][c] = (uint16_t)(((low[c] + field + above) | sign[c]) + (uint32_t)(shifts == NULL ? 0 : shifts[c]));
        }
    }
    streams->a_bits = a_bits;
    streams->b_bits = b_bits;
    return unrank_zeros(part, dtype, &zeros, shifts, rows, params, streams) ? LYNX_OK : LYNX_ERR_RANK;
}

/* As in avx2.c. */
static uint64_t rank_bound(int part, const uint8_t *codes, int tokens, int channels, const lynx_params *params) {
    static const uint8_t BELOW_16[16] = {28, 8, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 5, 5, 5, 5};
    static const uint8_t FROM_16[16] = {255, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint8x16_t below_16 = vld1q_u8(BELOW_16), from_16 = vld1q_u8(FROM_16);
    uint8_t offsets[ROW], valid[ROW];
    for (int g = 0; g < ROW; g++) { /* an offset outside a byte makes integers larger than they count here */
        const int offset = params->offset[g];
        offsets[g] = (uint8_t)(offset < 0 ? 0 : offset > 255 ? 255 : offset);
        valid[g] = g < channels ? 255 : 0;
    }
    uint64_t sum = 0;
    for (int t = 0; t < tokens; t++) {
        for (int c = 0; c < ROW; c += 16) {
            const uint8x16_t code = vld1q_u8(codes + t * ROW + c);
            const uint8x16_t a = vabdq_u8(code, part == LYNX_KEY ? vld1q_u8(offsets + c) : vdupq_n_u8(offsets[t]));
            const uint8x16_t low = vqtbl1q_u8(below_16, vandq_u8(a, vdupq_n_u8(15)));
            const uint8x16_t bits = vminq_u8(low, vqtbl1q_u8(from_16, vshrq_n_u8(a, 4)));
            sum += vaddlvq_u8(vandq_u8(bits, vld1q_u8(valid + c)));
        }
    }
    return sum;
}

static void pack_row(int word_bytes, const void *words, size_t count, uint8_t *const *planes) {
    lynx_scalar.pack_row(word_bytes, words, count, planes);
}

static void unpack_row(int word_bytes, const uint8_t *const *planes, size_t count, void *words) {
    lynx_scalar.unpack_row(word_bytes, planes, count, words);
}

static void shuffles(lynx_planes *planes) {
    memset(planes->anchor_expand, 0x80, sizeof planes->anchor_expand);
    memset(planes->anchor_compress, 0x80, sizeof planes->anchor_compress);
    memset(planes->rest_expand, 0x80, sizeof planes->rest_expand);
    memset(planes->rest_compress, 0x80, sizeof planes->rest_compress);
    for (int p = 0; p < 8; p++) {
        uint8_t anchor = 0, rest = 0;
        for (int lane = 0; lane < ROW; lane += 16) {
            planes->anchor_rank[p][lane / 16] = anchor;
            planes->rest_rank[p][lane / 16] = rest;
            uint8_t in_anchor = 0, in_rest = 0;
            for (uint8_t c = 0; c < 16 && lane + c < planes->channels; c++) {
                if (p < planes->widths[lane + c]) {
                    planes->anchor_expand[p][lane + c] = in_anchor;
                    planes->anchor_compress[p][lane + in_anchor++] = c;
                } else {
                    planes->rest_expand[p][lane + c] = in_rest;
                    planes->rest_compress[p][lane + in_rest++] = c;
                }
            }
            anchor = (uint8_t)(anchor + in_anchor);
            rest = (uint8_t)(rest + in_rest);
        }
    }
}

const lynx_kernels lynx_neon = {
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
    .centre = centre,
    .uncentre = uncentre,
    .fold = fold,
    .unfold = unfold,
    .rescale = rescale,
    .dequantise = dequantise,
    .rank = rank,
    .unrank = unrank,
    .rank_bound = rank_bound,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
};
#endif
