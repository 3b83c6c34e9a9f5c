/* Bit planes of whole words: spec/codec-bitplane.md. */
#include "isa.h"

static bool shape_is_bad(int word_bytes, size_t rows, size_t row_words) {
    return (word_bytes != 1 && word_bytes != 2 && word_bytes != 4) || rows == 0 || row_words == 0 ||
           (rows > 1 && row_words % 8 != 0);
}

int lynx_bitplane_pack(int word_bytes, const void *words, size_t rows, size_t row_words, ptrdiff_t row_stride,
                       int first, int last, uint8_t *planes) {
    if (shape_is_bad(word_bytes, rows, row_words) || first < 0 || first > last || last > 8 * word_bytes) {
        return LYNX_ERR_ARGUMENT;
    }
    const size_t row_bytes = (row_words + 7) / 8;
    const lynx_kernels *kernels = lynx_current();
    for (size_t row = 0; row < rows; row++) {
        uint8_t *at[32] = {NULL};
        for (int p = first; p < last; p++) {
            at[p] = planes + (size_t)(p - first) * rows * row_bytes + row * row_bytes;
        }
        kernels->pack_row(word_bytes, (const uint8_t *)words + (ptrdiff_t)row * row_stride, row_words, first, last, at);
    }
    return LYNX_OK;
}

int lynx_bitplane_unpack(int word_bytes, const uint8_t *const *planes, size_t rows, size_t row_words,
                         ptrdiff_t row_stride, void *words) {
    if (shape_is_bad(word_bytes, rows, row_words)) {
        return LYNX_ERR_ARGUMENT;
    }
    const size_t row_bytes = (row_words + 7) / 8;
    const lynx_kernels *kernels = lynx_current();
    for (size_t row = 0; row < rows; row++) {
        const uint8_t *at[32] = {NULL};
        for (int p = 0; p < 8 * word_bytes; p++) {
            at[p] = planes[p] == NULL ? NULL : planes[p] + row * row_bytes;
        }
        kernels->unpack_row(word_bytes, at, row_words, (uint8_t *)words + (ptrdiff_t)row * row_stride);
    }
    return LYNX_OK;
}
