/* How fast a panel is when it waits for nothing: what benchmarks hold the kernels against. */
#ifndef TANDEM_PEAK_H
#define TANDEM_PEAK_H

#include "linear.h"

enum { PEAK_BLOCKS = 8 }; /* of depth */

/* Multiply 32 rows by weights, both in L1, `repetitions` times. Returns the operations done. */
EXPORT double tandem_peak(int int8, int64_t repetitions) {
    static _Thread_local char a[PEAK_BLOCKS * ROWS * A_LINE] ALIGNED, b[PEAK_BLOCKS * B_BLOCK] ALIGNED;
    static _Thread_local float c[ROWS * COLUMNS] ALIGNED;
    const struct ahead nothing = {b, 0};
    memset(a, 0x3c, sizeof a); /* no zeros, which take less power and might be multiplied at a higher clock */
    memset(b, 0x3c, sizeof b);
    panel_begin();
    for (int64_t i = 0; i < repetitions; i++) {
        if (int8)
            panel_int8((int32_t *)(void *)c, (const a_int8 *)a, (const int8_t *)b, PEAK_BLOCKS, ROWS, false, nothing);
        else
            panel_bf16(c, (const a_bf16 *)(void *)a, (const bf16 *)(void *)b, PEAK_BLOCKS, ROWS, false, nothing);
    }
    panel_end();
    return 2.0 * ROWS * COLUMNS * PEAK_BLOCKS * (int8 ? INT8_DEPTH : BF16_DEPTH) * (double)repetitions;
}

#endif
