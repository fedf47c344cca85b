// What is to be sent, written by script.py: sequences of encoded messages, and the engines that send them.
#ifndef SCRIPT_H
#define SCRIPT_H

#include <stdint.h>

// stream: one StreamSteps call per engine. unary: one SampleStep call per message, one at a time. raw: length, step
// index and message on a bare socket, answered with step index and latency.
enum mode { MODE_STREAM = 0, MODE_UNARY = 1, MODE_RAW = 2 };

struct message {
  int64_t due_ns;       // after the engine's phase; closed loops do not look at it
  uint64_t step_index;  // of its first step, the others follow
  uint32_t steps;       // answers it asks for; 0: counts alone
  uint32_t size;
  const uint8_t *data;
};

struct sequence {
  uint32_t count;
  struct message *messages;
};

struct script_engine {
  uint32_t sequence;
  uint32_t count;                  // the messages it sends, consecutive ones of its sequence
  const struct message *messages;
  int64_t phase_ns;
  uint32_t begin_size;             // stream: the opening message; unary: goes before every message
  const uint8_t *begin;
};

struct script {
  enum mode mode;
  uint32_t block_size;
  const uint8_t *block;  // the encoded request headers
  uint32_t sequences, engines;
  struct sequence *sequence;
  struct script_engine *engine;
};

// Ends the process with a sentence where the file is not what script.py writes.
struct script read_script(const char *path);

#endif
