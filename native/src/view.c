/* Copies of a tile's words from and to where they lie. */
#include "hq.h"

/* Runs of rows that lie in one piece are copied as one. */
static int copy(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim, uint8_t *dense,
                bool gather) {
    if ((word_bytes != 1 && word_bytes != 2 && word_bytes != 4) || heads == 0 || tokens == 0 || head_dim == 0 ||
        (view->pages != NULL && view->page_tokens == 0)) {
        return LYNX_ERR_ARGUMENT;
    }
    const size_t row = (size_t)head_dim * (size_t)word_bytes;
    for (uint32_t head = 0; head < heads; head++) {
        uint8_t *start = (uint8_t *)view->words + (ptrdiff_t)head * view->head_stride * word_bytes;
        for (uint32_t token = 0; token < tokens;) {
            uint8_t *rows = start;
            uint32_t count = tokens - token;
            if (view->pages != NULL) {
                const uint32_t at = view->first_token + token, inside = at % view->page_tokens;
                rows += view->pages[at / view->page_tokens] * view->page_stride * word_bytes;
                rows += (ptrdiff_t)inside * view->token_stride * word_bytes;
                count = count < view->page_tokens - inside ? count : view->page_tokens - inside;
            } else {
                rows += (ptrdiff_t)token * view->token_stride * word_bytes;
            }
            const bool dense_rows = view->token_stride == (ptrdiff_t)head_dim;
            const uint32_t pieces = dense_rows ? 1 : count;
            const size_t size = dense_rows ? count * row : row;
            for (uint32_t i = 0; i < pieces; i++, dense += size) {
                uint8_t *there = rows + (ptrdiff_t)i * view->token_stride * word_bytes;
                memcpy(gather ? dense : there, gather ? there : dense, size);
            }
            token += count;
        }
    }
    return LYNX_OK;
}

int lynx_view_gather(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim, void *out) {
    return copy(view, word_bytes, heads, tokens, head_dim, out, true);
}

int lynx_view_scatter(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim,
                      const void *in) {
    return copy(view, word_bytes, heads, tokens, head_dim, (uint8_t *)(uintptr_t)in, false);
}
