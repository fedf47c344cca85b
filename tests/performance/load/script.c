#include "script.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC "SOLOAD2\n"

struct reader {
  const uint8_t *at, *end;
};

static const void *take(struct reader *r, size_t size) {
  if ((size_t)(r->end - r->at) < size) {
    fprintf(stderr, "load: the script ends early\n");
    exit(2);
  }
  const void *found = r->at;
  r->at += size;
  return found;
}

static uint32_t take32(struct reader *r) {
  uint32_t value;
  memcpy(&value, take(r, sizeof value), sizeof value);
  return value;
}

static uint64_t take64(struct reader *r) {
  uint64_t value;
  memcpy(&value, take(r, sizeof value), sizeof value);
  return value;
}

static void *allocate(size_t count, size_t size) {
  void *found = calloc(count ? count : 1, size);
  if (!found) abort();
  return found;
}

struct script read_script(const char *path) {
  int fd = open(path, O_RDONLY);
  struct stat status;
  if (fd < 0 || fstat(fd, &status) < 0) {
    perror(path);
    exit(2);
  }
  void *mapped = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
  close(fd);
  if (mapped == MAP_FAILED) {
    perror(path);
    exit(2);
  }
  struct reader r = {mapped, (const uint8_t *)mapped + status.st_size};
  if (memcmp(take(&r, strlen(MAGIC)), MAGIC, strlen(MAGIC))) {
    fprintf(stderr, "load: %s is no script of this version\n", path);
    exit(2);
  }
  struct script s;
  s.mode = take32(&r);
  s.sequences = take32(&r);
  s.engines = take32(&r);
  s.block_size = take32(&r);
  s.block = take(&r, s.block_size);
  s.sequence = allocate(s.sequences, sizeof *s.sequence);
  s.engine = allocate(s.engines, sizeof *s.engine);
  for (uint32_t i = 0; i < s.sequences; i++) {
    struct sequence *q = &s.sequence[i];
    q->count = take32(&r);
    q->messages = allocate(q->count, sizeof *q->messages);
    for (uint32_t m = 0; m < q->count; m++) {
      struct message *message = &q->messages[m];
      message->due_ns = take64(&r);
      message->step_index = take64(&r);
      message->steps = take32(&r);
      message->size = take32(&r);
      message->data = take(&r, message->size);
    }
  }
  for (uint32_t i = 0; i < s.engines; i++) {
    struct script_engine *e = &s.engine[i];
    e->sequence = take32(&r);
    if (e->sequence >= s.sequences) {
      fprintf(stderr, "load: engine %u has sequence %u of %u\n", i, e->sequence, s.sequences);
      exit(2);
    }
    uint32_t first = take32(&r), length = s.sequence[e->sequence].count;
    e->count = take32(&r);
    if (first > length || e->count > length - first) {
      fprintf(stderr, "load: engine %u has %u messages from %u on, of %u\n", i, e->count, first, length);
      exit(2);
    }
    e->messages = s.sequence[e->sequence].messages + first;
    e->phase_ns = take64(&r);
    e->begin_size = take32(&r);
    e->begin = take(&r, e->begin_size);
  }
  return s;
}
