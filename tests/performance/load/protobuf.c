#include "protobuf.h"

#include <stddef.h>

enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

static bool take_varint(const uint8_t **at, const uint8_t *end, uint64_t *value) {
  *value = 0;
  for (int shift = 0; shift < 64 && *at < end; shift += 7) {
    uint8_t byte = *(*at)++;
    *value |= (uint64_t)(byte & 127) << shift;
    if (byte < 128) return true;
  }
  return false;
}

bool take_field(const uint8_t **at, const uint8_t *end, uint32_t *number, uint64_t *value, const uint8_t **data) {
  uint64_t tag, size;
  *data = NULL;
  if (!take_varint(at, end, &tag)) return false;
  *number = tag >> 3;
  switch (tag & 7) {
    case VARINT:
      return take_varint(at, end, value);
    case FIXED64:
      size = 8;
      break;
    case FIXED32:
      size = 4;
      break;
    case BYTES:
      if (!take_varint(at, end, value)) return false;
      size = *value;
      *data = *at;
      break;
    default:
      return false;
  }
  if (size > (uint64_t)(end - *at)) return false;
  *at += size;
  return true;
}
