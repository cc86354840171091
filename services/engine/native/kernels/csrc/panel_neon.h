/* A panel on ARM's NEON, which every 64-bit ARM processor has. Its sums are those of panel_portable.h, bit for bit but for
 * denormals: over a block even and odd elements apart, each in a chain of fused multiply-adds, then added to each other
 * and to C.
 *
 * Dwords of B are widened in registers: bfloat16 by a shift and a mask; products of bytes fit 16 bits, of which pairs are
 * added into 32. Thirty-two registers hold what three rows and a tile of 16 columns need. */
#ifndef TANDEM_PANEL_H
#define TANDEM_PANEL_H

#include <arm_neon.h>

#include "kernels.h"
#include "transpose_portable.h"

#define PANEL_NAME "neon"
#define PANEL_INT8_OFFSET 0
#define PANEL_BLOCKS_AHEAD 2

typedef bf16 a_bf16; /* A's elements: as they are */
typedef int8_t a_int8;

enum { ROWS_AT_ONCE = 3 };

/* Unrolled, since the count is a constant wherever this is inlined. */
#define EACH(index, count) _Pragma("GCC unroll 4") for (int index = 0; index < (count); index++)

static inline __attribute__((always_inline)) uint32_t dword(const void *from) {
    uint32_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* One tile of 16 columns for `rows` rows. */
static inline __attribute__((always_inline)) void rows_bf16(float *c, const char *a, const char *b, int64_t num_blocks,
                                                            ptrdiff_t a_block, bool accumulate, const int rows) {
    float32x4_t sums[ROWS_AT_ONCE][4];
    EACH(row, rows) EACH(i, 4) sums[row][i] = accumulate ? vld1q_f32(c + row * COLUMNS + i * 4) : vdupq_n_f32(0);
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK) {
        float32x4_t even[ROWS_AT_ONCE][4], odd[ROWS_AT_ONCE][4];
        EACH(row, rows) EACH(i, 4) even[row][i] = odd[row][i] = vdupq_n_f32(0);
        for (int line = 0; line < 16; line++)
            EACH(i, 4) {
                const uint32x4_t pairs = vld1q_u32((const uint32_t *)(const void *)(b + line * LINE) + i * 4);
                const float32x4_t lower = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
                const float32x4_t upper = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
                EACH(row, rows) {
                    const uint32_t x = dword(a + row * LINE + line * 4);
                    even[row][i] = vfmaq_n_f32(even[row][i], lower, float_of(x << 16));
                    odd[row][i] = vfmaq_n_f32(odd[row][i], upper, float_of(x & 0xffff0000u));
                }
            }
        EACH(row, rows) EACH(i, 4) sums[row][i] = vaddq_f32(sums[row][i], vaddq_f32(even[row][i], odd[row][i]));
    }
    EACH(row, rows) EACH(i, 4) vst1q_f32(c + row * COLUMNS + i * 4, sums[row][i]);
}

static inline __attribute__((always_inline)) void rows_int8(int32_t *c, const char *a, const char *b, int64_t num_blocks,
                                                            ptrdiff_t a_block, bool accumulate, const int rows) {
    int32x4_t halves[ROWS_AT_ONCE][8]; /* of the sums of two columns: the first two of four bytes, and the last two */
    EACH(row, rows) EACH(i, 4) halves[row][2 * i] = halves[row][2 * i + 1] = vdupq_n_s32(0);
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK)
        for (int line = 0; line < 16; line++)
            EACH(i, 4) {
                const int8x16_t w = vld1q_s8((const int8_t *)b + line * LINE + i * 16);
                EACH(row, rows) {
                    const int8x8_t x = vreinterpret_s8_u32(vdup_n_u32(dword(a + row * LINE + line * 4)));
                    halves[row][2 * i] = vpadalq_s16(halves[row][2 * i], vmull_s8(vget_low_s8(w), x));
                    halves[row][2 * i + 1] = vpadalq_s16(halves[row][2 * i + 1], vmull_s8(vget_high_s8(w), x));
                }
            }
    EACH(row, rows) EACH(i, 4) {
        const int32x4_t sums = vpaddq_s32(halves[row][2 * i], halves[row][2 * i + 1]);
        int32_t *out = c + row * COLUMNS + i * 4;
        vst1q_s32(out, accumulate ? vaddq_s32(vld1q_s32(out), sums) : sums);
    }
}

/* Cut a panel into parts that registers hold. The count of rows is a constant in each call, so that everything unrolls. */
#define EACH_PART(ROWS_OF_TYPE, c, a, b)                                                                               \
    for (int first = 0, count; first < rows; first += count) {                                                         \
        count = rows - first < ROWS_AT_ONCE ? rows - first : ROWS_AT_ONCE;                                             \
        for (int tile = 0; tile < 2; tile++) {                                                                         \
            switch (count) { CASE(ROWS_OF_TYPE, c, a, b, 1) CASE(ROWS_OF_TYPE, c, a, b, 2) CASE(ROWS_OF_TYPE, c, a, b, 3) } \
        }                                                                                                              \
    }
#define CASE(ROWS_OF_TYPE, c, a, b, n)                                                                                 \
    case n:                                                                                                            \
        ROWS_OF_TYPE(c + first * COLUMNS + tile * (COLUMNS / 2), (const char *)a + first * LINE,                       \
                     (const char *)b + tile * (B_BLOCK / 2), num_blocks, (ptrdiff_t)rows * LINE, accumulate, n);       \
        break;

/* C [rows][32] (+)= A B: see kernels.h for A and B. C is replaced unless `accumulate`. Processors fetch ahead themselves. */
static void panel_bf16(float *c, const a_bf16 *a, const bf16 *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    (void)ahead;
    EACH_PART(rows_bf16, c, a, b)
}

/* The same in whole numbers. */
static void panel_int8(int32_t *c, const a_int8 *a, const int8_t *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    (void)ahead;
    EACH_PART(rows_int8, c, a, b)
}

/* Around the tasks that a thread does. */
static void panel_begin(void) {}
static void panel_end(void) {}

/* Make the processor's tiles usable; false if the system does not grant them. */
static bool panel_start(void) { return true; }

#endif
