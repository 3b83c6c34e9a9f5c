/* The kernels that an instruction set provides, and their dispatch. One table per instruction set; the drivers in
 * bitplane.c, encode.c and decode.c do everything else. A new instruction set is one new table. */
#ifndef LYNX_ISA_H
#define LYNX_ISA_H

#include <stdbool.h>
#include <string.h>

#include "lynxproto.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lynxproto's kernels read words in memory order and need a little-endian machine"
#endif

#define ROW 64 /* a block is of up to 64 tokens x 64 channels */
#define BLOCK_VALUES (ROW * ROW)

/* Which channels fold in a section, and how an octet of it looks: the rows of planes 0, 1 and 2, then the others. Masks
 * have a bit for each channel. */
typedef struct {
    uint64_t three, two;     /* channels whose top three bits fold here; two of them: planes 0, 1 or 1, 2 */
    uint64_t rows[3];        /* channels with a byte in these rows */
    uint64_t folded_rows[3]; /* and in their folded form */
    int two_row;             /* the first plane of `two` */
    int others;              /* bytes of the other rows */
    int flat_size, folded_size; /* bytes of an octet */
} lynx_fold;

#define FOLDED_REST 8 /* counts as a plane below */
enum { ANCHOR_SECTION = 0, REST_SECTION = 1 };
/* Sections, in faults. */
enum { IN_PARAMS = 0, IN_REST = 1, IN_RANKS = 2, IN_ANCHOR = 3 };

/* Which planes of a block's codes lie in the anchor section, which in the rest: one byte per 8 tokens (an octet),
 * plane and channel. Channels of width b have planes 0..b-1 in the anchor. Within a section, octet and plane,
 * channels follow in ascending order. */
typedef struct {
    int channels;             /* 1..64 */
    bool uniform;             /* all channels have the same width, and there are 64 */
    uint8_t widths[ROW];      /* 255 beyond `channels` */
    uint16_t anchor_octet;    /* bytes of an octet in the anchor section: the sum of the widths */
    uint16_t rest_octet;      /* 8 * channels - anchor_octet */
    uint64_t used;            /* a bit for each channel that there is, */
    uint64_t in_anchor[8];    /* and for those with plane p in the anchor section */
    uint8_t anchor_count[8];  /* how many those are */
    /* What the widths mean for each of the block's groups; spec/codec-hq.md, "Widths". */
    float steps[ROW];            /* R, */
    float per_step[ROW];         /* and 1 / R */
    int16_t full[ROW], base[ROW]; /* o, and the anchor's lowest integer */
    uint8_t low[ROW], high[ROW]; /* least and largest valid code */
    lynx_fold fold[2];           /* of the anchor section, of the rest section */
    int16_t bias[ROW];           /* how far a value channel's centre lies from the token's, in codes */
    /* What follows is there if an instruction set's `shuffles` makes it, and the planes are not uniform. For bytes of 64 channels:
     * of plane p the channels in the anchor section, then the others, and where in that order each channel is. */
    uint8_t order[8][ROW], place[8][ROW];
    /* For bytes of 16 channels. Of the rest section
     * FOLDED_REST is plane 2 of channels of 2 bits: what is left of it when folded. */
    uint8_t anchor_rank[9][4]; /* how many channels of plane p come before channel 16 q */
    uint8_t rest_rank[9][4];
    /* Byte shuffles of lanes of 16 channels; 0x80 = none. Expanding: the place of a channel's byte among those of
     * its lane. Compressing: the channel whose byte comes at a place. */
    uint8_t anchor_expand[9][ROW], anchor_compress[9][ROW];
    uint8_t rest_expand[9][ROW], rest_compress[9][ROW];
} lynx_planes;

/* Parameters of the 64 groups of a block, as the kernels want them. Unused groups have zeros. */
typedef struct {
    float scale[ROW];    /* s; 0 for constant groups */
    float inverse[ROW];  /* 1/s, a little more (encoder only) */
    int16_t offset[ROW]; /* integer = byte - offset */
    uint16_t s[ROW];     /* s as a bfloat16 word */
    int16_t z[ROW];
    uint16_t word[ROW];  /* of a constant group */
    uint64_t constant;   /* bit per group */
    uint16_t s_least, s_most; /* of used groups (decoder only) */
} lynx_params;

/* Words that wait for the rest of their line. */
typedef struct {
    uint16_t *end; /* where they end */
    int count;     /* less than a line has; 0: there are none */
    uint16_t words[32];
} lynx_tail;

/* What a block's parameters are as fields. */
typedef struct {
    int s_bits, z_bits, s_low, z_low;
} lynx_packed;

/* Sums over blocks of the ranges and sizes of channels, as bfloat16 words, in less than 40 bits; and how many blocks those are. */
typedef struct {
    uint64_t range[ROW], size[ROW];
    uint32_t count[ROW];
} lynx_spread;

/* Parameters of a block as received: s is s_low + 4 times a field, z is z_low + the next. */
typedef struct {
    const uint8_t *stream; /* up to 64 bytes beyond what 64 groups take may be read */
    int s_bits, z_bits, s_low, z_low, groups;
    uint16_t least, largest; /* that s may be */
} lynx_fields;

/* Level 2 of a block in four streams; decoders find B, W and X in `more`, one behind the other. The sizes bound what 4096
 * values can need, plus slack for wide accesses. */
#define A_MAX (BLOCK_VALUES * 10 / 8)
#define B_MAX (BLOCK_VALUES / 8)
#define W_MAX (BLOCK_VALUES * 12 / 8)
#define X_MAX (BLOCK_VALUES * 2)
#define SLACK 64

/* Where three sections will be read or written soon. A line of each is fetched with each of a block's rows: all at once would keep
 * other loads waiting, and hardware follows one page at a time. Rows are more than the block behind needs: what is left is the next
 * one's, and there by then. None is null. */
typedef struct {
    const uint8_t *at[3];
} lynx_ahead;

static inline void lynx_fetch(const lynx_ahead *ahead, uint32_t row) {
    for (int i = 0; i < 3; i++) { /* as numbers: these lines may lie beyond the section */
        __builtin_prefetch((const void *)((uintptr_t)ahead->at[i] + 64 * (uintptr_t)row));
    }
}

typedef struct {
    lynx_ahead ahead; /* fetched by `rank` and `unrank` */
    uint32_t a_bits, b_bits, w_count, x_count;
    uint8_t a[A_MAX + SLACK];
    uint8_t b[B_MAX + SLACK];
    uint8_t w[W_MAX + SLACK];
    uint16_t x[BLOCK_VALUES + SLACK];
    uint8_t more[B_MAX + W_MAX + X_MAX + SLACK];
} lynx_streams;

/* Rows that lie some stride apart. */
typedef struct {
    uint16_t *row; /* the first */
    int count;
} lynx_stretch;

/* Rows of stretches of one stride, behind which an empty one lies, fetched one by one into the cache that holds a tile. */
typedef struct {
    const lynx_stretch *stretch; /* null: nothing is fetched */
    const uint16_t *next;
    ptrdiff_t stride;
    int left; /* of this stretch */
} lynx_scout;

static inline lynx_scout lynx_scout_of(const lynx_stretch *rows, ptrdiff_t stride) {
    return rows == NULL ? (lynx_scout){NULL, NULL, 0, 0} : (lynx_scout){rows, rows->row, stride, rows->count};
}

static inline void lynx_fetch_row(lynx_scout *scout) {
    if (scout->stretch == NULL) {
        return;
    }
    __builtin_prefetch(scout->next, 0, 2);
    __builtin_prefetch(scout->next + 32, 0, 2);
    scout->next += scout->stride;
    if (--scout->left == 0) {
        scout->stretch++;
        scout->next = scout->stretch->row;
        scout->left = scout->stretch->count;
    }
}

/* The same row of the next block from memory to that cache. Surveys do so with rows of both halves of a block in turn: two streams
 * come faster than one. As a number: it may lie beyond the words. */
static inline void lynx_fetch_far(const uint16_t *row, ptrdiff_t stride) {
    const uintptr_t at = (uintptr_t)row + (uintptr_t)stride * (ROW * sizeof *row);
    __builtin_prefetch((const void *)at, 0, 2);
    __builtin_prefetch((const void *)(at + 64), 0, 2);
}

/* A row some rows further on, from that cache to the nearest. */
#define NEARLY 10
static inline void lynx_fetch_near(const uint16_t *row, ptrdiff_t stride) {
    const uintptr_t at = (uintptr_t)row + (uintptr_t)stride * (NEARLY * sizeof *row);
    __builtin_prefetch((const void *)at);
    __builtin_prefetch((const void *)(at + 64));
}

typedef struct {
    /* Make the shuffles of planes that are not uniform; null: not used. */
    void (*shuffles)(lynx_planes *planes);
    /* Extremes of each group in the ordered-integer domain, w ^ ((w >> 15) & 0x7fff), where -0 differs from +0. */
    void (*range)(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high);
    /* The same of channels, by the encoder's first look at the words of a key tile. */
    void (*survey)(const uint16_t *rows, ptrdiff_t stride, int tokens, int16_t *low, int16_t *high);
    /* And of a value tile: the largest magnitudes of channels; and how many words have a sign, if `signs` is not null. `fetched`: the
     * rows are no longer in memory only. */
    void (*survey_sizes)(const uint16_t *rows, ptrdiff_t stride, int tokens, bool fetched, uint16_t *most, uint16_t *signs);
    /* Ranges and sizes, or sizes alone, are added to sums; not those of channels with special words. */
    void (*add_spreads)(int dtype, const int16_t *low, const int16_t *high, lynx_spread *sums);
    void (*add_sizes)(int dtype, const uint16_t *most, lynx_spread *sums);
    /* Parameters from a block's fields, for codes that are `full` or anchors with zeros below. False if some are out of
     * range. */
    bool (*params)(const lynx_fields *in, const lynx_planes *planes, bool full, lynx_params *params);
    /* Whether 64 groups with these extremes are neither constant nor hold special words. */
    bool (*are_plain)(int dtype, const int16_t *low, const int16_t *high);
    /* Scale and zero point of 64 groups from their extremes; none may be constant or hold special words. */
    void (*choose)(int dtype, const lynx_planes *planes, const int16_t *low, const int16_t *high, lynx_params *params);
    /* Fields of parameters, unless the block has constant groups. Unused groups repeat a used one. 4 * ROW bytes may be written. */
    void (*pack_params)(const lynx_params *params, lynx_packed *packed, uint8_t *out);
    /* Codes. Only the portable kernel takes special words and constant groups. */
    void (*quantise)(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_planes *planes,
                     const lynx_params *params, uint8_t *codes);
    /* Either section may be null. Rows of codes up to the next multiple of 8 must be zeros. Unless the planes are
     * uniform, a section may be written up to 64 bytes beyond its end. */
    void (*pack)(const lynx_planes *planes, const uint8_t *codes, int tokens, uint8_t *anchor, uint8_t *rest);
    /* Bytes of codes; planes of `rest` null are zeros. Unless the planes are uniform, a section may be read up to 64
     * bytes beyond its end. */
    void (*unpack)(const lynx_planes *planes, const uint8_t *anchor, const uint8_t *rest, int tokens, uint8_t *codes);
    /* Whether all codes are valid. */
    bool (*check)(int part, const uint8_t *codes, int tokens, const lynx_planes *planes);
    /* Words, each token's where `rows` says. `shifts`, of value channels of bfloat16, are added to all words but zeros; null:
     * none. */
    void (*dequantise)(int part, int dtype, const uint8_t *codes, int tokens, const lynx_params *params,
                       const int16_t *shifts, uint16_t *const *rows);
    /* Words straight from planes, or from codes if those are not null, to rows of 64 channels in stretches of one stride, behind
     * which an empty one lies; null where there is none. With `tail` not null past the caches (STREAM_FENCE), in whole lines:
     * there is one stretch then, and the words of the last line are left in the tail. bfloat16 with scales of at most MOST_PLACED
     * and without constant groups; words with `shifts` may not leave the range that exponents move. With `full` codes are
     * checked: false for one that is not valid. Reads as `unpack` does. */
    bool (*place)(int part, const lynx_planes *planes, const lynx_params *params, const uint8_t *anchor, const uint8_t *rest,
                  const uint8_t *codes, bool full, int tokens, const int16_t *shifts, const lynx_stretch *rows, ptrdiff_t stride,
                  lynx_tail *tail);
    /* A copy past the caches; null where there is none. The caller has to order it (STREAM_FENCE). */
    void (*stream)(uint16_t *to, const uint16_t *rows, size_t words);
    /* Level 2. `unrank` returns LYNX_OK or LYNX_ERR_RANK; it leaves in the streams' counters what it has used. It multiplies
     * words by the powers of two of `shifts`, if that is not null: words but those of integer 0 may not leave the range that
     * exponents move. */
    void (*rank)(int part, int dtype, const uint16_t *rows, ptrdiff_t stride, const uint8_t *codes, int tokens,
                 int channels, const lynx_params *params, lynx_streams *streams);
    int (*unrank)(int part, int dtype, const uint8_t *codes, int tokens, int channels, const lynx_params *params,
                  lynx_streams *streams, const int16_t *shifts, uint16_t *const *rows);
    /* Folding, a step at a time; null where it is done at once, below. Codes with their top bits replaced by their place around
     * a centre, in folded channels, and back in place in those of the anchor or of both sections. `zeros`: z + o of each token;
     * null: centres by the token before. Rows of `centred` up to the next multiple of 8 are zeros. */
    void (*centre)(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *centred);
    void (*uncentre)(const lynx_planes *planes, const int16_t *zeros, int tokens, bool anchor, bool rest, uint8_t *codes);
    /* A section of a block of centred codes in folded form. Returns its entry in the fold table, of which FOLD_SIZE are the
     * bytes of the streams; up to SLACK bytes beyond are zeros. */
    uint32_t (*fold)(const lynx_fold *fold, const uint8_t *flat, int tokens, uint8_t *folded);
    /* The reverse. SLACK readable bytes follow the streams; false if the planes call for streams of another size. */
    bool (*unfold)(const lynx_fold *fold, const uint8_t *folded, uint32_t entry, int tokens, uint8_t *flat);
    /* Both steps at once, and `pack` or `unpack`, without flat planes; null where there are none. Writes or reads up to 64 bytes
     * beyond a section. `entries`: as `fold` returns them; a section that is null is not made. `unpack_folded` returns the
     * section whose streams have another size, or -1. */
    void (*pack_folded)(const lynx_planes *planes, const int16_t *zeros, const uint8_t *codes, int tokens, uint8_t *anchor,
                        uint8_t *rest, uint32_t entries[2]);
    int (*unpack_folded)(const lynx_planes *planes, const int16_t *zeros, const uint8_t *anchor, uint32_t anchor_entry,
                          const uint8_t *rest, uint32_t rest_entry, int tokens, uint8_t *codes);
    /* Words of 64 channels divided by 2^e (`shifts`: e in units of the word's last place), or multiplied by it with the
     * signs of `shifts` reversed. bfloat16. */
    void (*rescale)(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out,
                    ptrdiff_t out_stride);
    /* `rescale` to rows of 64 words, and the `range` of value groups of those. Null: not at once. */
    void (*rescale_range)(const int16_t *shifts, const uint16_t *rows, ptrdiff_t stride, int tokens, uint16_t *out, int16_t *low,
                          int16_t *high);
    /* An upper bound on the bits of level 2 of bfloat16, cheap. Null where there is none. */
    uint64_t (*rank_bound)(int part, const uint8_t *codes, int tokens, int channels, const lynx_params *params);
    /* `quantise` of bfloat16 with that bound; without it, 0 may be returned instead. Unless `ahead` is null, which it is for keys,
     * as many rows are fetched meanwhile: stretches of one stride, behind which an empty one lies. Null where there is none. */
    uint64_t (*quantise_ahead)(int part, const uint16_t *rows, ptrdiff_t stride, int tokens, const lynx_planes *planes,
                               const lynx_params *params, bool bounded, const lynx_stretch *ahead, ptrdiff_t ahead_stride,
                               uint8_t *codes);

    /* One row of words to and from planes; `count` is a multiple of 8 except in the last row. Planes that are null are not made,
     * and read as zeros. */
    void (*pack_row)(int word_bytes, const void *words, size_t count, uint8_t *const *planes);
    void (*unpack_row)(int word_bytes, const uint8_t *const *planes, size_t count, void *words);
} lynx_kernels;

/* Words of a tail to their place. They are the last ones in it. */
static inline void lynx_end_tail(lynx_tail *tail) {
    if (tail->count != 0) {
        memcpy(tail->end - tail->count, tail->words + 32 - tail->count, 2 * (size_t)tail->count);
        tail->count = 0;
    }
}

#define MOST_PLACED 0x7480 /* 2^106, as a word */

#if defined(__x86_64__)
#define STREAM_FENCE() __builtin_ia32_sfence()
#else
#define STREAM_FENCE()
#endif

#define MAX_ZERO_POINT 1024
#define SCALE_UNIT 4 /* scales have 6 significant bits: a multiple of 4 as bfloat16 words */

/* A block's entry in a fold table: bytes of its streams, and which of them are sent in pairs; or FLAT. */
#define FOLD_SIZE 0x1fff
#define FOLD_PAIRED 0x2000 /* D2; twice that: D3 */
#define FLAT 0xffff

/* Largest folded form of a block: the flat one, and D2 and D3 with a bit for each value in place of plane 2. */
#define FOLDED_MAX (9 * 8 * ROW)

extern const lynx_kernels lynx_scalar;
#if defined(__x86_64__)
extern const lynx_kernels lynx_avx2, lynx_avx512;
#elif defined(__aarch64__)
extern const lynx_kernels lynx_neon;
#endif

const lynx_kernels *lynx_current(void);

#endif
