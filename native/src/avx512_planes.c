/* Codes and their planes for AVX-512: quantising, and both ways between codes and planes that are not folded. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx512.h"

#define INTEGERS 0x1.8p23f /* binary32 near it holds integers only: what is added is rounded to one, in the lower bits */

/* At most so many bits of level 2 for integers from 4 i to 4 i + 3, as bytes: from 0 up, and from -128 on, which are last. The
 * largest have a bit less, as in avx2.c. */
#define RANK_BITS _mm512_set_epi8(8, 6, 5, 5, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 6, 28)

/* To the nearest integer, of products that are no ties: inverses are a little larger than 1 / s. Returns the bound on the bits
 * of level 2 if that is `wanted`. A row `ahead` is fetched with each: more at once would keep other loads waiting. */
INLINE uint64_t quantise_as(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_params *params,
                            __mmask64 used, bool wanted, const lynx_stretch *ahead, ptrdiff_t ahead_stride, uint8_t *codes) {
    __m512 inverse[4], offset[4];
    float offsets[ROW];
    uint32_t zeros[ROW]; /* offsets modulo 256, in each byte */
    for (int g = 0; g < ROW; g++) {
        offsets[g] = INTEGERS + (float)params->offset[g];
        zeros[g] = (uint32_t)(params->offset[g] & 255) * 0x01010101u;
    }
    for (int i = 0; i < 2; i++) {
        even_odd(params->inverse + 32 * i, &inverse[2 * i], &inverse[2 * i + 1]);
        even_odd(offsets + 32 * i, &offset[2 * i], &offset[2 * i + 1]);
    }
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i within = _mm512_setr_epi32(0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100, 0x05040100,
                                             0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302, 0x07060302);
    const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x08080808)), within);
    const __m512i lowest = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)); /* byte of 32 bits */
    const __m512i none = _mm512_setzero_si512(), bits_of = RANK_BITS;
    __m512i zero = lower_bytes(load(params->offset), load(params->offset + 32)), few = none, sum = none;
    lynx_scout scout = lynx_scout_of(ahead, ahead_stride);
    for (int t = 0; t < tokens; t++) {
        lynx_fetch_row(&scout);
        if (part == LYNX_KEY) { /* values were read for their range just now */
            lynx_fetch_near(rows + t * stride, stride);
        }
        if (part == LYNX_VALUE) {
            inverse[0] = inverse[1] = inverse[2] = inverse[3] = _mm512_set1_ps(params->inverse[t]);
            offset[0] = offset[1] = offset[2] = offset[3] = _mm512_set1_ps(offsets[t]);
        }
        __m512i code[4];
        for (int i = 0; i < 2; i++) {
            const __m512i words = load(rows + t * stride + 32 * i);
            __m512 even, odd;
            if (dtype == LYNX_BFLOAT16) {
                even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
                odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
            } else {
                even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
                odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
            }
            code[2 * i] = _mm512_castps_si512(_mm512_fmadd_ps(even, inverse[2 * i], offset[2 * i]));
            code[2 * i + 1] = _mm512_castps_si512(_mm512_fmadd_ps(odd, inverse[2 * i + 1], offset[2 * i + 1]));
        }
        __m512i bytes = _mm512_mask_shuffle_epi8(code[0], 0x2222222222222222ull, code[1], lowest);
        bytes = _mm512_mask_shuffle_epi8(bytes, 0x4444444444444444ull, code[2], lowest);
        bytes = _mm512_mask_shuffle_epi8(bytes, 0x8888888888888888ull, code[3], lowest);
        bytes = _mm512_permutexvar_epi8(order, bytes);
        store(codes + t * ROW, bytes);
        if (wanted) { /* integers modulo 256 are no larger than those they stand for, and their bits no fewer */
            zero = part == LYNX_KEY ? zero : _mm512_set1_epi32((int)zeros[t]);
            const __m512i fours = _mm512_srli_epi16(_mm512_sub_epi8(bytes, zero), 2); /* in the lower 6 bits of each byte */
            few = _mm512_add_epi8(few, _mm512_maskz_permutexvar_epi8(used, fours, bits_of));
            if (t % 8 == 7 || t == tokens - 1) { /* 8 times 28 is a byte */
                sum = _mm512_add_epi64(sum, _mm512_sad_epu8(few, none));
                few = none;
            }
        }
    }
    return wanted ? (uint64_t)_mm512_reduce_add_epi64(sum) : 0;
}

void lynx_avx512_quantise(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens,
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

uint64_t lynx_avx512_quantise_ahead(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_planes *planes,
                               const lynx_params *params, bool bounded, const lynx_stretch *ahead, ptrdiff_t ahead_stride,
                               uint8_t *codes) {
    const __mmask64 used = planes->used;
    if (part == LYNX_KEY) {
        return quantise_as(LYNX_KEY, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, NULL, 0, codes);
    }
    return ahead == NULL ? quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, NULL, 0, codes)
           : bounded ? quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, true, ahead, ahead_stride, codes)
                     : quantise_as(LYNX_VALUE, LYNX_BFLOAT16, rows, stride, tokens, params, used, false, ahead, ahead_stride, codes);
}

/* Registers 4..7 as `transpose` makes them. */
INLINE void transpose_to_upper(__m512i *r) {
    for (int i = 0; i < 4; i++) {
        r[i + 4] = _mm512_ternarylogic_epi64(_mm512_srli_epi16(r[i], 4), r[i + 4], _mm512_set1_epi8(0x0f), 0xe4);
    }
    SWAP(r[4], r[6], 2, 0x33);
    SWAP(r[5], r[7], 2, 0x33);
    SWAP(r[4], r[5], 1, 0x55);
    SWAP(r[6], r[7], 1, 0x55);
}

void lynx_avx512_shuffles(lynx_planes *planes) {
    const __m512i channel = _mm512_set_epi8(63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int p = 0; p < 8; p++) {
        const __mmask64 early = planes->in_anchor[p], late = planes->used & ~early;
        const int count = planes->anchor_count[p];
        const __m512i first = _mm512_maskz_compress_epi8(early, channel), others = _mm512_maskz_compress_epi8(late, channel);
        store(planes->order[p], _mm512_mask_expand_epi8(first, from_byte(count), others));
        const __m512i behind = _mm512_add_epi8(channel, _mm512_set1_epi8((char)count));
        store(planes->place[p], _mm512_mask_expand_epi8(_mm512_maskz_expand_epi8(early, channel), late, behind));
    }
}

void lynx_avx512_pack(const lynx_planes *planes, const uint8_t *codes, int tokens, uint8_t *anchor, uint8_t *rest) {
    const int bits = planes->widths[0];
    for (int first = 0; first < tokens; first += 8, codes += 8 * ROW) {
        __m512i r[8];
        for (int t = 0; t < 8; t++) {
            r[t] = load(codes + t * ROW);
        }
        if (rest == NULL && planes->in_anchor[4] == 0) {
            transpose_to_upper(r);
        } else {
            transpose(r, false);
        }
        if (planes->uniform) {
            for (int p = 0; p < 8; p++) {
                if (p < bits && anchor != NULL) {
                    store(anchor + ROW * p, r[7 - p]);
                } else if (p >= bits && rest != NULL) {
                    store(rest + ROW * (p - bits), r[7 - p]);
                }
            }
            anchor = anchor == NULL ? NULL : anchor + planes->anchor_octet;
            rest = rest == NULL ? NULL : rest + planes->rest_octet;
            continue;
        }
        for (int p = 0; p < 8; p++) {
            const int count = planes->anchor_count[p];
            const __m512i v = _mm512_permutexvar_epi8(load(planes->order[p]), r[7 - p]);
            if (anchor != NULL && count != 0) {
                store(anchor, v);
                anchor += count;
            }
            if (rest != NULL && count != planes->channels) {
                _mm512_mask_storeu_epi8(rest - count, from_byte(count), v);
                rest += planes->channels - count;
            }
        }
    }
}

INLINE void unpack_uniform(int bits, const uint8_t *anchor, const uint8_t *rest, int octets, bool upper,
                           uint8_t *codes) {
    for (int octet = 0; octet < octets; octet++, codes += 8 * ROW) {
        __m512i r[8];
        for (int p = 0; p < (upper ? 4 : 8); p++) {
            if (p < bits) {
                r[7 - p] = load(anchor + (octet * bits + p) * ROW);
            } else {
                r[7 - p] = rest == NULL ? _mm512_setzero_si512() : load(rest + (octet * (8 - bits) + p - bits) * ROW);
            }
        }
        transpose(r, upper);
        for (int t = 0; t < 8; t++) {
            store(codes + t * ROW, r[t]);
        }
    }
}

void lynx_avx512_unpack(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int tokens, uint8_t *codes) {
    const int octets = (tokens + 7) / 8;
    if (planes->uniform) {
        if (rest == NULL && planes->widths[0] <= 4) {
            unpack_uniform(planes->widths[0], anchor, rest, octets, true, codes);
        } else {
            unpack_uniform(planes->widths[0], anchor, rest, octets, false, codes);
        }
        return;
    }
    for (int octet = 0; octet < octets; octet++, codes += 8 * ROW) {
        __m512i r[8];
        for (int p = 0; p < 8; p++) {
            r[7 - p] = mixed_plane(planes, p, anchor, rest);
            anchor += planes->anchor_count[p];
            rest = rest == NULL ? NULL : rest + planes->channels - planes->anchor_count[p];
        }
        transpose(r, false);
        for (int t = 0; t < 8; t++) {
            store(codes + t * ROW, r[t]);
        }
    }
}

AVX512_END
#endif
