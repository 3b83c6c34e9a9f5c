/* The encoder of hq: parameters, planes and ranks of blocks around the kernels. */
#include "hq.h"
#include "ranks.h"

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
static bool choose_params(const lynx_kernels *kernels, const lynx_tile *tile, const lynx_block *block,
                          const lynx_planes *planes, const uint16_t *rows, ptrdiff_t stride, lynx_scratch *s) {
    lynx_params *params = &s->params;
    const int16_t limit = LYNX_DTYPES[tile->dtype].special;
    bool special = false;
    for (int g = block->groups; g < ROW; g++) {
        s->low[g] = s->low[0]; /* unused groups repeat a used one */
        s->high[g] = s->high[0];
    }
    params->constant = 0;
    if (kernels->are_plain(tile->dtype, s->low, s->high)) {
        kernels->choose(tile->dtype, planes, s->low, s->high, params);
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
    for (int g = block->groups; g < ROW; g++) {
        low[g] = low[0];
        high[g] = high[0];
    }
    kernels->choose(tile->dtype, planes, low, high, params);
    for (int g = 0; g < block->groups; g++) {
        if (params->constant >> g & 1) {
            params->s[g] = 0;
            params->z[g] = 0;
        }
    }
    return special;
}

/* Write the parameters, unless `header` is null. Returns their bytes. */
static uint64_t write_params(const lynx_kernels *kernels, const lynx_params *params, int groups, uint8_t *header, uint8_t *out) {
    lynx_packed packed;
    uint8_t apart[4 * ROW]; /* where `out` has no room for 64 groups */
    const bool raw = params->constant != 0, direct = !raw && groups == ROW && header != NULL;
    kernels->pack_params(params, &packed, direct ? out : apart);
    const uint64_t bits = (uint64_t)groups * (uint64_t)(packed.s_bits + packed.z_bits);
    const uint64_t size = raw ? 4 * (uint64_t)groups : (bits + 7) / 8;
    if (header == NULL) {
        return size;
    }
    store16(header, raw ? 0 : (uint32_t)packed.s_low);
    store16(header + 2, raw ? 0 : (uint32_t)packed.z_low);
    header[4] = (uint8_t)(raw ? RAW_PARAMS : packed.s_bits);
    header[5] = (uint8_t)(raw ? RAW_PARAMS : packed.z_bits);
    if (raw) {
        for (int g = 0; g < groups; g++) {
            store16(out + 4 * g, params->s[g]);
            store16(out + 4 * g + 2, params->constant >> g & 1 ? params->word[g] : (uint16_t)params->z[g]);
        }
    } else if (!direct) {
        memcpy(out, apart, size);
        if (bits % 8 != 0) {
            out[size - 1] &= (uint8_t)((1 << bits % 8) - 1); /* of groups that there are none of */
        }
    }
    return size;
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

static void zero_pad(const lynx_block *block, uint8_t *codes) {
    memset(codes + block->tokens * ROW, 0, (size_t)(8 * block->octets - block->tokens) * ROW);
}

/* A section's planes to where its end is, which moves. */
typedef struct {
    uint8_t *end;  /* null: not made */
    uint64_t left; /* room for this block and those behind it */
} section_writer;

static void add(section_writer *to, const uint8_t *from, uint64_t size) {
    if (from != to->end) {
        memcpy(to->end, from, size);
    }
    to->end += size;
    to->left -= size;
}

/* Pack the block's codes into sections that are not null. Kernels overrun the end of planes that are not uniform: where another
 * thread's block may begin, or what is written already, those are made apart. */
static void pack_planes(const lynx_kernels *kernels, const lynx_block *block, const lynx_planes *planes,
                        const uint8_t *codes, lynx_scratch *s, section_writer *anchor, section_writer *rest) {
    if (anchor == NULL && rest == NULL) {
        return;
    }
    const uint64_t size[2] = {(uint64_t)block->octets * planes->anchor_octet, (uint64_t)block->octets * planes->rest_octet};
    section_writer *const to[2] = {anchor, rest};
    uint8_t *const apart[2] = {s->anchor, s->rest};
    uint8_t *made[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        if (to[i] != NULL) {
            made[i] = planes->uniform || to[i]->left >= size[i] + SLACK ? to[i]->end : apart[i];
        }
    }
    kernels->pack(planes, codes, block->tokens, made[0], made[1]);
    for (int i = 0; i < 2; i++) {
        if (to[i] != NULL) {
            add(to[i], made[i], size[i]);
        }
    }
}

/* A section of centred planes in folded form, if that is smaller, and its entry in the fold table. */
static bool fold_section(const lynx_kernels *kernels, const lynx_block *block, const lynx_fold *fold,
                         const uint8_t *flat,
                         lynx_scratch *s, uint8_t *entry, section_writer *out) {
    store16(entry, FLAT);
    if ((fold->three | fold->two) == 0) {
        return false;
    }
    const uint32_t fixed = (uint32_t)(block->octets * fold->folded_size);
    const uint32_t made = kernels->fold(fold, flat, block->tokens, s->folded), size = fixed + (made & FOLD_SIZE);
    if (size >= (uint32_t)(block->octets * fold->flat_size)) {
        return false;
    }
    store16(entry, made);
    add(out, s->folded, size);
    return true;
}

/* The block's planes, folded where that is smaller, and the entries in the fold tables. */
static void pack_folded(const lynx_kernels *kernels, int part, const lynx_block *block, const lynx_planes *planes, lynx_scratch *s,
                        uint8_t *anchor_entry, uint8_t *rest_entry, section_writer *anchor, section_writer *rest) {
    const bool fold_anchor = anchor != NULL && anchor_entry != NULL, fold_rest = rest != NULL && rest_entry != NULL;
    int16_t zeros_of_tokens[ROW];
    const int16_t *zeros = zeros_of(part, planes, &s->params, zeros_of_tokens);
    if (kernels->pack_folded != NULL) {
        uint8_t *entry[2] = {anchor_entry, rest_entry}, *made[2] = {s->folded, s->folded_rest};
        section_writer *to[2] = {anchor, rest};
        const bool wanted[2] = {fold_anchor && block->column.folded[0] > 0, fold_rest && block->column.folded[1] > 0};
        uint32_t entries[2] = {FLAT, FLAT};
        if (wanted[0] || wanted[1]) {
            kernels->pack_folded(planes, zeros, s->codes, block->tokens, wanted[0] ? made[0] : NULL,
                                 wanted[1] ? made[1] : NULL, entries);
        }
        bool folded[2] = {false, false};
        for (int i = 0; i < 2; i++) {
            const lynx_fold *fold = &planes->fold[i];
            const uint32_t size = (uint32_t)(block->octets * fold->folded_size) + (entries[i] & FOLD_SIZE);
            folded[i] = wanted[i] && size < (uint32_t)(block->octets * fold->flat_size);
            if (folded[i]) {
                add(to[i], made[i], size);
            }
            if (entry[i] != NULL) {
                store16(entry[i], folded[i] ? entries[i] : FLAT);
            }
        }
        pack_planes(kernels, block, planes, s->codes, s, folded[0] ? NULL : anchor, folded[1] ? NULL : rest);
        return;
    }
    section_writer flat = {s->flat, sizeof s->flat}, late = {s->flat_rest, sizeof s->flat_rest};
    kernels->centre(planes, zeros, s->codes, block->tokens, s->centred);
    pack_planes(kernels, block, planes, s->centred, s, fold_anchor ? &flat : NULL, fold_rest ? &late : NULL);
    const bool done = fold_anchor && fold_section(kernels, block, &planes->fold[0], s->flat, s, anchor_entry, anchor);
    const bool done_rest = fold_rest && fold_section(kernels, block, &planes->fold[1], s->flat_rest, s, rest_entry, rest);
    pack_planes(kernels, block, planes, s->codes, s, done ? NULL : anchor, done_rest ? NULL : rest);
}

/* How far a channel's values lie from zero, by their signs, in units of 4 codes: round(15 (positive - negative) / n). */
static int8_t bias_of(uint32_t tokens, uint32_t negative) {
    const int64_t n = tokens, excess = n - 2 * (int64_t)negative;
    const int64_t bias = (30 * excess + 31 * n) / (2 * n) - 15; /* the dividend is positive */
    return (int8_t)(bias < -8 ? -8 : bias > 7 ? 7 : bias);
}

/* The block's words, rows `stride` bytes apart. */
static void take_rows(const lynx_view *view, const lynx_block *block, uint8_t *to, size_t stride) {
    for (int t = 0; t < block->tokens;) {
        const lynx_stretch some = stretch_from(view, block, t);
        const uint16_t *row = some.row;
        t += some.count;
        for (int i = 0; i < some.count; i++, row += view->token_stride, to += stride) {
            if (block->channels == ROW) { /* a size that compilers know */
                memcpy(to, row, 2 * ROW);
            } else {
                memcpy(to, row, 2 * (size_t)block->channels);
            }
        }
    }
}

/* The block's values in rows of 64 channels for the kernels: in place, or in scratch where they are fewer (repeats do not
 * change a group's extremes) or on several pages. */
static const uint16_t *block_rows(const lynx_view *view, const lynx_block *block, ptrdiff_t *stride, lynx_scratch *s) {
    const lynx_stretch whole = stretch_from(view, block, 0);
    const uint16_t *rows = whole.row;
    *stride = view->token_stride;
    if (block->channels < ROW || whole.count < block->tokens) {
        take_rows(view, block, (uint8_t *)s->words, 2 * ROW);
        for (int t = 0; t < block->tokens && block->channels < ROW; t++) {
            for (int c = block->channels; c < ROW; c++) {
                s->words[t * ROW + c] = s->words[t * ROW];
            }
        }
        rows = s->words;
        *stride = ROW;
    }
    return rows;
}

/* The block's words divided by 2^e, in scratch, and the extremes of its groups. */
static void rescale_range(const lynx_kernels *kernels, int part, const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride,
                          int tokens, lynx_scratch *s) {
    if (kernels->rescale_range != NULL && part == LYNX_VALUE) {
        kernels->rescale_range(shifts, rows, stride, tokens, s->words, s->low, s->high);
    } else {
        kernels->rescale(shifts, rows, stride, tokens, s->words, ROW);
        kernels->range(part, s->words, ROW, tokens, s->low, s->high);
    }
}

void lynx_spreads(const lynx_tile *tile, const lynx_view *view, uint32_t first_head, uint32_t last_head, uint16_t *ranges,
                  uint16_t *sizes, int8_t *biases, int16_t *extremes, bool fetched, void *scratch) {
    const lynx_kernels *kernels = lynx_current();
    lynx_scratch *s = lynx_scratch_of(scratch);
    const uint64_t columns = (tile->head_dim + ROW - 1) / ROW, groups = ((uint64_t)tile->tokens + ROW - 1) / ROW;
    for (uint32_t head = first_head; head < last_head; head++) {
        for (uint32_t channel = 0; channel < tile->head_dim; channel += ROW) {
            lynx_spread sums = {0};
            uint32_t negative[ROW] = {0};
            lynx_block block = {.head = head, .channel = channel};
            block.channels = tile->head_dim - channel < ROW ? (int)(tile->head_dim - channel) : ROW;
            for (; block.token < tile->tokens; block.token += ROW) {
                block.tokens = tile->tokens - block.token < ROW ? (int)(tile->tokens - block.token) : ROW;
                ptrdiff_t stride;
                for (int quarter = 0; quarter < 4; quarter++) {
                    prefetch_next(tile, view, &block, quarter, false);
                }
                const uint16_t *rows = block_rows(view, &block, &stride, s);
                if (ranges != NULL) {
                    int16_t *low = extremes + 2 * ROW * ((head * groups + block.token / ROW) * columns + channel / ROW);
                    kernels->survey(rows, stride, block.tokens, low, low + ROW);
                    kernels->add_spreads(tile->dtype, low, low + ROW, &sums);
                    continue;
                }
                uint16_t most[ROW], signs[ROW];
                kernels->survey_sizes(rows, stride, block.tokens, fetched, most, biases == NULL ? NULL : signs);
                kernels->add_sizes(tile->dtype, most, &sums);
                for (int c = 0; c < ROW && biases != NULL; c++) {
                    negative[c] += signs[c];
                }
            }
            for (int c = 0; c < block.channels; c++) {
                const uint64_t at = (uint64_t)head * tile->head_dim + channel + (uint64_t)c;
                const double count = sums.count[c];
                if (ranges != NULL) {
                    ranges[at] = (uint16_t)(count == 0 ? LEAST_SPREAD : (double)(int64_t)sums.range[c] / count);
                }
                sizes[at] = (uint16_t)(count == 0 ? LEAST_SPREAD : (double)(int64_t)sums.size[c] / count);
                if (biases != NULL) {
                    biases[at] = bias_of(tile->tokens, negative[c]);
                }
            }
        }
    }
}

/* Bytes that will be written, so that the lines are there by then. Section by section, because all at once would keep loads waiting. */
static void prefetch(const uint8_t *p, uint64_t size) {
    for (uint64_t i = 0; p != NULL && i < size; i += 64) {
        __builtin_prefetch(p + i, 1);
    }
}

/* Codes, while rows of the next head are fetched if `ahead`. Returns an upper bound on the bits of the ranks if `bounded`, or 0 if it
 * is not known. */
static uint64_t quantise(const lynx_kernels *kernels, const lynx_tile *tile, const lynx_view *view, const lynx_block *block,
                         const lynx_planes *planes, const uint16_t *rows, ptrdiff_t stride, bool special, bool bounded, bool ahead,
                         lynx_scratch *s) {
    const lynx_kernels *quantiser = special || s->params.constant != 0 ? &lynx_scalar : kernels;
    bounded = bounded && !special && tile->dtype == LYNX_BFLOAT16;
    if (quantiser->quantise_ahead != NULL && (bounded || ahead) && tile->dtype == LYNX_BFLOAT16) {
        lynx_stretch stretches[ROW + 1];
        if (ahead) {
            stretches_of(view, block, block->head + 1, stretches);
        }
        return quantiser->quantise_ahead(tile->part, rows, stride, block->tokens, planes, &s->params, bounded, ahead ? stretches : NULL,
                                         view->token_stride, s->codes);
    }
    quantiser->quantise(tile->part, tile->dtype, rows, stride, block->tokens, planes, &s->params, s->codes);
    return bounded && kernels->rank_bound != NULL
               ? kernels->rank_bound(tile->part, s->codes, block->tokens, block->channels, &s->params)
               : 0;
}

void lynx_encode(const lynx_tile *tile, const lynx_view *view, uint64_t first, uint64_t last, const int16_t *extremes, bool ahead,
                 lynx_encoded *out, void *scratch) {
    const lynx_kernels *kernels = lynx_current();
    lynx_scratch *s = lynx_scratch_of(scratch);
    forget_setups(s);
    uint8_t *fold_table = tile->fold ? out->fold_table : NULL, *rest_table = tile->fold ? out->rest_table : NULL;
    section_writer anchor = {out->anchor, out->anchor_left}, rest = {out->rest, out->rest_left};
    section_writer *to_anchor = out->anchor == NULL ? NULL : &anchor, *to_rest = out->rest == NULL ? NULL : &rest;
    uint8_t *headers = out->param_headers, *params = out->params;
    uint8_t *table = out->rank_table, *ranks = out->rank;
    lynx_hq_piece *made = &out->made;
    lynx_block block;
    for (lynx_seek_block(tile, first, &block); block.index < last; lynx_next_block(tile, &block)) {
        const lynx_setup *setup = lynx_set_up(kernels, tile, &block, s);
        const lynx_planes *planes = &setup->planes;
        const uint64_t values = (uint64_t)block.tokens * (uint64_t)block.channels;
        if (table == NULL) {
            prefetch(anchor.end, (uint64_t)block.octets * planes->anchor_octet);
        }
        ptrdiff_t stride;
        prefetch_next(tile, view, &block, 0, false);
        const uint16_t *rows = block_rows(view, &block, &stride, s);
        if (setup->shifted) {
            rescale_range(kernels, tile->part, setup->shifts, rows, stride, block.tokens, s);
            rows = s->words;
            stride = ROW;
        } else if (extremes != NULL) {
            memcpy(s->low, extremes + 2 * ROW * block.index, sizeof s->low);
            memcpy(s->high, extremes + 2 * ROW * block.index + ROW, sizeof s->high);
        } else {
            kernels->range(tile->part, rows, stride, block.tokens, s->low, s->high);
        }
        prefetch_next(tile, view, &block, 1, false);
        const bool special = choose_params(kernels, tile, &block, planes, rows, stride, s);
        const bool bounded = table == NULL && out->wants_rank_bound && out->rank_most >= out->rank_room;
        const uint64_t bound = quantise(kernels, tile, view, &block, planes, rows, stride, special, bounded, ahead, s);
        prefetch_next(tile, view, &block, 2, false);
        if (table == NULL) {
            prefetch(rest.end, (uint64_t)block.octets * planes->rest_octet);
        }
        zero_pad(&block, s->codes);
        if (fold_table != NULL || rest_table != NULL) {
            pack_folded(kernels, tile->part, &block, planes, s, fold_table, rest_table, to_anchor, to_rest);
            fold_table = fold_table == NULL ? NULL : fold_table + FOLD_HEADER;
            rest_table = rest_table == NULL ? NULL : rest_table + FOLD_HEADER;
        } else {
            pack_planes(kernels, &block, planes, s->codes, s, to_anchor, to_rest);
        }
        prefetch_next(tile, view, &block, 3, false);
        const uint64_t params_size = write_params(kernels, &s->params, block.groups, headers, params);
        made->params += params_size;
        if (headers != NULL) {
            params += params_size;
            headers += PARAM_HEADER;
        }
        if (table == NULL && !out->wants_rank_bound) {
            continue;
        }
        uint64_t size = 2 * values;
        if (bounded && bound != 0) {
            size = (bound + 7) / 8 + 3;
        } else if (!special && (bounded || table != NULL)) {
            const lynx_kernels *ranker = s->params.constant != 0 ? &lynx_scalar : kernels;
            const uint8_t *const near = s->codes; /* of a section that is not made */
            s->streams.ahead = (lynx_ahead){{anchor.end == NULL ? near : anchor.end, rest.end == NULL ? near : rest.end,
                                             ranks == NULL ? near : ranks}};
            ranker->rank(tile->part, tile->dtype, rows, stride, s->codes, block.tokens, block.channels, &s->params,
                            &s->streams);
            size = rank_bytes(&s->streams);
        }
        const bool raw = size >= 2 * values;
        made->rank_bound += RANK_HEADER + (raw ? 2 * values : size);
        out->rank_most -= raw ? 0 : 2 * values - size;
        if (table == NULL) {
            continue;
        }
        if (raw) {
            store16(table, RAW_RANKS);
            store16(table + 2, 0);
            take_rows(view, &block, ranks, 2 * (size_t)block.channels);
            ranks += 2 * block.tokens * block.channels;
        } else {
            ranks += write_ranks(&s->streams, table, ranks);
        }
        table += RANK_HEADER;
    }
    made->anchor += out->anchor_left - anchor.left;
    made->rest += out->rest_left - rest.left;
    made->rank += ranks == NULL ? 0 : (uint64_t)(ranks - out->rank);
    out->anchor = anchor.end;
    out->anchor_left = anchor.left;
    out->fold_table = fold_table;
    out->rest = rest.end;
    out->rest_left = rest.left;
    out->rest_table = rest_table;
    out->param_headers = headers;
    out->params = params;
    out->rank = ranks;
    out->rank_table = table;
}
