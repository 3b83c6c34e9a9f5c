/* CRC32C (Castagnoli; RFC 3720, appendix B.4). Long runs are folded with carry-less multiplications, as in Gopal and
 * others, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009): an accumulator of 16
 * bytes moves past D bytes by multiplying its halves by x^(8D+31) and x^(8D-33) mod P, bit-reflected. */
#include <stdatomic.h>

#include "isa.h"

#define POLYNOMIAL 0x82f63b78u /* reflected */

typedef uint32_t crc_function(uint32_t crc, const uint8_t *p, size_t n);

/* --- portable: eight tables, eight bytes a step */

static uint32_t tables[8][256];
static atomic_bool tables_ready;

static void make_tables(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) {
            value = (value >> 1) ^ ((value & 1) != 0 ? POLYNOMIAL : 0);
        }
        tables[0][i] = value;
    }
    for (int t = 1; t < 8; t++) {
        for (int i = 0; i < 256; i++) {
            tables[t][i] = (tables[t - 1][i] >> 8) ^ tables[0][tables[t - 1][i] & 255];
        }
    }
    atomic_store_explicit(&tables_ready, true, memory_order_release);
}

static uint32_t crc_portable(uint32_t crc, const uint8_t *p, size_t n) {
    if (!atomic_load_explicit(&tables_ready, memory_order_acquire)) {
        make_tables(); /* several threads may: they write the same values */
    }
    for (; n >= 8; p += 8, n -= 8) {
        uint32_t low, high;
        memcpy(&low, p, 4);
        memcpy(&high, p + 4, 4);
        low ^= crc;
        crc = tables[7][low & 255] ^ tables[6][(low >> 8) & 255] ^ tables[5][(low >> 16) & 255] ^ tables[4][low >> 24] ^
              tables[3][high & 255] ^ tables[2][(high >> 8) & 255] ^ tables[1][(high >> 16) & 255] ^ tables[0][high >> 24];
    }
    for (; n > 0; p++, n--) {
        crc = (crc >> 8) ^ tables[0][(crc ^ *p) & 255];
    }
    return crc;
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AHEAD 2048 /* bytes */

#define SSE __attribute__((target("sse4.2,pclmul")))
#define VECTOR __attribute__((target("sse4.2,pclmul,avx512f,avx512vl,vpclmulqdq")))

SSE static uint32_t crc_short(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        crc = (uint32_t)_mm_crc32_u64(crc, word);
    }
    for (; n > 0; p++, n--) {
        crc = _mm_crc32_u8(crc, *p);
    }
    return crc;
}

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
SSE static uint32_t finish(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m128i past = PAST_16;
    a = fold(fold(fold(a, past, b), past, c), past, d);
    return (uint32_t)_mm_crc32_u64(_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(a)), (uint64_t)_mm_extract_epi64(a, 1));
}

SSE static uint32_t crc_sse(uint32_t crc, const uint8_t *p, size_t n) {
    if (n >= 128) {
        const __m128i past = PAST_64, *q = (const __m128i *)p;
        __m128i a = _mm_xor_si128(_mm_loadu_si128(q), _mm_cvtsi32_si128((int)crc));
        __m128i b = _mm_loadu_si128(q + 1), c = _mm_loadu_si128(q + 2), d = _mm_loadu_si128(q + 3);
        for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
            q = (const __m128i *)p;
            a = fold(a, past, _mm_loadu_si128(q));
            b = fold(b, past, _mm_loadu_si128(q + 1));
            c = fold(c, past, _mm_loadu_si128(q + 2));
            d = fold(d, past, _mm_loadu_si128(q + 3));
        }
        crc = finish(a, b, c, d);
    }
    return crc_short(crc, p, n);
}

VECTOR static inline __m512i fold_512(__m512i a, __m512i by, __m512i b) {
    __m512i low = _mm512_clmulepi64_epi128(a, by, 0x00), high = _mm512_clmulepi64_epi128(a, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, b, 0x96); /* the sum of three */
}

VECTOR static uint32_t crc_vector(uint32_t crc, const uint8_t *p, size_t n) {
    if (n >= 512) {
        const __m512i past = _mm512_broadcast_i32x4(constants(0xdcb17aa4, 0xb9e02b86)); /* 256 bytes */
        const __m512i past_64 = _mm512_broadcast_i32x4(PAST_64);
        __m512i a = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
        __m512i b = _mm512_loadu_si512(p + 64), c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
        for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
            for (int line = 0; line < 256; line += 64) { /* the hardware's own prefetching stays 15 % below the memory */
                _mm_prefetch((const char *)p + AHEAD + line, _MM_HINT_T0);
            }
            a = fold_512(a, past, _mm512_loadu_si512(p));
            b = fold_512(b, past, _mm512_loadu_si512(p + 64));
            c = fold_512(c, past, _mm512_loadu_si512(p + 128));
            d = fold_512(d, past, _mm512_loadu_si512(p + 192));
        }
        a = fold_512(fold_512(fold_512(a, past_64, b), past_64, c), past_64, d);
        crc = finish(_mm512_castsi512_si128(a), _mm512_extracti32x4_epi32(a, 1), _mm512_extracti32x4_epi32(a, 2),
                     _mm512_extracti32x4_epi32(a, 3));
    }
    return crc_sse(crc, p, n);
}

static crc_function *choose(void) {
    const int isa = lynx_isa();
    __builtin_cpu_init();
    if (isa == LYNX_ISA_SCALAR || !__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("pclmul")) {
        return crc_portable;
    }
    return isa == LYNX_ISA_AVX512 && __builtin_cpu_supports("vpclmulqdq") ? crc_vector : crc_sse;
}

#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>

static uint32_t crc_arm(uint32_t crc, const uint8_t *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        crc = __crc32cd(crc, word);
    }
    for (; n > 0; p++, n--) {
        crc = __crc32cb(crc, *p);
    }
    return crc;
}

static crc_function *choose(void) {
    return lynx_isa() == LYNX_ISA_SCALAR ? crc_portable : crc_arm;
}

#else

static crc_function *choose(void) {
    return crc_portable;
}

#endif

uint32_t lynx_crc32c(uint32_t crc, const void *data, size_t size) {
    /* Asking the processor what it can do takes microseconds in a virtual machine: once for each selection of kernels. */
    static _Atomic(const lynx_kernels *) chosen_with;
    static _Atomic(crc_function *) chosen;
    const lynx_kernels *kernels = lynx_current();
    if (atomic_load_explicit(&chosen_with, memory_order_acquire) != kernels) {
        atomic_store_explicit(&chosen, choose(), memory_order_relaxed);
        atomic_store_explicit(&chosen_with, kernels, memory_order_release);
    }
    return ~atomic_load_explicit(&chosen, memory_order_relaxed)(~crc, data, size);
}
