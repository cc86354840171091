/* Keys and values in 8 bits: a row, of one token and KV head, is head_dim whole numbers from -127 to 127 and behind them
 * their scale, a float. It follows from these head_dim elements alone.
 *
 *     | -128 < code < 128 | .. head_dim bytes .. | scale: 4 bytes |        x = scale * code, scale = largest |x| / 127
 *
 * Codes are exact in bfloat16, so panels multiply them as they are, and scales are applied to what comes out: a key's to
 * its scores, a value's to its weights. Zeros are a row of zeros. */
#ifndef TANDEM_KV_ROWS_H
#define TANDEM_KV_ROWS_H

#include "vector.h"

enum { SCALE_BYTES = sizeof(float) };

static inline int64_t int8_row_bytes(int64_t head_dim) { return head_dim + SCALE_BYTES; }

static inline float scale_of_row(const int8_t *row, int64_t head_dim) {
    float scale;
    memcpy(&scale, row + head_dim, sizeof scale);
    return scale;
}

/* The first `count` (at most LANES) codes, then zeros. */
static inline floats load_codes(const int8_t *from, int64_t count) {
    quarters codes = {0};
    if (count >= LANES)
        memcpy(&codes, from, sizeof codes);
    else if (count > 0)
        memcpy(&codes, from, (size_t)count);
    return __builtin_convertvector(widen_int8(codes), floats);
}

/* Rounds to nearest, ties to even. A row with an infinity or a NaN is NaN as a whole: its scale is, its codes are 0. */
static void quantize_row(int8_t *row, const bf16 *x, int64_t head_dim) {
    /* As whole numbers, positive floats have the same order, and a NaN is larger than all. */
    ints lanes = {0};
    for (int64_t k = 0; k < head_dim; k += LANES) lanes = larger_ints((ints)absolute(load_bf16(x + k, head_dim - k)), lanes);
    const int32_t largest = largest_lane(lanes);
    const bool is_finite = largest < 0x7f800000;
    const float scale = is_finite ? float_of((uint32_t)largest) / 127.0f : float_of(0x7fc00000);
    /* Divided, not multiplied by an inverse, which would be infinite for the smallest; where the scale is no number or
     * 0, any divisor that leaves no trace will do. */
    const float divisor = scale > 0 ? scale : 1.0f;
    for (int64_t k = 0; k < head_dim; k += LANES) {
        const int64_t count = min64(LANES, head_dim - k);
        /* Adding 1.5 * 2^23 rounds, and leaves the whole number in the low bits. */
        const ints codes = (ints)(load_bf16(x + k, count) / divisor + 12582912.0f);
        const quarters packed = __builtin_convertvector(is_finite ? codes : (ints){0}, quarters);
        memcpy(row + k, &packed, (size_t)count);
    }
    memcpy(row + head_dim, &scale, sizeof scale);
}

#endif
