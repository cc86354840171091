/* Attention over paged keys and values, for any mix of prefill chunks and decode tokens.
 *
 * The query heads of one KV head are folded into the query axis: a sequence with T new tokens and G heads to a KV head has
 * T * G rows there, row r being token r / G and head r % G. A task is one sequence, one KV head and up to 256 such rows.
 * It walks the context in chunks of 128 tokens, at the same places whatever the batch, packs a chunk's keys and values
 * once (both are B of a panel, see kernels.h), and lets each panel of 32 rows that sees some of it take it in:
 *
 *     S = Q K^T                       [rows][128], panel by panel of 32 tokens
 *     P = exp(S - max), l, O          online softmax: when the largest score grows, l and O shrink
 *     O += P V                        [rows][head_dim], panel by panel of 32 dimensions
 *
 * A cache in 8 bits (kv_rows.h) is packed as bfloat16, too, which holds its codes exactly; a key's scale multiplies its
 * column of S, a value's its column of P, behind the sum l.
 *
 * What a row must not see weighs exactly 0, and a chunk of such weights leaves l and O as they were, bit for bit: so it
 * does not matter which rows share a panel. (That holds because O is never denormal, see `rescale`; a -0, which may become
 * +0 so, is made +0 at the end.) */
#ifndef TANDEM_ATTENTION_H
#define TANDEM_ATTENTION_H

#include "kv_rows.h"
#include "threads.h"
#include "vector.h"
#include "widening.h"

enum {
    CHUNK = 128,                       /* tokens */
    CHUNK_BLOCKS = CHUNK / BF16_DEPTH, /* depth blocks of P V, and panels of S */
    TASK_ROWS = 256,
    ROW_VECTORS = COLUMNS / LANES,     /* of a row of a panel */
};

#define NO_SCORE (-1e30f) /* the largest of none: finite, so that differences are */

/* One call. Mirrored by `AttentionCall` in library.py. Strides are in elements, those of a cache in 8 bits in bytes. */
struct attention_call {
    const bf16 *q; /* [T][num_heads][head_dim] within rows of q_stride */
    int64_t q_stride;
    bf16 *out; /* [T][num_heads][head_dim], contiguous */
    const void *cache; /* this layer of block 0: [2][num_kv_heads][block_size][head_dim], or rows in 8 bits */
    int64_t block_stride;
    const int32_t *block_tables; /* [num_sequences][table_stride] */
    int64_t table_stride;
    const int32_t *query_start;  /* [num_sequences + 1] */
    const int32_t *context_lens; /* [num_sequences] */
    int64_t num_sequences, num_heads, num_kv_heads, head_dim, block_size;
    int64_t window; /* keys that a token sees, itself included; 0: all */
    float scale;    /* of scores */
    int32_t is_int8; /* the cache has rows in 8 bits */
};

/* What a thread works in. The arrays have num_depth = ceil(head_dim / 32) blocks where [D] stands. */
struct attention_space {
    a_bf16 *queries; /* panels of [D][rows][32] */
    float *outputs; /* panels of [D][rows][32] */
    bf16 *keys;     /* [CHUNK_BLOCKS][D][2 tiles] */
    bf16 *values;   /* [D][CHUNK_BLOCKS][2 tiles] */
    float *scores;  /* [CHUNK_BLOCKS][rows][32] */
    a_bf16 *weights; /* [CHUNK_BLOCKS][rows][32] */
    float *largest; /* [TASK_ROWS] */
    float *sums;    /* [TASK_ROWS] */
};

static int64_t attention_space_bytes(int64_t head_dim) {
    const int64_t padded = round_up(head_dim, BF16_DEPTH);
    return TASK_ROWS * padded * (int64_t)sizeof(a_bf16) + TASK_ROWS * padded * 4 + 2 * CHUNK * padded * 2
           + ROWS * CHUNK * 4 + ROWS * CHUNK * (int64_t)sizeof(a_bf16) + 2 * TASK_ROWS * 4;
}

static struct attention_space attention_space(void *workspace, int thread, int64_t head_dim) {
    const int64_t padded = round_up(head_dim, BF16_DEPTH);
    struct attention_space space;
    char *next = (char *)workspace + thread * attention_space_bytes(head_dim);
    space.queries = (a_bf16 *)next, next += TASK_ROWS * padded * (int64_t)sizeof(a_bf16);
    space.outputs = (float *)next, next += TASK_ROWS * padded * 4;
    space.keys = (bf16 *)next, next += CHUNK * padded * 2;
    space.values = (bf16 *)next, next += CHUNK * padded * 2;
    space.scores = (float *)next, next += ROWS * CHUNK * 4;
    space.weights = (a_bf16 *)next, next += ROWS * CHUNK * (int64_t)sizeof(a_bf16);
    space.largest = (float *)next, next += TASK_ROWS * 4;
    space.sums = (float *)next;
    return space;
}

/* Of the functions from here to `attend`, there are two each: for a cache in bfloat16, and for one in 8 bits. */
#define FOR_BOTH static inline __attribute__((always_inline))

static inline int64_t row_bytes(const struct attention_call *call, const bool int8) {
    return int8 ? int8_row_bytes(call->head_dim) : call->head_dim * (int64_t)sizeof(bf16);
}

/* The 16 rows of tokens `token` to `token + 15` of a sequence (a multiple of 16) in the keys, or, `values` true, values. */
FOR_BOTH const char *token_rows(const struct attention_call *call, const int32_t *table, int64_t head, int64_t token,
                                bool values, const bool int8) {
    const int64_t block = token / call->block_size, offset = token % call->block_size;
    const int64_t plane = (values ? call->num_kv_heads : 0) + head;
    const int64_t block_bytes = call->block_stride * (int8 ? 1 : (int64_t)sizeof(bf16));
    return (const char *)call->cache + table[block] * block_bytes
           + (plane * call->block_size + offset) * row_bytes(call, int8);
}

/* Ask memory for keys and values of 16 tokens. Inlined, or GCC drops it: it has no effect that a compiler knows of. */
FOR_BOTH void prefetch_tokens(const struct attention_call *call, const int32_t *table, int64_t head, int64_t token,
                              const bool int8) {
    const char *keys = token_rows(call, table, head, token, false, int8);
    const char *values = token_rows(call, table, head, token, true, int8);
    for (int64_t i = 0; i < 16 * row_bytes(call, int8); i += LINE) {
        __builtin_prefetch(keys + i, 0, 3);
        __builtin_prefetch(values + i, 0, 3);
    }
}

/* Keys of 16 tokens as a tile for each block of depth; the blocks are `stride` elements apart. */
static void pack_keys(bf16 *out, ptrdiff_t stride, const bf16 *rows, int64_t head_dim) {
    int64_t d = 0;
    for (; d + BF16_DEPTH <= head_dim; d += BF16_DEPTH, out += stride)
        transpose16((uint32_t *)(void *)out, rows + d, head_dim * (ptrdiff_t)sizeof *rows);
    if (d == head_dim) return;
    bf16 padded[16][BF16_DEPTH] ALIGNED = {{0}};
    for (int token = 0; token < 16; token++)
        memcpy(padded[token], rows + token * head_dim + d, (size_t)(head_dim - d) * sizeof *rows);
    transpose16((uint32_t *)(void *)out, padded, LINE);
}

/* The same of codes. */
static void pack_key_codes(bf16 *out, ptrdiff_t stride, const int8_t *rows, int64_t head_dim) {
    bf16 widened[16][BF16_DEPTH] ALIGNED;
    for (int64_t d = 0; d < head_dim; d += BF16_DEPTH, out += stride) {
        for (int token = 0; token < 16; token++)
            for (int64_t i = 0; i < BF16_DEPTH; i += LANES)
                store_bf16(widened[token] + i,
                           load_codes(rows + token * int8_row_bytes(head_dim) + d + i, max64(0, head_dim - d - i)), LANES);
        transpose16((uint32_t *)(void *)out, widened, LINE);
    }
}

/* Two rows of some dimensions as part of a line: bfloat16 is the upper half of a float, the even token's goes into the lower. */
static inline void pack_pair(bf16 *line, floats even, floats odd) {
    const words pairs = (words)even >> 16 | (words)odd;
    memcpy(line, &pairs, sizeof pairs);
}

/* Values of 16 tokens, of which `count` exist, as 8 lines in a tile for each 16 dimensions; the tiles of a pair are 512
 * elements apart, the pairs `stride`. A missing token's values are zeros, whatever stands in the cache. */
FOR_BOTH void pack_any_values(bf16 *out, ptrdiff_t stride, const void *rows, int64_t head_dim, int64_t count,
                              const bool int8) {
    for (int64_t d = 0; d < round_up(head_dim, COLUMNS); d += LANES) {
        bf16 *tile = out + d / COLUMNS * stride + d % COLUMNS / 16 * 512 + (LANES < 16 ? d % 16 * 2 : 0);
        const int64_t width = max64(0, head_dim - d);
        for (int64_t token = 0; token < 16; token += 2, tile += 2 * 16) {
            const bool is_whole = token + 1 < count && width >= LANES;
            const int64_t num_even = is_whole ? LANES : token < count ? width : 0;
            const int64_t num_odd = is_whole ? LANES : token + 1 < count ? width : 0;
            if (int8) {
                const int8_t *even = (const int8_t *)rows + token * int8_row_bytes(head_dim) + d;
                pack_pair(tile, load_codes(even, num_even), load_codes(even + int8_row_bytes(head_dim), num_odd));
            } else {
                const bf16 *even = (const bf16 *)rows + token * head_dim + d;
                pack_pair(tile, load_bf16(even, num_even), load_bf16(even + head_dim, num_odd));
            }
        }
    }
}

static void pack_values(bf16 *out, ptrdiff_t stride, const void *rows, int64_t head_dim, int64_t count) {
    pack_any_values(out, stride, rows, head_dim, count, false);
}

static void pack_value_codes(bf16 *out, ptrdiff_t stride, const void *rows, int64_t head_dim, int64_t count) {
    pack_any_values(out, stride, rows, head_dim, count, true);
}

/* Of a chunk's tokens, where the cache is in 8 bits; 0 for those that do not exist. */
struct chunk_scales {
    float keys[CHUNK], values[CHUNK];
};

/* Keys and values of the chunk from `start` on, up to `end` at most, padded to whole panels; those before `context_len`
 * exist. */
FOR_BOTH void pack_chunk(const struct attention_call *call, const struct attention_space *space,
                         struct chunk_scales *scales, const int32_t *table, int64_t head, int64_t start, int64_t end,
                         int64_t context_len, const bool int8) {
    const int64_t stop = min64(end, start + CHUNK);
    const int64_t d = call->head_dim, num_depth = ceil_div(d, BF16_DEPTH);
    for (int64_t token = start; token < round_up(stop, COLUMNS); token += 16) {
        const int64_t panel = (token - start) / COLUMNS, half = (token - start) % COLUMNS / 16;
        const int64_t count = max64(0, min64(16, context_len - token));
        bf16 *keys = space->keys + panel * num_depth * (B_BLOCK / 2) + half * 512;
        bf16 *values = space->values + panel * (B_BLOCK / 2) + half * 256;
        if (token + 16 < end) prefetch_tokens(call, table, head, token + 16, int8);
        if (int8) {
            memset(scales->keys + (token - start), 0, 16 * sizeof(float));
            memset(scales->values + (token - start), 0, 16 * sizeof(float));
        }
        if (count == 0) {
            for (int64_t k = 0; k < num_depth; k++) memset(keys + k * (B_BLOCK / 2), 0, B_BLOCK / 2);
            pack_values(values, CHUNK_BLOCKS * (B_BLOCK / 2), space->keys, d, 0); /* reads nothing */
            continue;
        }
        const char *key_rows = token_rows(call, table, head, token, false, int8);
        const char *value_rows = token_rows(call, table, head, token, true, int8);
        if (int8) {
            for (int64_t i = 0; i < count; i++) {
                scales->keys[token - start + i] = scale_of_row((const int8_t *)key_rows + i * row_bytes(call, int8), d);
                scales->values[token - start + i] = scale_of_row((const int8_t *)value_rows + i * row_bytes(call, int8), d);
            }
            pack_key_codes(keys, B_BLOCK / 2, (const int8_t *)key_rows, d);
            pack_value_codes(values, CHUNK_BLOCKS * (B_BLOCK / 2), value_rows, d, count);
        } else {
            pack_keys(keys, B_BLOCK / 2, (const bf16 *)(const void *)key_rows, d);
            pack_values(values, CHUNK_BLOCKS * (B_BLOCK / 2), value_rows, d, count);
        }
    }
}

/* O *= factor, without denormals: the dot products would flush them, so that adding 0 showed. */
static inline void rescale(float *o, float factor) {
    for (int i = 0; i < COLUMNS; i += LANES) {
        const floats values = load_floats(o + i) * factor;
        store_floats(o + i, (floats)((ints)values & ~(absolute(values) < FLT_MIN))); /* a NaN stays one */
    }
}

/* Rows `row` to `row + rows` of the task's. */
struct row_panel {
    int64_t row;
    int rows;
    int64_t first_position, last_position; /* of its tokens */
};

/* S of a panel's rows over `num_panels * 32` tokens. */
static void multiply_keys(const struct attention_space *space, const a_bf16 *queries, int64_t num_depth, int rows,
                          int64_t num_panels) {
    const struct ahead nothing_ahead = {(const char *)queries, 0};
    for (int64_t i = 0; i < num_panels; i++)
        panel_bf16(space->scores + i * rows * COLUMNS, queries, space->keys + i * num_depth * (B_BLOCK / 2), num_depth,
                   rows, false, nothing_ahead);
}

/* O += P V of a panel's rows over `num_panels * 32` tokens. */
static void add_values(const struct attention_space *space, float *outputs, int64_t num_depth, int rows,
                       int64_t num_panels) {
    const struct ahead nothing_ahead = {(const char *)space->weights, 0};
    for (int64_t k = 0; k < num_depth; k++)
        panel_bf16(outputs + k * rows * COLUMNS, space->weights, space->values + k * CHUNK_BLOCKS * (B_BLOCK / 2),
                   num_panels, rows, true, nothing_ahead);
}

/* Let a panel take in `num_panels * 32` tokens from `start` on. */
FOR_BOTH void attend_chunk(const struct attention_call *call, const struct attention_space *space,
                           const struct chunk_scales *scales, const struct row_panel *panel, int64_t row_offset,
                           int64_t first_query, int64_t start, int64_t num_panels, const bool int8) {
    const int64_t num_depth = ceil_div(call->head_dim, BF16_DEPTH), group = call->num_heads / call->num_kv_heads;
    const int rows = panel->rows;
    const float scale = call->scale * 1.44269504f;
    const a_bf16 *queries = space->queries + panel->row * num_depth * BF16_DEPTH;
    float *outputs = space->outputs + panel->row * num_depth * COLUMNS;
    const ints token_of_lane = NUMBERS_OF_LANES;
    multiply_keys(space, queries, num_depth, rows, num_panels);
    for (int row = 0; row < rows; row++) {
        /* Tokens of the chunk that this row sees: first to last. */
        const int64_t position = first_query + (row_offset + panel->row + row) / group;
        const int first = (int)(call->window == 0 ? 0 : max64(0, min64(CHUNK, position - call->window + 1 - start)));
        const int last = (int)min64(CHUNK - 1, position - start);
        float *largest = space->largest + panel->row + row, *sum = space->sums + panel->row + row;
        floats scores[CHUNK / LANES], greatest = all(*largest), total = {0};
        for (int i = 0; i < num_panels * COLUMNS / LANES; i++) {
            scores[i] = load_floats(space->scores + (i / ROW_VECTORS * rows + row) * COLUMNS + i % ROW_VECTORS * LANES);
            if (int8) scores[i] *= load_floats(scales->keys + i * LANES);
            if (i * LANES < first || i * LANES + LANES - 1 > last) {
                const ints token = token_of_lane + i * LANES;
                scores[i] = select_floats((token >= first) & (token <= last), scores[i], all(-INFINITY));
            }
            greatest = larger(scores[i], greatest);
        }
        const float before = *largest, now = max_of_lanes(greatest);
        *largest = now;
        for (int i = 0; i < num_panels * COLUMNS / LANES; i++) {
            const floats weights = exp2_of_nonpositive((scores[i] - now) * scale);
            total += weights;
            put_weights(space->weights + (i / ROW_VECTORS * rows + row) * COLUMNS + i % ROW_VECTORS * LANES,
                        int8 ? weights * load_floats(scales->values + i * LANES) : weights);
        }
        const float factor = exp2_of_nonpositive(all((before - now) * scale))[0];
        *sum = *sum * factor + sum_of_lanes(total);
        if (factor != 1.0f)
            for (int64_t k = 0; k < num_depth; k++) rescale(outputs + (k * rows + row) * COLUMNS, factor);
    }
    add_values(space, outputs, num_depth, rows, num_panels);
}

struct attention_job {
    const struct attention_call *call;
    void *workspace;
};

static int64_t num_row_groups(const struct attention_call *call, int64_t sequence) {
    const int64_t num_queries = call->query_start[sequence + 1] - call->query_start[sequence];
    return ceil_div(num_queries * (call->num_heads / call->num_kv_heads), TASK_ROWS);
}

FOR_BOTH void attend(const struct attention_job *job, int64_t task, int thread, const bool int8) {
    const struct attention_call *call = job->call;
    struct chunk_scales scales ALIGNED;
    int64_t sequence = 0;
    while (task >= num_row_groups(call, sequence) * call->num_kv_heads)
        task -= num_row_groups(call, sequence++) * call->num_kv_heads;
    const int64_t head = task % call->num_kv_heads, row_offset = task / call->num_kv_heads * TASK_ROWS;

    const struct attention_space space = attention_space(job->workspace, thread, call->head_dim);
    const int64_t d = call->head_dim, num_depth = ceil_div(d, BF16_DEPTH);
    const int64_t group = call->num_heads / call->num_kv_heads, start_row = call->query_start[sequence];
    const int64_t num_queries = call->query_start[sequence + 1] - start_row;
    const int64_t context_len = call->context_lens[sequence], first_query = context_len - num_queries;
    const int64_t num_rows = min64(TASK_ROWS, num_queries * group - row_offset);
    const int32_t *table = call->block_tables + sequence * call->table_stride;

    const int64_t first_position = first_query + row_offset / group;
    const int64_t first_seen = call->window == 0 ? 0 : max64(0, first_position - call->window + 1);
    const int64_t first_chunk = first_seen / CHUNK * CHUNK, end = first_query + (row_offset + num_rows - 1) / group + 1;

    struct row_panel panels[TASK_ROWS / ROWS];
    const int64_t num_panels = ceil_div(num_rows, ROWS);
    for (int64_t i = 0; i < num_panels; i++) {
        struct row_panel *panel = &panels[i];
        panel->row = i * ROWS;
        panel->rows = (int)min64(ROWS, num_rows - panel->row);
        panel->first_position = first_query + (row_offset + panel->row) / group;
        panel->last_position = first_query + (row_offset + panel->row + panel->rows - 1) / group;
        for (int row = 0; row < panel->rows; row++) {
            const int64_t r = row_offset + panel->row + row;
            const bf16 *q = call->q + (start_row + r / group) * call->q_stride + (head * group + r % group) * d;
            a_bf16 *out = space.queries + panel->row * num_depth * BF16_DEPTH + row * BF16_DEPTH;
            for (int64_t k = 0; k < d; k += BF16_DEPTH, out += panel->rows * BF16_DEPTH) put_bf16(out, q + k, d - k);
            space.largest[panel->row + row] = NO_SCORE;
            space.sums[panel->row + row] = 0;
        }
    }
    memset(space.outputs, 0, (size_t)(num_rows * num_depth * COLUMNS) * sizeof *space.outputs);

    for (int64_t start = first_chunk; start < end; start += CHUNK) {
        pack_chunk(call, &space, &scales, table, head, start, end, context_len, int8);
        for (int64_t i = 0; i < num_panels; i++) {
            const struct row_panel *panel = &panels[i];
            const bool has_passed = call->window != 0 && panel->first_position - call->window + 1 >= start + CHUNK;
            if (panel->last_position < start || has_passed) continue;
            const int64_t stop = min64(panel->last_position + 1, start + CHUNK);
            attend_chunk(call, &space, &scales, panel, row_offset, first_query, start, ceil_div(stop - start, COLUMNS), int8);
        }
    }
    for (int64_t i = 0; i < num_panels; i++)
        for (int row = 0; row < panels[i].rows; row++) {
            const int64_t r = row_offset + panels[i].row + row;
            bf16 *out = call->out + ((start_row + r / group) * call->num_heads + head * group + r % group) * d;
            const float *o = space.outputs + panels[i].row * num_depth * COLUMNS + row * COLUMNS;
            const float inverse = 1.0f / space.sums[panels[i].row + row];
            for (int64_t k = 0; k < d; k += LANES)
                store_bf16(out + k, load_floats(o + k / COLUMNS * panels[i].rows * COLUMNS + k % COLUMNS) * inverse + 0.0f, d - k);
        }
}

#undef FOR_BOTH

static void attend_task(void *argument, int64_t task, int thread) { attend(argument, task, thread, false); }
static void attend_int8_task(void *argument, int64_t task, int thread) { attend(argument, task, thread, true); }

/* Bytes of workspace, aligned to 64, that `tandem_attention` needs. */
EXPORT int64_t tandem_attention_workspace(int64_t head_dim, int num_threads) {
    return attention_space_bytes(head_dim) * num_threads;
}

/* Let each query see its sequence up to itself. block_size is a multiple of 16, head_dim even. */
EXPORT void tandem_attention(const struct attention_call *call, void *workspace, int num_threads) {
    struct attention_job job = {call, workspace};
    int64_t num_tasks = 0;
    for (int64_t sequence = 0; sequence < call->num_sequences; sequence++)
        num_tasks += num_row_groups(call, sequence) * call->num_kv_heads;
    run_tasks(call->is_int8 ? attend_int8_task : attend_task, &job, num_tasks, num_threads);
}

#endif
