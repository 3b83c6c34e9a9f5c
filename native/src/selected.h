/* Bits out of words into a stream, with PEXT: included behind ranks.h by instruction sets that have it. */
#ifndef LYNX_SELECTED_H
#define LYNX_SELECTED_H

/* The bits of a word that `mask` selects. */
INLINE void put_word(bit_writer *out, uint64_t word, uint64_t mask) {
    const uint32_t count = (uint32_t)_mm_popcnt_u64(mask);
    if (__builtin_expect(count <= 56, 1)) {
        put(out, _pext_u64(word, mask), count);
    } else {
        put(out, _pext_u64(word, mask & UINT32_MAX), (uint32_t)_mm_popcnt_u64(mask & UINT32_MAX));
        put(out, _pext_u64(word, mask & ~(uint64_t)UINT32_MAX), (uint32_t)_mm_popcnt_u64(mask >> 32));
    }
}

/* The bits that the masks select, of an even number of words: two at once where they fit, which is nearly always. */
INLINE void put_selected(bit_writer *out, const uint64_t *values, const uint64_t *masks, int count) {
    for (int i = 0; i < count; i += 2) {
        const uint64_t first = _pext_u64(values[i], masks[i]), second = _pext_u64(values[i + 1], masks[i + 1]);
        const uint32_t bits = (uint32_t)_mm_popcnt_u64(masks[i]), more = (uint32_t)_mm_popcnt_u64(masks[i + 1]);
        if (__builtin_expect(bits + more <= 56, 1)) {
            put(out, first | second << bits, bits + more);
        } else {
            put(out, first, bits);
            put(out, second, more);
        }
    }
}

#endif
