/* The bitplane codec for AVX2. */
#include "isa.h"

#if defined(__x86_64__)
#include "avx2.h"

/* 32 words as one register per byte of a word, least significant first. */
INLINE void split(int word_bytes, const uint8_t *words, __m256i *bytes) {
    if (word_bytes == 1) {
        bytes[0] = load(words);
    } else if (word_bytes == 2) {
        const __m256i a = load(words), b = load(words + 32), low = _mm256_set1_epi16(255);
        bytes[0] = in_order(_mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low)));
        bytes[1] = in_order(_mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
    } else {
        const __m256i gather = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i x[4];
        for (int i = 0; i < 4; i++) {
            x[i] = _mm256_shuffle_epi8(load(words + 32 * i), gather);
        }
        const __m256i low1 = _mm256_unpacklo_epi32(x[0], x[1]), low2 = _mm256_unpacklo_epi32(x[2], x[3]);
        const __m256i high1 = _mm256_unpackhi_epi32(x[0], x[1]), high2 = _mm256_unpackhi_epi32(x[2], x[3]);
        bytes[0] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(low1, low2), order);
        bytes[1] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(low1, low2), order);
        bytes[2] = _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(high1, high2), order);
        bytes[3] = _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(high1, high2), order);
    }
}

INLINE void join(int word_bytes, const __m256i *bytes, uint8_t *words) {
    if (word_bytes == 1) {
        store(words, bytes[0]);
        return;
    }
    const __m256i first = in_order(bytes[0]), second = in_order(bytes[1]);
    const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
    if (word_bytes == 2) {
        store(words, low);
        store(words + 32, high);
        return;
    }
    const __m256i third = in_order(bytes[2]), fourth = in_order(bytes[3]);
    const __m256i halves[2][2] = {{low, _mm256_unpacklo_epi8(third, fourth)}, {high, _mm256_unpackhi_epi8(third, fourth)}};
    for (int i = 0; i < 2; i++) {
        const __m256i a = _mm256_unpacklo_epi16(halves[i][0], halves[i][1]);
        const __m256i b = _mm256_unpackhi_epi16(halves[i][0], halves[i][1]);
        store(words + 64 * i, _mm256_permute2x128_si256(a, b, 0x20));
        store(words + 64 * i + 32, _mm256_permute2x128_si256(a, b, 0x31));
    }
}

INLINE void pack_row_as(int word_bytes, const uint8_t *words, size_t count, uint8_t *const *planes) {
    bool wanted[4] = {false};
    for (int p = 0; p < 8 * word_bytes; p++) {
        wanted[word_bytes - 1 - p / 8] |= planes[p] != NULL;
    }
    for (size_t i = 0; i < count; i += 32) {
        __m256i bytes[4];
        split(word_bytes, words + i * (size_t)word_bytes, bytes);
        for (int byte = 0; byte < word_bytes; byte++) {
            if (!wanted[byte]) {
                continue;
            }
            __m256i v = bytes[byte];
            const int top = 8 * (word_bytes - 1 - byte); /* the plane of this byte's highest bit */
            for (int p = top; p < top + 8; p++) {
                if (planes[p] != NULL) {
                    const uint32_t bits = bits_of(v);
                    memcpy(planes[p] + i / 8, &bits, sizeof bits);
                }
                v = _mm256_add_epi8(v, v);
            }
        }
    }
}

INLINE void unpack_row_as(int word_bytes, const uint8_t *const *planes, size_t count, uint8_t *words) {
    for (size_t i = 0; i < count; i += 32) {
        __m256i bytes[4];
        for (int byte = 0; byte < word_bytes; byte++) {
            __m256i v = _mm256_setzero_si256();
            const int top = 8 * (word_bytes - 1 - byte);
            for (int p = top; p < top + 8; p++) {
                v = _mm256_add_epi8(v, v);
                if (planes[p] != NULL) {
                    uint32_t bits;
                    memcpy(&bits, planes[p] + i / 8, sizeof bits);
                    v = _mm256_sub_epi8(v, bytes_of(bits));
                }
            }
            bytes[byte] = v;
        }
        join(word_bytes, bytes, words + i * (size_t)word_bytes);
    }
}

void lynx_avx2_pack_row(int word_bytes, const void *words, size_t count, uint8_t *const *planes) {
    const size_t whole = count / 32 * 32;
    switch (word_bytes) {
    case 1:
        pack_row_as(1, words, whole, planes);
        break;
    case 2:
        pack_row_as(2, words, whole, planes);
        break;
    default:
        pack_row_as(4, words, whole, planes);
    }
    if (whole < count) {
        uint8_t *rest[32] = {NULL};
        for (int p = 0; p < 8 * word_bytes; p++) {
            rest[p] = planes[p] == NULL ? NULL : planes[p] + whole / 8;
        }
        lynx_scalar.pack_row(word_bytes, (const uint8_t *)words + whole * (size_t)word_bytes, count - whole, rest);
    }
}

void lynx_avx2_unpack_row(int word_bytes, const uint8_t *const *planes, size_t count, void *words) {
    const size_t whole = count / 32 * 32;
    switch (word_bytes) {
    case 1:
        unpack_row_as(1, planes, whole, words);
        break;
    case 2:
        unpack_row_as(2, planes, whole, words);
        break;
    default:
        unpack_row_as(4, planes, whole, words);
    }
    if (whole < count) {
        const uint8_t *rest[32] = {NULL};
        for (int p = 0; p < 8 * word_bytes; p++) {
            rest[p] = planes[p] == NULL ? NULL : planes[p] + whole / 8;
        }
        lynx_scalar.unpack_row(word_bytes, rest, count - whole, (uint8_t *)words + whole * (size_t)word_bytes);
    }
}

AVX2_END
#endif
