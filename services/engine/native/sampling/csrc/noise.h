/* The sampler's noise (gumbel.py has its definition), and the largest of logit + noise. */
#ifndef TANDEM_NOISE_H
#define TANDEM_NOISE_H

#include <stdbool.h>

#include "rows.h"

#define GOLDEN 0x9E3779B97F4A7C15u

static inline uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

static uint64_t noise_key(uint64_t seed, int64_t position) {
    return mix(mix(seed + GOLDEN) + (uint64_t)(position + 1) * GOLDEN);
}

/* The 52 bits that a variate is made of. */
static inline uint64_t noise_bits(uint64_t key, int64_t counter) {
    return mix(key + (uint64_t)(counter + 1) * GOLDEN) >> 12;
}

static double gumbel(uint64_t bits) { return -log(-log(((double)bits + 0.5) * 0x1p-52)); }

CLONES static void part_bits(uint64_t key, int64_t first, uint64_t *bits) {
    for (int j = 0; j < PART; j++) bits[j] = noise_bits(key, first + j);
}

/* The largest score so far, whose it is, and the next one. */
struct winner {
    double best, second;
    int64_t token;
};

static const struct winner NOBODY = {-INFINITY, -INFINITY, -1};

static void compete(struct winner *winner, double score, int64_t token) {
    if (score > winner->best) {
        winner->second = winner->best;
        winner->best = score;
        winner->token = token;
    } else if (score > winner->second) {
        winner->second = score;
    }
}

/* How close two scores may be and still be told apart by any libm. */
static double closeness(double score) { return 1e-9 + 1e-14 * fabs(score); }

static bool is_close(const struct winner *winner) {
    return !(winner->best - winner->second > closeness(winner->best));
}

/* The tokens `first` to `end` (PART at most, none above `largest`) that reach the threshold compete by x + noise. Two
 * logarithms are taken only where the bits could win. */
static void draw_from_part(
    const float *x, int64_t first, int64_t end, float largest, float threshold, uint64_t key, struct winner *winner) {
    uint64_t bits[PART], least = 0;
    if (winner->best > -INFINITY) {
        double needed = winner->best - (double)largest - closeness(winner->best);
        if (needed > 37.0) return; /* the largest variate is below that */
        double bound = exp(-exp(-needed)) * 0x1p52 - 64.0;
        least = bound > 0.0 ? (uint64_t)bound : 0;
    }
    part_bits(key, first, bits);
    for (int64_t i = first; i < end; i++)
        if (bits[i - first] >= least && x[i] >= threshold) compete(winner, (double)x[i] + gumbel(bits[i - first]), i);
}

#endif
