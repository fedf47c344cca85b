// HTTP/2 (RFC 9113) as far as a gRPC client on loopback meets it. Header blocks are not decoded: this side announces a
// dynamic table of size 0, so that every block of the peer stands for itself, and reads grpc-status out of the bytes.
#define _GNU_SOURCE
#include "http2.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { DATA = 0, HEADERS = 1, PRIORITY = 2, RST_STREAM = 3, SETTINGS = 4, PUSH = 5, PING = 6, GOAWAY = 7, WINDOW = 8,
       CONTINUATION = 9 };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED = 8, PRIORITIZED = 32 };
enum { MAX_FRAME = 16384, READ_SIZE = FRAME_HEADER + MAX_FRAME };
#define WINDOW_LIMIT INT32_MAX
#define DEFAULT_WINDOW 65535
#define GIVE_BACK_AT (1 << 28)

static void send_frame(struct http2 *h, int type, int flags, uint32_t stream, const uint8_t *payload, size_t size);
static bool read_frame(struct http2 *h, int type, int flags, uint32_t stream, const uint8_t *payload, size_t size,
                       take_message *take, void *owner);
static bool read_data(struct http2 *h, int flags, const uint8_t *payload, size_t size, take_message *take, void *owner);
static bool read_headers(struct http2 *h, int flags, const uint8_t *payload, size_t size);
static bool read_settings(struct http2 *h, const uint8_t *payload, size_t size);
static bool read_trailers(struct http2 *h, const uint8_t *block, size_t size);

static void put32(uint8_t *at, uint32_t value) {
  at[0] = value >> 24, at[1] = value >> 16, at[2] = value >> 8, at[3] = value;
}

static uint32_t get32(const uint8_t *at) {
  return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

void http2_begin(struct http2 *h, int fd, bool raw) {
  memset(h, 0, sizeof *h);
  h->fd = fd;
  h->stream = UINT32_MAX;  // the first call is 1
  h->connection_window = h->initial_window = DEFAULT_WINDOW;
  if (raw) return;
  static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
  http2_write(h, (const uint8_t *)preface, sizeof preface - 1);
  uint8_t settings[18] = {0, 1, 0, 0, 0, 0, /**/ 0, 2, 0, 0, 0, 0, /**/ 0, 4};  // table size 0, no push, window
  put32(settings + 14, WINDOW_LIMIT);
  send_frame(h, SETTINGS, 0, 0, settings, sizeof settings);
  uint8_t window[4];
  put32(window, WINDOW_LIMIT - DEFAULT_WINDOW);
  send_frame(h, WINDOW, 0, 0, window, sizeof window);
}

void http2_open_call(struct http2 *h, const uint8_t *block, size_t size) {
  h->stream += 2;
  h->stream_window = h->initial_window;
  h->call_open = true;
  h->half_closed = false;
  h->message.begin = h->message.end = 0;
  send_frame(h, HEADERS, END_HEADERS, h->stream, block, size);
}

bool http2_may_send(const struct http2 *h, size_t size) {
  int64_t needed = (int64_t)size + GRPC_HEADER;
  return h->connection_window >= needed && h->stream_window >= needed;
}

void http2_send_message(struct http2 *h, const uint8_t *first, size_t first_size, const uint8_t *second,
                        size_t second_size, bool end_stream) {
  size_t size = first_size + second_size;
  uint8_t head[FRAME_HEADER + GRPC_HEADER];
  size_t framed = size + GRPC_HEADER;
  if (framed > MAX_FRAME) {
    http2_fail(h, "a message of %zu bytes; the generator sends one frame of %d at most", size, MAX_FRAME);
    return;
  }
  head[0] = framed >> 16, head[1] = framed >> 8, head[2] = framed;
  head[3] = DATA;
  head[4] = end_stream ? END_STREAM : 0;
  put32(head + 5, h->stream);
  head[9] = 0;  // not compressed
  put32(head + 10, size);
  http2_write(h, head, sizeof head);
  http2_write(h, first, first_size);
  http2_write(h, second, second_size);
  h->connection_window -= framed;
  h->stream_window -= framed;
  h->half_closed = end_stream;
}

void http2_half_close(struct http2 *h) {
  send_frame(h, DATA, END_STREAM, h->stream, NULL, 0);
  h->half_closed = true;
}

bool http2_read(struct http2 *h, take_message *take, void *owner) {
  bytes_reserve(&h->in, READ_SIZE);
  ssize_t got = recv(h->fd, h->in.data + h->in.end, h->in.capacity - h->in.end, 0);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (got < 0) return http2_fail(h, "reading: %s", strerror(errno));
  if (got == 0) return http2_fail(h, "the server closed the connection");
  h->in.end += got;
  while (bytes_size(&h->in) >= FRAME_HEADER) {
    const uint8_t *head = h->in.data + h->in.begin;
    size_t size = (size_t)head[0] << 16 | (size_t)head[1] << 8 | head[2];
    if (size > MAX_FRAME) return http2_fail(h, "a frame of %zu bytes; %d is the limit of this side", size, MAX_FRAME);
    if (bytes_size(&h->in) < FRAME_HEADER + size) break;
    uint32_t stream = get32(head + 5) & INT32_MAX;
    if (!read_frame(h, head[3], head[4], stream, head + FRAME_HEADER, size, take, owner)) return false;
    bytes_take(&h->in, FRAME_HEADER + size);
  }
  return http2_flush(h);
}

static bool read_frame(struct http2 *h, int type, int flags, uint32_t stream, const uint8_t *payload, size_t size,
                       take_message *take, void *owner) {
  bool ours = h->call_open && stream == h->stream;
  switch (type) {
    case DATA:
      h->unacknowledged += size;
      if (!ours) return http2_fail(h, "DATA on stream %u while %u is open", stream, h->stream);
      return read_data(h, flags, payload, size, take, owner);
    case HEADERS:
      if (!ours) return http2_fail(h, "HEADERS on stream %u while %u is open", stream, h->stream);
      return read_headers(h, flags, payload, size);
    case RST_STREAM:
      // A server that has answered and does not wait for our half says NO_ERROR.
      if (!ours && size == 4 && get32(payload) == 0) return true;
      return http2_fail(h, "RST_STREAM on stream %u, error code %u", stream, size == 4 ? get32(payload) : 0);
    case SETTINGS:
      if (flags & ACK) return true;
      return read_settings(h, payload, size);
    case PING:
      if (flags & ACK) return true;
      if (size != 8) return http2_fail(h, "a PING of %zu bytes", size);
      send_frame(h, PING, ACK, 0, payload, size);
      return true;
    case GOAWAY:
      return http2_fail(h, "GOAWAY, error code %u: %.*s", size >= 8 ? get32(payload + 4) : 0,
                        size > 8 ? (int)(size - 8) : 0, size > 8 ? (const char *)payload + 8 : "");
    case WINDOW: {
      if (size != 4) return http2_fail(h, "a WINDOW_UPDATE of %zu bytes", size);
      int64_t more = get32(payload) & INT32_MAX;
      if (stream == 0) h->connection_window += more;
      if (ours) h->stream_window += more;
      if (h->connection_window > WINDOW_LIMIT || h->stream_window > WINDOW_LIMIT)
        return http2_fail(h, "the server opened a window beyond 2^31 - 1");
      return true;
    }
    case PUSH:
    case CONTINUATION:
      return http2_fail(h, "a frame of type %d, which no gRPC server sends to this client", type);
    default:  // PRIORITY, and types of extensions, which are ignored (RFC 9113, 5.5)
      return true;
  }
}

static bool read_data(struct http2 *h, int flags, const uint8_t *payload, size_t size, take_message *take,
                      void *owner) {
  if (flags & PADDED) {
    if (size < 1 || payload[0] >= size) return http2_fail(h, "DATA with more padding than bytes");
    size -= payload[0] + 1;
    payload++;
  }
  if (flags & END_STREAM) return http2_fail(h, "a call that ended without trailers");
  bytes_reserve(&h->message, size);
  if (size) memcpy(h->message.data + h->message.end, payload, size);
  h->message.end += size;
  while (bytes_size(&h->message) >= GRPC_HEADER) {
    const uint8_t *at = h->message.data + h->message.begin;
    size_t length = get32(at + 1);
    if (at[0]) return http2_fail(h, "a compressed message; none was asked for");
    if (bytes_size(&h->message) < GRPC_HEADER + length) break;
    take(owner, at + GRPC_HEADER, length);
    if (h->failed) return false;
    bytes_take(&h->message, GRPC_HEADER + length);
  }
  if (h->unacknowledged >= GIVE_BACK_AT) {
    uint8_t window[4];
    put32(window, h->unacknowledged);
    send_frame(h, WINDOW, 0, 0, window, sizeof window);
    send_frame(h, WINDOW, 0, h->stream, window, sizeof window);
    h->unacknowledged = 0;
  }
  return true;
}

static bool read_headers(struct http2 *h, int flags, const uint8_t *payload, size_t size) {
  if (!(flags & END_HEADERS)) return http2_fail(h, "a header block in several frames");
  if (flags & (PADDED | PRIORITIZED)) return http2_fail(h, "HEADERS with padding or priority");
  return flags & END_STREAM ? read_trailers(h, payload, size) : true;
}

static bool read_settings(struct http2 *h, const uint8_t *payload, size_t size) {
  if (size % 6) return http2_fail(h, "SETTINGS of %zu bytes", size);
  for (size_t at = 0; at < size; at += 6) {
    int name = payload[at] << 8 | payload[at + 1];
    if (name != 4) continue;  // SETTINGS_INITIAL_WINDOW_SIZE
    int64_t window = get32(payload + at + 2);
    if (h->call_open) h->stream_window += window - h->initial_window;
    h->initial_window = window;
  }
  send_frame(h, SETTINGS, ACK, 0, NULL, 0);
  return true;
}

static bool read_trailers(struct http2 *h, const uint8_t *block, size_t size) {
  static const char name[] = "grpc-status";
  const uint8_t *at = memmem(block, size, name, sizeof name - 1);
  const uint8_t *value = at ? at + sizeof name - 1 : block + size;
  if (block + size - value < 2 || value[0] != 1 || value[1] != '0') {
    char text[ERROR_SIZE / 2];
    size_t length = 0;
    for (size_t i = 0; i < size && length < sizeof text - 1; i++)
      if (block[i] >= ' ' && block[i] < 127) text[length++] = block[i];
    text[length] = 0;
    return http2_fail(h, "the call ended with a status that is not 0; trailers: %s", text);
  }
  if (!h->half_closed) return http2_fail(h, "the server ended the call before this side did");
  h->call_open = false;
  return true;
}

static void send_frame(struct http2 *h, int type, int flags, uint32_t stream, const uint8_t *payload, size_t size) {
  uint8_t head[FRAME_HEADER] = {size >> 16, size >> 8, size, type, flags};
  put32(head + 5, stream);
  http2_write(h, head, sizeof head);
  http2_write(h, payload, size);
}

void http2_write(struct http2 *h, const uint8_t *data, size_t size) {
  if (!size) return;
  bytes_reserve(&h->out, size);
  memcpy(h->out.data + h->out.end, data, size);
  h->out.end += size;
}

bool http2_flush(struct http2 *h) {
  while (!h->failed && bytes_size(&h->out)) {
    ssize_t sent = send(h->fd, h->out.data + h->out.begin, bytes_size(&h->out), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno == EAGAIN) return true;
    if (sent < 0) return http2_fail(h, "writing: %s", strerror(errno));
    bytes_take(&h->out, sent);
  }
  return !h->failed;
}

bool http2_fail(struct http2 *h, const char *format, ...) {
  if (!h->failed) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(h->error, sizeof h->error, format, arguments);
    va_end(arguments);
  }
  h->failed = true;
  return false;
}

void bytes_reserve(struct bytes *b, size_t size) {
  if (b->capacity - b->end >= size) return;
  if (b->begin) memmove(b->data, b->data + b->begin, b->end - b->begin);
  b->end -= b->begin;
  b->begin = 0;
  if (b->capacity - b->end >= size) return;
  b->capacity = 2 * b->capacity + size;
  b->data = realloc(b->data, b->capacity);
  if (!b->data) abort();
}

void bytes_take(struct bytes *b, size_t size) {
  b->begin += size;
  if (b->begin == b->end) b->begin = b->end = 0;
}

void bytes_free(struct bytes *b) {
  free(b->data);
  memset(b, 0, sizeof *b);
}

size_t bytes_size(const struct bytes *b) { return b->end - b->begin; }
