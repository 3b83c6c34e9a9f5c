/* What the files of hq share: tiles, blocks, the sections of a tile, and the scratch memory of a thread. */
#ifndef LYNX_HQ_H
#define LYNX_HQ_H

#include "isa.h"
#include "params.h"
#include "words.h"

#define RAW_PARAMS 0xff   /* parameter header: both widths; s and z follow in full */
#define RAW_RANKS 0xffff  /* rank table: size of stream A; the block's words follow */
#define PARAM_HEADER 6    /* bytes of a block's parameter header, */
#define RANK_HEADER 4     /* of its entry in the rank table, */
#define FOLD_HEADER 2     /* and of that in a fold table */

/* A tile of words [heads, tokens, head_dim], cut into blocks of up to 64 tokens x 64 channels of one head, ordered by head,
 * then tokens, then channels. */
typedef struct {
    int32_t dtype;           /* LYNX_BFLOAT16 or LYNX_FLOAT16 */
    int32_t part;            /* LYNX_KEY: a group is a channel over tokens. LYNX_VALUE: a token over channels */
    uint32_t heads, tokens, head_dim;
    const uint8_t *widths;   /* [heads][head_dim] anchor bits, 0..8; equal within a value group */
    const int8_t *exponents; /* [heads][head_dim] words are divided by 2^e, -8..7, bfloat16 only; null: none */
    const int8_t *biases;    /* [heads][head_dim] of value tiles with folding, -8..7; null: zeros */
    int32_t fold;            /* whether the top planes are folded */
} lynx_tile;

/* Sizes of the sections of some of a tile's blocks. */
typedef struct {
    uint64_t blocks;
    uint64_t anchor;      /* bytes of the anchor planes; with folding, what they take at most */
    uint64_t rest;        /* bytes of the remaining planes; with folding, what they take at most */
    uint64_t max_params;  /* the parameters' bound, without block headers */
    uint64_t max_rank;    /* the rank streams' bound, without block table */
} lynx_sizes;

/* Where blocks are encoded to: pointers move from block to block, `made` counts what was written. A null section is not made:
 * `anchor` goes with `fold_table` where the tile folds, `rest` with `rest_table` where lynx_folds_rest says so,
 * `param_headers` with `params`, and `rank_table` with `rank`. Each has room for what lynx_measure gives. */
typedef struct {
    uint8_t *fold_table, *anchor;
    uint8_t *param_headers, *params;
    uint8_t *rest_table, *rest;
    uint8_t *rank_table, *rank;
    bool wants_rank_bound; /* whether to work rank_bound out where there is no rank table, */
    uint64_t rank_most, rank_room; /* which may stop when `rank_most`, what all blocks' ranks take at most, is below `rank_room` */
    uint64_t anchor_left, rest_left; /* room of the sections from here on, for these blocks */
    lynx_hq_piece made;
} lynx_encoded;

/* The sections of a tile's levels, each whole, as received. `rest` null: anchor only. `rank_table` null: 8-bit. */
typedef struct {
    const uint8_t *fold_table, *anchor;
    const uint8_t *param_headers, *params;
    const uint8_t *rest_table, *rest;
    const uint8_t *rank_table, *rank;
    uint64_t anchor_size, params_size, rest_size, rank_size;
} lynx_levels;

bool lynx_tile_is_bad(const lynx_tile *tile);
uint64_t lynx_count_blocks(const lynx_tile *tile);
bool lynx_folds_rest(const lynx_tile *tile);
/* Sizes of blocks [first, last). */
void lynx_measure(const lynx_tile *tile, uint64_t first, uint64_t last, lynx_sizes *sizes);

/* What an encoder has to know of the channels of some heads, [heads][head_dim]: their ranges and sizes as bfloat16 words (means over
 * blocks of the range and of the largest magnitude), and, unless `biases` is null, how far they lie from zero;
 * spec/codec-hq.md, "Spreads" and "Folding". Key tiles have ranges and, for each block, the least and largest ordered words of 64
 * channels, in `extremes`, with which they are encoded faster; value tiles have neither, and both are null.
 * `fetched`: lynx_encode has had these heads' words fetched. */
void lynx_spreads(const lynx_tile *tile, const lynx_view *view, uint32_t first_head, uint32_t last_head, uint16_t *ranges,
                  uint16_t *sizes, int8_t *biases, int16_t *extremes, bool fetched, void *scratch);
/* Encode blocks [first, last). `extremes`: of key tiles without exponents, or null. With `ahead` the words of the head behind each
 * block's own are fetched from memory meanwhile. */
void lynx_encode(const lynx_tile *tile, const lynx_view *view, uint64_t first, uint64_t last, const int16_t *extremes, bool ahead,
                 lynx_encoded *out, void *scratch);
/* Check that headers and tables add up to the sections' sizes: the totals only, no values. */
int lynx_check(const lynx_tile *tile, const lynx_levels *levels, lynx_hq_fault *fault);
/* Decode blocks [first, last). lynx_check must have passed for the same levels. */
int lynx_decode(const lynx_tile *tile, const lynx_levels *levels, const lynx_view *view, uint64_t first, uint64_t last,
                void *scratch, lynx_hq_fault *fault);

/* --- blocks --------------------------------------------------------------------------------------------------- */

/* What follows from the widths of a column of blocks: 64 channels of a head. */
typedef struct {
    uint32_t width_sum; /* sum of its channels' widths */
    uint32_t folded[2]; /* channels whose top planes fold, in the anchor and in the rest section */
} lynx_column;

#define COLUMNS 16 /* of a head that are remembered; more are worked out again for each block */

/* A walk over blocks in order. */
typedef struct {
    uint64_t index;
    uint32_t head, token, channel; /* of the block's first value */
    int tokens, channels, octets, groups;
    lynx_column column;
    lynx_column columns[COLUMNS];
} lynx_block;

void lynx_seek_block(const lynx_tile *tile, uint64_t index, lynx_block *block);
static inline void lynx_first_block(const lynx_tile *tile, lynx_block *block) {
    lynx_seek_block(tile, 0, block);
}
void lynx_next_block(const lynx_tile *tile, lynx_block *block);

static inline uint32_t section_octet(const lynx_block *block, int section) {
    const uint32_t sum = block->column.width_sum;
    return section == ANCHOR_SECTION ? sum : 8u * (uint32_t)block->channels - sum;
}

/* --- scratch -------------------------------------------------------------------------------------------------- */

/* What the kernels need to know of a column. */
typedef struct {
    uint32_t head, first; /* which it is; head UINT32_MAX: none */
    lynx_planes planes;
    int16_t shifts[ROW], unshifts[ROW]; /* exponents of the channels, in words; and their negatives */
    bool shifted;                       /* some exponent is not 0 */
} lynx_setup;

#define SETUPS 4 /* that are remembered */

typedef struct {
    lynx_setup setups[SETUPS];
    lynx_params params;
    int16_t low[ROW], high[ROW];
    _Alignas(64) uint16_t words[BLOCK_VALUES];
    _Alignas(64) uint8_t codes[BLOCK_VALUES];
    _Alignas(64) uint8_t centred[BLOCK_VALUES];
    uint8_t anchor[8 * 8 * ROW + SLACK], rest[8 * 8 * ROW + SLACK];
    uint8_t flat[8 * 8 * ROW + SLACK], flat_rest[8 * 8 * ROW + SLACK];
    uint8_t folded[FOLDED_MAX + SLACK], folded_rest[FOLDED_MAX + SLACK];
    lynx_streams streams;
} lynx_scratch;

lynx_scratch *lynx_scratch_of(void *scratch);
static inline void forget_setups(lynx_scratch *s) {
    for (int i = 0; i < SETUPS; i++) {
        s->setups[i].head = UINT32_MAX;
    }
}

/* The block's column set up for the kernels, which may be so from an earlier block. */
const lynx_setup *lynx_set_up(const lynx_kernels *kernels, const lynx_tile *tile, const lynx_block *block, lynx_scratch *s);

/* --- views ---------------------------------------------------------------------------------------------------- */

/* From a token on, of `rows` rows: those that lie `token_stride` apart, their words from `channel` on. */
static inline lynx_stretch stretch_at(const lynx_view *view, uint32_t head, uint32_t channel, uint32_t token, int rows) {
    uint16_t *words = view->words;
    words += (ptrdiff_t)head * view->head_stride + channel;
    if (view->pages == NULL) {
        return (lynx_stretch){words + (ptrdiff_t)token * view->token_stride, rows};
    }
    const uint32_t at = view->first_token + token, inside = at % view->page_tokens, left = view->page_tokens - inside;
    words += view->pages[at / view->page_tokens] * view->page_stride + (ptrdiff_t)inside * view->token_stride;
    return (lynx_stretch){words, left < (uint32_t)rows ? (int)left : rows};
}

/* From the block's row `t` on. */
static inline lynx_stretch stretch_from(const lynx_view *view, const lynx_block *block, int t) {
    return stretch_at(view, block->head, block->channel, block->token + (uint32_t)t, block->tokens - t);
}

/* All of the block's rows, or those of another head in its place, and an empty stretch behind them. Returns how many stretches there
 * are. */
static inline int stretches_of(const lynx_view *view, const lynx_block *block, uint32_t head, lynx_stretch *out) {
    int count = 0;
    for (int t = 0; t < block->tokens; count++) {
        out[count] = stretch_at(view, head, block->channel, block->token + (uint32_t)t, block->tokens - t);
        t += out[count].count;
    }
    out[count] = (lynx_stretch){NULL, 0};
    return count;
}

/* Fetch a quarter of the rows below the block's, or of the next head's first: hardware does not foresee where pages lie, nor
 * that a part of long rows is wanted. In quarters, because all at once would keep other loads waiting. */
static inline void prefetch_next(const lynx_tile *tile, const lynx_view *view, const lynx_block *block, int quarter,
                                 bool write) {
    if (view->pages == NULL && view->token_stride == (ptrdiff_t)tile->head_dim) {
        return;
    }
    const bool below = block->token + ROW < tile->tokens;
    const uint32_t head = block->head + !below, first = (below ? block->token + ROW : 0) + (uint32_t)quarter * (ROW / 4);
    if (head >= tile->heads || first >= tile->tokens) {
        return;
    }
    uint32_t token = first;
    int rows = tile->tokens - first < ROW / 4 ? (int)(tile->tokens - first) : ROW / 4;
    while (rows > 0) {
        const lynx_stretch some = stretch_at(view, head, block->channel, token, rows);
        for (int i = 0; i < some.count; i++) {
            const uint16_t *row = some.row + i * view->token_stride;
            if (write) { /* not so near: rows of long strides evict one another */
                __builtin_prefetch(row, 0, 2);
                __builtin_prefetch(row + 32, 0, 2);
            } else {
                __builtin_prefetch(row, 0);
                __builtin_prefetch(row + 32, 0);
            }
        }
        token += (uint32_t)some.count;
        rows -= some.count;
    }
}

/* Where zero lies among the codes of value tokens. */
static inline const int16_t *zeros_of(int part, const lynx_planes *planes, const lynx_params *params, int16_t *zeros) {
    if (part == LYNX_KEY) {
        return NULL;
    }
    for (int g = 0; g < ROW; g++) {
        zeros[g] = (int16_t)(params->z[g] + planes->low[g]);
    }
    return zeros;
}

#endif
