// An emulated engine: one connection, the messages it sends and the answers it gets.
#ifndef ENGINE_H
#define ENGINE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>

#include "http2.h"
#include "script.h"

struct engine {
  struct http2 h;
  const struct script_engine *script;
  uint32_t due, sent, answered;  // messages
  uint32_t steps;                // answers to message `answered` so far
  bool opened, wants_write, gone, stalled;
  int64_t *sent_ns, *answered_ns;  // of each message, 0 where it was not
};

// One run: what all engines share, and what they count.
struct run {
  struct script script;
  struct engine *engines;
  int epoll_fd;
  bool closed_loop;  // one message in flight on each connection
  FILE *answers;     // where every answer goes, or NULL
  int64_t begin_ns, last_answer_ns;
  uint64_t messages, lost, sent, answered, steps, leases, pushes, window_stalls, socket_stalls;
  uint32_t opened, failed;
  char first_error[ERROR_SIZE];
};

extern struct run run;

int64_t now_ns(void);
// Connects; a stream sends what it opens with.
void engine_connect(struct engine *e, const struct sockaddr *address, socklen_t size);
// Sends what is due as far as it may.
void engine_pump(struct engine *e);
// Reads what has come. A connection that fails is dropped, and its messages are lost.
void engine_read(struct engine *e);
// Closes our side of the call.
void engine_close(struct engine *e);
void die(const char *what);

#endif
