/* A 16 x 16 transpose of dwords in plain C. */
#ifndef TANDEM_TRANSPOSE_H
#define TANDEM_TRANSPOSE_H

#include "kernels.h"

/* out[i][j] = row j's dword i: 16 rows of 16 dwords, `stride` bytes apart, become lines of B. */
static inline void transpose16(uint32_t *out, const void *rows, ptrdiff_t stride) {
    for (int j = 0; j < 16; j++) {
        uint32_t row[16];
        memcpy(row, (const char *)rows + j * stride, sizeof row);
        for (int i = 0; i < 16; i++) memcpy(out + i * 16 + j, row + i, sizeof *row);
    }
}

#endif
