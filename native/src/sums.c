/* CRC32C and XXH3-128 of the same bytes in one pass: reading them from memory takes longer than both. XXH3 is specified in
 * the xxHash project's doc/xxhash_spec.md ("XXH3 Algorithm Overview"); here is its form for more than 240 bytes. */
#include <errno.h>
#include <stdatomic.h>
#include <sys/socket.h>

#include "crc.h"
#include "isa.h"

#define STRIPE 64
#define BLOCK 1024 /* bytes: 16 stripes, each with the secret 8 bytes further on, then a scramble */
#define HOT 16384 /* bytes that a core's first cache holds, for the second of two sums */
#define PIECE (256 << 10) /* bytes that its second cache holds, for sums of what was just received */

#define PRIME32_1 0x9e3779b1u
#define PRIME32_2 0x85ebca77u
#define PRIME32_3 0xc2b2ae3du
#define PRIME64_1 0x9e3779b185ebca87u
#define PRIME64_2 0xc2b2ae3d27d4eb4fu
#define PRIME64_3 0x165667b19e3779f9u
#define PRIME64_4 0x85ebca77c2b2ae63u
#define PRIME64_5 0x27d4eb2f165667c5u
#define PRIME_AVALANCHE 0x165667919e3779f9u

/* The specification's default secret. */
static const _Alignas(64) uint8_t secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
#define SCRAMBLE_SECRET (secret + sizeof secret - STRIPE)
#define LAST_SECRET (secret + sizeof secret - STRIPE - 7)

/* Both sums of whole blocks. */
typedef void blocks_function(lynx_sums *sums, const uint8_t *p, size_t blocks);

static inline uint64_t read64(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
}

static void accumulate(uint64_t lanes[8], const uint8_t *p, const uint8_t *key) {
    for (int i = 0; i < 8; i++) {
        const uint64_t value = read64(p + 8 * i), mixed = value ^ read64(key + 8 * i);
        lanes[i ^ 1] += value;
        lanes[i] += (mixed & 0xffffffffu) * (mixed >> 32);
    }
}

static void blocks_portable(lynx_sums *sums, const uint8_t *p, size_t blocks) {
    sums->crc = lynx_crc32c(sums->crc, p, blocks * BLOCK);
    for (; blocks > 0; blocks--, p += BLOCK) {
        for (int n = 0; n < BLOCK / STRIPE; n++) {
            accumulate(sums->lanes, p + n * STRIPE, secret + 8 * n);
        }
        for (int i = 0; i < 8; i++) {
            uint64_t lane = sums->lanes[i];
            lane ^= lane >> 47;
            sums->lanes[i] = (lane ^ read64(SCRAMBLE_SECRET + 8 * i)) * PRIME32_1;
        }
    }
}

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i accumulate_256(__m256i lanes, __m256i value, __m256i key) {
    const __m256i mixed = _mm256_xor_si256(value, key);
    const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    return _mm256_add_epi64(lanes, _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4e)));
}

AVX2 static inline __m256i scramble_256(__m256i lanes, __m256i key) {
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    lanes = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), key);
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(lanes, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(lanes, prime), _mm256_slli_epi64(high, 32));
}

#define LOAD_256(p) _mm256_loadu_si256((const __m256i *)(p))

AVX2 static void blocks_avx2(lynx_sums *sums, const uint8_t *p, size_t blocks) {
    sums->crc = lynx_crc32c(sums->crc, p, blocks * BLOCK);
    __m256i low = LOAD_256(sums->lanes), high = LOAD_256(sums->lanes + 4);
    for (; blocks > 0; blocks--, p += BLOCK) {
        for (int n = 0; n < BLOCK / STRIPE; n++) {
            low = accumulate_256(low, LOAD_256(p + n * STRIPE), LOAD_256(secret + 8 * n));
            high = accumulate_256(high, LOAD_256(p + n * STRIPE + 32), LOAD_256(secret + 8 * n + 32));
        }
        low = scramble_256(low, LOAD_256(SCRAMBLE_SECRET));
        high = scramble_256(high, LOAD_256(SCRAMBLE_SECRET + 32));
    }
    _mm256_storeu_si256((__m256i *)sums->lanes, low);
    _mm256_storeu_si256((__m256i *)(sums->lanes + 4), high);
}

VECTOR static void blocks_vector(lynx_sums *sums, const uint8_t *p, size_t blocks) {
    const __m512i past = _mm512_broadcast_i32x4(PAST_256), prime = _mm512_set1_epi64(PRIME32_1);
    __m512i before = _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)~sums->crc)), lanes = _mm512_loadu_si512(sums->lanes);
    __m512i crc[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (; blocks > 0; blocks--) {
        for (int n = 0; n < BLOCK / STRIPE; n++, p += STRIPE) {
            FETCH(p);
            const __m512i value = _mm512_loadu_si512(p);
            const __m512i mixed = _mm512_xor_si512(value, _mm512_loadu_si512(secret + 8 * n));
            const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
            lanes = _mm512_add_epi64(lanes, _mm512_add_epi64(product, _mm512_shuffle_epi32(value, 0x4e)));
            crc[n % 4] = fold_512(crc[n % 4], past, n == 0 ? _mm512_xor_si512(value, before) : value);
        }
        before = _mm512_setzero_si512();
        const __m512i key = _mm512_loadu_si512(SCRAMBLE_SECRET);
        lanes = _mm512_ternarylogic_epi64(lanes, _mm512_srli_epi64(lanes, 47), key, 0x96);
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(lanes, 32), prime);
        lanes = _mm512_add_epi64(_mm512_mul_epu32(lanes, prime), _mm512_slli_epi64(high, 32));
    }
    _mm512_storeu_si512(sums->lanes, lanes);
    sums->crc = ~finish_512(crc);
}
#endif

static blocks_function *choose(void) {
#if defined(__x86_64__)
    const int isa = lynx_isa();
    __builtin_cpu_init();
    if (isa == LYNX_ISA_AVX512 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("vpclmulqdq")) {
        return blocks_vector;
    }
    if (isa != LYNX_ISA_SCALAR) {
        return blocks_avx2;
    }
#endif
    return blocks_portable;
}

static blocks_function *kernel(void) {
    static _Atomic(const lynx_kernels *) chosen_with; /* as in lynx_crc32c */
    static _Atomic(blocks_function *) chosen;
    const lynx_kernels *kernels = lynx_current();
    if (atomic_load_explicit(&chosen_with, memory_order_acquire) != kernels) {
        atomic_store_explicit(&chosen, choose(), memory_order_relaxed);
        atomic_store_explicit(&chosen_with, kernels, memory_order_release);
    }
    return atomic_load_explicit(&chosen, memory_order_relaxed);
}

void lynx_sums_begin(lynx_sums *sums, uint64_t total) {
    *sums = (lynx_sums){
        .total = total,
        .lanes = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1},
    };
}

void lynx_sums_add(lynx_sums *sums, const void *data, uint64_t there) {
    const uint8_t *const p = data;
    const uint64_t blocks = sums->total > 0 ? (sums->total - 1) / BLOCK * BLOCK : 0; /* what comes behind is the tail */
    const uint64_t whole = there / BLOCK * BLOCK < blocks ? there / BLOCK * BLOCK : blocks;
    while (sums->done < whole) {
        const uint64_t left = whole - sums->done, n = left < HOT ? left : HOT;
        kernel()(sums, p + sums->done, (size_t)(n / BLOCK));
        sums->done += n;
    }
    if (there == sums->total && sums->done == blocks && there > 0) {
        sums->crc = lynx_crc32c(sums->crc, p + blocks, (size_t)(there - blocks));
        if (there > LYNX_SUMS_LEAST) {
            for (uint64_t n = 0; n < (there - 1 - blocks) / STRIPE; n++) {
                accumulate(sums->lanes, p + blocks + n * STRIPE, secret + 8 * n);
            }
            accumulate(sums->lanes, p + there - STRIPE, LAST_SECRET);
        }
        sums->done = there;
    }
}

int64_t lynx_sums_receive(lynx_sums *sums, int socket, void *data, uint64_t there) {
    const uint64_t before = there;
    while (there < sums->total) {
        const uint64_t left = sums->total - there;
        const ssize_t n = recv(socket, (uint8_t *)data + there, left < PIECE ? left : PIECE, MSG_DONTWAIT);
        if (n <= 0) {
            return there > before ? (int64_t)(there - before) : n == 0 ? 0 : -errno; /* the next call meets it again */
        }
        there += (uint64_t)n;
        lynx_sums_add(sums, data, there);
    }
    return (int64_t)(there - before);
}

__extension__ typedef unsigned __int128 wide;

static uint64_t fold_64(uint64_t a, uint64_t b) {
    const wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static void merge(const uint64_t lanes[8], const uint8_t *key, uint64_t sum, uint8_t out[8]) {
    for (int i = 0; i < 8; i += 2) {
        sum += fold_64(lanes[i] ^ read64(key + 8 * i), lanes[i + 1] ^ read64(key + 8 * i + 8));
    }
    sum = (sum ^ (sum >> 37)) * PRIME_AVALANCHE;
    sum ^= sum >> 32;
    for (int i = 0; i < 8; i++) { /* canonical: big-endian */
        out[i] = (uint8_t)(sum >> (56 - 8 * i));
    }
}

int lynx_sums_digest(const lynx_sums *sums, uint8_t digest[16]) {
    if (sums->total <= LYNX_SUMS_LEAST || sums->done != sums->total) {
        return LYNX_ERR_ARGUMENT;
    }
    merge(sums->lanes, secret + sizeof secret - STRIPE - 11, ~(sums->total * PRIME64_2), digest);
    merge(sums->lanes, secret + 11, sums->total * PRIME64_1, digest + 8);
    return LYNX_OK;
}
