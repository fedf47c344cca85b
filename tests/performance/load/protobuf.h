// Reads protobuf messages field by field.
#ifndef PROTOBUF_H
#define PROTOBUF_H

#include <stdbool.h>
#include <stdint.h>

// The next field of a message: its number, and its varint in `value` or, where `data` is not NULL, its bytes and their
// count. Fixed-width fields are passed over. False where the bytes are no message.
bool take_field(const uint8_t **at, const uint8_t *end, uint32_t *number, uint64_t *value, const uint8_t **data);

#endif
