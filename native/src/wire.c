/* Frames and captures: spec/wire-format.md, "Frame header", and spec/capture.md. */
#include "wire.h"

#include <string.h>

#define HEADER 64
#define IGNORABLE 0x8000
#define CRITICAL_FLAGS 0xff00
#define MAX_PART LYNX_OPAQUE
#define BITMAP_CRC 4

static uint32_t load(const uint8_t *p, int bytes) {
    uint32_t value = 0;
    for (int i = 0; i < bytes; i++) {
        value |= (uint32_t)p[i] << 8 * i;
    }
    return value;
}

static uint64_t load_long(const uint8_t *p) {
    return load(p, 4) | (uint64_t)load(p + 4, 4) << 32;
}

void lynx_default_limits(lynx_limits *limits) {
    *limits = (lynx_limits){.frame_bytes = 64u << 20,
                            .control_bytes = 4u << 20,
                            .layers = 1024,
                            .tokens = 2u << 20,
                            .tiles = 1u << 18,
                            .transfer_bytes = 256ull << 30};
}

bool lynx_bitmap_is_good(const uint8_t *bitmap, uint64_t size, uint32_t span, uint32_t *tokens) {
    if (size != ((uint64_t)span + 7) / 8 || (bitmap[0] & 1) == 0) {
        return false;
    }
    const int last = (int)((span - 1) % 8); /* bit of the last token: nothing is above it */
    if (bitmap[size - 1] >> last != 1) {
        return false;
    }
    *tokens = 0;
    for (uint64_t i = 0; i < size; i++) {
        *tokens += (uint32_t)__builtin_popcount(bitmap[i]);
    }
    return *tokens < span; /* a contiguous set comes as a range */
}

/* Rows 9 to 11 of "Order of checks". */
static int check_data(const lynx_limits *limits, const lynx_frame *frame, uint32_t extension) {
    if (frame->level > 7 || frame->attempt > 1 || frame->payload_length == 0) {
        return LYNX_ERR_PROTOCOL;
    }
    const bool some = frame->token_start < frame->token_stop;
    const uint32_t span = some ? frame->token_stop - frame->token_start : 0;
    if (span > limits->tokens) {
        return LYNX_ERR_LIMIT;
    }
    const bool extended = extension == ((uint64_t)span + 7) / 8 + BITMAP_CRC;
    return some && (extension == 0 || extended) && frame->part <= MAX_PART && frame->heads > 0 ? LYNX_OK : LYNX_ERR_PROTOCOL;
}

static bool is_known(uint16_t type) {
    return type >= LYNX_FRAME_HELLO && type <= LYNX_FRAME_GOAWAY;
}

static int check_header(const uint8_t *data, const lynx_limits *limits, lynx_frame *frame, uint32_t *extension) {
    static const uint8_t MAGIC[4] = {0xab, 'L', 'Y', 'X'};
    if (memcmp(data, MAGIC, sizeof MAGIC) != 0 || lynx_crc32c(0, data, HEADER - 4) != load(data + 60, 4)) {
        return LYNX_ERR_FRAME;
    }
    if (data[4] != 1 || data[5] != HEADER / 8) {
        return LYNX_ERR_VERSION;
    }
    frame->type = (uint16_t)load(data + 6, 2);
    frame->flags = (uint16_t)load(data + 8, 2);
    frame->payload_length = load(data + 12, 4);
    memcpy(frame->transfer, data + 16, sizeof frame->transfer);
    frame->payload_crc = load(data + 56, 4);
    *extension = load(data + 52, 4);
    if ((!is_known(frame->type) && frame->type < IGNORABLE) || (frame->flags & CRITICAL_FLAGS) != 0) {
        return LYNX_ERR_CRITICAL;
    }
    const bool is_data = frame->type == LYNX_FRAME_DATA;
    if (frame->payload_length > (is_data ? limits->frame_bytes : limits->control_bytes)) {
        return LYNX_ERR_TOO_LARGE;
    }
    if (!is_data) {
        return *extension == 0 ? LYNX_OK : LYNX_ERR_PROTOCOL;
    }
    frame->part = data[10];
    frame->level = data[11];
    frame->layer = (uint16_t)load(data + 32, 2);
    frame->attempt = data[34];
    frame->head_start = (uint16_t)load(data + 36, 2);
    frame->heads = (uint16_t)load(data + 38, 2);
    frame->token_start = load(data + 40, 4);
    frame->token_stop = load(data + 44, 4);
    frame->codec_id = (uint16_t)load(data + 48, 2);
    frame->codec = (uint16_t)load(data + 50, 2);
    frame->tokens = frame->token_stop - frame->token_start;
    return check_data(limits, frame, *extension);
}

int lynx_frame_read(const uint8_t *data, size_t size, const lynx_limits *limits, lynx_frame *frame) {
    *frame = (lynx_frame){.size = HEADER};
    if (size < HEADER) {
        return LYNX_MORE;
    }
    uint32_t extension = 0;
    const int error = check_header(data, limits, frame, &extension);
    if (error != LYNX_OK) {
        return error;
    }
    const uint64_t start = HEADER + (uint64_t)extension;
    frame->size = start + frame->payload_length;
    if (extension > 0) {
        if (size < start) {
            return LYNX_MORE;
        }
        const uint8_t *bitmap = data + HEADER;
        const uint32_t bytes = extension - BITMAP_CRC;
        if (lynx_crc32c(0, bitmap, bytes) != load(bitmap + bytes, 4)) {
            return LYNX_ERR_FRAME;
        }
        if (!lynx_bitmap_is_good(bitmap, bytes, frame->token_stop - frame->token_start, &frame->tokens)) {
            return LYNX_ERR_PROTOCOL;
        }
        frame->bitmap = bitmap;
    }
    if (size < frame->size) {
        return LYNX_MORE;
    }
    frame->payload = data + start;
    if (!is_known(frame->type)) {
        return LYNX_OK;
    }
    return lynx_crc32c(0, frame->payload, frame->payload_length) == frame->payload_crc ? LYNX_OK : LYNX_ERR_CRC;
}

/* --- captures --------------------------------------------------------------------------------------------------- */

#define FILE_HEADER 32
#define RECORD_HEADER 24

int lynx_capture_open(const uint8_t *data, size_t size, lynx_capture *capture) {
    static const uint8_t START[16] = {0x89, 'L', 'Y', 'N', 'X', '\r', '\n', 0x1a, 1, 0, FILE_HEADER, 0, 0, 0, 0, 0};
    if (size < FILE_HEADER || memcmp(data, START, sizeof START) != 0 || lynx_crc32c(0, data, 28) != load(data + 28, 4)) {
        return LYNX_ERR_CAPTURE;
    }
    *capture = (lynx_capture){data, size, FILE_HEADER, load_long(data + 16)};
    return LYNX_OK;
}

int lynx_capture_next(lynx_capture *capture, lynx_record *record) {
    if (capture->at == capture->size) {
        return LYNX_END;
    }
    const uint8_t *p = capture->data + capture->at;
    const size_t left = capture->size - capture->at;
    if (left < RECORD_HEADER || lynx_crc32c(0, p, 20) != load(p + 20, 4) || p[5] > 1 ||
        left - RECORD_HEADER < load(p, 4)) {
        return LYNX_ERR_CAPTURE;
    }
    *record = (lynx_record){.kind = p[4],
                            .direction = p[5],
                            .stripe = load(p + 16, 4),
                            .length = load(p, 4),
                            .time = load_long(p + 8),
                            .data = p + RECORD_HEADER};
    capture->at += RECORD_HEADER + (size_t)record->length;
    return LYNX_OK;
}

uint64_t lynx_capture_stream(const lynx_capture *capture, uint32_t stripe, uint32_t direction, uint8_t *out, uint64_t room) {
    lynx_capture all = *capture;
    lynx_record record;
    uint64_t total = 0;
    all.at = FILE_HEADER;
    while (lynx_capture_next(&all, &record) == LYNX_OK) {
        if (record.kind != LYNX_RECORD_DATA || record.stripe != stripe || record.direction != direction) {
            continue;
        }
        if (out != NULL && total < room) {
            const uint64_t left = room - total;
            memcpy(out + total, record.data, (size_t)(left < record.length ? left : record.length));
        }
        total += record.length;
    }
    return total;
}
