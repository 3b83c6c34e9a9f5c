/* What the readers of the wire share. */
#ifndef LYNX_WIRE_H
#define LYNX_WIRE_H

#include <stdbool.h>

#include "lynxproto_wire.h"

/* Whether this is the bitmap of an explicit set of `span` tokens; then how many belong. */
bool lynx_bitmap_is_good(const uint8_t *bitmap, uint64_t size, uint32_t span, uint32_t *tokens);

#endif
