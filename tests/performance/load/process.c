#include "process.h"

#include <dirent.h>
#include <stdio.h>
#include <time.h>

int64_t process_cpu_ns(pid_t pid) {
  clockid_t clock;
  struct timespec t;
  if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &t)) return 0;
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int64_t process_waited_ns(pid_t pid) {
  char path[400];
  snprintf(path, sizeof path, "/proc/%d/task", pid);
  DIR *tasks = opendir(path);
  if (!tasks) return 0;
  int64_t total = 0;
  for (struct dirent *task; (task = readdir(tasks));) {
    if (task->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "/proc/%d/task/%s/schedstat", pid, task->d_name);
    FILE *file = fopen(path, "r");
    if (!file) continue;
    long long ran, waited;
    if (fscanf(file, "%lld %lld", &ran, &waited) == 2) total += waited;
    fclose(file);
  }
  closedir(tasks);
  return total;
}
