/* Finds where a sum over falling values reaches a target: the k-th largest value (each weighs 1), or the last one of a
 * nucleus (each weighs its probability). By buckets, of which only the one with the border is looked into again. */
#ifndef TANDEM_BORDER_H
#define TANDEM_BORDER_H

#include <stdbool.h>
#include "rows.h"

enum { NUM_BUCKETS = 1024, FEW = 24 };

/* The smallest value above which less than the target lies. */
struct border {
    float value;
    double above, through; /* weights of the values above it; those and its own */
    int64_t num_above, num_through;
    bool is_lowest; /* nothing lies below it */
};

static inline double weight_of(const double *weights, int64_t i) { return weights ? weights[i] : 1.0; }

static void exchange(float *values, double *weights, int64_t i, int64_t j) {
    float value = values[i];
    values[i] = values[j];
    values[j] = value;
    if (weights) {
        double weight = weights[i];
        weights[i] = weights[j];
        weights[j] = weight;
    }
}

/* Go down value by value; `border` comes with what lies above all of these. */
static struct border walk_down(float *values, double *weights, int64_t n, double target, struct border border) {
    for (int64_t i = 1; i < n; i++)
        for (int64_t j = i; j > 0 && values[j - 1] < values[j]; j--) exchange(values, weights, j - 1, j);
    for (int64_t i = 0; i < n;) {
        border.value = values[i];
        border.through = border.above, border.num_through = border.num_above;
        for (; i < n && values[i] == border.value; i++) {
            border.through += weight_of(weights, i);
            border.num_through++;
        }
        if (border.through >= target || i == n) {
            border.is_lowest &= i == n;
            return border;
        }
        border.above = border.through, border.num_above = border.num_through;
    }
    return border;
}

/* `values` `[n]`, n > 0, finite, and their weights (NULL: 1 each) come back in another order. Where their sum does not
 * reach the target, the border is the smallest. */
static struct border find_border(float *values, double *weights, int64_t n, double target) {
    struct border border = {.is_lowest = true};
    while (n > FEW) {
        float lowest, highest;
        find_extent(values, n, &lowest, &highest);
        if (highest == lowest) {
            border.value = highest;
            border.through = border.above, border.num_through = border.num_above + n;
            for (int64_t i = 0; i < n; i++) border.through += weight_of(weights, i);
            return border;
        }
        /* The highest comes into the first bucket, the lowest into the last: each round parts them. */
        const double scale = (NUM_BUCKETS - 0.01) / ((double)highest - (double)lowest);
#define BUCKET(value) ((int32_t)(((double)highest - (double)(value)) * scale))
        double sums[NUM_BUCKETS] = {0};
        int64_t counts[NUM_BUCKETS] = {0};
        for (int64_t i = 0; i < n; i++) {
            int32_t bucket = BUCKET(values[i]);
            sums[bucket] += weight_of(weights, i);
            counts[bucket]++;
        }
        int32_t chosen = 0;
        for (int32_t bucket = 0; bucket < NUM_BUCKETS; bucket++) {
            if (counts[bucket] == 0) continue;
            if (bucket != 0) {
                border.above += sums[chosen];
                border.num_above += counts[chosen];
            }
            chosen = bucket;
            if (border.above + sums[bucket] >= target) break;
        }
        for (int32_t bucket = chosen + 1; bucket < NUM_BUCKETS; bucket++) border.is_lowest &= counts[bucket] == 0;
        int64_t num_chosen = 0;
        for (int64_t i = 0; i < n; i++)
            if (BUCKET(values[i]) == chosen) exchange(values, weights, i, num_chosen++);
#undef BUCKET
        n = num_chosen;
    }
    return walk_down(values, weights, n, target, border);
}

#endif
