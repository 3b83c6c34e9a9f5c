/* The readers of the wire on a stream of four frames, and on damaged copies of it in memory of their size: what is accepted and
 * what is refused is the same in every build. The specification's vectors go through the same functions in Python. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lynxproto_wire.h"

/* OPEN (two layers, hq and bitplane), PLAN of layer 1 (a range and an explicit set), END, DATA of the explicit set, as Python
 * writes them. */
static const char STREAM[] =
    "\xab\x4c\x59\x58\x01\x08\x03\x00\x00\x00\x00\x00\xba\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    "\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x8a\x2c"
    "\x5f\x3d\x47\x80\xf9\xe1\xa3\x65\x66\x65\x74\x63\x68\x40\x66\x72\x65\x73\x75\x6d\x65\x40\x68\x6d\x61\x6e\x69\x66\x65"
    "\x73\x74\x59\x01\x9e\xab\x65\x64\x74\x79\x70\x65\x67\x66\x6c\x6f\x61\x74\x31\x36\x65\x6c\x6f\x73\x73\x79\xf4\x65\x73"
    "\x68\x61\x72\x64\x82\x00\x01\x66\x63\x6f\x64\x65\x63\x73\x82\xa7\x62\x69\x64\x62\x68\x71\x64\x66\x6f\x6c\x64\xf5\x66"
    "\x6c\x65\x76\x65\x6c\x73\x03\x66\x77\x69\x64\x74\x68\x73\x66\x72\x61\x6e\x67\x65\x73\x67\x73\x63\x61\x6c\x69\x6e\x67"
    "\xf5\x68\x6b\x65\x79\x5f\x62\x69\x74\x73\xfb\x40\x09\x33\x33\x33\x33\x33\x33\x6a\x76\x61\x6c\x75\x65\x5f\x62\x69\x74"
    "\x73\x03\xa2\x62\x69\x64\x68\x62\x69\x74\x70\x6c\x61\x6e\x65\x66\x70\x6c\x61\x6e\x65\x73\x82\x09\x07\x66\x6c\x61\x79"
    "\x65\x72\x73\x82\xa8\x64\x6b\x69\x6e\x64\x64\x66\x75\x6c\x6c\x65\x69\x6e\x64\x65\x78\x00\x65\x70\x61\x72\x74\x73\x82"
    "\x63\x6b\x65\x79\x65\x76\x61\x6c\x75\x65\x66\x74\x6f\x6b\x65\x6e\x73\x82\x00\x09\x67\x6b\x65\x79\x5f\x64\x69\x6d\x08"
    "\x68\x6b\x76\x5f\x68\x65\x61\x64\x73\x03\x69\x76\x61\x6c\x75\x65\x5f\x64\x69\x6d\x08\x6a\x68\x65\x61\x64\x5f\x73\x74"
    "\x61\x72\x74\x00\xa8\x64\x6b\x69\x6e\x64\x64\x66\x75\x6c\x6c\x65\x69\x6e\x64\x65\x78\x01\x65\x70\x61\x72\x74\x73\x82"
    "\x63\x6b\x65\x79\x65\x76\x61\x6c\x75\x65\x66\x74\x6f\x6b\x65\x6e\x73\x82\x00\x09\x67\x6b\x65\x79\x5f\x64\x69\x6d\x08"
    "\x68\x6b\x76\x5f\x68\x65\x61\x64\x73\x03\x69\x76\x61\x6c\x75\x65\x5f\x64\x69\x6d\x08\x6a\x68\x65\x61\x64\x5f\x73\x74"
    "\x61\x72\x74\x00\x66\x6c\x61\x79\x6f\x75\x74\x65\x4c\x42\x48\x4e\x43\x66\x74\x61\x62\x6c\x65\x73\x80\x67\x70\x61\x63"
    "\x6b\x69\x6e\x67\x60\x68\x69\x64\x65\x6e\x74\x69\x74\x79\xa2\x65\x6d\x6f\x64\x65\x6c\x61\x6d\x68\x72\x65\x76\x69\x73"
    "\x69\x6f\x6e\x61\x72\x6a\x72\x65\x71\x75\x65\x73\x74\x5f\x69\x64\x6a\x72\x65\x71\x75\x65\x73\x74\x20\xc3\xa9\x6d\x70"
    "\x72\x6f\x6d\x70\x74\x5f\x74\x6f\x6b\x65\x6e\x73\x09\xab\x4c\x59\x58\x01\x08\x08\x00\x00\x00\x00\x00\x2a\x00\x00\x00"
    "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xfa\x16\x4e\x69\x8a\x78\xb4\xcf\xa3\x65\x6c\x61\x79\x65\x72\x01\x65\x74"
    "\x69\x6c\x65\x73\x82\x86\x00\x00\x03\x00\x09\x00\x87\x01\x01\x02\x00\x09\x01\x42\x05\x01\x66\x6c\x65\x76\x65\x6c\x73"
    "\x42\x03\x02\xab\x4c\x59\x58\x01\x08\x0b\x00\x00\x00\x00\x00\x23\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    "\x00\x00\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    "\x00\x73\x3a\x71\xba\xde\x3d\x3d\x74\xa2\x65\x6c\x61\x79\x65\x72\x01\x67\x64\x69\x67\x65\x73\x74\x73\x82\x50\x00\x01"
    "\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x40\xab\x4c\x59\x58\x01\x08\x09\x00\x00\x00\x01\x01\x07\x00"
    "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x07\x01\x00\x00\x00\x01\x00\x02\x00\x00\x00\x00"
    "\x00\x09\x00\x00\x00\x02\x00\x01\x00\x06\x00\x00\x00\x70\x69\xe3\xf4\xbd\x67\xec\x4c\x05\x01\x7a\x0d\x22\x5e\x70\x61"
    "\x79\x6c\x6f\x61\x64";

static uint64_t state = 88172645463325252ull, digest = 0xcbf29ce484222325ull;

static uint32_t draw(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 33) % below;
}

static void note(uint64_t value) { /* FNV-1a */
    for (int i = 0; i < 8; i++) {
        digest = (digest ^ (value >> 8 * i & 255)) * 0x100000001b3ull;
    }
}

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static void note_text(lynx_text text) {
    for (uint32_t i = 0; i < text.size; i++) {
        note((uint8_t)text.text[i]);
    }
}

static void note_manifest(const lynx_manifest *m) {
    lynx_layer *layers = malloc(m->layers * sizeof *layers);
    CHECK(layers != NULL && lynx_manifest_layers(m, layers) == LYNX_OK);
    note_text(m->model);
    note_text(m->request_id);
    note(m->cache_bytes);
    for (uint32_t i = 0; i < m->layers; i++) {
        note(layers[i].index);
        note(lynx_head_dim(&layers[i], LYNX_VALUE));
    }
    for (uint32_t i = 0; i < m->codecs; i++) {
        lynx_codec codec;
        lynx_hq_config config;
        uint8_t widths[3 * 8];
        note((uint64_t)lynx_manifest_codec(m, i, &codec));
        if (codec.id == LYNX_CODEC_HQ &&
            lynx_codec_tile(&codec, m->dtype, LYNX_KEY, 1, 0, 3, 9, 8, widths, &config) == LYNX_OK) {
            note(config.range_bits);
        }
    }
    free(layers);
}

static void note_body(const lynx_frame *f, const lynx_limits *limits) {
    lynx_manifest manifest;
    lynx_list list;
    lynx_plan_tile tile;
    const uint8_t *one;
    int code = LYNX_OK;
    if (f->type == LYNX_FRAME_OPEN) {
        code = lynx_open_read(f->payload, f->payload_length, limits, &manifest);
        if (code == LYNX_OK) {
            note_manifest(&manifest);
        }
    } else if (f->type == LYNX_FRAME_PLAN) {
        code = lynx_plan_read(f->payload, f->payload_length, limits, &list);
        while (code == LYNX_OK && lynx_plan_next(&list, &tile) == LYNX_OK) {
            note(tile.tokens);
            note(tile.levels);
        }
    } else if (f->type == LYNX_FRAME_END) {
        code = lynx_end_read(f->payload, f->payload_length, limits, &list);
        while (code == LYNX_OK && lynx_end_next(&list, &one) == LYNX_OK) {
            note(one == NULL ? 99 : one[15]);
        }
    }
    note((uint64_t)code);
}

/* All frames up to the first that is refused; how many. With `mended` the damaged payloads' checksums are put right. */
static int read_stream(uint8_t *data, size_t size, bool mended) {
    lynx_limits limits;
    lynx_default_limits(&limits);
    lynx_frame f;
    int count = 0, code;
    for (;; count++) {
        code = lynx_frame_read(data, size, &limits, &f);
        if (code != LYNX_OK && !(code == LYNX_ERR_CRC && mended)) {
            break;
        }
        note(f.type);
        note(f.tokens);
        note_body(&f, &limits);
        data += f.size;
        size -= (size_t)f.size;
    }
    note((uint64_t)code);
    return code == LYNX_MORE && size == 0 ? count : -1;
}

int main(int argc, char **argv) {
    const int rounds = argc > 1 ? 100 * atoi(argv[1]) : 30000;
    const size_t size = sizeof STREAM - 1;
    uint8_t *data = malloc(size);
    CHECK(data != NULL);
    memcpy(data, STREAM, size);
    CHECK(read_stream(data, size, false) == 4);
    free(data);
    for (int round = 0; round < rounds; round++) {
        const size_t some = draw(3) == 0 ? draw((uint32_t)size) : size;
        data = malloc(some + 1);
        CHECK(data != NULL);
        memcpy(data, STREAM, some);
        for (uint32_t hits = draw(3); hits > 0 && some > 64; hits--) { /* mostly not in headers, whose checksums find it */
            const uint32_t at = 64 + draw((uint32_t)some - 64);
            data[at] = (uint8_t)draw(256);
        }
        read_stream(data, some, draw(4) != 0);
        free(data);
    }
    printf("ok: %d streams; digest:\n%016llx\n", rounds, (unsigned long long)digest);
    return 0;
}
