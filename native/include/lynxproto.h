/* lynxproto codec kernels: a C library without dependencies, usable without Python.
 *
 * Functions never allocate, never keep a pointer after they return, and are thread-safe. Every decoder treats its
 * payload as hostile: it reads and writes only inside the buffers it is given and returns an error otherwise.
 * Results are the same bytes on every instruction set, with or without FMA, flush-to-zero and denormals-are-zero.
 * The formats are specified in spec/codec-bitplane.md and spec/codec-hq.md.
 */
#ifndef LYNXPROTO_H
#define LYNXPROTO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LYNX_ABI_VERSION 4

enum {
    LYNX_OK = 0,
    LYNX_ERR_ARGUMENT = 1,  /* sizes, widths or pointers that describe no tile: the caller's mistake */
    LYNX_ERR_SPACE = 2,     /* an output buffer is too small: the caller's mistake */
    LYNX_ERR_TRUNCATED = 3, /* the payload ends too early */
    LYNX_ERR_PADDED = 4,    /* the payload is longer than its content */
    LYNX_ERR_PARAMETER = 5, /* a scale, zero point or parameter width outside its range */
    LYNX_ERR_CODE = 6,      /* an 8-bit code outside the range of its width */
    LYNX_ERR_RANK = 7,      /* a rank outside its cell, an empty cell, or streams that do not match the codes */
    LYNX_ERR_FOLD = 8       /* folded planes whose sizes do not match */
};

enum { LYNX_ISA_SCALAR = 0, LYNX_ISA_AVX2 = 1, LYNX_ISA_AVX512 = 2, LYNX_ISA_NEON = 3 };

int lynx_abi_version(void);
const char *lynx_strerror(int error);

/* The best instruction set of this machine, and the one in use. Selecting one that the machine or the build lacks
 * returns LYNX_ERR_ARGUMENT. The environment variable LYNXPROTO_ISA (scalar, avx2, avx512, neon) sets the first choice. */
int lynx_isa_best(void);
int lynx_isa(void);
int lynx_isa_select(int isa);

/* CRC32C (Castagnoli) of `size` bytes that follow on others with the CRC32C `crc`; 0 if there are none. */
uint32_t lynx_crc32c(uint32_t crc, const void *data, size_t size);

/* --- bitplane -------------------------------------------------------------------------------------------------
 * `rows` rows of `row_words` words of `word_bytes` (1, 2 or 4) bytes, `row_stride` bytes apart. Plane p holds bit
 * (8 * word_bytes - 1 - p) of each word, 8 words a byte, least significant bit first; planes [first, last) are
 * written to `planes`, `plane_bytes` = ceil(rows * row_words / 8) bytes each. With more than one row, row_words
 * must be a multiple of 8. */
int lynx_bitplane_pack(int word_bytes, const void *words, size_t rows, size_t row_words, ptrdiff_t row_stride,
                       int first, int last, uint8_t *planes);
/* Plane pointers for all planes [0, 8 * word_bytes); a null pointer stands for a plane of zeros. */
int lynx_bitplane_unpack(int word_bytes, const uint8_t *const *planes, size_t rows, size_t row_words,
                         ptrdiff_t row_stride, void *words);

/* --- hq -------------------------------------------------------------------------------------------------------
 * A tile of words [heads, tokens, head_dim], cut into blocks of up to 64 tokens x 64 channels of one head, ordered
 * by head, then tokens, then channels. */
#define LYNX_BLOCK 64

enum { LYNX_BFLOAT16 = 0, LYNX_FLOAT16 = 1 };
enum { LYNX_KEY = 0, LYNX_VALUE = 1 };

typedef struct {
    int32_t dtype;         /* LYNX_BFLOAT16 or LYNX_FLOAT16 */
    int32_t part;          /* LYNX_KEY: a group is a channel over tokens. LYNX_VALUE: a token over channels */
    uint32_t heads, tokens, head_dim;
    const uint8_t *widths; /* [heads][head_dim] anchor bits, 0..8; equal within a value group */
    const int8_t *exponents; /* [heads][head_dim] words are divided by 2^e, -8..7, bfloat16 only; null: none */
    const int8_t *biases;  /* [heads][head_dim] of value tiles with folding, -8..7; null: zeros */
    int32_t fold;          /* whether the top planes are folded */
} lynx_hq_tile;

/* Sizes that follow from the tile alone. */
typedef struct {
    uint64_t blocks;      /* number of blocks */
    uint64_t groups;      /* number of groups, all blocks */
    uint64_t anchor;      /* bytes of the anchor planes; with folding, what they take at most */
    uint64_t rest;        /* bytes of the remaining planes; with folding, what they take at most */
    uint64_t max_params;  /* the parameters' bound, without block headers */
    uint64_t max_rank;    /* the rank streams' bound, without block table */
} lynx_hq_sizes;

#define LYNX_HQ_PARAM_HEADER 6 /* bytes of a block's parameter header */
#define LYNX_HQ_RANK_HEADER 4  /* bytes of a block's entry in the rank table */
#define LYNX_HQ_FOLD_HEADER 2  /* bytes of a block's entry in a fold table */

/* Scratch for one thread; no state is kept in it between calls. */
size_t lynx_hq_scratch_size(void);

int lynx_hq_measure(const lynx_hq_tile *tile, lynx_hq_sizes *sizes);
/* The same sizes for blocks [first, last). */
int lynx_hq_measure_range(const lynx_hq_tile *tile, uint64_t first, uint64_t last, lynx_hq_sizes *sizes);

/* Whether the rest section of the tile folds: it has a fold table then. */
int lynx_hq_folds_rest(const lynx_hq_tile *tile);

/* What an encoder has to know of the channels, [heads][head_dim]: their ranges and sizes as bfloat16 words (means over
 * blocks of the range and of the largest magnitude), and how far they lie from zero; spec/codec-hq.md, "Spreads" and
 * "Folding". `tile->widths` only has to be valid. */
int lynx_hq_spreads(const lynx_hq_tile *tile, const uint16_t *words, ptrdiff_t head_stride, ptrdiff_t token_stride,
                    uint16_t *ranges, uint16_t *sizes, int8_t *biases, void *scratch);

/* Encode blocks [first, last). Planes and headers point to the first block of the range. Any of `anchor`,
 * `param_headers` (with `params`), `rest`, `rank_table` (with `rank`) may be null: that section is not made. Each section
 * has the size that lynx_hq_measure_range gives; anchor_size, params_size, rest_size and rank_size return the bytes used. With
 * folding, `anchor` needs `fold_table`, and `rest` needs `rest_table` where lynx_hq_folds_rest says so. */
typedef struct {
    uint8_t *fold_table;
    uint8_t *anchor;
    uint8_t *param_headers;
    uint8_t *params;
    uint8_t *rest_table;
    uint8_t *rest;
    uint8_t *rank_table;
    uint8_t *rank;
    uint64_t anchor_size;
    uint64_t params_size;
    uint64_t rest_size;
    uint64_t rank_size;
    uint64_t rank_bound;     /* bytes of rank table and ranks; without these sections, what they take at most */
    int32_t wants_rank_bound; /* in: whether to work rank_bound out where there is no rank table */
} lynx_hq_encoded;

int lynx_hq_encode(const lynx_hq_tile *tile, const uint16_t *words, ptrdiff_t head_stride, ptrdiff_t token_stride,
                   uint64_t first, uint64_t last, lynx_hq_encoded *out, void *scratch);

/* The sections of a tile's levels, each whole, as received. `rest` null: anchor only. `rank_table` null: 8-bit. */
typedef struct {
    const uint8_t *fold_table; /* of tiles with folding */
    const uint8_t *anchor;
    const uint8_t *param_headers;
    const uint8_t *params;
    const uint8_t *rest_table; /* of tiles that fold it */
    const uint8_t *rest;
    const uint8_t *rank_table;
    const uint8_t *rank;
    uint64_t anchor_size;
    uint64_t params_size;
    uint64_t rest_size;
    uint64_t rank_size;
} lynx_hq_levels;

/* Where a payload is wrong: the section (0 parameters, 1 rest planes, 2 ranks, 3 anchor planes), the block, and the byte
 * offset in it. */
typedef struct {
    int32_t section;
    uint64_t block;
    uint64_t offset;
} lynx_hq_fault;

/* Check that headers and tables add up to anchor_size, params_size, rest_size and rank_size: the totals only, no values. */
int lynx_hq_check(const lynx_hq_tile *tile, const lynx_hq_levels *levels, lynx_hq_fault *fault);

/* Decode blocks [first, last) into `words`. lynx_hq_check must have passed for the same levels. */
int lynx_hq_decode(const lynx_hq_tile *tile, const lynx_hq_levels *levels, uint16_t *words, ptrdiff_t head_stride,
                   ptrdiff_t token_stride, uint64_t first, uint64_t last, void *scratch, lynx_hq_fault *fault);

#ifdef __cplusplus
}
#endif
#endif
