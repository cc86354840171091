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
 * padded with zeros, columns too; rows are never padded.
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

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bf16(bf16 value) { return float_of((uint32_t)value << 16); }

/* Round to nearest, ties to even. A NaN stays one: adding to its bits could make it an infinity or a zero. */
static inline bf16 to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)(value == value ? rounded : 0x7fc0);
}

/* 2^x for x <= 0, to 2 units in the last place; 0 below 2^-126. A polynomial on [-1/2, 1/2] (Cephes' coefficients) and
 * the whole part put into the exponent: adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits. */
static inline float exp2_of_nonpositive(float x) {
    float clamped = x < -126.0f ? -126.0f : x;
    float shifted = clamped + 12582912.0f;
    float f = clamped - (shifted - 12582912.0f);
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    float result = p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
    return x < -126.0f ? 0.0f : result;
}

/* The sum and the largest of 16 lanes, always in this order. */
static inline float sum16(const float *lanes) {
    float sums[8];
    for (int i = 0; i < 8; i++) sums[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; i++) sums[i] += sums[i + 4];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

static inline float max16(const float *lanes) {
    float largest = lanes[0];
    for (int i = 1; i < 16; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

#endif
