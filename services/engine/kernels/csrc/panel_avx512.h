/* A panel on AVX-512: BF16's and VNNI's dot products of a line of B with one broadcast dword of A.
 *
 * C stays in registers: two for each row. Twelve rows at once leave room for two lines of B and the broadcasts, and take
 * 14 loads for 24 dot products. A row's sum is the same chain of operations however many rows go together.
 *
 * B is asked for 4 KiB ahead: its two tiles are two streams that the processor's own prefetching does not follow. */
#ifndef TANDEM_PANEL_H
#define TANDEM_PANEL_H

#include <immintrin.h>

#include "kernels.h"
#include "transpose_avx512.h"

#define PANEL_NAME "avx512"
#define PANEL_INT8_OFFSET 128 /* VPDPBUSD takes unsigned bytes times signed ones */

enum { ROWS_AT_ONCE = 12, PREFETCH_BYTES = 4096 };

static inline __attribute__((always_inline)) __m512i broadcast(const void *dword) {
    int32_t value;
    memcpy(&value, dword, sizeof value);
    return _mm512_set1_epi32(value);
}

/* One line of depth for `rows` rows; unrolled, since `rows` is a constant wherever this is inlined. */
#define EACH_ROW(rows) _Pragma("GCC unroll 16") for (int row = 0; row < (rows); row++)

static inline __attribute__((always_inline)) void rows_bf16(
    float *c, const char *a, const char *b, int64_t num_blocks, ptrdiff_t a_block, bool accumulate, const int rows) {
    __m512 left[ROWS_AT_ONCE], right[ROWS_AT_ONCE];
    EACH_ROW(rows) {
        left[row] = accumulate ? _mm512_loadu_ps(c + row * COLUMNS) : _mm512_setzero_ps();
        right[row] = accumulate ? _mm512_loadu_ps(c + row * COLUMNS + 16) : _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK)
        for (int line = 0; line < 16; line++) {
            __m512bh b_left = (__m512bh)_mm512_load_si512(b + line * LINE);
            __m512bh b_right = (__m512bh)_mm512_load_si512(b + line * LINE + B_BLOCK / 2);
            _mm_prefetch(b + line * LINE + PREFETCH_BYTES, _MM_HINT_T0);
            _mm_prefetch(b + line * LINE + B_BLOCK / 2 + PREFETCH_BYTES, _MM_HINT_T0);
            EACH_ROW(rows) {
                __m512bh x = (__m512bh)broadcast(a + row * LINE + line * 4);
                left[row] = _mm512_dpbf16_ps(left[row], x, b_left);
                right[row] = _mm512_dpbf16_ps(right[row], x, b_right);
            }
        }
    EACH_ROW(rows) {
        _mm512_storeu_ps(c + row * COLUMNS, left[row]);
        _mm512_storeu_ps(c + row * COLUMNS + 16, right[row]);
    }
}

static inline __attribute__((always_inline)) void rows_int8(
    int32_t *c, const char *a, const char *b, int64_t num_blocks, ptrdiff_t a_block, const int rows) {
    __m512i left[ROWS_AT_ONCE], right[ROWS_AT_ONCE];
    EACH_ROW(rows) left[row] = right[row] = _mm512_setzero_si512();
    for (int64_t block = 0; block < num_blocks; block++, a += a_block, b += B_BLOCK)
        for (int line = 0; line < 16; line++) {
            __m512i b_left = _mm512_load_si512(b + line * LINE);
            __m512i b_right = _mm512_load_si512(b + line * LINE + B_BLOCK / 2);
            _mm_prefetch(b + line * LINE + PREFETCH_BYTES, _MM_HINT_T0);
            _mm_prefetch(b + line * LINE + B_BLOCK / 2 + PREFETCH_BYTES, _MM_HINT_T0);
            EACH_ROW(rows) {
                __m512i x = broadcast(a + row * LINE + line * 4);
                left[row] = _mm512_dpbusd_epi32(left[row], x, b_left);
                right[row] = _mm512_dpbusd_epi32(right[row], x, b_right);
            }
        }
    EACH_ROW(rows) {
        _mm512_storeu_si512(c + row * COLUMNS, left[row]);
        _mm512_storeu_si512(c + row * COLUMNS + 16, right[row]);
    }
}

/* Call CASE(n) with the constant n that equals `rows`. */
#define EACH_COUNT(rows)                                                                                        \
    switch (rows) {                                                                                             \
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)       \
    }

/* C [rows][32] (+)= A B: see kernels.h for A and B. C is replaced unless `accumulate`. */
static void panel_bf16(float *c, const bf16 *a, const bf16 *b, int64_t num_blocks, int rows, bool accumulate) {
    const int num_parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int part = 0, first = 0; part < num_parts; part++) {
        const int count = (rows - first + num_parts - part - 1) / (num_parts - part);
        float *c_part = c + first * COLUMNS;
        const char *a_part = (const char *)a + first * LINE;
#define CASE(n) \
    case n: rows_bf16(c_part, a_part, (const char *)b, num_blocks, (ptrdiff_t)rows * LINE, accumulate, n); break;
        EACH_COUNT(count)
#undef CASE
        first += count;
    }
}

/* C [rows][32] = A B, exactly; A's bytes are unsigned here. */
static void panel_int8(int32_t *c, const int8_t *a, const int8_t *b, int64_t num_blocks, int rows) {
    const int num_parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int part = 0, first = 0; part < num_parts; part++) {
        const int count = (rows - first + num_parts - part - 1) / (num_parts - part);
        int32_t *c_part = c + first * COLUMNS;
        const char *a_part = (const char *)a + first * LINE;
#define CASE(n) \
    case n: rows_int8(c_part, a_part, (const char *)b, num_blocks, (ptrdiff_t)rows * LINE, n); break;
        EACH_COUNT(count)
#undef CASE
        first += count;
    }
}

/* Make the processor's tiles usable; false if the system does not grant them. */
static bool panel_start(void) { return true; }

#endif
