/* CRC32C of any bytes at any address, whole and in two parts: every instruction set agrees with the definition. And with
 * XXH3-128 in one pass, in three parts: all instruction sets agree. */
#include "common.h"

static uint32_t by_definition(const uint8_t *p, size_t n) {
    static uint32_t table[256];
    if (table[1] == 0) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t crc = i;
            for (int bit = 0; bit < 8; bit++) {
                crc = (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1)));
            }
            table[i] = crc;
        }
    }
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < n; i++) {
        crc = (crc >> 8) ^ table[(crc ^ p[i]) & 255];
    }
    return ~crc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    script s = {data, size};
    const size_t n = below(&s, 16) == 0 ? take(&s, 2) % 5000 : take(&s, 2) % 300;
    const size_t offset = below(&s, 64), cut = n == 0 ? 0 : take(&s, 2) % n;
    uint8_t *memory = bytes(offset + n), *p = memory + offset;
    uint64_t seed = take(&s, 2);
    for (size_t i = 0; i < n; i++) {
        p[i] = s.left > 0 ? (uint8_t)take(&s, 1) : (uint8_t)next_random(&seed);
    }
    const uint32_t expected = by_definition(p, n);
    uint8_t first[16], digest[16];
    int isas[4];
    const int count = instruction_sets(isas);
    for (int i = 0; i < count; i++) {
        REQUIRE(lynx_isa_select(isas[i]) == LYNX_OK);
        REQUIRE(lynx_crc32c(0, p, n) == expected);
        REQUIRE(lynx_crc32c(lynx_crc32c(0, p, cut), p + cut, n - cut) == expected);
        lynx_sums sums;
        lynx_sums_begin(&sums, n);
        lynx_sums_add(&sums, p, cut);
        lynx_sums_add(&sums, p, cut + (n - cut) / 2);
        lynx_sums_add(&sums, p, n);
        REQUIRE(sums.crc == expected && sums.done == n);
        REQUIRE(lynx_sums_digest(&sums, digest) == (n > LYNX_SUMS_LEAST ? LYNX_OK : LYNX_ERR_ARGUMENT));
        if (n > LYNX_SUMS_LEAST) {
            REQUIRE(memcmp(i == 0 ? digest : first, digest, sizeof digest) == 0);
            memcpy(first, digest, sizeof digest);
        }
    }
    free(memory);
    return 0;
}
