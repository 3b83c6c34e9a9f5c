/* CRC32C by carry-less multiplication, as in Gopal and others, "Fast CRC Computation for Generic Polynomials Using
 * PCLMULQDQ Instruction" (Intel, 2009): an accumulator of 16 bytes moves past D bytes by multiplying its halves by
 * x^(8D+31) and x^(8D-33) mod P, bit-reflected. */
#ifndef LYNX_CRC_H
#define LYNX_CRC_H

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

/* What is summed usually comes from memory, and the hardware's own prefetching stays a third below what a core can read. Lines
 * are asked for twice: far ahead into the second cache, which may wait for more of them, then into the first. */
#define FAR 6144 /* bytes */
#define NEAR 1024
#define FETCH(p) (_mm_prefetch((const char *)(p) + FAR, _MM_HINT_T1), _mm_prefetch((const char *)(p) + NEAR, _MM_HINT_T0))

#define SSE __attribute__((target("sse4.2,pclmul")))
#define VECTOR __attribute__((target("sse4.2,pclmul,avx512f,avx512vl,vpclmulqdq")))

SSE static inline __m128i constants(uint32_t low, uint32_t high) {
    return _mm_set_epi64x(high, low);
}

/* `a`, moved past the bytes that `by` stands for, plus `b`. */
SSE static inline __m128i fold(__m128i a, __m128i by, __m128i b) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(a, by, 0x00), _mm_clmulepi64_si128(a, by, 0x11)), b);
}

#define PAST_16 constants(0xf20c0dfe, 0x493c7d27)
#define PAST_64 constants(0x740eef02, 0x9e4addf8)

/* The CRC of four accumulators one after the other. */
SSE static inline uint32_t finish(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m128i past = PAST_16;
    a = fold(fold(fold(a, past, b), past, c), past, d);
    return (uint32_t)_mm_crc32_u64(_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(a)), (uint64_t)_mm_extract_epi64(a, 1));
}

#define PAST_256 constants(0xdcb17aa4, 0xb9e02b86)

VECTOR static inline __m512i fold_512(__m512i a, __m512i by, __m512i b) {
    __m512i low = _mm512_clmulepi64_epi128(a, by, 0x00), high = _mm512_clmulepi64_epi128(a, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, b, 0x96); /* the sum of three */
}

/* Four accumulators of 64 bytes, of which the first takes `crc` in; all of the first 256 bytes. */
VECTOR static inline void begin_512(__m512i sum[4], uint32_t crc, const uint8_t *p) {
    for (int i = 0; i < 4; i++) {
        sum[i] = _mm512_loadu_si512(p + 64 * i);
    }
    sum[0] = _mm512_xor_si512(sum[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
}

VECTOR static inline uint32_t finish_512(const __m512i sum[4]) {
    const __m512i past_64 = _mm512_broadcast_i32x4(PAST_64);
    const __m512i a = fold_512(fold_512(fold_512(sum[0], past_64, sum[1]), past_64, sum[2]), past_64, sum[3]);
    return finish(_mm512_castsi512_si128(a), _mm512_extracti32x4_epi32(a, 1), _mm512_extracti32x4_epi32(a, 2),
                  _mm512_extracti32x4_epi32(a, 3));
}
#endif
#endif
