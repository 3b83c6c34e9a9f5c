/* Hierarchical quantisation: blocks, parameters and checks around the kernels. spec/codec-hq.md is the format. */
#include "isa.h"
#include "params.h"
#include "words.h"

#define RAW_PARAMS 0xff   /* parameter header: both widths; s and z follow in full */
#define RAW_RANKS 0xffff  /* rank table: size of stream A; the block's words follow */
#define MAX_ZERO_POINT 1024
#define SCALE_UNIT 4      /* scales have 6 significant bits: a multiple of 4 as bfloat16 words */

typedef struct {
    uint8_t range;   /* R: steps between a group's extremes, all but the rounding */
    uint8_t offset;  /* o: added to a code before it is stored */
    uint8_t base;    /* the anchor's integer for the lowest code; code 2^(8-b) further up is 2^(8-b) more */
} lynx_width;

/* spec/codec-hq.md, "Widths". Widths 1 and 2 are inset: their anchor levels lie inside the range. */
static const lynx_width KEY_WIDTHS[9] = {{254, 0, 127}, {254, 0, 64}, {211, 22, 10}, {224, 16, 0}, {240, 8, 0},
                                         {248, 4, 0},   {252, 2, 0},  {253, 1, 0},   {254, 0, 0}};
static const lynx_width VALUE_WIDTHS[9] = {{254, 0, 127}, {254, 0, 64}, {230, 12, 19}, {224, 16, 0}, {240, 8, 0},
                                           {248, 4, 0},   {252, 2, 0},  {253, 1, 0},  {254, 0, 0}};

typedef struct {
    lynx_planes planes;
    lynx_params params;
    uint32_t planes_head, planes_first; /* which block's planes are set up; heads + 1 at first */
    int16_t low[ROW], high[ROW];
    uint16_t words[BLOCK_VALUES];
    uint8_t codes[BLOCK_VALUES], centred[BLOCK_VALUES];
    uint8_t anchor[8 * 8 * ROW + SLACK], rest[8 * 8 * ROW + SLACK];
    uint8_t flat[8 * 8 * ROW + SLACK], flat_rest[8 * 8 * ROW + SLACK];
    uint8_t folded[FOLDED_MAX + SLACK];
    int16_t shifts[ROW], unshifts[ROW]; /* exponents of the block's channels, in words; and their negatives */
    bool shifted;                       /* some exponent is not 0 */
    lynx_streams streams;
} lynx_scratch;

size_t lynx_hq_scratch_size(void) {
    return sizeof(lynx_scratch) + 64;
}

static lynx_scratch *aligned(void *scratch) {
    return (lynx_scratch *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
}

static bool tile_is_bad(const lynx_hq_tile *tile) {
    if ((tile->dtype != LYNX_BFLOAT16 && tile->dtype != LYNX_FLOAT16) ||
        (tile->part != LYNX_KEY && tile->part != LYNX_VALUE) || tile->heads == 0 || tile->tokens == 0 ||
        tile->head_dim == 0 || tile->widths == NULL) {
        return true;
    }
    if (tile->heads > 1u << 24 || tile->tokens > 1u << 28 || tile->head_dim > 1u << 20 ||
        (uint64_t)tile->heads * tile->tokens > (uint64_t)(1ull << 44) / tile->head_dim) {
        return true;
    }
    if (tile->exponents != NULL && tile->dtype != LYNX_BFLOAT16) {
        return true;
    }
    const uint64_t n = (uint64_t)tile->heads * tile->head_dim;
    for (uint64_t i = 0; i < n; i++) {
        if ((tile->exponents != NULL && (tile->exponents[i] < -8 || tile->exponents[i] > 7)) ||
            (tile->biases != NULL && (tile->biases[i] < -8 || tile->biases[i] > 7))) {
            return true;
        }
        const uint64_t in_block = i % tile->head_dim % LYNX_BLOCK;
        if (tile->widths[i] > 8 || (tile->part == LYNX_VALUE && tile->widths[i] != tile->widths[i - in_block])) {
            return true;
        }
    }
    return false;
}

/* A walk over blocks in order, with the places of a block's planes. */
typedef struct {
    uint64_t index;
    uint32_t head, token, channel; /* of the block's first value */
    int tokens, channels, octets, groups;
    uint32_t width_sum;            /* sum of its channels' widths */
    uint32_t folded[2];            /* channels whose top planes fold, in the anchor and in the rest section */
} lynx_block;

static bool folds(int part, int section, int width) {
    return section == ANCHOR_SECTION ? width >= 2 : part == LYNX_KEY && width < 2;
}

static void measure_block(const lynx_hq_tile *tile, lynx_block *block) {
    const uint32_t tokens = tile->tokens - block->token, channels = tile->head_dim - block->channel;
    block->tokens = tokens < ROW ? (int)tokens : ROW;
    block->channels = channels < ROW ? (int)channels : ROW;
    block->octets = (block->tokens + 7) / 8;
    block->groups = tile->part == LYNX_KEY ? block->channels : block->tokens;
    const uint8_t *widths = tile->widths + (uint64_t)block->head * tile->head_dim + block->channel;
    block->width_sum = block->folded[0] = block->folded[1] = 0;
    for (int c = 0; c < block->channels; c++) {
        block->width_sum += widths[c];
        for (int section = 0; section < 2; section++) {
            block->folded[section] += tile->fold != 0 && folds(tile->part, section, widths[c]);
        }
    }
}

static void next_block(const lynx_hq_tile *tile, lynx_block *block) {
    block->index++;
    block->channel += ROW;
    if (block->channel >= tile->head_dim) {
        block->channel = 0;
        block->token += ROW;
        if (block->token >= tile->tokens) {
            block->token = 0;
            block->head++;
        }
    }
    if (block->head < tile->heads) {
        measure_block(tile, block);
    }
}

static uint64_t count_blocks(const lynx_hq_tile *tile) {
    return (uint64_t)tile->heads * ((tile->tokens + ROW - 1) / ROW) * ((tile->head_dim + ROW - 1) / ROW);
}

static void add_block(const lynx_block *block, lynx_hq_sizes *sizes) {
    sizes->blocks++;
    sizes->groups += (uint64_t)block->groups;
    sizes->anchor += (uint64_t)block->octets * block->width_sum;
    sizes->rest += (uint64_t)block->octets * (8u * (uint32_t)block->channels - block->width_sum);
    sizes->max_params += 4u * (uint64_t)block->groups;
    sizes->max_rank += 2u * (uint64_t)block->tokens * (uint64_t)block->channels;
}

static void walk(const lynx_hq_tile *tile, uint64_t first, uint64_t last, lynx_hq_sizes *sizes, lynx_block *block) {
    *sizes = (lynx_hq_sizes){0};
    *block = (lynx_block){0};
    measure_block(tile, block);
    while (block->index < first) {
        next_block(tile, block);
    }
    while (block->index < last) {
        add_block(block, sizes);
        next_block(tile, block);
    }
}

int lynx_hq_measure_range(const lynx_hq_tile *tile, uint64_t first, uint64_t last, lynx_hq_sizes *sizes) {
    if (tile_is_bad(tile) || first > last || last > count_blocks(tile)) {
        return LYNX_ERR_ARGUMENT;
    }
    lynx_block block;
    walk(tile, first, last, sizes, &block);
    return LYNX_OK;
}

int lynx_hq_measure(const lynx_hq_tile *tile, lynx_hq_sizes *sizes) {
    if (tile_is_bad(tile)) {
        return LYNX_ERR_ARGUMENT;
    }
    return lynx_hq_measure_range(tile, 0, count_blocks(tile), sizes);
}

int lynx_hq_folds_rest(const lynx_hq_tile *tile) {
    const uint64_t n = (uint64_t)tile->heads * tile->head_dim;
    bool found = false;
    for (uint64_t i = 0; i < n; i++) {
        found |= folds(tile->part, REST_SECTION, tile->widths[i]);
    }
    return tile->fold && found;
}

/* Channels of the block that have a plane in a section. */
static uint64_t channels_of(const lynx_planes *planes, int section, int plane) {
    uint64_t mask = 0;
    for (int c = 0; c < planes->channels; c++) {
        mask |= (uint64_t)((plane < planes->widths[c]) == (section == ANCHOR_SECTION)) << c;
    }
    return mask;
}

static void set_folds(int part, bool fold, lynx_planes *planes) {
    for (int section = 0; section < 2; section++) {
        lynx_fold *f = &planes->fold[section];
        *f = (lynx_fold){.two_row = section};
        for (int c = 0; c < planes->channels; c++) {
            const int width = planes->widths[c];
            if (fold && folds(part, section, width)) {
                const bool two = width == 2 || width == 1;
                *(two ? &f->two : &f->three) |= 1ull << c;
            }
        }
        int rows = 0, folded = 0;
        for (int p = 0; p < 3; p++) {
            f->rows[p] = channels_of(planes, section, p);
            f->folded_rows[p] = f->rows[p];
            rows += __builtin_popcountll(f->rows[p]);
        }
        f->folded_rows[f->two_row + 1] &= ~f->two; /* D1 takes one row of two or three */
        f->folded_rows[2] &= ~f->three;
        for (int p = 0; p < 3; p++) {
            folded += __builtin_popcountll(f->folded_rows[p]);
        }
        f->flat_size = section == ANCHOR_SECTION ? planes->anchor_octet : planes->rest_octet;
        f->others = f->flat_size - rows;
        f->folded_size = folded + f->others;
    }
}

/* Set up `planes` for the block's channels, unless they are still there from the block before. */
static void set_planes(const lynx_hq_tile *tile, const lynx_block *block, lynx_scratch *s) {
    if (s->planes_head == block->head && s->planes_first == block->channel) {
        return;
    }
    s->planes_head = block->head;
    s->planes_first = block->channel;
    lynx_planes *planes = &s->planes;
    planes->channels = block->channels;
    planes->anchor_octet = (uint16_t)block->width_sum;
    planes->rest_octet = (uint16_t)(8 * block->channels - (int)block->width_sum);
    memset(planes->widths, 255, sizeof planes->widths);
    memcpy(planes->widths, tile->widths + (uint64_t)block->head * tile->head_dim + block->channel,
           (size_t)block->channels);
    planes->uniform = block->channels == ROW;
    for (int c = 1; c < ROW; c++) {
        planes->uniform &= planes->widths[c] == planes->widths[0];
    }
    set_folds(tile->part, tile->fold != 0, planes);
    s->shifted = false;
    for (int c = 0; c < ROW; c++) {
        const bool used = c < block->channels;
        const uint64_t at = (uint64_t)block->head * tile->head_dim + block->channel + (uint64_t)c;
        planes->bias[c] = (int16_t)(tile->biases == NULL || !used ? 0 : 4 * tile->biases[at]);
        const int exponent = tile->exponents == NULL || !used ? 0 : tile->exponents[at];
        s->shifts[c] = (int16_t)(128 * exponent);
        s->unshifts[c] = (int16_t)(-128 * exponent);
        s->shifted |= exponent != 0;
    }
    for (int g = 0; g < ROW; g++) {
        const uint8_t bits = planes->widths[tile->part == LYNX_KEY && g < block->channels ? g : 0];
        const lynx_width *width = tile->part == LYNX_KEY ? &KEY_WIDTHS[bits] : &VALUE_WIDTHS[bits];
        planes->steps[g] = width->range;
        planes->full[g] = width->offset;
        planes->base[g] = width->base;
        planes->low[g] = width->offset;
        planes->high[g] = (uint8_t)(width->offset + width->range + 1);
    }
    memset(planes->anchor_expand, 0x80, sizeof planes->anchor_expand);
    memset(planes->anchor_compress, 0x80, sizeof planes->anchor_compress);
    memset(planes->rest_expand, 0x80, sizeof planes->rest_expand);
    memset(planes->rest_compress, 0x80, sizeof planes->rest_compress);
    for (int p = 0; p < 8 && !planes->uniform; p++) {
        uint8_t anchor = 0, rest = 0;
        for (int lane = 0; lane < ROW; lane += 16) {
            planes->anchor_rank[p][lane / 16] = anchor;
            planes->rest_rank[p][lane / 16] = rest;
            uint8_t in_anchor = 0, in_rest = 0;
            for (uint8_t c = 0; c < 16 && lane + c < block->channels; c++) {
                if (p < planes->widths[lane + c]) {
                    planes->anchor_expand[p][lane + c] = in_anchor;
                    planes->anchor_compress[p][lane + in_anchor++] = c;
                } else {
                    planes->rest_expand[p][lane + c] = in_rest;
                    planes->rest_compress[p][lane + in_rest++] = c;
                }
            }
            anchor = (uint8_t)(anchor + in_anchor);
            rest = (uint8_t)(rest + in_rest);
        }
        planes->anchor_count[p] = anchor;
    }
}

/* Set scales and offsets from s and z, for bytes that are full codes (`full`) or anchors with zeros below. */
static void derive(const lynx_planes *planes, bool full, lynx_params *params) {
    for (int g = 0; g < ROW; g++) {
        params->scale[g] = bits_float((uint32_t)params->s[g] << 16);
        params->offset[g] = (int16_t)(params->z[g] + (full ? planes->full[g] : -planes->base[g]));
    }
}

/* --- encoder ------------------------------------------------------------------------------------------------- */

/* Extremes of a group that holds special words: over the others; 0 if there are none, or none but -0, of which a scale
 * would be negative. */
static void finite_range(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const lynx_block *block, int g,
                         int16_t *low, int16_t *high) {
    const int n = part == LYNX_KEY ? block->tokens : block->channels;
    bool any = false;
    for (int i = 0; i < n; i++) {
        const uint16_t word = part == LYNX_KEY ? rows[i * stride + g] : rows[g * stride + i];
        if ((word & 0x7fff) < LYNX_DTYPES[dtype].special) {
            const int16_t o = ordered(word);
            *low = !any || o < *low ? o : *low;
            *high = !any || o > *high ? o : *high;
            any = true;
        }
    }
    const int16_t minus_zero = ordered(0x8000);
    if (!any || (*low == minus_zero && *high == minus_zero)) {
        *low = *high = 0;
    }
}

/* Choose s and z of every group from its extremes. Returns whether the block holds a special word outside constant
 * groups. */
static bool choose_params(const lynx_kernels *kernels, const lynx_hq_tile *tile, const lynx_block *block,
                          const uint16_t *rows, ptrdiff_t stride, lynx_scratch *s) {
    lynx_params *params = &s->params;
    const int16_t limit = LYNX_DTYPES[tile->dtype].special;
    bool odd = false, special = false;
    for (int g = block->groups; g < ROW; g++) {
        s->low[g] = s->low[0]; /* unused groups repeat a used one */
        s->high[g] = s->high[0];
    }
    for (int g = 0; g < ROW; g++) {
        odd |= (s->low[g] == s->high[g]) | (s->high[g] >= limit) | (s->low[g] < -limit);
    }
    params->constant = 0;
    if (!odd) {
        kernels->choose(tile->dtype, &s->planes, s->low, s->high, params);
        return false;
    }
    int16_t low[ROW], high[ROW];
    for (int g = 0; g < block->groups; g++) {
        low[g] = s->low[g];
        high[g] = s->high[g];
        if (low[g] == high[g]) {
            params->constant |= 1ull << g;
            params->word[g] = from_ordered(low[g]);
            low[g] = high[g] = 0;
        } else if (high[g] >= limit || low[g] < -limit) {
            special = true;
            finite_range(tile->part, tile->dtype, rows, stride, block, g, &low[g], &high[g]);
        }
    }
    memset(low + block->groups, 0, sizeof low[0] * (size_t)(ROW - block->groups));
    memset(high + block->groups, 0, sizeof high[0] * (size_t)(ROW - block->groups));
    kernels->choose(tile->dtype, &s->planes, low, high, params);
    for (int g = 0; g < block->groups; g++) {
        if (params->constant >> g & 1) {
            params->s[g] = 0;
            params->z[g] = 0;
        }
    }
    return special;
}

static int bit_length(uint32_t x) {
    return x == 0 ? 0 : floor_log2(x) + 1;
}

static uint64_t write_params(const lynx_params *params, int groups, uint8_t *header, uint8_t *out) {
    int s_low = INT32_MAX, s_high = INT32_MIN, z_low = INT32_MAX, z_high = INT32_MIN;
    for (int g = 0; g < groups; g++) {
        s_low = params->s[g] < s_low ? params->s[g] : s_low;
        s_high = params->s[g] > s_high ? params->s[g] : s_high;
        z_low = params->z[g] < z_low ? params->z[g] : z_low;
        z_high = params->z[g] > z_high ? params->z[g] : z_high;
    }
    const int s_bits = bit_length((uint32_t)(s_high - s_low) / SCALE_UNIT), z_bits = bit_length((uint32_t)(z_high - z_low));
    if (params->constant != 0) {
        store16(header, 0);
        store16(header + 2, 0);
        header[4] = header[5] = RAW_PARAMS;
        for (int g = 0; g < groups; g++) {
            store16(out + 4 * g, params->s[g]);
            store16(out + 4 * g + 2, params->constant >> g & 1 ? params->word[g] : (uint16_t)params->z[g]);
        }
        return 4 * (uint64_t)groups;
    }
    store16(header, (uint32_t)s_low);
    store16(header + 2, (uint32_t)z_low);
    header[4] = (uint8_t)s_bits;
    header[5] = (uint8_t)z_bits;
    const int bits = s_bits + z_bits;
    uint64_t pending = 0;
    int filled = 0;
    uint8_t *p = out;
    for (int g = 0; g < groups; g++) {
        pending |= ((uint64_t)((params->s[g] - s_low) / SCALE_UNIT) | (uint64_t)(params->z[g] - z_low) << s_bits) << filled;
        for (filled += bits; filled >= 8; filled -= 8) {
            *p++ = (uint8_t)pending;
            pending >>= 8;
        }
    }
    if (filled > 0) {
        *p++ = (uint8_t)pending;
    }
    return (uint64_t)(p - out);
}

static uint64_t rank_bytes(const lynx_streams *streams) {
    return (streams->a_bits + 7) / 8 + (streams->b_bits + 7) / 8 + (12 * streams->w_count + 7) / 8 +
           2 * (uint64_t)streams->x_count;
}

static uint64_t write_ranks(const lynx_streams *streams, uint8_t *table, uint8_t *out) {
    const uint32_t a = (streams->a_bits + 7) / 8, b = (streams->b_bits + 7) / 8, w = (12 * streams->w_count + 7) / 8;
    store16(table, a);
    store16(table + 2, b + w + 2 * streams->x_count);
    memcpy(out, streams->a, a);
    memcpy(out + a, streams->b, b);
    memcpy(out + a + b, streams->w, w);
    for (uint32_t i = 0; i < streams->x_count; i++) {
        store16(out + a + b + w + 2 * i, streams->x[i]);
    }
    return a + b + w + 2 * (uint64_t)streams->x_count;
}

/* Where zero lies among the codes of value tokens. */
static const int16_t *zeros_of(int part, const lynx_planes *planes, const lynx_params *params, int16_t *zeros) {
    if (part == LYNX_KEY) {
        return NULL;
    }
    for (int g = 0; g < ROW; g++) {
        zeros[g] = (int16_t)(params->z[g] + planes->low[g]);
    }
    return zeros;
}

static void zero_pad(const lynx_block *block, uint8_t *codes) {
    memset(codes + block->tokens * ROW, 0, (size_t)(8 * block->octets - block->tokens) * ROW);
}

/* Pack the block's codes and move the sections' ends. Only uniform planes can be written in place: kernels overrun the
 * end of others, where another thread's block may begin. */
static void pack_planes(const lynx_kernels *kernels, const lynx_block *block, const lynx_planes *planes,
                        const uint8_t *codes, lynx_scratch *s, uint8_t **anchor, uint8_t **rest) {
    if (*anchor == NULL && *rest == NULL) {
        return;
    }
    const size_t anchor_size = (size_t)block->octets * planes->anchor_octet;
    const size_t rest_size = (size_t)block->octets * planes->rest_octet;
    if (planes->uniform) {
        kernels->pack(planes, codes, block->tokens, *anchor, *rest);
    } else {
        kernels->pack(planes, codes, block->tokens, s->anchor, s->rest);
    }
    if (*anchor != NULL) {
        if (!planes->uniform) {
            memcpy(*anchor, s->anchor, anchor_size);
        }
        *anchor += anchor_size;
    }
    if (*rest != NULL) {
        if (!planes->uniform) {
            memcpy(*rest, s->rest, rest_size);
        }
        *rest += rest_size;
    }
}

/* A section of centred planes in folded form, if that is smaller, and its entry in the fold table. */
static bool fold_section(const lynx_kernels *kernels, const lynx_block *block, int section, const uint8_t *flat,
                         lynx_scratch *s, uint8_t *entry, uint8_t **out) {
    const lynx_fold *fold = &s->planes.fold[section];
    store16(entry, FLAT);
    if (block->folded[section] == 0) {
        return false;
    }
    const uint32_t fixed = (uint32_t)(block->octets * fold->folded_size);
    const uint32_t made = kernels->fold(fold, flat, block->tokens, s->folded), size = fixed + (made & FOLD_SIZE);
    if (size >= (uint32_t)(block->octets * fold->flat_size)) {
        return false;
    }
    store16(entry, made);
    memcpy(*out, s->folded, size);
    *out += size;
    return true;
}

/* The block's planes, folded where that is smaller, and the entries in the fold tables. */
static void pack_folded(const lynx_kernels *kernels, int part, const lynx_block *block, lynx_scratch *s,
                        uint8_t *anchor_entry, uint8_t *rest_entry, uint8_t **anchor, uint8_t **rest) {
    uint8_t *none = NULL, *flat = s->flat, *late = s->flat_rest;
    const bool fold_anchor = *anchor != NULL && anchor_entry != NULL, fold_rest = *rest != NULL && rest_entry != NULL;
    int16_t zeros[ROW];
    kernels->centre(&s->planes, zeros_of(part, &s->planes, &s->params, zeros), s->codes, block->tokens, s->centred);
    pack_planes(kernels, block, &s->planes, s->centred, s, fold_anchor ? &flat : &none, fold_rest ? &late : &none);
    const bool done = fold_anchor && fold_section(kernels, block, ANCHOR_SECTION, s->flat, s, anchor_entry, anchor);
    const bool done_rest = fold_rest && fold_section(kernels, block, REST_SECTION, s->flat_rest, s, rest_entry, rest);
    pack_planes(kernels, block, &s->planes, s->codes, s, done ? &none : anchor, done_rest ? &none : rest);
}

#define LEAST_SPREAD 0x2000 /* 2^-63 */

static uint32_t spread_word(float spread) {
    const uint32_t word = (float_bits(spread) + 0xffffu) >> 16;
    return word < LEAST_SPREAD || word >= 0x8000 ? LEAST_SPREAD : word; /* 0x8000: nothing but -0 */
}

/* How far a channel's values lie from zero, by their signs, in units of 4 codes: round(15 (positive - negative) / n). */
static int8_t bias_of(uint32_t tokens, uint32_t negative) {
    const int64_t n = tokens, excess = n - 2 * (int64_t)negative;
    const int64_t bias = (30 * excess + 31 * n) / (2 * n) - 15; /* the dividend is positive */
    return (int8_t)(bias < -8 ? -8 : bias > 7 ? 7 : bias);
}

/* The block's values in rows of 64 channels for the kernels: in place, or in scratch where there are fewer channels
 * (repeats do not change a group's extremes) or exponents to divide by. */
static const uint16_t *block_rows(const lynx_kernels *kernels, const lynx_block *block, const uint16_t *rows,
                                  ptrdiff_t *stride, lynx_scratch *s) {
    if (block->channels < ROW) {
        for (int t = 0; t < block->tokens; t++) {
            for (int c = 0; c < ROW; c++) {
                s->words[t * ROW + c] = rows[t * *stride + (c < block->channels ? c : 0)];
            }
        }
        rows = s->words;
        *stride = ROW;
    }
    if (s->shifted) {
        for (int c = block->channels; c < ROW; c++) {
            s->shifts[c] = s->shifts[0];
        }
        kernels->rescale(s->shifts, rows, *stride, block->tokens, s->words, ROW);
        rows = s->words;
        *stride = ROW;
    }
    return rows;
}

int lynx_hq_spreads(const lynx_hq_tile *tile, const uint16_t *words, ptrdiff_t head_stride, ptrdiff_t token_stride,
                    uint16_t *ranges, uint16_t *sizes, int8_t *biases, void *scratch) {
    if (tile_is_bad(tile) || tile->exponents != NULL) {
        return LYNX_ERR_ARGUMENT;
    }
    const lynx_kernels *kernels = lynx_current();
    lynx_scratch *s = aligned(scratch);
    s->shifted = false;
    const int16_t limit = LYNX_DTYPES[tile->dtype].special;
    for (uint32_t head = 0; head < tile->heads; head++) {
        for (uint32_t channel = 0; channel < tile->head_dim; channel += ROW) {
            uint64_t range[ROW] = {0}, size[ROW] = {0}, count[ROW] = {0};
            uint32_t negative[ROW] = {0};
            lynx_block block = {.head = head, .channel = channel};
            for (; block.token < tile->tokens; block.token += ROW) {
                measure_block(tile, &block);
                ptrdiff_t stride = token_stride;
                const uint16_t *rows = words + (ptrdiff_t)head * head_stride + (ptrdiff_t)block.token * token_stride +
                                       channel;
                rows = block_rows(kernels, &block, rows, &stride, s);
                kernels->range(LYNX_KEY, rows, stride, block.tokens, s->low, s->high);
                uint16_t signs[ROW] = {0};
                for (int t = 0; t < block.tokens; t++) {
                    for (int c = 0; c < ROW; c++) {
                        signs[c] = (uint16_t)(signs[c] + (rows[t * stride + c] >> 15));
                    }
                }
                for (int c = 0; c < block.channels; c++) {
                    negative[c] += signs[c];
                    if (s->high[c] < limit && s->low[c] >= -limit) {
                        const float low = word_value(tile->dtype, from_ordered(s->low[c]));
                        const float high = word_value(tile->dtype, from_ordered(s->high[c]));
                        range[c] += spread_word(high - low);
                        size[c] += spread_word(-low > high ? -low : high);
                        count[c]++;
                    }
                }
            }
            for (int c = 0; c < block.channels; c++) {
                const uint64_t at = (uint64_t)head * tile->head_dim + channel + (uint64_t)c;
                ranges[at] = (uint16_t)(count[c] == 0 ? LEAST_SPREAD : range[c] / count[c]);
                sizes[at] = (uint16_t)(count[c] == 0 ? LEAST_SPREAD : size[c] / count[c]);
                biases[at] = bias_of(tile->tokens, negative[c]);
            }
        }
    }
    return LYNX_OK;
}

int lynx_hq_encode(const lynx_hq_tile *tile, const uint16_t *words, ptrdiff_t head_stride, ptrdiff_t token_stride,
                   uint64_t first, uint64_t last, lynx_hq_encoded *out, void *scratch) {
    if (tile_is_bad(tile) || first > last || last > count_blocks(tile)) {
        return LYNX_ERR_ARGUMENT;
    }
    if (tile->fold && ((out->anchor == NULL) != (out->fold_table == NULL) ||
                       (out->rest == NULL || !lynx_hq_folds_rest(tile)) != (out->rest_table == NULL))) {
        return LYNX_ERR_ARGUMENT;
    }
    const lynx_kernels *kernels = lynx_current();
    lynx_scratch *s = aligned(scratch);
    s->planes_head = UINT32_MAX;
    uint8_t *fold_table = tile->fold ? out->fold_table : NULL, *rest_table = tile->fold ? out->rest_table : NULL;
    uint8_t *anchor = out->anchor, *rest = out->rest, *headers = out->param_headers, *params = out->params;
    uint8_t *table = out->rank_table, *ranks = out->rank;
    out->rank_bound = 0;
    lynx_hq_sizes skipped;
    lynx_block block;
    walk(tile, first, first, &skipped, &block);
    for (; block.index < last; next_block(tile, &block)) {
        set_planes(tile, &block, s);
        const uint64_t values = (uint64_t)block.tokens * (uint64_t)block.channels;
        const uint16_t *source = words + (ptrdiff_t)block.head * head_stride + (ptrdiff_t)block.token * token_stride +
                                 block.channel;
        ptrdiff_t stride = token_stride;
        const uint16_t *rows = block_rows(kernels, &block, source, &stride, s);
        kernels->range(tile->part, rows, stride, block.tokens, s->low, s->high);
        const bool special = choose_params(kernels, tile, &block, rows, stride, s);
        const lynx_kernels *quantiser = special || s->params.constant != 0 ? &lynx_scalar : kernels;
        quantiser->quantise(tile->part, tile->dtype, rows, stride, block.tokens, &s->planes, &s->params,
                            s->codes);
        zero_pad(&block, s->codes);
        if (fold_table != NULL || rest_table != NULL) {
            pack_folded(kernels, tile->part, &block, s, fold_table, rest_table, &anchor, &rest);
            fold_table += fold_table == NULL ? 0 : LYNX_HQ_FOLD_HEADER;
            rest_table += rest_table == NULL ? 0 : LYNX_HQ_FOLD_HEADER;
        } else {
            pack_planes(kernels, &block, &s->planes, s->codes, s, &anchor, &rest);
        }
        if (headers != NULL) {
            params += write_params(&s->params, block.groups, headers, params);
            headers += LYNX_HQ_PARAM_HEADER;
        }
        if (table == NULL && !out->wants_rank_bound) {
            continue;
        }
        uint64_t size = 2 * values;
        if (table == NULL && !special && kernels->rank_bound != NULL && tile->dtype == LYNX_BFLOAT16) {
            size = (kernels->rank_bound(tile->part, s->codes, block.tokens, block.channels, &s->params) + 7) / 8 + 3;
        } else if (!special) {
            quantiser->rank(tile->part, tile->dtype, rows, stride, s->codes, block.tokens, block.channels, &s->params,
                            &s->streams);
            size = rank_bytes(&s->streams);
        }
        const bool raw = size >= 2 * values;
        out->rank_bound += LYNX_HQ_RANK_HEADER + (raw ? 2 * values : size);
        if (table == NULL) {
            continue;
        }
        if (raw) {
            store16(table, RAW_RANKS);
            store16(table + 2, 0);
            for (int t = 0; t < block.tokens; t++) {
                for (int c = 0; c < block.channels; c++, ranks += 2) {
                    store16(ranks, source[t * token_stride + c]);
                }
            }
        } else {
            ranks += write_ranks(&s->streams, table, ranks);
        }
        table += LYNX_HQ_RANK_HEADER;
    }
    out->anchor_size = anchor == NULL ? 0 : (uint64_t)(anchor - out->anchor);
    out->rest_size = rest == NULL ? 0 : (uint64_t)(rest - out->rest);
    out->params_size = params == NULL ? 0 : (uint64_t)(params - out->params);
    out->rank_size = ranks == NULL ? 0 : (uint64_t)(ranks - out->rank);
    return LYNX_OK;
}

/* --- decoder ------------------------------------------------------------------------------------------------- */

static int fail(lynx_hq_fault *fault, int error, int section, uint64_t block, uint64_t offset) {
    *fault = (lynx_hq_fault){section, block, offset};
    return error;
}

/* Bytes of a block's parameters, or -1 for a header that says what cannot be. */
static int64_t params_bytes(const uint8_t *header, int groups) {
    if (header[4] == RAW_PARAMS && header[5] == RAW_PARAMS) {
        return 4 * (int64_t)groups;
    }
    if (header[4] > 13 || header[5] > 12) {
        return -1;
    }
    return ((int64_t)groups * (header[4] + header[5]) + 7) / 8;
}

/* Bytes of a block's ranks, or -1 for a table entry that says what cannot be. */
static int64_t ranks_bytes(const uint8_t *entry, const lynx_block *block) {
    const uint32_t a = load16(entry), more = load16(entry + 2);
    const int64_t values = (int64_t)block->tokens * block->channels;
    if (a == RAW_RANKS) {
        return more == 0 ? 2 * values : -1;
    }
    if (a > A_MAX || more > B_MAX + W_MAX + X_MAX) {
        return -1;
    }
    const int64_t size = (int64_t)a + more;
    return size < 2 * values ? size : -1;
}

/* Bytes of a block's planes in a section, or -1 for an entry of its fold table that says what cannot be. */
static int64_t planes_bytes(const uint8_t *entry, const lynx_block *block, int section) {
    const uint32_t sum = section == ANCHOR_SECTION ? block->width_sum : 8u * (uint32_t)block->channels - block->width_sum;
    const uint32_t flat = (uint32_t)block->octets * sum;
    if (entry == NULL || load16(entry) == FLAT) {
        return flat;
    }
    if (load16(entry) > (FOLD_SIZE | 3 * FOLD_PAIRED)) {
        return -1;
    }
    const uint32_t folded = flat - (uint32_t)block->octets * block->folded[section] + (load16(entry) & FOLD_SIZE);
    return folded < flat ? (int64_t)folded : -1;
}

static const uint8_t *fold_entry(const uint8_t *table, uint64_t block) {
    return table == NULL ? NULL : table + LYNX_HQ_FOLD_HEADER * block;
}

static bool levels_are_bad(const lynx_hq_tile *tile, const lynx_hq_levels *levels) {
    return levels->anchor == NULL || levels->param_headers == NULL ||
           (levels->rank_table != NULL && levels->rest == NULL) || (tile->fold != 0) != (levels->fold_table != NULL) ||
           (levels->rest != NULL && lynx_hq_folds_rest(tile)) != (levels->rest_table != NULL);
}

int lynx_hq_check(const lynx_hq_tile *tile, const lynx_hq_levels *levels, lynx_hq_fault *fault) {
    *fault = (lynx_hq_fault){0};
    if (tile_is_bad(tile) || levels_are_bad(tile, levels)) {
        return LYNX_ERR_ARGUMENT;
    }
    const uint64_t blocks = count_blocks(tile);
    uint64_t anchor = 0, params = 0, rest = 0, ranks = 0;
    lynx_block block = {0};
    measure_block(tile, &block);
    for (; block.index < blocks; next_block(tile, &block)) {
        const int64_t planes = planes_bytes(fold_entry(levels->fold_table, block.index), &block, ANCHOR_SECTION);
        if (planes < 0) {
            return fail(fault, LYNX_ERR_FOLD, 3, block.index, anchor);
        }
        anchor += (uint64_t)planes;
        if (anchor > levels->anchor_size) {
            return fail(fault, LYNX_ERR_TRUNCATED, 3, block.index, levels->anchor_size);
        }
        const int64_t size = params_bytes(levels->param_headers + LYNX_HQ_PARAM_HEADER * block.index, block.groups);
        if (size < 0) {
            return fail(fault, LYNX_ERR_PARAMETER, 0, block.index, params);
        }
        params += (uint64_t)size;
        if (params > levels->params_size) {
            return fail(fault, LYNX_ERR_TRUNCATED, 0, block.index, levels->params_size);
        }
        if (levels->rest != NULL) {
            const int64_t late = planes_bytes(fold_entry(levels->rest_table, block.index), &block, REST_SECTION);
            if (late < 0) {
                return fail(fault, LYNX_ERR_FOLD, 1, block.index, rest);
            }
            rest += (uint64_t)late;
            if (rest > levels->rest_size) {
                return fail(fault, LYNX_ERR_TRUNCATED, 1, block.index, levels->rest_size);
            }
        }
        if (levels->rank_table == NULL) {
            continue;
        }
        const int64_t more = ranks_bytes(levels->rank_table + LYNX_HQ_RANK_HEADER * block.index, &block);
        if (more < 0) {
            return fail(fault, LYNX_ERR_RANK, 2, block.index, ranks);
        }
        ranks += (uint64_t)more;
        if (ranks > levels->rank_size) {
            return fail(fault, LYNX_ERR_TRUNCATED, 2, block.index, levels->rank_size);
        }
    }
    if (anchor != levels->anchor_size) {
        return fail(fault, LYNX_ERR_PADDED, 3, blocks, anchor);
    }
    if (params != levels->params_size) {
        return fail(fault, LYNX_ERR_PADDED, 0, blocks, params);
    }
    if (levels->rest != NULL && rest != levels->rest_size) {
        return fail(fault, LYNX_ERR_PADDED, 1, blocks, rest);
    }
    if (levels->rank_table != NULL && ranks != levels->rank_size) {
        return fail(fault, LYNX_ERR_PADDED, 2, blocks, ranks);
    }
    return LYNX_OK;
}

static bool read_params(const lynx_hq_tile *tile, const lynx_block *block, const uint8_t *header, const uint8_t *in,
                        uint64_t size, bool full, lynx_scratch *s) {
    lynx_params *params = &s->params;
    memset(params, 0, sizeof *params);
    const bool raw = header[4] == RAW_PARAMS;
    const int s_bits = header[4], z_bits = header[5], bits = s_bits + z_bits;
    const int s_low = load16(header), z_low = (int16_t)load16(header + 2);
    if (raw && (s_low != 0 || z_low != 0)) {
        return false;
    }
    uint8_t padded[4 * ROW + 8] = {0}; /* fields are read 8 bytes at a time */
    memcpy(padded, in, size);
    const uint16_t least = LYNX_DTYPES[tile->dtype].least, largest = LYNX_DTYPES[tile->dtype].largest;
    bool good = true;
    if (raw) {
        for (int g = 0; g < block->groups; g++) {
            const uint16_t scale = load16(padded + 4 * g), zero = load16(padded + 4 * g + 2);
            if (scale == 0) {
                params->constant |= 1ull << g;
                params->word[g] = zero;
            } else {
                params->s[g] = scale;
                params->z[g] = (int16_t)zero;
                good &= scale >= least && scale <= largest && params->z[g] >= -MAX_ZERO_POINT &&
                        params->z[g] <= MAX_ZERO_POINT;
            }
        }
    } else {
        uint32_t position = 0;
        const uint32_t s_mask = (1u << s_bits) - 1, z_mask = (1u << z_bits) - 1;
        for (int g = 0; g < block->groups; g++, position += (uint32_t)bits) {
            const uint64_t field = load64(padded + position / 8) >> position % 8;
            params->s[g] = (uint16_t)(field & s_mask);
            params->z[g] = (int16_t)(field >> s_bits & z_mask);
        }
        int bad = 0;
        for (int g = 0; g < block->groups; g++) { /* apart, for vectors */
            const int scale = s_low + SCALE_UNIT * params->s[g], zero = z_low + params->z[g];
            bad |= (scale < least) | (scale > largest) | (zero < -MAX_ZERO_POINT) | (zero > MAX_ZERO_POINT);
            params->s[g] = (uint16_t)scale;
            params->z[g] = (int16_t)zero;
        }
        good = bad == 0;
    }
    derive(&s->planes, full, params);
    return good;
}

static void read_ranks(const uint8_t *entry, const uint8_t *in, lynx_streams *streams) {
    const uint32_t a = load16(entry), more = load16(entry + 2);
    memcpy(streams->a, in, a);
    memset(streams->a + a, 0, SLACK);
    memcpy(streams->more, in + a, more);
    memset(streams->more + more, 0, SLACK);
}

static bool ranks_fit(const lynx_streams *streams, const uint8_t *entry) {
    const uint32_t more = (streams->b_bits + 7) / 8 + (12 * streams->w_count + 7) / 8 + 2 * streams->x_count;
    return (streams->a_bits + 7) / 8 == load16(entry) && more == load16(entry + 2);
}

static void write_constants(int part, const lynx_block *block, const lynx_params *params, uint16_t *rows,
                            ptrdiff_t stride) {
    for (int g = 0; g < block->groups; g++) {
        if (params->constant >> g & 1) {
            const int n = part == LYNX_KEY ? block->tokens : block->channels;
            for (int i = 0; i < n; i++) {
                rows[part == LYNX_KEY ? i * stride + g : g * stride + i] = params->word[g];
            }
        }
    }
}

/* A folded section of the block, flat again; false if its sizes do not match. */
static bool unfold_section(const lynx_kernels *kernels, const lynx_block *block, int section, const uint8_t *entry,
                           const uint8_t *in, int64_t size, lynx_scratch *s, uint8_t *flat) {
    memcpy(s->folded, in, (size_t)size);
    memset(s->folded + size, 0, SLACK);
    return kernels->unfold(&s->planes.fold[section], s->folded, load16(entry), block->tokens, flat);
}

/* Bytes that the next block is likely to need. Hardware follows one page at a time, and a block's sections are short. */
static void prefetch(const uint8_t *p, uint64_t size) {
    for (uint64_t i = 0; i < size; i += 64) {
        __builtin_prefetch(p + i);
    }
}

int lynx_hq_decode(const lynx_hq_tile *tile, const lynx_hq_levels *levels, uint16_t *words, ptrdiff_t head_stride,
                   ptrdiff_t token_stride, uint64_t first, uint64_t last, void *scratch, lynx_hq_fault *fault) {
    *fault = (lynx_hq_fault){0};
    if (tile_is_bad(tile) || first > last || last > count_blocks(tile) || levels_are_bad(tile, levels)) {
        return LYNX_ERR_ARGUMENT;
    }
    const lynx_kernels *kernels = lynx_current();
    lynx_scratch *s = aligned(scratch);
    s->planes_head = UINT32_MAX;
    memset(&s->streams, 0, sizeof s->streams);
    const uint8_t *anchor = levels->anchor, *rest = levels->rest, *anchor_end = anchor + levels->anchor_size;
    uint64_t params = 0, ranks = 0;
    lynx_block block = {0};
    measure_block(tile, &block);
    for (; block.index < last; next_block(tile, &block)) {
        const uint8_t *header = levels->param_headers + LYNX_HQ_PARAM_HEADER * block.index;
        const uint8_t *entry =
            levels->rank_table == NULL ? NULL : levels->rank_table + LYNX_HQ_RANK_HEADER * block.index;
        const uint8_t *folding = fold_entry(levels->fold_table, block.index);
        const uint8_t *rest_folding = fold_entry(levels->rest_table, block.index);
        const int64_t anchor_size = planes_bytes(folding, &block, ANCHOR_SECTION);
        const int64_t rest_size = rest == NULL ? 0 : planes_bytes(rest_folding, &block, REST_SECTION);
        const int64_t params_size = params_bytes(header, block.groups);
        const int64_t ranks_size = entry == NULL ? 0 : ranks_bytes(entry, &block);
        if (anchor_size < 0 || (uint64_t)(anchor - levels->anchor) + (uint64_t)anchor_size > levels->anchor_size) {
            return fail(fault, LYNX_ERR_FOLD, 3, block.index, (uint64_t)(anchor - levels->anchor));
        }
        if (rest_size < 0 ||
            (rest != NULL && (uint64_t)(rest - levels->rest) + (uint64_t)rest_size > levels->rest_size)) {
            return fail(fault, LYNX_ERR_FOLD, 1, block.index, (uint64_t)(rest - levels->rest));
        }
        if (params_size < 0 || params + (uint64_t)params_size > levels->params_size) {
            return fail(fault, LYNX_ERR_PARAMETER, 0, block.index, params);
        }
        if (ranks_size < 0 || ranks + (uint64_t)ranks_size > levels->rank_size) {
            return fail(fault, LYNX_ERR_RANK, 2, block.index, ranks);
        }
        if (block.index >= first) {
            set_planes(tile, &block, s);
            if (!read_params(tile, &block, header, levels->params + params, (uint64_t)params_size, rest != NULL, s)) {
                return fail(fault, LYNX_ERR_PARAMETER, 0, block.index, params);
            }
            uint16_t *rows = words + (ptrdiff_t)block.head * head_stride + (ptrdiff_t)block.token * token_stride +
                             block.channel;
            if (entry != NULL && load16(entry) == RAW_RANKS) {
                const uint8_t *in = levels->rank + ranks;
                for (int t = 0; t < block.tokens; t++) {
                    for (int c = 0; c < block.channels; c++, in += 2) {
                        rows[t * token_stride + c] = load16(in);
                    }
                }
            } else {
                const bool moved = block.channels < ROW || s->shifted;
                uint16_t *to = moved ? s->words : rows;
                const ptrdiff_t stride = moved ? ROW : token_stride;
                const uint8_t *in_anchor = anchor, *in_rest = rest;
                const bool folded = folding != NULL && load16(folding) != FLAT;
                const bool rest_folded = rest_folding != NULL && load16(rest_folding) != FLAT;
                if (folded) {
                    if (!unfold_section(kernels, &block, ANCHOR_SECTION, folding, anchor, anchor_size, s, s->anchor)) {
                        return fail(fault, LYNX_ERR_FOLD, 3, block.index, (uint64_t)(anchor - levels->anchor));
                    }
                    in_anchor = s->anchor;
                } else if (!s->planes.uniform && anchor_end - anchor < anchor_size + SLACK) {
                    in_anchor = memcpy(s->anchor, anchor, (size_t)anchor_size); /* kernels read beyond the end */
                }
                if (rest_folded) {
                    if (!unfold_section(kernels, &block, REST_SECTION, rest_folding, rest, rest_size, s, s->rest)) {
                        return fail(fault, LYNX_ERR_FOLD, 1, block.index, (uint64_t)(rest - levels->rest));
                    }
                    in_rest = s->rest;
                } else if (!s->planes.uniform && rest != NULL) {
                    in_rest = memcpy(s->rest, rest, (size_t)rest_size);
                }
                kernels->unpack(&s->planes, in_anchor, in_rest, block.tokens, s->codes);
                if (folded || rest_folded) {
                    int16_t zeros[ROW];
                    kernels->uncentre(&s->planes, zeros_of(tile->part, &s->planes, &s->params, zeros), block.tokens,
                                      folded, rest_folded, s->codes);
                }
                if (rest != NULL &&
                    !kernels->check(tile->part, s->codes, block.tokens, &s->planes)) {
                    return fail(fault, LYNX_ERR_CODE, 1, block.index, (uint64_t)(rest - levels->rest));
                }
                if (entry == NULL) {
                    kernels->dequantise(tile->part, tile->dtype, s->codes, block.tokens, &s->params, to, stride);
                } else {
                    prefetch(anchor + anchor_size, (uint64_t)anchor_size);
                    prefetch(rest + rest_size, (uint64_t)rest_size);
                    prefetch(levels->rank + ranks + ranks_size, (uint64_t)ranks_size);
                    read_ranks(entry, levels->rank + ranks, &s->streams);
                    const lynx_kernels *ranked = s->params.constant == 0 ? kernels : &lynx_scalar; /* as in the encoder */
                    if (ranked->unrank(tile->part, tile->dtype, s->codes, block.tokens, block.channels, &s->params,
                                       &s->streams, to, stride) != LYNX_OK ||
                        !ranks_fit(&s->streams, entry)) {
                        return fail(fault, LYNX_ERR_RANK, 2, block.index, ranks);
                    }
                }
                if (s->params.constant != 0) {
                    write_constants(tile->part, &block, &s->params, to, stride);
                }
                if (s->shifted) {
                    uint16_t *rescaled = block.channels < ROW ? s->words : rows;
                    kernels->rescale(s->unshifts, s->words, ROW, block.tokens, rescaled,
                                     block.channels < ROW ? ROW : token_stride);
                }
                if (block.channels < ROW) {
                    for (int t = 0; t < block.tokens; t++) {
                        memcpy(rows + t * token_stride, s->words + t * ROW, 2 * (size_t)block.channels);
                    }
                }
            }
        }
        params += (uint64_t)params_size;
        ranks += (uint64_t)ranks_size;
        anchor += anchor_size;
        if (rest != NULL) {
            rest += rest_size;
        }
    }
    return LYNX_OK;
}
