/* Payloads of hq: their headers and sections, and the tables that a tile carries. spec/codec-hq.md, sections 4 and 9. */
#include "hq.h"

#define HEADER 8 /* bytes: mode, level, reserved (2), size of the section of variable size (4) */
enum { CODED = 0, STORED = 1 };

#define MAX_RANGE_WIDTH 7
#define LARGEST_SIZE 0x80000000u /* of a tile: sizes in payloads have 32 bits */

/* What a channel gains with its bit 0, 1, ..., in units of 1/64 octave of KL: "Widths by range". */
static const int16_t GAINS[MAX_RANGE_WIDTH] = {-315, -392, -475, -614, -756, -891, -1022};

/* Followed by the tile's tables: widths, exponents, biases; then, for the encoder, ranges and sizes of channels, and the
 * extremes of channels in each block where widths go by range. */
typedef struct {
    lynx_tile tile;
    int levels;
    bool by_range, scaled, biased; /* tables that the tile carries */
    uint64_t channels, side, fold_table, rest_table; /* heads * head_dim; bytes of the tables in payloads */
    lynx_sizes sizes;
    int16_t *extremes;     /* null: not known */
    lynx_levels in;        /* of opened payloads */
    uint64_t starts[4];    /* of the sections of faults, */
    int32_t level_of[4];   /* and their levels */
} lynx_plan;

static uint8_t *table_of(const lynx_plan *plan, int number) {
    return (uint8_t *)(uintptr_t)(plan + 1) + (uint64_t)number * plan->channels;
}

static uint64_t rest_table_bytes(const lynx_plan *plan) {
    return lynx_folds_rest(&plan->tile) ? FOLD_HEADER * plan->sizes.blocks : 0;
}

/* A plan without the tables that the tile carries, which have room. */
static int start_plan(const lynx_hq_config *config, lynx_plan *plan) {
    *plan = (lynx_plan){.tile = {.dtype = config->dtype,
                                 .part = config->part,
                                 .heads = config->heads,
                                 .tokens = config->tokens,
                                 .head_dim = config->head_dim,
                                 .widths = config->widths,
                                 .fold = config->fold},
                        .levels = config->levels};
    lynx_tile *tile = &plan->tile;
    const bool value = config->part == LYNX_VALUE;
    plan->channels = (uint64_t)config->heads * config->head_dim;
    plan->by_range = config->widths == NULL;
    plan->scaled = value && config->scaling && config->dtype == LYNX_BFLOAT16;
    plan->biased = value && config->fold;
    plan->side = (plan->channels + 1) / 2 * (uint64_t)(plan->by_range + plan->scaled + plan->biased);
    if (plan->by_range) {
        if (value) {
            return LYNX_ERR_ARGUMENT;
        }
        tile->widths = memset(table_of(plan, 0), 8, plan->channels);
    }
    if (plan->scaled) {
        tile->exponents = memset(table_of(plan, 1), 0, plan->channels);
    }
    if (plan->biased) {
        tile->biases = memset(table_of(plan, 2), 0, plan->channels);
    }
    return LYNX_OK;
}

static void size_plan(lynx_plan *plan) {
    lynx_measure(&plan->tile, 0, lynx_count_blocks(&plan->tile), &plan->sizes);
    plan->fold_table = plan->tile.fold ? FOLD_HEADER * plan->sizes.blocks : 0;
    plan->rest_table = rest_table_bytes(plan);
}

int lynx_hq_measure(const lynx_hq_config *config, lynx_hq_bounds *bounds) {
    static const uint8_t NONE[1] = {8}; /* shape first: widths are read for a good one only */
    const lynx_tile shape = {config->dtype, config->part, 1, 1, 1, NONE, NULL, NULL, 0};
    const uint64_t channels = (uint64_t)config->heads * config->head_dim;
    if (lynx_tile_is_bad(&shape) || config->heads == 0 || config->tokens == 0 || config->head_dim == 0 ||
        config->levels < 1 || config->levels > 3 || channels > LARGEST_SIZE ||
        channels * config->tokens > LARGEST_SIZE / 2 || (config->widths == NULL && config->part != LYNX_KEY)) {
        return LYNX_ERR_ARGUMENT;
    }
    lynx_tile tile = {.dtype = config->dtype, .part = config->part, .heads = config->heads, .tokens = config->tokens,
                      .head_dim = config->head_dim, .widths = config->widths};
    if (config->widths != NULL && lynx_tile_is_bad(&tile)) {
        return LYNX_ERR_ARGUMENT;
    }
    const uint64_t blocks = lynx_count_blocks(&tile);
    const uint64_t octets = ((uint64_t)config->tokens + 7) / 8;
    uint64_t anchor = 8 * channels, rest = 8 * channels; /* bits: by range, anything may be */
    if (config->widths != NULL) {
        anchor = 0;
        for (uint64_t i = 0; i < channels; i++) {
            anchor += config->widths[i];
        }
        rest -= anchor;
    } else {
        anchor = config->range_bits < 7 * channels ? config->range_bits : 7 * channels;
        rest -= anchor;
    }
    const uint64_t groups = config->part == LYNX_KEY ? channels * ((config->tokens + ROW - 1) / ROW)
                                                     : (uint64_t)config->heads * config->tokens *
                                                           ((config->head_dim + ROW - 1) / ROW);
    const uint64_t table = config->fold ? FOLD_HEADER * blocks : 0;
    const uint64_t last = RANK_HEADER * blocks + 2 * channels * config->tokens;
    const uint64_t extremes = config->widths == NULL ? 4 * ROW * blocks : 0;
    *bounds = (lynx_hq_bounds){.blocks = blocks, .plan = sizeof(lynx_plan) + 3 * channels + 4 * channels + extremes + 8};
    bounds->level[0] = HEADER + 3 * ((channels + 1) / 2) + table + octets * anchor + PARAM_HEADER * blocks + 4 * groups;
    bounds->level[1] = config->levels > 1 ? HEADER + table + octets * rest + (config->levels == 2 ? last : 0) : 0;
    bounds->level[2] = config->levels > 2 ? HEADER + last : 0;
    return LYNX_OK;
}

/* --- encoder -------------------------------------------------------------------------------------------------- */

/* How many gains of channels are above `middle`: weights are compared with what each bit asks of them, in 16 bits. */
static uint64_t gains_above(const uint16_t *weights, uint64_t channels, int middle) {
    int16_t asked[MAX_RANGE_WIDTH];
    uint64_t above = 0;
    for (int b = 0; b < MAX_RANGE_WIDTH; b++) {
        const int weight = middle - GAINS[b];
        above += weight < 0 ? channels : 0;
        asked[b] = (int16_t)((weight < 0 || weight > UINT16_MAX ? UINT16_MAX : weight) - 0x8000);
    }
    for (uint64_t i = 0; i < channels; i++) {
        const int16_t weight = (int16_t)(weights[i] - 0x8000);
        int16_t count = 0;
        for (int b = 0; b < MAX_RANGE_WIDTH; b++) {
            count = (int16_t)(count + (weight > asked[b]));
        }
        above += (uint16_t)count;
    }
    return above;
}

/* Widths 0..7 of `bits` in all: each next bit goes to the channel that gains most, the first of those that gain the same. */
static void choose_widths(const uint16_t *weights, uint64_t channels, uint64_t bits, uint8_t *widths) {
    if (bits >= MAX_RANGE_WIDTH * channels) {
        memset(widths, MAX_RANGE_WIDTH, channels);
        return;
    }
    int least = UINT16_MAX, most = 0;
    for (uint64_t i = 0; i < channels; i++) {
        least = weights[i] < least ? weights[i] : least;
        most = weights[i] > most ? weights[i] : most;
    }
    least += GAINS[MAX_RANGE_WIDTH - 1] - 1; /* all gains are above it, */
    most += GAINS[0];                        /* and none above this */
    uint64_t above_most = 0;
    while (most - least > 1) { /* the smallest `most` of which no more gains lie above than there are bits */
        const int middle = least + (most - least) / 2;
        const uint64_t above = gains_above(weights, channels, middle);
        if (above > bits) {
            least = middle;
        } else {
            most = middle;
            above_most = above;
        }
    }
    uint64_t left = bits - above_most; /* for those that gain exactly `most` */
    for (uint64_t i = 0; i < channels; i++) {
        int count = 0, equal = 0;
        for (int b = 0; b < MAX_RANGE_WIDTH; b++) {
            count += weights[i] + GAINS[b] > most;
            equal += weights[i] + GAINS[b] == most;
        }
        if (equal > 0 && left > 0) {
            left--;
            count++;
        }
        widths[i] = (uint8_t)count;
    }
}

/* How much the error of key channels is expected to matter, 64 an octave of KL, in place of their ranges. */
static void weigh(uint16_t *ranges, const uint16_t *sizes, uint32_t heads, uint32_t head_dim) {
    const uint32_t half = head_dim / 2; /* RoPE turns a channel and its pair, half of the head further */
    for (uint32_t head = 0; head < heads; head++, ranges += head_dim, sizes += head_dim) {
        for (uint32_t c = 0; c < head_dim; c++) { /* large keys count for large queries */
            const uint32_t pair = sizes[c < half ? c + head_dim - half : c - half];
            ranges[c] = (uint16_t)((2u * ranges[c] + 2u * sizes[c] + 3u * pair) >> 2);
        }
    }
}

/* Exponents that even the sizes of a head's channels out. */
static void choose_exponents(const uint16_t *sizes, uint32_t heads, uint32_t head_dim, int8_t *exponents) {
    for (uint32_t head = 0; head < heads; head++, sizes += head_dim, exponents += head_dim) {
        uint64_t sum = 0;
        for (uint32_t c = 0; c < head_dim; c++) {
            sum += sizes[c];
        }
        const int mean = (int)(sum / head_dim);
        for (uint32_t c = 0; c < head_dim; c++) {
            const int e = (int)((uint32_t)(sizes[c] - mean + 64 + (1 << 20)) >> 7) - (1 << 13); /* rounds down */
            exponents[c] = (int8_t)(e < -8 ? -8 : e > 7 ? 7 : e);
        }
    }
}

static int start_tile(const lynx_hq_config *config, const lynx_view *view, lynx_plan *plan) {
    if (start_plan(config, plan) != LYNX_OK || lynx_tile_is_bad(&plan->tile) || (view->pages != NULL && view->page_tokens == 0)) {
        return LYNX_ERR_ARGUMENT;
    }
    return LYNX_OK;
}

/* The tables of heads [first, last): of all heads where widths go by range. */
static void look(lynx_plan *plan, const lynx_view *view, uint32_t first, uint32_t last, uint64_t range_bits, void *scratch) {
    if (!plan->by_range && !plan->scaled && !plan->biased) {
        return;
    }
    uint16_t *ranges = (uint16_t *)(((uintptr_t)table_of(plan, 3) + 1) & ~(uintptr_t)1);
    uint16_t *sizes = ranges + plan->channels;
    int8_t *exponents = (int8_t *)table_of(plan, 1), *biases = plan->biased ? (int8_t *)table_of(plan, 2) : NULL;
    lynx_tile tile = plan->tile;
    tile.exponents = NULL;
    plan->extremes = plan->by_range ? (int16_t *)sizes + plan->channels : NULL;
    lynx_spreads(&tile, view, first, last, plan->by_range ? ranges : NULL, sizes, biases, plan->extremes, first > 0, scratch);
    if (plan->by_range) {
        weigh(ranges, sizes, tile.heads, tile.head_dim);
        choose_widths(ranges, plan->channels, range_bits, table_of(plan, 0));
    }
    if (plan->scaled) {
        const uint64_t at = (uint64_t)first * tile.head_dim;
        choose_exponents(sizes + at, last - first, tile.head_dim, exponents + at);
    }
}

int lynx_hq_prepare(const lynx_hq_config *config, const lynx_view *view, void *memory, void *scratch) {
    lynx_plan *plan = memory;
    if (start_tile(config, view, plan) != LYNX_OK) {
        return LYNX_ERR_ARGUMENT;
    }
    look(plan, view, 0, config->heads, config->range_bits, scratch);
    size_plan(plan);
    return LYNX_OK;
}

/* Where the sections of payloads start, if all take what they take at most. */
typedef struct {
    uint64_t fold_table, anchor, headers, params; /* of level 0 */
    uint64_t rest_table, rest;                    /* of level 1 */
    uint64_t rank_table, rank;                    /* of the last level */
} lynx_layout;

static lynx_layout layout_of(const lynx_plan *plan) {
    lynx_layout at = {.fold_table = HEADER + plan->side, .rest_table = HEADER, .rank_table = HEADER};
    at.anchor = at.fold_table + plan->fold_table;
    at.headers = at.anchor + plan->sizes.anchor;
    at.params = at.headers + PARAM_HEADER * plan->sizes.blocks;
    at.rest = at.rest_table + plan->rest_table;
    at.rank_table = plan->levels == 2 ? at.rest + plan->sizes.rest : HEADER;
    at.rank = at.rank_table + RANK_HEADER * plan->sizes.blocks;
    return at;
}

/* Where blocks [first, last) are encoded to. */
static lynx_encoded destination(const lynx_plan *plan, uint64_t first, uint64_t last, uint8_t *const levels[3]) {
    lynx_sizes before = {0}, sizes = plan->sizes;
    if (first > 0 || last < plan->sizes.blocks) {
        lynx_measure(&plan->tile, 0, first, &before);
        lynx_measure(&plan->tile, first, last, &sizes);
    }
    const lynx_layout at = layout_of(plan);
    uint8_t *anchor = levels[0], *rest = plan->levels > 1 ? levels[1] : NULL;
    uint8_t *rank = plan->levels > 1 ? levels[plan->levels - 1] : NULL;
    lynx_encoded out = {.wants_rank_bound = plan->levels > 1,
                        .anchor_left = sizes.anchor,
                        .rest_left = sizes.rest,
                        .rank_most = RANK_HEADER * sizes.blocks + sizes.max_rank};
    if (anchor != NULL) {
        out.fold_table = plan->fold_table == 0 ? NULL : anchor + at.fold_table + FOLD_HEADER * first;
        out.anchor = anchor + at.anchor + before.anchor;
        out.param_headers = anchor + at.headers + PARAM_HEADER * first;
        out.params = anchor + at.params + before.max_params;
    }
    if (rest != NULL) {
        out.rest_table = plan->rest_table == 0 ? NULL : rest + at.rest_table + FOLD_HEADER * first;
        out.rest = rest + at.rest + before.rest;
    }
    if (rank != NULL) {
        out.rank_table = rank + at.rank_table + RANK_HEADER * first;
        out.rank = rank + at.rank + before.max_rank;
    }
    return out;
}

int lynx_hq_encode(const void *memory, const lynx_view *view, uint64_t first, uint64_t last, uint8_t *const levels[3],
                   lynx_hq_piece *piece, void *scratch) {
    const lynx_plan *plan = memory;
    if (first > last || last > plan->sizes.blocks) {
        return LYNX_ERR_ARGUMENT;
    }
    lynx_encoded out = destination(plan, first, last, levels);
    out.made = (lynx_hq_piece){.first = first, .last = last};
    lynx_encode(&plan->tile, view, first, last, plan->extremes, false, &out, scratch);
    *piece = out.made;
    return LYNX_OK;
}

/* Where the encoder's next bytes go. */
typedef struct {
    uint8_t *start, *end;
} sink;

static void move(sink *to, const uint8_t *from, uint64_t size) {
    memmove(to->end, from, size);
    to->end += size;
}

static void write_header(uint8_t *payload, int mode, int level, uint64_t size) {
    payload[0] = (uint8_t)mode;
    payload[1] = (uint8_t)level;
    store16(payload + 2, 0);
    store32(payload + 4, (uint32_t)size);
}

static uint8_t *write_nibbles(const uint8_t *values, int plus, uint64_t count, uint8_t *out) {
    for (uint64_t i = 0; i < count; i += 2) {
        const int low = (int8_t)values[i] + plus, high = i + 1 < count ? (int8_t)values[i + 1] + plus : 0;
        *out++ = (uint8_t)(low | high << 4);
    }
    return out;
}

/* What a tile is taken to take without ranks, which decides whether it is stored. */
static uint64_t all_but_ranks(const lynx_plan *plan, uint64_t params) {
    const uint64_t first = plan->side + plan->fold_table + plan->sizes.anchor + PARAM_HEADER * plan->sizes.blocks + params;
    return HEADER * (uint64_t)plan->levels + first + (plan->levels > 1 ? plan->rest_table + plan->sizes.rest : 0);
}

static int assemble(const lynx_plan *plan, uint8_t *const levels[3], const lynx_hq_piece *pieces, uint64_t count, uint64_t sizes[3]) {
    const lynx_layout at = layout_of(plan);
    const uint64_t blocks = plan->sizes.blocks;
    uint64_t params = 0, rank = 0, rank_bound = 0;
    for (uint64_t i = 0; i < count; i++) {
        params += pieces[i].params;
        rank += pieces[i].rank;
        rank_bound += pieces[i].rank_bound;
    }
    const uint64_t total = all_but_ranks(plan, params) + (plan->levels > 1 ? rank_bound : 0);
    if (total >= 2 * plan->channels * plan->tile.tokens) {
        return plan->levels == 1 || levels[plan->levels - 1] != NULL ? LYNX_STORED : LYNX_UNDECIDED;
    }
    uint8_t *first = levels[0], *rest = plan->levels > 1 ? levels[1] : NULL;
    if (first != NULL) {
        uint8_t *side = first + HEADER;
        write_header(first, CODED, 0, params);
        side = plan->by_range ? write_nibbles(plan->tile.widths, 0, plan->channels, side) : side;
        side = plan->scaled ? write_nibbles((const uint8_t *)plan->tile.exponents, 8, plan->channels, side) : side;
        side = plan->biased ? write_nibbles((const uint8_t *)plan->tile.biases, 8, plan->channels, side) : side;
        sink to = {first, first + at.anchor};
        lynx_sizes before = {0};
        for (uint64_t i = 0; i < count; i++) {
            if (i > 0) {
                lynx_measure(&plan->tile, 0, pieces[i].first, &before);
            }
            move(&to, first + at.anchor + before.anchor, pieces[i].anchor);
        }
        move(&to, first + at.headers, PARAM_HEADER * blocks);
        for (uint64_t i = 0; i < count; i++) {
            lynx_measure(&plan->tile, 0, pieces[i].first, &before);
            move(&to, first + at.params + before.max_params, pieces[i].params);
        }
        sizes[0] = (uint64_t)(to.end - to.start);
    }
    for (int level = 1; level < plan->levels; level++) {
        uint8_t *payload = levels[level];
        if (payload == NULL) {
            continue;
        }
        const bool last = level == plan->levels - 1;
        write_header(payload, CODED, level, last ? rank : 0);
        sink to = {payload, payload + HEADER};
        lynx_sizes before = {0};
        if (payload == rest) {
            to.end = payload + at.rest;
            for (uint64_t i = 0; i < count; i++) {
                if (i > 0) {
                    lynx_measure(&plan->tile, 0, pieces[i].first, &before);
                }
                move(&to, payload + at.rest + before.rest, pieces[i].rest);
            }
        }
        if (last) {
            move(&to, payload + at.rank_table, RANK_HEADER * blocks);
            before = (lynx_sizes){0};
            for (uint64_t i = 0; i < count; i++) {
                if (i > 0) {
                    lynx_measure(&plan->tile, 0, pieces[i].first, &before);
                }
                move(&to, payload + at.rank + before.max_rank, pieces[i].rank);
            }
        }
        sizes[level] = (uint64_t)(to.end - to.start);
    }
    return LYNX_OK;
}

int lynx_hq_assemble(const void *plan, uint8_t *const levels[3], const lynx_hq_piece *pieces, uint64_t count, uint64_t sizes[3]) {
    return assemble(plan, levels, pieces, count, sizes);
}

int lynx_hq_encode_tile(const lynx_hq_config *config, const lynx_view *view, uint8_t *const levels[3], uint64_t sizes[3],
                        void *memory, void *scratch) {
    lynx_plan *plan = memory;
    if (start_tile(config, view, plan) != LYNX_OK) {
        return LYNX_ERR_ARGUMENT;
    }
    /* Values head by head, the next one's words on their way meanwhile: waiting for them is half of the time of an anchor. */
    const uint32_t step = config->part == LYNX_VALUE ? 1 : config->heads;
    look(plan, view, 0, step, config->range_bits, scratch);
    size_plan(plan);
    const uint64_t blocks = plan->sizes.blocks / config->heads;
    lynx_encoded out = destination(plan, 0, plan->sizes.blocks, levels);
    out.made.last = plan->sizes.blocks;
    const uint64_t words = 2 * plan->channels * config->tokens, others = all_but_ranks(plan, plan->sizes.max_params);
    out.rank_room = words > others ? words - others : 0;
    for (uint32_t head = 0; head < config->heads; head += step) {
        const uint32_t next = head + step;
        lynx_encode(&plan->tile, view, head * blocks, next * blocks, plan->extremes, next < config->heads, &out, scratch);
        if (next < config->heads) {
            look(plan, view, next, next + step, config->range_bits, scratch);
        }
    }
    return assemble(plan, levels, &out.made, 1, sizes);
}

int lynx_hq_store(const lynx_hq_config *config, const lynx_view *view, int level, uint8_t *payload, uint64_t *size) {
    if (level < 0 || level >= config->levels) {
        return LYNX_ERR_ARGUMENT;
    }
    write_header(payload, STORED, level, 0);
    *size = HEADER;
    if (level > 0) {
        return LYNX_OK;
    }
    *size += 2 * (uint64_t)config->heads * config->tokens * config->head_dim;
    return lynx_view_gather(view, 2, config->heads, config->tokens, config->head_dim, payload + HEADER);
}

/* --- decoder -------------------------------------------------------------------------------------------------- */

static int fail(lynx_hq_fault *fault, int error, int level, uint64_t offset, uint64_t expected) {
    *fault = (lynx_hq_fault){.level = level, .section = -1, .offset = offset, .expected = expected};
    return error;
}

static int check_size(lynx_hq_fault *fault, int level, uint64_t size, uint64_t expected) {
    if (size == expected) {
        return LYNX_OK;
    }
    return fail(fault, size < expected ? LYNX_ERR_TRUNCATED : LYNX_ERR_PADDED, level, size < expected ? size : expected,
                expected);
}

static int check_header(lynx_hq_fault *fault, const uint8_t *payload, uint64_t size, int level) {
    if (size < HEADER) {
        return fail(fault, LYNX_ERR_TRUNCATED, level, size, HEADER);
    }
    if (payload[0] != CODED && payload[0] != STORED) {
        return fail(fault, LYNX_ERR_HEADER, level, 0, 0);
    }
    if (payload[1] != level) {
        return fail(fault, LYNX_ERR_LEVEL, level, 1, payload[1]);
    }
    if (load16(payload + 2) != 0) {
        return fail(fault, LYNX_ERR_HEADER, level, 2, 0);
    }
    return LYNX_OK;
}

/* Nibbles less `minus`, at most `most`; whether they were good, padding included. */
static bool read_nibbles(const uint8_t *in, uint64_t count, int minus, int most, uint8_t *out) {
    int largest = 0;
    for (uint64_t i = 0; i < count; i++) {
        const int value = in[i / 2] >> 4 * (i & 1) & 15;
        largest = value > largest ? value : largest;
        out[i] = (uint8_t)(value - minus);
    }
    return largest <= most && (count % 2 == 0 || in[count / 2] >> 4 == 0);
}

static int read_side(lynx_plan *plan, const uint8_t *payload, uint64_t size, lynx_hq_fault *fault) {
    const bool there[3] = {plan->by_range, plan->scaled, plan->biased};
    uint64_t at = HEADER;
    for (int i = 0; i < 3; i++) {
        if (there[i]) {
            const uint64_t bytes = (plan->channels + 1) / 2;
            if (size < at + bytes) {
                return fail(fault, LYNX_ERR_TRUNCATED, 0, size, at + bytes);
            }
            if (!read_nibbles(payload + at, plan->channels, i == 0 ? 0 : 8, i == 0 ? 8 : 15, table_of(plan, i))) {
                return fail(fault, LYNX_ERR_TABLE, 0, at, 0);
            }
            at += bytes;
        }
    }
    return LYNX_OK;
}

static int translated(const lynx_plan *plan, int error, lynx_hq_fault *fault) {
    if (error != LYNX_OK) {
        fault->level = plan->level_of[fault->section];
        fault->offset += plan->starts[fault->section];
    }
    return error;
}

static uint64_t without(uint64_t size, uint64_t other) {
    return size > other ? size - other : 0;
}

static int open_payloads(const lynx_hq_config *config, const uint8_t *const *payloads, const uint64_t *sizes, int count,
                         lynx_plan *plan, lynx_hq_fault *fault) {
    *fault = (lynx_hq_fault){0};
    if (count < 1 || count > config->levels || start_plan(config, plan) != LYNX_OK) {
        return LYNX_ERR_ARGUMENT;
    }
    for (int level = 0; level < count; level++) {
        const int error = check_header(fault, payloads[level], sizes[level], level);
        if (error != LYNX_OK) {
            return error;
        }
        if (payloads[level][0] != payloads[0][0]) {
            return fail(fault, LYNX_ERR_MIXED, level, 0, 0);
        }
        if (load32(payloads[level] + 4) != 0 &&
            (payloads[level][0] == STORED || (level > 0 && level < config->levels - 1))) {
            return fail(fault, LYNX_ERR_HEADER, level, 4, 0);
        }
    }
    if (payloads[0][0] == STORED) {
        for (int level = 0; level < count; level++) {
            const uint64_t words = level == 0 ? 2 * plan->channels * config->tokens : 0;
            const int error = check_size(fault, level, sizes[level], HEADER + words);
            if (error != LYNX_OK) {
                return error;
            }
        }
        return LYNX_STORED;
    }
    int error = read_side(plan, payloads[0], sizes[0], fault);
    if (error != LYNX_OK) {
        return error;
    }
    if (lynx_tile_is_bad(&plan->tile)) {
        return LYNX_ERR_ARGUMENT;
    }
    size_plan(plan);
    const uint64_t blocks = plan->sizes.blocks, headers = PARAM_HEADER * blocks, table = RANK_HEADER * blocks;
    const uint64_t planes = HEADER + plan->side + plan->fold_table, params = load32(payloads[0] + 4);
    lynx_levels *in = &plan->in;
    in->anchor_size = plan->tile.fold ? without(sizes[0], planes + headers + params) : plan->sizes.anchor;
    error = check_size(fault, 0, sizes[0], planes + in->anchor_size + headers + params);
    if (error != LYNX_OK) {
        return error;
    }
    in->anchor = payloads[0] + planes;
    in->fold_table = plan->tile.fold ? in->anchor - plan->fold_table : NULL;
    in->param_headers = in->anchor + in->anchor_size;
    in->params = in->param_headers + headers;
    in->params_size = params;
    plan->starts[IN_ANCHOR] = planes;
    plan->starts[IN_PARAMS] = planes + in->anchor_size + headers;
    const int last = config->levels - 1;
    if (count > 1) {
        const uint64_t start = HEADER + plan->rest_table;
        const uint64_t beyond = last == 1 ? table + load32(payloads[1] + 4) : 0;
        in->rest_size = plan->rest_table != 0 ? without(sizes[1], start + beyond) : plan->sizes.rest;
        error = check_size(fault, 1, sizes[1], start + in->rest_size + beyond);
        if (error != LYNX_OK) {
            return error;
        }
        in->rest = payloads[1] + start;
        in->rest_table = plan->rest_table != 0 ? payloads[1] + HEADER : NULL;
        plan->starts[IN_REST] = start;
        plan->level_of[IN_REST] = 1;
    }
    if (count > 1 && count - 1 == last) {
        const uint64_t start = (last == 1 ? plan->starts[IN_REST] + in->rest_size : HEADER) + table;
        in->rank_size = load32(payloads[last] + 4);
        error = check_size(fault, last, sizes[last], start + in->rank_size);
        if (error != LYNX_OK) {
            return error;
        }
        in->rank = payloads[last] + start;
        in->rank_table = in->rank - table;
        plan->starts[IN_RANKS] = start;
        plan->level_of[IN_RANKS] = last;
    }
    return translated(plan, lynx_check(&plan->tile, in, fault), fault);
}

int lynx_hq_open(const lynx_hq_config *config, const uint8_t *const *payloads, const uint64_t *sizes, int count, void *plan,
                 lynx_hq_fault *fault) {
    return open_payloads(config, payloads, sizes, count, plan, fault);
}

static int decode(const lynx_plan *plan, const lynx_view *view, uint64_t first, uint64_t last, void *scratch, lynx_hq_fault *fault) {
    if (first > last || last > plan->sizes.blocks || (view->pages != NULL && view->page_tokens == 0)) {
        return LYNX_ERR_ARGUMENT;
    }
    return translated(plan, lynx_decode(&plan->tile, &plan->in, view, first, last, scratch, fault), fault);
}

int lynx_hq_decode(const void *plan, const lynx_view *view, uint64_t first, uint64_t last, void *scratch, lynx_hq_fault *fault) {
    return decode(plan, view, first, last, scratch, fault);
}

int lynx_hq_decode_tile(const lynx_hq_config *config, const uint8_t *const *payloads, const uint64_t *sizes, int count,
                        const lynx_view *view, void *memory, void *scratch, lynx_hq_fault *fault) {
    lynx_plan *plan = memory;
    const int outcome = open_payloads(config, payloads, sizes, count, plan, fault);
    return outcome != LYNX_OK ? outcome : decode(plan, view, 0, plan->sizes.blocks, scratch, fault);
}
