/* A panel on AVX2 and FMA: weights are widened in registers, what they are multiplied by was widened before (widening.h).
 *
 * bfloat16: a dword of B holds two of a column's weights. Shifted left, it is the even one as a float; with its lower
 * half cleared, the odd one. A column's sum is one chain of fused multiply-adds in order of depth.
 *
 * int8: a dword holds four. Shifts of 16-bit lanes leave the even two, and the odd two, as 16-bit numbers, and VPMADDWD
 * adds two products exactly. (VPMADDUBSW takes twice the bytes at once, but it and the VPSIGNB and VPMADDWD around it
 * compete for two units of the processor: slower by a fifth where it was tried, an AMD Zen 4.)
 *
 * Memory is asked for two lines with each line of depth, not for all of a block at once: arithmetic takes long enough for
 * them to arrive meanwhile, and would wait for a burst.
 *
 * Sixteen registers hold C's sums of five rows and 16 columns, and what is loaded; two rows take all 32 columns at once, so
 * that there are chains enough. A row's sum is the same chain however many rows go together. */
#ifndef TANDEM_PANEL_H
#define TANDEM_PANEL_H

#include <immintrin.h>

#include "kernels.h"
#include "transpose_avx2.h"

#define PANEL_NAME "avx2"
#define PANEL_INT8_OFFSET 0
#define PANEL_BLOCKS_AHEAD 4 /* at few rows: a whole chunk */

typedef float a_bf16; /* A's elements: widened */
typedef int16_t a_int8;

enum {
    ROWS_AT_ONCE = 5,
    LANE_COLUMNS = 8,     /* of a register */
    WIDE_LINE = 2 * LINE, /* bytes of a row of A in a block */
};

/* Unrolled, since the count is a constant wherever this is inlined. */
#define EACH(index, count) _Pragma("GCC unroll 8") for (int index = 0; index < (count); index++)
/* Each of C's registers, for `rows` rows and `tiles` tiles of 16 columns. */
#define EACH_SUM EACH(row, rows) EACH(i, 2 * tiles)

static inline __attribute__((always_inline)) void ask(struct ahead *ahead, int num_lines) {
    for (int line = 0; line < num_lines; line++, ahead->next += LINE) _mm_prefetch(ahead->next, _MM_HINT_T0);
}

/* Eight columns' dwords of a line of B, the columns from 8 i on. */
static inline __attribute__((always_inline)) __m256i dwords(const char *line, int i) {
    return _mm256_load_si256((const __m256i *)(const void *)(line + i / 2 * (B_BLOCK / 2) + i % 2 * 32));
}

static inline __attribute__((always_inline)) __m256i broadcast(const void *dword) {
    int32_t value;
    memcpy(&value, dword, sizeof value);
    return _mm256_set1_epi32(value);
}

/* In assembly, since GCC adds products to each other first, for which there are no registers. */
static inline __attribute__((always_inline)) void add_to(__m256i *sums, __m256i products) {
    __asm__("vpaddd %1, %0, %0" : "+x"(*sums) : "x"(products));
}

/* A line of B with two elements of each row. Weights are widened one half at a time, since registers are short. */
static inline __attribute__((always_inline)) void add_line_bf16(
    __m256 sums[ROWS_AT_ONCE][4], const char *a, const char *b, __m256i upper, const int rows, const int tiles) {
    EACH(odd, 2) {
        __m256 w[4];
        EACH(i, 2 * tiles) w[i] = (__m256)(odd ? _mm256_and_si256(dwords(b, i), upper) : _mm256_slli_epi32(dwords(b, i), 16));
        EACH(row, rows) {
            const __m256 x = _mm256_broadcast_ss((const float *)(const void *)(a + row * WIDE_LINE) + odd);
            EACH(i, 2 * tiles) sums[row][i] = _mm256_fmadd_ps(x, w[i], sums[row][i]);
        }
    }
}

/* The same for one row or two, which have registers to spare: weights are loaded once. */
static inline __attribute__((always_inline)) void add_line_to_few_bf16(
    __m256 sums[ROWS_AT_ONCE][4], const char *a, const char *b, __m256i upper, const int rows, const int tiles) {
    EACH(i, 2 * tiles) {
        const __m256i pair = dwords(b, i);
        const __m256 w[2] = {(__m256)_mm256_slli_epi32(pair, 16), (__m256)_mm256_and_si256(pair, upper)};
        EACH(odd, 2) EACH(row, rows) {
            const __m256 x = _mm256_broadcast_ss((const float *)(const void *)(a + row * WIDE_LINE) + odd);
            sums[row][i] = _mm256_fmadd_ps(x, w[odd], sums[row][i]);
        }
    }
}

static inline __attribute__((always_inline)) void rows_bf16(
    float *c, const char *a, const char *b, int64_t num_blocks, ptrdiff_t a_block, bool accumulate, struct ahead ahead,
    const int rows, const int tiles) {
    const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
    __m256 sums[ROWS_AT_ONCE][4];
    EACH_SUM sums[row][i] = accumulate ? _mm256_loadu_ps(c + row * COLUMNS + i * LANE_COLUMNS) : _mm256_setzero_ps();
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK) {
        ask(&ahead, ahead.lines % 16);
        for (int line = 0; line < 16; line++) {
            ask(&ahead, ahead.lines / 16);
            if (tiles == 2)
                add_line_to_few_bf16(sums, a + line * 8, b + line * LINE, upper, rows, tiles);
            else
                add_line_bf16(sums, a + line * 8, b + line * LINE, upper, rows, tiles);
        }
    }
    EACH_SUM _mm256_storeu_ps(c + row * COLUMNS + i * LANE_COLUMNS, sums[row][i]);
}

static inline __attribute__((always_inline)) void rows_int8(
    int32_t *c, const char *a, const char *b, int64_t num_blocks, ptrdiff_t a_block, bool accumulate, struct ahead ahead,
    const int rows, const int tiles) {
    __m256i sums[ROWS_AT_ONCE][4];
    EACH_SUM sums[row][i] = accumulate
        ? _mm256_loadu_si256((const __m256i *)(const void *)(c + row * COLUMNS + i * LANE_COLUMNS)) : _mm256_setzero_si256();
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK) {
        ask(&ahead, ahead.lines % 16);
        for (int line = 0; line < 16; line++) {
            ask(&ahead, ahead.lines / 16);
            EACH(odd, 2) {
                __m256i w[4];
                EACH(i, 2 * tiles) {
                    const __m256i four = dwords(b + line * LINE, i);
                    w[i] = _mm256_srai_epi16(odd ? four : _mm256_slli_epi16(four, 8), 8);
                }
                EACH(row, rows) {
                    const __m256i x = broadcast(a + row * WIDE_LINE + odd * LINE + line * 4);
                    EACH(i, 2 * tiles) add_to(&sums[row][i], _mm256_madd_epi16(x, w[i]));
                }
            }
        }
    }
    EACH_SUM _mm256_storeu_si256((__m256i *)(void *)(c + row * COLUMNS + i * LANE_COLUMNS), sums[row][i]);
}

/* Cut a panel into passes that registers hold, each with its share of what is asked for: parts of its rows by tiles of 16
 * columns, or by both tiles at once. The count of rows is a constant in each call, so that everything unrolls. */
#define EACH_PASS(ROWS_OF_TYPE, c, a, b)                                                                              \
    const int num_parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, tiles = rows <= 2 ? 2 : 1;                        \
    const int num_passes = num_parts * (2 / tiles);                                                                   \
    for (int part = 0, pass = 0, first = 0, count; part < num_parts; part++, first += count) {                        \
        count = (rows - first + num_parts - part - 1) / (num_parts - part);                                           \
        for (int tile = 0; tile < 2; tile += tiles, pass++) {                                                         \
            const int asked = ahead.lines * pass / num_passes;                                                        \
            const struct ahead share = {ahead.next + asked * num_blocks * LINE,                                       \
                                        ahead.lines * (pass + 1) / num_passes - asked};                               \
            switch (count) {                                                                                          \
                CASE(ROWS_OF_TYPE, c, a, b, 1, 2) CASE(ROWS_OF_TYPE, c, a, b, 2, 2)                                   \
                CASE(ROWS_OF_TYPE, c, a, b, 3, 1) CASE(ROWS_OF_TYPE, c, a, b, 4, 1) CASE(ROWS_OF_TYPE, c, a, b, 5, 1) \
            }                                                                                                         \
        }                                                                                                             \
    }
#define CASE(ROWS_OF_TYPE, c, a, b, n, tiles)                                                                         \
    case n:                                                                                                           \
        ROWS_OF_TYPE(c + first * COLUMNS + tile * (COLUMNS / 2), (const char *)a + first * WIDE_LINE,                    \
                     (const char *)b + tile * (B_BLOCK / 2), num_blocks, (ptrdiff_t)rows * WIDE_LINE, accumulate, share, \
                     n, tiles);                                                                                       \
        break;

/* C [rows][32] (+)= A B: see kernels.h for A and B. C is replaced unless `accumulate`. */
static void panel_bf16(float *c, const a_bf16 *a, const bf16 *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    EACH_PASS(rows_bf16, c, a, b)
}

/* The same in whole numbers. */
static void panel_int8(int32_t *c, const a_int8 *a, const int8_t *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    EACH_PASS(rows_int8, c, a, b)
}

/* Around the tasks that a thread does. */
static void panel_begin(void) {}
static void panel_end(void) {}

/* Make the processor's tiles usable; false if the system does not grant them. */
static bool panel_start(void) { return true; }

#endif
