/* What a decoder has to know of a transfer: the manifest in OPEN, plans and digests. spec/wire-format.md. */
#include "cbor.h"
#include "wire.h"

#include <string.h>

#define MAX_CODECS 256
#define MAX_TABLES 1024
#define MAX_WIDTHS (1u << 22) /* of a codec's table */

/* Reads take the first error and go on, harmlessly. */
typedef struct {
    int error;
} reading;

static void refuse(reading *r, int error) {
    r->error = r->error == LYNX_OK ? error : r->error;
}

static uint64_t integer(reading *r, const cbor_item *item, uint64_t low, uint64_t high) {
    if (item->kind != CBOR_UNSIGNED || item->value < low || item->value > high) {
        refuse(r, LYNX_ERR_PROTOCOL);
        return low;
    }
    return item->value;
}

static uint32_t number(reading *r, const cbor_item *item, uint32_t low, uint32_t high) {
    return (uint32_t)integer(r, item, low, high);
}

static int32_t flag(reading *r, const cbor_item *item) {
    if (item->kind != CBOR_BOOLEAN) {
        refuse(r, LYNX_ERR_PROTOCOL);
    }
    return item->value == 1;
}

/* Of at most `limit` characters. */
static lynx_text text(reading *r, const cbor_item *item, size_t limit) {
    size_t characters = 0;
    if (item->kind != CBOR_TEXT || item->pieces) {
        refuse(r, item->kind == CBOR_TEXT ? LYNX_ERR_UNSUPPORTED : LYNX_ERR_PROTOCOL);
        return (lynx_text){"", 0};
    }
    for (size_t i = 0; i < item->size; i++) {
        characters += (item->data[i] & 0xc0) != 0x80;
    }
    if (characters > limit) {
        refuse(r, LYNX_ERR_PROTOCOL);
    }
    return (lynx_text){(const char *)item->data, (uint32_t)item->size};
}

static lynx_text optional_text(reading *r, const cbor_item *item, size_t limit) {
    return item->kind == CBOR_NONE ? (lynx_text){"", 0} : text(r, item, limit);
}

static void bytes(reading *r, const cbor_item *item, size_t low, size_t high) {
    if (item->kind != CBOR_BYTES || (!item->pieces && (item->size < low || item->size > high))) {
        refuse(r, LYNX_ERR_PROTOCOL);
    } else if (item->pieces) {
        refuse(r, LYNX_ERR_UNSUPPORTED);
    }
}

/* How many entries an array of at most `limit` has. */
static uint32_t entries(reading *r, const cbor_item *item, uint64_t limit) {
    if (item->kind != CBOR_ARRAY) {
        refuse(r, LYNX_ERR_PROTOCOL);
        return 0;
    }
    if (item->value > limit) {
        refuse(r, LYNX_ERR_LIMIT);
        return 0;
    }
    return (uint32_t)item->value;
}

static void fields(reading *r, const cbor_item *map, const char *const *names, int count, cbor_item *found) {
    const int error = lynx_cbor_fields(map, names, count, found);
    if (error != LYNX_OK) {
        refuse(r, error);
        for (int i = 0; i < count; i++) { /* of a map that is none nothing was found */
            found[i] = error == LYNX_ERR_CRITICAL ? found[i] : (cbor_item){.kind = CBOR_NONE};
        }
    }
}

static void pair(reading *r, const cbor_item *item, uint32_t high, uint32_t *first, uint32_t *second) {
    cbor_item both[2] = {{.kind = CBOR_NONE}, {.kind = CBOR_NONE}};
    if (item->kind != CBOR_ARRAY || item->value != 2) {
        refuse(r, LYNX_ERR_PROTOCOL);
    } else {
        cbor_cursor c = lynx_cbor_entries(item);
        both[0] = lynx_cbor_next(&c);
        both[1] = lynx_cbor_next(&c);
    }
    *first = number(r, &both[0], 0, high);
    *second = number(r, &both[1], 0, high);
}

/* The place of a text among names, or -1. */
static int among(const cbor_item *item, const char *const *names, int count) {
    int i = 0;
    while (i < count && !lynx_cbor_is(item, names[i])) {
        i++;
    }
    return i < count ? i : -1;
}

/* --- the manifest ----------------------------------------------------------------------------------------------- */

static const char *const PARTS[] = {"key", "value", "packed-kv", "latent", "opaque"};
static const char *const DTYPES[] = {"bfloat16", "float16", "float32", "float8_e4m3", "float8_e5m2", "uint8"};
static const int WORD_BYTES[] = {2, 2, 4, 1, 1, 1};

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

int lynx_word_bytes(int dtype) {
    return dtype >= 0 && dtype < COUNT(WORD_BYTES) ? WORD_BYTES[dtype] : 0;
}

uint32_t lynx_head_dim(const lynx_layer *layer, int part) {
    if (part < 0 || part >= COUNT(PARTS) || (layer->parts >> part & 1) == 0) {
        return 0;
    }
    return part == LYNX_VALUE       ? layer->value_dim
           : part == LYNX_PACKED_KV ? layer->key_dim + layer->value_dim
                                    : layer->key_dim;
}

static void read_layer(reading *r, const cbor_item *item, lynx_layer *layer) {
    enum { INDEX, KV_HEADS, KEY_DIM, VALUE_DIM, TOKENS, KIND, PARTS_OF, HEAD_START, FIELDS };
    static const char *const NAMES[FIELDS] = {"index", "kv_heads", "key_dim", "value_dim",
                                              "tokens", "kind", "parts", "head_start"};
    cbor_item f[FIELDS];
    fields(r, item, NAMES, FIELDS, f);
    layer->index = number(r, &f[INDEX], 0, 0xffff);
    layer->kv_heads = number(r, &f[KV_HEADS], 1, 0xffff);
    layer->key_dim = number(r, &f[KEY_DIM], 1, 1 << 20);
    layer->value_dim = number(r, &f[VALUE_DIM], 1, 1 << 20);
    pair(r, &f[TOKENS], 0xffffffff, &layer->token_start, &layer->token_stop);
    layer->kind = text(r, &f[KIND], 64);
    layer->head_start = number(r, &f[HEAD_START], 0, 0xffff);
    layer->parts = 0;
    const uint32_t parts = entries(r, &f[PARTS_OF], (uint64_t)COUNT(PARTS));
    cbor_cursor c = lynx_cbor_entries(&f[PARTS_OF]);
    for (uint32_t i = 0; i < parts; i++) {
        const cbor_item name = lynx_cbor_next(&c);
        const int part = among(&name, PARTS, COUNT(PARTS));
        if (part < 0 || (layer->parts >> part & 1) != 0) {
            refuse(r, name.pieces ? LYNX_ERR_UNSUPPORTED : LYNX_ERR_PROTOCOL);
            return;
        }
        layer->parts |= 1u << part;
    }
    if (parts == 0 || layer->token_start >= layer->token_stop || layer->head_start + layer->kv_heads > 0xffff) {
        refuse(r, LYNX_ERR_PROTOCOL);
    }
}

static uint64_t product(uint64_t a, uint64_t b) {
    return a != 0 && b > UINT64_MAX / a ? UINT64_MAX : a * b;
}

static uint64_t sum(uint64_t a, uint64_t b) {
    return b > UINT64_MAX - a ? UINT64_MAX : a + b;
}

static void read_identity(reading *r, const cbor_item *item, lynx_manifest *m) {
    enum { MODEL, REVISION, TOKENIZER, ROPE, PRODUCER, BACKEND, FIELDS };
    static const char *const NAMES[FIELDS] = {"model", "revision", "tokenizer_hash", "rope_hash", "producer",
                                              "attention_backend"};
    cbor_item f[FIELDS];
    fields(r, item, NAMES, FIELDS, f);
    m->model = text(r, &f[MODEL], 1024);
    m->revision = optional_text(r, &f[REVISION], 1024);
    m->tokenizer_hash = optional_text(r, &f[TOKENIZER], 1024);
    m->rope_hash = optional_text(r, &f[ROPE], 1024);
    m->producer = optional_text(r, &f[PRODUCER], 1024);
    m->attention_backend = optional_text(r, &f[BACKEND], 1024);
}

/* Layers, each once, within the prompt; and the bytes of the cache. */
static void check_layers(reading *r, const cbor_item *layers, lynx_manifest *m) {
    uint8_t seen[0x10000 / 8] = {0};
    uint64_t words = 0;
    cbor_cursor c = lynx_cbor_entries(layers);
    for (uint32_t i = 0; i < m->layers && r->error == LYNX_OK; i++) {
        const cbor_item item = lynx_cbor_next(&c);
        lynx_layer layer;
        read_layer(r, &item, &layer);
        if ((seen[layer.index / 8] >> layer.index % 8 & 1) != 0 || layer.token_stop > m->prompt_tokens) {
            refuse(r, LYNX_ERR_PROTOCOL);
        }
        seen[layer.index / 8] |= (uint8_t)(1 << layer.index % 8);
        for (int part = 0; part < COUNT(PARTS); part++) {
            const uint64_t rows = (uint64_t)layer.kv_heads * (layer.token_stop - layer.token_start);
            words = sum(words, product(rows, lynx_head_dim(&layer, part)));
        }
    }
    m->cache_bytes = product(words, (uint64_t)lynx_word_bytes(m->dtype));
}

int lynx_manifest_read(const uint8_t *data, size_t size, const lynx_limits *limits, lynx_manifest *m) {
    enum { IDENTITY, DTYPE, LAYERS, PROMPT, CODECS, LAYOUT, PACKING, REQUEST, SHARD, LOSSY, TABLES, FIELDS };
    static const char *const NAMES[FIELDS] = {"identity", "dtype", "layers", "prompt_tokens", "codecs", "layout",
                                              "packing", "request_id", "shard", "lossy", "tables"};
    cbor_item whole, f[FIELDS];
    reading r = {lynx_cbor_whole(data, size, &whole)};
    *m = (lynx_manifest){.dtype = 0};
    if (r.error != LYNX_OK) {
        return r.error;
    }
    fields(&r, &whole, NAMES, FIELDS, f);
    m->layers = entries(&r, &f[LAYERS], limits->layers);
    m->codecs = entries(&r, &f[CODECS], MAX_CODECS);
    m->tables = entries(&r, &f[TABLES], MAX_TABLES);
    pair(&r, &f[SHARD], 1 << 20, &m->shard_index, &m->shard_count);
    read_identity(&r, &f[IDENTITY], m);
    m->dtype = among(&f[DTYPE], DTYPES, COUNT(DTYPES));
    m->prompt_tokens = number(&r, &f[PROMPT], 1, 0xffffffff);
    m->layout = text(&r, &f[LAYOUT], 64);
    m->packing = text(&r, &f[PACKING], 256);
    m->request_id = text(&r, &f[REQUEST], 1024);
    m->lossy = flag(&r, &f[LOSSY]);
    if (m->dtype < 0) {
        refuse(&r, f[DTYPE].pieces ? LYNX_ERR_UNSUPPORTED : LYNX_ERR_PROTOCOL);
    }
    if (m->layers == 0 || m->shard_index >= m->shard_count) {
        refuse(&r, LYNX_ERR_PROTOCOL);
    }
    cbor_cursor c = lynx_cbor_entries(&f[TABLES]);
    for (uint32_t i = 0; i < m->tables && r.error == LYNX_OK; i++) {
        const cbor_item hash = lynx_cbor_next(&c);
        bytes(&r, &hash, 16, 32);
        if (hash.size != 16 && hash.size != 32) {
            refuse(&r, LYNX_ERR_PROTOCOL);
        }
    }
    c = lynx_cbor_entries(&f[CODECS]);
    for (uint32_t i = 0; i < m->codecs && r.error == LYNX_OK; i++) {
        static const char *const ID[1] = {"id"};
        const cbor_item config = lynx_cbor_next(&c);
        cbor_item id;
        const int error = lynx_cbor_fields(&config, ID, 1, &id); /* unknown keys are the codec's affair */
        if (error != LYNX_OK && error != LYNX_ERR_CRITICAL) {
            refuse(&r, error);
        } else {
            (void)text(&r, &id, SIZE_MAX);
        }
    }
    check_layers(&r, &f[LAYERS], m);
    if (r.error == LYNX_OK && (m->prompt_tokens > limits->tokens || m->cache_bytes > limits->transfer_bytes)) {
        refuse(&r, LYNX_ERR_LIMIT);
    }
    m->layer_data = f[LAYERS].data;
    m->layer_size = f[LAYERS].size;
    m->codec_data = f[CODECS].data;
    m->codec_size = f[CODECS].size;
    m->table_data = f[TABLES].data;
    m->table_size = f[TABLES].size;
    return r.error;
}

int lynx_open_read(const uint8_t *payload, size_t size, const lynx_limits *limits, lynx_manifest *manifest) {
    enum { FETCH, RESUME, MANIFEST, FIELDS };
    static const char *const NAMES[FIELDS] = {"fetch", "resume", "manifest"};
    cbor_item whole, f[FIELDS];
    reading r = {lynx_cbor_whole(payload, size, &whole)};
    if (r.error != LYNX_OK) {
        return r.error;
    }
    fields(&r, &whole, NAMES, FIELDS, f);
    bytes(&r, &f[FETCH], 0, 16);
    if (f[RESUME].kind != CBOR_NONE) {
        bytes(&r, &f[RESUME], 0, 32);
    }
    bytes(&r, &f[MANIFEST], 1, limits->control_bytes);
    if (f[FETCH].size % 16 != 0 || f[RESUME].size % 32 != 0) {
        refuse(&r, LYNX_ERR_PROTOCOL);
    }
    return r.error != LYNX_OK ? r.error : lynx_manifest_read(f[MANIFEST].data, f[MANIFEST].size, limits, manifest);
}

int lynx_manifest_layers(const lynx_manifest *manifest, lynx_layer *layers) {
    reading r = {LYNX_OK};
    cbor_cursor c = {manifest->layer_data, manifest->layer_data + manifest->layer_size};
    for (uint32_t i = 0; i < manifest->layers; i++) {
        const cbor_item item = lynx_cbor_next(&c);
        read_layer(&r, &item, &layers[i]);
    }
    return r.error;
}

/* --- codecs ----------------------------------------------------------------------------------------------------- */

/* Fields of a config: all that it has, and no others. */
static bool config_fields(const cbor_item *map, const char *const *names, int count, cbor_item *found) {
    uint64_t known = 0;
    if (lynx_cbor_fields(map, names, count, found) != LYNX_OK) {
        return false;
    }
    for (int i = 0; i < count; i++) {
        known += found[i].kind != CBOR_NONE;
    }
    return known == map->value;
}

static bool read_zstd(const cbor_item *item, lynx_codec *codec) {
    codec->zstd = (int32_t)item->value;
    return item->kind == CBOR_NONE || (item->kind == CBOR_UNSIGNED && item->value >= 1 && item->value <= 19);
}

static bool read_planes(const cbor_item *item, lynx_codec *codec) {
    static const uint64_t DEFAULT[2] = {9, 7};
    uint64_t total = 0;
    if (item->kind != CBOR_NONE && (item->kind != CBOR_ARRAY || item->value < 1 || item->value > 8)) {
        return false;
    }
    cbor_cursor c = lynx_cbor_entries(item);
    codec->levels = item->kind == CBOR_NONE ? 2 : (int32_t)item->value;
    for (int i = 0; i < codec->levels; i++) {
        const cbor_item count = item->kind == CBOR_NONE ? (cbor_item){.kind = CBOR_UNSIGNED, .value = DEFAULT[i]} : lynx_cbor_next(&c);
        if (count.kind != CBOR_UNSIGNED || count.value < 1 || count.value > 32) {
            return false;
        }
        codec->planes[i] = (uint8_t)count.value;
        total += count.value;
    }
    return total == 8 || total == 16 || total == 32;
}

static bool read_bits(const cbor_item *item, double *bits) {
    if (item->kind != CBOR_NONE) {
        if (item->kind != CBOR_UNSIGNED && item->kind != CBOR_FLOAT) {
            return false;
        }
        *bits = item->kind == CBOR_UNSIGNED ? (double)item->value : item->number;
    }
    return *bits >= 2 && *bits <= 8;
}

static bool is_whole(double bits) {
    return bits == (double)(int)bits;
}

enum { KEYS, VALUES, HASH, TABLE_FIELDS };
static const char *const TABLE_NAMES[TABLE_FIELDS] = {"keys", "values", "hash"};

static bool is_widths(const cbor_item *item) {
    bool good = item->kind == CBOR_TEXT && !item->pieces && item->size > 0;
    for (size_t i = 0; good && i < item->size; i++) {
        good = item->data[i] >= '0' && item->data[i] <= '8';
    }
    return good;
}

/* For each layer the widths of its heads' keys, each of as many channels, and a text of as many values. */
static bool is_table(const cbor_item *map) {
    cbor_item f[TABLE_FIELDS];
    uint64_t total = 0;
    if (map->kind != CBOR_MAP || !config_fields(map, TABLE_NAMES, TABLE_FIELDS, f) || f[KEYS].kind != CBOR_ARRAY ||
        f[VALUES].kind != CBOR_ARRAY || f[KEYS].value != f[VALUES].value || f[KEYS].value == 0 ||
        (f[HASH].kind != CBOR_NONE && f[HASH].kind != CBOR_TEXT)) {
        return false;
    }
    cbor_cursor keys = lynx_cbor_entries(&f[KEYS]), values = lynx_cbor_entries(&f[VALUES]);
    for (uint64_t layer = 0; layer < f[KEYS].value; layer++) {
        const cbor_item heads = lynx_cbor_next(&keys), row = lynx_cbor_next(&values);
        if (heads.kind != CBOR_ARRAY || !is_widths(&row) || heads.value != row.size) {
            return false;
        }
        cbor_cursor c = lynx_cbor_entries(&heads);
        size_t channels = 0;
        for (uint64_t head = 0; head < heads.value; head++) {
            const cbor_item widths = lynx_cbor_next(&c);
            if (!is_widths(&widths) || (head > 0 && widths.size != channels)) {
                return false;
            }
            channels = widths.size;
            total += channels;
        }
    }
    return total <= MAX_WIDTHS;
}

static bool read_hq(const cbor_item *config, lynx_codec *codec) {
    enum { ID, KEY_BITS, VALUE_BITS, LEVELS, WIDTHS, FOLD, SCALING, FIELDS };
    static const char *const NAMES[FIELDS] = {"id", "key_bits", "value_bits", "levels", "widths", "fold", "scaling"};
    static const char *const KINDS[] = {"uniform", "ranges"};
    cbor_item f[FIELDS];
    codec->key_bits = codec->value_bits = 4;
    if (!config_fields(config, NAMES, FIELDS, f) || !read_bits(&f[KEY_BITS], &codec->key_bits) ||
        !read_bits(&f[VALUE_BITS], &codec->value_bits)) {
        return false;
    }
    for (int i = FOLD; i <= SCALING; i++) {
        if (f[i].kind != CBOR_NONE && f[i].kind != CBOR_BOOLEAN) {
            return false;
        }
    }
    codec->fold = f[FOLD].value == 1;
    codec->scaling = f[SCALING].value == 1;
    if (f[LEVELS].kind != CBOR_NONE && (f[LEVELS].kind != CBOR_UNSIGNED || f[LEVELS].value < 1 || f[LEVELS].value > 3)) {
        return false;
    }
    codec->levels = f[LEVELS].kind == CBOR_NONE ? 3 : (int32_t)f[LEVELS].value;
    codec->widths = f[WIDTHS].kind == CBOR_NONE  ? LYNX_WIDTHS_UNIFORM
                    : f[WIDTHS].kind == CBOR_MAP ? LYNX_WIDTHS_TABLE
                                                 : among(&f[WIDTHS], KINDS, COUNT(KINDS));
    if (codec->levels == 3 && codec->key_bits >= 8 && codec->value_bits >= 8) {
        return false;
    }
    if (codec->widths == LYNX_WIDTHS_TABLE) {
        codec->table = f[WIDTHS].data;
        codec->table_size = f[WIDTHS].size;
        return is_table(&f[WIDTHS]);
    }
    return is_whole(codec->value_bits) && ((codec->widths == LYNX_WIDTHS_UNIFORM && is_whole(codec->key_bits)) ||
                                           (codec->widths == LYNX_WIDTHS_RANGES && codec->key_bits <= 7));
}

int lynx_manifest_codec(const lynx_manifest *manifest, uint32_t wanted, lynx_codec *codec) {
    static const char *const ID[1] = {"id"}, *const RAW[2] = {"id", "zstd"}, *const BITPLANE[3] = {"id", "zstd", "planes"};
    cbor_item config, f[3];
    *codec = (lynx_codec){.id = 0};
    if (wanted >= manifest->codecs) {
        return LYNX_ERR_ARGUMENT;
    }
    cbor_cursor c = {manifest->codec_data, manifest->codec_data + manifest->codec_size};
    for (uint32_t i = 0; i <= wanted; i++) {
        config = lynx_cbor_next(&c);
    }
    bool good = false;
    (void)lynx_cbor_fields(&config, ID, 1, f);
    if (lynx_cbor_is(&f[0], "raw")) {
        codec->id = LYNX_CODEC_RAW;
        codec->levels = 1;
        good = config_fields(&config, RAW, 2, f) && read_zstd(&f[1], codec);
    } else if (lynx_cbor_is(&f[0], "bitplane")) {
        codec->id = LYNX_CODEC_BITPLANE;
        good = config_fields(&config, BITPLANE, 3, f) && read_zstd(&f[1], codec) && read_planes(&f[2], codec);
    } else if (lynx_cbor_is(&f[0], "hq")) {
        codec->id = LYNX_CODEC_HQ;
        good = read_hq(&config, codec);
    }
    return good ? LYNX_OK : LYNX_ERR_UNSUPPORTED;
}

/* Widths of a tile out of a table. */
static bool look_up(const lynx_codec *codec, int part, uint32_t layer, uint32_t head_start, uint32_t heads, uint32_t head_dim,
                    uint8_t *widths) {
    const cbor_item map = {.kind = CBOR_MAP, .data = codec->table, .size = codec->table_size};
    cbor_item f[TABLE_FIELDS];
    (void)lynx_cbor_fields(&map, TABLE_NAMES, TABLE_FIELDS, f);
    if (layer >= f[KEYS].value) {
        return false;
    }
    cbor_cursor keys = lynx_cbor_entries(&f[KEYS]), values = lynx_cbor_entries(&f[VALUES]);
    cbor_item rows = lynx_cbor_next(&keys), row = lynx_cbor_next(&values);
    for (uint32_t i = 0; i < layer; i++) {
        rows = lynx_cbor_next(&keys);
        row = lynx_cbor_next(&values);
    }
    if ((uint64_t)head_start + heads > row.size) {
        return false;
    }
    cbor_cursor c = lynx_cbor_entries(&rows);
    for (uint32_t head = 0; head < head_start + heads; head++) {
        const cbor_item of_head = lynx_cbor_next(&c);
        if (head < head_start) {
            continue;
        }
        if (part == LYNX_VALUE) {
            memset(widths, row.data[head] - '0', head_dim);
            widths += head_dim;
            continue;
        }
        if (of_head.size != head_dim) {
            return false;
        }
        for (uint32_t i = 0; i < head_dim; i++) {
            *widths++ = (uint8_t)(of_head.data[i] - '0');
        }
    }
    return true;
}

int lynx_codec_tile(const lynx_codec *codec, int dtype, int part, uint32_t layer, uint32_t head_start, uint32_t heads,
                    uint32_t tokens, uint32_t head_dim, uint8_t *widths, lynx_hq_config *config) {
    if (codec->id != LYNX_CODEC_HQ || (dtype != LYNX_BFLOAT16 && dtype != LYNX_FLOAT16) ||
        (part != LYNX_KEY && part != LYNX_VALUE)) {
        return LYNX_ERR_UNSUPPORTED;
    }
    const uint64_t channels = (uint64_t)heads * head_dim;
    *config = (lynx_hq_config){.dtype = dtype,
                               .part = part,
                               .heads = heads,
                               .tokens = tokens,
                               .head_dim = head_dim,
                               .levels = codec->levels,
                               .fold = codec->fold,
                               .scaling = codec->scaling,
                               .widths = widths,
                               .range_bits = (uint64_t)(codec->key_bits * (double)heads * (double)head_dim)};
    if (codec->widths == LYNX_WIDTHS_TABLE) {
        return look_up(codec, part, layer, head_start, heads, head_dim, widths) ? LYNX_OK : LYNX_ERR_UNSUPPORTED;
    }
    if (codec->widths == LYNX_WIDTHS_RANGES && part == LYNX_KEY) {
        config->widths = NULL;
    } else {
        memset(widths, (int)(part == LYNX_KEY ? codec->key_bits : codec->value_bits), (size_t)channels);
    }
    return LYNX_OK;
}

/* --- plans and digests ------------------------------------------------------------------------------------------ */

static void read_tile(reading *r, const cbor_item *item, lynx_plan_tile *tile) {
    cbor_item f[7] = {{.kind = CBOR_NONE}};
    if (item->kind != CBOR_ARRAY || item->value < 6 || item->value > 7) {
        refuse(r, LYNX_ERR_PROTOCOL);
    }
    cbor_cursor c = lynx_cbor_entries(item);
    for (uint64_t i = 0; i < item->value && r->error == LYNX_OK; i++) {
        f[i] = lynx_cbor_next(&c);
    }
    *tile = (lynx_plan_tile){.part = number(r, &f[0], 0, (uint32_t)COUNT(PARTS) - 1),
                             .head_start = number(r, &f[1], 0, 0xffff),
                             .heads = number(r, &f[2], 1, 0xffff),
                             .token_start = number(r, &f[3], 0, 0xffffffff),
                             .token_stop = number(r, &f[4], 0, 0xffffffff),
                             .codec = number(r, &f[5], 0, 0xffff)};
    if (tile->token_start >= tile->token_stop) {
        refuse(r, LYNX_ERR_PROTOCOL);
        return;
    }
    tile->tokens = tile->token_stop - tile->token_start;
    if (item->value == 7) {
        bytes(r, &f[6], 1, SIZE_MAX);
        if (r->error == LYNX_OK && !lynx_bitmap_is_good(f[6].data, f[6].size, tile->tokens, &tile->tokens)) {
            refuse(r, LYNX_ERR_PROTOCOL);
        }
        tile->bitmap = f[6].data;
    }
}

/* A map of a layer, an array of at most limits->tiles, and perhaps more; the array as a list. */
static reading read_list(const uint8_t *payload, size_t size, const lynx_limits *limits, const char *const *names, int count,
                         lynx_list *list, cbor_item *f) {
    cbor_item whole;
    reading r = {lynx_cbor_whole(payload, size, &whole)};
    *list = (lynx_list){0};
    if (r.error == LYNX_OK) {
        fields(&r, &whole, names, count, f);
        list->layer = number(&r, &f[0], 0, 0xffff);
        list->count = entries(&r, &f[1], limits->tiles);
        const cbor_cursor c = lynx_cbor_entries(&f[1]);
        list->at = c.at;
        list->end = c.end;
    }
    return r;
}

int lynx_plan_read(const uint8_t *payload, size_t size, const lynx_limits *limits, lynx_list *list) {
    static const char *const NAMES[3] = {"layer", "tiles", "levels"};
    cbor_item f[3];
    reading r = read_list(payload, size, limits, NAMES, 3, list, f);
    if (r.error != LYNX_OK) {
        return r.error;
    }
    bytes(&r, &f[2], list->count, list->count);
    list->levels = f[2].data;
    cbor_cursor c = lynx_cbor_entries(&f[1]);
    for (uint32_t i = 0; i < list->count && r.error == LYNX_OK; i++) {
        const cbor_item item = lynx_cbor_next(&c);
        lynx_plan_tile tile;
        read_tile(&r, &item, &tile);
        if (list->levels[i] < 1 || list->levels[i] > 8) {
            refuse(&r, LYNX_ERR_PROTOCOL);
        }
    }
    return r.error;
}

int lynx_plan_next(lynx_list *list, lynx_plan_tile *tile) {
    cbor_cursor c = {list->at, list->end};
    const cbor_item item = lynx_cbor_next(&c);
    if (item.kind == CBOR_NONE) {
        return LYNX_END;
    }
    reading r = {LYNX_OK};
    read_tile(&r, &item, tile);
    tile->levels = *list->levels++;
    list->at = c.at;
    return r.error;
}

int lynx_end_read(const uint8_t *payload, size_t size, const lynx_limits *limits, lynx_list *list) {
    static const char *const NAMES[2] = {"layer", "digests"};
    cbor_item f[2];
    reading r = read_list(payload, size, limits, NAMES, 2, list, f);
    if (r.error != LYNX_OK) {
        return r.error;
    }
    cbor_cursor c = lynx_cbor_entries(&f[1]);
    for (uint32_t i = 0; i < list->count && r.error == LYNX_OK; i++) {
        const cbor_item digest = lynx_cbor_next(&c);
        bytes(&r, &digest, 0, 16);
        if (digest.size % 16 != 0) {
            refuse(&r, LYNX_ERR_PROTOCOL);
        }
    }
    return r.error;
}

int lynx_end_next(lynx_list *list, const uint8_t **digest) {
    cbor_cursor c = {list->at, list->end};
    const cbor_item item = lynx_cbor_next(&c);
    if (item.kind == CBOR_NONE) {
        return LYNX_END;
    }
    *digest = item.size == 16 ? item.data : NULL;
    list->at = c.at;
    return LYNX_OK;
}
