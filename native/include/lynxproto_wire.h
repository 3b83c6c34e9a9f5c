/* Reading what crosses the wire: frames, what a decoder has to know out of them, and captures. spec/wire-format.md and
 * spec/capture.md say what the fields mean. Whole sessions (sockets, credit, resume, TLS) are not here: a program in C reads
 * captures, or the frames that some relay hands it.
 *
 * The conventions of lynxproto.h hold. Data may be hostile: it is read within its bounds, in time that grows with its size
 * (of manifests and plans, with 16 times that), and nothing is allocated. Texts are UTF-8, not terminated, and lie in the data
 * that was read, which has to stay while they are used; they may hold control characters.
 *
 * One thing of the wire format is not supported: texts and byte strings in pieces (CBOR's indefinite length), where they would
 * have to be understood. No known writer makes them; they are refused with LYNX_ERR_UNSUPPORTED. */
#ifndef LYNXPROTO_WIRE_H
#define LYNXPROTO_WIRE_H

#include "lynxproto.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a reader accepts; "Limits" of the wire format. Lower what you can. */
typedef struct {
    uint32_t frame_bytes;    /* of the payload of a DATA frame */
    uint32_t control_bytes;  /* of any other payload */
    uint32_t layers;         /* of a transfer */
    uint32_t tokens;         /* of a prompt */
    uint32_t tiles;          /* of a layer's plan */
    uint64_t transfer_bytes; /* of the uncompressed cache */
} lynx_limits;

/* The defaults of the wire format. */
LYNX_API void lynx_default_limits(lynx_limits *limits);

/* --- frames ---------------------------------------------------------------------------------------------------- */

enum {
    LYNX_FRAME_HELLO = 1, LYNX_FRAME_HELLO_ACK = 2, LYNX_FRAME_OPEN = 3, LYNX_FRAME_ACCEPT = 4, LYNX_FRAME_REJECT = 5,
    LYNX_FRAME_FETCH = 6, LYNX_FRAME_NOT_FOUND = 7, LYNX_FRAME_PLAN = 8, LYNX_FRAME_DATA = 9, LYNX_FRAME_RESULT = 10,
    LYNX_FRAME_END = 11, LYNX_FRAME_ACK = 12, LYNX_FRAME_NACK = 13, LYNX_FRAME_CREDIT = 14, LYNX_FRAME_RESUME = 15,
    LYNX_FRAME_CANCEL = 16, LYNX_FRAME_CLOSED = 17, LYNX_FRAME_URGENT = 18, LYNX_FRAME_PING = 19, LYNX_FRAME_PONG = 20,
    LYNX_FRAME_ERROR = 21, LYNX_FRAME_GOAWAY = 22
};

typedef struct {
    uint16_t type, flags;    /* types of 0x8000 and more that you do not know are to be skipped */
    uint8_t part, level;     /* from here on what only DATA has; 0 in other frames */
    uint8_t attempt;
    uint16_t layer, head_start, heads, codec_id, codec;
    uint32_t token_start, token_stop;
    uint32_t tokens;         /* of the token set; a bitmap's are known once the bitmap is there */
    const uint8_t *bitmap;   /* of an explicit set: bit i % 8 of byte i / 8 is token_start + i; null: a range, or still to come */
    uint8_t transfer[16];    /* all frames again: 0 for frames of the session */
    const uint8_t *payload;  /* null: not yet there */
    uint32_t payload_length, payload_crc;
    uint64_t size;           /* bytes of the frame; before its header is there, of the header */
} lynx_frame;

/* Read the frame that begins at `data`, of which `size` bytes are there. Its header is checked in the order that the wire format
 * asks for, before anything that it names is waited for.
 *   LYNX_OK             the frame is whole; the next begins at data + frame->size
 *   LYNX_MORE           come again with at least frame->size bytes; the header's fields are good if frame->size > 64
 *   LYNX_ERR_CRC        as LYNX_OK, but the payload is damaged (which is not looked at in unknown types): the frame is lost
 *   LYNX_ERR_FRAME, LYNX_ERR_VERSION                 framing is lost: nothing behind can be read
 *   LYNX_ERR_CRITICAL, LYNX_ERR_TOO_LARGE, LYNX_ERR_PROTOCOL, LYNX_ERR_LIMIT   the session has failed
 * To receive a payload where it is to stay, read with 64 bytes (and those of the bitmap: frame->size - payload_length), then
 * compare lynx_crc32c(0, payload, payload_length) with payload_crc. */
LYNX_API int lynx_frame_read(const uint8_t *data, size_t size, const lynx_limits *limits, lynx_frame *frame);

/* --- the manifest: what a transfer carries --------------------------------------------------------------------- */

typedef struct {
    const char *text;
    uint32_t size;
} lynx_text;

/* dtypes and parts beyond those that hq codes; parts have the numbers of the wire. */
enum { LYNX_FLOAT32 = 2, LYNX_FLOAT8_E4M3 = 3, LYNX_FLOAT8_E5M2 = 4, LYNX_UINT8 = 5 };
enum { LYNX_PACKED_KV = 2, LYNX_LATENT = 3, LYNX_OPAQUE = 4 };

/* Bytes of a word of a dtype; 0 for a number that is none. */
LYNX_API int lynx_word_bytes(int dtype);

typedef struct {
    lynx_text model, revision, tokenizer_hash, rope_hash, producer, attention_backend; /* empty: not stated */
    lynx_text layout, packing, request_id;
    int32_t dtype, lossy;
    uint32_t prompt_tokens, shard_index, shard_count;
    uint32_t layers, codecs, tables; /* how many */
    uint64_t cache_bytes;            /* uncompressed */
    const uint8_t *layer_data, *codec_data, *table_data; /* opaque */
    size_t layer_size, codec_size, table_size;
} lynx_manifest;

typedef struct {
    uint32_t index, kv_heads, head_start, token_start, token_stop;
    uint32_t key_dim, value_dim;
    uint32_t parts; /* bit p: part number p */
    lynx_text kind;
} lynx_layer;

/* Values of a token and head in a part of a layer: the tile's head_dim. 0 for a part that the layer lacks. */
LYNX_API uint32_t lynx_head_dim(const lynx_layer *layer, int part);

/* The manifest in OPEN's payload; or by itself. LYNX_ERR_PROTOCOL, LYNX_ERR_LIMIT, LYNX_ERR_CRITICAL, LYNX_ERR_UNSUPPORTED. */
LYNX_API int lynx_open_read(const uint8_t *payload, size_t size, const lynx_limits *limits, lynx_manifest *manifest);
LYNX_API int lynx_manifest_read(const uint8_t *data, size_t size, const lynx_limits *limits, lynx_manifest *manifest);

/* All manifest->layers layers, in the order of the manifest. */
LYNX_API int lynx_manifest_layers(const lynx_manifest *manifest, lynx_layer *layers);

enum { LYNX_CODEC_RAW = 1, LYNX_CODEC_BITPLANE = 2, LYNX_CODEC_HQ = 3 };
enum { LYNX_WIDTHS_UNIFORM = 0, LYNX_WIDTHS_RANGES = 1, LYNX_WIDTHS_TABLE = 2 };

/* A codec config; spec/codec-*.md. */
typedef struct {
    int32_t id;         /* LYNX_CODEC_* */
    int32_t levels;     /* of a tile */
    int32_t zstd;       /* raw, bitplane: not 0: what follows the payload's header (raw has none) is a Zstandard frame */
    uint8_t planes[8];  /* bitplane: of each level */
    double key_bits, value_bits; /* hq, from here on */
    int32_t widths, fold, scaling;
    const uint8_t *table; /* opaque */
    size_t table_size;
} lynx_codec;

/* Codec config `number` (below manifest->codecs). LYNX_ERR_UNSUPPORTED: a codec or a config that this library does not know;
 * LYNX_ERR_ARGUMENT: there is no such number. A table's hash, where it states one, is not verified. */
LYNX_API int lynx_manifest_codec(const lynx_manifest *manifest, uint32_t number, lynx_codec *codec);

/* The lynx_hq_config of a tile. `widths` has room for heads * head_dim bytes, and has to stay as long as the config is used.
 * LYNX_ERR_UNSUPPORTED: hq does not code such tiles, or the codec's table lacks the layer or the heads, or has other channels. */
LYNX_API int lynx_codec_tile(const lynx_codec *codec, int dtype, int part, uint32_t layer, uint32_t head_start, uint32_t heads,
                             uint32_t tokens, uint32_t head_dim, uint8_t *widths, lynx_hq_config *config);

/* --- plans and digests ------------------------------------------------------------------------------------------ */

typedef struct {
    uint32_t part, head_start, heads, token_start, token_stop, codec;
    uint32_t levels;
    uint32_t tokens;       /* of the token set */
    const uint8_t *bitmap; /* as in lynx_frame; null: a range */
} lynx_plan_tile;

/* What is read one by one out of PLAN or END. */
typedef struct {
    uint32_t layer, count;
    const uint8_t *at, *end, *levels; /* opaque */
} lynx_list;

/* PLAN: the layer, and how many tiles it has. Then the next tile: LYNX_OK or LYNX_END. All tiles were checked by the first
 * call; whether they cover the layer was not. */
LYNX_API int lynx_plan_read(const uint8_t *payload, size_t size, const lynx_limits *limits, lynx_list *list);
LYNX_API int lynx_plan_next(lynx_list *list, lynx_plan_tile *tile);

/* END: the layer, and how many digests; one for each tile of its plan, in the plan's order. Then the next digest, 16 bytes:
 * xxh3-128 of the tile's exact words, little-endian, [head, token, dim], in canonical (big-endian) form; null where there is
 * none. */
LYNX_API int lynx_end_read(const uint8_t *payload, size_t size, const lynx_limits *limits, lynx_list *list);
LYNX_API int lynx_end_next(lynx_list *list, const uint8_t **digest);

/* --- captures --------------------------------------------------------------------------------------------------- */

enum { LYNX_RECORD_DATA = 0, LYNX_RECORD_OPENED = 1, LYNX_RECORD_CLOSED = 2 };

/* A capture file in memory (mapped, or read). */
typedef struct {
    const uint8_t *data;
    size_t size, at;
    uint64_t start; /* time 0 of the records: nanoseconds since 1970 (UTC) */
} lynx_capture;

typedef struct {
    uint32_t kind, direction, stripe; /* records of other kinds are to be skipped; direction 0: from the client to the server */
    uint32_t length;
    uint64_t time; /* nanoseconds */
    const uint8_t *data;
} lynx_record;

/* Check the file's header. LYNX_ERR_CAPTURE: it is no capture of version 1. */
LYNX_API int lynx_capture_open(const uint8_t *data, size_t size, lynx_capture *capture);

/* The next record: LYNX_OK, LYNX_END, or LYNX_ERR_CAPTURE: the file is damaged, or was cut off, at data + capture->at. */
LYNX_API int lynx_capture_next(lynx_capture *capture, lynx_record *record);

/* All bytes of one direction of a stripe, in order, to be read with lynx_frame_read: from the records up to the end of the file
 * or to where it is damaged. Returns how many there are; copied are those that fit into `room`, none with null. */
LYNX_API uint64_t lynx_capture_stream(const lynx_capture *capture, uint32_t stripe, uint32_t direction, uint8_t *out,
                                      uint64_t room);

#ifdef __cplusplus
}
#endif
#endif
