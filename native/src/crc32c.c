/* CRC32C (Castagnoli; RFC 3720, appendix B.4). Long runs are folded (crc.h). */
#include <stdatomic.h>

#include "crc.h"
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

SSE static uint32_t crc_sse(uint32_t crc, const uint8_t *p, size_t n) {
    if (n >= 128) {
        const __m128i past = PAST_64, *q = (const __m128i *)p;
        __m128i a = _mm_xor_si128(_mm_loadu_si128(q), _mm_cvtsi32_si128((int)crc));
        __m128i b = _mm_loadu_si128(q + 1), c = _mm_loadu_si128(q + 2), d = _mm_loadu_si128(q + 3);
        for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
            FETCH(p);
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

VECTOR static uint32_t crc_vector(uint32_t crc, const uint8_t *p, size_t n) {
    if (n >= 512) {
        const __m512i past = _mm512_broadcast_i32x4(PAST_256);
        __m512i sum[4];
        begin_512(sum, crc, p);
        for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
            for (int i = 0; i < 4; i++) {
                FETCH(p + 64 * i);
                sum[i] = fold_512(sum[i], past, _mm512_loadu_si512(p + 64 * i));
            }
        }
        crc = finish_512(sum);
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
