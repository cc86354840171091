/* Puts rows into A of a panel: as they are or, for a panel that says so (`a_bf16`, `a_int8`), widened.
 *
 * Widened, bfloat16 is float, and bytes are 16 bits, those at even places of a block before those at odd ones: B's bytes
 * come apart so by a shift. Elements of A meet every column of B, and a processor without dot products of narrow types
 * would widen them each time. */
#ifndef TANDEM_WIDENING_H
#define TANDEM_WIDENING_H

#include "vector.h"

enum {
    A_LINE = BF16_DEPTH * sizeof(a_bf16), /* bytes of a row in a block of depth */
    A_IS_WIDE = A_LINE > LINE,
};

typedef int16_t pairs __attribute__((vector_size(LANES)));

/* A row's elements of a block, zeros where its `num_left` end. */
static inline __attribute__((always_inline)) void put_bf16(void *line, const bf16 *from, int64_t num_left) {
    if (A_IS_WIDE) {
        for (int64_t i = 0; i < BF16_DEPTH; i += LANES)
            store_floats((float *)line + i, load_bf16(from + i, max64(0, num_left - i)));
    } else {
        if (num_left < BF16_DEPTH) memset(line, 0, LINE);
        memcpy(line, from, (size_t)min64(BF16_DEPTH, num_left) * sizeof *from);
    }
}

/* LANES of attention's weights, in bfloat16; in float they need not be rounded, but denormals take long to multiply. */
static inline void put_weights(void *line, floats weights) {
    if (A_IS_WIDE)
        store_floats(line, (floats)((ints)weights & ~(weights < FLT_MIN)));
    else
        store_bf16(line, weights, LANES);
}

/* LANES elements, from `i` on, of a row's block of 64, each in the low byte of its lane. */
static inline void put_int8(void *line, int64_t i, ints values) {
    const quarters packed = __builtin_convertvector(values, quarters);
    if (A_IS_WIDE) {
        const pairs even = (pairs)packed << 8 >> 8, odd = (pairs)packed >> 8;
        memcpy((char *)line + i, &even, sizeof even);
        memcpy((char *)line + LINE + i, &odd, sizeof odd);
    } else {
        memcpy((char *)line + i, &packed, sizeof packed);
    }
}

#endif
