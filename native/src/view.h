/* A walk over a tile's words, in [head, token, dim] order, in runs that lie next to each other. */
#ifndef LYNX_VIEW_H
#define LYNX_VIEW_H

#include <stdbool.h>

#include "lynxproto.h"

typedef struct {
    const lynx_view *view;
    int word_bytes;
    uint32_t heads, tokens, head_dim;
    uint32_t head, token;  /* that come next */
    uint32_t straight;     /* tokens from there on that lie token_stride apart */
    uint8_t *at;
} lynx_walk;

typedef struct {
    uint8_t *at;
    size_t words; /* 0: there is no more */
} lynx_run;

/* Whether there is such a tile; else nothing may be asked of the walk. */
static inline bool start_walk(lynx_walk *walk, const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens,
                              uint32_t head_dim) {
    *walk = (lynx_walk){view, word_bytes, heads, tokens, head_dim, 0, 0, 0, NULL};
    return (word_bytes == 1 || word_bytes == 2 || word_bytes == 4) && heads > 0 && tokens > 0 && head_dim > 0 &&
           (view->pages == NULL || view->page_tokens > 0);
}

static inline lynx_run next_run(lynx_walk *walk) {
    const lynx_view *view = walk->view;
    if (walk->straight == 0) {
        if (walk->token == walk->tokens) {
            walk->token = 0;
            walk->head++;
        }
        if (walk->head == walk->heads) {
            return (lynx_run){NULL, 0};
        }
        ptrdiff_t place = (ptrdiff_t)walk->head * view->head_stride;
        walk->straight = walk->tokens - walk->token;
        if (view->pages != NULL) {
            const uint32_t at = view->first_token + walk->token, inside = at % view->page_tokens;
            const uint32_t left = view->page_tokens - inside;
            place += view->pages[at / view->page_tokens] * view->page_stride + (ptrdiff_t)inside * view->token_stride;
            walk->straight = walk->straight < left ? walk->straight : left;
        } else {
            place += (ptrdiff_t)walk->token * view->token_stride;
        }
        walk->at = (uint8_t *)view->words + place * walk->word_bytes;
    }
    const uint32_t tokens = view->token_stride == (ptrdiff_t)walk->head_dim ? walk->straight : 1;
    const lynx_run run = {walk->at, (size_t)tokens * walk->head_dim};
    walk->at += (ptrdiff_t)tokens * view->token_stride * walk->word_bytes;
    walk->straight -= tokens;
    walk->token += tokens;
    return run;
}

#endif
