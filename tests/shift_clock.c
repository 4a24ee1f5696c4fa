/* LD_PRELOAD: the wall clock jumps by up to three hours, back or forth, four times a second, the
   same in all processes. The monotonic clock goes on as it does. On with $SHIFT_CLOCK, or by call. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int on;

void shift_clock(int now) { on = now; }

__attribute__((constructor)) static void begin(void) { on = getenv("SHIFT_CLOCK") != NULL; }

static long shift(void) {
    struct timespec t;
    if (!on) return 0;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
    unsigned long quarter = t.tv_sec * 4 + t.tv_nsec / 250000000;
    return (long)(quarter * 2654435761UL % 21601) - 10800;
}

int clock_gettime(clockid_t clock, struct timespec *t) {
    int failed = syscall(SYS_clock_gettime, clock, t);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        t->tv_sec += shift();
    return failed;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, t, zone);
    if (!failed && t) t->tv_sec += shift();
    return failed;
}

time_t time(time_t *out) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
