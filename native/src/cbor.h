/* CBOR (RFC 8949) as spec/wire-format.md, "Control payloads", allows it: read in place, within bounds, nothing allocated. */
#ifndef LYNX_CBOR_H
#define LYNX_CBOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    CBOR_NONE, /* a key that is not there; the end of an array */
    CBOR_UNSIGNED,
    CBOR_NEGATIVE,
    CBOR_BYTES,
    CBOR_TEXT,
    CBOR_ARRAY,
    CBOR_MAP,
    CBOR_BOOLEAN,
    CBOR_NULL,
    CBOR_FLOAT
} cbor_kind;

typedef struct {
    cbor_kind kind;
    bool pieces;         /* a string of indefinite length: `data` is not its content */
    bool indefinite;     /* an array or map that ends with a break */
    uint64_t value;      /* of an unsigned integer or boolean; n of a negative -1 - n; entries of an array or map: pairs */
    double number;       /* of a float */
    const uint8_t *data; /* a string's content; the first entry of an array or map */
    size_t size;         /* of a string's content; of an array or map, to the end of its last entry */
} cbor_item;

typedef struct {
    const uint8_t *at, *end;
} cbor_cursor;

/* One item that takes all of `size` bytes, checked to the last of them. LYNX_OK or LYNX_ERR_PROTOCOL. */
int lynx_cbor_whole(const uint8_t *data, size_t size, cbor_item *item);

/* The entries of an array of a checked item, one after the other; CBOR_NONE behind the last. */
cbor_cursor lynx_cbor_entries(const cbor_item *array);
cbor_item lynx_cbor_next(cbor_cursor *cursor);

/* The entries of a map of a checked item that have these names, in their order. LYNX_ERR_PROTOCOL for something else than a
 * map, and for a name twice; LYNX_ERR_CRITICAL for an unknown name that begins with '!'; LYNX_ERR_UNSUPPORTED for names in
 * pieces. */
int lynx_cbor_fields(const cbor_item *map, const char *const *names, int count, cbor_item *found);

/* Whether a text (of definite length) is this one. */
bool lynx_cbor_is(const cbor_item *text, const char *name);

#endif
