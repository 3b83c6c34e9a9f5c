/* Tiles as blocks, and what kernels have to know of their channels. spec/codec-hq.md is the format. */
#include "hq.h"

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

size_t lynx_hq_scratch_size(void) {
    return sizeof(lynx_scratch) + 64;
}

lynx_scratch *lynx_scratch_of(void *scratch) {
    return (lynx_scratch *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
}

static bool outside(const int8_t *table, uint64_t count) {
    bool found = false;
    for (uint64_t i = 0; table != NULL && i < count; i++) {
        found |= table[i] < -8 || table[i] > 7;
    }
    return found;
}

bool lynx_tile_is_bad(const lynx_tile *tile) {
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
    if (outside(tile->exponents, n) || outside(tile->biases, n)) {
        return true;
    }
    bool bad = false;
    for (uint64_t row = 0; row < n; row += tile->head_dim) {
        for (uint32_t first = 0; first < tile->head_dim; first += ROW) {
            const uint8_t *widths = tile->widths + row + first;
            for (uint32_t c = 0; c < ROW && first + c < tile->head_dim; c++) {
                bad |= widths[c] > 8 || (tile->part == LYNX_VALUE && widths[c] != widths[0]);
            }
        }
    }
    return bad;
}

static bool folds(int part, int section, int width) {
    return section == ANCHOR_SECTION ? width >= 2 : part == LYNX_KEY && width < 2;
}

bool lynx_folds_rest(const lynx_tile *tile) {
    const uint64_t n = (uint64_t)tile->heads * tile->head_dim;
    bool found = false;
    for (uint64_t i = 0; tile->fold && i < n; i++) {
        found |= folds(tile->part, REST_SECTION, tile->widths[i]);
    }
    return found;
}

uint64_t lynx_count_blocks(const lynx_tile *tile) {
    return (uint64_t)tile->heads * ((tile->tokens + ROW - 1) / ROW) * ((tile->head_dim + ROW - 1) / ROW);
}

static lynx_column column_of(const lynx_tile *tile, uint32_t head, uint32_t channel) {
    const uint8_t *widths = tile->widths + (uint64_t)head * tile->head_dim + channel;
    lynx_column column = {0};
    for (uint32_t c = 0; c < ROW && channel + c < tile->head_dim; c++) {
        column.width_sum += widths[c];
        for (int section = 0; section < 2; section++) {
            column.folded[section] += tile->fold != 0 && folds(tile->part, section, widths[c]);
        }
    }
    return column;
}

static void enter_head(const lynx_tile *tile, lynx_block *block) {
    for (uint32_t i = 0; i < COLUMNS && ROW * i < tile->head_dim; i++) {
        block->columns[i] = column_of(tile, block->head, ROW * i);
    }
}

static void measure_block(const lynx_tile *tile, lynx_block *block) {
    const uint32_t tokens = tile->tokens - block->token, channels = tile->head_dim - block->channel;
    block->tokens = tokens < ROW ? (int)tokens : ROW;
    block->channels = channels < ROW ? (int)channels : ROW;
    block->octets = (block->tokens + 7) / 8;
    block->groups = tile->part == LYNX_KEY ? block->channels : block->tokens;
    const uint32_t column = block->channel / ROW;
    block->column = column < COLUMNS ? block->columns[column] : column_of(tile, block->head, block->channel);
}

void lynx_seek_block(const lynx_tile *tile, uint64_t index, lynx_block *block) {
    const uint64_t columns = (tile->head_dim + ROW - 1) / ROW, of_head = columns * ((tile->tokens + ROW - 1) / ROW);
    *block = (lynx_block){.index = index,
                          .head = (uint32_t)(index / of_head),
                          .token = (uint32_t)(index % of_head / columns * ROW),
                          .channel = (uint32_t)(index % columns * ROW)};
    if (block->head < tile->heads) {
        enter_head(tile, block);
        measure_block(tile, block);
    }
}

void lynx_next_block(const lynx_tile *tile, lynx_block *block) {
    block->index++;
    block->channel += ROW;
    if (block->channel >= tile->head_dim) {
        block->channel = 0;
        block->token += ROW;
        if (block->token >= tile->tokens) {
            block->token = 0;
            block->head++;
            if (block->head < tile->heads) {
                enter_head(tile, block);
            }
        }
    }
    if (block->head < tile->heads) {
        measure_block(tile, block);
    }
}

void lynx_measure(const lynx_tile *tile, uint64_t first, uint64_t last, lynx_sizes *sizes) {
    *sizes = (lynx_sizes){0};
    lynx_block block;
    for (lynx_seek_block(tile, first, &block); block.index < last; lynx_next_block(tile, &block)) {
        sizes->blocks++;
        sizes->anchor += (uint64_t)block.octets * section_octet(&block, ANCHOR_SECTION);
        sizes->rest += (uint64_t)block.octets * section_octet(&block, REST_SECTION);
        sizes->max_params += 4u * (uint64_t)block.groups;
        sizes->max_rank += 2u * (uint64_t)block.tokens * (uint64_t)block.channels;
    }
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
            f->rows[p] = section == ANCHOR_SECTION ? planes->in_anchor[p] : planes->used & ~planes->in_anchor[p];
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

const lynx_setup *lynx_set_up(const lynx_kernels *kernels, const lynx_tile *tile, const lynx_block *block, lynx_scratch *s) {
    lynx_setup *setup = &s->setups[block->channel / ROW % SETUPS];
    if (setup->head == block->head && setup->first == block->channel) {
        return setup;
    }
    setup->head = block->head;
    setup->first = block->channel;
    lynx_planes *planes = &setup->planes;
    planes->channels = block->channels;
    planes->anchor_octet = (uint16_t)section_octet(block, ANCHOR_SECTION);
    planes->rest_octet = (uint16_t)section_octet(block, REST_SECTION);
    memset(planes->widths, 255, sizeof planes->widths);
    memcpy(planes->widths, tile->widths + (uint64_t)block->head * tile->head_dim + block->channel,
           (size_t)block->channels);
    planes->uniform = block->channels == ROW;
    for (int c = 1; c < ROW; c++) {
        planes->uniform &= planes->widths[c] == planes->widths[0];
    }
    planes->used = block->channels == ROW ? ~0ull : (1ull << block->channels) - 1;
    memset(planes->in_anchor, 0, sizeof planes->in_anchor);
    for (int c = 0; c < block->channels; c++) {
        for (int p = 0; p < planes->widths[c]; p++) {
            planes->in_anchor[p] |= 1ull << c;
        }
    }
    for (int p = 0; p < 8; p++) {
        planes->anchor_count[p] = (uint8_t)__builtin_popcountll(planes->in_anchor[p]);
    }
    set_folds(tile->part, tile->fold != 0, planes);
    setup->shifted = false;
    for (int c = 0; c < ROW; c++) {
        const bool used = c < block->channels;
        const uint64_t at = (uint64_t)block->head * tile->head_dim + block->channel + (uint64_t)c;
        planes->bias[c] = (int16_t)(tile->biases == NULL || !used ? 0 : 4 * tile->biases[at]);
        const int exponent = tile->exponents == NULL ? 0 : tile->exponents[used ? at : at - (uint64_t)c]; /* repeats */
        setup->shifts[c] = (int16_t)(128 * exponent);
        setup->unshifts[c] = (int16_t)(-128 * exponent);
        setup->shifted |= exponent != 0;
    }
    for (int g = 0; g < ROW; g++) {
        const uint8_t bits = planes->widths[tile->part == LYNX_KEY && g < block->channels ? g : 0];
        const lynx_width *width = tile->part == LYNX_KEY ? &KEY_WIDTHS[bits] : &VALUE_WIDTHS[bits];
        planes->steps[g] = width->range;
        planes->per_step[g] = 1.0f / width->range;
        planes->full[g] = width->offset;
        planes->base[g] = width->base;
        planes->low[g] = width->offset;
        planes->high[g] = (uint8_t)(width->offset + width->range + 1);
    }
    if (kernels->shuffles != NULL && !planes->uniform) {
        kernels->shuffles(planes);
    }
    return setup;
}
