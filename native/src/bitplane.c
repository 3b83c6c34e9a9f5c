/* Bit planes of whole words: spec/codec-bitplane.md. Words that do not lie next to each other go through a buffer. */
#include "isa.h"
#include "view.h"

#define PIECE_BYTES 1024 /* of the buffer; runs as long as it do without */

/* What of the planes is done. Pieces are multiples of 8 words, but for the last. */
typedef struct {
    const lynx_kernels *kernels;
    int word_bytes;
    size_t done; /* words */
} progress;

/* Eight planes at a time, a line of the cache of each: planes are often so far apart that more of them evict one another. */
static void pack_piece(progress *p, uint8_t *const *planes, const uint8_t *words, size_t count) {
    const size_t piece = PIECE_BYTES / (size_t)p->word_bytes;
    for (size_t first = 0; first < count; first += piece) {
        const size_t some = count - first < piece ? count - first : piece;
        for (int top = 0; top < 8 * p->word_bytes; top += 8) {
            uint8_t *at[32] = {NULL};
            for (int plane = top; plane < top + 8; plane++) {
                at[plane] = planes[plane] == NULL ? NULL : planes[plane] + p->done / 8;
            }
            p->kernels->pack_row(p->word_bytes, words + first * (size_t)p->word_bytes, some, at);
        }
        p->done += some;
    }
}

int lynx_bitplane_pack(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim,
                       uint8_t *const *planes) {
    lynx_walk walk;
    if (!start_walk(&walk, view, word_bytes, heads, tokens, head_dim, false)) {
        return LYNX_ERR_ARGUMENT;
    }
    const size_t size = (size_t)word_bytes, piece = PIECE_BYTES / size; /* words */
    progress p = {lynx_current(), word_bytes, 0};
    _Alignas(64) uint8_t buffer[PIECE_BYTES];
    size_t held = 0;
    for (lynx_run run = next_run(&walk); run.words > 0;) {
        if (held == 0 && run.words >= piece) {
            const size_t count = run.words & ~(size_t)7;
            pack_piece(&p, planes, run.at, count);
            run.at += count * size;
            run.words -= count;
        } else {
            const size_t count = run.words < piece - held ? run.words : piece - held;
            copy_run(buffer + held * size, run.at, count * size);
            held += count;
            run.at += count * size;
            run.words -= count;
            if (held == piece) {
                pack_piece(&p, planes, buffer, held);
                held = 0;
            }
        }
        run = run.words > 0 ? run : next_run(&walk);
    }
    if (held > 0) {
        pack_piece(&p, planes, buffer, held);
    }
    return LYNX_OK;
}

static void unpack_piece(progress *p, const uint8_t *const *planes, uint8_t *words, size_t count) {
    const uint8_t *at[32] = {NULL};
    for (int plane = 0; plane < 8 * p->word_bytes; plane++) {
        at[plane] = planes[plane] == NULL ? NULL : planes[plane] + p->done / 8;
    }
    p->kernels->unpack_row(p->word_bytes, at, count, words);
    p->done += count;
}

int lynx_bitplane_unpack(const uint8_t *const *planes, const lynx_view *view, int word_bytes, uint32_t heads,
                         uint32_t tokens, uint32_t head_dim) {
    lynx_walk walk;
    if (!start_walk(&walk, view, word_bytes, heads, tokens, head_dim, true)) {
        return LYNX_ERR_ARGUMENT;
    }
    const size_t size = (size_t)word_bytes, piece = PIECE_BYTES / size, words = (size_t)heads * tokens * head_dim;
    progress p = {lynx_current(), word_bytes, 0};
    _Alignas(64) uint8_t buffer[PIECE_BYTES];
    size_t held = 0, used = 0;
    for (lynx_run run = next_run(&walk); run.words > 0;) {
        if (used == held && run.words >= piece) {
            const size_t count = run.words & ~(size_t)7;
            unpack_piece(&p, planes, run.at, count);
            run.at += count * size;
            run.words -= count;
        } else {
            if (used == held) {
                held = words - p.done < piece ? words - p.done : piece;
                used = 0;
                unpack_piece(&p, planes, buffer, held);
            }
            const size_t count = run.words < held - used ? run.words : held - used;
            copy_run(run.at, buffer + used * size, count * size);
            used += count;
            run.at += count * size;
            run.words -= count;
        }
        run = run.words > 0 ? run : next_run(&walk);
    }
    return LYNX_OK;
}
