// What the kernel knows of other processes.
#ifndef PROCESS_H
#define PROCESS_H

#include <stdint.h>
#include <sys/types.h>

// CPU time so far, all threads; 0 where there is no such process.
int64_t process_cpu_ns(pid_t pid);
// Time its threads were ready to run while others had the core.
int64_t process_waited_ns(pid_t pid);

#endif
