/* Decodes the chunks in a capture into a paged cache of its own, level by level, and checks the digests of the exact words.
 *
 *     decode CAPTURE [--page-tokens N] [--layout nhd|hnd] [--benchmark ROUNDS]
 *
 * It stands for an engine in C: its cache has pages [page, page_tokens, heads, head_dim] (NHD) or [page, heads, page_tokens,
 * head_dim] (HND), for K and for V of each layer, and a block table for each layer. No word passes through a buffer on its way
 * from a payload into a page. Sockets, credit and resume are the business of whoever writes the capture. */
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <lynxproto_wire.h>
#include <xxhash.h>

#define MAX_LEVELS 8
#define MAX_STRIPES 256
#define MAX_CACHE (16ull << 30) /* bytes: a capture may say anything */

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("decode: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count > 0 ? count : 1, size);
    if (memory == NULL) {
        die("out of memory (%zu times %zu bytes)", count, size);
    }
    return memory;
}

static void require(int code, const char *what) {
    if (code != LYNX_OK) {
        die("%s: %s", what, lynx_strerror(code));
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- the engine's cache ------------------------------------------------------------------------------------------ */

typedef struct {
    lynx_layer shape;
    uint8_t *parts[5];  /* pages of each part */
    int64_t *table;     /* which page holds tokens 0.., page_tokens.. of the layer */
} cache_layer;

typedef struct {
    bool heads_first; /* HND */
    uint32_t page_tokens;
    int dtype;
    uint32_t count;
    cache_layer *layers;
} cache;

/* Pages in an order that has nothing to do with that of the tokens, as in an engine that has run for a while. */
static void make_layer(const cache *c, cache_layer *layer) {
    const uint32_t tokens = layer->shape.token_stop - layer->shape.token_start;
    const uint32_t pages = (tokens + c->page_tokens - 1) / c->page_tokens;
    layer->table = allocate(pages, sizeof *layer->table);
    for (uint32_t i = 0; i < pages; i++) {
        layer->table[i] = i;
    }
    uint32_t random = 1;
    for (uint32_t i = pages; i > 1; i--) {
        random = random * 1664525 + 1013904223;
        const uint32_t j = (uint32_t)((uint64_t)random * i >> 32);
        const int64_t other = layer->table[j];
        layer->table[j] = layer->table[i - 1];
        layer->table[i - 1] = other;
    }
    for (int part = 0; part < 5; part++) {
        const size_t row = (size_t)layer->shape.kv_heads * lynx_head_dim(&layer->shape, part) * (size_t)lynx_word_bytes(c->dtype);
        layer->parts[part] = row == 0 ? NULL : allocate((size_t)pages * c->page_tokens, row);
    }
}

/* --- what the capture holds -------------------------------------------------------------------------------------- */

typedef struct {
    lynx_plan_tile tile;
    cache_layer *layer;
    int64_t *slots; /* of an explicit token set: where each token is, in rows of head_dim words */
    const lynx_codec *codec;
    uint8_t *widths;
    lynx_hq_config config; /* of hq */
    const uint8_t *payloads[MAX_LEVELS], *digest;
    uint64_t sizes[MAX_LEVELS];
    uint8_t attempts[MAX_LEVELS];
} tile;

typedef struct {
    tile *tiles;
    size_t count;
    lynx_manifest manifest;
    lynx_codec *codecs;
    uint8_t transfer[16];
    uint64_t lost;      /* damaged payloads */
} transfer;

static cache_layer *find_layer(const cache *c, uint32_t index) {
    for (uint32_t i = 0; i < c->count; i++) {
        if (c->layers[i].shape.index == index) {
            return &c->layers[i];
        }
    }
    return NULL;
}

/* Whether this is the tile that the chunk belongs to: that of the same heads, tokens, part and layer. */
static bool holds(const tile *t, const lynx_frame *f) {
    const lynx_plan_tile *p = &t->tile;
    const size_t bitmap = ((size_t)p->token_stop - p->token_start + 7) / 8;
    return t->layer->shape.index == f->layer && p->part == f->part && p->head_start == f->head_start &&
           p->heads == f->heads && p->token_start == f->token_start && p->token_stop == f->token_stop &&
           p->codec == f->codec && (p->bitmap == NULL) == (f->bitmap == NULL) &&
           (p->bitmap == NULL || memcmp(p->bitmap, f->bitmap, bitmap) == 0);
}

/* Where the rows of an explicit token set are: as pages of one token, counted in rows of head_dim words. */
static int64_t *slots_of(const cache *c, const cache_layer *layer, const lynx_plan_tile *p) {
    int64_t *slots = allocate(p->tokens, sizeof *slots);
    for (uint32_t i = 0, found = 0; i < p->token_stop - p->token_start; i++) {
        if (p->bitmap[i / 8] >> i % 8 & 1) {
            const uint32_t token = p->token_start + i - layer->shape.token_start, inside = token % c->page_tokens;
            const int64_t page = layer->table[token / c->page_tokens] * layer->shape.kv_heads * c->page_tokens;
            slots[found++] = page + (int64_t)inside * (c->heads_first ? 1 : layer->shape.kv_heads);
        }
    }
    return slots;
}

static void add_tile(const cache *c, transfer *t, cache_layer *layer, const lynx_plan_tile *planned) {
    const lynx_layer *shape = &layer->shape;
    const uint32_t dim = lynx_head_dim(shape, (int)planned->part);
    if (dim == 0 || planned->head_start < shape->head_start ||
        planned->head_start + planned->heads > shape->head_start + shape->kv_heads ||
        planned->token_start < shape->token_start || planned->token_stop > shape->token_stop ||
        planned->codec >= t->manifest.codecs) {
        die("a plan has a tile that its layer %u lacks", (unsigned)shape->index);
    }
    if ((t->count & (t->count - 1)) == 0) { /* grows at powers of two */
        t->tiles = realloc(t->tiles, (t->count == 0 ? 1 : 2 * t->count) * sizeof *t->tiles);
        if (t->tiles == NULL) {
            die("out of memory");
        }
    }
    tile *new = &t->tiles[t->count++];
    *new = (tile){.tile = *planned, .layer = layer, .codec = &t->codecs[planned->codec]};
    if (new->codec->levels != (int)planned->levels || new->codec->levels > MAX_LEVELS) {
        die("a plan gives a tile %u levels, its codec has %d", (unsigned)planned->levels, new->codec->levels);
    }
    if (new->codec->zstd != 0) {
        die("a tile is compressed with Zstandard, which this example leaves to libzstd");
    }
    if (new->codec->id == LYNX_CODEC_HQ) {
        lynx_hq_bounds bounds;
        new->widths = allocate((size_t)planned->heads * dim, 1);
        require(lynx_codec_tile(new->codec, c->dtype, (int)planned->part, shape->index, planned->head_start, planned->heads,
                                planned->tokens, dim, new->widths, &new->config), "hq's config of a tile");
        require(lynx_hq_measure(&new->config, &bounds), "a tile for hq");
    }
    if (planned->bitmap != NULL) {
        new->slots = slots_of(c, layer, planned);
    }
}

static void open_transfer(cache *c, transfer *t, const lynx_frame *f, const lynx_limits *limits) {
    require(lynx_open_read(f->payload, f->payload_length, limits, &t->manifest), "the manifest");
    memcpy(t->transfer, f->transfer, sizeof t->transfer);
    c->dtype = t->manifest.dtype;
    c->count = t->manifest.layers;
    lynx_layer *layers = allocate(c->count, sizeof *layers);
    c->layers = allocate(c->count, sizeof *c->layers);
    t->codecs = allocate(t->manifest.codecs, sizeof *t->codecs);
    require(lynx_manifest_layers(&t->manifest, layers), "the manifest's layers");
    for (uint32_t i = 0; i < c->count; i++) {
        c->layers[i].shape = layers[i];
        make_layer(c, &c->layers[i]);
    }
    for (uint32_t i = 0; i < t->manifest.codecs; i++) {
        require(lynx_manifest_codec(&t->manifest, i, &t->codecs[i]), "a codec's config");
    }
    free(layers);
    printf("model %.*s, %u layers, %llu bytes of cache\n", (int)t->manifest.model.size, t->manifest.model.text,
           (unsigned)c->count, (unsigned long long)t->manifest.cache_bytes);
}

static void take_plan(const cache *c, transfer *t, const lynx_frame *f, const lynx_limits *limits) {
    lynx_list list;
    lynx_plan_tile planned;
    require(lynx_plan_read(f->payload, f->payload_length, limits, &list), "a plan");
    cache_layer *layer = find_layer(c, list.layer);
    if (layer == NULL) {
        die("a plan is of layer %u, which the manifest lacks", (unsigned)list.layer);
    }
    for (size_t i = 0; i < t->count; i++) {
        if (t->tiles[i].layer == layer) {
            return; /* said again */
        }
    }
    while (lynx_plan_next(&list, &planned) == LYNX_OK) {
        add_tile(c, t, layer, &planned);
    }
}

/* Digests are in the order of the layer's plan, which is that of its tiles here. */
static void take_digests(const cache *c, transfer *t, const lynx_frame *f, const lynx_limits *limits) {
    lynx_list list;
    require(lynx_end_read(f->payload, f->payload_length, limits, &list), "digests");
    const cache_layer *layer = find_layer(c, list.layer);
    for (size_t i = 0; i < t->count; i++) {
        if (t->tiles[i].layer == layer && lynx_end_next(&list, &t->tiles[i].digest) != LYNX_OK) {
            die("layer %u has fewer digests than tiles", (unsigned)list.layer);
        }
    }
}

static void take_chunk(transfer *t, const lynx_frame *f) {
    for (size_t i = 0; i < t->count; i++) {
        tile *to = &t->tiles[i];
        if (holds(to, f)) {
            if (f->level < to->codec->levels && (to->payloads[f->level] == NULL || f->attempt > to->attempts[f->level])) {
                to->payloads[f->level] = f->payload; /* of a tile that is sent again whole the last attempt counts */
                to->sizes[f->level] = f->payload_length;
                to->attempts[f->level] = f->attempt;
            }
            return;
        }
    }
    die("a chunk belongs to no tile of the plans");
}

/* Frames of one byte stream, of the first transfer that the capture holds. `wanted`: their type. */
static void walk(const uint8_t *data, uint64_t size, uint16_t wanted, cache *c, transfer *t) {
    static const uint8_t none[16];
    lynx_limits limits;
    lynx_default_limits(&limits);
    limits.transfer_bytes = MAX_CACHE;
    while (size > 0) {
        lynx_frame f;
        const int code = lynx_frame_read(data, (size_t)size, &limits, &f);
        if (code == LYNX_MORE) {
            return; /* the capture was cut off inside a frame */
        }
        if (code == LYNX_ERR_CRC) {
            t->lost += f.type == wanted;
        } else if (code != LYNX_OK) {
            die("a frame: %s", lynx_strerror(code));
        } else if (f.type == wanted) {
            const bool ours = memcmp(f.transfer, t->transfer, sizeof f.transfer) == 0;
            if (wanted == LYNX_FRAME_OPEN && memcmp(t->transfer, none, sizeof none) == 0) {
                open_transfer(c, t, &f, &limits);
            } else if (ours && wanted == LYNX_FRAME_PLAN) {
                take_plan(c, t, &f, &limits);
            } else if (ours && wanted == LYNX_FRAME_END) {
                take_digests(c, t, &f, &limits);
            } else if (ours && wanted == LYNX_FRAME_DATA) {
                take_chunk(t, &f);
            }
        }
        data += f.size;
        size -= f.size;
    }
}

/* --- decoding ---------------------------------------------------------------------------------------------------- */

static void *scratch, *plan; /* of the one thread */
static uint64_t plan_size;

static lynx_view view_of(const cache *c, const tile *t, int word_bytes) {
    const lynx_plan_tile *p = &t->tile;
    const lynx_layer *shape = &t->layer->shape;
    const ptrdiff_t dim = (ptrdiff_t)lynx_head_dim(shape, (int)p->part), heads = (ptrdiff_t)shape->kv_heads;
    const ptrdiff_t page = (ptrdiff_t)c->page_tokens;
    const uint32_t token = p->token_start - shape->token_start;
    lynx_view view = {.head_stride = c->heads_first ? page * dim : dim,
                      .token_stride = c->heads_first ? dim : heads * dim,
                      .pages = t->layer->table + token / c->page_tokens,
                      .page_stride = heads * page * dim,
                      .page_tokens = c->page_tokens,
                      .first_token = token % c->page_tokens};
    if (t->slots != NULL) {
        view.pages = t->slots;
        view.page_stride = dim;
        view.page_tokens = 1;
        view.first_token = 0;
    }
    view.words = t->layer->parts[p->part] + (ptrdiff_t)(p->head_start - shape->head_start) * view.head_stride * word_bytes;
    return view;
}

static int decode_hq(const tile *t, const lynx_view *view, int levels, lynx_hq_fault *fault) {
    lynx_hq_bounds bounds;
    require(lynx_hq_measure(&t->config, &bounds), "a tile for hq");
    if (bounds.plan > plan_size) {
        free(plan);
        plan_size = bounds.plan;
        plan = allocate((size_t)plan_size, 1);
    }
    const int code = lynx_hq_decode_tile(&t->config, t->payloads, t->sizes, levels, view, plan, scratch, fault);
    if (code == LYNX_STORED) {
        return lynx_view_scatter(view, 2, t->config.heads, t->config.tokens, t->config.head_dim, t->payloads[0] + 8);
    }
    return code;
}

static int decode_bitplane(const tile *t, const lynx_view *view, int word_bytes, uint32_t dim, int levels) {
    const uint8_t *planes[32] = {NULL};
    const uint64_t plane = ((uint64_t)t->tile.heads * t->tile.tokens * dim + 7) / 8;
    int at = 0;
    for (int level = 0; level < levels; level++) {
        const uint8_t *payload = t->payloads[level];
        const int count = t->codec->planes[level];
        if (t->sizes[level] != 4 + (uint64_t)count * plane || payload[0] != level || payload[1] != count || payload[2] != 0 ||
            payload[3] != 0 || at + count > 8 * word_bytes) {
            return LYNX_ERR_HEADER;
        }
        for (int i = 0; i < count; i++) {
            planes[at++] = payload + 4 + (uint64_t)i * plane;
        }
    }
    return lynx_bitplane_unpack(planes, view, word_bytes, t->tile.heads, t->tile.tokens, dim);
}

/* The tile's words, as good as `levels` levels make them, into its pages. */
static void decode_tile(const cache *c, const tile *t, int levels) {
    const int word_bytes = lynx_word_bytes(c->dtype);
    const uint32_t dim = lynx_head_dim(&t->layer->shape, (int)t->tile.part), tokens = t->tile.tokens, heads = t->tile.heads;
    const lynx_view view = view_of(c, t, word_bytes);
    lynx_hq_fault fault = {.level = 0};
    int code;
    if (t->codec->id == LYNX_CODEC_HQ) {
        code = decode_hq(t, &view, levels, &fault);
    } else if (t->codec->id == LYNX_CODEC_BITPLANE) {
        code = decode_bitplane(t, &view, word_bytes, dim, levels);
    } else { /* raw: the words */
        const uint64_t size = (uint64_t)heads * tokens * dim * (uint64_t)word_bytes;
        code = t->sizes[0] != size ? LYNX_ERR_TRUNCATED : lynx_view_scatter(&view, word_bytes, heads, tokens, dim, t->payloads[0]);
    }
    if (code != LYNX_OK) {
        die("layer %u: level %d, byte %llu: %s", (unsigned)t->layer->shape.index, (int)fault.level,
            (unsigned long long)fault.offset, lynx_strerror(code));
    }
}

static uint64_t bytes_of(const cache *c, const tile *t) {
    return (uint64_t)t->tile.heads * t->tile.tokens * lynx_head_dim(&t->layer->shape, (int)t->tile.part) *
           (uint64_t)lynx_word_bytes(c->dtype);
}

static int levels_there(const tile *t) {
    int count = 0;
    while (count < t->codec->levels && t->payloads[count] != NULL) {
        count++;
    }
    return count;
}

/* Whether the words in the pages are those that the sender had. */
static bool is_exact(const cache *c, const tile *t) {
    const int word_bytes = lynx_word_bytes(c->dtype);
    const lynx_view view = view_of(c, t, word_bytes);
    uint8_t *words = allocate((size_t)bytes_of(c, t), 1);
    XXH128_canonical_t digest;
    require(lynx_view_gather(&view, word_bytes, t->tile.heads, t->tile.tokens,
                             lynx_head_dim(&t->layer->shape, (int)t->tile.part), words), "words for a digest");
    XXH128_canonicalFromHash(&digest, XXH3_128bits(words, (size_t)bytes_of(c, t)));
    free(words);
    return memcmp(digest.digest, t->digest, sizeof digest.digest) == 0;
}

/* All tiles at a level, or their last if they have fewer; seconds. */
static double decode_level(const cache *c, const transfer *t, int level) {
    const double began = now();
    for (size_t i = 0; i < t->count; i++) {
        const int there = levels_there(&t->tiles[i]);
        if (there > 0) {
            decode_tile(c, &t->tiles[i], level < there ? level + 1 : there);
        }
    }
    return now() - began;
}

/* Anchors first, then what refines them, and in the end whether the words are exact. */
static int decode_all(const cache *c, const transfer *t) {
    uint64_t total = 0, payload = 0;
    size_t verified = 0, wrong = 0, open = 0;
    int levels = 1;
    for (size_t i = 0; i < t->count; i++) {
        total += bytes_of(c, &t->tiles[i]);
        levels = t->tiles[i].codec->levels > levels ? t->tiles[i].codec->levels : levels;
    }
    for (int level = 0; level < levels; level++) {
        for (size_t i = 0; i < t->count; i++) {
            payload += t->tiles[i].payloads[level] != NULL ? t->tiles[i].sizes[level] : 0;
        }
        const double seconds = decode_level(c, t, level);
        printf("level %d: %zu tiles from %llu bytes, %.2f GB/s\n", level, t->count, (unsigned long long)payload,
               (double)total / seconds / 1e9);
    }
    for (size_t i = 0; i < t->count; i++) {
        const tile *one = &t->tiles[i];
        if (levels_there(one) < one->codec->levels || one->digest == NULL) {
            open++;
        } else if (is_exact(c, one)) {
            verified++;
        } else {
            wrong++;
        }
    }
    printf("tiles: %zu exact, %zu wrong, %zu not complete; %llu damaged payloads\n", verified, wrong, open,
           (unsigned long long)t->lost);
    return wrong == 0 && open == 0 && verified > 0 ? 0 : 1;
}

static void benchmark(const cache *c, const transfer *t, int rounds) {
    uint64_t total = 0;
    for (size_t i = 0; i < t->count; i++) {
        total += bytes_of(c, &t->tiles[i]);
    }
    for (int round = 0; round < rounds; round++) {
        const double anchor = decode_level(c, t, 0), exact = decode_level(c, t, MAX_LEVELS - 1);
        printf("round %d: anchor %.3f GB/s, exact %.3f GB/s\n", round, (double)total / anchor / 1e9, (double)total / exact / 1e9);
    }
}

/* --- the program ------------------------------------------------------------------------------------------------- */

static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
        die("cannot read %s: %s", path, strerror(errno));
    }
    const long end = ftell(file);
    rewind(file);
    *size = end < 0 ? 0 : (size_t)end;
    uint8_t *data = allocate(*size, 1);
    if (fread(data, 1, *size, file) != *size) {
        die("cannot read %s", path);
    }
    fclose(file);
    return data;
}

static uint32_t count_stripes(lynx_capture capture) {
    lynx_record record;
    uint32_t count = 0;
    int code;
    while ((code = lynx_capture_next(&capture, &record)) == LYNX_OK) {
        if (record.stripe >= MAX_STRIPES) {
            die("stripe %u; this example reads %d", (unsigned)record.stripe, MAX_STRIPES);
        }
        count = record.stripe >= count ? record.stripe + 1 : count;
    }
    if (code != LYNX_END) {
        fprintf(stderr, "decode: the capture is damaged or was cut off at byte %zu\n", capture.at);
    }
    return count;
}

int main(int argc, char **argv) {
    const char *path = NULL;
    int rounds = 0;
    cache c = {.page_tokens = 16};
    transfer t = {.tiles = NULL};
    for (int i = 1; i < argc; i++) {
        const bool more = i + 1 < argc;
        if (strcmp(argv[i], "--page-tokens") == 0 && more) {
            c.page_tokens = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--layout") == 0 && more) {
            c.heads_first = strcmp(argv[++i], "hnd") == 0;
        } else if (strcmp(argv[i], "--benchmark") == 0 && more) {
            rounds = atoi(argv[++i]);
        } else if (argv[i][0] != '-' && path == NULL) {
            path = argv[i];
        } else {
            path = NULL;
            break;
        }
    }
    if (path == NULL || c.page_tokens == 0 || c.page_tokens > 1 << 20) {
        fputs("usage: decode CAPTURE [--page-tokens N] [--layout nhd|hnd] [--benchmark ROUNDS]\n", stderr);
        return 2;
    }
    if (lynx_abi_version() != LYNX_ABI_VERSION) {
        die("compiled for ABI %d of liblynxproto, running with %d", LYNX_ABI_VERSION, lynx_abi_version());
    }
    size_t size;
    lynx_capture capture;
    uint8_t *data = read_file(path, &size);
    require(lynx_capture_open(data, size, &capture), path);
    const uint32_t streams = 2 * count_stripes(capture); /* two directions */
    uint8_t **stream = allocate(streams, sizeof *stream);
    uint64_t *sizes = allocate(streams, sizeof *sizes);
    for (uint32_t i = 0; i < streams; i++) {
        sizes[i] = lynx_capture_stream(&capture, i / 2, i % 2, NULL, 0);
        stream[i] = allocate((size_t)sizes[i], 1);
        lynx_capture_stream(&capture, i / 2, i % 2, stream[i], sizes[i]);
    }
    free(data);
    scratch = allocate(lynx_hq_scratch_size(), 1);
    /* In a session frames come in any order; this program knows all of them, and takes them in the order that suits it. */
    const uint16_t order[] = {LYNX_FRAME_OPEN, LYNX_FRAME_PLAN, LYNX_FRAME_END, LYNX_FRAME_DATA};
    for (int step = 0; step < 4; step++) {
        for (uint32_t i = 0; i < streams; i++) {
            walk(stream[i], sizes[i], order[step], &c, &t);
        }
    }
    if (t.count == 0) {
        die("%s holds no transfer with a plan", path);
    }
    const int outcome = decode_all(&c, &t);
    benchmark(&c, &t, rounds);
    for (uint32_t i = 0; i < c.count; i++) {
        for (int part = 0; part < 5; part++) {
            free(c.layers[i].parts[part]);
        }
        free(c.layers[i].table);
    }
    for (size_t i = 0; i < t.count; i++) {
        free(t.tiles[i].widths);
        free(t.tiles[i].slots);
    }
    for (uint32_t i = 0; i < streams; i++) {
        free(stream[i]);
    }
    free(c.layers);
    free(t.tiles);
    free(t.codecs);
    free(stream);
    free(sizes);
    free(scratch);
    free(plan);
    return outcome;
}
