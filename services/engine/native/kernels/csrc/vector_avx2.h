/* The operations of vector.h on two registers of AVX2 each, with the results of AVX-512's. GCC splits plain arithmetic on
 * sixteen elements well by itself; comparisons it would do one by one, and stores through the stack. */
#ifndef TANDEM_VECTOR_AVX2_H
#define TANDEM_VECTOR_AVX2_H

#include <immintrin.h>

union two_floats {
    floats both;
    __m256 half[2];
};

union two_ints {
    ints both;
    __m256i half[2];
};

static inline void store_floats(float *to, floats values) {
    const union two_floats x = {values};
    _mm256_storeu_ps(to, x.half[0]);
    _mm256_storeu_ps(to + 8, x.half[1]);
}

static inline ints less(floats a, floats b) {
    const union two_floats x = {a}, y = {b};
    const union two_ints mask = {.half = {(__m256i)_mm256_cmp_ps(x.half[0], y.half[0], _CMP_LT_OQ),
                                          (__m256i)_mm256_cmp_ps(x.half[1], y.half[1], _CMP_LT_OQ)}};
    return mask.both;
}

/* Differences do not overflow: these are places in a chunk. */
static inline ints within(ints values, int first, int last) { return ~((values - first) | (last - values)) >> 31; }

/* `b` where one of them is a NaN. */
static inline floats larger(floats a, floats b) {
    const union two_floats x = {a}, y = {b};
    const union two_floats r = {.half = {_mm256_max_ps(x.half[0], y.half[0]), _mm256_max_ps(x.half[1], y.half[1])}};
    return r.both;
}

static inline floats fused(floats a, floats b, floats c) {
    const union two_floats x = {a}, y = {b}, z = {c};
    const union two_floats r = {.half = {_mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]),
                                         _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1])}};
    return r.both;
}

/* The bits of eight floats, rounded to nearest, ties to even, in the upper half of each. A NaN stays one. */
static inline __m256i round_half(__m256 values) {
    const __m256i bits = (__m256i)values, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(rounded, quiet, (__m256i)_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
}

static inline halves round_to_bf16(floats values) {
    const union two_floats x = {values};
    const __m256i low = _mm256_srli_epi32(round_half(x.half[0]), 16), high = _mm256_srli_epi32(round_half(x.half[1]), 16);
    return (halves)_mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8); /* packed per 128 bits: 0 2 1 3 */
}

static inline floats round_to_whole(floats x) { return (x + 12582912.0f) - 12582912.0f; }

/* x * 2^power for whole powers from -200 to 0, rounded once: of two powers that make it, the first changes no bit of x. */
static inline floats times_power_of_two(floats x, floats power) {
    const ints whole = (ints)(power + 12582912.0f) - 0x4b400000, first = whole >> 1, second = whole - first;
    return x * (floats)((first + 127) << 23) * (floats)((second + 127) << 23);
}

/* In the order of AVX-512's reduction: halves, quarters, neighbours' neighbours, neighbours. */
static inline float sum16(floats lanes) {
    const union two_floats x = {lanes};
    const __m256 eight = _mm256_add_ps(x.half[0], x.half[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

static inline float max16(floats lanes) {
    const union two_floats x = {lanes};
    const __m256 eight = _mm256_max_ps(x.half[0], x.half[1]);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

static inline ints larger_ints(ints a, ints b) {
    const union two_ints x = {a}, y = {b};
    const union two_ints r = {.half = {_mm256_max_epi32(x.half[0], y.half[0]), _mm256_max_epi32(x.half[1], y.half[1])}};
    return r.both;
}

static inline int32_t max16_ints(ints lanes) {
    const union two_ints x = {lanes};
    const __m256i eight = _mm256_max_epi32(x.half[0], x.half[1]);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
}

#endif
