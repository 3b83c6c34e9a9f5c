/* A walk over a tile's words, in [head, token, dim] order, in runs that lie next to each other. */
#ifndef LYNX_VIEW_H
#define LYNX_VIEW_H

#include <stdbool.h>
#include <string.h>

#include "lynxproto.h"

typedef struct {
    uint8_t *at;
    size_t words; /* 0: there is no more */
} lynx_run;

typedef struct {
    const lynx_view *view;
    int word_bytes;
    uint32_t heads, tokens, head_dim;
    uint32_t head, token;  /* that come next */
    uint32_t straight;     /* tokens from there on that lie token_stride apart */
    uint8_t *at;
    ptrdiff_t stride;      /* bytes from token to token */
    bool dense;            /* they lie next to each other */
} lynx_cursor;

static inline lynx_run step(lynx_cursor *c) {
    const lynx_view *view = c->view;
    if (__builtin_expect(c->straight == 0, 0)) {
        if (c->token == c->tokens) {
            c->token = 0;
            c->head++;
        }
        if (c->head == c->heads) {
            return (lynx_run){NULL, 0};
        }
        ptrdiff_t place = (ptrdiff_t)c->head * view->head_stride;
        c->straight = c->tokens - c->token;
        if (view->pages != NULL) {
            const uint32_t at = view->first_token + c->token, inside = at % view->page_tokens;
            const uint32_t left = view->page_tokens - inside;
            place += view->pages[at / view->page_tokens] * view->page_stride + (ptrdiff_t)inside * view->token_stride;
            c->straight = c->straight < left ? c->straight : left;
        } else {
            place += (ptrdiff_t)c->token * view->token_stride;
        }
        c->at = (uint8_t *)view->words + place * c->word_bytes;
    }
    const uint32_t tokens = c->dense ? c->straight : 1;
    const lynx_run run = {c->at, (size_t)tokens * c->head_dim};
    c->at += tokens * c->stride;
    c->straight -= tokens;
    c->token += tokens;
    return run;
}

/* `scout` is `lead` bytes ahead and fetches: hardware does not foresee where runs lie. */
#define LEAD 4096

typedef struct {
    lynx_cursor here, scout;
    size_t lead;
    bool write;
} lynx_walk;

static inline void scout(lynx_walk *walk) {
    while (walk->lead < LEAD) {
        const lynx_run run = step(&walk->scout);
        if (run.words == 0) {
            walk->lead = SIZE_MAX / 2; /* there is nothing ahead any more */
            return;
        }
        const size_t size = run.words * (size_t)walk->here.word_bytes;
        for (size_t i = 0; i < size && i < LEAD; i += 64) {
            if (walk->write) {
                __builtin_prefetch(run.at + i, 1);
            } else {
                __builtin_prefetch(run.at + i, 0);
            }
        }
        walk->lead += size;
    }
}

/* Whether there is such a tile; else nothing may be asked of the walk. `write`: its words will be written. */
static inline bool start_walk(lynx_walk *walk, const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens,
                              uint32_t head_dim, bool write) {
    const lynx_cursor start = {.view = view, .word_bytes = word_bytes, .heads = heads, .tokens = tokens, .head_dim = head_dim,
                               .stride = view->token_stride * word_bytes,
                               .dense = view->token_stride == (ptrdiff_t)head_dim};
    *walk = (lynx_walk){start, start, 0, write};
    return (word_bytes == 1 || word_bytes == 2 || word_bytes == 4) && heads > 0 && tokens > 0 && head_dim > 0 &&
           (view->pages == NULL || view->page_tokens > 0);
}

static inline lynx_run next_run(lynx_walk *walk) {
    const lynx_run run = step(&walk->here);
    const size_t size = run.words * (size_t)walk->here.word_bytes;
    walk->lead = walk->lead > size ? walk->lead - size : 0;
    scout(walk);
    return run;
}

/* Runs are often rows of 64, 128 or 256 bytes, for which a call takes as long as the copy. */
static inline void copy_run(uint8_t *to, const uint8_t *from, size_t size) {
    if (size % 64 != 0 || size > 1024) {
        memcpy(to, from, size);
        return;
    }
    for (size_t i = 0; i < size; i += 64) {
        memcpy(to + i, from + i, 64);
    }
}

#endif
