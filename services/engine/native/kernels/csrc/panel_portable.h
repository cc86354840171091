/* A panel in plain C: for sanitizers, for tests, and the yardstick that the fast ones are held to at start.
 *
 * The sum over a block follows Intel's TDPBF16PS: even and odd elements apart, each with fused multiply-adds, then added
 * to each other and to C, denormals flushed at every step. */
#ifndef TANDEM_PANEL_H
#define TANDEM_PANEL_H

#include "kernels.h"
#include "transpose_portable.h"

#define PANEL_NAME "portable"
#define PANEL_INT8_OFFSET 0 /* added to int8 activations before they are multiplied */
#define PANEL_BLOCKS_AHEAD 2

typedef bf16 a_bf16; /* A's elements: as they are */
typedef int8_t a_int8;

static inline float flush(float value) { return fabsf(value) < FLT_MIN ? copysignf(0.0f, value) : value; }

static inline float dot_bf16(const bf16 *row, const bf16 *column, ptrdiff_t stride) {
    float even = 0, odd = 0;
    for (int pair = 0; pair < BF16_DEPTH / 2; pair++, row += 2, column += stride) {
        even = flush(fmaf(flush(from_bf16(row[0])), flush(from_bf16(column[0])), even));
        odd = flush(fmaf(flush(from_bf16(row[1])), flush(from_bf16(column[1])), odd));
    }
    return flush(even + odd);
}

/* C [rows][32] (+)= A B: see kernels.h for A and B. C is replaced unless `accumulate`. */
static void panel_bf16(float *c, const a_bf16 *a, const bf16 *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    (void)ahead;
    if (!accumulate) memset(c, 0, sizeof(float) * COLUMNS * (size_t)rows);
    for (int64_t block = 0; block < num_blocks; block++, b += B_BLOCK / 2)
        for (int row = 0; row < rows; row++, a += BF16_DEPTH)
            for (int column = 0; column < COLUMNS; column++) {
                const bf16 *tile = b + (column / 16) * 512 + (column % 16) * 2;
                c[row * COLUMNS + column] = flush(c[row * COLUMNS + column] + dot_bf16(a, tile, 32));
            }
}

/* The same in whole numbers. */
static void panel_int8(int32_t *c, const a_int8 *a, const int8_t *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    (void)ahead;
    if (!accumulate) memset(c, 0, sizeof(int32_t) * COLUMNS * (size_t)rows);
    for (int64_t block = 0; block < num_blocks; block++, b += B_BLOCK)
        for (int row = 0; row < rows; row++, a += INT8_DEPTH)
            for (int column = 0; column < COLUMNS; column++) {
                const int8_t *tile = b + (column / 16) * 1024 + (column % 16) * 4;
                for (int k = 0; k < INT8_DEPTH; k++) c[row * COLUMNS + column] += a[k] * tile[k / 4 * 64 + k % 4];
            }
}

/* Around the tasks that a thread does. */
static void panel_begin(void) {}
static void panel_end(void) {}

/* Make the processor's tiles usable; false if the system does not grant them. */
static bool panel_start(void) { return true; }

#endif
