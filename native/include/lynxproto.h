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

#define LYNX_ABI_VERSION 5

enum {
    LYNX_OK = 0,
    LYNX_ERR_ARGUMENT = 1,  /* sizes, widths or pointers that describe no tile: the caller's mistake */
    LYNX_ERR_SPACE = 2,     /* an output buffer is too small: the caller's mistake */
    LYNX_ERR_TRUNCATED = 3, /* the payload ends too early */
    LYNX_ERR_PADDED = 4,    /* the payload is longer than its content */
    LYNX_ERR_PARAMETER = 5, /* a scale, zero point or parameter width outside its range */
    LYNX_ERR_CODE = 6,      /* an 8-bit code outside the range of its width */
    LYNX_ERR_RANK = 7,      /* a rank outside its cell, an empty cell, or streams that do not match the codes */
    LYNX_ERR_FOLD = 8,      /* folded planes whose sizes do not match */
    LYNX_ERR_HEADER = 9,    /* a level's header that says what cannot be */
    LYNX_ERR_LEVEL = 10,    /* the payload is of another level */
    LYNX_ERR_MIXED = 11,    /* levels of which some are stored and others are not */
    LYNX_ERR_TABLE = 12,    /* the tile's own tables: a width over 8, or padding that is not zero */
    LYNX_STORED = 100,      /* no error: the tile is stored */
    LYNX_UNDECIDED = 101    /* no error: whether the tile is stored is not known yet */
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

/* --- views ----------------------------------------------------------------------------------------------------
 * Where the words of a tile [heads, tokens, head_dim] are; those of a token and head lie next to each other. With `pages`
 * (a block table) token i of the cache's pages is token (first_token + i) % page_tokens of page
 * pages[(first_token + i) / page_tokens]; pages are page_stride words apart. */
typedef struct {
    void *words;             /* of the first head, and of its first token, or page 0's first token */
    ptrdiff_t head_stride, token_stride; /* in words */
    const int64_t *pages;    /* null: the tokens lie token_stride apart */
    ptrdiff_t page_stride;   /* in words */
    uint32_t page_tokens, first_token;
} lynx_view;

/* A tile's words of `word_bytes` (1, 2 or 4) to or from contiguous memory. */
int lynx_view_gather(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim, void *out);
int lynx_view_scatter(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim,
                      const void *in);

/* --- hq -------------------------------------------------------------------------------------------------------
 * A tile's levels, as payloads. One call after the other, on memory of the caller's that is no smaller than said:
 *     encode: lynx_hq_prepare, lynx_hq_encode for ranges of blocks (by several threads, with scratch of their own),
 *             lynx_hq_assemble;
 *     decode: lynx_hq_open, lynx_hq_decode for ranges of blocks. */
enum { LYNX_BFLOAT16 = 0, LYNX_FLOAT16 = 1 };
enum { LYNX_KEY = 0, LYNX_VALUE = 1 };

/* A codec's config, for tiles of a shape. spec/codec-hq.md, "Configuration". */
typedef struct {
    int32_t dtype;         /* LYNX_BFLOAT16 or LYNX_FLOAT16 */
    int32_t part;          /* LYNX_KEY or LYNX_VALUE */
    uint32_t heads, tokens, head_dim;
    int32_t levels;        /* 1, 2 or 3 */
    int32_t fold, scaling;
    const uint8_t *widths; /* [heads][head_dim] anchor bits, 0..8, equal within a value group; null (keys): by range */
    uint64_t range_bits;   /* what an encoder gives out by range */
} lynx_hq_config;

typedef struct {
    uint64_t blocks;
    uint64_t level[3]; /* bytes that an encoder needs for a level; tiles that are stored take others */
    uint64_t plan;     /* bytes of a plan */
} lynx_hq_bounds;

/* What a range of blocks took; opaque but for its use. */
typedef struct {
    uint64_t first, last;
    uint64_t anchor, params, rest, rank, rank_bound;
} lynx_hq_piece;

/* Where a payload is wrong: the level and the byte offset in it; the section (0 parameters, 1 codes, 2 ranks, 3 anchor
 * planes, -1 none of them) and its block; and what was expected: a size, or the level that the payload names. */
typedef struct {
    int32_t level;
    int32_t section;
    uint64_t block;
    uint64_t offset;
    uint64_t expected;
} lynx_hq_fault;

int lynx_hq_measure(const lynx_hq_config *config, lynx_hq_bounds *bounds);

/* Scratch for one thread; no state is kept in it between calls. */
size_t lynx_hq_scratch_size(void);

/* Choose the tile's own tables. The plan refers to `config`, and has to stay in place. */
int lynx_hq_prepare(const lynx_hq_config *config, const lynx_view *view, void *plan, void *scratch);

/* Encode blocks [first, last) into the levels whose buffers are not null. */
int lynx_hq_encode(const void *plan, const lynx_view *view, uint64_t first, uint64_t last, uint8_t *const levels[3],
                   lynx_hq_piece *piece, void *scratch);

/* Make payloads of the levels of which all blocks were encoded, in pieces in order, and give their sizes. Returns
 * LYNX_STORED if the tile has to be stored: the buffers' content is of no use then; or LYNX_UNDECIDED if that can only be
 * told when the last level is encoded too. */
int lynx_hq_assemble(const void *plan, uint8_t *const levels[3], const lynx_hq_piece *pieces, uint64_t count,
                     uint64_t sizes[3]);

/* Check `count` payloads, but for values. LYNX_STORED: the words follow the header of level 0. The plan refers to the
 * config and to the payloads. */
int lynx_hq_open(const lynx_hq_config *config, const uint8_t *const *payloads, const uint64_t *sizes, int count,
                 void *plan, lynx_hq_fault *fault);

/* Decode blocks [first, last) of opened payloads. After an error the words mean nothing. */
int lynx_hq_decode(const void *plan, const lynx_view *view, uint64_t first, uint64_t last, void *scratch,
                   lynx_hq_fault *fault);

#ifdef __cplusplus
}
#endif
#endif
