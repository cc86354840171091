/* A 16 x 16 transpose of dwords, as four of 8 x 8, each in registers. */
#ifndef TANDEM_TRANSPOSE_H
#define TANDEM_TRANSPOSE_H

#include <immintrin.h>

#include "kernels.h"

/* out[16 i + j] = row j's dword i, of 8 rows that are `stride` bytes apart. */
static inline void transpose8(uint32_t *out, const char *rows, ptrdiff_t stride) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps((const float *)(const void *)(rows + i * stride));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44); /* the lower halves of both, per 128-bit lane */
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps((float *)(void *)(out + 16 * i), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps((float *)(void *)(out + 16 * (i + 4)), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

/* out[i][j] = row j's dword i: 16 rows of 16 dwords, `stride` bytes apart, become lines of B. */
static inline void transpose16(uint32_t *out, const void *rows, ptrdiff_t stride) {
    for (int j = 0; j < 16; j += 8)
        for (int i = 0; i < 16; i += 8) transpose8(out + 16 * i + j, (const char *)rows + j * stride + i * 4, stride);
}

#endif
