/* A pool of threads that share out the tasks of one call. Which thread runs a task never shows in the result.
 *
 * The caller works too, and is the only one with num_threads == 1. Idle threads spin for some microseconds, since a
 * model's step is hundreds of calls, then sleep. A second caller at the same time does its work alone. */
#ifndef TANDEM_THREADS_H
#define TANDEM_THREADS_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "kernels.h"

enum { MAX_THREADS = 256, SPINS = 4000 };

/* Does task `index`; `thread` (0 to num_threads - 1) names a share of the workspace that nobody else uses meanwhile. */
typedef void (*task_function)(void *job, int64_t index, int thread);

static struct {
    pthread_mutex_t callers; /* held by whoever uses the pool */
    pthread_mutex_t mutex;
    pthread_cond_t woken;
    int num_workers;
    /* The call in progress: written by the caller before `call` is raised, read by workers after. */
    task_function function;
    void *job;
    int64_t num_tasks;
    int num_wanted; /* workers 1 to num_wanted - 1 take part */
    atomic_int_fast64_t next_task;
    atomic_int num_busy; /* workers that have not ended this call */
    atomic_uint call;
} pool = {.callers = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER, .woken = PTHREAD_COND_INITIALIZER};

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_tasks(int thread) {
    panel_begin();
    for (;;) {
        int64_t index = atomic_fetch_add(&pool.next_task, 1);
        if (index >= pool.num_tasks) break;
        pool.function(pool.job, index, thread);
    }
    panel_end();
}

static void *work(void *argument) {
    const int thread = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool.call) == seen; spin++) pause_briefly();
        if (atomic_load(&pool.call) == seen) {
            pthread_mutex_lock(&pool.mutex);
            while (atomic_load(&pool.call) == seen) pthread_cond_wait(&pool.woken, &pool.mutex);
            pthread_mutex_unlock(&pool.mutex);
        }
        seen = atomic_load(&pool.call);
        if (thread < pool.num_wanted) take_tasks(thread);
        atomic_fetch_sub(&pool.num_busy, 1);
    }
    return NULL;
}

/* Have `num_threads - 1` workers; fewer if the system refuses. */
static int start_workers(int num_threads) {
    while (pool.num_workers < num_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)(pool.num_workers + 1)) != 0) break;
        pthread_detach(thread);
        pool.num_workers++;
    }
    return pool.num_workers + 1 < num_threads ? pool.num_workers + 1 : num_threads;
}

/* Run tasks 0 to num_tasks - 1 on up to `num_threads` threads; returns when all are done. */
static void run_tasks(task_function function, void *job, int64_t num_tasks, int num_threads) {
    num_threads = num_threads > MAX_THREADS ? MAX_THREADS : num_threads;
    if (num_threads <= 1 || num_tasks <= 1 || pthread_mutex_trylock(&pool.callers) != 0) {
        panel_begin();
        for (int64_t index = 0; index < num_tasks; index++) function(job, index, 0);
        panel_end();
        return;
    }
    pool.num_wanted = start_workers(num_threads);
    pool.function = function;
    pool.job = job;
    pool.num_tasks = num_tasks;
    atomic_store(&pool.next_task, 0);
    atomic_store(&pool.num_busy, pool.num_workers);
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.call, 1);
    pthread_cond_broadcast(&pool.woken);
    pthread_mutex_unlock(&pool.mutex);
    take_tasks(0);
    for (int spin = 0; atomic_load(&pool.num_busy) > 0; spin++) {
        pause_briefly();
        if (spin % SPINS == SPINS - 1) sched_yield(); /* a worker may wait for this very core */
    }
    pthread_mutex_unlock(&pool.callers);
}

#endif
