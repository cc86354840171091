/* A panel on AMX: 2 x 2 tiles of C, so that each tile of A and of B that is loaded is multiplied twice.
 *
 *   registers   C: 0 1     A: 4   (rows 0 to 15)     B: 6 7
 *                  2 3        5   (rows 16 to 31)
 *
 * With TANDEM_EMULATE_AMX, which only tests set, the tile instructions are functions in plain C (their amx_emulated.h). */
#ifndef TANDEM_PANEL_H
#define TANDEM_PANEL_H

#include "kernels.h"

#ifdef TANDEM_EMULATE_AMX
#include "amx_emulated.h"
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "transpose_avx512.h"
#define PANEL_NAME "amx"
#endif

#define PANEL_INT8_OFFSET 0
#define PANEL_BLOCKS_AHEAD 2

typedef bf16 a_bf16; /* A's elements: as they are */
typedef int8_t a_int8;

/* GCC does not know that tile loads read memory: what was written before must not be held back or dropped. */
#define COMPILER_BARRIER(pointer) __asm__ volatile("" ::"r"(pointer) : "memory")

/* The tiles' shapes: LDTILECFG's memory operand, palette 1. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} ALIGNED;

static _Thread_local int configured_rows; /* 0: not yet, in this thread */

static void configure_tiles(int rows) {
    if (configured_rows == rows) return;
    struct tile_config config = {.palette = 1};
    const int upper = rows < 16 ? rows : 16;
    const int lower = rows > 16 ? rows - 16 : 16; /* not used with fewer: any shape that is valid */
    const int shape[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int tile = 0; tile < 8; tile++) {
        config.bytes_per_row[tile] = LINE;
        config.rows[tile] = (uint8_t)shape[tile];
    }
    COMPILER_BARRIER(&config);
    _tile_loadconfig(&config);
    configured_rows = rows;
}

/* The panel, with DP the dot product that fits the type. */
#define AMX_PANEL(DP)                                                    \
    const char *x = (const char *)a, *w = (const char *)b;               \
    COMPILER_BARRIER(a);                                                 \
    for (int64_t block = 0; block < num_blocks; block++) {               \
        for (int line = 0; line < ahead.lines; line++, ahead.next += LINE) \
            __builtin_prefetch(ahead.next, 0, 2);                        \
        _tile_loadd(6, w, LINE);                                         \
        _tile_loadd(7, w + B_BLOCK / 2, LINE);                           \
        _tile_loadd(4, x, LINE);                                         \
        DP(0, 4, 6);                                                     \
        DP(1, 4, 7);                                                     \
        if (rows > 16) {                                                 \
            _tile_loadd(5, x + 16 * LINE, LINE);                         \
            DP(2, 5, 6);                                                 \
            DP(3, 5, 7);                                                 \
        }                                                                \
        x += (ptrdiff_t)rows * LINE;                                     \
        w += B_BLOCK;                                                    \
    }

static void zero_tiles(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static void store_tiles(void *c, int rows) {
    char *out = c;
    _tile_stored(0, out, COLUMNS * 4);
    _tile_stored(1, out + LINE, COLUMNS * 4);
    if (rows > 16) {
        _tile_stored(2, out + 16 * COLUMNS * 4, COLUMNS * 4);
        _tile_stored(3, out + 16 * COLUMNS * 4 + LINE, COLUMNS * 4);
    }
}

static void start_tiles(const void *c, int rows, bool accumulate) {
    configure_tiles(rows);
    zero_tiles();
    if (!accumulate) return;
    const char *sums = c;
    COMPILER_BARRIER(c);
    _tile_loadd(0, sums, COLUMNS * 4);
    _tile_loadd(1, sums + LINE, COLUMNS * 4);
    if (rows > 16) {
        _tile_loadd(2, sums + 16 * COLUMNS * 4, COLUMNS * 4);
        _tile_loadd(3, sums + 16 * COLUMNS * 4 + LINE, COLUMNS * 4);
    }
}

/* C [rows][32] (+)= A B: see kernels.h for A and B. C is replaced unless `accumulate`. */
static void panel_bf16(float *c, const a_bf16 *a, const bf16 *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    start_tiles(c, rows, accumulate);
    AMX_PANEL(_tile_dpbf16ps)
    store_tiles(c, rows);
}

/* The same in whole numbers. */
static void panel_int8(int32_t *c, const a_int8 *a, const int8_t *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    start_tiles(c, rows, accumulate);
    AMX_PANEL(_tile_dpbssd)
    store_tiles(c, rows);
}

/* Around the tasks that a thread does: others (torch) use the tiles too, and change their shapes. */
static void panel_begin(void) { configured_rows = 0; }

static void panel_end(void) {
    if (configured_rows != 0) _tile_release();
    configured_rows = 0;
}

/* Make the processor's tiles usable; false if the system does not grant them. */
static bool panel_start(void) {
#ifdef TANDEM_EMULATE_AMX
    return true;
#else
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

#endif
