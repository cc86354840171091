/* Helpers: threads at the lowest priority (SCHED_IDLE) that multiply panels of weights on processors which are idle just
 * now, and are taken off them, at any instruction, by whoever else wants to run.
 *
 * So nobody may wait for one, and none may write what others read. A helper computes a panel's sums into a room of its
 * own; the caller finishes them from there, as it finishes its own. Panels that nobody has brought when all are given out
 * are the caller's: it waits for as long as one of its own took, then computes them itself. A panel's sums are a function
 * of the operands alone, so no bit shows who computed it, nor how often.
 *
 *   offer    written by the caller while it is closed, then opened: `ticket` = call's number << 32 | next panel
 *   room     EMPTY --helper--> DONE (call's number, panel, sums) --caller--> EMPTY
 *
 * A helper that was asleep in the midst of a panel wakes up to operands of a later call: its room has the earlier number,
 * and nobody looks at the sums. What it reads must still be mapped: `tandem_wait_for_helpers` says when none reads. */
#ifndef TANDEM_HELPERS_H
#define TANDEM_HELPERS_H

#include <semaphore.h>
#include <time.h>
#include <unistd.h>

#include "threads.h"

enum {
    MAX_HELPERS = 16,
    ROOMS = 2,                /* of a helper: it goes on in one while the other waits for the caller */
    MAX_PACKED_ROWS = 256,    /* sums of a panel take 32 KiB */
    MAX_HELPED_PANELS = 8192, /* of one projection */
    HELPED_ROWS = 64,         /* with fewer, memory sets the pace, and a second processor gains little */
    HELPER_SPINS = 20 * SPINS,/* what lies between two projections is longer than between two calls of the pool */
    CLOSED = 1 << 30,         /* in place of the next panel */
};

union sums {
    float floats[MAX_PACKED_ROWS * COLUMNS];
    int32_t ints[MAX_PACKED_ROWS * COLUMNS]; /* for int8 */
};

/* What a panel's sums are made of. */
struct operands {
    const char *packed; /* rows of x */
    const char *panels; /* of W */
    int64_t num_rows, num_blocks;
    bool is_int8;
};

/* Make the sums of a panel; false, and nothing, where its call is no more that of `number` (0: of whoever calls). */
typedef bool (*multiply_function)(const struct operands *operands, int64_t panel, union sums *sums, int64_t number);

enum room_state { EMPTY, DONE };

struct room {
    union sums sums ALIGNED;
    int64_t number, panel;
    atomic_int state;
};

static struct {
    pthread_mutex_t starting;
    int num_helpers; /* that there are, of whom the first `num_wanted` help */
    atomic_int num_wanted;
    multiply_function multiply;
    struct room *rooms; /* [MAX_HELPERS][ROOMS] */
    sem_t calls[MAX_HELPERS];
    atomic_bool is_asleep[MAX_HELPERS];
    atomic_int num_reading;
    /* The offer. A helper may read it while the next one is made, and looks at the ticket again before it believes it. */
    _Atomic(const char *) packed, panels;
    atomic_int_fast64_t num_rows, num_blocks, num_panels;
    atomic_bool is_int8;
    atomic_int_fast64_t ticket;
    int64_t number; /* of the newest call */
    atomic_int_fast64_t num_helped, num_redone; /* panels that helpers brought, and that the caller did not wait for */
} help = {.starting = PTHREAD_MUTEX_INITIALIZER, .ticket = CLOSED};

static bool is_offered(int64_t number) { return atomic_load(&help.ticket) >> 32 == number; }

#ifdef TANDEM_STALL_HELPERS
/* For tests: sleep for up to two milliseconds now and then, as a thread that is taken off its processor. */
static void stall(void) {
    static _Thread_local uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    if (state >> 30 == 0) nanosleep(&(struct timespec){0, (state >> 9) % 2000000}, NULL);
}
#else
static inline void stall(void) {}
#endif

/* Do one panel of the call that is offered; false where none is left. */
static bool help_once(struct room *room) {
    if ((atomic_load(&help.ticket) & 0xffffffff) >= atomic_load(&help.num_panels)) return false;
    bool has_found = false;
    atomic_fetch_add(&help.num_reading, 1);
    stall();
    const int64_t ticket = atomic_fetch_add(&help.ticket, 1), number = ticket >> 32, panel = ticket & 0xffffffff;
    stall();
    const int64_t num_panels = atomic_load(&help.num_panels);
    const struct operands operands = {
        atomic_load(&help.packed),     atomic_load(&help.panels),  atomic_load(&help.num_rows),
        atomic_load(&help.num_blocks), atomic_load(&help.is_int8),
    };
    if (panel < num_panels && is_offered(number)) {
        has_found = true;
        if (help.multiply(&operands, panel, &room->sums, number)) {
            room->number = number;
            room->panel = panel;
            stall();
            atomic_store(&room->state, DONE);
        }
    }
    atomic_fetch_sub(&help.num_reading, 1);
    return has_found;
}

/* Run on others' processors, where the process is kept to some and there are others. */
static void leave_own_processors(void) {
#ifdef __linux__
    cpu_set_t own, others;
    if (sched_getaffinity(0, sizeof own, &own) != 0) return;
    CPU_ZERO(&others);
    const long count = sysconf(_SC_NPROCESSORS_CONF);
    for (int i = 0; i < count && i < CPU_SETSIZE; i++)
        if (!CPU_ISSET(i, &own)) CPU_SET(i, &others);
    if (CPU_COUNT(&others) > 0) (void)sched_setaffinity(0, sizeof others, &others); /* refused: it stays */
#endif
}

static bool take_lowest_priority(void) {
#ifdef SCHED_IDLE
    const struct sched_param none = {0};
    return pthread_setschedparam(pthread_self(), SCHED_IDLE, &none) == 0;
#else
    return false;
#endif
}

static void *help_out(void *argument) {
    const int helper = (int)(intptr_t)argument;
    struct room *rooms = help.rooms + helper * ROOMS;
    if (!take_lowest_priority()) return NULL;
    leave_own_processors();
    panel_begin();
    for (int spin = 0;; spin++) {
        struct room *room = NULL;
        for (int i = 0; i < ROOMS && room == NULL; i++)
            if (atomic_load(&rooms[i].state) == EMPTY) room = &rooms[i];
        if (room != NULL && helper < atomic_load(&help.num_wanted) && help_once(room)) {
            spin = 0;
        } else if (spin < HELPER_SPINS) {
            pause_briefly();
        } else {
            atomic_store(&help.is_asleep[helper], true);
            while (sem_wait(&help.calls[helper]) != 0) {
            }
            spin = 0;
        }
    }
    return NULL;
}

/* Have so many helpers from now on; fewer if the system refuses. Returns how many. */
static int want_helpers(int num_helpers, multiply_function multiply) {
    num_helpers = num_helpers > MAX_HELPERS ? MAX_HELPERS : num_helpers;
    pthread_mutex_lock(&help.starting);
    if (help.rooms == NULL && num_helpers > 0) help.rooms = aligned_alloc(LINE, sizeof(struct room) * MAX_HELPERS * ROOMS);
    if (help.rooms == NULL) num_helpers = 0;
    help.multiply = multiply;
    while (help.num_helpers < num_helpers) {
        const int helper = help.num_helpers;
        for (int i = 0; i < ROOMS; i++) atomic_init(&help.rooms[helper * ROOMS + i].state, EMPTY);
        pthread_t thread;
        if (sem_init(&help.calls[helper], 0, 0) != 0) break;
        if (pthread_create(&thread, NULL, help_out, (void *)(intptr_t)helper) != 0) break;
        pthread_detach(thread);
        help.num_helpers++;
    }
    num_helpers = num_helpers < help.num_helpers ? num_helpers : help.num_helpers;
    atomic_store(&help.num_wanted, num_helpers);
    pthread_mutex_unlock(&help.starting);
    return num_helpers;
}

/* Offer all panels of a product; returns the call's number. */
static int64_t open_offer(const struct operands *operands, int64_t num_panels) {
    const int64_t number = help.number = help.number % 0x7fffffff + 1;
    atomic_store(&help.ticket, number << 32 | CLOSED);
    atomic_store(&help.packed, operands->packed);
    atomic_store(&help.panels, operands->panels);
    atomic_store(&help.num_rows, operands->num_rows);
    atomic_store(&help.num_blocks, operands->num_blocks);
    atomic_store(&help.is_int8, operands->is_int8);
    atomic_store(&help.num_panels, num_panels);
    atomic_store(&help.ticket, number << 32);
    for (int i = 0; i < atomic_load(&help.num_wanted); i++)
        if (atomic_exchange(&help.is_asleep[i], false)) sem_post(&help.calls[i]);
    return number;
}

/* Whoever is at a panel still may leave it. */
static void close_offer(void) { atomic_store(&help.ticket, CLOSED); }

/* Return when no helper reads operands any more; between calls. After that they may be freed. */
EXPORT void tandem_wait_for_helpers(void) {
    while (atomic_load(&help.num_reading) > 0) sched_yield();
}

/* Panels that helpers have brought, and that the caller computed instead of one, since the start. */
EXPORT void tandem_count_helped(int64_t *num_helped, int64_t *num_redone) {
    *num_helped = atomic_load(&help.num_helped);
    *num_redone = atomic_load(&help.num_redone);
}

static inline double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif
