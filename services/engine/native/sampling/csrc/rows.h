/* Passes over whole rows of logits: what compilers vectorize. Each function exists once per width of vectors, and the
 * loader takes what the processor has. */
#ifndef TANDEM_ROWS_H
#define TANDEM_ROWS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES
#endif

/* Neighbouring tokens: of each part the largest logit is kept, so that parts without a candidate are passed over. */
enum { PART = 64, LANES = 16 };

static inline int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* e**x for x <= 0, relative error 2e-7; about 1e-38 for what is smaller. The polynomial is Cephes' (Moshier 1989). */
static inline float exp_float(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* the whole part ends up in the lowest bits */
    float whole = shifted - 12582912.0f;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    int32_t power = (bits_of(shifted) - 0x4B400000 + 127) << 23;
    float factor;
    memcpy(&factor, &power, sizeof factor);
    return sum * factor;
}

/* The same in double, relative error 1e-15: the power series of what is left of x beside a power of two. */
static inline double exp_double(double x) {
    static const double inverse_factorials[] = {
        1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
        1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5,
    };
    x = x < -700.0 ? -700.0 : x;
    double shifted = x * 1.4426950408889634 + 6755399441055744.0;
    int64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    double whole = shifted - 6755399441055744.0;
    double r = x - whole * 6.93147180369123816490e-1 - whole * 1.90821492927058770002e-10;
    double sum = inverse_factorials[0];
    for (int i = 1; i < 12; i++) sum = sum * r + inverse_factorials[i];
    sum = sum * r * r + r + 1.0;
    int64_t power = (int64_t)((uint64_t)(bits - 0x4338000000000000 + 1023) << 52);
    double factor;
    memcpy(&factor, &power, sizeof factor);
    return sum * factor;
}

/* Whole numbers in the order of the float32 numbers that they are the bits of; and back. */
static inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

static inline float from_ordered(int32_t key) {
    int32_t bits = ordered(key);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The largest of each part of x `[n]`; returns whether any element is NaN. By whole numbers: a maximum of these is
 * vectorized, one of float32 numbers is not. */
CLONES static int find_maxima(const float *x, int64_t n, float *maxima) {
    int32_t largest_magnitude = 0;
    int64_t start = 0;
    for (; start + PART <= n; start += PART) {
        int32_t key = INT32_MIN, magnitude = 0;
        for (int i = 0; i < PART; i++) {
            const int32_t bits = bits_of(x[start + i]), here = ordered(bits), positive = bits & 0x7fffffff;
            key = here > key ? here : key;
            magnitude = positive > magnitude ? positive : magnitude;
        }
        largest_magnitude = magnitude > largest_magnitude ? magnitude : largest_magnitude;
        maxima[start / PART] = from_ordered(key);
    }
    if (start < n) {
        int32_t key = INT32_MIN;
        for (int64_t i = start; i < n; i++) {
            const int32_t bits = bits_of(x[i]), here = ordered(bits), positive = bits & 0x7fffffff;
            key = here > key ? here : key;
            largest_magnitude = positive > largest_magnitude ? positive : largest_magnitude;
        }
        maxima[start / PART] = from_ordered(key);
    }
    return largest_magnitude > 0x7f800000;
}

/* The least and the largest of `n` finite values, n > 0. */
CLONES static void find_extent(const float *values, int64_t n, float *lowest, float *highest) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        const int32_t key = ordered(bits_of(values[i]));
        least = key < least ? key : least;
        most = key > most ? key : most;
    }
    *lowest = from_ordered(least), *highest = from_ordered(most);
}

/* `to` may be x. */
CLONES static void divide(const float *x, int64_t n, float by, float *to) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) to[i] = x[i] / by;
}

/* sum(e**(x - base)) over `n` elements, none above base; relative error 2e-6. */
CLONES static float sum_exponentials(const float *x, int64_t n, float base) {
    float lanes[LANES] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += exp_float(x[i + j] - base);
    for (; i < n; i++) sum += exp_float(x[i] - base);
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* e**(value - base) of each, none above base; returns their sum. */
CLONES static double weigh(const float *values, int64_t n, float base, double *weights) {
    double lanes[LANES] = {0}, sum = 0.0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            double weight = exp_double((double)values[i + j] - (double)base);
            weights[i + j] = weight;
            lanes[j] += weight;
        }
    for (; i < n; i++) sum += weights[i] = exp_double((double)values[i] - (double)base);
    for (int j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* Copies the elements of x `[n]` that are at least `cut`, and none that is -inf; returns how many. `to` has room for one
 * more than there are. */
static int64_t gather(const float *x, int64_t n, const float *maxima, float cut, float *to) {
    int64_t count = 0;
    for (int64_t start = 0; start < n; start += PART) {
        float largest = maxima[start / PART];
        if (largest < cut || largest == -INFINITY) continue;
        int64_t end = n - start < PART ? n : start + PART;
        for (int64_t i = start; i < end; i++) {
            to[count] = x[i];
            count += x[i] >= cut && x[i] > -INFINITY;
        }
    }
    return count;
}

#endif
