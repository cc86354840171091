/* A panel on AVX-512: BF16's and VNNI's dot products of a line of B with one broadcast dword of A.
 *
 * C stays in registers: two for each row. Twelve rows at once leave room for two lines of B and the broadcasts, and take
 * 14 loads for 24 dot products. A row's sum is the same chain of operations however many rows go together.
 *
 * Prefetching is told what to do (`ahead`): B's two tiles are two streams that the processor does not follow. Zen 5 takes
 * 15 to 25 % less time where all lines of a block are asked for at once; Zen 4 takes 1.6 to 2.2 times as long with that as
 * with two lines for each line of depth, further ahead (docs/benchmarks.md). No bit depends on it. */
#ifndef TANDEM_PANEL_H
#define TANDEM_PANEL_H

#include <cpuid.h>
#include <immintrin.h>

#include "kernels.h"
#include "transpose_avx512.h"

#define PANEL_NAME "avx512"
#define PANEL_INT8_OFFSET 128 /* VPDPBUSD takes unsigned bytes times signed ones */
#define PANEL_BLOCKS_AHEAD (ask_evenly ? 4 : 2) /* at few rows; a whole chunk is a tenth slower on Zen 5 */

typedef bf16 a_bf16; /* A's elements: as they are */
typedef int8_t a_int8;

enum { ROWS_AT_ONCE = 12 };

static bool ask_evenly; /* lines with each line of depth, instead of all with each block */

static inline __attribute__((always_inline)) __m512i broadcast(const void *dword) {
    int32_t value;
    memcpy(&value, dword, sizeof value);
    return _mm512_set1_epi32(value);
}

/* sums += a (unsigned bytes) * b (signed ones). In assembly, since GCC moves the sums about between two of its own. */
static inline __attribute__((always_inline)) void add_dots_int8(__m512i *sums, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(a), "v"(b));
}

static inline __attribute__((always_inline)) void ask(struct ahead *ahead, int num_lines) {
    for (int line = 0; line < num_lines; line++, ahead->next += LINE) _mm_prefetch(ahead->next, _MM_HINT_T0);
}

/* One line of depth for `rows` rows; unrolled, since `rows` is a constant wherever this is inlined. */
#define EACH_ROW(rows) _Pragma("GCC unroll 16") for (int row = 0; row < (rows); row++)

static inline __attribute__((always_inline)) void rows_bf16(
    float *c, const char *a, const char *b, int64_t num_blocks, ptrdiff_t a_block, bool accumulate, struct ahead ahead,
    const int rows) {
    __m512 left[ROWS_AT_ONCE], right[ROWS_AT_ONCE];
    EACH_ROW(rows) {
        left[row] = accumulate ? _mm512_loadu_ps(c + row * COLUMNS) : _mm512_setzero_ps();
        right[row] = accumulate ? _mm512_loadu_ps(c + row * COLUMNS + 16) : _mm512_setzero_ps();
    }
    const int with_line = ask_evenly ? ahead.lines / 16 : 0, with_block = ahead.lines - 16 * with_line;
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK) {
        ask(&ahead, with_block);
        for (int line = 0; line < 16; line++) {
            ask(&ahead, with_line);
            __m512bh b_left = (__m512bh)_mm512_load_si512(b + line * LINE);
            __m512bh b_right = (__m512bh)_mm512_load_si512(b + line * LINE + B_BLOCK / 2);
            EACH_ROW(rows) {
                __m512bh x = (__m512bh)broadcast(a + row * LINE + line * 4);
                left[row] = _mm512_dpbf16_ps(left[row], x, b_left);
                right[row] = _mm512_dpbf16_ps(right[row], x, b_right);
            }
        }
    }
    EACH_ROW(rows) {
        _mm512_storeu_ps(c + row * COLUMNS, left[row]);
        _mm512_storeu_ps(c + row * COLUMNS + 16, right[row]);
    }
}

static inline __attribute__((always_inline)) void rows_int8(
    int32_t *c, const char *a, const char *b, int64_t num_blocks, ptrdiff_t a_block, bool accumulate, struct ahead ahead,
    const int rows) {
    __m512i left[ROWS_AT_ONCE], right[ROWS_AT_ONCE];
    EACH_ROW(rows) {
        left[row] = accumulate ? _mm512_loadu_si512(c + row * COLUMNS) : _mm512_setzero_si512();
        right[row] = accumulate ? _mm512_loadu_si512(c + row * COLUMNS + 16) : _mm512_setzero_si512();
    }
    const int with_line = ask_evenly ? ahead.lines / 16 : 0, with_block = ahead.lines - 16 * with_line;
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK) {
        ask(&ahead, with_block);
        for (int line = 0; line < 16; line++) {
            ask(&ahead, with_line);
            __m512i b_left = _mm512_load_si512(b + line * LINE);
            __m512i b_right = _mm512_load_si512(b + line * LINE + B_BLOCK / 2);
            EACH_ROW(rows) {
                __m512i x = broadcast(a + row * LINE + line * 4);
                add_dots_int8(&left[row], x, b_left);
                add_dots_int8(&right[row], x, b_right);
            }
        }
    }
    EACH_ROW(rows) {
        _mm512_storeu_si512(c + row * COLUMNS, left[row]);
        _mm512_storeu_si512(c + row * COLUMNS + 16, right[row]);
    }
}

/* Cut a panel's rows into parts that registers hold, each with its share of what is asked for, and call ROWS for each:
 * with the constant that equals the number of its rows, so that everything unrolls. */
#define EACH_PART(ROWS_OF_TYPE, c, a, b)                                                                              \
    const int num_parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;                                                   \
    for (int part = 0, first = 0, count; part < num_parts; part++, first += count) {                                  \
        count = (rows - first + num_parts - part - 1) / (num_parts - part);                                           \
        const int asked = ahead.lines * part / num_parts;                                                             \
        const struct ahead share = {ahead.next + asked * num_blocks * LINE, ahead.lines * (part + 1) / num_parts - asked}; \
        switch (count) {                                                                                              \
            CASE(ROWS_OF_TYPE, c, a, b, 1) CASE(ROWS_OF_TYPE, c, a, b, 2) CASE(ROWS_OF_TYPE, c, a, b, 3)              \
            CASE(ROWS_OF_TYPE, c, a, b, 4) CASE(ROWS_OF_TYPE, c, a, b, 5) CASE(ROWS_OF_TYPE, c, a, b, 6)              \
            CASE(ROWS_OF_TYPE, c, a, b, 7) CASE(ROWS_OF_TYPE, c, a, b, 8) CASE(ROWS_OF_TYPE, c, a, b, 9)              \
            CASE(ROWS_OF_TYPE, c, a, b, 10) CASE(ROWS_OF_TYPE, c, a, b, 11) CASE(ROWS_OF_TYPE, c, a, b, 12)           \
        }                                                                                                             \
    }
#define CASE(ROWS_OF_TYPE, c, a, b, n)                                                                                \
    case n:                                                                                                           \
        ROWS_OF_TYPE(c + first * COLUMNS, (const char *)a + first * LINE, (const char *)b, num_blocks,                \
                     (ptrdiff_t)rows * LINE, accumulate, share, n);                                                   \
        break;

/* C [rows][32] (+)= A B: see kernels.h for A and B. C is replaced unless `accumulate`. */
static void panel_bf16(float *c, const a_bf16 *a, const bf16 *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    EACH_PART(rows_bf16, c, a, b)
}

/* The same in whole numbers; A's bytes are unsigned here. */
static void panel_int8(int32_t *c, const a_int8 *a, const int8_t *b, int64_t num_blocks, int rows, bool accumulate,
                       struct ahead ahead) {
    EACH_PART(rows_int8, c, a, b)
}

/* Around the tasks that a thread does. */
static void panel_begin(void) {}
static void panel_end(void) {}

/* Is this an AMD processor of family 19h: Zen 3, which lacks AVX-512, or Zen 4? */
static bool is_zen4(void) {
    unsigned int a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx) return false;
    return __get_cpuid(1, &a, &b, &c, &d) && ((a >> 8) & 15) + ((a >> 20) & 255) == 0x19;
}

static bool panel_start(void) {
    ask_evenly = is_zen4();
    return true;
}

#endif
