/* Bit planes of any rows: every instruction set packs the same bytes, and unpacking gives the words back. */
#include "common.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    script s = {data, size};
    const int width = 1 << below(&s, 3);
    const bool large = below(&s, 16) == 0; /* mostly few words, which is fast */
    const size_t rows = 1 + below(&s, large ? 5 : 3);
    const size_t row_words = rows == 1 ? 1 + below(&s, large ? 300 : 40) : 8 * (1 + below(&s, large ? 20 : 2));
    const ptrdiff_t gap = (ptrdiff_t)width * (ptrdiff_t)below(&s, 9);
    const ptrdiff_t stride = (ptrdiff_t)row_words * width + gap;
    int first = (int)below(&s, (uint32_t)(8 * width)), last = first + 1 + (int)below(&s, (uint32_t)(8 * width - first));
    const size_t extent = (size_t)stride * (rows - 1) + row_words * (size_t)width;
    uint8_t *words = bytes(extent);
    uint64_t seed = take(&s, 2);
    for (size_t i = 0; i < extent; i++) {
        words[i] = s.left > 0 ? (uint8_t)take(&s, 1) : (uint8_t)next_random(&seed);
    }
    const size_t plane = (rows * row_words + 7) / 8;
    const size_t packed = plane * (size_t)(last - first);
    int isas[4];
    const int count = instruction_sets(isas);
    uint8_t *reference = NULL;
    for (int i = 0; i < count; i++) {
        REQUIRE(lynx_isa_select(isas[i]) == LYNX_OK);
        uint8_t *planes = bytes(packed);
        REQUIRE(lynx_bitplane_pack(width, words, rows, row_words, stride, first, last, planes) == LYNX_OK);
        REQUIRE(reference == NULL || memcmp(reference, planes, packed) == 0);
        const uint8_t *pointers[32] = {NULL};
        for (int p = first; p < last; p++) {
            pointers[p] = planes + plane * (size_t)(p - first);
        }
        uint8_t *out = bytes(extent);
        memcpy(out, words, extent); /* what lies between rows must stay */
        REQUIRE(lynx_bitplane_unpack(width, pointers, rows, row_words, stride, out) == LYNX_OK);
        uint32_t mask = 0;
        for (int p = first; p < last; p++) {
            mask |= 1u << (8 * width - 1 - p);
        }
        for (size_t r = 0; r < rows; r++) {
            for (size_t c = 0; c < row_words; c++) {
                const size_t at = r * (size_t)stride + c * (size_t)width;
                uint32_t was = 0, is = 0;
                memcpy(&was, words + at, (size_t)width);
                memcpy(&is, out + at, (size_t)width);
                REQUIRE(is == (was & mask));
            }
            const size_t end = r * (size_t)stride + row_words * (size_t)width;
            REQUIRE(r + 1 == rows || memcmp(out + end, words + end, (size_t)gap) == 0);
        }
        free(out);
        if (reference == NULL) {
            reference = planes;
        } else {
            free(planes);
        }
    }
    free(reference);
    free(words);
    return 0;
}
