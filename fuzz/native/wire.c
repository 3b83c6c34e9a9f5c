/* Frames, captures, manifests, codec configs, plans and digests out of any bytes, each in memory of exactly its size: nothing beyond
 * it is read, and what was accepted can be used. */
#include "common.h"
#include "lynxproto_wire.h"

static volatile uint32_t sink;

/* Reads every byte of a text, which has to lie in the input. */
static void use_text(lynx_text t) {
    for (uint32_t i = 0; i < t.size; i++) {
        sink += (uint8_t)t.text[i];
    }
}

static void use_codec(const lynx_manifest *m, uint32_t number, const lynx_layer *layer) {
    lynx_codec codec;
    if (lynx_manifest_codec(m, number, &codec) != LYNX_OK) {
        return;
    }
    REQUIRE(codec.levels >= 1 && codec.levels <= 8);
    for (int part = LYNX_KEY; part <= LYNX_VALUE && codec.id == LYNX_CODEC_HQ; part++) {
        const uint32_t dim = lynx_head_dim(layer, part), heads = layer->kv_heads < 8 ? layer->kv_heads : 8;
        if (dim == 0 || dim > 4096) {
            continue;
        }
        uint8_t *widths = bytes((uint64_t)heads * dim);
        lynx_hq_config config;
        lynx_hq_bounds bounds;
        if (lynx_codec_tile(&codec, m->dtype, part, layer->index, layer->head_start, heads, 64, dim, widths, &config) == LYNX_OK) {
            REQUIRE(lynx_hq_measure(&config, &bounds) == LYNX_OK || codec.widths == LYNX_WIDTHS_TABLE);
        }
        free(widths);
    }
}

static void use_manifest(const lynx_manifest *m) {
    use_text(m->model);
    use_text(m->revision);
    use_text(m->attention_backend);
    use_text(m->layout);
    use_text(m->request_id);
    REQUIRE(m->layers > 0 && lynx_word_bytes(m->dtype) > 0 && m->shard_index < m->shard_count);
    lynx_layer *layers = bytes(m->layers * sizeof *layers);
    REQUIRE(lynx_manifest_layers(m, layers) == LYNX_OK);
    for (uint32_t i = 0; i < m->layers; i++) {
        REQUIRE(layers[i].token_start < layers[i].token_stop && layers[i].token_stop <= m->prompt_tokens);
        use_text(layers[i].kind);
    }
    for (uint32_t i = 0; i < m->codecs && i < 8; i++) {
        use_codec(m, i, &layers[0]);
    }
    free(layers);
}

static void use_bitmap(const uint8_t *bitmap, uint32_t start, uint32_t stop, uint32_t tokens) {
    uint32_t count = 0;
    for (uint32_t i = 0; bitmap != NULL && i < stop - start; i++) {
        count += bitmap[i / 8] >> i % 8 & 1;
    }
    REQUIRE(bitmap == NULL ? tokens == stop - start : tokens == count && count < stop - start);
}

static void use_payload(int type, const uint8_t *payload, size_t size, const lynx_limits *limits) {
    lynx_manifest manifest;
    lynx_list list;
    lynx_plan_tile tile;
    const uint8_t *digest;
    uint32_t count = 0;
    if (type == LYNX_FRAME_OPEN && lynx_open_read(payload, size, limits, &manifest) == LYNX_OK) {
        use_manifest(&manifest);
    } else if (type == LYNX_FRAME_PLAN && lynx_plan_read(payload, size, limits, &list) == LYNX_OK) {
        for (int code; (code = lynx_plan_next(&list, &tile)) != LYNX_END; count++) {
            REQUIRE(code == LYNX_OK && tile.levels >= 1 && tile.levels <= 8);
            use_bitmap(tile.bitmap, tile.token_start, tile.token_stop, tile.tokens);
        }
        REQUIRE(count == list.count);
    } else if (type == LYNX_FRAME_END && lynx_end_read(payload, size, limits, &list) == LYNX_OK) {
        for (int code; (code = lynx_end_next(&list, &digest)) != LYNX_END; count++) {
            REQUIRE(code == LYNX_OK);
            sink += digest == NULL ? 0 : digest[15];
        }
        REQUIRE(count == list.count);
    }
}

static void use_frames(const uint8_t *data, size_t size, const lynx_limits *limits) {
    lynx_frame frame;
    for (int code = LYNX_OK; code == LYNX_OK || code == LYNX_ERR_CRC;) {
        code = lynx_frame_read(data, size, limits, &frame);
        if (code == LYNX_MORE) {
            REQUIRE(frame.size > size);
        } else if (code == LYNX_OK || code == LYNX_ERR_CRC) {
            REQUIRE(frame.size <= size && frame.payload + frame.payload_length == data + frame.size);
            if (frame.type == LYNX_FRAME_DATA) {
                use_bitmap(frame.bitmap, frame.token_start, frame.token_stop, frame.tokens);
            }
            use_payload(frame.type, frame.payload, frame.payload_length, limits);
            data += frame.size;
            size -= (size_t)frame.size;
        }
    }
}

static void use_capture(const uint8_t *data, size_t size) {
    lynx_capture capture;
    lynx_record record;
    if (lynx_capture_open(data, size, &capture) != LYNX_OK) {
        return;
    }
    uint64_t first = 0;
    while (lynx_capture_next(&capture, &record) == LYNX_OK) {
        first += record.kind == LYNX_RECORD_DATA && record.stripe == 0 && record.direction == 0 ? record.length : 0;
    }
    REQUIRE(capture.at <= size);
    REQUIRE(lynx_capture_stream(&capture, 0, 0, NULL, 0) == first && first <= size);
    uint8_t *stream = bytes(first);
    REQUIRE(lynx_capture_stream(&capture, 0, 0, stream, first) == first);
    lynx_limits limits;
    lynx_default_limits(&limits);
    use_frames(stream, (size_t)first, &limits);
    free(stream);
}

/* A copy of the header with the checksums that it should have: else hardly any input would come further. */
static void mend(uint8_t *data, size_t size) {
    if (size >= 64) {
        const uint32_t length = (uint32_t)(size - 64);
        uint32_t crc = lynx_crc32c(0, data + 64, length);
        memcpy(data, "\xabLYX\1\10", 6);
        memcpy(data + 12, &length, 4);
        memcpy(data + 56, &crc, 4);
        crc = lynx_crc32c(0, data, 60);
        memcpy(data + 60, &crc, 4);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) {
        return 0;
    }
    lynx_limits limits;
    lynx_default_limits(&limits);
    const int what = data[0] % 8;
    const size_t n = size - 1;
    uint8_t *own = bytes(n);
    memcpy(own, data + 1, n);
    lynx_manifest manifest;
    switch (what) {
    case 0:
        use_frames(own, n, &limits);
        break;
    case 1:
        mend(own, n);
        use_frames(own, n, &limits);
        break;
    case 2:
        use_capture(own, n);
        break;
    case 3:
        if (lynx_manifest_read(own, n, &limits, &manifest) == LYNX_OK) {
            use_manifest(&manifest);
        }
        break;
    default:
        use_payload(what == 4 ? LYNX_FRAME_OPEN : what == 5 ? LYNX_FRAME_PLAN : LYNX_FRAME_END, own, n, &limits);
    }
    free(own);
    return 0;
}
