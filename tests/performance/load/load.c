// Emulates the shims of many engines: sends what a script holds, when it is due, and times every answer.
//
// An open loop: a message is due whether or not earlier ones are answered, and its time counts from then, so a server
// that stalls is charged for all that was due meanwhile. With --closed each engine has one message in flight instead.
// One thread, no allocation per message. Ends by itself: after the last answer, --drain-seconds after the last message
// was due, or after --max-seconds.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/un.h>
#include <time.h>

#include "engine.h"
#include "process.h"

#define SECOND 1000000000LL
enum { MAX_EVENTS = 256, MAX_OPENING = 32, MAX_SERVERS = 64 };

// When a message of an engine is due.
struct entry {
  int64_t due_ns;
  uint32_t engine;
};

static struct sockaddr_storage address;
static socklen_t address_size;
static volatile sig_atomic_t stopped;
static pid_t servers[MAX_SERVERS];
static int num_servers;
static int64_t own_cpu_ns, server_cpu_ns, server_waited_ns;

// Starts the measured window, or ends it.
static void read_clocks(int sign) {
  own_cpu_ns = process_cpu_ns(0) + sign * own_cpu_ns;
  int64_t cpu_ns = 0, waited_ns = 0;
  for (int i = 0; i < num_servers; i++) {
    cpu_ns += process_cpu_ns(servers[i]);
    waited_ns += process_waited_ns(servers[i]);
  }
  server_cpu_ns = cpu_ns + sign * server_cpu_ns;
  server_waited_ns = waited_ns + sign * server_waited_ns;
}

static void on_signal(int number) { stopped = number; }

// Loopback and Unix sockets alone: this program is no tool against other machines.
static void parse_target(const char *target) {
  struct sockaddr_un *local = (struct sockaddr_un *)&address;
  struct sockaddr_in *inet = (struct sockaddr_in *)&address;
  if (!strncmp(target, "unix:", 5) && strlen(target + 5) < sizeof local->sun_path) {
    local->sun_family = AF_UNIX;
    strcpy(local->sun_path, target + 5);
    address_size = sizeof *local;
    return;
  }
  char host[64];
  int port;
  if (sscanf(target, "%63[0-9.]:%d", host, &port) == 2 && inet_pton(AF_INET, host, &inet->sin_addr) == 1 &&
      ntohl(inet->sin_addr.s_addr) >> 24 == 127) {
    inet->sin_family = AF_INET;
    inet->sin_port = htons(port);
    address_size = sizeof *inet;
    return;
  }
  fprintf(stderr, "load: target %s; allowed are 127.x.x.x:PORT and unix:/path\n", target);
  exit(2);
}

static void wait_events(int64_t until_ns) {
  struct epoll_event events[MAX_EVENTS];
  int64_t left = until_ns - now_ns();
  if (left > 0) {
    struct pollfd ready = {.fd = run.epoll_fd, .events = POLLIN};
    struct timespec timeout = {left / SECOND, left % SECOND};
    ppoll(&ready, 1, &timeout, NULL);
  }
  int count = epoll_wait(run.epoll_fd, events, MAX_EVENTS, 0);
  for (int i = 0; i < count; i++) engine_read(events[i].data.ptr);
}

// Connects all engines and opens their streams, a few at a time.
static void open_all(int64_t limit_ns) {
  for (uint32_t i = 0; i < run.script.engines && !stopped; i++) {
    engine_connect(&run.engines[i], (struct sockaddr *)&address, address_size);
    while (i + 1 - run.opened >= MAX_OPENING && now_ns() < limit_ns && !stopped) wait_events(now_ns() + SECOND / 100);
  }
  while (run.opened < run.script.engines && now_ns() < limit_ns && !stopped) wait_events(now_ns() + SECOND / 100);
  if (run.opened < run.script.engines) {
    fprintf(stderr, "load: %u of %u streams are open after the time that is allowed\n", run.opened, run.script.engines);
    exit(3);
  }
}

static int by_time(const void *left, const void *right) {
  int64_t a = ((const struct entry *)left)->due_ns, b = ((const struct entry *)right)->due_ns;
  return (a > b) - (a < b);
}

static struct entry *make_schedule(void) {
  struct entry *schedule = malloc((run.messages + 1) * sizeof *schedule);
  if (!schedule) abort();
  uint64_t at = 0;
  for (uint32_t i = 0; i < run.script.engines; i++) {
    const struct engine *e = &run.engines[i];
    for (uint32_t m = 0; m < e->script->count; m++)
      schedule[at++] = (struct entry){e->script->messages[m].due_ns + e->script->phase_ns, i};
  }
  qsort(schedule, run.messages, sizeof *schedule, by_time);
  return schedule;
}

static const char *run_open_loop(double drain_seconds, int64_t limit_ns) {
  struct entry *schedule = make_schedule();
  int64_t last_due = run.messages ? schedule[run.messages - 1].due_ns : 0;
  run.begin_ns = now_ns() + SECOND / 10;
  read_clocks(0);
  uint64_t next = 0;
  int64_t drained = run.begin_ns + last_due + (int64_t)(drain_seconds * SECOND);
  while (!stopped) {
    int64_t now = now_ns();
    for (; next < run.messages && run.begin_ns + schedule[next].due_ns <= now; next++) {
      struct engine *e = &run.engines[schedule[next].engine];
      e->due++;
      engine_pump(e);
    }
    if (next == run.messages && run.answered + run.lost == run.messages) return "answered";
    if (now >= drained) return "drained";
    if (now >= limit_ns) return "time";
    wait_events(next < run.messages ? run.begin_ns + schedule[next].due_ns : now + SECOND / 100);
  }
  return "signal";
}

static const char *run_closed_loop(int64_t limit_ns) {
  run.begin_ns = now_ns();
  read_clocks(0);
  for (uint32_t i = 0; i < run.script.engines; i++) {
    run.engines[i].due = run.engines[i].script->count;
    engine_pump(&run.engines[i]);
  }
  while (!stopped) {
    if (run.answered + run.lost == run.messages) return "answered";
    int64_t now = now_ns();
    if (now >= limit_ns) return "time";
    wait_events(now + SECOND / 100);
  }
  return "signal";
}

// Our side of every call is closed, and the server's status read: the engine ids are free at once.
static void close_all(void) {
  if (run.script.mode != MODE_STREAM) return;
  for (uint32_t i = 0; i < run.script.engines; i++) engine_close(&run.engines[i]);
  int64_t limit_ns = now_ns() + 5 * SECOND;
  for (bool open = true; open && now_ns() < limit_ns && !stopped;) {
    wait_events(now_ns() + SECOND / 100);
    open = false;
    for (struct engine *e = run.engines; e < run.engines + run.script.engines && !open; e++)
      open = !e->gone && e->h.call_open;
  }
}

static void write_times(const char *path) {
  FILE *file = fopen(path, "wb");
  if (!file) die(path);
  for (uint32_t i = 0; i < run.script.engines; i++) {
    struct engine *e = &run.engines[i];
    for (uint32_t m = 0; m < e->script->count; m++) {
      const struct message *message = &e->script->messages[m];
      int64_t row[5] = {i, message->steps, run.closed_loop ? e->sent_ns[m] : message->due_ns + e->script->phase_ns,
                        m < e->sent ? e->sent_ns[m] : -1, m < e->answered && message->steps ? e->answered_ns[m] : -1};
      fwrite(row, sizeof row, 1, file);
    }
  }
  if (fclose(file)) die(path);
}

int main(int count, char **values) {
  const char *target = NULL, *times = NULL, *answers_path = NULL;
  double max_seconds = 60, drain_seconds = 2;
  static const struct option options[] = {{"target", 1, 0, 't'},      {"times", 1, 0, 'o'},
                                          {"answers", 1, 0, 'a'},     {"closed", 0, 0, 'c'},
                                          {"max-seconds", 1, 0, 'm'}, {"drain-seconds", 1, 0, 'd'},
                                          {"server-pid", 1, 0, 'p'},  {0, 0, 0, 0}};
  for (int option; (option = getopt_long(count, values, "", options, NULL)) != -1;) {
    if (option == 't') target = optarg;
    else if (option == 'o') times = optarg;
    else if (option == 'a') answers_path = optarg;
    else if (option == 'c') run.closed_loop = true;
    else if (option == 'm') max_seconds = atof(optarg);
    else if (option == 'd') drain_seconds = atof(optarg);
    else if (option == 'p' && num_servers < MAX_SERVERS) servers[num_servers++] = atoi(optarg);
    else return 2;
  }
  if (!target || optind != count - 1 || max_seconds <= 0 || max_seconds > 3600) {
    fprintf(stderr, "usage: load SCRIPT --target ADDRESS [--closed] [--max-seconds 60, at most 3600] "
                    "[--drain-seconds 2] [--times FILE] [--answers FILE] [--server-pid PID]...\n");
    return 2;
  }
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  prctl(PR_SET_TIMERSLACK, 1);
  struct sigaction action = {.sa_handler = on_signal};
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGINT, &action, NULL);
  parse_target(target);
  run.script = read_script(values[optind]);
  if (answers_path && !(run.answers = fopen(answers_path, "wb"))) die(answers_path);
  run.engines = calloc(run.script.engines + 1, sizeof *run.engines);
  if (!run.engines) abort();
  for (uint32_t i = 0; i < run.script.engines; i++) {
    struct engine *e = &run.engines[i];
    e->script = &run.script.engine[i];
    run.messages += e->script->count;
    e->sent_ns = calloc(2 * (size_t)e->script->count + 1, sizeof *e->sent_ns);
    if (!e->sent_ns) abort();
    e->answered_ns = e->sent_ns + e->script->count;
  }
  if ((run.epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
  int64_t limit_ns = now_ns() + (int64_t)(max_seconds * SECOND);
  open_all(limit_ns);
  const char *end = run.closed_loop ? run_closed_loop(limit_ns) : run_open_loop(drain_seconds, limit_ns);
  int64_t wall_ns = now_ns() - run.begin_ns;
  read_clocks(-1);
  close_all();
  if (times) write_times(times);
  if (run.answers && fclose(run.answers)) die(answers_path);
  for (char *c = run.first_error; *c; c++)
    if (*c == '"' || *c == '\\' || *c < ' ') *c = '?';
  printf("{\"end\": \"%s\", \"engines\": %u, \"failed_engines\": %u, \"first_error\": \"%s\", \"messages\": %llu, "
         "\"sent\": %llu, \"answered\": %llu, \"begin_ns\": %lld, \"steps\": %llu, \"leases\": %llu, \"pushes\": %llu, "
         "\"window_stalls\": %llu, \"socket_stalls\": %llu, \"wall_ns\": %lld, \"last_answer_ns\": %lld, "
         "\"own_cpu_ns\": %lld, \"server_cpu_ns\": %lld, \"server_waited_ns\": %lld}\n",
         end, run.script.engines, run.failed, run.first_error, (unsigned long long)run.messages,
         (unsigned long long)run.sent, (unsigned long long)run.answered, (long long)run.begin_ns,
         (unsigned long long)run.steps, (unsigned long long)run.leases,
         (unsigned long long)run.pushes, (unsigned long long)run.window_stalls, (unsigned long long)run.socket_stalls,
         (long long)wall_ns, (long long)run.last_answer_ns, (long long)own_cpu_ns, (long long)server_cpu_ns,
         (long long)server_waited_ns);
  return 0;
}
