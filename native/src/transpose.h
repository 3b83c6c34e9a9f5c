/* Matrices of 8 x 8 bits, one per byte position, across 8 registers: included by each instruction set, which says first what
 * VECTOR, NO_BITS (a register of zeros) and SWAP are. */
#ifndef LYNX_TRANSPOSE_H
#define LYNX_TRANSPOSE_H

/* Bit j of register i to bit i of register j. With `upper` only registers 4..7 hold anything on entry. */
INLINE void transpose(VECTOR *r, bool upper) {
    for (int i = 0; i < 4 && upper; i++) {
        r[i] = NO_BITS; /* compilers leave out what comes of these */
    }
    for (int i = 0; i < 8; i += 4) {
        SWAP(r[i], r[i + 2], 2, 0x33);
        SWAP(r[i + 1], r[i + 3], 2, 0x33);
        SWAP(r[i], r[i + 1], 1, 0x55);
        SWAP(r[i + 2], r[i + 3], 1, 0x55);
    }
    for (int i = 0; i < 4; i++) {
        SWAP(r[i], r[i + 4], 4, 0x0f);
    }
}

#endif
