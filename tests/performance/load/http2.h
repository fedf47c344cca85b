// One gRPC call after another on one connection: as much of HTTP/2 as an emulated shim needs, and loud about the rest.
#ifndef HTTP2_H
#define HTTP2_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_HEADER 9
#define GRPC_HEADER 5
#define ERROR_SIZE 240

// Bytes that grow at the end and are taken from the beginning.
struct bytes {
  uint8_t *data;
  size_t begin, end, capacity;
};

struct http2 {
  int fd;
  struct bytes out;      // accepted by us, not yet by the kernel
  struct bytes in;       // read, not yet a whole frame
  struct bytes message;  // DATA of the open call, not yet a whole gRPC message
  int64_t connection_window, stream_window, initial_window;
  int64_t unacknowledged;  // received bytes the peer was not yet given back
  uint32_t stream;         // the open call; odd, grows by two
  bool call_open;          // HEADERS are sent and no trailers came
  bool half_closed;        // END_STREAM is sent
  bool failed;
  char error[ERROR_SIZE];
};

// Takes one gRPC message of the open call.
typedef void take_message(void *owner, const uint8_t *message, size_t size);

// Takes a connected non-blocking socket. With `raw` nothing is spoken: http2_write and http2_flush only.
void http2_begin(struct http2 *h, int fd, bool raw);
// Opens the next call: HEADERS with an encoded block.
void http2_open_call(struct http2 *h, const uint8_t *block, size_t size);
// Bytes of flow control a message of `size` bytes needs, and whether both windows have them.
bool http2_may_send(const struct http2 *h, size_t size);
// One gRPC message as one DATA frame, of two parts that are put together.
void http2_send_message(struct http2 *h, const uint8_t *first, size_t first_size, const uint8_t *second,
                        size_t second_size, bool end_stream);
// Closes our side of the call.
void http2_half_close(struct http2 *h);
// Reads what there is; messages of the open call go to `take`. False once the connection is of no more use.
bool http2_read(struct http2 *h, take_message *take, void *owner);
void http2_write(struct http2 *h, const uint8_t *data, size_t size);
// Hands `out` to the kernel as far as it takes it; false on an error.
bool http2_flush(struct http2 *h);
bool http2_fail(struct http2 *h, const char *format, ...) __attribute__((format(printf, 2, 3)));

// At least `size` free bytes behind `end`.
void bytes_reserve(struct bytes *b, size_t size);
void bytes_take(struct bytes *b, size_t size);
void bytes_free(struct bytes *b);
size_t bytes_size(const struct bytes *b);

#endif
