/* The CPU engine's kernels: what they share, and how operands are packed.
 *
 * Everything is built on one primitive, a panel (panel_*.h has its implementations): up to 32 rows of A times 32 columns
 * of B, over any number of blocks of depth. A projection is panels over its weights; attention is panels of queries over
 * keys, then of weights over values.
 *
 *            A: rows as they are                              B: "VNNI", depth in pairs
 *
 *        |<-- 64 bytes -->|                         column     0      1           15
 *   row 0 | k0 k1 ... k31 |                    pair 0      | k0 k1 | k0 k1 |...| k0 k1 |   one dword each,
 *   row 1 | k0 k1 ... k31 |                    pair 1      | k2 k3 | k2 k3 |...| k2 k3 |   64 bytes a line,
 *    ...                                        ...                                        16 lines: a tile, 1 KiB
 *   row r-1                                    pair 15     |k30 k31|...            |
 *
 *   A of a panel: [depth / 32][rows][32]       B of a panel: [depth / 32][2 tiles of 16 columns][16 pairs][16][2]
 *
 * That is for bfloat16. For int8 a block is 64 deep, and "pair" is four bytes: the 64-byte geometry is the same. Depth is
 * padded with zeros, columns too; rows are never padded. On AVX2 A is widened (widening.h): its rows take twice the bytes.
 *
 * Why results do not depend on what else is in a batch: each element of C is one sum, over the blocks in order, by a
 * chain of operations that no other row or column takes part in. Threads share out whole elements, never a sum.
 */
#ifndef TANDEM_KERNELS_H
#define TANDEM_KERNELS_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define ALIGNED __attribute__((aligned(64)))

enum {
    ROWS = 32,     /* of a panel, at most */
    COLUMNS = 32,  /* of a panel, always */
    LINE = 64,     /* bytes of depth in a block */
    BF16_DEPTH = LINE / 2,
    INT8_DEPTH = LINE,
    B_BLOCK = COLUMNS * LINE, /* bytes of B per block of depth */
};

typedef uint16_t bf16;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bf16(bf16 value) { return float_of((uint32_t)value << 16); }

/* What a panel asks memory for on the side, while it computes: for each block of depth so many of the lines that come
 * next. Weights stream from memory, and arrive at an even pace so. 0 lines: nothing. */
struct ahead {
    const char *next;
    int lines;
};

#endif
