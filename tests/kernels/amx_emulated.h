/* AMX's tile instructions in plain C, after Intel's Software Developer's Manual, so that panel_amx.h can be tested on any
 * machine. What the processor would fault on (an unconfigured tile, shapes that do not fit) ends the process. */
#ifndef TANDEM_AMX_EMULATED_H
#define TANDEM_AMX_EMULATED_H

#include "kernels.h"
#include "transpose_portable.h"

#define PANEL_NAME "amx-emulated"

struct emulated_tile {
    int rows, bytes_per_row; /* 0: not configured */
    unsigned char data[16][64];
};

static _Thread_local struct emulated_tile emulated[8];

static inline void require(bool condition) {
    if (!condition) abort();
}

static inline void _tile_loadconfig(const void *config) {
    const unsigned char *bytes = config;
    require(bytes[0] == 1);
    for (int i = 1; i < 16; i++) require(bytes[i] == 0);
    for (int i = 0; i < 8; i++) {
        emulated[i].bytes_per_row = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
        emulated[i].rows = bytes[48 + i];
        require(emulated[i].bytes_per_row <= 64 && emulated[i].rows <= 16);
        require((emulated[i].bytes_per_row == 0) == (emulated[i].rows == 0));
        memset(emulated[i].data, 0, sizeof emulated[i].data);
    }
}

static inline void _tile_release(void) { memset(emulated, 0, sizeof emulated); }

static inline void _tile_zero(int tile) {
    require(emulated[tile].rows > 0);
    memset(emulated[tile].data, 0, sizeof emulated[tile].data);
}

static inline void _tile_loadd(int tile, const void *base, ptrdiff_t stride) {
    require(emulated[tile].rows > 0);
    memset(emulated[tile].data, 0, sizeof emulated[tile].data);
    for (int row = 0; row < emulated[tile].rows; row++)
        memcpy(emulated[tile].data[row], (const char *)base + row * stride, (size_t)emulated[tile].bytes_per_row);
}

static inline void _tile_stored(int tile, void *base, ptrdiff_t stride) {
    require(emulated[tile].rows > 0);
    for (int row = 0; row < emulated[tile].rows; row++)
        memcpy((char *)base + row * stride, emulated[tile].data[row], (size_t)emulated[tile].bytes_per_row);
}

/* Shapes of a dot product: C [m][n], A [m][k], B [k][n], in dwords. */
static inline void require_shapes(int c, int a, int b) {
    require(c != a && c != b && a != b);
    require(emulated[c].rows == emulated[a].rows && emulated[c].bytes_per_row == emulated[b].bytes_per_row);
    require(emulated[a].bytes_per_row == emulated[b].rows * 4 && emulated[c].rows > 0);
}

static inline float flush(float value) { return fabsf(value) < FLT_MIN ? copysignf(0.0f, value) : value; }

static inline void _tile_dpbf16ps(int c, int a, int b) {
    require_shapes(c, a, b);
    for (int m = 0; m < emulated[c].rows; m++)
        for (int n = 0; n < emulated[c].bytes_per_row / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < emulated[b].rows; k++) {
                bf16 x[2], y[2];
                memcpy(x, emulated[a].data[m] + 4 * k, sizeof x);
                memcpy(y, emulated[b].data[k] + 4 * n, sizeof y);
                even = flush(fmaf(flush(from_bf16(x[0])), flush(from_bf16(y[0])), even));
                odd = flush(fmaf(flush(from_bf16(x[1])), flush(from_bf16(y[1])), odd));
            }
            memcpy(&sum, emulated[c].data[m] + 4 * n, sizeof sum);
            sum = flush(sum + flush(even + odd));
            memcpy(emulated[c].data[m] + 4 * n, &sum, sizeof sum);
        }
}

static inline void _tile_dpbssd(int c, int a, int b) {
    require_shapes(c, a, b);
    for (int m = 0; m < emulated[c].rows; m++)
        for (int n = 0; n < emulated[c].bytes_per_row / 4; n++) {
            int32_t sum;
            memcpy(&sum, emulated[c].data[m] + 4 * n, sizeof sum);
            for (int k = 0; k < emulated[b].rows * 4; k++)
                sum += (int8_t)emulated[a].data[m][k] * (int8_t)emulated[b].data[k / 4][4 * n + k % 4];
            memcpy(emulated[c].data[m] + 4 * n, &sum, sizeof sum);
        }
}

#endif
