#include "cbor.h"

#include <string.h>

#include "lynxproto.h"

#define MAX_DEPTH 16 /* maps and arrays that an item may be inside */

static bool is_utf8(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n;) {
        const uint8_t lead = p[i++];
        if (lead < 0x80) {
            continue;
        }
        const int more = lead < 0xc2 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : lead < 0xf5 ? 3 : 0;
        if (more == 0 || n - i < (size_t)more) {
            return false;
        }
        uint32_t point = (uint32_t)lead & (0x3fu >> more);
        for (int j = 0; j < more; j++, i++) {
            if ((p[i] & 0xc0) != 0x80) {
                return false;
            }
            point = point << 6 | (p[i] & 0x3f);
        }
        const bool overlong = (more == 2 && point < 0x800) || (more == 3 && point < 0x10000);
        if (overlong || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) {
            return false;
        }
    }
    return true;
}

/* A float of 2, 4 or 8 bytes. */
static double of_bits(int bytes, uint64_t bits) {
    if (bytes == 8) {
        double value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    uint32_t single = (uint32_t)bits;
    if (bytes == 2) {
        const uint32_t sign = (single & 0x8000) << 16, exponent = single >> 10 & 31, fraction = single & 1023;
        if (exponent == 0) {
            return (double)fraction * (sign != 0 ? -0x1p-24 : 0x1p-24);
        }
        single = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    }
    float value;
    memcpy(&value, &single, sizeof value);
    return (double)value;
}

/* The first byte of an item, and the number behind it: big-endian, of 0, 1, 2, 4 or 8 bytes. */
static bool read_head(cbor_cursor *c, int *major, int *minor, uint64_t *value) {
    if (c->at == c->end) {
        return false;
    }
    *major = *c->at >> 5;
    *minor = *c->at++ & 31;
    *value = (uint64_t)*minor;
    if (*minor < 24 || *minor == 31) {
        return true;
    }
    const int bytes = *minor > 27 ? 0 : 1 << (*minor - 24);
    if (bytes == 0 || c->end - c->at < bytes) {
        return false;
    }
    *value = 0;
    for (int i = 0; i < bytes; i++) {
        *value = *value << 8 | *c->at++;
    }
    return true;
}

static bool is_break(const cbor_cursor *c) {
    return c->at < c->end && *c->at == 0xff;
}

static bool read_item(cbor_cursor *c, int depth, cbor_item *item);

static bool read_string(cbor_cursor *c, bool text, uint64_t size, cbor_item *item) {
    if ((uint64_t)(c->end - c->at) < size) {
        return false;
    }
    item->data = c->at;
    item->size = (size_t)size;
    c->at += size;
    return !text || is_utf8(item->data, item->size);
}

static bool read_pieces(cbor_cursor *c, int major, cbor_item *item) {
    item->pieces = true;
    while (!is_break(c)) {
        int own, minor;
        uint64_t size;
        cbor_item piece;
        if (!read_head(c, &own, &minor, &size) || own != major || minor == 31 || !read_string(c, major == 3, size, &piece)) {
            return false;
        }
    }
    c->at++;
    return true;
}

static bool read_entries(cbor_cursor *c, bool map, int depth, uint64_t count, cbor_item *item) {
    item->data = c->at;
    if (item->indefinite) {
        count = UINT64_MAX;
    }
    item->value = 0;
    for (; item->value < count && !(item->indefinite && is_break(c)); item->value++) {
        cbor_item entry;
        if (map && (!read_item(c, depth, &entry) || entry.kind != CBOR_TEXT)) {
            return false;
        }
        if (!read_item(c, depth, &entry)) {
            return false;
        }
    }
    item->size = (size_t)(c->at - item->data);
    c->at += item->indefinite;
    return true;
}

/* `depth`: how many maps and arrays the item is inside. */
static bool read_item(cbor_cursor *c, int depth, cbor_item *item) {
    int major, minor;
    uint64_t value;
    *item = (cbor_item){.kind = CBOR_NONE};
    if (depth > MAX_DEPTH || !read_head(c, &major, &minor, &value)) {
        return false;
    }
    item->value = value;
    item->indefinite = minor == 31 && (major == 4 || major == 5);
    if (minor == 31 && (major < 2 || major > 5)) {
        return false;
    }
    switch (major) {
    case 0:
        item->kind = CBOR_UNSIGNED;
        return true;
    case 1:
        item->kind = CBOR_NEGATIVE;
        return value <= INT64_MAX;
    case 2:
    case 3:
        item->kind = major == 2 ? CBOR_BYTES : CBOR_TEXT;
        return minor == 31 ? read_pieces(c, major, item) : read_string(c, major == 3, value, item);
    case 4:
    case 5:
        item->kind = major == 4 ? CBOR_ARRAY : CBOR_MAP;
        return read_entries(c, major == 5, depth + 1, value, item);
    case 7:
        if (minor == 20 || minor == 21) {
            item->kind = CBOR_BOOLEAN;
            item->value = (uint64_t)(minor - 20);
            return true;
        }
        if (minor == 22) {
            item->kind = CBOR_NULL;
            return true;
        }
        if (minor >= 25 && minor <= 27) {
            item->kind = CBOR_FLOAT;
            item->number = of_bits(1 << (minor - 24), value);
            return true;
        }
        return false;
    default: /* tags */
        return false;
    }
}

int lynx_cbor_whole(const uint8_t *data, size_t size, cbor_item *item) {
    cbor_cursor c = {data, size == 0 ? data : data + size};
    return read_item(&c, 0, item) && c.at == c.end ? LYNX_OK : LYNX_ERR_PROTOCOL;
}

cbor_cursor lynx_cbor_entries(const cbor_item *array) {
    return (cbor_cursor){array->data, array->size == 0 ? array->data : array->data + array->size};
}

cbor_item lynx_cbor_next(cbor_cursor *cursor) {
    cbor_item item = {.kind = CBOR_NONE};
    if (cursor->at < cursor->end) {
        (void)read_item(cursor, 0, &item); /* it was checked */
    }
    return item;
}

bool lynx_cbor_is(const cbor_item *text, const char *name) {
    return text->kind == CBOR_TEXT && !text->pieces && text->size == strlen(name) && memcmp(text->data, name, text->size) == 0;
}

int lynx_cbor_fields(const cbor_item *map, const char *const *names, int count, cbor_item *found) {
    if (map->kind != CBOR_MAP) {
        return LYNX_ERR_PROTOCOL;
    }
    for (int i = 0; i < count; i++) {
        found[i] = (cbor_item){.kind = CBOR_NONE};
    }
    cbor_cursor cursor = lynx_cbor_entries(map);
    int outcome = LYNX_OK;
    for (cbor_item key = lynx_cbor_next(&cursor); key.kind != CBOR_NONE; key = lynx_cbor_next(&cursor)) {
        const cbor_item value = lynx_cbor_next(&cursor);
        int number = 0;
        if (key.pieces) {
            return LYNX_ERR_UNSUPPORTED;
        }
        while (number < count && !lynx_cbor_is(&key, names[number])) {
            number++;
        }
        if (number == count) {
            outcome = key.size > 0 && key.data[0] == '!' ? LYNX_ERR_CRITICAL : outcome;
        } else if (found[number].kind != CBOR_NONE) {
            return LYNX_ERR_PROTOCOL;
        } else {
            found[number] = value;
        }
    }
    return outcome;
}
