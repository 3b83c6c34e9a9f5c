/* The survey of a value tile's block: included by instruction sets, which say first what VECTOR, NO_BITS and store are, and size_row,
 * which adds a row to the largest magnitudes and to the numbers of signs. */
#ifndef LYNX_SIZES_H
#define LYNX_SIZES_H

INLINE void sizes_as(bool with_signs, const uint16_t *rows, ptrdiff_t stride, int tokens, bool fetched, uint16_t *most,
                     uint16_t *signs) {
    enum { LANES = sizeof(VECTOR) / 2, COUNT = ROW / LANES };
    VECTOR largest[COUNT], negative[COUNT];
    for (int i = 0; i < COUNT; i++) {
        largest[i] = negative[i] = NO_BITS;
    }
    for (int t = 0; t < tokens / 2; t++, rows += stride) {
        for (int half = 0; half < 2; half++) {
            const uint16_t *row = half == 0 ? rows : rows + tokens / 2 * stride;
            if (fetched) {
                lynx_fetch_near(row, stride);
            } else {
                lynx_fetch_far(row, stride);
            }
            size_row(row, with_signs, largest, negative);
        }
    }
    if (tokens % 2 != 0) {
        size_row(rows + tokens / 2 * stride, with_signs, largest, negative);
    }
    for (int i = 0; i < COUNT; i++) {
        store(most + LANES * i, largest[i]);
        if (with_signs) {
            store(signs + LANES * i, negative[i]);
        }
    }
}

INLINE void sizes_of(const uint16_t *rows, ptrdiff_t stride, int tokens, bool fetched, uint16_t *most, uint16_t *signs) {
    if (signs == NULL) {
        sizes_as(false, rows, stride, tokens, fetched, most, NULL);
    } else {
        sizes_as(true, rows, stride, tokens, fetched, most, signs);
    }
}

#endif
