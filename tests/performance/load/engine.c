#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "protobuf.h"

enum { RAW_REPLY = 16 };

struct run run;

int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void die(const char *what) {
  fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
  exit(2);
}

static void drop(struct engine *e) {
  if (e->gone) return;
  e->gone = true;
  run.lost += e->script->count - e->answered;
  if (!run.failed++) snprintf(run.first_error, sizeof run.first_error, "%.*s", ERROR_SIZE - 1, e->h.error);
  if (!e->opened) run.opened++;  // no longer waited for
  e->opened = true;
  close(e->h.fd);
}

static void watch_writes(struct engine *e) {
  bool wanted = bytes_size(&e->h.out) > 0;
  if (e->gone || wanted == e->wants_write) return;
  if (wanted) run.socket_stalls++;
  e->wants_write = wanted;
  struct epoll_event event = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0), .data.ptr = e};
  if (epoll_ctl(run.epoll_fd, EPOLL_CTL_MOD, e->h.fd, &event)) die("epoll_ctl");
}

static bool may_send(struct engine *e, const struct message *m) {
  if (run.script.mode == MODE_RAW) return true;
  if (run.script.mode == MODE_UNARY) return !e->h.call_open;
  bool may = http2_may_send(&e->h, m->size);
  if (!may && !e->stalled) run.window_stalls++;
  e->stalled = !may;
  return may;
}

static void send_message(struct engine *e, const struct message *m) {
  if (run.script.mode == MODE_STREAM) {
    http2_send_message(&e->h, NULL, 0, m->data, m->size, false);
  } else if (run.script.mode == MODE_UNARY) {
    http2_open_call(&e->h, run.script.block, run.script.block_size);
    http2_send_message(&e->h, e->script->begin, e->script->begin_size, m->data, m->size, true);
  } else {
    uint32_t size = sizeof m->step_index + m->size;
    http2_write(&e->h, (const uint8_t *)&size, sizeof size);
    http2_write(&e->h, (const uint8_t *)&m->step_index, sizeof m->step_index);
    http2_write(&e->h, m->data, m->size);
  }
}

// Messages that ask for nothing are answered as soon as they are sent.
static void pass_over_counts(struct engine *e) {
  while (e->answered < e->sent && !e->script->messages[e->answered].steps) e->answered++, run.answered++;
}

// Sends what is due as far as it may.
void engine_pump(struct engine *e) {
  while (!e->gone && e->opened && e->sent < e->due && (!run.closed_loop || e->sent == e->answered)) {
    const struct message *m = &e->script->messages[e->sent];
    if (!may_send(e, m)) break;
    e->sent_ns[e->sent] = now_ns() - run.begin_ns;
    send_message(e, m);
    e->sent++;
    run.sent++;
    pass_over_counts(e);
  }
  if (!e->gone && !http2_flush(&e->h)) drop(e);
  watch_writes(e);
}

static void take_reply(struct engine *e, uint64_t step_index, bool lease) {
  pass_over_counts(e);
  if (e->answered >= e->sent) {
    http2_fail(&e->h, "an answer to step %llu that was not asked for", (unsigned long long)step_index);
    return;
  }
  const struct message *m = &e->script->messages[e->answered];
  if (step_index != m->step_index + e->steps) {
    http2_fail(&e->h, "an answer to step %llu where step %llu was due", (unsigned long long)step_index,
               (unsigned long long)m->step_index + e->steps);
    return;
  }
  run.steps++;
  run.leases += lease;
  if (++e->steps < m->steps) return;
  e->steps = 0;
  e->answered_ns[e->answered] = run.last_answer_ns = now_ns() - run.begin_ns;
  e->answered++;
  run.answered++;
  pass_over_counts(e);
}

static void take_step_reply(struct engine *e, const uint8_t *reply, size_t size) {
  const uint8_t *at = reply, *end = reply + size, *data;
  uint32_t number;
  uint64_t value, step_index = 0;
  bool lease = false;
  while (at < end) {
    if (!take_field(&at, end, &number, &value, &data)) {
      http2_fail(&e->h, "an answer that is no protobuf message");
      return;
    }
    if (number == 1) step_index = value;
    if (number == 12) lease = true;
  }
  if (run.answers) {
    uint32_t head[2] = {e - run.engines, size};
    fwrite(head, sizeof head, 1, run.answers);
    fwrite(reply, size, 1, run.answers);
  }
  take_reply(e, step_index, lease);
}

// StreamStepsResponse {opened = 1, replies = 2, new_generation = 3} or SampleStepResponse {replies = 1}.
static void take_response(void *owner, const uint8_t *message, size_t size) {
  struct engine *e = owner;
  const uint8_t *at = message, *end = message + size, *data;
  uint32_t number;
  uint64_t value;
  while (at < end && !e->h.failed) {
    if (!take_field(&at, end, &number, &value, &data)) {
      http2_fail(&e->h, "a response that is no protobuf message");
    } else if (number == (run.script.mode == MODE_UNARY ? 1 : 2)) {
      take_step_reply(e, data, value);
    } else if (number == 1 && run.script.mode == MODE_STREAM && !e->opened) {
      e->opened = true;
      run.opened++;
    } else if (number == 3 && run.script.mode == MODE_STREAM) {
      run.pushes++;
    }
  }
}

static bool read_raw(struct engine *e) {
  struct bytes *in = &e->h.in;
  bytes_reserve(in, 4096);
  ssize_t got = recv(e->h.fd, in->data + in->end, in->capacity - in->end, 0);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  if (got <= 0) return http2_fail(&e->h, "the server closed the connection");
  in->end += got;
  for (; bytes_size(in) >= RAW_REPLY && !e->h.failed; bytes_take(in, RAW_REPLY)) {
    uint64_t step_index;
    memcpy(&step_index, in->data + in->begin, sizeof step_index);
    take_reply(e, step_index, false);
  }
  return !e->h.failed;
}

void engine_connect(struct engine *e, const struct sockaddr *address, socklen_t size) {
  int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) die("socket");
  while (connect(fd, address, size))
    if (errno != EINTR && errno != EAGAIN) die("connecting to the server");
  if (address->sa_family == AF_INET) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  http2_begin(&e->h, fd, run.script.mode == MODE_RAW);
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = e};
  if (epoll_ctl(run.epoll_fd, EPOLL_CTL_ADD, fd, &event)) die("epoll_ctl");
  if (run.script.mode == MODE_STREAM) {
    http2_open_call(&e->h, run.script.block, run.script.block_size);
    http2_send_message(&e->h, NULL, 0, e->script->begin, e->script->begin_size, false);
  } else {
    e->opened = true;
    run.opened++;
  }
  engine_pump(e);
}

void engine_read(struct engine *e) {
  if (e->gone) return;
  bool fine = run.script.mode == MODE_RAW ? read_raw(e) : http2_read(&e->h, take_response, e);
  if (!fine) drop(e);
  engine_pump(e);
}

void engine_close(struct engine *e) {
  if (e->gone || !e->h.call_open) return;
  // What was due and not sent stays unsent: no message may follow the end of our side.
  e->due = e->sent;
  http2_half_close(&e->h);
  engine_pump(e);
}
