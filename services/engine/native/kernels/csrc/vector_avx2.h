/* The operations of vector.h on AVX2 and FMA, each with the result of AVX-512's. */
#ifndef TANDEM_VECTOR_AVX2_H
#define TANDEM_VECTOR_AVX2_H

static inline floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
static inline floats fused(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline floats round_to_whole(floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline ints larger_ints(ints a, ints b) { return (ints)_mm256_max_epi32((__m256i)a, (__m256i)b); }

static inline ints widen_int8(quarters values) {
    return (ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)values));
}

/* To nearest, ties to even. A NaN stays one. */
static inline halves round_to_bf16(floats values) {
    const words bits = (words)values, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const words upper = (words)select_floats(values == values, (floats)rounded, (floats)(bits | 0x400000)) >> 16;
    const __m128i low = _mm256_castsi256_si128((__m256i)upper), high = _mm256_extracti128_si256((__m256i)upper, 1);
    return (halves)_mm_packus_epi32(low, high);
}

/* x * 2^power for whole powers from -200 to 0, rounded once: of two powers that make it, the first changes no bit of x. */
static inline floats times_power_of_two(floats x, floats power) {
    const ints whole = (ints)_mm256_cvtps_epi32(power), first = whole >> 1, second = whole - first;
    return x * (floats)((first + 127) << 23) * (floats)((second + 127) << 23);
}

static inline float sum_of_lanes(floats lanes) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

static inline float max_of_lanes(floats lanes) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

static inline int32_t largest_lane(ints lanes) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)lanes), _mm256_extracti128_si256((__m256i)lanes, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

#endif
