/* The decoder of hq: checks of sizes and parameters, and the kernels in turn, block by block. */
#include "hq.h"

#define STREAMED (1 << 17) /* values of a tile from which on the caches are left to others */

static int fail(lynx_hq_fault *fault, int error, int section, uint64_t block, uint64_t offset) {
    *fault = (lynx_hq_fault){.section = section, .block = block, .offset = offset};
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
    const uint32_t flat = (uint32_t)block->octets * section_octet(block, section);
    if (entry == NULL || load16(entry) == FLAT) {
        return flat;
    }
    if (load16(entry) > (FOLD_SIZE | 3 * FOLD_PAIRED)) {
        return -1;
    }
    const uint32_t folded = flat - (uint32_t)block->octets * block->column.folded[section] + (load16(entry) & FOLD_SIZE);
    return folded < flat ? (int64_t)folded : -1;
}

static const uint8_t *fold_entry(const uint8_t *table, uint64_t block) {
    return table == NULL ? NULL : table + FOLD_HEADER * block;
}

int lynx_check(const lynx_tile *tile, const lynx_levels *levels, lynx_hq_fault *fault) {
    *fault = (lynx_hq_fault){0};
    const uint64_t blocks = lynx_count_blocks(tile);
    uint64_t anchor = 0, params = 0, rest = 0, ranks = 0;
    lynx_block block;
    for (lynx_first_block(tile, &block); block.index < blocks; lynx_next_block(tile, &block)) {
        const int64_t planes = planes_bytes(fold_entry(levels->fold_table, block.index), &block, ANCHOR_SECTION);
        if (planes < 0) {
            return fail(fault, LYNX_ERR_FOLD, 3, block.index, anchor);
        }
        anchor += (uint64_t)planes;
        if (anchor > levels->anchor_size) {
            return fail(fault, LYNX_ERR_TRUNCATED, 3, block.index, levels->anchor_size);
        }
        const int64_t size = params_bytes(levels->param_headers + PARAM_HEADER * block.index, block.groups);
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
        const int64_t more = ranks_bytes(levels->rank_table + RANK_HEADER * block.index, &block);
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

/* Parameters in full, of a block with constant groups. */
static bool read_raw_params(const lynx_block *block, const uint8_t *in, const lynx_fields *limits, const lynx_planes *planes,
                            bool full, lynx_params *params) {
    bool bad = limits->s_low != 0 || limits->z_low != 0;
    params->constant = 0;
    for (int g = 0; g < ROW; g++) {
        const bool used = g < block->groups;
        const uint16_t scale = used ? load16(in + 4 * g) : 0, word = used ? load16(in + 4 * g + 2) : 0;
        const int zero = scale == 0 ? 0 : (int16_t)word;
        bad |= scale != 0 && (scale < limits->least || scale > limits->largest || zero < -MAX_ZERO_POINT || zero > MAX_ZERO_POINT);
        params->constant |= (uint64_t)(used && scale == 0) << g;
        params->s[g] = scale;
        params->scale[g] = bits_float((uint32_t)scale << 16);
        params->z[g] = (int16_t)zero;
        params->word[g] = word;
        params->offset[g] = (int16_t)(zero + (full ? planes->full[g] : -planes->base[g]));
    }
    params->s_least = 0; /* no block to be fast with */
    params->s_most = UINT16_MAX;
    return !bad;
}

static bool read_params(const lynx_kernels *kernels, const lynx_tile *tile, const lynx_block *block,
                        const uint8_t *header, const uint8_t *in, uint64_t size, uint64_t left,
                        const lynx_planes *planes, bool full, lynx_params *params) {
    lynx_fields fields = {.stream = in,
                          .s_bits = header[4],
                          .z_bits = header[5],
                          .s_low = load16(header),
                          .z_low = (int16_t)load16(header + 2),
                          .groups = block->groups,
                          .least = LYNX_DTYPES[tile->dtype].least,
                          .largest = LYNX_DTYPES[tile->dtype].largest};
    if (header[4] == RAW_PARAMS) {
        return read_raw_params(block, in, &fields, planes, full, params);
    }
    uint8_t padded[4 * ROW + 64]; /* fields are read in wide pieces */
    if (left < sizeof padded) { /* unused groups have fields too, as far as these reach */
        memset(padded, 0, sizeof padded);
        fields.stream = memcpy(padded, in, size);
    }
    return kernels->params(&fields, planes, full, params);
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

static void write_constants(int part, const lynx_block *block, const lynx_params *params, uint16_t *const *rows) {
    for (int g = 0; g < block->groups; g++) {
        if (params->constant >> g & 1) {
            const int n = part == LYNX_KEY ? block->tokens : block->channels;
            for (int i = 0; i < n; i++) {
                rows[part == LYNX_KEY ? i : g][part == LYNX_KEY ? g : i] = params->word[g];
            }
        }
    }
}

/* A folded section of the block, flat again; null if its sizes do not match. */
static const uint8_t *unfold_section(const lynx_kernels *kernels, const lynx_block *block, const lynx_fold *fold,
                                     uint32_t entry, const uint8_t *in, uint64_t size, lynx_scratch *s, uint8_t *flat) {
    memcpy(s->folded, in, size);
    memset(s->folded + size, 0, SLACK);
    return kernels->unfold(fold, s->folded, entry, block->tokens, flat) ? flat : NULL;
}

/* Bytes that the next block is likely to need; as lynx_fetch, where no other loads wait for long. */
static void prefetch(const uint8_t *p, uint64_t size) {
    for (uint64_t i = 0; i < size; i += 64) {
        __builtin_prefetch(p + i);
    }
}

/* Words of the block's rows, `stride` bytes apart, to their places. */
static void place_rows(const lynx_block *block, const uint8_t *words, size_t stride, uint16_t *const *places) {
    for (int t = 0; t < block->tokens; t++, words += stride) {
        if (block->channels == ROW) { /* a size that compilers know */
            memcpy(places[t], words, 2 * ROW);
        } else {
            memcpy(places[t], words, 2 * (size_t)block->channels);
        }
    }
}

/* Whether words of these groups can be made in one step: binary32 holds their products, and none can leave the range that
 * exponents move. Integers have 11 bits, exponents 3 and a sign. */
static bool is_tame(const lynx_tile *tile, const lynx_setup *setup, const lynx_params *params) {
    const uint16_t least = setup->shifted ? 0x0c80 /* 2^-102 */ : 0;
    return tile->dtype == LYNX_BFLOAT16 && (tile->part == LYNX_VALUE || !setup->shifted) && params->constant == 0 &&
           params->s_least >= least && params->s_most <= MOST_PLACED;
}

/* A block's planes, as received. */
typedef struct {
    const uint8_t *anchor, *rest, *anchor_end, *rest_end; /* ends of the sections of all blocks */
    uint64_t anchor_size, rest_size;
    uint32_t anchor_entry, rest_entry; /* of the fold tables; FLAT where there are none */
} planes_in;

/* Kernels read beyond the end of what is not uniform, or folded: where that may not be, in a copy. */
static void make_readable(planes_in *in, lynx_scratch *s) {
    if ((uint64_t)(in->anchor_end - in->anchor) < in->anchor_size + SLACK) {
        in->anchor = memcpy(s->anchor, in->anchor, in->anchor_size);
    }
    if (in->rest != NULL && (uint64_t)(in->rest_end - in->rest) < in->rest_size + SLACK) {
        in->rest = memcpy(s->rest, in->rest, in->rest_size);
    }
}

/* Codes of a block. Returns the section that is wrong, or -1. */
static int read_codes(const lynx_kernels *kernels, const lynx_tile *tile, const lynx_block *block,
                      const lynx_planes *planes, planes_in in, lynx_scratch *s) {
    int16_t zeros_of_tokens[ROW];
    const planes_in received = in;
    const bool folded = in.anchor_entry != FLAT, rest_folded = in.rest != NULL && in.rest_entry != FLAT;
    const int16_t *zeros = folded || rest_folded ? zeros_of(tile->part, planes, &s->params, zeros_of_tokens) : NULL;
    const bool at_once = (folded || rest_folded) && kernels->unpack_folded != NULL;
    if (at_once || !planes->uniform) {
        make_readable(&in, s);
    }
    if (at_once) {
        return kernels->unpack_folded(planes, zeros, in.anchor, in.anchor_entry, in.rest, in.rest_entry, block->tokens,
                                      s->codes);
    }
    if (folded) {
        in.anchor = unfold_section(kernels, block, &planes->fold[0], in.anchor_entry, received.anchor, in.anchor_size, s,
                                   s->anchor);
        if (in.anchor == NULL) {
            return IN_ANCHOR;
        }
    }
    if (rest_folded) {
        in.rest = unfold_section(kernels, block, &planes->fold[1], in.rest_entry, received.rest, in.rest_size, s, s->rest);
        if (in.rest == NULL) {
            return IN_REST;
        }
    }
    kernels->unpack(planes, in.anchor, in.rest, block->tokens, s->codes);
    if (folded || rest_folded) {
        kernels->uncentre(planes, zeros, block->tokens, folded, rest_folded, s->codes);
    }
    return -1;
}

int lynx_decode(const lynx_tile *tile, const lynx_levels *levels, const lynx_view *view, uint64_t first, uint64_t last,
                void *scratch, lynx_hq_fault *fault) {
    const lynx_kernels *kernels = lynx_current();
    lynx_scratch *s = lynx_scratch_of(scratch);
    forget_setups(s);
    const uint64_t values = (uint64_t)tile->heads * tile->tokens * tile->head_dim;
    const bool streams = kernels->stream != NULL && levels->rank_table == NULL && values >= STREAMED && view->pages == NULL;
    const uint8_t *anchor = levels->anchor, *rest = levels->rest;
    uint64_t params = 0, ranks = 0;
    lynx_tail tail = {.count = 0};
    uint16_t *made[ROW]; /* where words go that are not in place at once */
    for (int t = 0; t < ROW; t++) {
        made[t] = s->words + t * ROW;
    }
    *fault = (lynx_hq_fault){0};
    lynx_block block;
    for (lynx_first_block(tile, &block); block.index < last; lynx_next_block(tile, &block)) {
        const uint8_t *header = levels->param_headers + PARAM_HEADER * block.index;
        const uint8_t *entry =
            levels->rank_table == NULL ? NULL : levels->rank_table + RANK_HEADER * block.index;
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
            prefetch_next(tile, view, &block, 0, true);
            const lynx_setup *setup = lynx_set_up(kernels, tile, &block, s);
            const lynx_planes *planes = &setup->planes;
            if (!read_params(kernels, tile, &block, header, levels->params + params, (uint64_t)params_size,
                             levels->params_size - params, planes, rest != NULL,
                             &s->params)) {
                return fail(fault, LYNX_ERR_PARAMETER, 0, block.index, params);
            }
            prefetch_next(tile, view, &block, 1, true);
            lynx_stretch stretches[ROW + 1];
            uint16_t *places[ROW];
            for (int i = 0, t = 0, n = stretches_of(view, &block, block.head, stretches); i < n; i++) {
                for (int j = 0; j < stretches[i].count; j++, t++) {
                    places[t] = stretches[i].row + j * view->token_stride;
                }
            }
            if (entry != NULL && load16(entry) == RAW_RANKS) {
                place_rows(&block, levels->rank + ranks, 2 * (size_t)block.channels, places);
            } else {
                /* Anchors and 8-bit values go past the caches where they are many, and exponents with them where no word can
                 * leave the range that they move. */
                const bool tame = is_tame(tile, setup, &s->params);
                const bool direct = tame && entry == NULL && block.channels == ROW && kernels->place != NULL;
                const bool streamed = !direct && streams && block.channels == ROW && view->token_stride == ROW;
                const bool moved = setup->shifted && !tame;
                const bool apart = streamed || moved || block.channels < ROW;
                uint16_t *const *to = apart ? made : places;
                const int16_t *shifts = setup->shifted && tame ? setup->shifts : NULL;
                planes_in sections = {anchor, rest, levels->anchor + levels->anchor_size,
                                      rest == NULL ? NULL : levels->rest + levels->rest_size,
                                      (uint64_t)anchor_size, (uint64_t)rest_size,
                                      folding == NULL ? FLAT : load16(folding),
                                      rest_folding == NULL ? FLAT : load16(rest_folding)};
                const bool folded = sections.anchor_entry != FLAT || (rest != NULL && sections.rest_entry != FLAT);
                if (rest == NULL && folded) { /* elsewhere it costs more than it saves */
                    prefetch(anchor + anchor_size, (uint64_t)anchor_size);
                }
                if (!direct || folded) {
                    const int bad = read_codes(kernels, tile, &block, planes, sections, s);
                    if (bad >= 0) {
                        const uint64_t at = (uint64_t)(bad == IN_ANCHOR ? anchor - levels->anchor : rest - levels->rest);
                        return fail(fault, LYNX_ERR_FOLD, bad, block.index, at);
                    }
                }
                bool good = true;
                if (direct) {
                    if (!planes->uniform && !folded) {
                        make_readable(&sections, s);
                    }
                    good = kernels->place(tile->part, planes, &s->params, sections.anchor, sections.rest,
                                          folded ? s->codes : NULL, rest != NULL, block.tokens, shifts, stretches,
                                          view->token_stride, streams ? &tail : NULL);
                } else if (rest != NULL) {
                    good = kernels->check(tile->part, s->codes, block.tokens, planes);
                }
                if (!good) {
                    return fail(fault, LYNX_ERR_CODE, 1, block.index, (uint64_t)(rest - levels->rest));
                }
                prefetch_next(tile, view, &block, 2, true);
                if (entry != NULL) {
                    s->streams.ahead = (lynx_ahead){{anchor + anchor_size, rest + rest_size, levels->rank + ranks + ranks_size}};
                    read_ranks(entry, levels->rank + ranks, &s->streams);
                    const lynx_kernels *ranked = s->params.constant == 0 ? kernels : &lynx_scalar; /* as in the encoder */
                    if (ranked->unrank(tile->part, tile->dtype, s->codes, block.tokens, block.channels, &s->params,
                                       &s->streams, shifts, to) != LYNX_OK ||
                        !ranks_fit(&s->streams, entry)) {
                        return fail(fault, LYNX_ERR_RANK, 2, block.index, ranks);
                    }
                } else if (!direct) {
                    kernels->dequantise(tile->part, tile->dtype, s->codes, block.tokens, &s->params, shifts, to);
                }
                prefetch_next(tile, view, &block, 3, true);
                if (s->params.constant != 0) {
                    write_constants(tile->part, &block, &s->params, to);
                }
                if (moved) {
                    kernels->rescale(setup->unshifts, s->words, ROW, block.tokens, s->words, ROW);
                }
                if (streamed) {
                    kernels->stream(places[0], s->words, (size_t)block.tokens * ROW);
                } else if (apart) {
                    place_rows(&block, (const uint8_t *)s->words, 2 * ROW, places);
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
    lynx_end_tail(&tail);
    if (streams) {
        STREAM_FENCE();
    }
    return LYNX_OK;
}
