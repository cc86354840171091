/* As many elements at once as a register holds, in GCC's vector types; sixteen where nothing is known of registers.
 *
 * Whatever is rounded here is rounded the same for each element, wherever it stands: loops have no remainder that is
 * computed otherwise, because what is left over at an end goes through these too, padded. */
#ifndef TANDEM_VECTOR_H
#define TANDEM_VECTOR_H

#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VECTORS_OF_AVX2
#endif

#ifdef VECTORS_OF_AVX2
enum { LANES = 8 };
#define NUMBERS_OF_LANES {0, 1, 2, 3, 4, 5, 6, 7}
#else
enum { LANES = 16 };
#define NUMBERS_OF_LANES {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef bf16 halves __attribute__((vector_size(2 * LANES)));
typedef int8_t quarters __attribute__((vector_size(LANES)));

static inline floats all(float value) { return value - (floats){0}; }

static inline floats widen(halves values) { return (floats)(__builtin_convertvector(values, words) << 16); }

static inline floats load_floats(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* The first `count` (at most LANES) elements, then zeros. */
static inline floats load_some_floats(const float *from, int64_t count) {
    floats values = {0};
    if (count >= LANES) return load_floats(from);
    memcpy(&values, from, (size_t)count * sizeof *from);
    return values;
}

static inline void store_floats(float *to, floats values) { memcpy(to, &values, sizeof values); }

/* The first `count` (at most LANES) elements, then zeros. */
static inline floats load_bf16(const bf16 *from, int64_t count) {
    halves values = {0};
    if (count >= LANES)
        memcpy(&values, from, sizeof values);
    else
        memcpy(&values, from, (size_t)count * sizeof *from);
    return widen(values);
}

static inline floats select_floats(ints mask, floats yes, floats no) {
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

#ifdef __AVX512BF16__
static inline floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
static inline floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline halves round_to_bf16(floats values) { return (halves)_mm512_cvtneps_pbh(values); }
static inline floats round_to_whole(floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline floats times_power_of_two(floats x, floats power) { return _mm512_scalef_ps(x, power); }
static inline float sum_of_lanes(floats lanes) { return _mm512_reduce_add_ps(lanes); }
static inline float max_of_lanes(floats lanes) { return _mm512_reduce_max_ps(lanes); }
static inline ints larger_ints(ints a, ints b) { return (ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static inline int32_t largest_lane(ints lanes) { return _mm512_reduce_max_epi32((__m512i)lanes); }
static inline ints widen_int8(quarters values) { return (ints)_mm512_cvtepi8_epi32((__m128i)values); }
#elif defined(VECTORS_OF_AVX2)
#include "vector_avx2.h"
#else
static inline floats larger(floats a, floats b) { return select_floats(a > b, a, b); }

static inline floats fused(floats a, floats b, floats c) {
    floats result;
    for (int i = 0; i < LANES; i++) result[i] = fmaf(a[i], b[i], c[i]);
    return result;
}

/* To nearest, ties to even. A NaN stays one: adding to its bits could make it an infinity or a zero. */
static inline halves round_to_bf16(floats values) {
    const words bits = (words)values, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((words)select_floats(values == values, (floats)rounded, (floats)(bits | 0x400000)) >> 16,
                                   halves);
}

/* Adding 1.5 * 2^23 leaves no room for a fraction. */
static inline floats round_to_whole(floats x) { return (x + 12582912.0f) - 12582912.0f; }

static inline floats times_power_of_two(floats x, floats power) {
    for (int i = 0; i < LANES; i++) x[i] = x[i] == x[i] ? ldexpf(x[i], (int)power[i]) : x[i];
    return x;
}

static inline float sum_of_lanes(floats lanes) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

static inline ints larger_ints(ints a, ints b) { return (ints)select_floats(a > b, (floats)a, (floats)b); }
static inline ints widen_int8(quarters values) { return __builtin_convertvector(values, ints); }

static inline int32_t largest_lane(ints lanes) {
    int32_t largest = lanes[0];
    for (int i = 1; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

static inline float max_of_lanes(floats lanes) {
    float largest = lanes[0];
    for (int i = 1; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}
#endif

/* Store the first `count` (at most LANES) elements. */
static inline void store_bf16(bf16 *to, floats values, int64_t count) {
    const halves rounded = round_to_bf16(values);
    if (count >= LANES)
        memcpy(to, &rounded, sizeof rounded);
    else
        memcpy(to, &rounded, (size_t)count * sizeof *to);
}

static inline floats absolute(floats values) { return (floats)((words)values & 0x7fffffffu); }

/* 2^x for x <= 0, to 2 units in the last place; 0 below 2^-150. A NaN stays one. A polynomial on [-1/2, 1/2] (of degree 5,
 * its largest relative error made least, 9e-8, with 1 at 0) times a power of two. */
static inline floats exp2_of_nonpositive(floats x) {
    const floats clamped = larger(all(-200.0f), x), whole = round_to_whole(clamped), f = clamped - whole;
    floats p = fused(all(1.326472719e-3f), f, all(9.671512644e-3f));
    p = fused(p, f, all(5.550733743e-2f));
    p = fused(p, f, all(2.402224209e-1f));
    p = fused(p, f, all(6.931469776e-1f));
    p = fused(p, f, all(1.0f));
    return times_power_of_two(p, whole);
}

#endif
