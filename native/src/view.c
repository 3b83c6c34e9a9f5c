/* Copies of a tile's words from and to where they lie. */
#include "view.h"

int lynx_view_gather(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim, void *out) {
    lynx_walk walk;
    if (!start_walk(&walk, view, word_bytes, heads, tokens, head_dim, false)) {
        return LYNX_ERR_ARGUMENT;
    }
    uint8_t *to = out;
    for (lynx_run run = next_run(&walk); run.words > 0; run = next_run(&walk)) {
        const size_t size = run.words * (size_t)word_bytes;
        copy_run(to, run.at, size);
        to += size;
    }
    return LYNX_OK;
}

int lynx_view_scatter(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim,
                      const void *in) {
    lynx_walk walk;
    if (!start_walk(&walk, view, word_bytes, heads, tokens, head_dim, true)) {
        return LYNX_ERR_ARGUMENT;
    }
    const uint8_t *from = in;
    for (lynx_run run = next_run(&walk); run.words > 0; run = next_run(&walk)) {
        const size_t size = run.words * (size_t)word_bytes;
        copy_run(run.at, from, size);
        from += size;
    }
    return LYNX_OK;
}
