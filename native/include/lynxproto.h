/* lynxproto's codecs: a C11 library without dependencies, usable without Python, from C++ too.
 *
 * The formats are specified in spec/codec-bitplane.md and spec/codec-hq.md; docs/embedding/c.md shows whole programs.
 * Frames and captures are read with lynxproto_wire.h.
 *
 * Memory.    No function allocates, frees, or keeps a pointer after it returns: all memory is the caller's. Where an
 *            opaque structure (a plan) refers to other memory, its function says so, and that memory has to stay.
 * Sizes      are in bytes unless another unit is named. Strides are in words, signed, and may be anything that stays
 *            inside the caller's memory.
 * Alignment. Words are aligned to their own size (a 16-bit word to 2), plans to 8 bytes; payloads, planes, scratch and
 *            all other bytes may lie anywhere.
 * Overlap.   Outputs must not overlap inputs, or each other.
 * Errors.    Functions return LYNX_OK (0), an error (LYNX_ERR_*), or an outcome of 100 and more, which is no error.
 *            Payloads may be hostile: decoders read and write only inside the buffers that they are given, in time and
 *            space that follow from the tile, and return an error otherwise. The caller's own sizes, shapes and pointers
 *            are checked where that is cheap, and otherwise trusted: block tables are not checked against the cache.
 * Threads.   All functions may be called from any number of threads at once, on outputs and scratch of their own. Only
 *            lynx_isa_select changes something that threads share, and it may be called at any time.
 * Results    are the same bytes on every instruction set, with or without FMA, flush-to-zero and denormals-are-zero.
 */
#ifndef LYNXPROTO_H
#define LYNXPROTO_H

#include <stddef.h>
#include <stdint.h>

#define LYNX_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Of the binary interface: the number in the shared library's name. It grows when a program has to be compiled again. */
#define LYNX_ABI_VERSION 7

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
    LYNX_ERR_FRAME = 13,    /* no frame begins here, or its header is damaged */
    LYNX_ERR_VERSION = 14,  /* a frame of another version */
    LYNX_ERR_CRITICAL = 15, /* an unknown type, flag or key that must be understood */
    LYNX_ERR_TOO_LARGE = 16, /* a payload beyond the limit */
    LYNX_ERR_PROTOCOL = 17, /* a rule of the wire format is broken */
    LYNX_ERR_LIMIT = 18,    /* more than a limit allows */
    LYNX_ERR_CRC = 19,      /* a damaged payload */
    LYNX_ERR_CAPTURE = 20,  /* no capture, or a damaged one */
    LYNX_ERR_UNSUPPORTED = 21, /* allowed, and not in this library */
    LYNX_STORED = 100,      /* no error: the tile is stored */
    LYNX_UNDECIDED = 101,   /* no error: whether the tile is stored is not known yet */
    LYNX_MORE = 102,        /* no error: more bytes are needed */
    LYNX_END = 103          /* no error: there is nothing more */
};

enum { LYNX_ISA_SCALAR = 0, LYNX_ISA_AVX2 = 1, LYNX_ISA_AVX512 = 2, LYNX_ISA_NEON = 3 };

/* LYNX_ABI_VERSION of the library that runs, to be compared with that of the header. */
LYNX_API int lynx_abi_version(void);

/* A short text for an error, in memory that lives for ever. */
LYNX_API const char *lynx_strerror(int error);

/* The best instruction set of this machine, the one in use, and its choice, for the whole process. One that the machine or the
 * build lacks is LYNX_ERR_ARGUMENT. The environment variable LYNXPROTO_ISA (scalar, avx2, avx512, neon) sets the first choice. */
LYNX_API int lynx_isa_best(void);
LYNX_API int lynx_isa(void);
LYNX_API int lynx_isa_select(int isa);

/* CRC32C (Castagnoli) of `size` bytes that follow on others with the CRC32C `crc`; 0 if there are none. */
LYNX_API uint32_t lynx_crc32c(uint32_t crc, const void *data, size_t size);

/* CRC32C and XXH3-128 of `total` bytes, while they arrive; both read each byte once. `done` tells how far: what is short of
 * 1024 bytes waits for more. */
typedef struct {
    uint64_t total, done;
    uint64_t lanes[8];
    uint32_t crc;
} lynx_sums;

#define LYNX_SUMS_LEAST 240 /* bytes: a digest needs more */

LYNX_API void lynx_sums_begin(lynx_sums *sums, uint64_t total);
/* The first `there` bytes at `data`, which lies where it lay before, are in place. */
LYNX_API void lynx_sums_add(lynx_sums *sums, const void *data, uint64_t there);
/* Moves what a socket has now into place behind the `there` bytes at `data`, at most to the end, and adds it piece by piece,
 * while the core's cache has it. Returns how many bytes came; 0 if the peer has ended; else -errno (-EAGAIN: none yet). */
LYNX_API int64_t lynx_sums_receive(lynx_sums *sums, int socket, void *data, uint64_t there);
/* XXH3-128 in its canonical form (big-endian). LYNX_ERR_ARGUMENT for too few bytes, or before all were added. */
LYNX_API int lynx_sums_digest(const lynx_sums *sums, uint8_t digest[16]);

/* --- views ----------------------------------------------------------------------------------------------------
 * Where the words of a tile [heads, tokens, head_dim] are; those of a token and head lie next to each other. With `pages`
 * (a block table) token i of the tile is token (first_token + i) % page_tokens of page
 * pages[(first_token + i) / page_tokens]; pages lie page_stride words apart, from `words` on.
 *
 * Of a cache with pages [page, page_tokens, heads, head_dim] (NHD) of one array, head_stride is head_dim and token_stride is
 * heads * head_dim; of pages [page, heads, page_tokens, head_dim] (HND) head_stride is page_tokens * head_dim and token_stride
 * head_dim. K and V in one array [page, heads, page_tokens, 2 * head_dim] are two views of the same strides, the second
 * head_dim words further, with a token_stride of 2 * head_dim. Where words are written, a page must not be twice in the table.
 * The table has to have an entry for each page that the tile reaches, and each must be a page of the cache. */
typedef struct {
    void *words;             /* of the first head, and of its first token, or page 0's first token */
    ptrdiff_t head_stride, token_stride; /* in words */
    const int64_t *pages;    /* null: the tokens lie token_stride apart */
    ptrdiff_t page_stride;   /* in words */
    uint32_t page_tokens, first_token; /* not 0 with pages; any, below 2^31 */
} lynx_view;

/* A tile's words of `word_bytes` (1, 2 or 4) to or from contiguous memory of heads * tokens * head_dim words, at any address.
 * LYNX_ERR_ARGUMENT for another word_bytes and an empty tile. */
LYNX_API int lynx_view_gather(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim,
                              void *out);
LYNX_API int lynx_view_scatter(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim,
                               const void *in);

/* --- bitplane -------------------------------------------------------------------------------------------------
 * Planes of a tile's words of `word_bytes` (1, 2 or 4) bytes, of any dtype. Plane p holds bit (8 * word_bytes - 1 - p) of each
 * word, 8 words a byte, least significant bit first, in [head, token, dim] order: ceil(words / 8) bytes. A payload is a header
 * of 4 bytes (level, number of planes, two zeros), then the level's planes one after another; spec/codec-bitplane.md. */

/* `planes` points to 8 * word_bytes planes, each where it is to begin; those that are null are not made. LYNX_ERR_ARGUMENT for
 * another word_bytes and an empty tile. */
LYNX_API int lynx_bitplane_pack(const lynx_view *view, int word_bytes, uint32_t heads, uint32_t tokens, uint32_t head_dim,
                                uint8_t *const *planes);

/* The reverse. Planes that are null stand for zeros. */
LYNX_API int lynx_bitplane_unpack(const uint8_t *const *planes, const lynx_view *view, int word_bytes, uint32_t heads,
                                  uint32_t tokens, uint32_t head_dim);

/* --- hq -------------------------------------------------------------------------------------------------------
 * A tile's levels, as payloads. One call after the other, on memory of the caller's that is no smaller than said:
 *     encode: lynx_hq_measure, lynx_hq_encode_tile; with several threads instead lynx_hq_prepare, lynx_hq_encode for ranges of
 *             blocks, lynx_hq_assemble;
 *     decode: lynx_hq_measure, lynx_hq_decode_tile; or lynx_hq_open, lynx_hq_decode for ranges of blocks.
 * Between prepare and assemble, and after open, the plan is only read: threads may share it, each with ranges of blocks, a
 * piece or fault, and scratch of its own. A tile is decoded from its first level again when another level has come. */
enum { LYNX_BFLOAT16 = 0, LYNX_FLOAT16 = 1 };
enum { LYNX_KEY = 0, LYNX_VALUE = 1 };

/* A codec's config, for tiles of a shape. spec/codec-hq.md, "Configuration". */
typedef struct {
    int32_t dtype;         /* LYNX_BFLOAT16 or LYNX_FLOAT16 */
    int32_t part;          /* LYNX_KEY or LYNX_VALUE */
    uint32_t heads, tokens, head_dim; /* a tile has at most 2^31 bytes */
    int32_t levels;        /* 1 (lossy), 2 or 3 */
    int32_t fold, scaling; /* 0 or 1 */
    const uint8_t *widths; /* [heads][head_dim] anchor bits, 0..8, equal within a value group; null (keys): by range */
    uint64_t range_bits;   /* what an encoder gives out by range: floor(key_bits * heads * head_dim) */
} lynx_hq_config;

typedef struct {
    uint64_t blocks;   /* of 64 tokens x 64 channels of a head: what threads share out */
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

/* What a tile needs. LYNX_ERR_ARGUMENT for a config that describes no tile: all other functions rely on one that passed. */
LYNX_API int lynx_hq_measure(const lynx_hq_config *config, lynx_hq_bounds *bounds);

/* Bytes of scratch for one thread (about 100 KiB); no state is kept in it between calls. */
LYNX_API size_t lynx_hq_scratch_size(void);

/* Encode a whole tile: what the next three functions do, with the same buffers and outcomes, and in less time than they take with
 * one thread. */
LYNX_API int lynx_hq_encode_tile(const lynx_hq_config *config, const lynx_view *view, uint8_t *const levels[3], uint64_t sizes[3],
                                 void *plan, void *scratch);

/* Choose the tile's own tables. The plan (bounds.plan bytes) refers to config->widths, and must not be moved. */
LYNX_API int lynx_hq_prepare(const lynx_hq_config *config, const lynx_view *view, void *plan, void *scratch);

/* Encode blocks [first, last) into the levels whose buffers (bounds.level bytes each, one buffer for all ranges) are not null.
 * LYNX_ERR_ARGUMENT for blocks that the tile does not have. */
LYNX_API int lynx_hq_encode(const void *plan, const lynx_view *view, uint64_t first, uint64_t last,
                            uint8_t *const levels[3], lynx_hq_piece *piece, void *scratch);

/* Make payloads, in place, of the levels of which all blocks were encoded, in pieces in order, and give their sizes.
 * LYNX_STORED: coded, the tile would be larger than its words; the buffers' content is of no use, lynx_hq_store makes the
 * payloads. LYNX_UNDECIDED: that can only be told when the last level is encoded too. */
LYNX_API int lynx_hq_assemble(const void *plan, uint8_t *const levels[3], const lynx_hq_piece *pieces, uint64_t count,
                              uint64_t sizes[3]);

/* The payload of a level of a tile that is stored: 8 bytes, and in level 0 the words after them; `size` is what was written. */
LYNX_API int lynx_hq_store(const lynx_hq_config *config, const lynx_view *view, int level, uint8_t *payload,
                           uint64_t *size);

/* Check `count` payloads, levels 0 to count - 1, but for values; it costs little. LYNX_STORED: the words follow the first 8
 * bytes of payload 0 (lynx_view_scatter), and nothing is to be decoded. Else an error says what is wrong, and `fault` where.
 * The plan (bounds.plan bytes) refers to config->widths and to the payloads, and must not be moved. */
LYNX_API int lynx_hq_open(const lynx_hq_config *config, const uint8_t *const *payloads, const uint64_t *sizes, int count,
                          void *plan, lynx_hq_fault *fault);

/* Decode blocks [first, last) of opened payloads: anchors from one payload, 8-bit values from two of three, exact words from
 * all. After an error the words mean nothing. */
LYNX_API int lynx_hq_decode(const void *plan, const lynx_view *view, uint64_t first, uint64_t last, void *scratch,
                            lynx_hq_fault *fault);

/* Open and decode all blocks, with one thread. */
LYNX_API int lynx_hq_decode_tile(const lynx_hq_config *config, const uint8_t *const *payloads, const uint64_t *sizes, int count,
                                 const lynx_view *view, void *plan, void *scratch, lynx_hq_fault *fault);

#ifdef __cplusplus
}
#endif
#endif
