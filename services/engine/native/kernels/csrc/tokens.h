/* What is done to each token by itself: RMS norm, rotary embedding, and storing its keys and values. */
#ifndef TANDEM_TOKENS_H
#define TANDEM_TOKENS_H

#include "kv_rows.h"
#include "threads.h"
#include "vector.h"

enum { TOKENS_PER_TASK = 16 };

/* y = x / rms(x) * weight, rounded to bf16 before the weight as well as after: the order that `transformers` rounds in. */
static void norm_row(const bf16 *x, const bf16 *weight, bf16 *y, int64_t size, float eps) {
    floats even = {0}, odd = {0};
    for (int64_t k = 0; k < size; k += 2 * LANES) {
        const floats a = load_bf16(x + k, size - k), b = load_bf16(x + k + LANES, max64(0, size - k - LANES));
        even = fused(a, a, even);
        odd = fused(b, b, odd);
    }
    const float scale = 1.0f / sqrtf(sum_of_lanes(even + odd) / (float)size + eps);
    for (int64_t k = 0; k < size; k += LANES) {
        const floats normed = widen(round_to_bf16(load_bf16(x + k, size - k) * scale));
        store_bf16(y + k, normed * load_bf16(weight + k, size - k), size - k);
    }
}

struct norm_job {
    const bf16 *x, *weight;
    bf16 *y;
    int64_t num_rows, size;
    float eps;
};

static void norm_task(void *argument, int64_t task, int thread) {
    (void)thread;
    const struct norm_job *job = argument;
    for (int64_t row = task * TOKENS_PER_TASK; row < min64(job->num_rows, (task + 1) * TOKENS_PER_TASK); row++)
        norm_row(job->x + row * job->size, job->weight, job->y + row * job->size, job->size, job->eps);
}

/* x and y [num_rows][size], contiguous. */
EXPORT void tandem_rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, int64_t num_rows, int64_t size, float eps,
                            int num_threads) {
    struct norm_job job = {x, weight, y, num_rows, size, eps};
    run_tasks(norm_task, &job, ceil_div(num_rows, TOKENS_PER_TASK), num_threads);
}

/* Cos, then sin, of position * frequency, scaled: [num_tokens][2][half]. One at a time, by the C library: a vector
 * version may round a value otherwise than its scalar one, and a token would depend on its place in the batch. */
EXPORT void tandem_rope_table(const int64_t *positions, const float *frequencies, float factor, int64_t num_tokens,
                              int64_t half, float *table) {
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t k = 0; k < half; k++) {
            const float angle = (float)positions[token] * frequencies[k];
            table[token * 2 * half + k] = cosf(angle) * factor;
            table[(token * 2 + 1) * half + k] = sinf(angle) * factor;
        }
}

/* One call. Mirrored by `AppendCall` in library.py. Strides are in elements. */
struct append_call {
    bf16 *qkv;          /* [T][num_heads + 2 * num_kv_heads][head_dim]: queries and keys are changed in place */
    const float *table; /* of tandem_rope_table */
    const bf16 *norm;   /* of each query and key head, [num_heads + num_kv_heads][head_dim]; NULL: none */
    const int64_t *slots; /* [T]: block * block_size + offset */
    void *cache;        /* this layer of block 0: [2][num_kv_heads][block_size][head_dim], or rows in 8 bits */
    int64_t block_stride; /* of the cache: bfloat16, or bytes */
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, block_size;
    float eps;
    int32_t is_int8; /* the cache has rows in 8 bits (kv_rows.h) */
};

/* Puts a token's key or value, [head_dim], into its slot. */
static void store_row(const struct append_call *call, int64_t block, int64_t plane, int64_t offset, const bf16 *x) {
    const int64_t d = call->head_dim, row = plane * call->block_size + offset;
    if (call->is_int8)
        quantize_row((int8_t *)call->cache + block * call->block_stride + row * int8_row_bytes(d), x, d);
    else
        memcpy((bf16 *)call->cache + block * call->block_stride + row * d, x, (size_t)d * sizeof *x);
}

static void append_task(void *argument, int64_t task, int thread) {
    (void)thread;
    const struct append_call *call = argument;
    const int64_t d = call->head_dim, half = d / 2, num_rotated = call->num_heads + call->num_kv_heads;
    const int64_t row = (call->num_heads + 2 * call->num_kv_heads) * d;
    for (int64_t token = task * TOKENS_PER_TASK; token < min64(call->num_tokens, (task + 1) * TOKENS_PER_TASK); token++) {
        bf16 *qkv = call->qkv + token * row;
        const float *cosine = call->table + token * d, *sine = cosine + half;
        for (int64_t head = 0; head < num_rotated; head++) {
            bf16 *first = qkv + head * d, *second = first + half;
            if (call->norm) norm_row(first, call->norm + head * d, first, d, call->eps);
            for (int64_t k = 0; k < half; k += LANES) {
                const floats a = load_bf16(first + k, half - k), b = load_bf16(second + k, half - k);
                const floats c = load_some_floats(cosine + k, half - k), s = load_some_floats(sine + k, half - k);
                store_bf16(first + k, a * c - b * s, half - k);
                store_bf16(second + k, b * c + a * s, half - k);
            }
        }
        const int64_t block = call->slots[token] / call->block_size, offset = call->slots[token] % call->block_size;
        for (int64_t plane = 0; plane < 2 * call->num_kv_heads; plane++)
            store_row(call, block, plane, offset, qkv + (call->num_heads + plane) * d);
    }
}

/* Normalize and rotate queries and keys, and store keys and values in their slots. */
EXPORT void tandem_rope_append(const struct append_call *call, int num_threads) {
    run_tasks(append_task, (void *)call, ceil_div(call->num_tokens, TOKENS_PER_TASK), num_threads);
}

#endif
